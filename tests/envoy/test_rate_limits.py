"""LLMTokenRateLimit in mode Local on real Envoys with two worker threads.

The fake LLM says of each answer that it used 75 tokens: 3 of the prompt and 72 of the completion. Windows are
of a month, so that none ends while a test runs.
"""

import http.client
import itertools
import json
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from llmplane.fakellm import Fault
from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, Lab, running_lab
from tests.envoy.gateway import Gateway
from tests.support.client import Answer
from tests.support.objects import backends, provider, rate_limit, route, secret
from tests.support.policies import HOST, ROOT, api_key_authentication, request_authentication
from tests.support.tokens import Issuer
from tests.support.wait import eventually
from translator.features import Feature

pytestmark = pytest.mark.needs(Feature.TOKEN_LIMITS)

USED = 75
PROVIDER = provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], model=None)
NOTHING_RESERVED = {"bytesPerToken": 100, "completionTokens": 0}
MODEL = {"model": "qwen-turbo", "messages": [{"role": "user", "content": "Hi"}]}
_numbers = itertools.count()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    mesh = tmp_path_factory.mktemp("mesh") / "mesh.yaml"
    fields = {
        name: f"%FILTER_STATE(llm.ratelimit.{name}:PLAIN)%" for name in ("policy", "rule", "key", "decision")
    }
    config = {
        "accessLogFile": "/dev/stdout",
        "accessLogEncoding": "JSON",
        "accessLogFormat": json.dumps(fields),
    }
    mesh.write_text(json.dumps(config))
    with running_lab(options=["--mesh-config", str(mesh)], concurrency=2) as started:
        started.start_gateway()
        yield started


@pytest.fixture
def lab(shared: Lab) -> Lab:
    for host in shared.fake.hosts:
        shared.fake.set_fault(host, None)
    return shared


def unique() -> str:
    """Return a name for a policy: what is counted for a name stays counted."""
    return f"limit-{next(_numbers)}"


def tokens(number: int, kind: str = "Total") -> list[dict[str, Any]]:
    return [{"tokens": number, "unit": "Month", "type": kind}]


def limit(number: int, name: str | None = None, **spec: Any) -> str:
    """Return a policy that allows so many tokens a month."""
    whole = {"rules": [{"limits": tokens(number)}], "reservation": NOTHING_RESERVED, **spec}
    return rate_limit(name or unique(), **{"local": {"longWindows": True}, **whole})


