"""`llmplane status` in words for people, and what it is made of."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from llmplane.address import Address
from llmplane.admin import AdminServer
from llmplane.controlplane import ControlPlane
from llmplane.local import free_port
from llmplane.sources.files import FileSource
from llmplane.status import StatusUnavailableError, fetch_status, format_status
from tests.support.objects import backends, provider, route
from translator.world import MeshSettings
from xds import protos
from xds.resources import CDS

EMPTY = {"revision": 1, "objects": [], "proxies": [], "problems": []}


def test_nothing_at_all() -> None:
    assert format_status(EMPTY) == "No objects.\n\nNo proxy is connected."


def test_objects_proxies_and_problems() -> None:
    synced = {"state": "SYNCED"}
    status = {
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
                "connected_since": "2026-01-01T00:00:00+00:00",
                "types": {
                    "Cluster": {"state": "NACK"},
                    "Listener": synced,
                    "RouteConfiguration": {"state": "STALE"},
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
        "PROXY            ENVOY    CDS    LDS     RDS    SDS    CONNECTED SINCE",
        "sleep-1.default  1.40.0   NACK   SYNCED  STALE  -      2026-01-01T00:00:00+00:00",
        "",
        "PROBLEMS",
        "a.yaml:1: LLMProvider default/dashscope: spec.hots: unknown field, did you mean 'host'?",
    ]


# The control plane's own view, without an Envoy


class Running:
    """A control plane on files, and a proxy that is a few lines of gRPC."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.admin = Address("127.0.0.1", free_port())
        self.xds = Address("127.0.0.1", free_port())
        self._revision = 0

    async def status(self) -> dict[str, Any]:
        return await asyncio.to_thread(fetch_status, self.admin)

    async def apply(self, *documents: str) -> dict[str, Any]:
        """Write the objects, and return the status with them."""
        before = (await self.status())["revision"]
        new = self.folder / ".new"
        new.write_text("\n---\n".join(documents) or "# none\n")
        new.replace(self.folder / "a.yaml")
        async with asyncio.timeout(20):
            while (status := await self.status())["revision"] == before:  # noqa: ASYNC110 - asked over the network
                await asyncio.sleep(0.01)
        return status


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    running, stop = Running(tmp_path), asyncio.Event()
    control_plane = ControlPlane(FileSource([tmp_path], {}), MeshSettings())
    task = asyncio.create_task(control_plane.run(running.xds, running.admin, stop))
    async with asyncio.timeout(20):
        while True:
            try:
                if (await running.status())["revision"]:
                    break
            except StatusUnavailableError:
                await asyncio.sleep(0.01)
    yield running
    stop.set()
    await task


async def test_a_status_without_problems(running: Running) -> None:
    status = await running.apply(
        provider("a", "a.example.com"), "{apiVersion: v1, kind: Secret, metadata: {name: s}}"
    )
    assert status["problems"] == []
    (found,) = status["objects"]
    assert found == {
        "kind": "LLMProvider",
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


async def test_a_condition_that_is_not_met_is_a_state_and_a_problem_with_its_place(running: Running) -> None:
    status = await running.apply(route("r", "r.example.com", {"backendRefs": backends("a.example.com")}))
    (found,) = status["objects"]
    text = (
        "spec.rules[0].backendRefs[0].providerHost: no LLMProvider with host a.example.com in namespace "
        "default or istio-system (its share is answered 503)"
    )
    assert found["state"] == "BackendNotFound"
    assert found["conditions"][1]["message"] == text
    assert status["problems"] == [f"{running.folder}/a.yaml:1: warning: LLMRoute default/r: {text}"]


async def test_the_log_tells_what_is_new_and_what_is_solved(running: Running) -> None:
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


async def test_what_a_proxy_acknowledged_and_refused_is_in_the_status(running: Running) -> None:
    await running.apply(provider("a", "a.example.com"))
    node = protos.Node(id="sidecar~127.0.0.1~sleep.default~x", metadata={"NAMESPACE": "default"})
    method = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
    async with grpc.aio.insecure_channel(str(running.xds)) as channel:
        call = channel.stream_stream(method)()

        async def send(**fields: object) -> None:
            await call.write(protos.DeltaDiscoveryRequest(type_url=CDS, **fields).SerializeToString())

        await send(node=node)
        first = protos.DeltaDiscoveryResponse.FromString(await call.read())
        status = await running.status()
        assert status["objects"][0]["programmed"] == "0/1"
        await send(response_nonce=first.nonce, error_detail={"code": 3, "message": "no such filter"})
        async with asyncio.timeout(20):
            while not (status := await running.status())["problems"]:  # noqa: ASYNC110 - asked over the network
                await asyncio.sleep(0.01)
        call.cancel()
    refused = "sidecar~127.0.0.1~sleep.default~x refused outbound|443||a.example.com: no such filter"
    assert status["problems"] == [f"LLMProvider default/a: {refused}"]
    assert status["objects"][0]["state"] == "Refused"
    assert status["proxies"][0]["state"] == "NACK"


# The admin endpoints


async def test_the_admin_endpoints() -> None:
    ready = False
    server = AdminServer(lambda: EMPTY, lambda: ready)
    address = await server.start(Address("127.0.0.1", 0))

    async def get(path: str) -> tuple[int, str]:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        return int(head.split()[1]), body

    try:
        assert await get("/healthz") == (200, "ok\n")
        assert await get("/readyz") == (503, "the sources were not read yet\n")
        ready = True
        assert await get("/readyz") == (200, "ok\n")
        assert json.loads((await get("/debug/status"))[1]) == EMPTY
        assert (await get("/"))[0] == 404
        assert await asyncio.to_thread(fetch_status, address) == EMPTY
    finally:
        await server.stop()
    with pytest.raises(StatusUnavailableError, match=f"no llmplane answers at {address}"):
        await asyncio.to_thread(fetch_status, address)


async def test_something_else_at_the_address_is_told(unused_tcp_port: int) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nnot json")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", unused_tcp_port):
        with pytest.raises(StatusUnavailableError, match="no llmplane answers"):
            await asyncio.to_thread(fetch_status, Address("127.0.0.1", unused_tcp_port))
