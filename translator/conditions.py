"""What is to be said of each object, whatever proxies there are: Kubernetes conditions.

``Accepted``: the object counts. ``ResolvedRefs``: everything that it refers to is there.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from crds.authorizationpolicy import AuthorizationPolicy
from crds.gateway import Gateway
from crds.kinds import did_you_mean
from crds.llmprovider import LLMProvider
from crds.llmroute import LLMRoute, resolve_gateway
from crds.problems import Finding, ObjectKey, Path, field_name
from crds.telemetry import AccessLogging, Metrics, Telemetry, Tracing
from translator import api_keys, authentication, authorization, global_rate_limits, rate_limits, secrets
from translator.backends import BackendNotFoundError, UnsupportedBackendError, backend
from translator.gateways import intersection, merge, typical_proxies
from translator.hosts import domains, short_name
from translator.memory import Memory
from translator.telemetry import is_general
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

    def joined(self, other: "Condition") -> "Condition":
        """Return this condition with the findings of another one of its type."""
        worse = self if not self.status else other
        return Condition(
            self.type, status=worse.status, reason=worse.reason, findings=self.findings + other.findings
        )


def conditions(world: World, memory: Memory | None = None) -> dict[ObjectKey, tuple[Condition, ...]]:
    """Say of each object that something is made of whether it counts and whether its references resolve.

    ``memory`` is where that is remembered of objects that did not change, nor what they refer to.
    """
    memory = memory or Memory()
    accepted: dict[ObjectKey, Condition] = {}
    for key, condition in (*_lost_providers(world), *_lost_routes(world), *_refused_routes(world)):
        accepted[key] = accepted[key].joined(condition) if key in accepted else condition
    found: dict[ObjectKey, tuple[Condition, ...]] = {}
    hints = _Hints()
    for providers in world.providers.values():
        for provider in providers:
            found[provider.key] = (
                accepted.get(provider.key, _ACCEPTED),
                _resolved_secrets(world, provider, memory),
            )
    for routes in world.routes.values():
        for route in routes:
            found[route.key] = (accepted.get(route.key, _ACCEPTED), _backends(world, route, hints))
    for gateways in world.gateways.values():
        for gateway in gateways:
            found[gateway.key] = _gateway(world, gateway)
    for policies in world.authorization_policies.values():
        for policy in policies:
            found[policy.key] = _authorization(world, policy)
    return found | dict(_authentications(world)) | dict(_telemetries(world)) | dict(_token_limits(world))


_ACCEPTED = Condition("Accepted", status=True, reason="Accepted")


def _resolved(reason: str, findings: Iterable[Finding]) -> Condition:
    found = tuple(findings)
    return Condition(
        "ResolvedRefs", status=not found, reason=reason if found else "ResolvedRefs", findings=found
    )


def _lost_providers(world: World) -> Iterator[tuple[ObjectKey, Condition]]:
    """Find the providers that lose their host to another one of their namespace (design decision 7).

    The names of a Service are one host.
    Between namespaces, and between a selector and none, the more specific one is meant to win: no conflict.
    """
    for namespace, providers in world.providers.items():
        by_host = world.providers_by_host[namespace]
        if len(by_host) == len(providers):
            continue
        for of_host in by_host.values():
            same = sorted(of_host, key=lambda p: not selector_labels(p))
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


def _authentications(world: World) -> Iterator[tuple[ObjectKey, tuple[Condition, ...]]]:
    for policies in world.request_authentications.values():
        for policy in policies:
            yield policy.key, (_ACCEPTED, _resolved("JwksNotFound", authentication.unresolved(policy)))
    for key, findings in api_keys.findings(world).items():
        yield key, (_ACCEPTED, _resolved("KeysNotUsable", findings))


def _token_limits(world: World) -> Iterator[tuple[ObjectKey, tuple[Condition, ...]]]:
    for limits in world.token_rate_limits.values():
        for limit in limits:
            notes = (*rate_limits.notes(world, limit), *global_rate_limits.notes(world, limit))
            service = global_rate_limits.unresolved(world, limit)
            reason = "ProviderNotFound" if service else "TargetNotFound"
            resolved = _resolved(reason, [*service, *rate_limits.unresolved(world, limit)])
            yield limit.key, (replace(_ACCEPTED, findings=notes), resolved)


def _authorization(world: World, policy: AuthorizationPolicy) -> tuple[Condition, ...]:
    notes = tuple(authorization.notes(world, policy))
    accepted = Condition("Accepted", status=True, reason="Accepted", findings=notes)
    rivals = authorization.rivals(world, policy)
    if rivals:
        text = (
            f"{rivals[0]} asks another provider, and a workload has one at most: where both are for one,"
            " all that their rules match is denied"
        )
        conflict = Finding(("spec", "provider", "name"), text)
        accepted = Condition("Accepted", status=False, reason="Conflicted", findings=(conflict, *notes))
    return accepted, _resolved("ProviderNotFound", authorization.unresolved(world, policy))


def _telemetries(world: World) -> Iterator[tuple[ObjectKey, tuple[Condition, ...]]]:
    """Look the providers of Telemetry objects up; of those without a selector, one a namespace counts."""
    for telemetries in world.telemetries.values():
        general = [item.key for item in telemetries if is_general(item)]
        for item in telemetries:
            accepted = _ACCEPTED
            if item.key in general[1:]:
                text = f"has no selector, and {general[0]}, which is older or first by name, has none either"
                finding = Finding(("spec", "selector"), text)
                accepted = Condition("Accepted", status=False, reason="Conflicted", findings=(finding,))
            yield item.key, (accepted, _resolved("ProviderNotFound", _unknown_providers(world, item)))


def _unknown_providers(world: World, item: Telemetry) -> Iterator[Finding]:
    members: tuple[tuple[str, Sequence[AccessLogging | Metrics | Tracing], tuple[str, ...]], ...] = (
        ("accessLogging", item.spec.access_logging, ("envoy_file_access_log", "envoy_otel_als")),
        ("metrics", item.spec.metrics, ("prometheus",)),
        ("tracing", item.spec.tracing, ("opentelemetry",)),
    )
    for member, entries, kinds in members:
        for i, entry in enumerate(entries):
            for j, ref in enumerate(entry.providers):
                provider = world.mesh.config.provider(ref.name)
                if provider is None or all(getattr(provider, kind) is None for kind in kinds):
                    text = f"the mesh configuration has no extensionProvider '{ref.name}' that can do this"
                    yield Finding(("spec", member, i, "providers", j, "name"), text)


def _overlap(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether a workload can carry the labels of both."""
    return all(one[name] == value for name, value in other.items() if name in one)


