"""AuthorizationPolicies as filters of a gateway's connection manager (Istio: authz/builder/builder.go).

The order of the filters is Istio's: CUSTOM, then JWT authentication and API keys, then AUDIT, DENY, ALLOW.
The filters are not in the listener, but in resources of their own: translator.policies.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from google.protobuf.message import Message

from crds.authorizationpolicy import Action, AuthorizationPolicy
from crds.problems import Finding, ObjectKey
from translator.authorization_rules import Matcher, RuleContext, always, never, rbac_policy
from translator.external_authorization import (
    SHADOW_PREFIX,
    UnknownProviderError,
    destination,
    ext_authz,
    find_service,
    policy_prefix,
)
from translator.proxy import Proxy, ProxyType
from translator.services import ServiceDestination
from translator.world import World
from xds import protos

_RBAC = "envoy.filters.http.rbac"
_EXT_AUTHZ = "envoy.filters.http.ext_authz"
_ENVOY_ACTION = {Action.AUDIT: "LOG", Action.DENY: "DENY", Action.ALLOW: "ALLOW", Action.CUSTOM: "DENY"}
_DRY_RUN_PREFIX = {Action.DENY: "istio_dry_run_deny_", Action.ALLOW: "istio_dry_run_allow_"}

Policies = Mapping[str, Matcher]
"""Envoy's policies by their names."""


def custom_filters(world: World, proxy: Proxy) -> list[dict[str, Any]]:
    """Make the filters that ask external services: an RBAC that only notes what matched, and ext_authz.

    A service that is not known, and a second one for the same workload (Istio's default), deny what they
    would be asked about.
    """
    by_provider = _custom_policies(world, proxy)
    filters = []
    for provider, policies in sorted(by_provider.items()):
        rules = _rules(Action.CUSTOM, _all_named(world, policies))
        try:
            service = find_service(world.mesh.config, provider)
        except UnknownProviderError:
            service = None
        if service is None or len(by_provider) > 1:
            denied = {f"{name}-deny-due-to-bad-CUSTOM-action": of for name, of in rules["policies"].items()}
            filters.append(_filter(_RBAC, protos.RBAC(rules={**rules, "policies": denied})))
            continue
        noted = protos.RBAC(shadow_rules=rules, shadow_rules_stat_prefix=SHADOW_PREFIX)
        filters += [_filter(_RBAC, noted), _filter(_EXT_AUTHZ, ext_authz(provider, service))]
    return filters


def denial(names: Iterable[str]) -> dict[str, Any]:
    """Make the filter that denies everything; its policies have these names, for logs."""
    return _filter(_RBAC, protos.RBAC(rules=_rules(Action.DENY, {name: always() for name in names})))


def rbac_filters(world: World, proxy: Proxy) -> list[dict[str, Any]]:
    """Make the filters of AUDIT, DENY and ALLOW; in front, one that denies all where a policy is broken."""
    filters = []
    broken = _unreadable(world, proxy)
    if broken:
        filters.append(denial(f"ns[{key.namespace}]-policy[{key.name}]-invalid" for key in broken))
    selected = world.policies_for(proxy, world.authorization_policies)
    for action in (Action.AUDIT, Action.DENY, Action.ALLOW):
        enforced = [policy for policy in selected if policy.spec.action is action and not policy.dry_run]
        tried = [policy for policy in selected if policy.spec.action is action and policy.dry_run]
        if enforced or tried:
            rbac = protos.RBAC(
                rules=_rules(action, _all_named(world, enforced)) if enforced else None,
                shadow_rules=_rules(action, _all_named(world, tried)) if tried else None,
                shadow_rules_stat_prefix=_DRY_RUN_PREFIX[action] if tried else None,
            )
            filters.append(_filter(_RBAC, rbac))
    return filters


def services(world: World, proxy: Proxy) -> Iterator[ServiceDestination]:
    """Return the external authorization services that the filters of this proxy ask."""
    by_provider = _custom_policies(world, proxy)
    for provider in by_provider if len(by_provider) == 1 else ():
        try:
            yield destination(find_service(world.mesh.config, provider))
        except UnknownProviderError:
            continue


def objects(world: World, proxy: Proxy) -> Iterator[ObjectKey]:
    """Return the policies that went into the filters of this proxy."""
    yield from _unreadable(world, proxy)
    for policy in world.policies_for(proxy, world.authorization_policies):
        yield policy.key


