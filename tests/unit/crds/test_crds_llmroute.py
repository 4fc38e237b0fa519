"""LLMRoute: its defaults, its checks, shares and gateways."""

from collections.abc import Callable
from datetime import timedelta
from textwrap import dedent, indent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crds.llmroute import LLMRoute, LLMRule, Retries, resolve_gateway
from crds.loader import load

Problems = Callable[[str], list[str]]

HEAD = """\
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMRoute
metadata: {name: r, namespace: ns}
spec:
"""
SEED = """\
host: dashscope.aliyuncs.com
rules:
- name: vip-route
  matches:
  - headers:
      User-Type:
        exact: subscriber
  backendRefs:
  - providerHost: Dashscope.aliyuncs.com
- backendRefs:
  - providerHost: dashscope.aliyuncs.com
"""


def document(spec: str) -> str:
    return HEAD + indent(dedent(spec), "  ")


def rule(text: str) -> str:
    """Write a route with one rule."""
    return document(f"host: test.com\nrules:\n- {text}\n")


def refs(text: str) -> str:
    """Write a route with one rule with these destinations."""
    return rule(f"backendRefs: {text}")


def route(text: str) -> LLMRoute:
    (found,) = load(text, "f.yaml", {}).objects
    assert isinstance(found.object, LLMRoute)
    return found.object


def shares(*destinations: str) -> list[list[tuple[str | None, int]]]:
    (found,) = route(refs(f"[{', '.join(f'{{{one}}}' for one in destinations)}]")).spec.rules
    return [[(ref.provider_host, weight) for ref, weight in group] for group in found.priority_groups()]


def test_what_a_route_of_the_seeds_says() -> None:
    first, second = route(document(SEED)).spec.rules
    assert (first.name, first.is_default) == ("vip-route", False)
    assert first.matches[0].headers["user-type"].exact == "subscriber"
    assert first.backend_refs[0].provider_host == "dashscope.aliyuncs.com"
    assert (second.name, second.is_default, second.timeout, second.retries) == (None, True, None, None)


@pytest.mark.parametrize(
    ("match", "default"),
    [
        ("[]", True),
        ("[{}]", True),
        ("[{headers: {}}]", True),
        ("[{headers: {a: {exact: b}}}, {}]", True),
        ("[{headers: {a: {}}}]", False),
        ("[{sourceLabels: {app: sleep}}]", False),
        ("[{gateways: [mesh]}]", False),
    ],
)
def test_a_rule_takes_all_requests_without_conditions(match: str, default: bool) -> None:
    text = rule(f"{{matches: {match}, backendRefs: [{{providerHost: a.b}}]}}")
    assert route(text).spec.rules[0].is_default is default


@pytest.mark.parametrize(
    ("match", "present"),
    [("", True), ("{}", True), ("{regex: '*'}", True), ("{regex: .*}", False), ("{exact: ''}", False)],
)
def test_a_header_may_be_asked_for_whatever_its_value(match: str, present: bool) -> None:
    """`*` is no regular expression; Istio takes it for presence, and so an empty StringMatch."""
    text = rule(f"matches: [headers: {{x: {match}}}]\n  backendRefs: [providerHost: a.b]")
    assert route(text).spec.rules[0].matches[0].headers["x"].is_present is present


def test_shares() -> None:
    assert shares("providerHost: a.b, weight: 50", "providerHost: c.d, weight: 50") == [
        [("a.b", 50), ("c.d", 50)]
    ]
    # no weight at all: equal shares
    assert shares("providerHost: a.b", "providerHost: c.d") == [[("a.b", 1), ("c.d", 1)]]
    # some weights: who has none gets nothing, as in Istio
    assert shares("providerHost: a.b, weight: 1", "providerHost: c.d") == [[("a.b", 1)]]
    assert shares("providerHost: a.b, weight: 1", "providerHost: c.d, weight: 0") == [[("a.b", 1)]]
    # a single destination: its weight does not matter
    assert shares("providerHost: a.b, weight: 0") == [[("a.b", 1)]]


def test_priorities() -> None:
    assert shares(
        "providerHost: spare.b, priority: 7",
        "providerHost: a.b, weight: 3",
        "providerHost: b.b, weight: 1",
    ) == [[("a.b", 3), ("b.b", 1)], [("spare.b", 1)]]


