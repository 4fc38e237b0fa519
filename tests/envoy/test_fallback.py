"""Retries and fallback: when one provider fails, the next one answers with what is its own (decision 12)."""

import hashlib
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from llmplane.fakellm import Fault, fingerprint
from llmplane.local import free_port
from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, OPENAI, Lab, running_lab
from tests.support.dns import DnsServer, asking, running_dns_server
from tests.support.objects import backends, provider, route
from tests.support.stream import running_piecewise_server
from tests.support.wait import eventually
from translator.features import Feature

CHAT = "chat.example.com"
A, B, C = DASHSCOPE, MOONSHOT, OPENAI
FALLBACK = pytest.mark.needs(Feature.FALLBACK)
SOON = "2s"
"""A time limit that who is not asked to be late keeps, also on a machine that is busy."""

PROVIDERS = {
    A: {"name": "a", "model": "model-a", "path": "/a/v1/chat/completions"},
    B: {"name": "b", "model": "model-b", "path": "/b/chat/completions"},
    C: {"name": "c", "model": "model-c", "path": "/c/v3/chat/completions"},
}


@pytest.fixture(scope="module")
def dns() -> Iterator[DnsServer]:
    with running_dns_server() as server:
        yield server


@pytest.fixture(scope="module")
def shared_lab(dns: DnsServer) -> Iterator[Lab]:
    """Run a lab whose Envoy asks our DNS server."""
    with running_lab(envoy_options=["--config-yaml", json.dumps(asking(dns.port))]) as lab:
        yield lab


def llm(host: str, **spec: Any) -> str:
    """Return one of the three providers."""
    return provider(key=KEYS[host], host=host, **{**PROVIDERS[host], **spec})


def refused() -> dict[str, Any]:
    """Return the place of a provider where nothing listens."""
    return {"endpoints": [{"address": "127.0.0.1", "port": free_port()}]}


def ordered(*hosts: str) -> list[dict[str, Any]]:
    """Return references to providers, one after the other."""
    return [{"providerHost": host, "priority": priority} for priority, host in enumerate(hosts)]


def first_a_then_b(lab: Lab, fault: Fault | None = None, a: str | None = None, **rule: Any) -> None:
    lab.apply(a or llm(A), llm(B), route("chat", CHAT, {"backendRefs": ordered(A, B), **rule}))
    lab.fake.set_fault(A, fault)


def only_a(lab: Lab, fault: Fault, **rule: Any) -> None:
    lab.apply(llm(A), route("chat", CHAT, {"backendRefs": backends(A), **rule}))
    lab.fake.set_fault(A, fault)


def providers_asked(lab: Lab) -> list[str]:
    """Return the providers that saw a request since the last look, in order."""
    return [seen.provider for seen in lab.all_seen()]


def stat(lab: Lab, host: str, name: str) -> int:
    """Return a statistic of a provider's cluster."""
    (line,) = lab.envoy_admin(f"/stats?filter=outbound.443..{host}.{name}$").splitlines()
    return int(line.rpartition(" ")[2])


def assert_answered_by(lab: Lab, host: str, after: tuple[str, ...] = ()) -> None:
    """Send a request; each provider that sees it gets its own model, path, host and key."""
    answer = lab.client.request(CHAT, b'{"messages": [{"role": "user", "content": "Hi"}]}')
    assert answer.status == 200, answer.body
    seen = lab.all_seen()
    assert [one.provider for one in seen] == [*after, host]
    for one in seen:
        mine = PROVIDERS[one.provider]
        assert (one.model, one.path, one.host) == (mine["model"], mine["path"], one.provider)
        assert (one.sni, one.key_fingerprint) == (one.provider, fingerprint(KEYS[one.provider]))
        assert (
            one.body
            == b'{"model":"%b","messages": [{"role": "user", "content": "Hi"}]}' % mine["model"].encode()
        )


# What moves a request on to the next provider


@FALLBACK
@pytest.mark.parametrize(
    "fault",
    [*(Fault(status=status) for status in (429, 500, 502, 503, 504)), Fault(reset=True)],
    ids=lambda fault: "reset" if fault.reset else str(fault.status),
)
def test_an_answer_that_is_a_failure(lab: Lab, fault: Fault) -> None:
    first_a_then_b(lab, fault)
    assert_answered_by(lab, B, after=(A,))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_an_answer_that_another_provider_would_give_too_is_no_reason(lab: Lab, status: int) -> None:
    first_a_then_b(lab, Fault(status=status))
    assert lab.client.request(CHAT).status == status
    assert providers_asked(lab) == [A]


