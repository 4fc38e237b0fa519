"""What is to be said of each object, whatever proxies there are: Kubernetes conditions.

``Accepted``: the object counts. ``ResolvedRefs``: everything that it refers to is there.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from crds.kinds import did_you_mean
from crds.llmprovider import LLMProvider
from crds.llmroute import LLMRoute
from crds.problems import Finding, ObjectKey, Path, field_name
from translator import secrets
from translator.hosts import domains
from translator.world import MESH, World, selector_labels

_DEFAULT_CONFIG: Path = ("spec", "configs", "defaultConfig", "openAIConfig")
_RULE_CONFIGS: Path = ("spec", "configs", "routeSpecificConfigs")


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition as in Kubernetes (meta/v1 Condition): ``status`` False if the object does not do its work.

    ``findings`` say why, with the field; on a met condition they are what a user should know.
    """

    type: str
    status: bool
    reason: str
    findings: tuple[Finding, ...] = ()

    @property
    def message(self) -> str:
        """The findings for people."""
        return "; ".join(f"{field_name(finding.path)}: {finding.message}" for finding in self.findings)


def conditions(world: World) -> dict[ObjectKey, tuple[Condition, ...]]:
    """Say of each LLMProvider and LLMRoute whether it counts and whether its references resolve."""
    accepted = dict((*_lost_providers(world), *_lost_routes(world)))
    found: dict[ObjectKey, tuple[Condition, ...]] = {}
    for providers in world.providers.values():
        for provider in providers:
            found[provider.key] = (accepted.get(provider.key, _ACCEPTED), _secrets(world, provider))
    for routes in world.routes.values():
        for route in routes:
            found[route.key] = (accepted.get(route.key, _ACCEPTED), _backends(world, route))
    return found


_ACCEPTED = Condition("Accepted", status=True, reason="Accepted")


def _resolved(reason: str, findings: Iterable[Finding]) -> Condition:
    found = tuple(findings)
    return Condition(
        "ResolvedRefs", status=not found, reason=reason if found else "ResolvedRefs", findings=found
    )


def _lost_providers(world: World) -> Iterator[tuple[ObjectKey, Condition]]:
    """Find the providers that lose their host to another one of their namespace (design decision 7).

    Between namespaces, and between a selector and none, the more specific one is meant to win: no conflict.
    """
    for providers in world.providers.values():
        by_host = defaultdict(list)
        for provider in sorted(providers, key=lambda p: not selector_labels(p)):
            by_host[provider.spec.host].append(provider)
        for same in by_host.values():
            for position, loser in enumerate(same):
                theirs = selector_labels(loser)
                ours = [(winner.key, selector_labels(winner)) for winner in same[:position]]
                for key in (key for key, labels in ours if labels.items() <= theirs.items()):
                    yield loser.key, _taken(loser.spec.host, key)
                    break
                else:
                    for key in (
                        key for key, labels in ours if labels and theirs and _overlap(labels, theirs)
                    ):
                        text = f"a workload that both select gets {key}, which is older or first by name"
                        finding = Finding(("spec", "workloadSelector"), text)
                        yield (
                            loser.key,
                            Condition("Accepted", status=True, reason="Overlaps", findings=(finding,)),
                        )
                        break


def _lost_routes(world: World) -> Iterator[tuple[ObjectKey, Condition]]:
    """Find the routes whose host another one of their namespace has; the names of a Service are one host."""
    for namespace, routes in world.routes.items():
        winners: dict[str, ObjectKey] = {}
        for route in routes:
            if MESH not in route.gateways:
                continue
            name = domains(route.spec.host, namespace, namespace, world.mesh.cluster_domain)[-1]
            winner = winners.setdefault(name, route.key)
            if winner != route.key:
                yield route.key, _taken(route.spec.host, winner)


def _taken(host: str, winner: ObjectKey) -> Condition:
    text = f"{host} is already taken by {winner}, which is older or first by name"
    return Condition(
        "Accepted", status=False, reason="Conflicted", findings=(Finding(("spec", "host"), text),)
    )


def _overlap(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether a workload can carry the labels of both."""
    return all(one[name] == value for name, value in other.items() if name in one)


def _secrets(world: World, provider: LLMProvider) -> Condition:
    """Look the keys and the certificate of a provider up."""
    findings = []
    if provider.key in world.held:
        text = "the key is not known since the restart: proxies that have it keep it, new ones answer 401"
        return _resolved("SecretNotFound", [Finding(_DEFAULT_CONFIG, text)])
    names: dict[str | None, str | None] = {}
    for rule in (None, *provider.spec.route_names):
        names.setdefault(secrets.api_key_name(provider, rule), rule)
    names.pop(None, None)
    for rule in names.values():
        path = (*_RULE_CONFIGS, rule, "openAIConfig") if rule else _DEFAULT_CONFIG
        try:
            secrets.api_key(world, provider, rule)
        except secrets.MissingSecretError as error:
            findings.append(Finding(path, f"{error}; requests are answered 401"))
    if provider.spec.tls.credential_name is not None:
        try:
            secrets.client_certificate(world, provider)
        except secrets.MissingSecretError as error:
            findings.append(Finding(("spec", "tls", "credentialName"), str(error)))
    return _resolved("SecretNotFound", findings)


def _backends(world: World, route: LLMRoute) -> Condition:
    """Look every backendRef up among the providers that workloads of the route can get."""
    root = world.mesh.root_namespace
    # A route of the root namespace is every namespace's: whose providers it finds depends on the workload.
    namespaces = list(world.providers) if route.namespace == root else [route.namespace, root]
    providers = [provider for namespace in namespaces for provider in world.providers.get(namespace, ())]
    hosts = {provider.spec.host for provider in providers if provider.exported_to(route.namespace)}
    where = "any namespace" if route.namespace == root else f"namespace {' or '.join(namespaces)}"
    findings = []
    reason = "BackendNotFound"
    for i, rule in enumerate(route.spec.rules):
        for j, ref in enumerate(rule.backend_refs):
            path: Path = ("spec", "rules", i, "backendRefs", j)
            if ref.backend_ref is not None:
                reason = "UnsupportedKind"
                kind = f"{ref.backend_ref.kind} {ref.backend_ref.name}"
                text = f"{kind} is not supported; its share is answered 503"
                findings.append(Finding((*path, "backendRef"), text))
            elif ref.provider_host is not None and ref.provider_host not in hosts:
                text = f"no LLMProvider with host {ref.provider_host} in {where} (its share is answered 503)"
                hidden = [
                    f", {p.key} is not exported to it" for p in providers if p.spec.host == ref.provider_host
                ]
                hint = hidden[0] if hidden else did_you_mean(ref.provider_host, hosts)
                findings.append(Finding((*path, "providerHost"), f"{text}{hint}"))
    return _resolved(reason, findings)
