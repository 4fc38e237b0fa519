"""Routes of captured traffic: those of the HTTP proxy, and a way on for hosts that no object names.

A sidecar's captured connections (translator.capture) were going somewhere, so that what is unknown at the
HTTP proxy passes through here: to where it was going, as it was. Nothing can be done to a request before it
is known which of both it is; the listener's filters of this module find that out.
"""

import zlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from http import HTTPStatus
from typing import Any

from google.protobuf.message import Message

from translator import scopes
from translator.memory import Memory
from translator.parts import Collection, Part
from translator.plain_providers import PLAIN, PLAIN_CLUSTER, cluster_name_script
from translator.proxy import Proxy
from translator.routes import ROUTES_HEADER, HostRoutes, RouteTable, has_catch_all
from translator.rules import NOT_FORWARDED
from translator.world import World
from xds import protos
from xds.resources import Resource

CAPTURED_ROUTES = "captured"
"""Name of the route configuration of captured traffic."""
BUCKET_HEADER = "x-envoy-llmplane-bucket"
"""What scopes of captured traffic are found by."""
PASSTHROUGH = "PassthroughCluster"
_PASSTHROUGH_ROUTE = "allow_any|passthrough"
"""No rule of an LLMRoute has a | in its name. The script of token limits knows it."""

_BUCKETS = 128
"""Above a number of hosts there are many route configurations (translator.scopes). Unknown hosts have no
scope of their own, so here scopes are not names of hosts but what these are hashed to, and each bucket lets
unknown hosts pass. With 10,000 hosts, one has 100 KB."""
_OWN_HEADERS = "x-envoy-llmplane-"
_KEPT = {"x-forwarded-proto": f"{_OWN_HEADERS}proto", "x-request-id": f"{_OWN_HEADERS}id"}
"""Headers that Envoy sets where there are none: under which names it keeps the client's own meanwhile."""

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
_WITH_DOT_OR_PORT = r".*(\.|:[0-9]+)"
"""A host with a last dot or a port, which are not in the names of clusters."""
_NO_TIMEOUT = timedelta()

_HOST = f"""
function envoy_on_request(handle)
  local headers = handle:headers()
  local host = headers:get(":authority"):lower():gsub(":%d+$", ""):gsub("%.$", "")
  local name = cluster_name(host)
  headers:replace("{ROUTES_HEADER}", name)
"""
"""Begins a script: names the cluster that a plain provider with the host of a request has."""
_NAME_CLUSTER = f"""{_HOST}
  handle:clearRouteCache()
end
"""
_CHOOSE_BUCKET = f"""{_HOST}
  local a, b = 1, 0
  for i = 1, #name do
    a = a + name:byte(i)
    b = b + a
  end
  local bucket = headers:get(":method") == "CONNECT" and {_BUCKETS} or b % 65521 % {_BUCKETS}
  headers:replace("{BUCKET_HEADER}", "bucket " .. bucket)
  handle:clearRouteCache()
end
"""
"""Does what `bucket` does, for the host of a request; the last bucket has no hosts."""


def early_mutations(proxy: Proxy) -> list[dict[str, Any]]:
    """Make what the listener does to the headers of a request before its route is looked for."""
    own = {"remove_on_match": {"key_matcher": {"prefix": _OWN_HEADERS, "ignore_case": True}}}
    keep = [{"append": {"header": {"key": kept, "value": f"%REQ({name})%"}}} for name, kept in _KEPT.items()]
    name_cluster = {"append": {"header": {"key": ROUTES_HEADER, "value": PLAIN_CLUSTER}}}
    return [own, *keep, *([name_cluster] if has_catch_all(proxy) else [])]


