"""Captured traffic: what applications beside a sidecar send, without knowing of it.

iptables (deploy/image/capture.sh) hands their connections to port 15001; Envoy asks the kernel where each
one was going, and gives it to the listener of that port, which is not bound. HTTP on such a port gets the
routes of the sidecar's HTTP proxy, so that all that holds there holds here too. Everything else passes
through to where it was going: hosts that no LLMRoute and no LLMProvider names, bytes that are not HTTP, all
other ports. It shall notice nothing, so that here, unlike at the HTTP proxy, nothing is done to a request
before its route is known. The names are Istio's.

Names without an address are given one, if the proxy says so (Istio's DNS proxying): an application has to
resolve a name before there is a connection to capture.
"""

import zlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any

from google.protobuf.message import Message

from crds.problems import ObjectKey
from translator import scopes
from translator.clusters import HOST_METADATA
from translator.endpoints import is_ip
from translator.hosts import service_name
from translator.listeners import connection_manager
from translator.memory import Memory
from translator.parts import Collection, Part
from translator.proxy import Proxy
from translator.routes import (
    LOWER_CASE_HOST,
    PLAIN,
    PLAIN_CLUSTER,
    ROUTES_HEADER,
    HostRoutes,
    RouteTable,
    has_catch_all,
)
from translator.rules import NOT_FORWARDED
from translator.world import World
from xds import protos
from xds.resources import Resource

PORT = 15001
"""Where captured connections arrive, as in Istio."""
DNS_PORT = 15053
"""Where captured DNS queries arrive, as in Istio."""

PASSTHROUGH = "PassthroughCluster"
_BLACK_HOLE = "BlackHoleCluster"
_PASSTHROUGH_ROUTE = "allow_any|passthrough"
"""No rule of an LLMRoute has a | in its name. The script of token limits knows it."""

_ROUTES = "captured"
_BUCKETS = 128
"""Above a number of hosts there are many route configurations (translator.scopes). Unknown hosts have no
scope of their own, so here scopes are not names of hosts but what these are hashed to, and each bucket lets
unknown hosts pass. With 10,000 hosts, one has 100 KB."""
_BUCKET_HEADER = "x-envoy-llmplane-bucket"
_OWN_HEADERS = "x-envoy-llmplane-"
_KEPT = {"x-forwarded-proto": f"{_OWN_HEADERS}proto", "x-request-id": f"{_OWN_HEADERS}id"}
"""Headers that Envoy sets where there are none: under which names it keeps the client's own meanwhile."""

_HTTP_PROTOCOL_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_CLEANER = "client_headers"
_CLEANING = protos.pack(
    protos.HeaderMutationPerRoute(
        mutations={
            "request_mutations": [
                {"remove_on_match": {"key_matcher": {"prefix": prefix, "ignore_case": True}}}
                for prefix in ("x-envoy-", "x-forwarded-")
            ]
        }
    )
)
"""Takes away what steers Envoy's router, or tells of the client. With buckets, Envoy knows the route when it
is too late to switch a filter off by it: so the filter does nothing, but where the route says so."""

_CLUSTER_NAME = "cluster_name"
_FIND_CLUSTER = "find_cluster"
_FOUND = "llm.capture.cluster"
_FIND = protos.pack(
    protos.SetFilterState(
        on_request_headers=[
            {
                "object_key": _FOUND,
                "factory_key": "envoy.string",
                "format_string": {"text_format_source": {"inline_string": "%UPSTREAM_CLUSTER_RAW%"}},
            }
        ]
    )
)
_SWITCHES = {
    _CLUSTER_NAME: protos.pack(protos.FilterConfig(config={})),
    _FIND_CLUSTER: protos.pack(protos.FilterConfig(config=_FIND)),
}
_NOT_NORMAL = r".*([A-Z].*|\.|:[0-9]+)"
"""A host that is not as clusters are named after it: in upper case, with a last dot or a port."""
_TTL = timedelta(seconds=30)
"""The shortest that Envoy takes."""
_UNLIMITED = {"value": 2**32 - 1}
_NO_TIMEOUT = timedelta()

