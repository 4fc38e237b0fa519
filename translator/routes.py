"""LLMRoute -> virtual hosts: routes only choose clusters, in the order of the rules.

Matches and precedence follow Istio's VirtualService (asm-and-istio.md 4.5); design decisions 9 to 13.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

from google.protobuf.message import Message

from crds.llmprovider import LLMProvider
from crds.llmroute import LLMBackendRef, LLMRequestMatch, LLMRoute, LLMRule, resolve_gateway
from crds.meta import StringMatch
from crds.problems import ObjectKey
from translator.clusters import Destination
from translator.hosts import domains
from translator.memory import Memory
from translator.proxy import Proxy
from translator.world import MESH, MeshSettings, World
from xds import protos

_IDLE_TIMEOUT = timedelta(hours=1)
"""How long a stream may be silent. Envoy's defaults (15 s a request, 5 min of silence) cut LLM answers."""

_BEFORE_THE_REQUEST = ("connect-failure", "refused-stream", "reset-before-request")
"""Failures that cannot have been billed: the provider has not seen the request (design decision 12)."""

_ATTEMPTS_TO_CONNECT = 6
_CONNECT_BACK_OFF = {
    "base_interval": timedelta(milliseconds=100),
    "max_interval": timedelta(milliseconds=500),
}
"""Retries of a provider that is the only one: about a second in all. A changed cluster has only its guard
endpoint, which refuses at once, until the provider's name is resolved again."""

_FAILURES = ("connect-failure", "refused-stream", "reset", "retriable-status-codes")
_FAILURE_STATUSES = (429, 500, 502, 503, 504)

_LONGEST_RETRY_AFTER = timedelta(seconds=60)
"""A longer pause is not waited for: Envoy then retries as if none had been asked for."""

NOT_FORWARDED = (
    "accept-encoding",
    "api-key",
    "authorization",
    "cookie",
    "forwarded",
    "proxy-authorization",
    "te",
    "trailer",
    "via",
    "x-api-key",
    "x-forwarded-proto",  # the connection manager's own
    "x-goog-api-key",
    "x-request-id",
)
"""Request headers that never leave towards a provider (design decision 10); the connection manager takes
those away that begin with ``x-envoy-`` or ``x-forwarded-``, Envoy itself what is hop by hop, and the Lua
script what an attempt added."""


@dataclass(frozen=True, slots=True, eq=False)
class HostRoutes:
    """The virtual host of one LLMRoute or provider, and the destinations that it names."""

    virtual_host: Message
    names: tuple[str, ...]
    """The domains of the virtual host."""
    destinations: tuple[Destination, ...]
    object: ObjectKey
    place: int
    """A hash of the host, 64 bits."""


@dataclass(frozen=True, slots=True)
class RouteTable:
    """The routes of one proxy."""

    name: str
    hosts: tuple[HostRoutes, ...]
    has_wildcards: bool
    """Whether a host stands for many."""

    @property
    def routes(self) -> Message:
        """All of it as one route configuration."""
        return route_configuration(self.name, self.hosts)

    @property
    def destinations(self) -> tuple[Destination, ...]:
        """What the routes lead to, in the order of first use."""
        return tuple(dict.fromkeys(target for host in self.hosts for target in host.destinations))


def route_table(world: World, proxy: Proxy, name: str, memory: Memory | None = None) -> RouteTable:
    """Make the routes of a proxy: a virtual host for each LLMRoute and each provider without one.

    A domain belongs to the first that claims it: two virtual hosts with one domain would make Envoy refuse
    the whole route configuration.
    """
    memory = memory or Memory()
    providers = world.providers_for(proxy)
    hosts: list[HostRoutes] = []
    taken: set[str] = set()
    wildcards: list[str] = []

    def claim(host: str, namespace: str) -> _Names:
        names = domains(host, namespace, proxy.namespace, world.mesh.cluster_domain)
        free = tuple(name for name in names if name not in taken)
        taken.update(free)
        return _Names(free, names[-1].removesuffix(f".svc.{world.mesh.cluster_domain}"))

    for route in world.routes_for(proxy):
        names = claim(route.spec.host, route.namespace)
        if not names.free:
            continue
        if names.main.startswith("*"):
            wildcards.append(names.main[1:])
        hosts.append(_of_route(route, names, providers, proxy, world.mesh, memory=memory))
    # As in Istio, a route with a wildcard host comes before the providers below it.
    routed = tuple(wildcards)
    for host, provider in sorted(providers.items()):
        if not provider.exported_to(proxy.namespace) or host.endswith(routed):
            continue
        names = claim(host, proxy.namespace)
        if names.free:
            hosts.append(_of_provider(provider, names, world.mesh, memory))
    return RouteTable(name, tuple(hosts), bool(wildcards))


