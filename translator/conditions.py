"""What is to be said of each object, whatever proxies there are: Kubernetes conditions.

``Accepted``: the object counts. ``ResolvedRefs``: everything that it refers to is there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from crds.llmprovider import LLMProvider
from crds.llmroute import LLMRoute
from crds.problems import ObjectKey
from translator import secrets
from translator.hosts import domains
from translator.world import MESH, World


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition as in Kubernetes (meta/v1 Condition); ``status`` False is what a user should look at."""

    type: str
    status: bool
    reason: str
    message: str


def conditions(world: World) -> dict[ObjectKey, tuple[Condition, ...]]:
    """Say of each LLMProvider and LLMRoute whether it counts and whether its references resolve."""
    conflicts = dict(_conflicts(world))
    found: dict[ObjectKey, tuple[Condition, ...]] = {}
    for providers in world.providers.values():
        for provider in providers:
            found[provider.key] = (_accepted(provider.key, conflicts), _keys(world, provider))
    for routes in world.routes.values():
        for route in routes:
            found[route.key] = (_accepted(route.key, conflicts), _references(world, route))
    return found


def _accepted(key: ObjectKey, conflicts: Mapping[ObjectKey, str]) -> Condition:
    if key in conflicts:
        return Condition("Accepted", status=False, reason="Conflicted", message=conflicts[key])
    return Condition("Accepted", status=True, reason="Accepted", message="")


def _resolved(reason: str, messages: list[str]) -> Condition:
    if messages:
        return Condition("ResolvedRefs", status=False, reason=reason, message="; ".join(messages))
    return Condition("ResolvedRefs", status=True, reason="ResolvedRefs", message="")


def _conflicts(world: World) -> Iterator[tuple[ObjectKey, str]]:
    """Objects that lose a host to another one on every proxy that both reach (design decision 7).

    Between namespaces, and between a selector and none, the more specific one is meant to win: no conflict.
    """
    for providers in world.providers.values():
        by_host: dict[str, list[LLMProvider]] = {}
        for provider in providers:
            by_host.setdefault(provider.spec.host, []).append(provider)
        for same in by_host.values():
            for winner, loser in combinations(same, 2):
                ours, theirs = _selector(winner), _selector(loser)
                if bool(ours) == bool(theirs) and _overlap(ours, theirs):
                    text = f"spec.host: {loser.spec.host} is already taken by {winner.key}, which is older or first by name"
                    yield loser.key, text
    for namespace, routes in world.routes.items():
        taken: dict[str, ObjectKey] = {}
        for route in routes:
            if MESH not in route.gateways:
                continue
            names = domains(route.spec.host, namespace, namespace, world.mesh.cluster_domain)
            winner_key = taken.setdefault(names[-1], route.key)
            if winner_key != route.key:
                yield (
                    route.key,
                    f"spec.host: {route.spec.host} is already taken by {winner_key}, which is older or first by name",
                )


def _selector(provider: LLMProvider) -> Mapping[str, str]:
    selector = provider.spec.workload_selector
    return selector.labels if selector else {}


def _overlap(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether a workload can carry the labels of both."""
    return all(one[name] == value for name, value in other.items() if name in one)


def _keys(world: World, provider: LLMProvider) -> Condition:
    messages = []
    for rule in (None, *provider.spec.route_names):
        where = f"routeSpecificConfigs.{rule}" if rule else "defaultConfig"
        if secrets.api_key_name(provider, rule) is None:
            continue
        try:
            secrets.api_key(world, provider, rule)
        except secrets.MissingSecretError as error:
            messages.append(f"spec.configs.{where}.openAIConfig.{error}; requests are answered 401")
    if provider.spec.tls.credential_name is not None:
        try:
            secrets.client_certificate(world, provider)
        except secrets.MissingSecretError as error:
            messages.append(f"spec.tls.credentialName: {error}")
    return _resolved("SecretNotFound", messages)


def _references(world: World, route: LLMRoute) -> Condition:
    """Look every backendRef up among the providers that workloads of the route's namespace can get."""
    messages = []
    reason = "BackendNotFound"
    reachable = {
        provider.spec.host
        for namespace in (route.namespace, world.mesh.root_namespace)
        for provider in world.providers.get(namespace, ())
        if provider.exported_to(route.namespace)
    }
    for i, rule in enumerate(route.spec.rules):
        for j, ref in enumerate(rule.backend_refs):
            field = f"spec.rules[{i}].backendRefs[{j}]"
            if ref.backend_ref is not None:
                reason = "UnsupportedKind"
                kind = f"{ref.backend_ref.kind} {ref.backend_ref.name}"
                messages.append(f"{field}.backendRef: {kind} is not supported; its share is answered 503")
            elif ref.provider_host not in reachable:
                messages.append(
                    f"{field}.providerHost: no LLMProvider with host {ref.provider_host} in namespace "
                    f"{route.namespace} or {world.mesh.root_namespace}; its share is answered 503"
                )
    return _resolved(reason, messages)