@FALLBACK
def test_a_refused_connection(lab: Lab) -> None:
    first_a_then_b(lab, a=llm(A, **refused()))
    assert_answered_by(lab, B)


@FALLBACK
def test_a_certificate_that_is_not_the_providers(lab: Lab) -> None:
    first_a_then_b(lab, a=llm(A, tls={"sni": "stranger.example.com"}))
    assert_answered_by(lab, B)


@FALLBACK
@pytest.mark.parametrize("addresses", [None, []], ids=["NXDOMAIN", "no address"])
def test_a_name_that_does_not_resolve(lab: Lab, dns: DnsServer, addresses: list[str] | None) -> None:
    name = f"a-{'empty' if addresses is not None else 'unknown'}.test"
    dns.records = {} if addresses is None else {name: addresses}
    first_a_then_b(lab, a=llm(A, endpoints=[{"address": name}]))
    eventually(lambda: name in dns.asked)
    assert_answered_by(lab, B)


@FALLBACK
def test_a_name_that_does_not_resolve_and_has_outlier_detection(lab: Lab, dns: DnsServer) -> None:
    """However often it failed: the guard that makes the fallback possible is never ejected itself."""
    dns.records = {}
    dns.asked.clear()
    outlier = {"outlierDetection": {"consecutive5xxErrors": 1}}
    first_a_then_b(lab, a=llm(A, endpoints=[{"address": "a-nowhere.test"}], trafficPolicy=outlier))
    eventually(lambda: "a-nowhere.test" in dns.asked)
    for _ in range(5):
        assert_answered_by(lab, B)
    assert "failed_outlier_check" not in lab.envoy_admin("/clusters")


def test_a_name_with_ipv6_addresses_is_reached_by_ipv4(lab: Lab, dns: DnsServer) -> None:
    dns.records = {"a-dual.test": ["::1", "127.0.0.1"]}
    endpoint = {"address": "a-dual.test", "port": lab.fake.port}
    first_a_then_b(lab, a=llm(A, endpoints=[endpoint]))
    assert_answered_by(lab, A)


@FALLBACK
def test_a_provider_that_is_ejected(lab: Lab) -> None:
    """After two failures in a row it is not asked any more, whatever becomes of the guard beside it."""
    outlier = {"outlierDetection": {"consecutive5xxErrors": 2, "baseEjectionTime": "300s"}}
    first_a_then_b(lab, Fault(status=500), a=llm(A, trafficPolicy=outlier))
    for _ in range(2):
        assert_answered_by(lab, B, after=(A,))
    lab.mesh._wait("Envoy ejected it", lambda: "failed_outlier_check" in lab.envoy_admin("/clusters"))
    for _ in range(5):
        assert_answered_by(lab, B)
    assert lab.envoy_admin("/clusters").count("failed_outlier_check") == 1


@FALLBACK
def test_a_time_limit_for_each_try(lab: Lab) -> None:
    first_a_then_b(lab, Fault(delay=600), retries={"attempts": 1, "perTryTimeout": SOON})
    assert_answered_by(lab, B, after=(A,))


def test_a_provider_without_its_key_does_not_fall_back(lab: Lab) -> None:
    """It is a fault of the configuration, and its text says so."""
    config = {"apiKeySecretRef": {"name": "nowhere", "key": "api-key"}}
    first_a_then_b(lab, a=llm(A, configs={"defaultConfig": {"openAIConfig": config}}))
    answer = lab.client.request(CHAT)
    assert (answer.status, answer.error["code"]) == (401, "provider_key_missing")
    assert providers_asked(lab) == []


# What does not, unless it was asked for: it could bill twice


@pytest.mark.parametrize(
    ("fault", "status"),
    [(Fault(status=429), 429), (Fault(status=500), 500), (Fault(status=503), 503), (Fault(reset=True), 503)],
    ids=["429", "500", "503", "reset"],
)
def test_without_retries_and_priority_a_request_is_sent_once(lab: Lab, fault: Fault, status: int) -> None:
    lab.apply(llm(A), llm(B), route("chat", CHAT, {"backendRefs": backends(A, B)}))
    lab.fake.set_fault(A, fault)
    lab.fake.set_fault(B, fault)
    answer = lab.client.request(CHAT)
    assert (answer.status, len(lab.all_seen())) == (status, 1)
    assert answer.error


@FALLBACK
@pytest.mark.parametrize("failure", ["refused", "certificate", "name"])
def test_without_retries_and_priority_what_was_not_sent_moves_on(
    lab: Lab, dns: DnsServer, failure: str
) -> None:
    dns.records = {}
    spec = {
        "refused": refused(),
        "certificate": {"tls": {"sni": "stranger.example.com"}},
        "name": {"endpoints": [{"address": "a-nowhere.test"}]},
    }
    lab.apply(llm(A, **spec[failure]), llm(B), route("chat", CHAT, {"backendRefs": backends(A, B)}))
    for _ in range(6):
        assert_answered_by(lab, B)