_HOST = f"""
function envoy_on_request(handle)
  local headers = handle:headers()
  local host = headers:get(":authority"):lower():gsub(":%d+$", ""):gsub("%.$", "")
  headers:replace("{ROUTES_HEADER}", "{PLAIN}" .. host)
"""
"""Begins a script: names the cluster that a plain provider with the host of a request has."""
_NAME_CLUSTER = f"""{_HOST}
  handle:clearRouteCache()
end
"""
_CHOOSE_BUCKET = f"""{_HOST}
  local a, b = 1, 0
  for i = 1, #host do
    a = a + host:byte(i)
    b = b + a
  end
  local bucket = headers:get(":method") == "CONNECT" and {_BUCKETS} or b % 65521 % {_BUCKETS}
  headers:replace("{_BUCKET_HEADER}", "bucket " .. bucket)
  handle:clearRouteCache()
end
"""
"""Does what `bucket` does, for the host of a request; the last bucket has no hosts."""


def listeners(world: World, proxy: Proxy, table: RouteTable) -> Iterator[Message]:
    """Make the listeners of captured traffic."""
    to_itself = {
        "filter_chain_match": {"destination_port": {"value": PORT}},
        "filters": [_tcp_proxy(_BLACK_HOLE)],
    }
    yield protos.Listener(
        name="virtualOutbound",
        address=_socket(proxy.bind_address, PORT),
        additional_addresses=[{"address": _socket("::1", PORT)}] if proxy.has_ipv6 else [],
        traffic_direction="OUTBOUND",
        use_original_dst={"value": True},
        filter_chains=[to_itself, {"filters": [_tcp_proxy(PASSTHROUGH)]}],
    )
    manager = protos.pack(_connection_manager(world, proxy, scoped=scopes.is_scoped(table)))
    for port in sorted(_http_ports(world, proxy)):
        yield protos.Listener(
            name=f"0.0.0.0_{port}",
            address=_socket("0.0.0.0", port),  # noqa: S104 - nothing is bound
            additional_addresses=[{"address": _socket("::", port)}] if proxy.has_ipv6 else [],
            bind_to_port={"value": False},
            traffic_direction="OUTBOUND",
            # Without a timeout: a client that connects long before it sends is not to get around its routes.
            listener_filters_timeout=_NO_TIMEOUT,
            listener_filters=[
                {
                    "name": "envoy.filters.listener.http_inspector",
                    "typed_config": protos.pack(protos.HttpInspector()),
                }
            ],
            filter_chains=[
                {
                    "filter_chain_match": {"application_protocols": ["http/1.0", "http/1.1", "h2c"]},
                    "filters": [
                        {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
                    ],
                }
            ],
            default_filter_chain={"filters": [_tcp_proxy(PASSTHROUGH)]},
        )
    if proxy.captures_dns:
        dns = {"name": "envoy.filters.udp.dns_filter", "typed_config": protos.pack(_dns(world, proxy, table))}
        for address in (proxy.bind_address, *(["::1"] if proxy.has_ipv6 else [])):
            yield protos.Listener(
                name=f"dns_{address}",
                address=_socket(address, DNS_PORT, protocol="UDP"),
                udp_listener_config={},
                listener_filters=[dns],
            )


def clusters() -> Iterator[Message]:
    """Make the clusters of what passes through, and of what nobody shall get."""
    yield protos.Cluster(name=_BLACK_HOLE, type="STATIC", connect_timeout=timedelta(seconds=1))
    made = protos.Cluster(
        name=PASSTHROUGH,
        type="ORIGINAL_DST",
        lb_policy="CLUSTER_PROVIDED",
        connect_timeout=timedelta(seconds=10),
        circuit_breakers={
            "thresholds": [
                {
                    "max_connections": _UNLIMITED,
                    "max_pending_requests": _UNLIMITED,
                    "max_requests": _UNLIMITED,
                }
            ]
        },
        # Some servers know their clients by the connection (NTLM).
        connection_pool_per_downstream_connection=True,
    )
    options = protos.HttpProtocolOptions(
        use_downstream_protocol_config={"http_protocol_options": _http1(), "http2_protocol_options": {}}
    )
    made.typed_extension_protocol_options[_HTTP_PROTOCOL_OPTIONS].CopyFrom(protos.pack(options))
    made.metadata.filter_metadata[HOST_METADATA[0]].update({HOST_METADATA[1]: PASSTHROUGH})  # for metrics
    yield made


def routes(table: RouteTable, memory: Memory, *, with_scopes: bool) -> Iterator[Part]:
    """Make the routes of captured traffic, in the form or the forms that the proxy's other routes have."""
    if scopes.needs_one(table):
        hosts = tuple((host, host.names) for host in table.hosts)
        make = partial(_configuration, _ROUTES, hosts, table.catch_all, memory, [_tunnel()])
        yield memory.recall((_ROUTES, table.hosts, id(table.catch_all)), table.catch_all, make)
    if with_scopes:
        for number, names in enumerate([*_buckets(table), ()]):
            make = partial(_scope, number, names, table.catch_all, memory)
            key = (_ROUTES, number, names, id(table.catch_all))
            yield memory.recall(key, table.catch_all, make)


_Names = tuple[tuple[HostRoutes, tuple[str, ...]], ...]
"""Hosts, and those of their names that count."""


def _buckets(table: RouteTable) -> list[_Names]:
    found: list[list[tuple[HostRoutes, tuple[str, ...]]]] = [[] for _ in range(_BUCKETS)]
    for host in table.hosts:
        numbers = [bucket(name) for name in host.names]
        for number in dict.fromkeys(numbers):
            found[number].append(
                (host, tuple(name for name, of in zip(host.names, numbers, strict=True) if of == number))
            )
    return [tuple(of) for of in found]


def bucket(name: str) -> int:
    """Return the bucket of a host; names are in lower case."""
    return (zlib.adler32(name.encode()) >> 16) % _BUCKETS


def _configuration(
    name: str, hosts: _Names, catch_all: Message | None, memory: Memory, first: Sequence[Message] = ()
) -> Part:
    """Make a route configuration; ``first`` are routes that each host has in front of its own."""
    virtual_hosts = [
        memory.recall((_ROUTES, id(host), names, bool(first)), host, partial(_captured, host, names, first))
        for host, names in hosts
    ]
    if not any("*" in names for _, names in hosts):
        virtual_hosts.append(_allow_any(catch_all))
    found = Collection()
    made = protos.RouteConfiguration(
        name=name, virtual_hosts=virtual_hosts, ignore_port_in_host_matching=True
    )
    found.add(Resource.of(made), *(key for host, _ in hosts for key in host.objects))
    return found.part()


def _scope(number: int, hosts: _Names, catch_all: Message | None, memory: Memory) -> Part:
    """Make a bucket, and the scope that leads to it."""
    name = f"{_ROUTES}/{number}"
    routes = _configuration(name, hosts, catch_all, memory)
    found = Collection()
    scope = protos.ScopedRouteConfiguration(
        name=name,
        route_configuration_name=name,
        key={"fragments": [{"string_key": f"bucket {number}"}]},  # with a space, so that it is no host
    )
    found.add(Resource.of(scope))
    scoped = found.part()
    return Part({**routes.resources, **scoped.resources}, routes.origins)


def _captured(host: HostRoutes, names: Sequence[str], first: Sequence[Message]) -> Message:
    """Make the virtual host for captured traffic of that for the HTTP proxy."""
    domains = [*names, *(f"{name}." for name in names if name != "*")]
    made: Any = protos.VirtualHost()
    made.CopyFrom(host.virtual_host)
    if not made.routes:  # of nobody
        return _passing(made.name, domains)
    del made.domains[:]
    made.domains.extend(domains)
    if not host.removes:
        for route in made.routes:
            route.request_headers_to_remove.extend(NOT_FORWARDED)
    routes = [*first, *made.routes]
    del made.routes[:]
    made.routes.extend(routes)
    if first:
        made.request_headers_to_remove.extend(_KEPT.values())
    made.typed_per_filter_config[_CLEANER].CopyFrom(_CLEANING)
    return made


def _allow_any(catch_all: Message | None) -> Message:
    """Make Istio's virtual host of unknown hosts, which has the plain providers too."""
    made = _passing("allow_any", ["*"])
    if catch_all is not None:
        tunnel, passthrough = made.routes
        del made.routes[:]
        made.routes.extend([tunnel, *_plain(catch_all, passthrough)])
    return made


def _passing(name: str, domains: Sequence[str]) -> Any:
    """Make a virtual host of which everything passes through."""
    return protos.VirtualHost(
        name=name,
        domains=domains,
        routes=[_tunnel(), _passthrough({"prefix": "/"}, "websocket")],
        request_headers_to_remove=_KEPT.values(),  # after what a route does
    )


def _plain(catch_all: Any, passthrough: Any) -> Iterator[Message]:
    """Make the routes of hosts that no LLMRoute names: of plain providers, or else of what passes through.

    No route can match by whether a cluster exists. So the first time a request takes the last route, which
    leads to the cluster that is named after its host, and a filter notes which one that is, if any; then its
    route is looked for again.
    """
    found = {"key": _FOUND, "string_match": {"prefix": PLAIN}}
    limit = catch_all.request_body_buffer_limit
    provider = protos.Route()
    provider.CopyFrom(catch_all.routes[-1])
    provider.match.filter_state.add(**found)
    provider.request_body_buffer_limit.CopyFrom(limit)
    del provider.request_headers_to_remove[:]
    provider.request_headers_to_remove.extend(NOT_FORWARDED)
    provider.typed_per_filter_config[_CLEANER].CopyFrom(_CLEANING)
    is_upgrade = {"name": "upgrade", "present_match": True}
    yield protos.Route(
        match={"prefix": "/", "headers": [is_upgrade], "filter_state": [found]},
        direct_response={"status": HTTPStatus.FORBIDDEN},  # as Envoy where no upgrade is allowed
    )
    yield provider
    nothing = {"key": _FOUND, "string_match": {"exact": "-"}}
    passthrough.match.filter_state.add(**nothing)
    yield passthrough
    is_odd = {"name": ROUTES_HEADER, "string_match": {"safe_regex": {"regex": _NOT_NORMAL}}}
    for headers, filters in (([is_odd], (_CLUSTER_NAME, _FIND_CLUSTER)), ([], (_FIND_CLUSTER,))):
        yield protos.Route(
            name=_PASSTHROUGH_ROUTE,
            match={"prefix": "/", "headers": headers},
            route={"cluster_header": ROUTES_HEADER, "upgrade_configs": passthrough.route.upgrade_configs},
            typed_per_filter_config={name: _SWITCHES[name] for name in filters},
        )


def _tunnel() -> Message:
    """Make the route of what an application asks of a forward proxy: that one shall get it."""
    return _passthrough({"connect_matcher": {}}, "CONNECT")


def _passthrough(match: dict[str, Any], upgrade: str) -> Message:
    return protos.Route(
        name=_PASSTHROUGH_ROUTE,
        match=match,
        route={
            "cluster": PASSTHROUGH,
            "timeout": _NO_TIMEOUT,
            "idle_timeout": _NO_TIMEOUT,
            "upgrade_configs": [{"upgrade_type": upgrade}],
        },
        # First headers are removed, then others are added, where they are not empty.
        request_headers_to_remove=[*_KEPT, _BUCKET_HEADER, ROUTES_HEADER],
        request_headers_to_add=[
            {"header": {"key": name, "value": f"%REQ({kept})%"}} for name, kept in _KEPT.items()
        ],
    )


def _connection_manager(world: World, proxy: Proxy, *, scoped: bool) -> Message:
    """Make that of the HTTP proxy, but for what it does to requests whose route is not known."""
    made: Any = connection_manager(world, proxy, _ROUTES, scoped=scoped)
    for name in ("strip_any_host_port", "strip_trailing_host_dot", "early_header_mutation_extensions"):
        made.ClearField(name)
    own = {"remove_on_match": {"key_matcher": {"prefix": _OWN_HEADERS, "ignore_case": True}}}
    keep = [{"append": {"header": {"key": kept, "value": f"%REQ({name})%"}}} for name, kept in _KEPT.items()]
    name_cluster = {"append": {"header": {"key": ROUTES_HEADER, "value": PLAIN_CLUSTER}}}
    mutations = [own, *keep, *([name_cluster] if has_catch_all(proxy) else [])]
    made.early_header_mutation_extensions.add(
        name="envoy.http.early_header_mutation.header_mutation",
        typed_config=protos.pack(protos.EarlyHeaderMutation(mutations=mutations)),
    )
    made.http_protocol_options.CopyFrom(_http1(accept_http_10=True))
    mappers = [_own_reply(), *made.local_reply_config.mappers]
    del made.local_reply_config.mappers[:]
    made.local_reply_config.mappers.extend(mappers)
    for upgrade in ("websocket", "CONNECT"):  # a route of what passes through switches them on
        made.upgrade_configs.add(upgrade_type=upgrade, enabled={"value": False})
    filters = [each for each in made.http_filters if each.name != LOWER_CASE_HOST]
    del made.http_filters[:]
    if scoped:
        made.scoped_routes.scope_key_builder.fragments[0].header_value_extractor.name = _BUCKET_HEADER
        made.http_filters.add(name="bucket", typed_config=protos.pack(_lua(_CHOOSE_BUCKET)))
    if has_catch_all(proxy):
        # With buckets, there is no route yet that could switch them on.
        if not scoped:
            script = protos.pack(_lua(_NAME_CLUSTER))
            made.http_filters.add(name=_CLUSTER_NAME, typed_config=script, disabled=True)
        find = protos.pack(protos.SetFilterState(clear_route_cache=True))
        made.http_filters.add(name=_FIND_CLUSTER, typed_config=find, disabled=not scoped)
    made.http_filters.extend(filters[:-1])
    made.http_filters.add(name=_CLEANER, typed_config=protos.pack(protos.HeaderMutationFilter()))
    made.http_filters.append(filters[-1])
    return made


def _own_reply() -> Message:
    """Have Envoy say in its own words, and not in OpenAI's JSON, why something does not pass through."""
    passes = protos.ExpressionFilter(expression=f"xds.cluster_name == '{PASSTHROUGH}'")
    return protos.ResponseMapper(
        filter={"extension_filter": {"name": "cel", "typed_config": protos.pack(passes)}},
        body_format_override={
            "text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"},
            "content_type": "text/plain",
        },
    )


