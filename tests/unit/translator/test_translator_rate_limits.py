"""LLMTokenRateLimits in Envoy's configuration: whose requests they count, and what changes with them."""

from typing import Any

import pytest

from crds.problems import ObjectKey
from crds.unreadable import UnreadablePolicy
from tests.support.objects import backends, gateway, provider, rate_limit, route, server, world
from tests.support.policies import api_key_authentication, request_authentication
from translator import policies, rate_limits
from translator.conditions import conditions
from translator.features import Feature
from translator.proxy import Proxy, ProxyType
from translator.translate import Translator
from translator.world import World
from xds import protos
from xds.resources import ECDS, LDS, Resource

SIDECAR = Proxy(ProxyType.SIDECAR, "default", "sleep", frozenset({("app", "sleep")}))
GATEWAY = Proxy(ProxyType.ROUTER, "istio-system", "gateway", frozenset({("istio", "ingressgateway")}))
OBJECTS = (
    provider("dashscope", "dashscope.aliyuncs.com"),
    provider("istio-system/dashscope", "dashscope.aliyuncs.com"),
    gateway("istio-system/ingress", server()),
    route("chat", "chat.example.com", {"name": "vip", "backendRefs": backends("dashscope.aliyuncs.com")}),
    route(
        "shop/shop",
        "shop.example.com",
        {"backendRefs": backends("dashscope.aliyuncs.com")},
        gateways=["istio-system/ingress"],
    ),
)


def limit(name: str, tokens: int = 1000, **spec: Any) -> str:
    return rate_limit(name, rules=[{"limits": [{"tokens": tokens, "unit": "Minute"}]}], **spec)


def names(of: World, proxy: Proxy) -> list[str]:
    return [f"{policy.namespace}/{policy.name}" for policy in rate_limits.policies(of, proxy)]


def ecds(of: World, proxy: Proxy) -> dict[str, Resource]:
    found = Translator().translate(of, proxy).resources
    return {resource.name: resource for resource in found if resource.type_url == ECDS}


@pytest.mark.parametrize(
    ("namespace", "spec", "expected"),
    [
        ("default", {}, [SIDECAR]),
        ("default", {"selector": {"matchLabels": {"app": "sleep"}}}, [SIDECAR]),
        ("default", {"selector": {"matchLabels": {"app": "other"}}}, []),
        ("istio-system", {}, [SIDECAR, GATEWAY]),
        ("istio-system", {"selector": {"matchLabels": {"istio": "ingressgateway"}}}, [GATEWAY]),
        ("shop", {}, []),
        ("default", {"targetRefs": [{"kind": "LLMRoute", "name": "chat"}]}, [SIDECAR]),
        ("default", {"targetRefs": [{"kind": "LLMRoute", "name": "shop"}]}, []),
        ("shop", {"targetRefs": [{"kind": "LLMRoute", "name": "shop"}]}, [GATEWAY]),
        ("default", {"targetRefs": [{"kind": "LLMProvider", "name": "dashscope"}]}, [SIDECAR]),
        ("istio-system", {"targetRefs": [{"kind": "LLMProvider", "name": "dashscope"}]}, [GATEWAY]),
        (
            "istio-system",
            {"targetRefs": [{"group": "networking.istio.io", "kind": "Gateway", "name": "ingress"}]},
            [GATEWAY],
        ),
    ],
    ids=str,
)
def test_which_proxies_count(namespace: str, spec: dict[str, Any], expected: list[Proxy]) -> None:
    found = world(*OBJECTS, limit(f"{namespace}/a", **spec))
    assert [proxy for proxy in (SIDECAR, GATEWAY) if names(found, proxy)] == expected


@pytest.mark.parametrize("proxy", [SIDECAR, GATEWAY], ids=lambda proxy: str(proxy.type))
def test_a_changed_policy_changes_neither_the_listener_nor_what_counts(proxy: Proxy) -> None:
    """Envoy forgets the counts of a changed script."""
    before, after = (world(*OBJECTS, limit("istio-system/a", tokens)) for tokens in (1, 2))
    changed = Translator().translate(after, proxy).changed(Translator().translate(before, proxy))
    old = {(of.type_url, of.name): of for of in Translator().translate(before, proxy).resources}
    assert [name for name, of in changed.items() if of != old.get(name)] == [(ECDS, policies.RATE_LIMITS)]


