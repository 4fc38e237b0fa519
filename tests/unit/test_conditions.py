"""What is said of objects that are valid, whatever proxies there are (those: test_translator_visibility)."""

import pytest

from crds.problems import ObjectKey
from tests.support.objects import backends, provider, route, secret, world
from translator.conditions import Condition, conditions
from translator.world import World

HOST = "llm.example.com"
REF = {"name": "keys", "key": "llm"}


def condition(objects: World, name: str, kind: str) -> Condition:
    (found,) = (
        each
        for key, of in conditions(objects).items()
        for each in of
        if f"{key.namespace}/{key.name}" == name and each.type == kind
    )
    return found


def config(**fields: object) -> dict[str, object]:
    return {"openAIConfig": fields}


def test_an_object_without_a_flaw_has_both_conditions_met() -> None:
    found = conditions(
        world(provider("a", HOST), route("r", "r.example.com", {"backendRefs": backends(HOST)}))
    )
    expected = (Condition("Accepted", True, "Accepted"), Condition("ResolvedRefs", True, "ResolvedRefs"))
    assert found == {
        ObjectKey("LLMProvider", "default", "a"): expected,
        ObjectKey("LLMRoute", "default", "r"): expected,
    }
    assert expected[0].message == ""


# Who has a host


def selecting(name: str, **labels: str) -> str:
    return provider(name, HOST, workloadSelector={"labels": labels})


def test_a_provider_that_no_workload_gets_is_not_accepted() -> None:
    found = condition(
        world(provider("a", HOST), provider("b", HOST), provider("c", HOST)), "default/c", "Accepted"
    )
    assert (found.status, found.reason) == (False, "Conflicted")
    assert found.message == (
        f"spec.host: {HOST} is already taken by LLMProvider default/a, which is older or first by name"
    )


@pytest.mark.parametrize("host", ["llm", "llm.default", "llm.default.svc", "llm.default.svc.cluster.local"])
def test_the_names_of_a_service_are_one_host(host: str) -> None:
    objects = world(provider("a", "llm.default.svc"), provider("b", host))
    found = condition(objects, "default/b", "Accepted")
    assert (found.status, found.reason) == (False, "Conflicted")
    assert found.message.startswith(f"spec.host: {host} is already taken by LLMProvider default/a,")


@pytest.mark.parametrize("named", ["llm", "llm.default", "llm.default.svc.cluster.local"])
def test_a_route_finds_a_provider_by_any_name_of_its_service(named: str) -> None:
    rule = {"backendRefs": backends(named)}
    objects = world(provider("a", "llm.default.svc"), route("chat", "chat.example.com", rule))
    assert condition(objects, "default/chat", "ResolvedRefs").status
    elsewhere = world(provider("istio-system/a", "llm.ai"), route("chat", "chat.example.com", rule))
    assert not condition(elsewhere, "default/chat", "ResolvedRefs").status


def test_a_selector_that_is_within_anothers_is_a_conflict() -> None:
    objects = world(selecting("a", app="chat"), selecting("b", app="chat", version="v2"))
    assert condition(objects, "default/b", "Accepted").reason == "Conflicted"
    assert condition(objects, "default/a", "Accepted").reason == "Accepted"


def test_selectors_that_may_meet_are_accepted_with_a_word_of_who_wins() -> None:
    objects = world(selecting("a", app="chat"), selecting("b", version="v2"))
    found = condition(objects, "default/b", "Accepted")
    assert (found.status, found.reason) == (True, "Overlaps")
    assert found.message == (
        "spec.workloadSelector: a workload that both select gets LLMProvider default/a, "
        "which is older or first by name"
    )


@pytest.mark.parametrize(
    "others",
    [
        [selecting("a", app="chat"), selecting("b", app="sleep")],
        [provider("a", HOST), selecting("b", app="chat")],
        [selecting("a", app="chat"), provider("b", HOST)],
        [provider("a", HOST), provider("team-a/b", HOST)],
        [provider("a", HOST), provider("istio-system/b", HOST)],
        [provider("a", HOST), provider("b", "other.example.com")],
    ],
    ids=["apart", "selector second", "selector first", "other namespace", "root namespace", "other host"],
)
def test_what_is_meant_to_be_instead_of_another_is_no_conflict(others: list[str]) -> None:
    assert {of[0].reason for of in conditions(world(*others)).values()} == {"Accepted"}


def test_a_route_of_gateways_alone_takes_no_host_of_the_mesh() -> None:
    rule = {"backendRefs": backends(HOST)}
    objects = world(
        provider("p", HOST),
        route("a", "chat", rule, gateways=["ingress"]),
        route("b", "chat", rule),
        route("c", "chat", rule),
    )
    assert condition(objects, "default/b", "Accepted").status
    found = condition(objects, "default/c", "Accepted")
    assert (
        found.message
        == "spec.host: chat is already taken by LLMRoute default/b, which is older or first by name"
    )


# Keys and certificates


def with_key_of_a_secret(name: str = "llm", **more: object) -> str:
    return provider(name, HOST, configs={"defaultConfig": config(model="m", apiKeySecretRef=REF), **more})