def ask(lab: Lab, host: str = DASHSCOPE, body: Any = MODEL, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lab.client.request(host, json.dumps(body).encode(), named)


def statuses(lab: Lab, count: int, **headers: str) -> list[int]:
    return [ask(lab, **headers).status for _ in range(count)]


def metric(lab: Lab, name: str, policy: str, key: str = "*") -> int | None:
    """Return a metric of a policy, added up over its other labels."""
    with urllib.request.urlopen(f"http://{lab.mesh.bind_address}:15090/stats/prometheus") as answer:
        text = answer.read().decode()
    pattern = rf'^llmplane_ratelimit_{name}{{policy="default/{policy}",.*key="{re.escape(key)}".*}} (\d+)$'
    found = [int(value) for value in re.findall(pattern, text, re.MULTILINE)]
    return sum(found) if found else None


# --------------------------------------------------------------------------------------------------
# Counting


def test_tokens_are_counted_and_then_refused(lab: Lab) -> None:
    name = unique()
    lab.apply(PROVIDER, limit(2 * USED, name))
    first, second, third = (ask(lab) for _ in range(3))
    assert (first.status, second.status, third.status) == (200, 200, 429)
    assert first.headers["x-ratelimit-limit-tokens"] == "150"
    assert int(second.headers["x-ratelimit-remaining-tokens"]) < USED
    assert re.fullmatch(r"(\d+h\d+m|\d+m)?\d+s", second.headers["x-ratelimit-reset-tokens"])
    assert third.headers["x-ratelimit-remaining-tokens"] == "0"
    assert int(third.headers["retry-after"]) > 0
    error = third.error
    assert (error["type"], error["code"]) == ("tokens", "rate_limit_exceeded")
    assert error["message"].startswith(
        f"Rate limit default/{name} (default) reached on total tokens per month: Limit 150, Used 150, "
        "Requested 1. Please try again in "
    )
    assert metric(lab, "tokens_total", name) == 2 * USED
    assert metric(lab, "limited_total", name) == 1
    assert metric(lab, "remaining_tokens", name) == 0


@pytest.mark.parametrize(("kind", "used"), [("Prompt", 3), ("Completion", 72), ("Total", 75)])
def test_prompt_and_completion_can_be_limited_apart(lab: Lab, kind: str, used: int) -> None:
    lab.apply(PROVIDER, limit(0, rules=[{"limits": tokens(2 * used, kind)}]))
    assert statuses(lab, 3) == [200, 200, 429]


def test_all_limits_of_a_rule_hold(lab: Lab) -> None:
    name = unique()
    lab.apply(PROVIDER, limit(0, name, rules=[{"limits": [*tokens(100_000), *tokens(100, "Completion")]}]))
    assert statuses(lab, 3) == [200, 200, 429]
    assert metric(lab, "remaining_tokens", name) == 100_000 - 2 * USED, "what was reserved is given back"


def test_several_policies_hold_and_the_nearest_is_told(lab: Lab) -> None:
    wide, narrow = unique(), unique()
    lab.apply(PROVIDER, limit(100_000, wide), limit(100, narrow))
    assert ask(lab).headers["x-ratelimit-limit-tokens"] == "100"
    assert statuses(lab, 2) == [200, 429]
    assert metric(lab, "remaining_tokens", wide) == 100_000 - 2 * USED


def test_a_stream_is_charged_what_it_says_at_its_end(lab: Lab) -> None:
    name = unique()
    lab.apply(PROVIDER, limit(100, name))
    assert b"[DONE]" in ask(lab, body={**MODEL, "stream": True}).body
    assert metric(lab, "tokens_total", name) == USED
    assert metric(lab, "remaining_tokens", name) == 25


def test_a_stream_that_the_client_breaks_off_is_charged_what_was_counted(lab: Lab) -> None:
    name = unique()
    lab.apply(PROVIDER, limit(1000, name))
    lab.fake.set_fault(DASHSCOPE, Fault(chunk_delay=0.02))
    body = json.dumps({**MODEL, "stream": True}).encode()
    with lab.client.open(DASHSCOPE, body) as response:
        for _ in range(20):
            response.readline()
    eventually(lambda: (metric(lab, "tokens_total", name) or 0) > 0)
    remaining = metric(lab, "remaining_tokens", name)
    assert remaining is not None
    assert 1000 - USED <= remaining < 1000


def test_what_is_not_known_stays_reserved(lab: Lab) -> None:
    name = unique()
    lab.apply(PROVIDER, limit(1000, name, reservation={"completionTokens": 400}))
    lab.fake.set_fault(DASHSCOPE, Fault(no_usage=True))
    assert statuses(lab, 3) == [200, 200, 429]
    assert metric(lab, "tokens_total", name) is None


@pytest.mark.parametrize("fault", [Fault(status=500), Fault(status=429), Fault(reset=True)], ids=str)
def test_a_request_that_fails_is_charged_nothing(lab: Lab, fault: Fault) -> None:
    name = unique()
    lab.apply(PROVIDER, limit(1000, name, reservation={"completionTokens": 900}))
    lab.fake.set_fault(DASHSCOPE, fault)
    assert all(status >= 429 for status in statuses(lab, 3))
    assert metric(lab, "limited_total", name) is None
    assert metric(lab, "remaining_tokens", name) == 1000


def test_parallel_requests_do_not_overshoot(lab: Lab) -> None:
    """What they may use at most is reserved before; both worker threads count in one place."""
    name = unique()
    lab.apply(PROVIDER, limit(1000, name, reservation={"completionTokens": 90}))
    lab.fake.set_fault(DASHSCOPE, Fault(delay=0.3))
    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(lambda _: ask(lab).status, range(40)))
    passed = found.count(200)
    assert set(found) == {200, 429}
    assert 1 <= passed <= 1000 // USED
    assert metric(lab, "tokens_total", name) == passed * USED
    assert metric(lab, "remaining_tokens", name) == 1000 - passed * USED