def test_the_listener_is_the_same_with_and_without_policies() -> None:
    def listeners(*documents: str) -> list[Resource]:
        found = Translator().translate(world(*OBJECTS, *documents), SIDECAR).resources
        return [resource for resource in found if resource.type_url == LDS]

    assert listeners() == listeners(limit("a")) != []


def test_a_policy_is_the_origin_of_its_resources() -> None:
    found = Translator().translate(world(*OBJECTS, limit("a")), SIDECAR)
    assert found.origins[ObjectKey("LLMTokenRateLimit", "default", "a")] == {
        (ECDS, name) for name in (policies.RATE_LIMITS, policies.COUNTS, policies.SERVICES)
    }


def test_a_percent_sign_is_no_format() -> None:
    rules = [
        {"match": [{"exact": '%REQ(x)% "\\\n'}], "limits": [{"tokens": 1, "unit": "Hour"}]},
        {"limits": [{"tokens": 2, "unit": "Hour"}]},
    ]
    found = world(rate_limit("a", keys=[{"header": "x-user"}], rules=rules))
    made = protos.SetFilterState.FromString(rate_limits.filters(found, SIDECAR)[0]["typed_config"].value)
    text = made.on_request_headers[0].format_string.text_format_source.inline_string
    assert '"%%REQ(x)%% \\034\\092\\010"' in text


def test_an_invalid_policy_denies_those_it_was_for() -> None:
    key = ObjectKey("LLMTokenRateLimit", "default", "a")
    found = World.of((), unreadable=[UnreadablePolicy(key, {"app": "sleep"})])
    assert list(rate_limits.objects(found, SIDECAR)) == [key]
    assert rate_limits.filters(found, GATEWAY) == []
    assert ecds(found, SIDECAR)[policies.COUNTS] != ecds(World(), SIDECAR)[policies.COUNTS]


def test_an_envoy_that_cannot_count_is_told_of() -> None:
    old = Proxy(ProxyType.SIDECAR, "default", "sleep", SIDECAR.labels, version=(1, 38))
    found = Translator().translate(world(*OBJECTS, limit("a")), old)
    assert found.missing[ObjectKey("LLMTokenRateLimit", "default", "a")] == [Feature.TOKEN_LIMITS]
    assert ecds(world(*OBJECTS, limit("a")), old) == {}


def test_targets_that_do_not_exist_are_told_of() -> None:
    refs = [
        {"kind": "LLMRoute", "name": "chat", "sectionName": "vip"},
        {"kind": "LLMRoute", "name": "chat", "sectionName": "other"},
        {"kind": "LLMProvider", "name": "nobody"},
    ]
    found = conditions(world(*OBJECTS, limit("a", targetRefs=refs)))
    _, resolved = found[ObjectKey("LLMTokenRateLimit", "default", "a")]
    assert (resolved.status, resolved.reason) == (False, "TargetNotFound")
    assert resolved.message == (
        "spec.targetRefs[1].sectionName: LLMRoute default/chat has no rule 'other'; nothing is limited by "
        "it; spec.targetRefs[2].name: LLMProvider default/nobody does not exist; nothing is limited by it"
    )


@pytest.mark.parametrize(
    ("key", "policy"),
    [
        (
            {"claim": "sub"},
            request_authentication({"issuer": "https://issuer.example.com"}),
        ),
        ({"attribute": "Client"}, api_key_authentication("keys")),
    ],
)
def test_a_key_that_no_request_can_have_is_told_of(key: dict[str, str], policy: str) -> None:
    def findings(*more: str) -> list[str]:
        found = conditions(world(*OBJECTS, limit("a", keys=[key]), *more))
        accepted, _ = found[ObjectKey("LLMTokenRateLimit", "default", "a")]
        return [finding.message for finding in accepted.findings]

    (text,) = findings()
    assert text.endswith("so that all requests share one count of the last rule")
    assert findings(policy) == []
