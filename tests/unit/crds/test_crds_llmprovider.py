"""LLMProvider: its defaults, its checks, and the merge of its configurations."""

from collections.abc import Callable
from datetime import timedelta
from textwrap import dedent, indent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from crds.llmprovider import LLMProvider, OpenAIConfig, check_api_key
from crds.loader import load

Problems = Callable[[str], list[str]]

HEAD = """\
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata: {name: p}
spec:
"""
SEED = """\
host: dashscope.aliyuncs.com
path: /compatible-mode/v1/chat/completions
configs:
  defaultConfig:
    openAIConfig: {model: qwen-1.8b-chat, stream: false, apiKey: sk-default}
  routeSpecificConfigs:
    vip-route:
      openAIConfig: {model: qwen-turbo}
"""
POOL = "spec.trafficPolicy.connectionPool"
BRIEF = "host: a.example.com\npath: /v1/chat/completions\n"


def document(spec: str) -> str:
    return HEAD + indent(dedent(spec), "  ")


def provider(spec: str) -> LLMProvider:
    loaded = load(document(spec), "f.yaml", {})
    (found,) = loaded.objects
    assert isinstance(found.object, LLMProvider)
    return found.object


def test_what_a_provider_of_the_seeds_says() -> None:
    spec = provider(SEED).spec
    assert (spec.host, spec.path) == ("dashscope.aliyuncs.com", "/compatible-mode/v1/chat/completions")
    config = spec.config_for(None)
    assert (config.model, config.stream, config.has_key) == ("qwen-1.8b-chat", False, True)
    assert config.api_key
    assert config.api_key.get_secret_value() == "sk-default"
    assert spec.route_names == ("vip-route",)


def test_what_it_does_not_say_has_defaults() -> None:
    spec = provider(BRIEF).spec
    assert (spec.port, spec.tls.mode, spec.addresses) == (443, "SIMPLE", (("a.example.com", 443),))
    assert spec.workload_selector is None
    assert (spec.traffic_policy.outlier_detection, spec.max_request_bytes) == (None, 32 * 1024 * 1024)
    pool = spec.traffic_policy.connection_pool
    assert (pool.tcp.max_connections, pool.tcp.connect_timeout, pool.http.max_retries) == (None, None, None)
    assert (pool.http.http1_max_pending_requests, pool.http.http2_max_requests) == (None, None)
    assert pool.http.idle_timeout == timedelta(seconds=50)
    assert not spec.config_for("any").has_key


def test_without_tls_the_port_is_80_unless_it_is_set() -> None:
    assert provider(BRIEF + "tls: {mode: DISABLE}").spec.port == 80
    assert provider(BRIEF + "tls: {mode: DISABLE}\nport: 8000").spec.port == 8000


def test_endpoints_say_where_to_connect() -> None:
    spec = provider(
        BRIEF + "port: 8443\nendpoints: [{address: 192.0.2.1}, {address: B.example.com, port: 1}]"
    ).spec
    assert spec.addresses == (("192.0.2.1", 8443), ("b.example.com", 1))


def test_outlier_detection_has_the_defaults_of_a_destination_rule_but_leaves_out_the_only_address() -> None:
    policy = provider(BRIEF + "trafficPolicy: {outlierDetection: {}}").spec.traffic_policy
    outliers = policy.outlier_detection
    assert outliers
    assert outliers.count_429
    assert (outliers.consecutive_5xx_errors, outliers.consecutive_gateway_errors) == (5, 0)
    assert (outliers.interval, outliers.base_ejection_time) == (timedelta(seconds=10), timedelta(seconds=30))
    assert outliers.max_ejection_percent == 100


def test_a_selector_takes_workloads_that_have_all_its_labels() -> None:
    selector = provider(BRIEF + "workloadSelector: {labels: {app: sleep, v: '1'}}").spec.workload_selector
    assert selector
    assert selector.selects({"app": "sleep", "v": "1", "more": ""})
    assert not selector.selects({"app": "sleep"})