@pytest.mark.parametrize("attempts", [0, 1, 3])
def test_the_number_of_attempts(lab: Lab, attempts: int) -> None:
    only_a(lab, Fault(status=503), retries={"attempts": attempts})
    assert lab.client.request(CHAT).status == 503
    assert len(lab.all_seen()) == 1 + attempts


def test_attempts_0_turns_the_fallback_off(lab: Lab) -> None:
    first_a_then_b(lab, Fault(status=503), retries={"attempts": 0})
    assert lab.client.request(CHAT).status == 503
    assert providers_asked(lab) == [A]


@pytest.mark.parametrize(
    ("retry_on", "fault", "moves_on"),
    [
        pytest.param("429", Fault(status=429), True, marks=FALLBACK),
        ("429", Fault(status=503), False),
        ("429", Fault(reset=True), False),
        pytest.param("5xx", Fault(status=501), True, marks=FALLBACK),
        ("5xx", Fault(status=429), False),
        pytest.param("5xx", Fault(reset=True), True, marks=FALLBACK),
        ("gateway-error", Fault(status=500), False),
        pytest.param("gateway-error,429", Fault(status=429), True, marks=FALLBACK),
        pytest.param("reset", Fault(reset=True), True, marks=FALLBACK),
        ("reset", Fault(status=503), False),
        ("connect-failure", Fault(reset=True), False),
    ],
    ids=lambda value: ("reset" if value.reset else str(value.status)) if isinstance(value, Fault) else None,
)
def test_an_explicit_list_counts_alone(lab: Lab, retry_on: str, fault: Fault, moves_on: bool) -> None:
    first_a_then_b(lab, fault, retries={"attempts": 1, "retryOn": retry_on})
    lab.client.request(CHAT)
    assert providers_asked(lab) == ([A, B] if moves_on else [A])


# Which one is next


@FALLBACK
def test_three_levels_of_priority(lab: Lab) -> None:
    lab.apply(llm(A), llm(B), llm(C), route("chat", CHAT, {"backendRefs": ordered(A, B, C)}))
    assert_answered_by(lab, A)
    lab.fake.set_fault(A, Fault(status=503))
    assert_answered_by(lab, B, after=(A,))
    lab.fake.set_fault(B, Fault(reset=True))
    assert_answered_by(lab, C, after=(A, B))
    lab.fake.set_fault(C, Fault(status=429))
    answer = lab.client.request(CHAT)
    assert (answer.status, providers_asked(lab)) == (429, [A, B, C])
    assert answer.error["message"] == "A fault that was asked for: 429.", "the last one's own answer"


@pytest.mark.needs(Feature.PRIORITY_GROUPS)
def test_weights_within_a_priority(lab: Lab) -> None:
    references = [
        {"providerHost": A, "weight": 1},
        {"providerHost": B, "weight": 1},
        {"providerHost": C, "priority": 1},
    ]
    lab.apply(llm(A), llm(B), llm(C), route("chat", CHAT, {"backendRefs": references}))
    for _ in range(30):
        assert lab.client.request(CHAT).status == 200
    assert set(providers_asked(lab)) == {A, B}, (
        "nobody needs C (by chance one of two is missing once in 2^29 runs)"
    )
    for host in (A, B):
        lab.fake.set_fault(host, Fault(status=503))
    for _ in range(5):
        assert lab.client.request(CHAT).status == 200
        first, second = providers_asked(lab)
        assert first in {A, B}
        assert second == C


@FALLBACK
def test_of_equal_providers_each_is_tried_once(lab: Lab) -> None:
    rule = {"backendRefs": backends(A, B, C), "retries": {"attempts": 2}}
    lab.apply(llm(A), llm(B), llm(C), route("chat", CHAT, rule))
    lab.fake.set_fault(A, Fault(status=503))
    lab.fake.set_fault(B, Fault(status=429))
    for _ in range(5):
        assert lab.client.request(CHAT).status == 200
        asked = providers_asked(lab)
        assert asked[-1] == C
        assert len(asked) == len(set(asked))


def test_a_missing_provider_is_passed_over_in_an_order(lab: Lab) -> None:
    lab.apply(llm(B), route("chat", CHAT, {"backendRefs": ordered("nowhere.example.com", B)}))
    assert_answered_by(lab, B)


# Retry-After


