"""LLMRoute -> Envoy routes: rules, matches, shares, retries (design decisions 12 and 13)."""

from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from tests.support.objects import backends, provider, route, world
from translator.hosts import domains
from translator.proxy import Proxy, ProxyType
from translator.routes import route_table
from xds import protos

A, B, C = "a.example.com", "b.example.com", "c.example.com"
CHAT = "chat.example.com"
SIDECAR = Proxy(ProxyType.SIDECAR, "default", "sleep", frozenset({("app", "sleep"), ("tier", "gold")}))


def cluster_of(host: str) -> str:
    return f"outbound|443||{host}"


def routes_of(*rules: dict[str, Any], **spec: Any) -> list[Any]:
    """Make the Envoy routes of an LLMRoute with these rules, beside three providers."""
    objects = world(*(provider(host[0], host) for host in (A, B, C)), route("chat", CHAT, *rules, **spec))
    routes: Any = route_table(objects, SIDECAR, "http_proxy").routes
    (host,) = (host for host in routes.virtual_hosts if CHAT in host.domains)
    return list(host.routes)


def action_of(**rule: Any) -> Any:
    (made,) = routes_of(rule)
    return made.route


def named(name: str, *matches: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "backendRefs": backends(A), "matches": list(matches)}


# Rules and matches


def test_each_match_is_a_route_and_the_order_of_the_rules_stays() -> None:
    made = routes_of(
        named("first", {"headers": {"x": {"exact": "1"}}}, {"headers": {"x": {"exact": "2"}}}),
        named("second", {"headers": {"y": {"prefix": "p"}, "z": {"regex": "r+"}}}),
        named("default"),
    )
    matchers = [
        (one.name, [MessageToDict(header, preserving_proto_field_name=True) for header in one.match.headers])
        for one in made
    ]
    assert matchers == [
        ("first", [{"name": "x", "string_match": {"exact": "1"}}]),
        ("first", [{"name": "x", "string_match": {"exact": "2"}}]),
        (
            "second",
            [
                {"name": "y", "string_match": {"prefix": "p"}},
                {"name": "z", "string_match": {"safe_regex": {"regex": "r+"}}},
            ],
        ),
        ("default", []),
    ]


def test_nothing_comes_after_a_rule_that_takes_all() -> None:
    made = routes_of(named("default"), named("never", {"headers": {"x": {"exact": "1"}}}))
    assert [one.name for one in made] == ["default"]


def test_presence_of_a_header() -> None:
    (made,) = routes_of(named("some", {"headers": {"x": {}}}))
    assert made.match.headers[0].present_match


@pytest.mark.parametrize(
    ("match", "applies"),
    [
        ({"sourceLabels": {"app": "sleep"}}, True),
        ({"sourceLabels": {"app": "sleep", "tier": "gold"}}, True),
        ({"sourceLabels": {"app": "other"}}, False),
        ({"sourceLabels": {"missing": "x"}}, False),
        ({"gateways": ["mesh"]}, True),
        ({"gateways": ["ingress"]}, False),
        ({"gateways": ["ingress", "mesh"]}, True),
        ({"gateways": ["mesh"], "sourceLabels": {"app": "other"}}, False),
    ],
)
def test_what_envoy_cannot_see_is_decided_beforehand(match: dict[str, Any], applies: bool) -> None:
    made = routes_of(named("some", match), named("default"), gateways=["mesh", "ingress"])
    assert [one.name for one in made] == (["some"] if applies else ["default"])


def test_a_rule_of_which_no_match_can_be_true_is_left_out() -> None:
    headers = {"headers": {"x": {"exact": "1"}}}
    made = routes_of(named("some", {"sourceLabels": {"app": "other"}, **headers}, headers))
    assert len(made) == 1, "one of two matches"
    assert routes_of(named("some", {"sourceLabels": {"app": "other"}})) == []


# Shares


def shares_of(references: list[dict[str, Any]]) -> dict[str, int]:
    action = action_of(backendRefs=references)
    if action.cluster:
        return {action.cluster: 100}
    return {share.name: share.weight.value for share in action.weighted_clusters.clusters}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([None, None], [1, 1]),
        ([70, 30], [70, 30]),
        ([70, None, 30], [70, 0, 30]),
        ([70, 0, 30], [70, 0, 30]),
        ([70, None], [100, 0]),
        ([1, 0], [100, 0]),
        ([None], [100]),
        ([0], [100]),
        ([7], [100]),
    ],
)
def test_weights(weights: list[int | None], expected: list[int]) -> None:
    """None at all = equal; only some = nothing for the others; a single destination gets all."""
    hosts = (A, B, C)[: len(weights)]
    references = [
        {"providerHost": host} | ({} if weight is None else {"weight": weight})
        for host, weight in zip(hosts, weights, strict=True)
    ]
    shares = shares_of(references)
    assert [shares.get(cluster_of(host), 0) for host in hosts] == expected