@pytest.mark.parametrize(
    ("secrets", "expected"),
    [
        ([], "Secret default/keys does not exist"),
        ([secret("keys", {"other": "sk-1"})], "Secret default/keys has no key 'llm'"),
        ([secret("other/keys", {"llm": "sk-1"})], "Secret default/keys does not exist"),
        ([secret("keys", {"llm": " "})], "apiKeySecretRef: key 'llm' of Secret default/keys "),
    ],
)
def test_a_key_that_is_not_there_is_told(secrets: list[str], expected: str) -> None:
    found = condition(world(with_key_of_a_secret(), *secrets), "default/llm", "ResolvedRefs")
    assert (found.status, found.reason) == (False, "SecretNotFound")
    assert found.message.startswith(f"spec.configs.defaultConfig.openAIConfig: {expected}")
    assert found.message.endswith("; requests are answered 401")


def test_a_key_that_is_there_is_never_told() -> None:
    objects = world(with_key_of_a_secret(), secret("keys", {"llm": "sk-1"}))
    assert condition(objects, "default/llm", "ResolvedRefs") == Condition(
        "ResolvedRefs", True, "ResolvedRefs"
    )


def test_a_key_that_rules_share_with_the_default_is_told_once() -> None:
    objects = world(with_key_of_a_secret(routeSpecificConfigs={"vip": config(model="better")}))
    found = condition(objects, "default/llm", "ResolvedRefs")
    assert [".".join(map(str, finding.path)) for finding in found.findings] == [
        "spec.configs.defaultConfig.openAIConfig"
    ]


def test_a_key_of_a_rules_own_is_told_with_its_place() -> None:
    configs = {
        "defaultConfig": config(model="m", apiKey="sk-1"),
        "routeSpecificConfigs": {"vip": config(apiKeySecretRef=REF)},
    }
    found = condition(world(provider("llm", HOST, configs=configs)), "default/llm", "ResolvedRefs")
    assert found.message.startswith(
        "spec.configs.routeSpecificConfigs.vip.openAIConfig: Secret default/keys does not"
    )


def test_a_client_certificate_that_is_not_there_is_told() -> None:
    objects = world(provider("llm", HOST, tls={"mode": "MUTUAL", "credentialName": "client"}))
    found = condition(objects, "default/llm", "ResolvedRefs")
    assert found.message == "spec.tls.credentialName: Secret default/client does not exist"


def test_a_key_that_is_not_known_since_a_restart_is_told() -> None:
    valid = world(provider("llm", HOST, "sk-1"))
    held = World.of(valid.providers["default"], held=[ObjectKey("LLMProvider", "default", "llm")])
    found = condition(held, "default/llm", "ResolvedRefs")
    assert found.message == (
        "spec.configs.defaultConfig.openAIConfig: the key is not known since the restart: "
        "proxies that have it keep it, new ones answer 401"
    )


# Backends


def backend_message(objects: World, name: str) -> str:
    found = condition(objects, name, "ResolvedRefs")
    assert not found.status
    return found.message.removeprefix("spec.rules[0].backendRefs[0].")


def test_a_provider_of_another_namespace_is_not_there() -> None:
    objects = world(provider("team-b/p", HOST), route("team-a/r", "chat", {"backendRefs": backends(HOST)}))
    assert backend_message(objects, "team-a/r") == (
        f"providerHost: no LLMProvider with host {HOST} in namespace team-a or istio-system "
        "(its share is answered 503)"
    )


def test_a_provider_that_is_not_exported_is_named() -> None:
    objects = world(
        provider("istio-system/p", HOST, exportTo=["team-b"]),
        route("team-a/r", "chat", {"backendRefs": backends(HOST)}),
    )
    assert backend_message(objects, "team-a/r").endswith(", LLMProvider istio-system/p is not exported to it")


def test_a_misspelt_host_is_told_with_the_nearest_one() -> None:
    objects = world(provider("p", HOST), route("r", "chat", {"backendRefs": backends("llm.exmaple.com")}))
    assert backend_message(objects, "default/r").endswith(f", did you mean '{HOST}'?")


def test_what_may_have_been_meant_is_told_of_some_hosts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes some milliseconds: thousands of routes would hold up whatever changes."""
    asked: list[str] = []
    monkeypatch.setattr("translator.conditions._nearest", lambda host, _: asked.append(host) or "")
    routes = [route(f"r-{n}", f"h-{n}", {"backendRefs": backends(f"llm-{n}.exmaple.com")}) for n in range(50)]
    conditions(world(provider("p", HOST), *routes))
    assert len(asked) == 20


def test_a_route_of_the_root_namespace_finds_the_providers_of_all() -> None:
    rules = {"backendRefs": backends(HOST)}
    objects = world(provider("team-a/p", HOST), route("istio-system/r", "chat", rules))
    assert condition(objects, "istio-system/r", "ResolvedRefs").status
    objects = world(route("istio-system/r", "chat", rules))
    assert backend_message(objects, "istio-system/r").startswith(
        f"providerHost: no LLMProvider with host {HOST} in any namespace"
    )


def test_a_backend_of_another_kind_is_told() -> None:
    pool = {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "vllm"}
    objects = world(route("r", "chat", {"backendRefs": [{"backendRef": pool}]}))
    found = condition(objects, "default/r", "ResolvedRefs")
    assert found.reason == "UnsupportedKind"
    assert found.message == (
        "spec.rules[0].backendRefs[0].backendRef: InferencePool vllm is not supported; "
        "its share is answered 503"
    )
