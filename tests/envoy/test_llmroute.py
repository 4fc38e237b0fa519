"""LLMRoute on a real sidecar: which request goes to which provider, with which configuration.

What needs no Envoy (which of two objects wins, who sees what, weights) is in tests/unit/translator.
"""

from collections import Counter
from typing import Any

import pytest

from llmplane.fakellm import Host, fingerprint
from tests.envoy.conftest import DASHSCOPE, KEYLESS, KEYS, MOONSHOT, OPENAI, Lab
from tests.support.objects import backends, provider, route

CHAT = "chat.example.com"
PROVIDERS = (
    provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], model="qwen-turbo"),
    provider("moonshot", MOONSHOT, KEYS[MOONSHOT], model="moonshot-v1-8k"),
    provider("openai", OPENAI, KEYS[OPENAI], model="gpt-4o"),
)


def rule(host: str, *matches: dict[str, Any], name: str | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {"backendRefs": backends(host)}
    if matches:
        made["matches"] = list(matches)
    if name:
        made["name"] = name
    return made


def headers(**conditions: Any) -> dict[str, Any]:
    return {"headers": {name.replace("_", "-"): match for name, match in conditions.items()}}


def asked(lab: Lab, host: str = CHAT, **sent: str) -> str | int:
    """Send a request with these headers; return the provider that saw it, or the status if none did."""
    answer = lab.client.request(host, headers={name.replace("_", "-"): value for name, value in sent.items()})
    seen = lab.all_seen()
    if not seen:
        assert answer.error
        return answer.status
    assert answer.status == 200, answer.body
    (request,) = seen
    return request.provider


# Matches


@pytest.mark.parametrize(
    ("match", "value", "matches"),
    [
        ({"exact": "subscriber"}, "subscriber", True),
        ({"exact": "subscriber"}, "Subscriber", False),
        ({"exact": "subscriber"}, "subscriber2", False),
        ({"prefix": "sub"}, "subscriber", True),
        ({"prefix": "sub"}, "my-sub", False),
        ({"regex": "gold|silver[0-9]+"}, "silver12", True),
        ({"regex": "gold|silver[0-9]+"}, "xsilver12", False),
        ({"regex": "gold|silver[0-9]+"}, "golden", False),
        ({}, "anything", True),
    ],
)
def test_a_header(lab: Lab, match: dict[str, str], value: str, matches: bool) -> None:
    """Values have a case and are matched as a whole; names of headers have none."""
    lab.apply(*PROVIDERS, route("chat", CHAT, rule(MOONSHOT, headers(user_type=match)), rule(DASHSCOPE)))
    assert asked(lab, User_Type=value) == (MOONSHOT if matches else DASHSCOPE)
    assert asked(lab) == DASHSCOPE, "without the header"


def test_several_headers_are_anded_and_several_matches_ored(lab: Lab) -> None:
    both = headers(user_type={"exact": "vip"}, region={"prefix": "eu-"})
    other = headers(trial={"exact": "yes"})
    lab.apply(*PROVIDERS, route("chat", CHAT, rule(MOONSHOT, both, other), rule(DASHSCOPE)))
    assert asked(lab, user_type="vip", region="eu-west") == MOONSHOT
    assert asked(lab, trial="yes") == MOONSHOT
    assert asked(lab, user_type="vip") == DASHSCOPE
    assert asked(lab, user_type="vip", region="us-east") == DASHSCOPE


def test_the_first_rule_that_matches_counts(lab: Lab) -> None:
    lab.apply(
        *PROVIDERS,
        route(
            "chat",
            CHAT,
            rule(MOONSHOT, headers(user_type={"exact": "vip"})),
            rule(OPENAI, headers(user_type={"prefix": "v"})),
            rule(DASHSCOPE),
        ),
    )
    assert asked(lab, user_type="vip") == MOONSHOT
    assert asked(lab, user_type="visitor") == OPENAI
    assert asked(lab, user_type="other") == DASHSCOPE


def test_without_a_default_rule_other_requests_are_404(lab: Lab) -> None:
    lab.apply(*PROVIDERS, route("chat", CHAT, rule(MOONSHOT, headers(user_type={"exact": "vip"}))))
    assert asked(lab, user_type="vip") == MOONSHOT
    assert asked(lab) == 404


def test_a_header_that_does_not_leave_may_be_matched(lab: Lab) -> None:
    lab.apply(
        *PROVIDERS,
        route(
            "chat",
            CHAT,
            rule(MOONSHOT, headers(cookie={"regex": ".*tier=gold.*"})),
            rule(OPENAI, headers(authorization={"prefix": "Bearer internal-"})),
            rule(DASHSCOPE),
        ),
    )
    assert asked(lab, cookie="a=b; tier=gold") == MOONSHOT
    assert asked(lab, authorization="Bearer internal-1") == OPENAI


def test_labels_of_the_workload_and_gateways(lab: Lab) -> None:
    """The lab's sidecar carries app=sleep, and is no gateway."""
    lab.apply(
        *PROVIDERS,
        route(
            "chat",
            CHAT,
            rule(OPENAI, {"gateways": ["ingress"]}, {"sourceLabels": {"app": "other"}}),
            rule(MOONSHOT, {"sourceLabels": {"app": "sleep"}, **headers(user_type={"exact": "vip"})}),
            rule(DASHSCOPE, {"gateways": ["mesh"]}),
            rule(OPENAI),
            gateways=["mesh", "ingress"],
        ),
    )
    assert asked(lab, user_type="vip") == MOONSHOT
    assert asked(lab) == DASHSCOPE


# Shares


def counted(lab: Lab, requests: int) -> Counter[str | int]:
    return Counter(asked(lab) for _ in range(requests))


def test_shares_by_weight(lab: Lab) -> None:
    references = [
        {"providerHost": DASHSCOPE, "weight": 80},
        {"providerHost": MOONSHOT, "weight": 20},
        {"providerHost": OPENAI, "weight": 0},
    ]
    lab.apply(*PROVIDERS, route("chat", CHAT, {"backendRefs": references}))
    shares = counted(lab, 200)
    assert set(shares) == {DASHSCOPE, MOONSHOT}
    assert 10 <= shares[MOONSHOT] <= 75, "40 on average; less often wrong than once in 10^8 runs"


def test_without_weights_all_share_equally(lab: Lab) -> None:
    lab.apply(*PROVIDERS, route("chat", CHAT, {"backendRefs": backends(DASHSCOPE, MOONSHOT, OPENAI)}))
    shares = counted(lab, 150)
    assert all(20 <= shares[host] <= 85 for host in (DASHSCOPE, MOONSHOT, OPENAI)), shares


def test_each_request_of_a_split_gets_what_belongs_to_its_provider(lab: Lab) -> None:
    lab.apply(*PROVIDERS, route("chat", CHAT, {"backendRefs": backends(DASHSCOPE, MOONSHOT)}))
    for _ in range(20):
        assert lab.client.request(CHAT).status == 200
    models = {DASHSCOPE: "qwen-turbo", MOONSHOT: "moonshot-v1-8k"}
    for seen in lab.all_seen():
        host = seen.provider
        assert (seen.model, seen.sni, seen.key_fingerprint) == (models[host], host, fingerprint(KEYS[host]))


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ({"providerHost": "nowhere.example.com"}, "BackendNotFound"),
        ({"backendRef": {"name": "llm", "port": 80}}, "BackendNotFound"),
        (
            {"backendRef": {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "llm"}},
            "UnsupportedKind",
        ),
    ],
    ids=["unknown provider", "unknown Service", "InferencePool"],
)
def test_a_reference_that_leads_nowhere_costs_its_share_only(
    lab: Lab, reference: dict[str, Any], reason: str
) -> None:
    references = [{"providerHost": DASHSCOPE, "weight": 1}, {**reference, "weight": 1}]
    lab.apply(
        *PROVIDERS,
        route("chat", CHAT, {"backendRefs": references}),
        route("other", "other.example.com", rule(MOONSHOT)),
    )
    shares = counted(lab, 40)
    assert set(shares) == {DASHSCOPE, 503}
    assert asked(lab, "other.example.com") == MOONSHOT
    met, why, message = lab.condition("chat")
    assert (met, why) == (False, reason)
    assert "spec.rules[0].backendRefs[1]" in message