def _lua(script: str) -> Message:
    return protos.Lua(default_source_code={"inline_string": script})


def _http1(**more: Any) -> Message:
    """Make options of HTTP/1 (envoy.config.core.v3.Http1ProtocolOptions) that leave messages as they are."""
    formatter = protos.PreserveCase(forward_reason_phrase=True)
    return protos.Http1ProtocolOptions(
        header_key_format={
            "stateful_formatter": {"name": "preserve_case", "typed_config": protos.pack(formatter)}
        },
        enable_trailers=True,
        **more,
    )


def _tcp_proxy(cluster: str) -> dict[str, Any]:
    config = protos.TcpProxy(stat_prefix=cluster, cluster=cluster, idle_timeout=_NO_TIMEOUT)
    return {"name": "envoy.filters.network.tcp_proxy", "typed_config": protos.pack(config)}


def _socket(address: str, port: int, *, protocol: str = "TCP") -> dict[str, Any]:
    return {"socket_address": {"address": address, "port_value": port, "protocol": protocol}}


def _http_ports(world: World, proxy: Proxy) -> set[int]:
    """Return the ports on which HTTP is looked for: 80, and those of providers that are called in clear."""
    plain = (p.spec.port for p in world.providers_for(proxy).values() if p.spec.tls.mode == "DISABLE")
    return {80, *plain}


def _dns(world: World, proxy: Proxy, table: RouteTable) -> Message:
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
    providers = world.providers_for(proxy)
    for host, name in _named(table):
        provider = providers.get(name)
        resolved = provider is not None and any(address == name for address, _ in provider.spec.addresses)
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
        yield host, host.names[0]


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
