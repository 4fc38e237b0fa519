"""LLMTokenRateLimits as a Lua filter in front of the router, which counts tokens or has a service count them.

The script (`rate_limits.lua`) is one text; the policies come in filter state, as the text of a Lua table.
Where a rule has a regular expression, Envoy's RBAC filter looks at it, which has RE2 and only notes which
rule matches. The filters are not in the listener, but in resources of their own: translator.policies.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from google.protobuf.message import Message

from crds.llmtokenratelimit import (
    Attribute,
    LimitKey,
    LimitRule,
    LimitTarget,
    LLMTokenRateLimit,
)
from crds.meta import StringMatch
from crds.problems import Finding, ObjectKey
from crds.selection import GATEWAY_NAME_LABEL
from translator import global_rate_limits
from translator.clusters import HOST_METADATA
from translator.features import Feature
from translator.lua import literal
from translator.proxy import Proxy, ProxyType
from translator.rules import ROUTE_METADATA
from translator.services import ServiceDestination
from translator.world import World
from xds import protos

FILTER = "llm.rate_limits"
KIND = "LLMTokenRateLimit"

_SCRIPT = files("translator").joinpath("rate_limits.lua").read_text(encoding="utf-8")
_FREE = 2
"""Slots a key, so that a new key nearly always finds one of its own."""
_POLICIES_STATE = "llm.ratelimit.policies"
_ROUTE_STATE = "llm.ratelimit.route"
_PROVIDER_STATE = "llm.ratelimit.provider"
_RBAC = "envoy.filters.http.rbac"


def filters(world: World, proxy: Proxy) -> list[dict[str, Any]]:
    """Make the filters that tell which limits there are, or none."""
    limits, broken = policies(world, proxy), _unreadable(world, proxy)
    if not limits and not broken:
        return []
    data = [*map(_denial, broken), *(_policy(world, proxy, policy) for policy in limits)]
    made = [_facts(data, limits)]
    patterns = [
        _patterns(policy, index) for index, policy in enumerate(limits, len(broken) + 1) if _has_regex(policy)
    ]
    return [*made, _lua("keys"), *patterns] if patterns else made


def counting_filters(world: World, proxy: Proxy) -> list[dict[str, Any]]:
    """Make the filter that counts, or none. It is the same for all policies: a new one would count anew."""
    return [_lua("limits")] if policies(world, proxy) or _unreadable(world, proxy) else []


def service_filters(world: World, proxy: Proxy) -> list[dict[str, Any]]:
    """Make the filters that ask services to count."""
    return global_rate_limits.filters(world, proxy, policies(world, proxy))


def services(world: World, proxy: Proxy) -> Iterator[ServiceDestination]:
    """Return the services that count for all Envoys, and that this proxy asks."""
    yield from global_rate_limits.services(world, policies(world, proxy))


def objects(world: World, proxy: Proxy) -> Iterator[ObjectKey]:
    """Return the policies that went into the filters."""
    yield from _unreadable(world, proxy)
    for policy in policies(world, proxy):
        yield policy.key


def policies(world: World, proxy: Proxy) -> list[LLMTokenRateLimit]:
    """Return the policies of a proxy, the older first.

    Those with a selector are for the workloads of their namespace (root namespace: of all), those with
    targets for every proxy that serves one of them.
    """
    if not world.token_rate_limits or not proxy.supports(Feature.TOKEN_LIMITS):
        return []
    labels = dict(proxy.labels)
    near = {world.mesh.config.root_namespace, proxy.namespace}
    found = [
        policy
        for namespace, of in world.token_rate_limits.items()
        for policy in of
        if (
            _targets(world, proxy, policy)
            if policy.spec.target_refs
            else namespace in near
            and policy.spec.selects(labels, same_namespace=namespace == proxy.namespace)
        )
    ]
    return sorted(found, key=lambda policy: policy.age)


def unresolved(world: World, policy: LLMTokenRateLimit) -> list[Finding]:
    """Say which targets of a policy are not there."""
    found = []
    for index, target in enumerate(policy.spec.target_refs):
        path = ("spec", "targetRefs", index)
        of = _objects(world, target.kind).get(policy.namespace, ())
        match = next((item for item in of if item.name == target.name), None)
        if match is None:
            text = f"{target.kind} {policy.namespace}/{target.name} does not exist; nothing is limited by it"
            found.append(Finding((*path, "name"), text))
        elif target.section_name is not None and target.section_name not in _rule_names(match):
            text = (
                f"LLMRoute {policy.namespace}/{target.name} has no rule '{target.section_name}'; "
                "nothing is limited by it"
            )
            found.append(Finding((*path, "sectionName"), text))
    return found


def notes(world: World, policy: LLMTokenRateLimit) -> list[Finding]:
    """Tell of what a valid policy does otherwise than one may think."""
    found = []
    for index, key in enumerate(policy.spec.keys):
        path = ("spec", "keys", index)
        if key.header is not None:
            text = "the client chooses its value: who wants more than one share sends another one"
            found.append(Finding((*path, "header"), text))
        elif key.claim is not None and not world.request_authentications:
            found.append(Finding((*path, "claim"), _never_there("RequestAuthentication checks tokens")))
        elif key.attribute is Attribute.CLIENT and not world.api_key_authentications:
            found.append(Finding((*path, "attribute"), _never_there("APIKeyAuthentication names clients")))
    return found


def _never_there(what: str) -> str:
    return f"no {what}, so that all requests share one count of the last rule"


def _objects(world: World, kind: str) -> Mapping[str, Any]:
    return {"LLMRoute": world.routes, "LLMProvider": world.providers, "Gateway": world.gateways}[kind]


def _rule_names(route: Any) -> list[str]:
    return [rule.name or f"rule-{index}" for index, rule in enumerate(route.spec.rules)]


def _unreadable(world: World, proxy: Proxy) -> list[ObjectKey]:
    """Return the policies for this proxy that are broken, and have no good version to go on with."""
    if not proxy.supports(Feature.TOKEN_LIMITS):
        return []
    namespaces = {"", world.mesh.config.root_namespace, proxy.namespace}
    return [
        policy.key
        for policy in world.unreadable
        if policy.key.kind == KIND
        and policy.key.namespace in namespaces
        and proxy.has_labels(policy.labels or {})
    ]


def _targets(world: World, proxy: Proxy, policy: LLMTokenRateLimit) -> list[dict[str, str]] | None:
    """Return the targets of a policy that a proxy serves: an empty entry is all that it serves."""
    found: list[dict[str, str]] = []
    for target in policy.spec.target_refs:
        found += _target(world, proxy, policy.namespace, target)
    return found or None


def _target(world: World, proxy: Proxy, namespace: str, target: LimitTarget) -> Iterator[dict[str, str]]:
    full_name = f"{namespace}/{target.name}"
    match target.kind:
        case "LLMRoute":
            if any(route.key[1:] == (namespace, target.name) for route in _routes(world, proxy)):
                rule = {"rule": target.section_name} if target.section_name else {}
                yield {"route": full_name, **rule}
        case "LLMProvider":
            for provider in world.providers_for(proxy).values():
                if provider.key[1:] == (namespace, target.name):
                    yield {"provider": provider.spec.host}
        case "Gateway":
            if any(gateway.full_name == full_name for gateway in world.gateways_for(proxy)) or (
                proxy.type is ProxyType.ROUTER
                and proxy.namespace == namespace
                and proxy.has_labels({GATEWAY_NAME_LABEL: target.name})
            ):
                yield {}


def _routes(world: World, proxy: Proxy) -> Iterator[Any]:
    yield from world.routes_for(proxy)
    for gateway in world.gateways_for(proxy):
        yield from world.routes_by_gateway.get(gateway.full_name, ())


def _denial(key: ObjectKey) -> dict[str, Any]:
    return {"id": f"{key.namespace}/{key.name}", "denies": 1, "keys": [], "rules": []}


def _policy(world: World, proxy: Proxy, policy: LLMTokenRateLimit) -> dict[str, Any]:
    spec = policy.spec
    made: dict[str, Any] = {
        "id": f"{policy.namespace}/{policy.name}",
        "mode": str(spec.mode).lower(),
        "keys": [_key(proxy, key) for key in spec.keys],
        "rules": [_rule(spec.rule_name(index), rule) for index, rule in enumerate(spec.rules)],
        "bytes_per_token": spec.reservation.bytes_per_token,
        "completion_tokens": spec.reservation.completion_tokens,
        "slots": spec.local.max_keys * _FREE,
    }
    targets = _targets(world, proxy, policy)
    if targets and {} not in targets:
        made["targets"] = targets
    if spec.shadow:
        made["shadow"] = 1
    if spec.reservation.max_tokens:
        made["max_tokens"] = 1
    if _has_regex(policy):
        made["regex"] = f"{_prefix(policy)}shadow_effective_policy_id"
    return made


def _key(proxy: Proxy, key: LimitKey) -> dict[str, str]:
    if key.header is not None:
        return {"header": key.header}
    if key.claim is not None:
        return {"claim": key.claim}
    if key.attribute is Attribute.WORKLOAD and proxy.type is ProxyType.SIDECAR:
        return {"constant": f"{proxy.namespace}/{proxy.workload}"}
    return {"attribute": str(key.attribute)}


def _rule(name: str, rule: LimitRule) -> dict[str, Any]:
    return {
        "name": name,
        "match": [_match(match) for match in rule.match],
        "limits": [
            {
                "tokens": limit.tokens,
                "unit": str(limit.unit).lower(),
                "seconds": limit.unit.seconds,
                "type": str(limit.type).lower(),
            }
            for limit in rule.limits
        ],
    }


def _match(match: StringMatch) -> dict[str, str]:
    if match.exact is not None:
        return {"exact": match.exact}
    return {"prefix": match.prefix} if match.prefix is not None else {}


def _has_regex(policy: LLMTokenRateLimit) -> bool:
    return any(
        match.regex is not None and not match.is_present for rule in policy.spec.rules for match in rule.match
    )


def _prefix(policy: LLMTokenRateLimit) -> str:
    return f"limit_{hashlib.sha256(f'{policy.namespace}/{policy.name}'.encode()).hexdigest()[:12]}_"


def _patterns(policy: LLMTokenRateLimit, index: int) -> dict[str, Any]:
    """Make the filter that notes which rule matches; Envoy tries its policies in the order of their names."""
    rules = {
        f"{place:02}": {
            "permissions": [{"any": True}],
            "principals": [
                {"and_ids": {"ids": [_principal(index, *each) for each in enumerate(rule.match, 1)]}}
            ],
        }
        for place, rule in enumerate(policy.spec.rules, 1)
        if rule.match
    }
    rbac = protos.RBAC(
        shadow_rules={"action": "ALLOW", "policies": rules}, shadow_rules_stat_prefix=_prefix(policy)
    )
    return _filter(_RBAC, rbac)


def _principal(index: int, place: int, match: StringMatch) -> dict[str, Any]:
    if match.is_present:
        text: dict[str, Any] = {"safe_regex": {"regex": "(?s).*"}}
    elif match.exact is not None:
        text = {"exact": match.exact}
    elif match.prefix is not None:
        text = {"prefix": match.prefix}
    else:
        text = {"safe_regex": {"regex": match.regex}}
    return {"filter_state": {"key": f"llm.ratelimit.key.{index}.{place}", "string_match": text}}


@cache
def _state(key: str, text: str) -> dict[str, Any]:
    return {
        "object_key": key,
        "factory_key": "envoy.string",
        "skip_if_empty": True,
        "format_string": {"text_format_source": {"inline_string": text}},
    }


def _facts(data: list[dict[str, Any]], limits: list[LLMTokenRateLimit]) -> dict[str, Any]:
    """Make the filter that gives the script the policies, and what Lua cannot ask: LLMRoute and provider."""
    states = [_state(_POLICIES_STATE, literal(data).replace("%", "%%"))]
    kinds = {target.kind for policy in limits for target in policy.spec.target_refs}
    if "LLMRoute" in kinds:
        states.append(_state(_ROUTE_STATE, f"%METADATA(ROUTE:{':'.join(ROUTE_METADATA)})%"))
    if "LLMProvider" in kinds or any(
        key.attribute is Attribute.PROVIDER for policy in limits for key in policy.spec.keys
    ):
        states.append(_state(_PROVIDER_STATE, f"%METADATA(CLUSTER:{':'.join(HOST_METADATA)})%"))
    return _filter("envoy.filters.http.set_filter_state", protos.SetFilterState(on_request_headers=states))


def _lua(stage: str) -> dict[str, Any]:
    text = f"local STAGE = {literal(stage)}\n{_SCRIPT}"
    return _filter(FILTER, protos.Lua(default_source_code={"inline_string": text}))


def _filter(name: str, config: Message) -> dict[str, Any]:
    return {"name": name, "typed_config": protos.pack(config)}
