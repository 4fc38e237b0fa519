"""An Envoy that lacks a feature gets what is equivalent, or the objects concerned say so."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from crds.problems import ObjectKey
from tests.support.objects import backends, provider, route, secret, world
from tests.support.policies import ROOT, api_key_authentication, authorization_policy, gateway
from translator import lua
from translator.features import NEWEST, Feature, Version, read_version
from translator.proxy import Proxy, ProxyType
from translator.translate import Translation, Translator
from xds import protos
from xds.resources import CDS, ECDS, RDS, SDS

A, B, C = "a.example.com", "b.example.com", "c.example.com"
PROVIDERS = [
    provider("a", A, key="sk-some-key-of-a", model='model "a"'),
    provider("b", B),
    provider("c", C),
]
CHAT = ObjectKey("LLMRoute", "default", "chat")
SCRIPT = (lua.SCRIPT_SHA256, "/run/llmplane/llm_provider.lua")


def translated(version: Version | None, *objects: str, has_script: bool = True) -> Translation:
    scripts = frozenset({SCRIPT} if has_script else {})
    proxy = Proxy(ProxyType.SIDECAR, "default", "sleep", scripts=scripts, version=version)
    return Translator().translate(world(*PROVIDERS, *objects), proxy)


def resource(translation: Translation, type_url: str, name: str) -> Any:
    """Return a resource as a dictionary, with proto field names."""
    (found,) = (r for r in translation.resources if (r.type_url, r.name) == (type_url, name))
    return protos.to_dict(protos.Any.FromString(found.body))


def upstream_filters(translation: Translation, host: str) -> dict[str, Any]:
    cluster = resource(translation, CDS, f"outbound|443||{host}")
    (options,) = cluster["typed_extension_protocol_options"].values()
    return {each["name"]: each["typed_config"] for each in options["http_filters"]}


def action(translation: Translation, host: str) -> Mapping[str, Any]:
    """Return the action of the one route of a virtual host."""
    (found,) = (h for h in resource(translation, RDS, "http_proxy")["virtual_hosts"] if h["name"] == host)
    (only,) = found["routes"]
    return dict(only["route"])


# Versions


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("1.36.4", (1, 36)),
        ("1.39.3", (1, 39)),
        ("1.37.0-dev", (1, 37)),
        ("1.40.0", None),
        ("1.41.2", None),
        ("2.0.0", None),
        ("", None),
        ("newest", None),
    ],
)
def test_only_versions_that_lack_something_count(text: str, version: Version | None) -> None:
    assert read_version(text) == version


def test_patch_versions_share_a_snapshot() -> None:
    def proxy(version: str) -> Proxy:
        return Proxy.from_node("sidecar~127.0.0.1~sleep.default~x", {"NAMESPACE": "default"}, version)

    assert proxy("1.38.1") == proxy("1.38.3") != proxy("1.39.3")
    assert proxy("1.40.0") == proxy("1.41.0") == proxy("")


@pytest.mark.parametrize("feature", Feature)
def test_each_feature_is_there_from_its_version_on(feature: Feature) -> None:
    def has(version: Version | None) -> bool:
        return Proxy(ProxyType.SIDECAR, "default", "", version=version).supports(feature)

    assert has(None)
    assert has(feature.since)
    assert not has((feature.since[0], feature.since[1] - 1))
    assert feature.since <= NEWEST


# The data of a provider


def test_the_newest_envoy_gets_the_data_beside_the_script() -> None:
    config = upstream_filters(translated(None), A)["llm.provider"]
    assert config["filter_context"]["host"] == A
    assert config["default_source_code"] == {"filename": SCRIPT[1]}


@pytest.mark.parametrize("version", [(1, 36), (1, 39)])
def test_an_older_one_gets_them_in_the_text_of_the_filter(version: Version) -> None:
    config = upstream_filters(translated(version), A)["llm.provider"]
    assert set(config) == {"@type", "default_source_code"}
    text = config["default_source_code"]["inline_string"]
    assert text.startswith(f'dofile("{SCRIPT[1]}")\n')
    assert f'["host"]="{A}"' in text
    assert r"\031\034model \092\034a\092\034\034\031" in text, "quotes and backslashes are escaped"
    assert len(text) < 4000, "the script itself stays in its file"


def test_an_older_one_without_the_file_gets_the_script_too() -> None:
    filters = upstream_filters(translated((1, 39), has_script=False), A)
    assert lua.SCRIPT in filters["llm.provider"]["default_source_code"]["inline_string"]


@pytest.mark.parametrize(("version", "state"), [((1, 38), '"llm.state"'), ((1, 39), "nil")])
def test_before_1_39_metadata_stand_in_for_filter_state(version: Version, state: str) -> None:
    config = upstream_filters(translated(version), A)["llm.provider"]
    (line,) = (
        line
        for line in config["default_source_code"]["inline_string"].splitlines()
        if line.startswith("local CONTEXT, FILTER_STATE = ")
    )
    assert line.endswith(f", {state}")


# The key


@pytest.mark.parametrize(
    ("version", "prefix", "secret"),
    [((1, 36), None, "Bearer sk-some-key-of-a"), ((1, 37), "Bearer ", "sk-some-key-of-a")],
)
def test_before_1_37_the_secret_is_the_whole_header(
    version: Version, prefix: str | None, secret: str
) -> None:
    made = translated(version)
    injected = upstream_filters(made, A)["llm.key"]["credential"]["typed_config"]
    assert injected.get("header_value_prefix") == prefix
    held = resource(made, SDS, "api-key/default/a")["generic_secret"]["secret"]
    assert held == {"inline_string": secret}


def test_a_missing_key_stays_an_empty_secret() -> None:
    """Envoy then answers 401; a prefix alone would be sent."""
    config = {"defaultConfig": {"openAIConfig": {"apiKeySecretRef": {"name": "nowhere", "key": "key"}}}}
    made = translated((1, 36), provider("d", "d.example.com", configs=config))
    assert resource(made, SDS, "api-key/default/d")["generic_secret"]["secret"] == {"inline_string": ""}


# Fallback


def ordered(*groups: list[dict[str, Any]]) -> str:
    """Return a route whose groups have the priorities 0, 1, ..."""
    refs = [{**ref, "priority": priority} for priority, group in enumerate(groups) for ref in group]
    return route("chat", "chat.example.com", {"backendRefs": refs})


def weights(chosen: Mapping[str, Any]) -> dict[str, int]:
    """Return the weights of a split by host."""
    return {
        each["name"].rpartition("|")[2]: each["weight"] for each in chosen["weighted_clusters"]["clusters"]
    }


def test_1_40_has_priority_groups() -> None:
    made = translated(None, ordered(backends(A), backends(B)))
    assert "inline_cluster_specifier_plugin" in action(made, "chat.example.com")
    assert made.missing == {}


def test_1_39_gets_weights_that_make_an_order() -> None:
    made = translated((1, 39), ordered(backends(A), backends(B), backends(C)))
    chosen = action(made, "chat.example.com")
    of = weights(chosen)
    assert of[A] > 40_000 * of[B] > 40_000 * 40_000 * of[C] > 0
    assert sum(of.values()) <= 2**32 - 1
    retry = chosen["retry_policy"]
    assert (retry["num_retries"], retry["refresh_cluster_on_retry"]) == (2, True)
    assert "retriable-status-codes" in retry["retry_on"]
    assert made.missing == {}


def test_1_39_keeps_the_weights_of_a_group_and_tries_all_of_it() -> None:
    first = [{"providerHost": A, "weight": 3}, {"providerHost": B, "weight": 1}]
    chosen = action(translated((1, 39), ordered(first, backends(C))), "chat.example.com")
    of = weights(chosen)
    assert of[A] == 3 * of[B] > 1_000_000 * of[C]
    assert chosen["retry_policy"]["num_retries"] == 2


def test_the_largest_weights_fit() -> None:
    first = [{"providerHost": A, "weight": 2**31 - 1}, {"providerHost": B, "weight": 1}]
    of = weights(action(translated((1, 39), ordered(first, backends(C))), "chat.example.com"))
    assert of[A] > 500 * of[B] > 500 * of[C] > 0
    assert sum(of.values()) <= 2**32 - 1


def test_before_1_39_only_the_first_priority_is_used_and_the_route_says_so() -> None:
    made = translated((1, 38), ordered(backends(A), backends(B)))
    chosen = action(made, "chat.example.com")
    assert chosen["cluster"] == f"outbound|443||{A}"
    assert "retriable-status-codes" not in chosen["retry_policy"]["retry_on"], (
        "it would be asked, and paid, twice"
    )
    assert made.missing[CHAT] == [Feature.FALLBACK]


def test_before_1_39_a_split_stays_a_split_and_the_route_says_what_is_missing() -> None:
    made = translated((1, 38), route("chat", "chat.example.com", {"backendRefs": backends(A, B)}))
    chosen = action(made, "chat.example.com")
    assert weights(chosen) == {A: 1, B: 1}
    assert "refresh_cluster_on_retry" not in chosen["retry_policy"]
    assert made.missing[CHAT] == [Feature.FALLBACK]


def test_a_route_with_one_provider_lacks_nothing() -> None:
    made = translated((1, 36), route("chat", "chat.example.com", {"backendRefs": backends(A)}))
    assert CHAT not in made.missing


@pytest.mark.parametrize(("version", "missing"), [((1, 38), {None: [Feature.METRICS]}), ((1, 39), {})])
def test_before_1_39_requests_are_not_counted_and_the_proxy_says_so(
    version: Version, missing: Mapping[None, Sequence[Feature]]
) -> None:
    assert translated(version).missing == missing


# Policies of a gateway


CLIENTS = secret("clients", {"alice": "some-key-of-alice"})


def at_a_gateway(version: Version | None, *objects: str) -> Translation:
    labels = frozenset({("istio", "ingressgateway")})
    proxy = Proxy(ProxyType.ROUTER, ROOT, "gateway", labels, version=version)
    return Translator().translate(world(gateway(), *objects), proxy)


@pytest.mark.parametrize(("version", "missing"), [((1, 38), [Feature.FILTER_CHAIN]), ((1, 39), None)])
def test_before_1_39_a_policy_says_that_open_connections_keep_the_one_of_before(
    version: Version, missing: Sequence[Feature] | None
) -> None:
    found = at_a_gateway(version, CLIENTS, api_key_authentication("clients"), authorization_policy()).missing
    for kind, name in (("APIKeyAuthentication", "clients"), ("AuthorizationPolicy", "rules")):
        assert found.get(ObjectKey(kind, ROOT, name)) == missing
    assert at_a_gateway(version).missing.keys() <= {None}, "without policies nothing is late"


@pytest.mark.parametrize(("version", "clears"), [((1, 37), False), ((1, 38), True)])
def test_before_1_38_a_script_has_routes_look_at_the_client(version: Version, clears: bool) -> None:
    """An Envoy skips a field that it does not know: all clients would get what no client's name is for."""
    made = at_a_gateway(version, CLIENTS, api_key_authentication("clients"))
    filters = {r.name: resource(made, ECDS, r.name) for r in made.resources if r.name.startswith("api_keys/")}
    configs = {name: found["typed_config"] for name, found in filters.items()}
    names = ["api_keys/0/api_key_auth", "api_keys/1/set_filter_state"]
    assert list(configs) == (names if clears else [*names, "api_keys/2/lua"])
    assert ("clear_route_cache" in configs[names[1]]) == clears
    scripts = [config["default_source_code"]["inline_string"] for config in list(configs.values())[2:]]
    assert all("handle:clearRouteCache()" in script for script in scripts)


# Many hosts


@pytest.mark.parametrize(("version", "is_scoped"), [((1, 39), False), (None, True)])
def test_before_1_40_many_hosts_are_one_route_configuration(version: Version | None, is_scoped: bool) -> None:
    hosts = [
        route(f"r{number}", f"r{number}.example.com", {"backendRefs": backends(A)}) for number in range(1200)
    ]
    made = translated(version, *hosts)
    names = {resource.name for resource in made.resources if resource.type_url == RDS}
    assert ("http_proxy" in names, len(names) > 1) == (not is_scoped, is_scoped)


def test_proxies_of_different_versions_do_not_get_what_was_made_for_each_other() -> None:
    """A translator remembers what it made of unchanged objects."""
    objects = world(*PROVIDERS, ordered(backends(A), backends(B)))
    versions = [None, (1, 39), (1, 38), (1, 37), (1, 36)]
    proxies = [Proxy(ProxyType.SIDECAR, "default", "sleep", version=version) for version in versions]
    translator = Translator()
    for proxy in [*proxies, *reversed(proxies)]:
        assert set(translator.translate(objects, proxy).resources) == set(
            Translator().translate(objects, proxy).resources
        )
