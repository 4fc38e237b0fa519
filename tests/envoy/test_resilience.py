"""A failing provider takes nothing else down: ejection, limits of requests and connections, time limits.

What moves a request on to the next provider is in test_fallback.py; here is what bounds the damage.
"""

import json
import re
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from http.client import IncompleteRead
from typing import Any

import openai
import pytest

from llmplane.fakellm import Fault
from llmplane.local import free_port
from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, Lab
from tests.support.client import MESSAGES, Answer
from tests.support.objects import backends, provider, route
from tests.support.stream import running_piecewise_server
from tests.support.wait import eventually
from translator.features import Feature

CHAT = "chat.example.com"
A, B = DASHSCOPE, MOONSHOT
FALLBACK = pytest.mark.needs(Feature.FALLBACK)
STREAM = b'{"messages": [1], "stream": true}'
SOON = "2s"
"""A time limit that who is not asked to be late keeps, also on a machine that is busy."""


def llm(host: str, **spec: Any) -> str:
    """Return a provider of the fake LLM."""
    return provider(host.partition(".")[0], host, KEYS[host], **spec)


def pool(**members: Any) -> dict[str, Any]:
    return {"trafficPolicy": {"connectionPool": members}}


def outliers(**members: Any) -> dict[str, Any]:
    """Return outlier detection after three failures; who is ejected stays so unless a test says otherwise."""
    default = {"consecutive5xxErrors": 3, "interval": "100ms", "baseEjectionTime": "300s"}
    return {"trafficPolicy": {"outlierDetection": {**default, **members}}}


def first_a_then_b(lab: Lab, fault: Fault | None = None, **rule: Any) -> None:
    """Route to A, and to B when A fails; `a` adds to the provider A."""
    a = rule.pop("a", {})
    ordered = [{"providerHost": A}, {"providerHost": B, "priority": 1}]
    lab.apply(llm(A, **a), llm(B), route("chat", CHAT, {"backendRefs": ordered, **rule}))
    lab.fake.set_fault(A, fault)


def only_a(lab: Lab, fault: Fault | None = None, a: dict[str, Any] | None = None, **rule: Any) -> None:
    lab.apply(llm(A, **(a or {})), llm(B), route("chat", CHAT, {"backendRefs": backends(A), **rule}))
    lab.fake.set_fault(A, fault)


def providers_asked(lab: Lab) -> list[str]:
    """Return the providers that saw a request since the last look, in order."""
    return [seen.provider for seen in lab.all_seen()]


def stat(lab: Lab, host: str, name: str) -> int:
    """Return a statistic of a provider's cluster."""
    (line,) = lab.envoy_admin(f"/stats?filter=outbound.443..{host}.{name}$").splitlines()
    return int(line.rpartition(" ")[2])


def load(lab: Lab, requests: int, host: str = CHAT) -> list[Answer]:
    """Send requests, eight at a time."""
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda _: lab.client.request(host), range(requests)))


@contextmanager
def held(lab: Lab, requests: int = 1) -> Iterator[list[socket.socket]]:
    """Hold requests open that A has seen and does not answer; they end with the block."""
    lab.fake.set_fault(A, Fault(delay=600, times=requests))
    connections = [sent(lab) for _ in range(requests)]
    try:
        lab.mesh._wait("A has them", lambda: providers_asked_of(lab, A) == requests)
        lab.fake.forget()
        yield connections
    finally:
        for connection in connections:
            connection.close()


def sent(lab: Lab) -> socket.socket:
    """Send a request and do not wait for the answer."""
    connection = socket.create_connection((lab.mesh.bind_address, 15080))
    head = f"POST http://{CHAT}/ HTTP/1.1\r\nHost: {CHAT}\r\nContent-Length: {len(MESSAGES)}\r\n\r\n"
    connection.sendall(head.encode() + MESSAGES)
    return connection


def providers_asked_of(lab: Lab, host: str) -> int:
    return sum(seen.provider == host for seen in lab.fake.seen)


def assert_overloaded(answers: list[Answer]) -> None:
    for answer in answers:
        assert (answer.status, answer.error["code"]) == (503, "overloaded")
        assert answer.headers["retry-after"] == "1", "an SDK comes back when it is told to"


# Outlier detection


@FALLBACK
@pytest.mark.parametrize("status", [429, 500, 503])
def test_under_load_a_failing_provider_is_soon_left_alone(lab: Lab, status: int) -> None:
    """No client sees a failure, and the provider gets a rest: also the one that says 429."""
    first_a_then_b(lab, Fault(status=status), a=outliers())
    assert {answer.status for answer in load(lab, 40)} == {200}
    lab.mesh._wait("Envoy ejected A", lambda: "failed_outlier_check" in lab.envoy_admin("/clusters"))
    lab.fake.forget()
    assert {answer.status for answer in load(lab, 40)} == {200}
    assert set(providers_asked(lab)) == {B}


