"""What all clusters have in common: endpoints by name or address, and connections that are kept alive."""

from collections.abc import Iterable
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

from google.protobuf.message import Message

from translator.hosts import stat_name
from xds import protos

_HTTP_PROTOCOL_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

_DNS = {
    "name": "dns",
    "typed_config": protos.pack(
        protos.DnsCluster(
            dns_refresh_rate=timedelta(seconds=60),
            respect_dns_ttl=True,
            # Envoy's default takes the IPv6 addresses alone where there are some; many a machine cannot
            # reach them.
            dns_lookup_family="V4_PREFERRED",
        )
    ),
}
"""All addresses of a name are endpoints; asked again when the record says so, else each minute (as Istio)."""

_GUARD = {
    "priority": 1,
    "lb_endpoints": [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 1}}}}
    ],
}
"""Nothing listens here. A cluster without a usable host answers 503 at once and ends the retry logic; a
refused connection is retried on the next provider instead (seen with Envoy 1.40)."""


def cluster_of(
    name: str,
    addresses: Iterable[tuple[str, int]],
    connect_timeout: timedelta,
    options: Message,
    *,
    guarded: bool = False,
) -> Message:
    """Make a cluster of these hosts and ports; ``options`` are its HttpProtocolOptions.

    With ``guarded``, a request for which no host is usable fails as one that was not sent, so that it can go
    to another cluster.
    """
    found = list(addresses)
    hosts = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}}
        for host, port in found
    ]
    assignment: dict[str, Any] = {"cluster_name": "-", "endpoints": [{"lb_endpoints": hosts}]}  # EDS reads it
    if guarded:
        assignment["endpoints"].append(_GUARD)
        # The guard gets nothing as long as one real host is usable.
        assignment["policy"] = {"overprovisioning_factor": {"value": 100 * 10_000}}
    made = protos.Cluster(
        name=name,
        alt_stat_name=stat_name(name),
        cluster_type=None if all(is_ip(host) for host, _ in found) else _DNS,
        connect_timeout=connect_timeout,
        # A name that never resolves must not hold up the acknowledgement of all clusters.
        wait_for_warm_on_init={"value": False},
        load_assignment=assignment,
        # With one host Envoy would go on sending to it although it is ejected.
        common_lb_config={"healthy_panic_threshold": {"value": 0}} if guarded else None,
        upstream_connection_options={"tcp_keepalive": {"keepalive_time": {"value": 300}}},
    )
    made.typed_extension_protocol_options[_HTTP_PROTOCOL_OPTIONS].CopyFrom(protos.pack(options))
    return made


def is_ip(host: str) -> bool:
    """Whether a host is an IP address, which needs no DNS."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
