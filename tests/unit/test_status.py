"""`llmplane status` in words for people, and what it is made of."""

import asyncio
import time
from typing import Any

import pytest
from structlog.testing import capture_logs

from llmplane.address import Address
from llmplane.status import StatusUnavailableError, fetch_status, format_status
from tests.support.control_plane import NODE, RunningControlPlane
from tests.support.objects import backends, gateway, provider, route, server, service
from translator.features import Feature
from xds.resources import CDS

NOW = "2026-01-01T02:00:00+00:00"
EMPTY = {"time": NOW, "revision": 1, "objects": [], "proxies": [], "problems": []}


def test_nothing_at_all() -> None:
    assert format_status(EMPTY) == "No objects.\n\nNo proxy is connected."


def of(state: str, since: str = NOW, **fields: Any) -> dict[str, Any]:
    """Return a resource type of a proxy, as far as it matters."""
    return {"state": state, "since": since, "unanswered": 0, "refused": [], "error": None, **fields}


def test_objects_proxies_and_problems() -> None:
    refused = {"detail": "Invalid path: /nowhere/ca.pem", "names": ["a", "b"], "since": NOW}
    status = {
        "time": NOW,
        "objects": [
            {
                "kind": "LLMProvider",
                "namespace": "default",
                "name": "dashscope",
                "host": "dashscope.aliyuncs.com",
                "state": "last good version",
                "programmed": "1/1",
            },
            {
                "kind": "LLMRoute",
                "namespace": "default",
                "name": "chat",
                "host": "*",
                "state": "OK",
                "programmed": "0/1",
            },
        ],
        "proxies": [
            {
                "node_id": "sidecar~127.0.0.1~sleep-1.default~default.svc.cluster.local",
                "version": "1.40.0",
                "connected_since": "2025-12-30T00:00:00+00:00",
                "missing": [],
                "types": {
                    "Cluster": of("NACK", "2026-01-01T01:55:00+00:00", refused=["a"], error=refused),
                    "Listener": of("SYNCED"),
                    "RouteConfiguration": of("STALE", "2026-01-01T01:59:48+00:00", unanswered=1),
                },
            }
        ],
        "problems": [
            "a.yaml:1: LLMProvider default/dashscope: spec.hots: unknown field, did you mean 'host'?"
        ],
    }
    assert format_status(status).splitlines() == [
        "KIND         NAMESPACE    NAME       HOST                    STATE              PROXIES",
        "LLMProvider  default      dashscope  dashscope.aliyuncs.com  last good version  1/1",
        "LLMRoute     default      chat       *                       OK                 0/1",
        "",
        "PROXY            ENVOY    CDS      LDS     RDS        SDS    CONNECTED",
        "sleep-1.default  1.40.0   NACK 5m  SYNCED  STALE 12s  -      2d",
        "",
        "NOT IN SYNC",
        "sleep-1.default: CDS NACK 5m: it keeps what it had instead of a: Invalid path: /nowhere/ca.pem",
        "sleep-1.default: RDS STALE 12s: 1 sent and not answered",
        "",
        "PROBLEMS",
        "a.yaml:1: LLMProvider default/dashscope: spec.hots: unknown field, did you mean 'host'?",
    ]


def test_types_that_few_proxies_have_are_a_column_where_one_has_them() -> None:
    proxy = {"node_id": "p", "version": "1.40.0", "connected_since": NOW, "missing": []}
    waiting = {**proxy, "types": {"ScopedRouteConfiguration": of("STALE", "2026-01-01T01:00:00+00:00")}}
    text = format_status({**EMPTY, "proxies": [waiting]})
    assert text.splitlines()[2:] == [
        "PROXY    ENVOY    CDS    LDS    RDS    SDS    SRDS      CONNECTED",
        "p        1.40.0   -      -      -      -      STALE 1h  0s",
        "",
        "NOT IN SYNC",
        "p: SRDS STALE 1h: something waits to be sent",
    ]


def test_what_an_envoy_is_too_old_for() -> None:
    text = "Envoy 1.37: fallback to another provider needs 1.39 (LLMRoute default/chat)"
    proxy = {"node_id": "p", "version": "1.37.0", "connected_since": NOW, "types": {}, "missing": [text]}
    assert format_status({**EMPTY, "proxies": [proxy]}).splitlines()[-2:] == ["TOO OLD FOR", f"p: {text}"]


# The control plane's own view, without an Envoy