def test_an_unknown_provider_keeps_its_share() -> None:
    references = [{"providerHost": A, "weight": 9}, {"providerHost": "nowhere.example.com", "weight": 1}]
    assert shares_of(references) == {cluster_of(A): 9, "missing|nowhere.example.com": 1}


def test_a_route_specific_config_and_a_host_rewrite_are_clusters_of_their_own() -> None:
    configs = {
        "defaultConfig": {"openAIConfig": {"model": "small"}},
        "routeSpecificConfigs": {"vip": {"openAIConfig": {"model": "large"}}},
    }
    rewritten = {"providerHost": A, "hostRewrite": "inner.example.com"}
    same = {"providerHost": A, "hostRewrite": A}
    objects = world(
        provider("a", A, configs=configs),
        route(
            "chat",
            CHAT,
            {"name": "vip", "matches": [{"headers": {"x": {"exact": "1"}}}], "backendRefs": backends(A)},
            {"name": "vip", "matches": [{"headers": {"x": {"exact": "2"}}}], "backendRefs": [rewritten]},
            {"name": "other", "matches": [{"headers": {"x": {"exact": "3"}}}], "backendRefs": [rewritten]},
            {"name": "other", "backendRefs": [same]},
        ),
    )
    table = route_table(objects, SIDECAR, "http_proxy")
    assert list(
        dict.fromkeys(target.cluster_name for host in table.hosts for target in host.destinations)
    ) == [
        f"outbound|443|vip|{A}",
        f"outbound|443|vip@inner.example.com|{A}",
        f"outbound|443|@inner.example.com|{A}",
        f"outbound|443||{A}",
    ]


# Retries


def policy_of(references: list[dict[str, Any]], **rule: Any) -> dict[str, Any]:
    policy = action_of(backendRefs=references, **rule).retry_policy
    return MessageToDict(policy, preserving_proto_field_name=True)


TWO = backends(A, B)
ORDERED: list[dict[str, Any]] = [
    {"providerHost": A},
    {"providerHost": B, "priority": 1},
    {"providerHost": C, "priority": 2},
]
BEFORE_THE_REQUEST = "connect-failure,refused-stream,reset-before-request"
FAILURES = "connect-failure,refused-stream,reset,retriable-status-codes"
FAILURE_STATUSES = [429, 500, 502, 503, 504]


def test_unasked_only_what_was_not_sent_is_tried_elsewhere() -> None:
    policy = policy_of(backends(A, B, C))
    assert policy["retry_on"] == BEFORE_THE_REQUEST
    assert "retriable_status_codes" not in policy
    assert policy["num_retries"] == 2, "each provider once"
    assert policy["refresh_cluster_on_retry"] is True


def test_retries_are_for_failures_too() -> None:
    policy = policy_of(TWO, retries={"attempts": 3})
    assert policy["retry_on"] == FAILURES
    assert policy["retriable_status_codes"] == FAILURE_STATUSES
    assert policy["num_retries"] == 3


def test_priorities_ask_for_a_fallback_on_failures() -> None:
    policy = policy_of(ORDERED)
    assert policy["retry_on"] == FAILURES
    assert policy["num_retries"] == 2, "each priority once"


def test_attempts_0_turns_all_retries_off() -> None:
    assert policy_of(ORDERED, retries={"attempts": 0})["num_retries"] == 0


@pytest.mark.parametrize(
    ("retry_on", "policies", "statuses"),
    [
        ("5xx", "5xx", []),
        ("reset,connect-failure", "reset,connect-failure", []),
        ("429,503", "retriable-status-codes", [429, 503]),
        ("gateway-error, 429", "gateway-error,retriable-status-codes", [429]),
    ],
)
def test_an_explicit_list_counts_alone(retry_on: str, policies: str, statuses: list[int]) -> None:
    policy = policy_of(TWO, retries={"attempts": 1, "retryOn": retry_on})
    assert policy["retry_on"] == policies
    assert policy.get("retriable_status_codes", []) == statuses


def test_only_where_there_is_no_other_provider_retry_after_is_waited_for() -> None:
    assert "rate_limited_retry_back_off" in policy_of(backends(A), retries={"attempts": 1})
    assert "rate_limited_retry_back_off" in policy_of(backends(A), retries={"attempts": 1, "retryOn": "5xx"})
    for references in (TWO, ORDERED):
        assert "rate_limited_retry_back_off" not in policy_of(references, retries={"attempts": 1})
    assert "rate_limited_retry_back_off" not in policy_of(backends(A)), "nothing is retried that could tell"


def test_priority_groups() -> None:
    references = [
        {"providerHost": C, "priority": 5},
        {"providerHost": A, "weight": 3},
        {"providerHost": B, "weight": 1},
    ]
    plugin = action_of(backendRefs=references).inline_cluster_specifier_plugin.extension.typed_config
    specifier = protos.PriorityGroupClusterSpecifier()
    assert plugin.Unpack(specifier)
    assert [
        [(share.cluster_name, share.weight.value) for share in group.clusters]
        for group in specifier.priority_groups
    ] == [[(cluster_of(A), 3), (cluster_of(B), 1)], [(cluster_of(C), 1)]]


