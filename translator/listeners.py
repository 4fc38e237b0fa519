"""The listeners of a proxy; their routes come by RDS, so that a changed route drains no connection."""

from datetime import timedelta

from google.protobuf.message import Message

from translator.errors import local_reply_config
from translator.proxy import Proxy, ProxyType
from translator.world import MeshSettings
from xds import protos

HTTP_PROXY_ROUTES = "http_proxy"
"""Istio's name of the route configuration that the HTTP proxy listener uses."""


def listeners(proxy: Proxy, mesh: MeshSettings) -> list[Message]:
    """Make the listeners of a proxy: a sidecar's HTTP proxy, for clients that are told to use it."""
    port = mesh.proxy_http_port
    if proxy.type is not ProxyType.SIDECAR or not port:
        return []
    manager = _connection_manager(HTTP_PROXY_ROUTES, mesh)
    return [
        protos.Listener(
            name=f"{proxy.bind_address}_{port}",
            address={"socket_address": {"address": proxy.bind_address, "port_value": port}},
            traffic_direction="OUTBOUND",
            filter_chains=[
                {
                    "filters": [
                        {
                            "name": "envoy.filters.network.http_connection_manager",
                            "typed_config": protos.pack(manager),
                        }
                    ]
                }
            ],
        )
    ]


def _connection_manager(routes: str, mesh: MeshSettings) -> Message:
    client_hints = protos.EarlyHeaderMutation(
        mutations=[
            # x-envoy-* steer Envoy's router (retries, timeouts): the client may not.
            {"remove_on_match": {"key_matcher": {"prefix": prefix, "ignore_case": True}}}
            for prefix in ("x-envoy-", "x-forwarded-")
        ]
    )
    return protos.HttpConnectionManager(
        stat_prefix=routes,
        rds={
            "route_config_name": routes,
            "config_source": {"ads": {}, "resource_api_version": "V3"},
        },
        # Host: HOST:PORT and HOST. are HOST, for routes and policies alike (asm-and-istio.md, finding 4).
        strip_any_host_port=True,
        strip_trailing_host_dot=True,
        skip_xff_append=True,
        server_header_transformation="PASS_THROUGH",
        early_header_mutation_extensions=[
            {
                "name": "envoy.http.early_header_mutation.header_mutation",
                "typed_config": protos.pack(client_hints),
            }
        ],
        # Routes have an idle timeout of their own; five minutes of silence are nothing for a model.
        stream_idle_timeout=timedelta(),
        local_reply_config=local_reply_config(mesh.max_request_bytes),
        http_filters=[
            {
                "name": "envoy.filters.http.router",
                "typed_config": protos.pack(protos.Router(suppress_envoy_headers=True)),
            }
        ],
    )