@pytest.mark.parametrize(
    ("export_to", "own", "other"),
    [
        ("[]", True, True),
        ("['*']", True, True),
        ("['.']", True, False),
        ("[b]", False, True),
        ("[., b]", True, True),
    ],
)
def test_export_to(export_to: str, own: bool, other: bool) -> None:
    found = provider(BRIEF + f"exportTo: {export_to}")
    assert (found.exported_to("default"), found.exported_to("b")) == (own, other)


def test_members_that_are_null_count_as_absent() -> None:
    assert provider(BRIEF + "tls:\nport:\nconfigs:\n").spec == provider(BRIEF).spec


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("host: a.example.com", ["spec.path: is missing"]),
        ("path: /", ["spec.host: is missing"]),
        (BRIEF + "Host: a", ["spec.Host: unknown field, did you mean 'host'?"]),
        (BRIEF + "hosts: a", ["spec.hosts: unknown field, did you mean 'host'?"]),
        (BRIEF + "colour: a", ["spec.colour: unknown field"]),
        (BRIEF + "port: 0", ["spec.port: must be at least 1"]),
        (BRIEF + "port: 65536", ["spec.port: must be at most 65535"]),
        (BRIEF + "port: '443'", ["spec.port: must be a whole number, but is a string"]),
        (BRIEF + "port: true", ["spec.port: must be a whole number, but is true or false"]),
        (BRIEF + "tls: true", ["spec.tls: must be a mapping, but is true or false"]),
        (BRIEF + "tls: {mode: simple}", ["spec.tls.mode: must be 'SIMPLE', 'MUTUAL' or 'DISABLE'"]),
        (BRIEF + "tls: {mode: MUTUAL}", ["spec.tls.credentialName: is missing: mode MUTUAL needs it"]),
        (BRIEF + "tls: {credentialName: a}", ["spec.tls.credentialName: has no effect without mode MUTUAL"]),
        (
            BRIEF + "tls: {insecureSkipVerify: true, caCertificates: /ca.pem}",
            ["spec.tls.caCertificates: has no effect with insecureSkipVerify"],
        ),
        (
            BRIEF + "tls: {mode: DISABLE, sni: a.b, caCertificates: /ca.pem}",
            [
                "spec.tls.caCertificates: has no effect with mode DISABLE",
                "spec.tls.sni: has no effect with mode DISABLE",
            ],
        ),
        (
            BRIEF + "tls: {caCertificates: ca.pem}",
            ["spec.tls.caCertificates: must be the absolute path of a file on the proxy's machine"],
        ),
        (BRIEF + "tls: {sni: 192.0.2.1}", ["spec.tls.sni: looks like an IP address, but is none"]),
        (BRIEF + "endpoints: 192.0.2.1", ["spec.endpoints: must be a list, but is a string"]),
        (BRIEF + "endpoints: [192.0.2.1]", ["spec.endpoints[0]: must be a mapping, but is a string"]),
        (BRIEF + "endpoints: [{port: 1}]", ["spec.endpoints[0].address: is missing"]),
        (BRIEF + "exportTo: [All]", ["spec.exportTo[0]: must be '.', '*' or a namespace's name"]),
        (BRIEF + "exportTo: ['*', a]", ["spec.exportTo: has no effect on other namespaces beside '*'"]),
        (
            BRIEF + "operations: [{path: images, method: get}]",
            [
                "spec.operations[0].path: must start with '/'",
                "spec.operations[0].method: must be 'GET', 'POST', 'PUT', 'PATCH' or 'DELETE'",
            ],
        ),
        (
            BRIEF + "operations: [{path: /a, method: GET, model: m}]",
            ["spec.operations[0].model: has no effect with method GET"],
        ),
        (BRIEF + "operations: [{path: '/a?b'}]", ["spec.operations[0].path: must not hold a query"]),
        (
            BRIEF + "operations: [{path: /a}, {path: /b}, {path: /a}]",
            ["spec.operations[2]: POST /a is listed twice"],
        ),
        (
            BRIEF + "trafficPolicy:\n"
            "  outlierDetection: {consecutiveErrors: 1, maxEjectionPercent: 101, interval: 0s}",
            [
                "spec.trafficPolicy.outlierDetection.interval: must be at least 1ms",
                "spec.trafficPolicy.outlierDetection.maxEjectionPercent: must be at most 100",
                (
                    "spec.trafficPolicy.outlierDetection.consecutiveErrors: unknown field,"
                    " did you mean 'consecutive5xxErrors'?"
                ),
            ],
        ),
        (
            BRIEF + "trafficPolicy: {connectionPool: {http: {http2MaxRequests: 0, idleTimeout: 0s}}}",
            [
                f"{POOL}.http.http2MaxRequests: must be at least 1",
                f"{POOL}.http.idleTimeout: must be at least 1ms",
            ],
        ),
        (
            BRIEF + "trafficPolicy: {connectionPool: {tcp: {maxConnections: many, connectTimeout: 5}}}",
            [
                f"{POOL}.tcp.maxConnections: must be a whole number, but is a string",
                f"{POOL}.tcp.connectTimeout: must be a duration with its unit, such as 10s",
            ],
        ),
        (
            BRIEF + "maxRequestBytes: 4294967296",
            ["spec.maxRequestBytes: must be at most 4294967295"],
        ),
        (
            BRIEF + "workloadSelector: {matchLabels: {app: 1}}",
            ["spec.workloadSelector.matchLabels: unknown field, did you mean 'labels'?"],
        ),
        (
            BRIEF + "workloadSelector: {labels: {app: 1, on: true}}",
            [
                "spec.workloadSelector.labels: has a member whose name is true or false: write it in quotes",
                "spec.workloadSelector.labels.app: must be a string, but is a number: write it in quotes",
            ],
        ),
        (
            BRIEF + "workloadSelector: {labels: {app: 1}}",
            ["spec.workloadSelector.labels.app: must be a string, but is a number: write it in quotes"],
        ),
        (
            BRIEF + "configs: {routeSpecificConfigs: {'a|b': {}, '': {}}}",
            [
                "spec.configs.routeSpecificConfigs[\"a|b\"]: must not hold '|'",
                'spec.configs.routeSpecificConfigs[""]: is empty',
            ],
        ),
        (
            BRIEF + "configs: {routeSpecificConfigs: {vip-route: {model: m}}}",
            ["spec.configs.routeSpecificConfigs.vip-route.model: unknown field"],
        ),
        (
            BRIEF + "configs: {defaultConfig: {openAiConfig: {}}}",
            ["spec.configs.defaultConfig.openAiConfig: unknown field, did you mean 'openAIConfig'?"],
        ),
    ],
)
def test_what_is_wrong_with_a_spec(problems: Problems, spec: str, expected: list[str]) -> None:
    found = problems(document(spec))
    assert sorted(found) == sorted(f"LLMProvider default/p: {text}" for text in expected)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("{apikey: sk-1}", [".apikey: unknown field, did you mean 'apiKey'?"]),
        ("{apiKey: ''}", [".apiKey: is empty"]),
        ("{apiKey: '  '}", [".apiKey: is empty"]),
        ("{apiKey: 'sk 1'}", [".apiKey: must be visible ASCII characters, without spaces inside"]),
        (r'{apiKey: "sk\r\nx: y"}', [".apiKey: must be visible ASCII characters, without spaces inside"]),
        ("{apiKey: sk-ä}", [".apiKey: must be visible ASCII characters, without spaces inside"]),
        ("{apiKey: 12345}", [".apiKey: must be a string, but is a number"]),
        ("{apiKey: [sk]}", [".apiKey: must be a string, but is a list"]),
        ("{apiKey: sk, apiKeySecretRef: {name: a, key: b}}", [
            ": must have only one of apiKey and apiKeySecretRef",
        ]),
        ("{apiKeySecretRef: {name: A, key: ''}}", [
            ".apiKeySecretRef.name: must be a Kubernetes name (lower-case letters, digits, '-' and '.')",
            ".apiKeySecretRef.key: is empty",
        ]),
        ("{stream: 'false'}", [".stream: must be true or false, but is a string"]),
        ("{stream: 0}", [".stream: must be true or false, but is a number"]),
        ("{model: ''}", [".model: is empty"]),
        ("{model: 4}", [".model: must be a string, but is a number: write it in quotes"]),
        ("{model: 2024-10-21}", [".model: must be a string, but is a date: write it in quotes"]),
        (r'{model: "a\nb"}', [".model: must not hold control characters"]),
        ("{defaults: {a: 1}, overrides: {a: 1}}", [
            ".overrides.a: 'a' is in defaults too: set it in one of them",
        ]),
        (
            "{model: m, stream: true, defaults: {stream: true}, overrides: {model: m}}",
            [
                ".defaults.stream: 'stream' is a field of openAIConfig too: set it in one place",
                ".overrides.model: 'model' is a field of openAIConfig too: set it in one place",
            ],
        ),
        ("{defaults: [1]}", [".defaults: must be a mapping, but is a list"]),
        ("{defaults: {a: .nan}}", [".defaults.a: is not a number that JSON can write"]),
        ("{defaults: {a: {b: [1, -.inf]}}}", [".defaults.a.b[1]: is not a number that JSON can write"]),
        (
            "{overrides: {a: 2024-10-21}}",
            [".overrides.a: is a date, which JSON does not have: write it in quotes"],
        ),
        (
            "{overrides: {a: {1: b}}}",
            [".overrides.a: has a member whose name is a number: write it in quotes"],
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_config(problems: Problems, config: str, expected: list[str]) -> None:
    found = problems(document(BRIEF + f"configs: {{defaultConfig: {{openAIConfig: {config}}}}}"))
    place = "LLMProvider default/p: spec.configs.defaultConfig.openAIConfig"
    assert sorted(found) == sorted(f"{place}{text}" for text in expected)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            "tls: {mode: DISABLE}",
            ["spec.tls.mode: with mode DISABLE the key is sent in clear text"],
        ),
        (
            "tls: {insecureSkipVerify: true}",
            ["spec.tls.insecureSkipVerify: the key is sent to whoever answers for the host"],
        ),
        ("port: 80", []),
    ],
)
def test_warnings_of_a_key_that_others_can_read(problems: Problems, spec: str, expected: list[str]) -> None:
    assert problems(document(SEED + spec)) == [f"warning: LLMProvider default/p: {text}" for text in expected]
    assert problems(document(BRIEF + spec)) == []  # no key