def _resolved_secrets(world: World, provider: LLMProvider, memory: Memory) -> Condition:
    objects = (provider, *map(world.secrets.get, provider.secrets)) if provider.secrets else (provider,)
    is_held = bool(world.held) and provider.key in world.held
    key = (*map(id, objects), is_held, world.unread_secrets.get(provider.namespace))
    return memory.recall(key, objects, lambda: _secrets(world, provider))


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


def _refused_routes(world: World) -> Iterator[tuple[ObjectKey, Condition]]:
    """Find the routes that a Gateway does not let in, by host or namespace (Istio's `ns/host`)."""
    by_name = {gateway.full_name: gateway for of in world.gateways.values() for gateway in of}
    trusts_proxies = world.mesh.config.default_config.gateway_topology.num_trusted_proxies > 0
    for route in (route for of in world.routes.values() for route in of if route.spec.gateways):
        names = domains(route.spec.host, route.namespace, "", world.mesh.cluster_domain)
        findings = []
        for index, written in enumerate(route.spec.gateways):
            gateway = by_name.get(resolve_gateway(written, route.namespace))
            if gateway is None or any(
                intersection(server.hosts_for(route.namespace, gateway.namespace), names)
                for server in gateway.spec.servers
                # What only redirects serves no route; with TLS ended in front of the gateway it does.
                if trusts_proxies or not server.https_redirect
            ):
                continue
            hosts = ", ".join(dict.fromkeys(host for server in gateway.spec.servers for host in server.hosts))
            text = (
                f"{gateway.key} does not take host {route.spec.host} from namespace {route.namespace}: "
                f"its hosts are {hosts}"
            )
            findings.append(Finding(("spec", "gateways", index), text))
        if findings:
            yield (
                route.key,
                Condition("Accepted", status=False, reason="NotAllowedByGateway", findings=tuple(findings)),
            )


def _gateway(world: World, gateway: Gateway) -> tuple[Condition, Condition]:
    """Say what of a Gateway is left out at the gateways that it is for."""
    refusals = [
        refusal
        for proxy in typical_proxies(world, gateway)
        for refusal in merge(world, proxy).refusals
        if refusal.served.gateway is gateway
    ]
    missing = dict.fromkeys(each.finding for each in refusals if each.reason == "SecretNotFound")
    others = [each for each in refusals if each.reason != "SecretNotFound"]
    accepted = _ACCEPTED
    if others:
        findings = tuple(dict.fromkeys(each.finding for each in others))
        accepted = Condition("Accepted", status=False, reason=others[0].reason, findings=findings)
    return accepted, _resolved("SecretNotFound", missing)