def test_many_small_requests_on_both_workers_are_all_counted(lab: Lab) -> None:
    name = unique()
    lab.apply(PROVIDER, limit(1_000_000, name))
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: ask(lab).status, range(200))) == {200}
    assert metric(lab, "remaining_tokens", name) == 1_000_000 - 200 * USED


@pytest.mark.parametrize("member", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_what_the_client_asks_for_at_most_is_reserved(lab: Lab, member: str) -> None:
    lab.apply(PROVIDER, limit(1000))
    assert 490 < int(ask(lab, body={**MODEL, member: 500}).headers["x-ratelimit-remaining-tokens"]) < 500
    assert ask(lab, body={**MODEL, member: 950}).status == 429
    nested = {**MODEL, "metadata": {member: 950}, "stop": f'"{member}": 950'}
    assert ask(lab, body=nested).status == 200, "only a member of the request itself counts"


@pytest.mark.parametrize(
    "members",
    [
        b'"max_tokens": 9.5e2',
        b'"max_token\\u0073": 950',
        b'"max_tokens": 950, "max_completion_tokens": 1',
        b'"max_tokens": 190, "n": 5',
        b'"max_tokens": 4294967295, "n": 4294967295',
    ],
)
def test_however_the_client_asks(lab: Lab, members: bytes) -> None:
    lab.apply(PROVIDER, limit(1000))
    assert ask(lab).status == 200
    assert lab.client.request(DASHSCOPE, b'{"messages": [], ' + members + b"}").status == 429


def test_a_request_that_may_use_more_than_the_limit_passes_once(lab: Lab) -> None:
    lab.apply(PROVIDER, limit(100))
    assert ask(lab, body={**MODEL, "max_tokens": 4000}).status == 200
    assert ask(lab, body={**MODEL, "max_tokens": 4000}).status == 429


def test_requests_without_tokens_are_not_counted(lab: Lab) -> None:
    lab.apply(PROVIDER, limit(1))
    assert statuses(lab, 2) == [200, 429]
    assert lab.client.request(DASHSCOPE, None, method="GET", path="/v1/models").status == 200


# --------------------------------------------------------------------------------------------------
# Keys and rules


def test_each_value_of_a_key_is_counted_apart(lab: Lab) -> None:
    name = unique()
    lab.apply(PROVIDER, limit(USED, name, keys=[{"header": "X-User"}]))
    assert statuses(lab, 2, x_user="alice") == [200, 429]
    assert statuses(lab, 2, x_user="bob") == [200, 429]
    assert statuses(lab, 2) == [200, 429], "those without are one more"
    assert statuses(lab, 1, x_user="") == [429]
    assert metric(lab, "limited_total", name, "alice") == 1


def test_keys_can_be_combined(lab: Lab) -> None:
    lab.apply(PROVIDER, limit(USED, keys=[{"header": "x-user"}, {"attribute": "Model"}]))
    assert statuses(lab, 2, x_user="alice") == [200, 429]
    other = {**MODEL, "model": "qwen-max"}
    assert [ask(lab, body=other, x_user="alice").status for _ in range(2)] == [200, 429]


def test_rules_by_the_value_of_a_key(lab: Lab) -> None:
    rules = [
        {"name": "named", "match": [{"exact": "alice"}], "limits": tokens(3 * USED)},
        {"name": "prefix", "match": [{"prefix": "vip-"}], "limits": tokens(2 * USED)},
        {"limits": tokens(USED)},
    ]
    lab.apply(PROVIDER, limit(0, rules=rules, keys=[{"header": "x-user"}]))
    assert statuses(lab, 4, x_user="alice") == [200, 200, 200, 429]
    assert statuses(lab, 3, x_user="vip-1") == [200, 200, 429]
    assert statuses(lab, 3, x_user="vip-2") == [200, 200, 429]
    assert statuses(lab, 2, x_user="mallory") == [200, 429]


def test_rules_by_regular_expressions(lab: Lab) -> None:
    rules = [
        {"match": [{"exact": "gold-0"}, {}], "limits": tokens(1)},
        {"match": [{"regex": "gold-[0-9]+"}, {"prefix": "qwen-"}], "limits": tokens(2 * USED)},
        {"limits": tokens(USED)},
    ]
    lab.apply(PROVIDER, limit(0, rules=rules, keys=[{"header": "x-user"}, {"attribute": "Model"}]))
    assert statuses(lab, 3, x_user="gold-12") == [200, 200, 429]
    assert statuses(lab, 2, x_user="xgold-12") == [200, 429], "it is for the whole value"
    assert ask(lab, x_user="gold-0").headers["x-ratelimit-limit-tokens"] == "1"
    other = {**MODEL, "model": "gpt"}
    assert ask(lab, body=other, x_user="gold-12").headers["x-ratelimit-limit-tokens"] == str(USED)


def test_a_model_is_the_same_however_it_is_written(lab: Lab) -> None:
    rules = [{"match": [{"exact": "gpt-4/a"}], "limits": tokens(USED)}, {"limits": tokens(100 * USED)}]
    lab.apply(PROVIDER, limit(0, keys=[{"attribute": "Model"}], rules=rules))
    body = b'{"messages": [{"role": "user", "content": "Hi"}], %b}'
    models = b'"model": "gpt-4/a"', b'"mod\\u0065l": "g\\u0070t-4\\/a"'
    assert [lab.client.request(DASHSCOPE, body % model).status for model in models] == [200, 429]


def test_the_workload_is_a_key(lab: Lab) -> None:
    name = unique()
    lab.apply(PROVIDER, limit(USED, name, keys=[{"attribute": "Workload"}]))
    assert statuses(lab, 2) == [200, 429]
    assert metric(lab, "limited_total", name, "default/sleep") == 1


def test_keys_beyond_the_bound_share_a_count(lab: Lab) -> None:
    """Never is one of them unlimited."""
    bound = {"maxKeys": 1, "longWindows": True}
    lab.apply(PROVIDER, limit(USED, keys=[{"header": "x-user"}], local=bound))
    passed = [user for user in range(20) if ask(lab, x_user=f"user-{user}").status == 200]
    assert passed[0] == 0
    assert len(passed) == 3, "two with a count of their own, and one for all others"


# --------------------------------------------------------------------------------------------------
# Targets


def test_a_route_or_one_of_its_rules_is_a_target(lab: Lab) -> None:
    rules = [
        {"name": "vip", "matches": [{"headers": {"x-vip": {}}}], "backendRefs": backends(DASHSCOPE)},
        {"name": "all", "backendRefs": backends(DASHSCOPE)},
    ]
    target = {"kind": "LLMRoute", "name": "chat"}
    objects = (PROVIDER, route("chat", "chat.example.com", *rules))
    lab.apply(*objects, limit(USED, targetRefs=[{**target, "sectionName": "all"}]))
    assert [ask(lab, "chat.example.com").status for _ in range(2)] == [200, 429]
    assert [ask(lab, "chat.example.com", x_vip="1").status for _ in range(3)] == [200] * 3
    assert statuses(lab, 3) == [200] * 3, "the provider's own host is another way"
    lab.apply(*objects, limit(USED, targetRefs=[target]))
    assert ask(lab, "chat.example.com", x_vip="1").status == 200
    assert ask(lab, "chat.example.com").status == 429


def test_a_provider_is_a_target(lab: Lab) -> None:
    other = provider("moonshot", MOONSHOT, KEYS[MOONSHOT], model=None)
    lab.apply(
        PROVIDER,
        other,
        route("chat", "chat.example.com", {"backendRefs": backends(DASHSCOPE)}),
        limit(USED, targetRefs=[{"kind": "LLMProvider", "name": "dashscope"}]),
    )
    assert ask(lab, "chat.example.com").status == 200
    assert ask(lab, DASHSCOPE).status == 429
    assert [ask(lab, MOONSHOT).status for _ in range(3)] == [200] * 3


def test_a_selector_narrows_it_to_some_workloads(lab: Lab) -> None:
    lab.apply(PROVIDER, limit(1, selector={"matchLabels": {"app": "other"}}))
    assert statuses(lab, 3) == [200] * 3


def test_a_target_that_does_not_exist_is_told_of(lab: Lab) -> None:
    name = unique()
    lab.apply(PROVIDER, limit(1, name, targetRefs=[{"kind": "LLMRoute", "name": "nowhere"}]))
    assert statuses(lab, 3) == [200] * 3
    met, reason, message = lab.condition(name)
    assert (met, reason) == (False, "TargetNotFound")
    assert "LLMRoute default/nowhere does not exist" in message


# --------------------------------------------------------------------------------------------------
# Changes


def test_a_changed_limit_holds_on_open_connections_and_keeps_what_was_used(lab: Lab) -> None:
    name = unique()
    lab.apply(PROVIDER, limit(USED, name))
    connection = http.client.HTTPConnection(lab.mesh.bind_address, 15080, timeout=30)

    def status() -> int:
        connection.request("POST", f"http://{DASHSCOPE}/", json.dumps(MODEL))
        response = connection.getresponse()
        response.read()
        return response.status

    assert [status(), status()] == [200, 429]
    socket = connection.sock
    lab.apply(PROVIDER, limit(2 * USED, name))
    assert [status(), status()] == [200, 429]
    lab.apply(PROVIDER)
    assert status() == 200
    assert connection.sock is socket
    connection.close()


def test_a_policy_that_is_invalid_and_never_was_good_denies(lab: Lab) -> None:
    name = unique()
    lab.apply(PROVIDER, limit(USED, name, rules=[{"limits": [{"tokens": 0, "unit": "Hour"}]}]))
    answer = ask(lab)
    assert answer.status == 403
    assert answer.error["code"] == "rate_limit_invalid"
    assert f"default/{name}" in answer.error["message"]
    lab.apply(PROVIDER, limit(USED, name))
    assert statuses(lab, 2) == [200, 429]
    lab.apply(PROVIDER, limit(USED, name, keys=[{"header": "authorization"}]))
    assert ask(lab).status == 429, "the last good version stays"


def test_shadow_counts_and_refuses_nothing(lab: Lab) -> None:
    name = unique()
    lab.apply(PROVIDER, limit(USED, name, shadow=True))
    answers = [ask(lab) for _ in range(3)]
    assert [answer.status for answer in answers] == [200] * 3
    assert "x-ratelimit-limit-tokens" not in answers[2].headers
    assert metric(lab, "shadow_limited_total", name) == 2
    assert metric(lab, "tokens_total", name) == 3 * USED


def test_what_is_tried_changes_nothing_that_clients_see_of_what_holds(lab: Lab) -> None:
    tried, holds = unique(), unique()
    lab.apply(PROVIDER, limit(USED, tried, shadow=True), limit(100 * USED, holds))
    answers = [ask(lab) for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 200]
    assert [answer.headers["x-ratelimit-limit-tokens"] for answer in answers] == [str(100 * USED)] * 2
    line = {"policy": f"default/{tried}", "rule": "default", "key": "*", "decision": "shadow"}
    eventually(lambda: line in _log(lab))  # the log tells of the policy that would have refused


# --------------------------------------------------------------------------------------------------
# What is seen


def test_the_access_log_tells_which_limit_was_nearest(lab: Lab) -> None:
    name = unique()
    lab.apply(PROVIDER, limit(USED, name, keys=[{"header": "x-user"}]))
    statuses(lab, 2, x_user="a;b|c%")
    line = {"policy": f"default/{name}", "rule": "default", "key": "a%3Bb%7Cc%25"}
    for decision in ("ok", "limited"):
        expected = {**line, "decision": decision}
        eventually(lambda expected=expected: expected in _log(lab))  # type: ignore[misc]


def _log(lab: Lab) -> list[Any]:
    lines = lab.mesh.log("sidecar").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]