def route_filters(world: World, proxy: Proxy, *, scoped: bool) -> Iterator[Message]:
    """Make the listener's first filters, by which a request gets its route.

    With scopes there is no route at first that could switch a filter on; so all of them are on.
    """
    cluster_name = cluster_name_script(proxy.namespace, world.mesh.cluster_domain)
    if scoped:
        yield protos.HttpFilter(name="bucket", typed_config=_lua(cluster_name + _CHOOSE_BUCKET))
    if has_catch_all(proxy):
        if not scoped:
            name = _lua(cluster_name + _NAME_CLUSTER)
            yield protos.HttpFilter(name=_CLUSTER_NAME, typed_config=name, disabled=True)
        find = protos.pack(protos.SetFilterState(clear_route_cache=True))
        yield protos.HttpFilter(name=_FIND_CLUSTER, typed_config=find, disabled=not scoped)


def cleaner() -> Message:
    """Make the filter that takes away what providers do not get, right before the router."""
    return protos.HttpFilter(name=_CLEANER, typed_config=protos.pack(protos.HeaderMutationFilter()))


def captured_routes(table: RouteTable, memory: Memory, *, with_scopes: bool) -> Iterator[Part]:
    """Make the routes of captured traffic, in the form or the forms that the proxy's other routes have."""
    if scopes.needs_one(table):
        make = partial(_configuration, CAPTURED_ROUTES, table.hosts, table.catch_all, memory, [_tunnel()])
        yield memory.recall((CAPTURED_ROUTES, table.hosts, id(table.catch_all)), table.catch_all, make)
    if with_scopes:
        for number, hosts in enumerate([*_buckets(table), ()]):
            make = partial(_scope, number, hosts, table.catch_all, memory)
            key = (CAPTURED_ROUTES, number, hosts, id(table.catch_all))
            yield memory.recall(key, table.catch_all, make)


_Hosts = tuple[HostRoutes, ...]


def _buckets(table: RouteTable) -> list[_Hosts]:
    found: list[list[HostRoutes]] = [[] for _ in range(_BUCKETS)]
    for host in table.hosts:
        found[bucket(host.short_name)].append(host)
    return [tuple(of) for of in found]


def bucket(short_name: str) -> int:
    """Return the bucket of a host and all its names, as of the cluster that is named after it."""
    return (zlib.adler32(f"{PLAIN}{short_name}".encode()) >> 16) % _BUCKETS


def _configuration(
    name: str, hosts: _Hosts, catch_all: Message | None, memory: Memory, first: Sequence[Message] = ()
) -> Part:
    """Make a route configuration; ``first`` are routes that each host has in front of its own."""
    virtual_hosts = [
        memory.recall((CAPTURED_ROUTES, id(host), bool(first)), host, partial(_captured, host, first))
        for host in hosts
    ]
    if not any("*" in host.names for host in hosts):
        virtual_hosts.append(_allow_any(catch_all))
    found = Collection()
    made = protos.RouteConfiguration(
        name=name, virtual_hosts=virtual_hosts, ignore_port_in_host_matching=True
    )
    found.add(Resource.of(made), *(key for host in hosts for key in host.objects))
    return found.part()


def _scope(number: int, hosts: _Hosts, catch_all: Message | None, memory: Memory) -> Part:
    """Make a bucket, and the scope that leads to it."""
    name = f"{CAPTURED_ROUTES}/{number}"
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


def _captured(host: HostRoutes, first: Sequence[Message]) -> Message:
    """Make the virtual host for captured traffic of that for the HTTP proxy."""
    domains = [*host.names, *(f"{name}." for name in host.names if name != "*")]
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
    otherwise = protos.HeaderMatcher()
    otherwise.CopyFrom(catch_all.routes[0].match.headers[0])
    otherwise.string_match.safe_regex.regex += f"|{_WITH_DOT_OR_PORT}"
    for headers, filters in (([otherwise], (_CLUSTER_NAME, _FIND_CLUSTER)), ([], (_FIND_CLUSTER,))):
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
        request_headers_to_remove=[*_KEPT, BUCKET_HEADER, ROUTES_HEADER],
        request_headers_to_add=[
            {"header": {"key": name, "value": f"%REQ({kept})%"}} for name, kept in _KEPT.items()
        ],
    )


def _lua(script: str) -> Message:
    return protos.pack(protos.Lua(default_source_code={"inline_string": script}))