def test_warning_of_outlier_detection_that_counts_nothing(problems: Problems) -> None:
    spec = BRIEF + "trafficPolicy: {outlierDetection: {consecutive5xxErrors: 0}}"
    assert problems(document(spec)) == [
        (
            "warning: LLMProvider default/p: spec.trafficPolicy.outlierDetection:"
            " has no effect: consecutive5xxErrors and consecutiveGatewayErrors are 0"
        )
    ]


def test_warning_of_a_placeholder_in_another_field(problems: Problems) -> None:
    assert problems(document(BRIEF + "configs: {defaultConfig: {openAIConfig: {model: '${MODEL}'}}}")) == [
        (
            "warning: LLMProvider default/p: spec.configs.defaultConfig.openAIConfig.model:"
            " is sent as it stands: only apiKey may hold a placeholder"
        )
    ]


def config(**members: Any) -> OpenAIConfig:
    return OpenAIConfig.model_validate(members)


def test_a_key_loses_the_white_space_around_it() -> None:
    assert check_api_key(" sk-1\n") == "sk-1"
    with pytest.raises(ValueError, match=r"^must be visible ASCII characters, without spaces inside$"):
        check_api_key("sk-1\nsk-2")


def test_a_placeholder_left_in_a_key_is_told() -> None:
    assert config(apiKey="${ API_KEY of dashscope}").placeholder == "${ API_KEY of dashscope}"
    assert config(apiKey="sk-1").placeholder is None
    assert config().placeholder is None