async def test_an_object_says_at_which_envoys_it_does_not_do_all(running: RunningControlPlane) -> None:
    references = [{"providerHost": f"{name}.example.com", "weight": 1} for name in "ab"]
    objects = (
        *(provider(name, f"{name}.example.com") for name in "ab"),
        route("chat", "chat.example.com", {"backendRefs": references}),
    )
    await running.apply(*objects)
    text = (
        "Envoy 1.37: fallback to another provider needs 1.39; a failed request is not sent to another one, "
        "and of priorities only the first is used"
    )
    async with running.proxy((1, 37)) as old, running.proxy() as new:
        for proxy in (old, new):
            await proxy.request(CDS)
            await proxy.receive()
        status = await running.status()
        (chat,) = (item for item in status["objects"] if item["name"] == "chat")
        assert chat["state"] == "EnvoyTooOld"
        assert {"type": "Programmed", "status": False, "reason": "EnvoyTooOld", "message": text} in chat[
            "conditions"
        ]
        assert status["problems"] == [f"LLMRoute default/chat: {text}"]
        metrics = Feature.METRICS.lack_of((1, 37))
        assert sorted(proxy["missing"] for proxy in status["proxies"]) == [
            [],
            [metrics, f"{text} (LLMRoute default/chat)"],
        ]
    status = await running.status_when(lambda status: not status["proxies"])
    assert status["problems"] == [], "it is gone with the Envoy"


async def test_a_route_over_mutual_tls_says_that_a_proxy_has_no_certificate(
    running: RunningControlPlane,
) -> None:
    labels = {"istio": "egressgateway"}
    reference = {"name": "egress", "namespace": "istio-system"}
    await running.apply(
        service("istio-system/egress", labels, (80, 8080)),
        gateway("istio-system/gw", server(protocol="HTTPS", tls={"mode": "ISTIO_MUTUAL"}), selector=labels),
        route("chat", "chat.example.com", {"backendRefs": [{"backendRef": reference}]}),
    )
    async with running.proxy() as proxy:
        await proxy.request(CDS)
        await proxy.receive()
        (chat,) = (item for item in (await running.status())["objects"] if item["name"] == "chat")
    assert chat["state"] == "NoWorkloadCertificate"
    assert "llmplane proxy --workload-cert" in chat["conditions"][-1]["message"]


async def test_an_envoy_that_nobody_tested(running: RunningControlPlane) -> None:
    async with running.proxy((1, 20)) as old:
        await old.request(CDS)
        await old.receive()
        (proxy,) = (await running.status())["proxies"]
    assert proxy["missing"][0] == "anything: 1.36 is the oldest Envoy that is tested"


async def test_a_status_without_problems(running: RunningControlPlane) -> None:
    status = await running.apply(
        provider("a", "a.example.com"), "{apiVersion: v1, kind: Secret, metadata: {name: s}}"
    )
    assert status["problems"] == []
    (found,) = status["objects"]
    assert found == {
        "kind": "LLMProvider",
        "uid": None,
        "generation": None,
        "namespace": "default",
        "name": "a",
        "host": "a.example.com",
        "source": f"{running.folder}/a.yaml:1",
        "state": "OK",
        "programmed": "0/0",
        "conditions": [
            {"type": "Accepted", "status": True, "reason": "Accepted", "message": ""},
            {"type": "ResolvedRefs", "status": True, "reason": "ResolvedRefs", "message": ""},
        ],
    }


async def test_a_condition_that_is_not_met_is_a_state_and_a_problem_with_its_place(
    running: RunningControlPlane,
) -> None:
    status = await running.apply(route("r", "r.example.com", {"backendRefs": backends("a.example.com")}))
    (found,) = status["objects"]
    text = (
        "spec.rules[0].backendRefs[0].providerHost: no LLMProvider with host a.example.com in namespace "
        "default or istio-system (its share is answered 503)"
    )
    assert found["state"] == "BackendNotFound"
    assert found["conditions"][1]["message"] == text
    assert status["problems"] == [f"{running.folder}/a.yaml:1: warning: LLMRoute default/r: {text}"]


async def test_the_log_tells_what_is_new_and_what_is_solved(running: RunningControlPlane) -> None:
    with capture_logs() as logs:
        await running.apply(provider("a", "a.example.com"))
        await running.apply(provider("a", "a.example.com").replace("host", "hots"))
        await running.apply(
            provider("a", "a.example.com").replace("host", "hots"), provider("b", "b.example.com")
        )
        await running.apply(provider("a", "a.example.com"))
    events = [(log["log_level"], log["event"]) for log in logs]
    problems = {event for event in events if event[1] != "published"}
    assert problems == {
        ("error", "problem"),
        ("warning", "last good version stays in use"),
        ("info", "problem solved"),
    }
    assert events.count(("warning", "last good version stays in use")) == 1
    assert events.count(("info", "published")) == 4