@FALLBACK
def test_429_need_not_count(lab: Lab) -> None:
    first_a_then_b(lab, Fault(status=429), a=outliers(count429=False))
    for _ in range(8):
        assert lab.client.request(CHAT).status == 200
    assert providers_asked(lab) == [A, B] * 8


def test_what_the_client_did_wrong_does_not_count(lab: Lab) -> None:
    only_a(lab, Fault(status=400), outliers())
    for _ in range(8):
        assert lab.client.request(CHAT).status == 400
    assert providers_asked(lab) == [A] * 8


@FALLBACK
@pytest.mark.parametrize(("status", "is_ejected"), [(503, True), (500, False), (429, False)])
def test_gateway_errors_can_be_counted_alone(lab: Lab, status: int, *, is_ejected: bool) -> None:
    policy = outliers(consecutive5xxErrors=0, consecutiveGatewayErrors=3)
    first_a_then_b(lab, Fault(status=status), a=policy)
    for _ in range(8):
        assert lab.client.request(CHAT).status == 200
    if is_ejected:
        lab.mesh._wait("Envoy ejected A", lambda: "failed_outlier_check" in lab.envoy_admin("/clusters"))
    else:
        assert providers_asked(lab) == [A, B] * 8
        assert "failed_outlier_check" not in lab.envoy_admin("/clusters")


@FALLBACK
def test_a_provider_that_is_well_again_comes_back(lab: Lab) -> None:
    first_a_then_b(lab, Fault(status=429), a=outliers(baseEjectionTime="100ms"))
    load(lab, 8)
    ejections = "outlier_detection.ejections_enforced_total"
    lab.mesh._wait("Envoy ejected A", lambda: stat(lab, A, ejections) > 0)
    lab.fake.set_fault(A, None)
    lab.fake.forget()
    lab.mesh._wait("A answers", lambda: load(lab, 1) and A in providers_asked(lab))


@FALLBACK
def test_a_provider_that_is_silent_is_ejected_too(lab: Lab) -> None:
    first_a_then_b(lab, Fault(delay=600), a=outliers(), firstTokenTimeout=SOON)
    assert {answer.status for answer in load(lab, 8)} == {200}
    lab.mesh._wait("Envoy ejected A", lambda: "failed_outlier_check" in lab.envoy_admin("/clusters"))
    lab.fake.forget()
    assert lab.client.request(CHAT).status == 200
    assert providers_asked(lab) == [B]


# How much one provider may take


def test_requests_over_the_limit_are_refused_at_once_and_others_go_on(lab: Lab) -> None:
    """A provider that hangs holds two requests, not all that there is."""
    only_a(lab, a=pool(http={"http2MaxRequests": 2}))
    with held(lab, 2):
        assert_overloaded(load(lab, 20))
        assert {answer.status for answer in load(lab, 20, host=B)} == {200}
        assert set(providers_asked(lab)) == {B}
    lab.mesh._wait("A has room again", lambda: lab.client.request(CHAT).status == 200)


def test_the_limit_is_no_failure_that_moves_on(lab: Lab) -> None:
    """Envoy never retries what a circuit breaker refused, not even on another cluster."""
    first_a_then_b(lab, a=pool(http={"http2MaxRequests": 1}))
    with held(lab):
        assert_overloaded(load(lab, 1))
    assert providers_asked(lab) == []


def test_requests_can_wait_for_a_connection(lab: Lab) -> None:
    only_a(lab, a=pool(tcp={"maxConnections": 1}, http={"http1MaxPendingRequests": 1}))
    with held(lab) as (first,), sent(lab) as waiting:
        lab.mesh._wait("one waits", lambda: stat(lab, A, "upstream_rq_pending_active") == 1)
        assert_overloaded(load(lab, 4))
        first.close()
        assert waiting.recv(12) == b"HTTP/1.1 200"
    assert providers_asked(lab) == [A]


@FALLBACK
def test_retries_over_the_limit_are_not_made(lab: Lab) -> None:
    """The client gets the failure itself; a broken provider does not double the load of the next."""
    first_a_then_b(lab, Fault(status=503), a=pool(http={"maxRetries": 1}))
    lab.fake.set_fault(B, Fault(delay=600, times=1))
    with sent(lab):
        lab.mesh._wait("one is retried", lambda: providers_asked_of(lab, B) == 1)
        answers = load(lab, 8)
    assert {answer.status for answer in answers} == {503}
    assert {answer.error["message"] for answer in answers} == {"A fault that was asked for: 503."}
    assert providers_asked(lab).count(B) == 1