def test_what_the_script_counts_in_is_no_metric(lab: Lab) -> None:
    lab.apply(PROVIDER, limit(USED))
    assert statuses(lab, 1) == [200]
    assert "owner~" in lab.envoy_admin("/stats")
    for query in ("", "?usedonly", "?filter=owner"):
        with urllib.request.urlopen(
            f"http://{lab.mesh.bind_address}:15090/stats/prometheus{query}"
        ) as answer:
            assert b"owner_" not in answer.read()


def test_the_official_sdk_waits_and_tries_again(lab: Lab) -> None:
    second = [{"limits": [{"tokens": USED, "unit": "Second"}]}]
    name = unique()
    lab.apply(PROVIDER, limit(0, name, rules=second))
    with openai.OpenAI(
        api_key="sk-of-the-application",
        base_url=f"{lab.mesh.http_proxy}/v1",
        default_headers={"host": DASHSCOPE},
        max_retries=5,
    ) as sdk:
        messages: Any = [{"role": "user", "content": "Hi"}]

        def limited() -> int | None:
            assert sdk.chat.completions.create(model="qwen-turbo", messages=messages).usage is not None
            return metric(lab, "limited_total", name)

        eventually(limited)
        lab.apply(PROVIDER, limit(1, name))
        once = sdk.with_options(max_retries=0)
        once.chat.completions.create(model="qwen-turbo", messages=messages)
        with pytest.raises(openai.RateLimitError) as refused:
            once.chat.completions.create(model="qwen-turbo", messages=messages)
    assert refused.value.code == "rate_limit_exceeded"
    assert int(refused.value.response.headers["retry-after"]) > 0