@given(
    st.lists(
        st.tuples(st.none() | st.integers(0, 100), st.integers(0, 3)),
        min_size=1,
        max_size=6,
    )
)
def test_in_a_valid_rule_each_priority_has_a_destination(destinations: list[tuple[int | None, int]]) -> None:
    members = [{"providerHost": "a.b", "weight": weight, "priority": prio} for weight, prio in destinations]
    try:
        groups = LLMRule.model_validate({"backendRefs": members}).priority_groups()
    except ValueError:
        assert any(weight == 0 for weight, _ in destinations)
    else:
        assert len(groups) == len({prio for _, prio in destinations})
        assert all(group and all(weight > 0 for _, weight in group) for group in groups)


@pytest.mark.parametrize(
    ("written", "resolved"),
    [
        ("mesh", "mesh"),
        ("gw", "ns/gw"),
        ("./gw", "ns/gw"),
        ("istio-system/ingress-gw", "istio-system/ingress-gw"),
    ],
)
def test_gateways_are_named_as_in_a_virtual_service(written: str, resolved: str) -> None:
    assert resolve_gateway(written, "ns") == resolved
    assert route(document(f"{SEED}gateways: [{written}]")).gateways == {resolved}


def test_without_gateways_a_route_is_for_the_mesh() -> None:
    assert route(document(SEED)).gateways == {"mesh"}


def test_retries_have_the_words_of_envoy_and_status_codes() -> None:
    retries = Retries.model_validate(
        {"attempts": 2, "perTryTimeout": "20s", "retryOn": "connect-failure, 429,529 ,reset"}
    )
    assert retries.per_try_timeout == timedelta(seconds=20)
    assert retries.policies == ("connect-failure", "reset", "retriable-status-codes")
    assert retries.status_codes == (429, 529)