def test_in_an_order_a_provider_that_is_not_there_is_passed_over() -> None:
    references = [{"providerHost": "nowhere.example.com"}, {"providerHost": B, "priority": 1}]
    assert action_of(backendRefs=references).cluster == cluster_of(B)
    all_unknown = [{"providerHost": "x.example.com"}, {"providerHost": "y.example.com", "priority": 1}]
    assert action_of(backendRefs=all_unknown).cluster == "missing|x.example.com"


def test_timeouts() -> None:
    action = action_of(backendRefs=TWO)
    assert action.timeout.ToSeconds() == 0, "no limit: a stream may take long"
    assert action.idle_timeout.ToSeconds() == 3600
    assert not action.retry_policy.HasField("per_try_timeout")
    assert not action.retry_policy.HasField("per_try_idle_timeout")
    action = action_of(backendRefs=TWO, timeout="90s", retries={"attempts": 1, "perTryTimeout": "1500ms"})
    assert action.timeout.ToSeconds() == 90
    assert action.retry_policy.per_try_timeout.ToMilliseconds() == 1500


def test_the_first_token_has_a_time_limit_without_retries_too() -> None:
    policy = action_of(backendRefs=TWO, firstTokenTimeout="20s").retry_policy
    assert policy.per_try_timeout.ToSeconds() == 20
    assert "reset" not in policy.retry_on.split(","), "a timeout moves on only where failures do"


@pytest.mark.parametrize(("limit", "of_the_stream"), [("30s", 3600), ("2h", 7200)])
def test_the_silence_of_a_provider_ends_an_attempt(limit: str, of_the_stream: int) -> None:
    """Envoy's limit for a stream, which no retry follows, must not come first."""
    action = action_of(backendRefs=TWO, streamIdleTimeout=limit)
    assert action.retry_policy.per_try_idle_timeout.ToSeconds() == {"30s": 30, "2h": 7200}[limit]
    assert action.idle_timeout.ToSeconds() == of_the_stream


@pytest.mark.parametrize(
    ("retries", "of_the_stream"),
    [({}, 60), ({"retries": {"attempts": 1}}, 60), ({"retries": {"attempts": 9}}, 200)],
)
def test_after_the_first_token_the_stream_itself_has_the_limit(
    retries: dict[str, Any], of_the_stream: int
) -> None:
    """Envoy forgets the silence of an attempt once the time for its first token is over."""
    action = action_of(backendRefs=TWO, firstTokenTimeout="20s", streamIdleTimeout="1m", **retries)
    assert action.retry_policy.per_try_timeout.ToSeconds() == 20
    assert not action.retry_policy.HasField("per_try_idle_timeout")
    assert action.idle_timeout.ToSeconds() == of_the_stream


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((None, None), None),
        ((1000, None), None),
        ((1000, 2_000_000), None),
        ((40_000_000, None), 40_000_000),
    ],
)
def test_a_route_keeps_as_much_for_another_attempt_as_one_of_its_providers_takes(
    limits: tuple[int | None, int | None], expected: int | None
) -> None:
    objects = [
        provider(name, host, **({"maxRequestBytes": limit} if limit else {}))
        for name, host, limit in zip("ab", (A, B), limits, strict=True)
    ]
    table = route_table(
        world(*objects, route("r", "test.com", {"backendRefs": backends(A, B)})), SIDECAR, "r"
    )
    (made,) = (host.virtual_host.routes[0] for host in table.hosts if host.virtual_host.name == "test.com")
    if expected is None:
        assert not made.HasField("request_body_buffer_limit")
    else:
        assert made.request_body_buffer_limit.value > expected


# Names of a host


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("demo", ["demo", "demo.default", "demo.default.svc", "demo.default.svc.cluster.local"]),
        ("demo.default.svc", ["demo", "demo.default", "demo.default.svc", "demo.default.svc.cluster.local"]),
        ("demo.other.svc.cluster.local", ["demo.other", "demo.other.svc", "demo.other.svc.cluster.local"]),
        ("demo.default", ["demo.default"]),
        ("api.example.com", ["api.example.com"]),
        ("a.b.c.svc.cluster.local", ["a.b.c.svc.cluster.local"]),
        ("*.example.com", ["*.example.com"]),
        ("*", ["*"]),
    ],
)
def test_the_names_that_a_client_may_use(host: str, expected: list[str]) -> None:
    """A Service has its DNS forms, the bare name in its own namespace only; other hosts have one name."""
    assert domains(host, "default", "default", "cluster.local") == expected


def test_the_bare_name_of_another_namespaces_service_is_not_taken() -> None:
    assert domains("demo", "istio-system", "default", "cluster.local") == [
        "demo.istio-system",
        "demo.istio-system.svc",
        "demo.istio-system.svc.cluster.local",
    ]


def test_another_cluster_domain() -> None:
    assert domains("demo.default.svc.corp.local", "x", "x", "corp.local")[-1] == "demo.default.svc.corp.local"