def route_configuration(name: str, hosts: Iterable[HostRoutes]) -> Message:
    """Make a route configuration of these hosts."""
    # The headers are on the route configuration and not on each host: bytes on the wire.
    return protos.RouteConfiguration(
        name=name,
        virtual_hosts=[host.virtual_host for host in hosts],
        request_headers_to_remove=NOT_FORWARDED,
    )


class _Names(NamedTuple):
    """The names of a host."""

    free: tuple[str, ...]
    """Those that no other object has."""
    main: str
    """The one that is the same for all clients, whichever of them were free."""


def _of_route(
    route: LLMRoute,
    names: _Names,
    providers: Mapping[str, LLMProvider],
    proxy: Proxy,
    mesh: MeshSettings,
    *,
    memory: Memory,
) -> HostRoutes:
    refs = [ref.provider_host for rule in route.spec.rules for ref in rule.backend_refs]
    usable = {
        host: provider
        for host in dict.fromkeys(refs)
        if host and (provider := providers.get(host)) and provider.exported_to(route.namespace)
    }

    def make() -> HostRoutes:
        destinations: dict[Destination, None] = {}
        rules = list(_routes(route, usable, proxy, destinations))
        return _host_routes(route, names, rules, destinations, mesh)

    applying = tuple(
        _applies(match, route.namespace, proxy) for rule in route.spec.rules for match in rule.matches
    )
    key = (id(route), names, tuple(map(id, usable.values())), tuple(usable), applying, id(mesh))
    return memory.recall(key, (route, usable, mesh), make)


def _of_provider(provider: LLMProvider, names: _Names, mesh: MeshSettings, memory: Memory) -> HostRoutes:
    def make() -> HostRoutes:
        target = Destination.of(provider)
        action = {
            "cluster": target.cluster_name,
            **_timeouts(None),
            "retry_policy": _retry_policy(None, []),
        }
        routes = [protos.Route(name="default", match={"prefix": "/"}, route=action)]
        return _host_routes(provider, names, routes, [target], mesh)

    return memory.recall((id(provider), names, id(mesh)), (provider, mesh), make)


def _host_routes(
    item: LLMRoute | LLMProvider,
    names: _Names,
    routes: Sequence[Message],
    destinations: Iterable[Destination],
    mesh: MeshSettings,
) -> HostRoutes:
    made = protos.VirtualHost(
        name=item.spec.host,
        domains=names.free,
        routes=routes,
        request_body_buffer_limit={"value": mesh.max_request_bytes},
    )
    place = int.from_bytes(hashlib.sha256(names.main.encode()).digest()[:8])
    return HostRoutes(made, names.free, tuple(destinations), item.key, place)


def _routes(
    route: LLMRoute,
    providers: Mapping[str, LLMProvider],
    proxy: Proxy,
    destinations: dict[Destination, None],
) -> Iterator[Message]:
    """Rules in their order, a route for each match; nothing comes after the first rule that takes all."""
    for index, rule in enumerate(route.spec.rules):
        matches = [m for m in rule.matches if _applies(m, route.namespace, proxy)]
        if rule.matches and not matches:
            continue
        action = _action(rule, providers, destinations)
        name = rule.name or f"rule-{index}"
        catch_all = False
        for match in matches or [LLMRequestMatch()]:
            headers = [_header_matcher(header, value) for header, value in match.headers.items()]
            yield protos.Route(name=name, match={"prefix": "/", "headers": headers}, **action)
            catch_all = catch_all or not headers
        if catch_all:
            return


def _applies(match: LLMRequestMatch, namespace: str, proxy: Proxy) -> bool:
    """Whether a match can be true on this sidecar: what Envoy does not know is decided here."""
    on_mesh = not match.gateways or MESH in {resolve_gateway(name, namespace) for name in match.gateways}
    return on_mesh and proxy.has_labels(match.source_labels)


def _header_matcher(name: str, match: StringMatch) -> Message:
    """Istio's StringMatch; an empty one and the regex ``*`` ask for presence only."""
    if match.is_present:
        return protos.HeaderMatcher(name=name, present_match=True)
    if match.exact is not None:
        return protos.HeaderMatcher(name=name, string_match={"exact": match.exact})
    if match.prefix is not None:
        return protos.HeaderMatcher(name=name, string_match={"prefix": match.prefix})
    return protos.HeaderMatcher(name=name, string_match={"safe_regex": {"regex": match.regex}})