def test_what_a_client_is_told_of_a_missing_provider(lab: Lab) -> None:
    lab.apply(route("chat", CHAT, rule("nowhere.example.com")))
    answer = lab.client.request(CHAT)
    assert (answer.status, answer.error["code"]) == (503, "provider_not_found")


def test_the_provider_may_come_later(lab: Lab) -> None:
    lab.apply(route("chat", CHAT, rule(DASHSCOPE)))
    assert asked(lab) == 503
    lab.apply(*PROVIDERS, route("chat", CHAT, rule(DASHSCOPE)))
    assert asked(lab) == DASHSCOPE
    assert lab.condition("chat")[0] is True


# Configuration of a rule


def test_a_rule_of_a_name_has_its_own_model_and_key(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lab.fake.hosts, DASHSCOPE, Host((KEYS[DASHSCOPE], "sk-of-subscribers")))
    configs = {
        "defaultConfig": {"openAIConfig": {"model": "qwen-1.8b-chat", "apiKey": KEYS[DASHSCOPE]}},
        "routeSpecificConfigs": {
            "vip-route": {"openAIConfig": {"model": "qwen-turbo", "apiKey": "sk-of-subscribers"}},
            "model-only": {"openAIConfig": {"model": "qwen-max"}},
        },
    }
    lab.apply(
        provider("dashscope", DASHSCOPE, configs=configs),
        route(
            "chat",
            DASHSCOPE,
            rule(DASHSCOPE, headers(user_type={"exact": "subscriber"}), name="vip-route"),
            rule(DASHSCOPE, headers(user_type={"exact": "tester"}), name="model-only"),
            rule(DASHSCOPE, name="another-name"),
        ),
    )

    def model_and_key(**sent: str) -> tuple[str | None, str | None]:
        assert (
            lab.client.request(DASHSCOPE, headers={k.replace("_", "-"): v for k, v in sent.items()}).status
            == 200
        )
        seen = lab.seen()
        return seen.model, seen.key_fingerprint

    default_key = fingerprint(KEYS[DASHSCOPE])
    assert model_and_key(user_type="subscriber") == ("qwen-turbo", fingerprint("sk-of-subscribers"))
    assert model_and_key(user_type="tester") == ("qwen-max", default_key), "the rest is defaultConfig's"
    assert model_and_key() == ("qwen-1.8b-chat", default_key)


