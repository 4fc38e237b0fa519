"""The listeners of a proxy; their routes come by RDS, so that a changed route drains no connection."""

from collections.abc import Set as AbstractSet
from datetime import timedelta
from typing import Any

from google.protobuf.message import Message

from crds.meshconfig import MeshConfig
from translator import api_keys, observability, policies
from translator.certificates import server_context
from translator.errors import local_reply_config
from translator.gateways import GatewayListener
from translator.hosts import SERVICE_PART
from translator.plain_providers import (
    HAS_UPPER_CASE,
    PLAIN_CLUSTER,
    cluster_name_script,
    is_written_otherwise,
)
from translator.proxy import Proxy, ProxyType
from translator.routes import NORMAL_HOST, ROUTES_HEADER, has_catch_all
from translator.world import World
from xds import protos

HTTP_PROXY_ROUTES = "http_proxy"
"""Istio's name of the route configuration that the HTTP proxy listener uses."""


_STATISTICS = {ProxyType.SIDECAR: HTTP_PROXY_ROUTES, ProxyType.ROUTER: "gateway"}
_TYPES = "type.googleapis.com/"
_LUA = "envoy.extensions.filters.http.lua.v3.Lua"
_ADS = {"ads": {}, "resource_api_version": "V3"}

_TLS_INSPECTOR = {
    "name": "envoy.filters.listener.tls_inspector",
    "typed_config": protos.pack(protos.TlsInspector()),
}

_STEERING = "^x-(envoy|forwarded)-.*"
"""With the ``^``, RE2 sees at once of most headers that they are others."""
_FORWARDED = (
    "^x-(envoy-.*"
    "|forwarded-(f|fo|p|pr|pro|prot|([^fp]|f[^o]|fo[^r]|for.|p[^r]|pr[^o]|pro[^t]|prot[^o]|proto.).*)?)"
)
"""What trusted proxies do not tell: all but the client's addresses (-for) and its scheme (-proto)."""

_NORMAL_HOST = """
function envoy_on_request(handle)
  local headers = handle:headers()
  local host = headers:get(":authority"):lower()
  headers:replace(":authority", host)%s
  handle:clearRouteCache()
end
"""
"""Scopes and clusters are compared letter by letter; with the cleared cache, Envoy looks for both anew."""
_NAME_CLUSTER = f"""
  headers:replace("{ROUTES_HEADER}", cluster_name(host))"""


def sidecar_listener(world: World, proxy: Proxy, *, scoped: bool) -> Message | None:
    """Make a sidecar's HTTP proxy, for clients that are told to use it; None where it is switched off.

    ``scoped``: its routes are scoped routes (translator.scopes), not one route configuration.
    """
    port = world.mesh.config.proxy_http_port
    if not port:
        return None
    manager = connection_manager(world, proxy, HTTP_PROXY_ROUTES, scoped=scoped)
    return _listener(f"{proxy.bind_address}_{port}", proxy.bind_address, port, [_chain(manager)])


def gateway_listener(
    world: World, proxy: Proxy, opened: GatewayListener, scoped: AbstractSet[str]
) -> Message:
    """Make a listener of a gateway; ``scoped`` names the route configurations that are scoped routes."""
    chains = []
    for chain in opened.chains:
        made = _chain(connection_manager(world, proxy, chain.routes, scoped=chain.routes in scoped))
        if chain.tls is not None and chain.certificates is not None:
            config = world.mesh.config
            domains = (config.trust_domain, *config.trust_domain_aliases)
            context = server_context(chain.certificates, chain.tls, domains)
            made["transport_socket"] = {"name": "tls", "typed_config": protos.pack(context)}
            if chain.server_names:
                made["filter_chain_match"] = {"server_names": chain.server_names}
        chains.append(made)
    return _listener(opened.name, opened.address, opened.port, chains)


def _listener(name: str, address: str, port: int, filter_chains: list[dict[str, Any]]) -> Message:
    has_names = any("filter_chain_match" in chain for chain in filter_chains)
    return protos.Listener(
        name=name,
        address={"socket_address": {"address": address, "port_value": port}},
        traffic_direction="OUTBOUND",
        listener_filters=[_TLS_INSPECTOR] if has_names else [],
        filter_chains=filter_chains,
    )


def _chain(manager: Message) -> dict[str, Any]:
    name = "envoy.filters.network.http_connection_manager"
    return {"filters": [{"name": name, "typed_config": protos.pack(manager)}]}