def test_retries_without_retry_on_leave_the_choice_to_us() -> None:
    retries = Retries.model_validate({"attempts": 0})
    assert (retries.policies, retries.status_codes) == ((), ())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("host: a.b", ["spec.rules: is missing"]),
        ("{host: a.b, rules: []}", ["spec.rules: is empty"]),
        ("{host: 'a.b:80', rules: []}", [
            "spec.host: must be a host name alone, without the port: 'a.b'",
            "spec.rules: is empty",
        ]),
        ("{rules: [{}]}", ["spec.host: is missing", "spec.rules[0].backendRefs: is missing"]),
        ("{host: a.b, rules: [{backendRefs: []}]}", ["spec.rules[0].backendRefs: is empty"]),
        ("{hosts: [a.b], rules: []}", [
            "spec.host: is missing",
            "spec.rules: is empty",
            "spec.hosts: unknown field, did you mean 'host'?",
        ]),
        ("{host: a.b, gateways: mesh, rules: []}", [
            "spec.gateways: must be a list, but is a string",
            "spec.rules: is empty",
        ]),
        ("{host: a.b, gateways: [a/b/c], rules: []}", [
            "spec.gateways[0]: must be 'mesh', 'name', 'namespace/name' or './name'",
            "spec.rules: is empty",
        ]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_spec(problems: Problems, spec: str, expected: list[str]) -> None:
    assert sorted(problems(document(spec))) == sorted(f"LLMRoute ns/r: {text}" for text in expected)


@pytest.mark.parametrize(
    ("rule_members", "expected"),
    [
        ("name: ''", [".name: is empty"]),
        ("name: a|b", [".name: must not hold '|'"]),
        ("Matches: []", [".Matches: unknown field, did you mean 'matches'?"]),
        ("match: []", [".match: unknown field, did you mean 'matches'?"]),
        ("matches: [{Headers: {}}]", [".matches[0].Headers: unknown field, did you mean 'headers'?"]),
        (
            "matches: [{SourceLabels: {}}]",
            [".matches[0].SourceLabels: unknown field, did you mean 'sourceLabels'?"],
        ),
        ("matches: [{Gateways: []}]", [".matches[0].Gateways: unknown field, did you mean 'gateways'?"]),
        ("matches: [{headers: {a b: {}}}]", ['.matches[0].headers["a b"]: is not the name of a header']),
        (
            "matches: [{headers: {x-a: {}, X-A: {}}}]",
            [".matches[0].headers.X-A: is the header 'x-a' again: names of headers have no case"],
        ),
        ("matches: [{headers: {a: b}}]", [".matches[0].headers.a: must be a mapping, but is a string"]),
        (
            "matches: [{headers: {a: {Exact: b}}}]",
            [".matches[0].headers.a.Exact: unknown field, did you mean 'exact'?"],
        ),
        (
            "matches: [{headers: {a: {exact: b, prefix: c}}}]",
            [".matches[0].headers.a: must have only one of exact, prefix and regex"],
        ),
        (
            "matches: [{headers: {a: {prefix: ''}}}]",
            [".matches[0].headers.a: has an empty prefix, which matches every value: write {} for that"],
        ),
        (
            "matches: [{headers: {a: {regex: 'a('}}}]",
            [".matches[0].headers.a.regex: is no regular expression of RE2: missing ): a("],
        ),
        (
            "matches: [{headers: {a: {exact: 1}}}]",
            [".matches[0].headers.a.exact: must be a string, but is a number: write it in quotes"],
        ),
        ("timeout: 10", [".timeout: must be a duration with its unit, such as 10s"]),
        ("timeout: 10d", [".timeout: must be a duration such as 10s, 1h30m or 250ms"]),
        ("timeout: 0.5ms", [".timeout: must be a whole number of milliseconds"]),
        ("retries: {perTryTimeout: 1s}", [".retries.attempts: is missing"]),
        (
            "retries: {attempts: 1, perTryTimeout: 1s}\n  firstTokenTimeout: 1s",
            [".firstTokenTimeout: sets the same limit as retries.perTryTimeout: set one of them"],
        ),
        ("firstTokenTimeout: 0s", [".firstTokenTimeout: must be at least 1ms"]),
        ("streamIdleTimeout: never", [".streamIdleTimeout: must be a duration such as 10s, 1h30m or 250ms"]),
        ("retries: {attempts: -1}", [".retries.attempts: must be at least 0"]),
        ("retries: {attempts: 1, perTryTimeout: 0s}", [".retries.perTryTimeout: must be at least 1ms"]),
        (
            "retries: {attempts: 0, retryOn: 5xx}",
            [".retries.attempts: 0 turns retries off, but other fields of them are set"],
        ),
        ("retries: {attempts: 1, retryOn: ', '}", [".retries.retryOn: is empty"]),
        (
            "retries: {attempts: 1, retryOn: '5xx,429,rate-limited'}",
            [
                (
                    ".retries.retryOn: 'rate-limited' is neither a status code nor one of Envoy's"
                    " retry policies (5xx, cancelled, connect-failure, deadline-exceeded, envoy-ratelimited,"
                    " gateway-error, http3-post-connect-failure, internal, refused-stream, reset,"
                    " reset-before-request, resource-exhausted, retriable-4xx, retriable-headers,"
                    " retriable-status-codes, unavailable)"
                )
            ],
        ),
    ],
)
def test_what_is_wrong_with_a_rule(problems: Problems, rule_members: str, expected: list[str]) -> None:
    found = problems(rule(f"backendRefs: [providerHost: a.b]\n  {rule_members}"))
    assert found == [f"LLMRoute ns/r: spec.rules[0]{text}" for text in expected]


@pytest.mark.parametrize(
    ("destinations", "expected"),
    [
        ("[{}]", ["[0]: must have providerHost or backendRef"]),
        (
            "[{providerHost: a.b, backendRef: {name: c}}]",
            ["[0]: must have only one of providerHost and backendRef"],
        ),
        ("[{ProviderHost: a.b}]", ["[0].ProviderHost: unknown field, did you mean 'providerHost'?"]),
        (
            "[{BackendRef: {name: a}}]",
            ["[0].BackendRef: unknown field, did you mean 'backendRef'?"],
        ),
        (
            "[{providerHost: a.b, Weight: 1}]",
            ["[0].Weight: unknown field, did you mean 'weight'?"],
        ),
        (
            "[{providerHost: a.b, wieght: 1}]",
            ["[0].wieght: unknown field, did you mean 'weight'?"],
        ),
        ("[{providerHost: 'http://a.b'}]", ["[0].providerHost: must be a host name alone: remove 'http://'"]),
        ("[{providerHost: '*.b'}]", ["[0].providerHost: must not hold a wildcard"]),
        ("[{providerHost: a.b, weight: -1}]", ["[0].weight: must be at least 0"]),
        ("[{providerHost: a.b, weight: 50.0}]", ["[0].weight: must be a whole number, but is a number"]),
        ("[{providerHost: a.b, weight: 50%}]", ["[0].weight: must be a whole number, but is a string"]),
        ("[{providerHost: a.b, priority: -1}]", ["[0].priority: must be at least 0"]),
        (
            "[{providerHost: a.b, hostRewrite: 'a.b:443'}]",
            ["[0].hostRewrite: must be a host name alone, without the port: 'a.b'"],
        ),
        ("[{backendRef: {kind: InferencePool}}]", ["[0].backendRef.name: is missing"]),
        (
            "[{providerHost: a.b, weight: 0}, {providerHost: c.d, weight: 0}]",
            [": the weights of backendRefs[0] and backendRefs[1] are all 0: nothing gets requests"],
        ),
        (
            "[{providerHost: a.b, weight: 0}, {providerHost: c.d}]",
            [": the weights of backendRefs[0] and backendRefs[1] are all 0: nothing gets requests"],
        ),
        (
            (
                "[{providerHost: a.b, weight: 2147483647}, {providerHost: c.d, weight: 2147483647},"
                " {providerHost: e.f, weight: 2}]"
            ),
            [": the weights add up to more than 4294967295"],
        ),
    ],
)
def test_what_is_wrong_with_destinations(problems: Problems, destinations: str, expected: list[str]) -> None:
    found = problems(refs(destinations))
    assert found == [f"LLMRoute ns/r: spec.rules[0].backendRefs{text}" for text in expected]


@pytest.mark.parametrize(
    ("destinations", "expected"),
    [
        ("[{providerHost: a.b}]", []),
        ("[{providerHost: a.b}, {providerHost: c.d, priority: 1}]", []),
        (
            "[{providerHost: a.b}, {providerHost: c.d}]",
            [": 2 destinations without weights share equally"],
        ),
        (
            "[{providerHost: a.b, weight: 1}, {providerHost: c.d}]",
            ["[1]: has no weight and gets no requests, since others have one"],
        ),
        (
            "[{providerHost: a.b, weight: 0}]",
            ["[0].weight: is the only destination, and gets all requests in spite of weight 0"],
        ),
    ],
)
def test_warnings_of_weights(problems: Problems, destinations: str, expected: list[str]) -> None:
    found = problems(refs(destinations))
    assert found == [f"warning: LLMRoute ns/r: spec.rules[0].backendRefs{text}" for text in expected]


def test_warning_of_rules_that_are_never_reached(problems: Problems) -> None:
    more = "- {name: late, backendRefs: [{providerHost: a.b}]}\n"
    assert problems(document(SEED + more)) == [
        "warning: LLMRoute ns/r: spec.rules[2]: is never reached: rules[1] takes all requests"
    ]


def test_warning_of_a_gateway_that_the_route_does_not_name(problems: Problems) -> None:
    text = rule("{matches: [{gateways: [./gw, ns/other]}], backendRefs: [{providerHost: a.b}]}")
    assert problems(text + "  gateways: [gw]\n") == [
        (
            "warning: LLMRoute ns/r: spec.rules[0].matches[0].gateways[1]:"
            " 'ns/other' is not among the gateways of the route"
        )
    ]


def test_warning_of_a_per_try_timeout_that_envoy_ignores(problems: Problems) -> None:
    text = rule(
        "{timeout: 1s, retries: {attempts: 1, perTryTimeout: 2s}, backendRefs: [{providerHost: a.b}]}"
    )
    assert problems(text) == [
        (
            "warning: LLMRoute ns/r: spec.rules[0].retries.perTryTimeout:"
            " is longer than the rule's timeout and has no effect"
        )
    ]
    assert problems(text.replace("timeout: 1s", "timeout: 0s")) == []


@pytest.mark.parametrize(
    ("limits", "place", "other"),
    [
        ("timeout: 1s, firstTokenTimeout: 2s", "firstTokenTimeout", "the rule's timeout"),
        ("timeout: 1s, streamIdleTimeout: 2s", "streamIdleTimeout", "the rule's timeout"),
        ("streamIdleTimeout: 1s, firstTokenTimeout: 2s", "firstTokenTimeout", "streamIdleTimeout"),
    ],
)
def test_warning_of_a_time_limit_that_another_one_comes_before(
    problems: Problems, limits: str, place: str, other: str
) -> None:
    assert problems(rule(f"{{{limits}, backendRefs: [{{providerHost: a.b}}]}}")) == [
        f"warning: LLMRoute ns/r: spec.rules[0].{place}: is longer than {other} and has no effect"
    ]
