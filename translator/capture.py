"""Captured traffic: what applications beside a sidecar send, without knowing of it.

iptables (deploy/image/capture.sh) hands their connections to port 15001; Envoy asks the kernel where each
one was going, and gives it to the listener of that port, which is not bound. HTTP on such a port gets the
routes of the sidecar's HTTP proxy, so that all that holds there holds here too. Everything else passes
through to where it was going: hosts that no LLMRoute and no LLMProvider names, bytes that are not HTTP, all
other ports. It shall notice nothing, so that here, unlike at the HTTP proxy, nothing is done to a request
before its route is known. The names are Istio's.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from google.protobuf.message import Message

from translator import scopes
from translator.captured_routes import (
    BUCKET_HEADER,
    CAPTURED_ROUTES,
    PASSTHROUGH,
    cleaner,
    early_mutations,
    route_filters,
)
from translator.clusters import HOST_METADATA
from translator.dns import dns_filter
from translator.listeners import connection_manager
from translator.proxy import Proxy
from translator.routes import NORMAL_HOST, RouteTable
from translator.world import World
from xds import protos

PORT = 15001
"""Where captured connections arrive, as in Istio."""
DNS_PORT = 15053
"""Where captured DNS queries arrive, as in Istio."""

_BLACK_HOLE = "BlackHoleCluster"
_HTTP_PROTOCOL_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_UNLIMITED = {"value": 2**32 - 1}
_NO_TIMEOUT = timedelta()


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
        dns = {
            "name": "envoy.filters.udp.dns_filter",
            "typed_config": protos.pack(dns_filter(world, proxy, table)),
        }
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


def _connection_manager(world: World, proxy: Proxy, *, scoped: bool) -> Message:
    """Make that of the HTTP proxy, but for what it does to requests whose route is not known."""
    made: Any = connection_manager(world, proxy, CAPTURED_ROUTES, scoped=scoped)
    for name in ("strip_any_host_port", "strip_trailing_host_dot", "early_header_mutation_extensions"):
        made.ClearField(name)
    made.early_header_mutation_extensions.add(
        name="envoy.http.early_header_mutation.header_mutation",
        typed_config=protos.pack(protos.EarlyHeaderMutation(mutations=early_mutations(proxy))),
    )
    made.http_protocol_options.CopyFrom(_http1(accept_http_10=True))
    mappers = [_own_reply(), *made.local_reply_config.mappers]
    del made.local_reply_config.mappers[:]
    made.local_reply_config.mappers.extend(mappers)
    for upgrade in ("websocket", "CONNECT"):  # a route of what passes through switches them on
        made.upgrade_configs.add(upgrade_type=upgrade, enabled={"value": False})
    filters = [each for each in made.http_filters if each.name != NORMAL_HOST]
    del made.http_filters[:]
    if scoped:
        made.scoped_routes.scope_key_builder.fragments[0].header_value_extractor.name = BUCKET_HEADER
    first = route_filters(world, proxy, scoped=scoped)
    made.http_filters.extend([*first, *filters[:-1], cleaner(), filters[-1]])
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