# --------------------------------------------------------------------------------------------------
# Gateways


@pytest.fixture
def gw(lab: Lab) -> Gateway:
    return Gateway(lab)


def at_gateway(number: int, **spec: Any) -> str:
    return limit(number, f"{ROOT}/{unique()}", selector={"matchLabels": {"istio": "ingressgateway"}}, **spec)


def test_clients_with_keys_are_counted_apart(gw: Gateway) -> None:
    keys = {"alice": "sk-of-alice-0123456789", "bob": "sk-of-bob-0123456789"}
    gw.apply(
        secret(f"{ROOT}/clients", keys),
        api_key_authentication("clients"),
        at_gateway(USED, keys=[{"attribute": "Client"}]),
    )
    for key in keys.values():
        assert [gw.ask({"x-api-key": key}).status for _ in range(2)] == [200, 429]


def test_claims_of_a_token_are_keys(gw: Gateway) -> None:
    issuer = Issuer("https://issuer.example.com")
    gw.apply(
        request_authentication({"issuer": issuer.name, "jwks": issuer.jwks}),
        at_gateway(USED, keys=[{"claim": "team"}]),
    )
    for team in ("red", "blue", 7, ["a", "b"]):
        assert [gw.ask(token=issuer.token(team=team)).status for _ in range(2)] == [200, 429], team
    assert [gw.ask().status for _ in range(2)] == [200, 429]


