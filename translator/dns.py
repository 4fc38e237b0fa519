"""Names without an address: a sidecar's own DNS answers for them (Istio's DNS proxying).

An application has to resolve a name before there is a connection to capture (translator.capture).
"""

from collections.abc import Iterator
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

from google.protobuf.message import Message

from crds.problems import ObjectKey
from translator.endpoints import is_ip
from translator.hosts import service_name, short_name
from translator.proxy import Proxy
from translator.routes import HostRoutes, RouteTable
from translator.world import World
from xds import protos

_TTL = timedelta(seconds=30)
"""The shortest that Envoy takes."""


def dns_filter(world: World, proxy: Proxy, table: RouteTable) -> Message:
    """Make the filter that answers for names without an address; others it asks resolv.conf's servers."""
    resolver = protos.CaresDnsResolverConfig(dns_resolver_options={"no_default_search_domain": True})
    return protos.DnsFilter(
        stat_prefix="dns",
        server_config={"inline_dns_table": {"virtual_domains": list(_virtual_domains(world, proxy, table))}},
        client_config={
            "resolver_timeout": timedelta(seconds=5),
            "max_pending_lookups": 4096,
            "typed_dns_resolver_config": {
                "name": "envoy.network.dns_resolver.cares",
                "typed_config": protos.pack(resolver),
            },
        },
    )


def _virtual_domains(world: World, proxy: Proxy, table: RouteTable) -> Iterator[dict[str, Any]]:
    providers, domain = world.providers_for(proxy), world.mesh.cluster_domain
    for host, name in _named(table):
        provider = providers.get(short_name(name, proxy.namespace, domain))
        resolved = provider is not None and provider.spec.host in dict(provider.spec.addresses)
        if resolved or _has_address(world, name, host.objects[0].namespace):
            continue
        addresses = _virtual_addresses(host.place, with_ipv6=proxy.has_ipv6)
        for each in host.names:
            if not is_ip(each.strip("[]")) and not each.startswith("*"):
                yield {
                    "name": each,
                    "endpoint": {"address_list": {"address": addresses}},
                    "answer_ttl": _TTL,
                }


def _named(table: RouteTable) -> Iterator[tuple[HostRoutes, str]]:
    """Return the hosts of objects, and what these call them."""
    for host in table.hosts:
        virtual_host: Any = host.virtual_host
        if host.objects:
            yield host, virtual_host.name
    for host in table.plain:
        yield host, host.destinations[0].provider.spec.host


def _has_address(world: World, host: str, namespace: str) -> bool:
    """Whether a host is a Service with an address. In a file, where nobody gives it one, it has none."""
    named = service_name(host, namespace, world.mesh.cluster_domain)
    service = world.services.get(ObjectKey("Service", named[1], named[0])) if named else None
    return service is not None and (bool(service.spec.cluster_ip) or service.spec.type == "ExternalName")


def _virtual_addresses(place: int, *, with_ipv6: bool) -> list[str]:
    """Return the addresses of a host, of Istio's ranges. Two hosts may share one: their routes go by name."""
    number = place % 0xFFFE + 1
    found = [str(ip_address("240.240.0.0") + number)]
    return [*found, str(ip_address("2001:2::f0f0:0") + number)] if with_ipv6 else found