def connection_manager(world: World, proxy: Proxy, routes: str, *, scoped: bool) -> Message:
    """Make an HTTP connection manager, its last filter the router."""
    return protos.HttpConnectionManager(
        # One for all: limits of tokens count in statistics below it, for all listeners together.
        stat_prefix=_STATISTICS[proxy.type],
        rds=None if scoped else {"route_config_name": routes, "config_source": _ADS},
        scoped_routes=_scoped_routes(routes, proxy) if scoped else None,
        # Host: HOST:PORT and HOST. are HOST, for routes and policies alike: Envoy compares text.
        strip_any_host_port=True,
        strip_trailing_host_dot=True,
        skip_xff_append=True,
        server_header_transformation="PASS_THROUGH",
        early_header_mutation_extensions=[
            {
                "name": "envoy.http.early_header_mutation.header_mutation",
                "typed_config": protos.pack(_early_mutations(world, proxy, routes, scoped=scoped)),
            }
        ],
        # Routes have an idle timeout of their own; five minutes of silence are nothing for a model.
        stream_idle_timeout=timedelta(),
        local_reply_config=local_reply_config(),
        http_filters=[
            *_normal_host(world, proxy, scoped=scoped),
            *policies.filters(world, proxy),
            {
                "name": "envoy.filters.http.router",
                "typed_config": protos.pack(protos.Router(suppress_envoy_headers=True)),
            },
        ],
        **observability.of_connection_manager(world, proxy),
        **(_of_gateway(world.mesh.config) if proxy.type is ProxyType.ROUTER else {}),
    )


def _of_gateway(config: MeshConfig) -> dict[str, Any]:
    """Return what a gateway has more, as in Istio: clients are not trusted, policies compare paths."""
    normalization = config.path_normalization.normalization
    decodes = normalization == "DECODE_AND_MERGE_SLASHES"
    return {
        "use_remote_address": {"value": True},
        "xff_num_trusted_hops": config.default_config.gateway_topology.num_trusted_proxies,
        "normalize_path": {"value": normalization != "NONE"},
        "merge_slashes": decodes or normalization == "MERGE_SLASHES",
        "path_with_escaped_slashes_action": "UNESCAPE_AND_FORWARD" if decodes else "KEEP_UNCHANGED",
    }


def _early_mutations(world: World, proxy: Proxy, routes: str, *, scoped: bool) -> Message:
    """Remove what steers Envoy's router (retries, timeouts) or tells of the client: the client may not.

    Then say what the routes need to know (`ROUTES_HEADER`): which listener it is, on a gateway with
    ``scoped`` routes; or which cluster is the host's.
    """
    steering = _STEERING
    if (
        proxy.type is ProxyType.ROUTER
        and world.mesh.config.default_config.gateway_topology.num_trusted_proxies
    ):
        steering = _FORWARDED
    client = {"exact": api_keys.CLIENT_HEADER, "ignore_case": True}
    mutations: list[dict[str, Any]] = [
        {"remove_on_match": {"key_matcher": matcher}}
        for matcher in (
            {"safe_regex": {"regex": steering}},
            *([client] if proxy.type is ProxyType.ROUTER else ()),
        )
    ]
    if scoped and proxy.type is ProxyType.ROUTER:
        mutations.append({"append": {"header": {"key": ROUTES_HEADER, "value": routes}}})
    if has_catch_all(proxy):
        mutations.append({"append": {"header": {"key": ROUTES_HEADER, "value": PLAIN_CLUSTER}}})
    return protos.EarlyHeaderMutation(mutations=mutations)


def _scoped_routes(name: str, proxy: Proxy) -> dict[str, Any]:
    keys: list[dict[str, Any]] = [{"name": ":authority", "element_separator": SERVICE_PART, "index": 0}]
    if proxy.type is ProxyType.ROUTER:
        keys.append({"name": ROUTES_HEADER, "index": 0})
    return {
        "name": name,
        "scope_key_builder": {"fragments": [{"header_value_extractor": key} for key in keys]},
        "rds_config_source": _ADS,
        "scoped_rds": {"scoped_rds_config_source": _ADS},
    }


def _normal_host(world: World, proxy: Proxy, *, scoped: bool) -> list[dict[str, Any]]:
    """Make the filter that writes the host in lower case, and which cluster is a Service's by its short name.

    Where the host is written so, as nearly always, nothing runs. Scopes are looked for before there is a
    route, which otherwise would switch the filter on.
    """
    domain, regex, text = world.mesh.cluster_domain, HAS_UPPER_CASE, _NORMAL_HOST % ""
    if has_catch_all(proxy):
        regex = is_written_otherwise(domain)
        text = cluster_name_script(proxy.namespace, domain) + _NORMAL_HOST % _NAME_CLUSTER
    if not scoped:
        script = protos.Lua(default_source_code={"inline_string": text})
        disabled = {"name": NORMAL_HOST, "typed_config": protos.pack(script), "disabled": True}
        return [disabled] if has_catch_all(proxy) else []
    script = {"@type": _TYPES + _LUA, "default_source_code": {"inline_string": text}}
    header = {
        "@type": _TYPES + "envoy.type.matcher.v3.HttpRequestHeaderMatchInput",
        "header_name": ":authority",
    }
    otherwise = {
        "single_predicate": {
            "input": {"name": "host", "typed_config": header},
            "value_match": {"safe_regex": {"google_re2": {}, "regex": regex}},
        }
    }
    skip = {"@type": _TYPES + "envoy.extensions.filters.common.matcher.action.v3.SkipFilter"}
    matcher = {
        "matcher_list": {
            "matchers": [
                {
                    "predicate": {"not_matcher": otherwise},
                    "on_match": {"action": {"name": "skip", "typed_config": skip}},
                }
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
    return [{"name": NORMAL_HOST, "typed_config": protos.pack(filter_)}]
