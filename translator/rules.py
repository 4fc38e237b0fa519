"""The rules of an LLMRoute -> Envoy routes: which cluster takes a request, when another one gets it.

Matches and precedence follow Istio's VirtualService (networking/v1alpha3/virtual_service.proto); design
decisions 9 to 13 (docs/decisions.md).
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Self

from google.protobuf.message import Message

from crds.llmprovider import MAX_REQUEST_BYTES, LLMProvider
from crds.llmroute import (
    MAX_TOTAL_WEIGHT,
    BackendObjectReference,
    LLMBackendRef,
    LLMRequestMatch,
    LLMRoute,
    LLMRule,
    resolve_gateway,
)
from crds.meta import StringMatch
from translator.api_keys import CLIENT_HEADER
from translator.backends import Backend, BackendNotFoundError, backend
from translator.clusters import BUFFER_SLACK, Destination
from translator.features import Feature
from translator.hosts import authority, service_name, short_name
from translator.proxy import Proxy
from translator.world import MESH, World
from xds import protos

_IDLE_TIMEOUT = timedelta(hours=1)
"""How long a stream may be silent. Envoy's defaults (15 s a request, 5 min of silence) cut LLM answers."""

_BEFORE_THE_REQUEST = ("connect-failure", "refused-stream", "reset-before-request")
"""Failures that cannot have been billed: the provider has not seen the request (design decision 12)."""

_ATTEMPTS_TO_CONNECT = 6
_CONNECT_BACK_OFF = {
    "base_interval": timedelta(milliseconds=100),
    "max_interval": timedelta(seconds=2),
}
"""Retries of a provider that is the only one: some two seconds in all, the first within 100 ms. A new or
changed cluster has only its guard endpoint, which refuses at once, until the provider's name is resolved."""

_FAILURES = ("connect-failure", "refused-stream", "reset", "retriable-status-codes")
_FAILURE_STATUSES = (429, 500, 502, 503, 504)

_LONGEST_RETRY_AFTER = timedelta(seconds=60)
"""A longer pause is not waited for: Envoy then retries as if none had been asked for."""

ROUTE_METADATA = ("llm", "route")
"""Namespace and key of a route's metadata that hold the namespace and name of its LLMRoute."""