def test_host_rewrite(lab: Lab) -> None:
    """The Host that the provider sees; TLS still is for the provider's own name."""
    rewritten = {"backendRefs": [{"providerHost": KEYLESS, "hostRewrite": OPENAI}]}
    lab.apply(
        provider("keyless", KEYLESS),
        route("chat", CHAT, {**rewritten, "matches": [headers(rewrite={"exact": "yes"})]}, rule(KEYLESS)),
    )
    lab.client.request(CHAT, headers={"rewrite": "yes"})
    seen = lab.seen()
    assert (seen.host, seen.sni) == (OPENAI, KEYLESS)
    lab.client.request(CHAT)
    seen = lab.seen()
    assert (seen.host, seen.sni) == (KEYLESS, KEYLESS)


# Hosts


@pytest.mark.parametrize(
    "host",
    [
        "demo-llm-server",
        "demo-llm-server.default",
        "demo-llm-server.default.svc",
        "demo-llm-server.default.svc.cluster.local",
    ],
)
def test_all_names_of_a_service(lab: Lab, host: str) -> None:
    lab.apply(*PROVIDERS, route("chat", "demo-llm-server", rule(DASHSCOPE)))
    for written in (host, f"{host}:80", f"{host}:8080", host.upper(), f"{host}."):
        assert asked(lab, written) == DASHSCOPE
    assert asked(lab, f"{host}.example.com") == 404


def test_a_service_of_another_namespace(lab: Lab) -> None:
    lab.apply(*PROVIDERS, route("chat", "demo.other.svc.cluster.local", rule(DASHSCOPE)))
    assert asked(lab, "demo.other") == DASHSCOPE
    assert asked(lab, "demo") == 404