def test_the_only_provider_is_asked_again_when_it_said(lab: Lab) -> None:
    only_a(lab, Fault(status=429, retry_after=1, times=1), retries={"attempts": 1})
    before = stat(lab, A, "upstream_rq_retry_backoff_ratelimited")
    assert lab.client.request(CHAT).status == 200
    assert providers_asked(lab) == [A, A]
    assert stat(lab, A, "upstream_rq_retry_backoff_ratelimited") == before + 1


def test_a_pause_of_more_than_a_minute_is_not_waited_for(lab: Lab) -> None:
    only_a(lab, Fault(status=429, retry_after=61), retries={"attempts": 1})
    answer = lab.client.request(CHAT, timeout=30)
    assert (answer.status, answer.headers["retry-after"]) == (429, "61")
    assert providers_asked(lab) == [A, A]


@FALLBACK
def test_with_another_provider_nobody_waits(lab: Lab) -> None:
    first_a_then_b(lab, Fault(status=429, retry_after=50))
    assert lab.client.request(CHAT, timeout=30).status == 200, "before the time is up"
    assert providers_asked(lab) == [A, B]


# Time limits


def test_a_time_limit_is_a_504(lab: Lab) -> None:
    only_a(lab, Fault(delay=600), timeout="200ms")
    answer = lab.client.request(CHAT)
    assert (answer.status, answer.error["code"]) == (504, "timeout")


def test_a_time_limit_for_each_try_is_a_504_in_the_end(lab: Lab) -> None:
    only_a(lab, Fault(delay=600), retries={"attempts": 1, "perTryTimeout": SOON})
    answer = lab.client.request(CHAT)
    assert (answer.status, answer.error["code"]) == (504, "timeout")
    assert len(lab.all_seen()) == 2


def test_a_limit_for_each_try_does_not_cut_a_stream(lab: Lab) -> None:
    """It is the time to the first byte; what comes after may take longer."""
    only_a(lab, Fault(chunks=4, chunk_delay=0.4), retries={"attempts": 1, "perTryTimeout": SOON})
    answer = lab.client.request(CHAT, b'{"messages": [1], "stream": true}')
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert len(lab.all_seen()) == 1


def test_a_slow_stream_is_not_cut(lab: Lab) -> None:
    """Without a timeout of the rule there is none (what Envoy's own limits are is in the golden files)."""
    first_a_then_b(lab, Fault(chunks=2, chunk_delay=0.4))
    answer = lab.client.request(CHAT, b'{"messages": [1], "stream": true}')
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert providers_asked(lab) == [A]


# What is sent twice arrives whole; what began to be answered stays where it is


@FALLBACK
def test_a_10_mb_body_arrives_whole_at_the_second_provider(lab: Lab) -> None:
    first_a_then_b(lab, Fault(status=503))
    body = b'{"messages": [{"role": "user", "content": "%b"}]}' % (
        b"0123456789 \\ud83d\xe5\xa5\xbd " * 480_000
    )
    assert len(body) > 10_000_000
    assert lab.client.request(CHAT, body).status == 200
    for seen, model in zip(lab.all_seen(), (b"model-a", b"model-b"), strict=True):
        expected = b'{"model":"%b",' % model + body[1:]
        assert seen.sha256 == hashlib.sha256(expected).hexdigest()


def test_after_the_headers_there_is_no_fallback(lab: Lab) -> None:
    """A stream that breaks off in the middle reaches the client as a broken one, not as a whole one."""
    first_a_then_b(lab, Fault(close_after_chunks=3), retries={"attempts": 3, "retryOn": "5xx,reset"})
    with lab.client.open(CHAT, b'{"messages": [1], "stream": true}') as response:
        assert response.status == 200
        with pytest.raises(http.client.IncompleteRead) as broken:
            response.read()
    assert broken.value.partial.startswith(b"data: {")
    assert b"[DONE]" not in broken.value.partial
    assert providers_asked(lab) == [A]


def test_a_client_that_goes_away_ends_the_request(lab: Lab) -> None:
    """Nobody reads on, so the provider is told, and no other one is asked."""
    with running_piecewise_server() as server:
        spec = {"tls": {"mode": "DISABLE"}, "endpoints": [{"address": "127.0.0.1", "port": server.port}]}
        first_a_then_b(lab, a=llm(A, port=443, **spec))
        server.send(b"data: 0\n\n")
        with lab.client.open(CHAT) as response:
            assert response.read1() == b"data: 0\n\n"
        lab.mesh._wait("Envoy closed the connection", lambda: stat(lab, A, "upstream_rq_active") == 0)
    assert providers_asked(lab) == []