def test_the_address_of_the_client_is_a_key(gw: Gateway) -> None:
    gw.apply(at_gateway(USED, keys=[{"attribute": "Address"}]))
    assert [gw.ask().status for _ in range(2)] == [200, 429]
    assert gw.ask({"x-forwarded-for": "1.2.3.4"}).status == 429, "it cannot choose one"


def test_a_policy_of_a_route_follows_it_to_its_gateway(gw: Gateway) -> None:
    gw.apply(limit(USED, targetRefs=[{"kind": "LLMRoute", "name": "test"}]))
    assert [gw.ask().status for _ in range(2)] == [200, 429]


def test_a_gateway_is_a_target(gw: Gateway) -> None:
    target = {"group": "networking.istio.io", "kind": "Gateway", "name": "ingress-gw"}
    gw.apply(limit(USED, f"{ROOT}/{unique()}", targetRefs=[target]))
    assert [gw.ask().status for _ in range(2)] == [200, 429]
    assert gw.client.request(HOST, path="/v1/chat/completions").status == 429


def test_the_example(lab: Lab) -> None:
    folder = Path(__file__).parents[2] / "examples" / "token-rate-limits"
    lab.apply(PROVIDER, *(file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.yaml"))))
    assert ask(lab, x_user="alice").headers["x-ratelimit-limit-tokens"] == "1000"