def test_wildcard_hosts(lab: Lab) -> None:
    lab.apply(
        *PROVIDERS,
        route("one", "one.example.com", rule(DASHSCOPE)),
        route("below", "*.example.com", rule(MOONSHOT)),
        route("all", "*", rule(OPENAI)),
    )
    assert asked(lab, "one.example.com") == DASHSCOPE, "the most specific one counts"
    assert asked(lab, "two.example.com:80") == MOONSHOT
    assert asked(lab, "a.two.EXAMPLE.com") == MOONSHOT
    assert asked(lab, "example.com") == OPENAI
    assert asked(lab, MOONSHOT) == OPENAI, "a provider's own host too: as in Istio, a route comes first"


def test_a_route_with_the_host_of_a_provider(lab: Lab) -> None:
    lab.apply(
        *PROVIDERS,
        route("chat", DASHSCOPE, rule(MOONSHOT, headers(to={"exact": "moonshot"})), rule(DASHSCOPE)),
    )
    assert asked(lab, DASHSCOPE) == DASHSCOPE
    assert asked(lab, DASHSCOPE, to="moonshot") == MOONSHOT


# Which objects count for this sidecar (namespace default, app=sleep)


def test_the_own_namespace_is_before_the_root_namespace(lab: Lab) -> None:
    lab.apply(
        provider("istio-system/llm", DASHSCOPE, KEYS[DASHSCOPE], model="of-the-root"),
        provider("llm", DASHSCOPE, KEYS[DASHSCOPE], model="of-the-namespace"),
        provider("istio-system/moonshot", MOONSHOT, KEYS[MOONSHOT], model="of-the-root"),
        provider("other/openai", OPENAI, KEYS[OPENAI]),
        route("istio-system/chat", CHAT, rule(MOONSHOT)),
        route("chat", CHAT, rule(DASHSCOPE)),
    )
    assert lab.client.request(CHAT).status == 200
    assert lab.seen().model == "of-the-namespace"
    assert asked(lab, MOONSHOT) == MOONSHOT, "the root namespace's own reaches all"
    assert asked(lab, OPENAI) == 404, "another namespace's is not there"
    assert KEYS[OPENAI] not in lab.envoy_admin("/config_dump")
    assert OPENAI not in lab.envoy_admin("/config_dump"), "nor does anything tell of it"


def test_workload_selector(lab: Lab) -> None:
    lab.apply(
        provider(
            "a", DASHSCOPE, KEYS[DASHSCOPE], model="for-others", workloadSelector={"labels": {"app": "other"}}
        ),
        provider("b", DASHSCOPE, KEYS[DASHSCOPE], model="for-all"),
        provider(
            "c", DASHSCOPE, KEYS[DASHSCOPE], model="for-sleep", workloadSelector={"labels": {"app": "sleep"}}
        ),
    )
    assert lab.client.request(DASHSCOPE).status == 200
    assert lab.seen().model == "for-sleep"


def test_export_to(lab: Lab) -> None:
    lab.apply(
        provider("istio-system/a", DASHSCOPE, KEYS[DASHSCOPE], exportTo=["."]),
        provider("istio-system/b", MOONSHOT, KEYS[MOONSHOT], exportTo=["default"]),
        route("chat", CHAT, rule(DASHSCOPE)),
    )
    assert asked(lab, DASHSCOPE) == 404
    assert asked(lab, MOONSHOT) == MOONSHOT
    assert asked(lab) == 503


def test_of_two_providers_with_one_host_the_loser_is_told(lab: Lab) -> None:
    lab.apply(
        provider("second", DASHSCOPE, KEYS[DASHSCOPE], model="of-the-second"),
        provider("first", DASHSCOPE, KEYS[DASHSCOPE], model="of-the-first"),
    )
    assert lab.client.request(DASHSCOPE).status == 200
    assert lab.seen().model == "of-the-first"
    assert lab.condition("first", "Accepted")[0] is True
    met, _, message = lab.condition("second", "Accepted")
    assert met is False
    assert "default/first" in message