_FINEST = 1000
"""Into how many parts a group's requests can be split where priorities become weights."""


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
    "x-envoy-external-address",  # this one and those below are the connection manager's own
    "x-envoy-internal",
    "x-envoy-llmplane-routes",
    "x-forwarded-client-cert",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-goog-api-key",
    CLIENT_HEADER,
    "x-request-id",
)
"""Request headers that never leave towards a provider (design decision 10); the connection manager takes
those away that begin with ``x-envoy-`` or ``x-forwarded-``, Envoy itself what is hop by hop, and the Lua
script what an attempt added."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Of what an LLMRoute refers to, that which a proxy can use."""

    providers: Mapping[str, Destination]
    """By their hosts as the route writes them."""
    backends: Mapping[BackendObjectReference, Backend]

    @classmethod
    def of(cls, world: World, route: LLMRoute, providers: Mapping[str, LLMProvider], proxy: Proxy) -> Self:
        """Look up what a route refers to; ``providers`` are those of the proxy, by their short names."""
        refs = [ref for rule in route.spec.rules for ref in rule.backend_refs]
        found: dict[str, Destination] = {}
        for host in dict.fromkeys(ref.provider_host for ref in refs if ref.provider_host):
            short = short_name(host, proxy.namespace, world.mesh.cluster_domain)
            provider = providers.get(short)
            if provider is not None and provider.exported_to(route.namespace):
                found[host] = Destination.of(provider, short)
        if not route.has_backends:
            return cls(found, {})
        backends: dict[BackendObjectReference, Backend] = {}
        for reference in (ref.backend_ref for ref in refs if ref.backend_ref is not None):
            with suppress(BackendNotFoundError):
                target = backend(world, reference, route.namespace)
                # Without a certificate it cannot be spoken to, and never without TLS instead.
                if proxy.certificate is not None or not target.mutual:
                    backends[reference] = target
        return cls(found, backends)

    @property
    def identity(self) -> Hashable:
        """What tells them from others, with objects by their ids."""
        destinations = self.providers.values()
        return (
            tuple(self.providers),
            tuple((id(target.provider), target.host) for target in destinations),
            tuple(self.backends.items()),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Rules:
    """The rules of one LLMRoute as routes, and the destinations that they name."""

    route: LLMRoute
    routes: tuple[Message, ...]
    destinations: tuple[Destination, ...]
    backends: tuple[Backend, ...]

    @classmethod
    def of(
        cls,
        route: LLMRoute,
        targets: Targets,
        applying: Sequence[bool],
        proxy: Proxy,
        *,
        cluster_domain: str,
        removes: bool,
    ) -> Self:
        """Make routes of the matches that can be true, of which ``applying`` tells in their order.

        Of the proxy only its version counts. ``removes``: each route that can lead to a provider itself
        removes the headers that are not forwarded.
        """
        maker = _Maker(route, targets, proxy, cluster_domain, removes=removes)
        routes = tuple(maker.routes(iter(applying)))
        return cls(route, routes, tuple(maker.destinations), tuple(maker.backends))


@dataclass(frozen=True, slots=True)
class _Share:
    """One backendRef of a rule: its cluster and its part of the requests."""

    cluster: str
    weight: int
    known: bool


class _Maker:
    """Makes the routes of one LLMRoute."""

    def __init__(
        self, route: LLMRoute, targets: Targets, proxy: Proxy, cluster_domain: str, *, removes: bool
    ) -> None:
        self.destinations: dict[Destination, None] = {}
        self.backends: dict[Backend, None] = {}
        self._route = route
        self._full_name = f"{route.namespace}/{route.name}"
        self._targets = targets
        self._proxy = proxy
        self._cluster_domain = cluster_domain
        self._removes = removes

    def routes(self, applying: Iterator[bool]) -> Iterator[Message]:
        """Rules in their order, a route for each match; nothing comes after the first that takes all."""
        for index, rule in enumerate(self._route.spec.rules):
            matches = [match for match in rule.matches if next(applying)]
            if rule.matches and not matches:
                continue
            action = self._action(rule)
            limit = _body_limit(self._providers(rule))
            removed = self._removes and any(ref.backend_ref is None for ref in rule.backend_refs)
            name = rule.name or f"rule-{index}"
            catch_all = False
            for match in matches or [LLMRequestMatch()]:
                headers = [_header_matcher(header, value) for header, value in match.headers.items()]
                made = protos.Route(
                    name=name,
                    match={"prefix": "/", "headers": headers},
                    route=action,
                    request_headers_to_remove=NOT_FORWARDED if removed else (),
                    **limit,
                )
                made.metadata.filter_metadata[ROUTE_METADATA[0]].update({ROUTE_METADATA[1]: self._full_name})
                yield made
                catch_all = catch_all or not headers
            if catch_all:
                return

    def _action(self, rule: LLMRule) -> dict[str, Any]:
        """Choose the clusters of a rule."""
        groups = [
            [self._share(rule, ref, weight) for ref, weight in group] for group in rule.priority_groups()
        ]
        if len(groups) > 1:
            # With an order, a provider that is not there is one that fails: the next group takes its part.
            known = [[share for share in group if share.known] for group in groups]
            groups = [group for group in known if group] or groups[:1]
        host = self._host(rule)
        if not self._proxy.supports(Feature.FALLBACK):
            return {**host, **sending(rule, []), **_weighted(groups[0])}
        if len(groups) == 1:
            chosen = _weighted(groups[0])
        elif self._proxy.supports(Feature.PRIORITY_GROUPS):
            chosen = {"inline_cluster_specifier_plugin": _priority_groups(groups)}
        else:
            shares = _by_weight_alone(groups)
            chosen = _weighted(shares)
            groups = [[share] for share in shares]
        return {**host, **sending(rule, groups), **chosen}

    def _providers(self, rule: LLMRule) -> Iterator[LLMProvider]:
        """Those that a rule leads to and that are there."""
        for ref in rule.backend_refs:
            if found := self._targets.providers.get(str(ref.provider_host)):
                yield found.provider

    def _share(self, rule: LLMRule, ref: LLMBackendRef, weight: int) -> _Share:
        """Refer to a destination; one that is not there is a cluster that is not there: 503 for its share."""
        if ref.backend_ref is not None:
            service = self._targets.backends.get(ref.backend_ref)
            if service is not None:
                self.backends[service] = None
                return _Share(service.cluster_name, weight, known=True)
        elif found := self._targets.providers.get(str(ref.provider_host)):
            target = Destination.of(found.provider, found.host, rule.name, ref.host_rewrite)
            self.destinations[target] = None
            return _Share(target.cluster_name, weight, known=True)
        return _Share(f"missing|{_reference(ref)}", weight, known=False)

    def _host(self, rule: LLMRule) -> dict[str, Any]:
        """Say for which host a Service is asked: the client's, but in full: gateways know no short names.

        Clusters of providers set their own.
        """
        services = [ref for ref in rule.backend_refs if ref.backend_ref is not None]
        if not services:
            return {}
        rewrites = [ref.host_rewrite for ref in services if ref.host_rewrite]
        name = service_name(self._route.spec.host, self._route.namespace, self._cluster_domain)
        if name is not None:
            rewrites.append(f"{name[0]}.{name[1]}.svc.{self._cluster_domain}")
        return {"host_rewrite_literal": authority(rewrites[0])} if rewrites else {}


def leads_to_mutual_tls(world: World, route: LLMRoute) -> bool:
    """Whether a Service of a route is spoken to in mutual TLS of the mesh."""
    for ref in (ref for rule in route.spec.rules for ref in rule.backend_refs):
        with suppress(BackendNotFoundError):
            if ref.backend_ref is not None and backend(world, ref.backend_ref, route.namespace).mutual:
                return True
    return False


def applies(route: LLMRoute, proxy: Proxy, gateway: str = MESH) -> tuple[bool, ...]:
    """Say of each match, of all rules, whether it can be true on this proxy.

    What Envoy does not know is decided here, as in Istio: whether requests come in by one of the match's
    ``gateways``, and the labels of the workload, which on a gateway count only without ``gateways``.
    """

    def can_be(match: LLMRequestMatch) -> bool:
        if match.gateways:
            if gateway not in {resolve_gateway(name, route.namespace) for name in match.gateways}:
                return False
            if gateway != MESH:
                return True
        return proxy.has_labels(match.source_labels)

    return tuple(can_be(match) for rule in route.spec.rules for match in rule.matches)


def _header_matcher(name: str, match: StringMatch) -> Message:
    """Istio's StringMatch; an empty one and the regex ``*`` ask for presence only."""
    if match.is_present:
        return protos.HeaderMatcher(name=name, present_match=True)
    if match.exact is not None:
        return protos.HeaderMatcher(name=name, string_match={"exact": match.exact})
    if match.prefix is not None:
        return protos.HeaderMatcher(name=name, string_match={"prefix": match.prefix})
    return protos.HeaderMatcher(name=name, string_match={"safe_regex": {"regex": match.regex}})


def missing_features(route: LLMRoute, proxy: Proxy) -> list[Feature]:
    """Return what an Envoy lacks of what a route asks for, and what nothing stands in for."""
    falls_back = any(sum(map(len, rule.priority_groups())) > 1 for rule in route.spec.rules)
    return [Feature.FALLBACK] if falls_back and not proxy.supports(Feature.FALLBACK) else []


def _weighted(shares: Sequence[_Share]) -> dict[str, Any]:
    if len(shares) == 1:
        return {"cluster": shares[0].cluster}
    clusters = [{"name": share.cluster, "weight": {"value": share.weight}} for share in shares]
    return {"weighted_clusters": {"clusters": clusters}}


def _by_weight_alone(groups: Sequence[Sequence[_Share]]) -> list[_Share]:
    """Turn priorities into weights that differ as much as Envoy allows, for one without priority groups.

    A retry chooses among the clusters that were not tried. So it is the order but for one request in
    billions with two priorities, in tens of thousands with three; and all of a group are tried before the
    next.
    """
    highest = max(sum(share.weight for share in group) for group in groups)
    scale = min(1, _FINEST / highest)
    # What the highest is scaled to, * step ** (groups - 1), and all that is below it have to fit.
    step = int((MAX_TOTAL_WEIGHT / (highest * scale) / 2) ** (1 / (len(groups) - 1)))
    return [
        replace(share, weight=max(1, int(share.weight * scale)) * step**later)
        for later, group in zip(range(len(groups) - 1, -1, -1), groups, strict=True)
        for share in group
    ]


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


def sending(rule: LLMRule | None, groups: Sequence[Sequence[_Share]]) -> dict[str, Any]:
    """Return how long a request may take, and when it is sent again: parts of a RouteAction.

    ``groups`` are the destinations by priority. Without a rule, or without limits of its own, only a long
    silence ends a request.

    What ends attempts that are silent: per_try_timeout if nothing of the answer was passed on, after which
    Envoy forgets per_try_idle_timeout (UpstreamRequest::onPerTryTimeout). So where the first is shorter, the
    stream's own limit bounds the silence of the answer, and leaves time for as many attempts.
    """
    policy = _retry_policy(rule, groups)
    timeout = rule.timeout if rule and rule.timeout else timedelta()
    first = rule and (rule.first_token_timeout or (rule.retries and rule.retries.per_try_timeout))
    idle = rule and rule.stream_idle_timeout
    stream_idle = _IDLE_TIMEOUT
    if first and idle and first < idle:
        policy["per_try_timeout"] = first
        stream_idle = max(idle, first * _attempts(rule, groups))
    elif idle:
        policy["per_try_idle_timeout"] = idle
        stream_idle = max(idle, _IDLE_TIMEOUT)
    elif first:
        policy["per_try_timeout"] = first
    return {"timeout": timeout, "idle_timeout": stream_idle, "retry_policy": policy}


def _attempts(rule: LLMRule | None, groups: Sequence[Sequence[_Share]]) -> int:
    """How many attempts may be silent, one after the other."""
    if rule and rule.retries:
        return 1 + rule.retries.attempts
    return max(1, len(groups))


def _body_limit(providers: Iterable[LLMProvider]) -> dict[str, Any]:
    """Say how much a route keeps of a request to send it again, where its virtual host says too little.

    Each provider's own limit is held by its cluster.
    """
    largest = max((provider.spec.max_request_bytes for provider in providers), default=0)
    if largest <= MAX_REQUEST_BYTES:
        return {}
    return {"request_body_buffer_limit": {"value": largest + BUFFER_SLACK}}


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
        "refresh_cluster_on_retry": others > 0,
    }
    if not retries and not others:
        policy["retry_back_off"] = _CONNECT_BACK_OFF
    if retries and not others:
        # The only provider said when to come back; where there is another one, nobody waits.
        policy["rate_limited_retry_back_off"] = {
            "reset_headers": [{"name": "retry-after", "format": "SECONDS"}],
            "max_interval": _LONGEST_RETRY_AFTER,
        }
    return policy