def _backends(world: World, route: LLMRoute, hints: "_Hints") -> Condition:
    """Look every backendRef, and every gateway, up; providers among those that its workloads can get."""
    namespaces, where = _namespaces_of(world, route)
    hosts = [world.providers_by_host.get(namespace, {}) for namespace in namespaces]
    domain = world.mesh.cluster_domain
    findings = list(_unknown_gateways(world, route))
    reason = "GatewayNotFound" if findings else "BackendNotFound"
    for i, rule in enumerate(route.spec.rules):
        for j, ref in enumerate(rule.backend_refs):
            path: Path = ("spec", "rules", i, "backendRefs", j)
            if ref.backend_ref is not None:
                try:
                    backend(world, ref.backend_ref, route.namespace)
                except UnsupportedBackendError as error:
                    reason = "UnsupportedKind"
                    findings.append(Finding((*path, "backendRef"), f"{error}; its share is answered 503"))
                except BackendNotFoundError as error:
                    findings.append(Finding((*path, "backendRef"), f"{error}; its share is answered 503"))
            elif ref.provider_host is not None:
                providers = [
                    provider
                    for namespace, by_host in zip(namespaces, hosts, strict=True)
                    for provider in by_host.get(short_name(ref.provider_host, namespace, domain), ())
                ]
                if any(provider.exported_to(route.namespace) for provider in providers):
                    continue
                text = f"no LLMProvider with host {ref.provider_host} in {where} (its share is answered 503)"
                hidden = [f", {provider.key} is not exported to it" for provider in providers]
                hint = hidden[0] if hidden else hints.host(ref.provider_host, namespaces, hosts, route)
                findings.append(Finding((*path, "providerHost"), f"{text}{hint}"))
    return _resolved(reason, findings)


class _Hints:
    """Which host may have been meant.

    That takes some milliseconds for each, and thousands of routes may refer to what is not there: beyond
    some missing hosts, or among too many hosts, nothing is said.
    """

    _MISSING = 20
    _KNOWN = 200

    def __init__(self) -> None:
        self._asked: set[str] = set()
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}

    def host(
        self,
        missing: str,
        namespaces: Sequence[str],
        hosts: Sequence[Mapping[str, Sequence[LLMProvider]]],
        route: LLMRoute,
    ) -> str:
        """Return `, did you mean '...'?`, or nothing; of the hosts that the route may refer to."""
        is_one_more = len(self._asked) >= self._MISSING and missing not in self._asked
        if is_one_more or sum(map(len, hosts)) > self._KNOWN:
            return ""
        self._asked.add(missing)
        view = (*namespaces, route.namespace)
        if view not in self._known:
            exported = {
                name
                for by_host in hosts
                for name, providers in by_host.items()
                if any(provider.exported_to(route.namespace) for provider in providers)
            }
            self._known[view] = tuple(sorted(exported))
        return _nearest(missing, self._known[view])


_nearest = lru_cache(maxsize=1024)(did_you_mean)


def _namespaces_of(world: World, route: LLMRoute) -> tuple[list[str], str]:
    """Return the namespaces in which a route's providers are, and words for them.

    They are those that its workloads can get: sidecars of its namespace, and the gateways that it names.
    """
    root = world.mesh.config.root_namespace
    namespaces = [root]
    if MESH in route.gateways:
        # A route of the root namespace is every namespace's: which providers it has depends on the workload.
        namespaces = list(world.providers) if route.namespace == root else [route.namespace, root]
    for gateway in (gateway for of in world.gateways.values() for gateway in of if route.spec.gateways):
        if gateway.full_name in route.gateways:
            namespaces += [proxy.namespace for proxy in typical_proxies(world, gateway)]
    namespaces = list(dict.fromkeys(namespaces))
    every = route.namespace == root and MESH in route.gateways
    return namespaces, "any namespace" if every else f"namespace {' or '.join(namespaces)}"


def _unknown_gateways(world: World, route: LLMRoute) -> Iterator[Finding]:
    if not route.spec.gateways:
        return
    known = [gateway.full_name for of in world.gateways.values() for gateway in of]
    for index, written in enumerate(route.spec.gateways):
        name = resolve_gateway(written, route.namespace)
        if name != MESH and name not in known:
            namesakes = [each for each in known if each.rpartition("/")[2] == name.rpartition("/")[2]]
            hint = f", did you mean '{namesakes[0]}'?" if namesakes else did_you_mean(name, known)
            text = f"Gateway {name} does not exist{hint}"
            yield Finding(("spec", "gateways", index), text)