@dataclass(frozen=True, slots=True)
class _Share:
    """One backendRef of a rule: its cluster and its part of the requests."""

    cluster: str
    weight: int
    known: bool


def _action(
    rule: LLMRule, providers: Mapping[str, LLMProvider], destinations: dict[Destination, None]
) -> dict[str, Any]:
    """Choose the clusters of a rule."""
    groups = [
        [_share(rule, ref, weight, providers, destinations) for ref, weight in group]
        for group in rule.priority_groups()
    ]
    if len(groups) > 1:
        # With an order, a provider that is not there is one that fails: the next group takes its part.
        known = [[share for share in group if share.known] for group in groups]
        groups = [group for group in known if group] or groups[:1]
    action: dict[str, Any] = {**_timeouts(rule), "retry_policy": _retry_policy(rule, groups)}
    if len(groups) > 1:
        action["inline_cluster_specifier_plugin"] = _priority_groups(groups)
    elif len(groups[0]) > 1:
        clusters = [{"name": share.cluster, "weight": {"value": share.weight}} for share in groups[0]]
        action["weighted_clusters"] = {"clusters": clusters}
    else:
        action["cluster"] = groups[0][0].cluster
    return {"route": action}


def _share(
    rule: LLMRule,
    ref: LLMBackendRef,
    weight: int,
    providers: Mapping[str, LLMProvider],
    destinations: dict[Destination, None],
) -> _Share:
    """Refer to a provider; one that is not there is a cluster that is not there: a 503 for its share."""
    provider = providers.get(ref.provider_host) if ref.provider_host else None
    if provider is None:
        return _Share(f"missing|{_reference(ref)}", weight, known=False)
    target = Destination.of(provider, rule.name, ref.host_rewrite)
    destinations[target] = None
    return _Share(target.cluster_name, weight, known=True)


def _reference(ref: LLMBackendRef) -> str:
    backend = ref.backend_ref
    return f"{backend.kind} {backend.name}" if backend else str(ref.provider_host)


def _priority_groups(groups: Sequence[Sequence[_Share]]) -> dict[str, Any]:
    """Ordered fallback: each attempt takes the next group."""
    specifier = protos.PriorityGroupClusterSpecifier(
        priority_groups=[
            {
                "name": f"priority-{priority}",
                "clusters": [
                    {"cluster_name": share.cluster, "weight": {"value": share.weight}} for share in shares
                ],
            }
            for priority, shares in enumerate(groups)
        ]
    )
    return {"extension": {"name": "priority_group", "typed_config": protos.pack(specifier)}}


def _timeouts(rule: LLMRule | None) -> dict[str, Any]:
    timeout = rule.timeout if rule and rule.timeout else timedelta()
    return {"timeout": timeout, "idle_timeout": _IDLE_TIMEOUT}


def _retry_policy(rule: LLMRule | None, groups: Sequence[Sequence[_Share]]) -> dict[str, Any]:
    """Say what moves a request on to the next provider.

    Without ``retries`` and ``priority`` only what happened before the request was sent: a retry of anything
    else can bill twice (design decision 12).
    """
    retries = rule.retries if rule else None
    others = max([1, len(groups), *map(len, groups)]) - 1
    policies: Sequence[str] = _BEFORE_THE_REQUEST
    statuses: Sequence[int] = ()
    if retries or len(groups) > 1:
        policies, statuses = _FAILURES, _FAILURE_STATUSES
    if retries and retries.retry_on:
        policies, statuses = retries.policies, retries.status_codes
    policy: dict[str, Any] = {
        "retry_on": ",".join(policies),
        "retriable_status_codes": statuses,
        "num_retries": {"value": retries.attempts if retries else others or _ATTEMPTS_TO_CONNECT},
        # Pick the cluster anew, so that the next attempt is the next provider's.
        "refresh_cluster_on_retry": True,
    }
    if not retries and not others:
        policy["retry_back_off"] = _CONNECT_BACK_OFF
    if retries and retries.per_try_timeout:
        policy["per_try_timeout"] = retries.per_try_timeout
    if retries and not others:
        # The only provider said when to come back; where there is another one, nobody waits.
        policy["rate_limited_retry_back_off"] = {
            "reset_headers": [{"name": "retry-after", "format": "SECONDS"}],
            "max_interval": _LONGEST_RETRY_AFTER,
        }
    return policy
