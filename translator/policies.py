"""The policies of a proxy as resources of their own (ECDS), outside its listeners.

In a listener, a changed policy would make a new one: connections that are open stay with the old policies
until they are drained, up to ten minutes, but get new routes at once; and streams that last longer are cut.
From here, the next request of every connection meets the new policies, and nothing is drained. Envoy applies
what it is sent in the order in which it comes, and this type comes before routes (xds.resources.PUSH_ORDER):
no route is served before the policies that came with it.

The listener has places for filters, always, so that the first policy changes no listener either: on a gateway
for who may come in, on a gateway and a sidecar for how many tokens are used.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from google.protobuf.message import Message

from crds.problems import ObjectKey
from translator import api_keys, authentication, authorization, rate_limits
from translator.features import Feature
from translator.proxy import Proxy, ProxyType
from translator.rules import NOT_FORWARDED
from translator.services import ServiceDestination
from translator.world import World
from xds import protos
from xds.resources import ECDS, RDS, SRDS, Guard, Resource

API_KEYS = "api_keys"
POLICIES = "policies"
RATE_LIMITS, COUNTS, SERVICES = "rate_limits", "rate_limit_counts", "rate_limit_services"

_ADS = {"ads": {}, "resource_api_version": "V3"}


class _Place(NamedTuple):
    """A place in the listener and the filters for it."""

    name: str
    filters: list[dict[str, Any]]
    is_held: bool = False


def filters(world: World, proxy: Proxy) -> list[dict[str, Any]]:
    """Make the places for the policies in a connection manager, in front of the router."""
    return [
        {"name": name, "config_discovery": {"config_source": _ADS, "type_urls": [config.type_url]}}
        for name, config, _ in _configs(world, proxy)
    ]


def resources(world: World, proxy: Proxy) -> Iterator[tuple[Resource, tuple[ObjectKey, ...]]]:
    """Make what is in these places, each with the policies that it comes from."""
    objects = {
        API_KEYS: tuple(api_keys.objects(world, proxy)),
        POLICIES: (*authorization.objects(world, proxy), *authentication.objects(world, proxy)),
        **dict.fromkeys((RATE_LIMITS, COUNTS, SERVICES), tuple(rate_limits.objects(world, proxy))),
    }
    for name, config, held in _configs(world, proxy):
        extension = protos.TypedExtensionConfig(name=name, typed_config=config)
        guard = _guard(name) if proxy.supports(Feature.FILTER_CHAIN) else None
        yield Resource.of(extension, held=held, guard=guard), objects[name.partition("/")[0]]


def that_change_late(world: World, proxy: Proxy) -> Iterator[ObjectKey]:
    """Return the policies whose changes an older Envoy brings to new connections only (FILTER_CHAIN)."""
    if proxy.type is ProxyType.ROUTER and not proxy.supports(Feature.FILTER_CHAIN):
        yield from api_keys.objects(world, proxy)
        yield from authorization.objects(world, proxy)
        yield from authentication.objects(world, proxy)


def only_takes_routes_away(
    before: Mapping[tuple[str, str], Resource], after: Mapping[tuple[str, str], Resource]
) -> bool:
    """Whether policies change, and routes do only by hosts that vanish: then routes change first.

    Both are all resources of a proxy, by type URL and name. No host shall be open for a moment because the
    policies that guarded it went before it.
    """
    changed = {name for name in after if after[name] != before.get(name)}
    routes = [name for name in changed if name[0] in {RDS, SRDS}]
    return any(name[0] == ECDS for name in changed) and all(
        name[0] == RDS and name in before and _is_part(after[name], before[name]) for name in routes
    )


def _is_part(routes: Resource, of: Resource) -> bool:
    """Whether a route configuration is another one without some of its hosts."""
    new, old = (protos.RouteConfiguration.FromString(_content(each)) for each in (routes, of))
    hosts = {host.SerializeToString(deterministic=True) for host in old.virtual_hosts}
    added = {host.SerializeToString(deterministic=True) for host in new.virtual_hosts} - hosts
    for each in (new, old):
        each.ClearField("virtual_hosts")
    return not added and bool(new == old)


def _content(resource: Resource) -> bytes:
    content: bytes = protos.Any.FromString(resource.body).value
    return content


def holds_keys(resource: Resource) -> bool:
    """Whether there are clients' API keys in a resource."""
    return resource.type_url == ECDS and resource.name.startswith(API_KEYS)


def services(world: World, proxy: Proxy) -> Iterator[ServiceDestination]:
    """Return the services that the policies have this proxy call."""
    yield from authorization.services(world, proxy)
    yield from authentication.services(world, proxy)
    yield from rate_limits.services(world, proxy)


def _configs(world: World, proxy: Proxy) -> Iterator[tuple[str, Any, bool]]:
    """Return the resources by name, and whether an Envoy that has another version keeps that."""
    for name, made, is_held in _places(world, proxy):
        if proxy.supports(Feature.FILTER_CHAIN):
            yield name, protos.pack(_chain(made)), is_held
        else:
            for index, each in enumerate(made):
                # A name stands for one type: Envoy refuses another one as long as any listener has the name.
                kind = each["name"].rpartition(".")[2]
                yield f"{name}/{index}/{kind}", each["typed_config"], is_held


@cache
def _guard(name: str) -> Guard:
    """Have a policy that Envoy refuses, although it seemed valid, deny where none was in force before."""
    nothing, everything = (
        Resource.of(protos.TypedExtensionConfig(name=name, typed_config=protos.pack(_chain(filters))))
        for filters in ([], [authorization.denial([f"{name}-refused"])])
    )
    return Guard(open=nothing.version, closed=lambda: everything)


def _chain(filters: list[dict[str, Any]]) -> Message:
    return protos.FilterChainConfig(default_filter_chain={"filters": filters} if filters else None)


def _places(world: World, proxy: Proxy) -> Iterator[_Place]:
    if proxy.type is ProxyType.ROUTER:
        yield from _places_of_gateway(world, proxy)
    if proxy.supports(Feature.TOKEN_LIMITS):
        yield _Place(RATE_LIMITS, rate_limits.filters(world, proxy))
        yield _Place(COUNTS, rate_limits.counting_filters(world, proxy))
        yield _Place(SERVICES, rate_limits.service_filters(world, proxy))


def _places_of_gateway(world: World, proxy: Proxy) -> Iterator[_Place]:
    tokens = authentication.filters(world, proxy)
    keys = api_keys.filters(world, proxy, with_tokens=bool(tokens))
    yield _Place(API_KEYS, keys, api_keys.is_held(world, proxy))
    yield _Place(
        POLICIES,
        [
            *authorization.custom_filters(world, proxy),
            *tokens,
            *authorization.rbac_filters(world, proxy),
            *_removal(world, proxy),
        ],
    )


def _removal(world: World, proxy: Proxy) -> list[dict[str, Any]]:
    """Make the filter that removes tokens and keys from what goes on, behind all that may look at them."""
    headers, params = authentication.removals(world, proxy)
    of_keys = api_keys.removals(world, proxy)
    headers = tuple(name for name in dict.fromkeys((*headers, *of_keys)) if name not in NOT_FORWARDED)
    if not headers and not params:
        return []
    mutation = protos.HeaderMutationFilter(
        mutations={
            "request_mutations": [{"remove": name} for name in headers],
            "query_parameter_mutations": [{"remove": name} for name in params],
        }
    )
    return [{"name": "envoy.filters.http.header_mutation", "typed_config": protos.pack(mutation)}]