async def test_what_a_proxy_acknowledged_and_refused_is_in_the_status(running: RunningControlPlane) -> None:
    await running.apply(provider("a", "a.example.com"))
    async with running.proxy() as proxy:
        await proxy.request(CDS)
        first = await proxy.receive()
        status = await running.status()
        assert status["objects"][0]["programmed"] == "0/1"
        assert status["proxies"][0]["types"]["Cluster"]["state"] == "STALE"
        await proxy.nack(first, "no such filter")
        status = await running.status_when(lambda status: status["problems"])
    refused = f"{NODE} refused outbound|443||a.example.com: no such filter"
    assert status["problems"] == [f"LLMProvider default/a: {refused}"]
    assert status["objects"][0]["state"] == "Refused"
    assert status["proxies"][0]["state"] == "NACK"
    clusters = status["proxies"][0]["types"]["Cluster"]
    assert clusters["refused"] == ["outbound|443||a.example.com"]
    assert clusters["error"]["detail"] == "no such filter"
    text = "CDS NACK 0s: it keeps what it had instead of outbound|443||a.example.com: no such filter"
    assert f"sleep.default: {text}" in format_status({**status, "time": clusters["since"]})


async def test_a_proxy_with_what_stands_in_for_a_refused_version_has_not_acknowledged_that(
    running: RunningControlPlane,
) -> None:
    """It is in sync with what it should have, which is not the newest version of the object."""
    await running.apply(provider("a", "a.example.com"), provider("b", "b.example.com"))
    async with running.proxy() as proxy:
        await proxy.request(CDS)
        await proxy.ack(await proxy.receive())
        await running.apply(provider("a", "a.example.com", path="/new"), provider("b", "b.example.com"))
        await proxy.nack(await proxy.receive(), "no such filter")
        await running.status_when(lambda status: status["problems"])
    async with running.proxy() as newcomer:
        await newcomer.request(CDS)
        await newcomer.ack(await newcomer.receive())
        status = await running.status_when(
            lambda status: [each["state"] for each in status["proxies"]] == ["SYNCED"]
        )
    assert [(each["state"], each["programmed"]) for each in status["objects"]] == [
        ("Refused", "0/1"),
        ("OK", "1/1"),
    ]


async def test_a_proxy_that_is_in_sync_says_what_it_acknowledged(running: RunningControlPlane) -> None:
    status = await running.apply(provider("a", "a.example.com"))
    assert status["objects"][0]["programmed"] == "0/0"
    async with running.proxy() as proxy:
        await proxy.request(CDS)
        answer = await proxy.receive()
        await proxy.ack(answer)
        status = await running.status_when(
            lambda status: [each["state"] for each in status["proxies"]] == ["SYNCED"]
        )
    clusters = status["proxies"][0]["types"]["Cluster"]
    assert clusters["acknowledged"] == clusters["sent"] == clusters["version"] == answer.version
    assert clusters["nonce_acknowledged"] == clusters["nonce_sent"] == answer.nonce
    assert clusters["error"] is None
    assert status["proxies"][0]["version"] == "1.40.0"


async def test_how_long_a_state_lasts_does_not_depend_on_who_looks(
    running: RunningControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    await running.apply(provider("a", "a.example.com"))
    async with running.proxy() as proxy:
        await proxy.request(CDS)
        await proxy.receive()
        state = (await running.status())["proxies"][0]["types"]["Cluster"]
        later = time.time() + 60
        monkeypatch.setattr(time, "time", lambda: later)
        assert (await running.status())["proxies"][0]["types"]["Cluster"] == state


async def test_something_else_at_the_address_is_told() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nnot json")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        with pytest.raises(StatusUnavailableError, match="no llmplane answers"):
            await asyncio.to_thread(fetch_status, address)


async def test_the_address_of_the_xds_port_is_no_admin_address() -> None:
    """A gRPC server begins with HTTP/2's settings."""

    async def settings(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        writer.close()

    async with await asyncio.start_server(settings, "127.0.0.1", 0) as server:
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        with pytest.raises(StatusUnavailableError, match=f"{address} does not speak HTTP: is it the --admin"):
            await asyncio.to_thread(fetch_status, address)
