"""The listeners of a proxy; their routes come by RDS, so that a changed route drains no connection."""

from datetime import timedelta
from typing import Any

from google.protobuf.message import Message

from translator.errors import local_reply_config
from translator.proxy import Proxy, ProxyType
from translator.world import MeshSettings
from xds import protos

HTTP_PROXY_ROUTES = "http_proxy"
"""Istio's name of the route configuration that the HTTP proxy listener uses."""


_TYPES = "type.googleapis.com/"
_LUA = "envoy.extensions.filters.http.lua.v3.Lua"
_ADS = {"ads": {}, "resource_api_version": "V3"}

_LOWER_CASE_HOST = """
function envoy_on_request(handle)
  local headers = handle:headers()
  headers:replace(":authority", headers:get(":authority"):lower())
  handle:clearRouteCache()
end
"""
"""Scopes are compared letter by letter; with the cleared cache, Envoy looks for the scope anew."""


def listeners(proxy: Proxy, mesh: MeshSettings, *, scoped: bool) -> list[Message]:
    """Make the listeners of a proxy: a sidecar's HTTP proxy, for clients that are told to use it.

    ``scoped``: its routes are scoped routes (translator.scopes), not one route configuration.
    """
    port = mesh.proxy_http_port
    if proxy.type is not ProxyType.SIDECAR or not port:
        return []
    manager = _connection_manager(HTTP_PROXY_ROUTES, mesh, scoped=scoped)
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


def _connection_manager(routes: str, mesh: MeshSettings, *, scoped: bool) -> Message:
    client_hints = protos.EarlyHeaderMutation(
        mutations=[
            # x-envoy-* steer Envoy's router (retries, timeouts): the client may not.
            {"remove_on_match": {"key_matcher": {"prefix": prefix, "ignore_case": True}}}
            for prefix in ("x-envoy-", "x-forwarded-")
        ]
    )
    return protos.HttpConnectionManager(
        stat_prefix=routes,
        rds=None if scoped else {"route_config_name": routes, "config_source": _ADS},
        scoped_routes=_scoped_routes(routes) if scoped else None,
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
            *([_lower_case_host()] if scoped else []),
            {
                "name": "envoy.filters.http.router",
                "typed_config": protos.pack(protos.Router(suppress_envoy_headers=True)),
            },
        ],
    )


def _scoped_routes(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "scope_key_builder": {
            "fragments": [{"header_value_extractor": {"name": ":authority", "index": 0}}],
        },
        "rds_config_source": _ADS,
        "scoped_rds": {"scoped_rds_config_source": _ADS},
    }


def _lower_case_host() -> dict[str, Any]:
    """Make the filter that turns the host into lower case; where it is, as nearly always, nothing runs."""
    script = {"@type": _TYPES + _LUA, "default_source_code": {"inline_string": _LOWER_CASE_HOST}}
    header = {
        "@type": _TYPES + "envoy.type.matcher.v3.HttpRequestHeaderMatchInput",
        "header_name": ":authority",
    }
    is_lower_case = {
        "single_predicate": {
            "input": {"name": "host", "typed_config": header},
            "value_match": {"safe_regex": {"google_re2": {}, "regex": "[^A-Z]*"}},
        }
    }
    skip = {"@type": _TYPES + "envoy.extensions.filters.common.matcher.action.v3.SkipFilter"}
    matcher = {
        "matcher_list": {
            "matchers": [
                {"predicate": is_lower_case, "on_match": {"action": {"name": "skip", "typed_config": skip}}}
            ]
        }
    }
    filter_ = protos.TypedStruct(
        type_url=_TYPES + "envoy.extensions.common.matching.v3.ExtensionWithMatcher",
        value={
            "extension_config": {"name": "envoy.filters.http.lua", "typed_config": script},
            "xds_matcher": matcher,
        },
    )
    return {"name": "lower_case_host", "typed_config": protos.pack(filter_)}