def unresolved(world: World, policy: AuthorizationPolicy) -> list[Finding]:
    """Say which external service a policy names that is not there."""
    if policy.spec.provider is None:
        return []
    path = ("spec", "provider", "name")
    try:
        find_service(world.mesh.config, policy.spec.provider.name)
    except UnknownProviderError as error:
        return [Finding(path, f"{error}; requests that its rules match are denied")]
    return []


def rivals(world: World, policy: AuthorizationPolicy) -> list[ObjectKey]:
    """Return the policies that ask another external service for workloads of this one's."""
    if policy.spec.provider is None or policy.spec.targets:
        return []
    root, labels = world.mesh.config.root_namespace, policy.spec.labels
    return [
        other.key
        for namespace, policies in world.authorization_policies.items()
        if policy.namespace == root or namespace in {root, policy.namespace}
        for other in policies
        if other.spec.provider not in {None, policy.spec.provider} and not other.spec.targets
        if all(labels[name] == value for name, value in other.spec.labels.items() if name in labels)
    ]


def notes(world: World, policy: AuthorizationPolicy) -> list[Finding]:
    """Tell of what a valid policy does otherwise than one may think."""
    spec, found = policy.spec, []
    if spec.targets:
        found.append(Finding(("spec", "targetRefs"), "has effect on gateways of the Gateway API only"))
    gateways = [gateway.spec.selector for of in world.gateways.values() for gateway in of]
    if spec.labels and not any(spec.labels.items() & labels.items() or not labels for labels in gateways):
        text = "no Gateway selects such workloads; the policy has no effect on what sidecars send"
        found.append(Finding(("spec", "selector"), text))
    for i, rule in enumerate(spec.rules):
        for j, from_ in enumerate(rule.from_):
            for name, blocks in (
                ("ipBlocks", from_.source.ip_blocks),
                ("notIpBlocks", from_.source.not_ip_blocks),
            ):
                if blocks:
                    text = (
                        "compares the address of the TCP peer; behind a load balancer that is the balancer's:"
                        " there use remoteIpBlocks and numTrustedProxies"
                    )
                    found.append(Finding(("spec", "rules", i, "from", j, "source", name), text))
    return found


def _unreadable(world: World, proxy: Proxy) -> list[ObjectKey]:
    """Return the security policies for this proxy that are broken, and have no good version to go on with."""
    if proxy.type is not ProxyType.ROUTER:
        return []
    namespaces = {world.mesh.config.root_namespace, proxy.namespace}
    return [
        policy.key
        for policy in world.unreadable
        # A limit also denies on sidecars: translator.rate_limits.
        if policy.key.kind != "LLMTokenRateLimit"
        and policy.key.namespace in namespaces
        and proxy.has_labels(policy.labels or {})
    ]


def _custom_policies(world: World, proxy: Proxy) -> Mapping[str, list[AuthorizationPolicy]]:
    found: defaultdict[str, list[AuthorizationPolicy]] = defaultdict(list)
    for policy in world.policies_for(proxy, world.authorization_policies):
        if policy.spec.action is Action.CUSTOM and policy.spec.provider is not None:
            found[policy.spec.provider.name].append(policy)
    return found


def _all_named(world: World, policies: Iterable[AuthorizationPolicy]) -> Policies:
    return {name: of for policy in policies for name, of in _named(world, policy)}


def _named(world: World, policy: AuthorizationPolicy) -> Iterator[tuple[str, Matcher]]:
    """Return a policy for each rule; without rules, one that no request matches."""
    spec, config = policy.spec, world.mesh.config
    asks = f"{policy_prefix(spec.provider.name)}-" if spec.provider else ""
    name = f"{asks}ns[{policy.namespace}]-policy[{policy.name}]-rule"
    trust_domains = (config.trust_domain, *config.trust_domain_aliases)
    context = RuleContext(policy.namespace, spec.action is not Action.ALLOW, trust_domains)
    for index, rule in enumerate(spec.rules):
        yield f"{name}[{index}]", rbac_policy(rule, context)
    if not spec.rules:
        yield f"{name}[0]", never()


def _rules(action: Action, policies: Policies) -> dict[str, Any]:
    return {"action": _ENVOY_ACTION[action], "policies": policies}


def _filter(name: str, config: Message) -> dict[str, Any]:
    return {"name": name, "typed_config": protos.pack(config)}