def test_a_key_shows_in_no_repr_and_no_error() -> None:
    key = "sk-0123456789"
    assert key not in repr(provider(SEED.replace("sk-default", key)))
    with pytest.raises(ValidationError) as refused:
        config(
            apiKey=f"{key}\n{key}", apiKeySecretRef=key, defaults={"model": key, "a": float("nan")}, model=key
        )
    assert key not in str(refused.value)
    with pytest.raises(ValidationError) as refused:
        config(apiKey={"value": key})
    assert key not in str(refused.value)


def test_a_route_specific_config_is_merged_over_the_default() -> None:
    spec = provider(SEED).spec
    merged = spec.config_for("vip-route")
    assert (merged.model, merged.stream) == ("qwen-turbo", False)
    assert merged.api_key == spec.config_for(None).api_key


def test_the_two_ways_to_give_a_key_are_one_field() -> None:
    merged = config(apiKeySecretRef={"name": "a", "key": "b"}).merged_over(config(apiKey="sk-1"))
    assert merged.api_key is None
    assert merged.api_key_secret_ref


def test_the_route_says_last_in_which_place_a_member_is() -> None:
    base = config(model="m", defaults={"a": 1, "b": 1}, overrides={"c": 1})
    merged = config(defaults={"c": 2, "model": "n"}, overrides={"a": 2}).merged_over(base)
    assert merged.model is None
    assert merged.defaults == {"b": 1, "c": 2, "model": "n"}
    assert merged.overrides == {"a": 2}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def configs(draw: st.DrawFn) -> OpenAIConfig:
    """Make a config that says something of some members, each in one place."""
    members: dict[str, Any] = {"defaults": {}, "overrides": {}}
    for name in draw(st.sets(st.sampled_from(["model", "stream", "a", "b", "c"]))):
        places = ["defaults", "overrides", *(["field"] if name in {"model", "stream"} else [])]
        place = draw(st.sampled_from(places))
        if place == "field":
            members[name] = True if name == "stream" else "m"
        else:
            members[place][name] = draw(json_values)
    members |= draw(st.sampled_from([{}, {"apiKey": "sk-1"}, {"apiKeySecretRef": {"name": "a", "key": "b"}}]))
    return OpenAIConfig.model_validate(members)


def said(of: OpenAIConfig) -> dict[str, tuple[str, Any]]:
    """Return what a config says of each member, and in which place."""
    fields = {"model": of.model, "stream": of.stream}
    return (
        {name: ("field", value) for name, value in fields.items() if value is not None}
        | {name: ("defaults", value) for name, value in of.defaults.items()}
        | {name: ("overrides", value) for name, value in of.overrides.items()}
    )


@given(configs(), configs())
def test_a_merged_config_says_what_the_route_says_and_else_what_the_default_says(
    route: OpenAIConfig, default: OpenAIConfig
) -> None:
    merged = route.merged_over(default)
    assert said(merged) == said(default) | said(route)
    assert merged.has_key == (route.has_key or default.has_key)


@given(configs(), configs())
def test_a_merged_config_is_valid_itself(route: OpenAIConfig, default: OpenAIConfig) -> None:
    merged = route.merged_over(default)
    written = merged.model_dump(by_alias=True, exclude_none=True)
    assert OpenAIConfig.model_validate(written) == merged


@given(configs())
def test_merging_with_nothing_changes_nothing(some: OpenAIConfig) -> None:
    assert some.merged_over(config()) == some == config().merged_over(some)