def test_the_openai_sdk_gets_through_as_soon_as_there_is_room(lab: Lab) -> None:
    """It waits as long as `retry-after` says, and asks again."""
    only_a(lab, a=pool(http={"http2MaxRequests": 1}))
    with (
        openai.DefaultHttpxClient(proxy=lab.mesh.http_proxy, trust_env=False) as http_client,
        openai.OpenAI(api_key="none", base_url=f"http://{CHAT}/v1", http_client=http_client) as client,
        ThreadPoolExecutor(1) as threads,
        held(lab) as (first,),
    ):
        answer = threads.submit(
            client.chat.completions.create, model="m", messages=[{"role": "user", "content": "Hi"}]
        )
        overflow = "upstream_rq_(active|pending)_overflow: 1$"  # before Envoy 1.38 the second one
        stats = f"/stats?usedonly&filter=outbound.443..{A}"
        lab.mesh._wait("one is refused", lambda: re.search(overflow, lab.envoy_admin(stats), re.MULTILINE))
        first.close()
        assert answer.result().choices[0].message.content
    assert providers_asked(lab) == [A]


@FALLBACK
def test_a_provider_that_does_not_finish_connecting(lab: Lab) -> None:
    """It takes the connection, and says nothing to the TLS handshake."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = {"address": "127.0.0.1", "port": silent.getsockname()[1]}
        first_a_then_b(lab, a={**pool(tcp={"connectTimeout": "100ms"}), "endpoints": [endpoint]})
        assert lab.client.request(CHAT).status == 200
    assert providers_asked(lab) == [B]


def test_a_connection_without_requests_is_closed(lab: Lab) -> None:
    only_a(lab, a=pool(http={"idleTimeout": "100ms"}))
    assert lab.client.request(CHAT).status == 200
    lab.mesh._wait("it is closed", lambda: stat(lab, A, "upstream_cx_active") == 0)
    assert stat(lab, A, "upstream_cx_idle_timeout") == 1


# A judge that is not ours: https://pypi.org/project/llmock/, where it is installed (`llmock` in PATH)


LLMOCK = shutil.which("llmock")


class Judge:
    """A fake provider that says of its client what it did wrong."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, path: str, data: Any = None) -> Any:
        url = f"http://127.0.0.1:{self.port}/_llmock/{path}"
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(url, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as response:  # noqa: S310 - http
            return json.load(response)

    def verdict(self) -> tuple[int, list[str]]:
        """Return how many requests there were, and the faults it found."""
        found = self.ask("verdict")
        return found["attempts"], [finding["code"] for finding in found["findings"]]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    assert LLMOCK
    port = free_port()
    command = [LLMOCK, "serve", "--port", str(port), "--log-level", "error"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: listens(port))
            yield Judge(port)
        finally:
            process.terminate()


@pytest.mark.skipif(LLMOCK is None, reason="needs llmock in PATH")
@pytest.mark.parametrize(
    ("fault", "status", "attempts"),
    [
        ({"type": "fail", "status": 429, "retry_after": 1, "times": 2}, 200, 3),
        ({"type": "fail", "status": 503, "times": 2}, 200, 3),
        ({"type": "fail", "status": 400}, 400, 1),
        ({"type": "stream_fault", "kind": "stall", "stall_seconds": 5}, 200, 1),
    ],
    ids=["Retry-After", "503", "400", "stall"],
)
def test_an_independent_judge_finds_no_fault(
    lab: Lab, judge: Judge, fault: dict[str, Any], status: int, attempts: int
) -> None:
    a = {"port": 443, "tls": {"mode": "DISABLE"}, "endpoints": [{"address": "127.0.0.1", "port": judge.port}]}
    only_a(lab, a=a, retries={"attempts": 2}, streamIdleTimeout=SOON)
    judge.ask("reset", {})
    judge.ask("scenario", {"behaviors": [fault]})
    question = b'{"messages": [{"role": "user", "content": "Hi"}], "stream": %b}'
    streams = fault["type"] == "stream_fault"
    with lab.client.open(CHAT, question % (b"true" if streams else b"false")) as response:
        assert response.status == status
        with pytest.raises(IncompleteRead) if streams else nullcontext():
            response.read()
    assert judge.verdict() == (attempts, [])


# Bodies


def body(size: int) -> bytes:
    made = b'{"messages": "%b"}' % (b"x" * (size - 16))
    assert len(made) == size
    return made


def sent_in_chunks(lab: Lab, data: bytes, host: str = CHAT, path: str = "/") -> Answer:
    head = (
        f"POST http://{host}{path} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n"
        f"{len(data):x}\r\n"
    )
    return lab.client.raw(head.encode() + data + b"\r\n0\r\n\r\n")


@pytest.mark.parametrize("host", [CHAT, A], ids=["by a route", "without a route"])
@pytest.mark.parametrize("limit", [1000, 2_000_000])
def test_a_body_over_the_limit_of_the_provider(lab: Lab, limit: int, host: str) -> None:
    """To the byte, however it is sent, and whatever the provider's own members add to it."""
    lab.apply(llm(A, maxRequestBytes=limit), route("chat", CHAT, {"backendRefs": backends(A)}))
    assert lab.client.request(host, body(limit)).status == 200
    assert sent_in_chunks(lab, body(limit), host).status == 200
    assert len(lab.all_seen()) == 2
    for answer in (lab.client.request(host, body(limit + 1)), sent_in_chunks(lab, body(limit + 1), host)):
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
        assert answer.error["message"] == f"The request body is larger than {limit} bytes."
    assert lab.all_seen() == ()


def test_a_body_that_envoy_itself_refuses(lab: Lab) -> None:
    """It stops reading where no provider of the rule would take more."""
    only_a(lab, a={"maxRequestBytes": 1000})
    answer = sent_in_chunks(lab, body(8_000_000))
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert answer.error["message"] == "The request body is larger than 1000 bytes."


def test_a_limit_above_the_default(lab: Lab) -> None:
    only_a(lab, a={"maxRequestBytes": 36_000_000})
    assert lab.client.request(CHAT, body(35_000_000)).status == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_nobody_reads_is_bounded_too(lab: Lab, *, chunked: bool) -> None:
    upload = {"maxRequestBytes": 1000, "operations": [{"path": "/files"}]}
    only_a(lab, a=upload)
    headers = {"content-type": "application/octet-stream"}

    def sent(data: bytes) -> Answer:
        if chunked:
            return sent_in_chunks(lab, data, path="/v1/files")
        return lab.client.request(CHAT, data, headers, path="/v1/files")

    sent(b"x" * 1000)
    assert len(lab.all_seen()) == 1
    answer = sent(b"x" * 1001)
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert lab.all_seen() == ()


# Silence


FIRST_TOKEN = pytest.mark.parametrize(
    "limits",
    [
        {"firstTokenTimeout": SOON},
        {"streamIdleTimeout": SOON},
        {"firstTokenTimeout": SOON, "streamIdleTimeout": "20s"},
    ],
    ids="+".join,
)


@FALLBACK
@FIRST_TOKEN
def test_a_provider_that_does_not_begin_to_answer(lab: Lab, limits: dict[str, str]) -> None:
    first_a_then_b(lab, Fault(delay=600), **limits)
    assert {answer.status for answer in load(lab, 8)} == {200}
    asked = providers_asked(lab)
    assert (asked.count(A), asked.count(B)) == (8, 8)


@FIRST_TOKEN
def test_without_another_provider_silence_is_a_504(lab: Lab, limits: dict[str, str]) -> None:
    only_a(lab, Fault(delay=600), **limits)
    answer = lab.client.request(CHAT)
    assert (answer.status, answer.error["code"]) == (504, "timeout")
    assert providers_asked(lab) == [A], "who asked for no retries is not billed twice"


def test_an_answer_that_began_in_time_may_take_long(lab: Lab) -> None:
    only_a(lab, Fault(chunks=4, chunk_delay=0.4), firstTokenTimeout=SOON, streamIdleTimeout=SOON)
    assert lab.client.request(CHAT, STREAM).body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "limits",
    [{"streamIdleTimeout": SOON}, {"firstTokenTimeout": SOON, "streamIdleTimeout": SOON}],
    ids="+".join,
)
def test_an_answer_that_falls_silent_is_broken_off(lab: Lab, limits: dict[str, str]) -> None:
    """It was sent in part, so nobody else can take over, and the client must not take it for a whole one."""
    first_a_then_b(lab, Fault(chunks=3, chunk_delay=600), **limits)
    with pytest.raises(IncompleteRead) as broken:
        lab.client.request(CHAT, STREAM)
    assert broken.value.partial.startswith(b"data: {")
    assert providers_asked(lab) == [A]


def test_headers_are_the_beginning_of_an_answer(lab: Lab) -> None:
    """Envoy passes them on at once: a server that sends them early is only held by the silence after them."""
    with running_piecewise_server() as server:
        endpoint = {"address": "127.0.0.1", "port": server.port}
        a = {"port": 443, "tls": {"mode": "DISABLE"}, "endpoints": [endpoint]}
        first_a_then_b(lab, a=a, firstTokenTimeout=SOON, streamIdleTimeout="3s")
        with lab.client.open(CHAT, STREAM) as response:
            assert response.status == 200
            with pytest.raises(IncompleteRead):
                response.read()
    assert providers_asked(lab) == []
