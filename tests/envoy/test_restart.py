"""The control plane may die at any time: it is not on the way of a request, and starts where it was."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import pytest

from llmplane.address import Address
from llmplane.controlplane import ControlPlane
from llmplane.local import free_port
from llmplane.sources.state import SourceState
from llmplane.status import StatusUnavailableError, fetch_status
from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, OPENAI, Lab
from tests.support.load import running_load
from tests.support.objects import provider
from tests.support.wait import eventually
from tests.xds.client import how_it_ended, write
from tests.xds.fleet import Fleet
from translator.world import MeshSettings
from xds import protos
from xds.resources import CDS, LDS, SDS


def dashscope(model: str) -> str:
    return provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], model)


def kill(lab: Lab) -> None:
    assert lab.mesh.control_plane
    lab.mesh.control_plane.kill()
    lab.mesh.control_plane.wait()


TAKEN_IN = (
    "cluster_manager.cluster_(added|modified|removed)$"
    "|listener_manager.listener_(added|modified|removed)$"
    "|rds.*.(config_reload|update_success)$"
    "|sds.*.update_success$"
)


def updates(lab: Lab) -> dict[str, int]:
    """Return how often Envoy took in a resource, by its own counters."""
    page = json.loads(lab.envoy_admin(f"/stats?format=json&filter={TAKEN_IN}"))
    return {stat["name"]: stat["value"] for stat in page["stats"] if "name" in stat}


def reconnected(lab: Lab) -> None:
    """Wait until the sidecar is back at the control plane."""
    eventually(lambda: [proxy["state"] for proxy in lab.mesh.status()["proxies"]] == ["SYNCED"])


def test_kill_9_under_load_loses_no_request_and_a_restart_sends_nothing_again(lab: Lab) -> None:
    lab.apply(dashscope("qwen"))
    before = updates(lab)
    assert len(before) >= 8, before
    with running_load(lab.mesh.http_proxy, DASHSCOPE, ["qwen"]) as load:
        kill(lab)
        load.wait_for_more()
        lab.mesh.start_control_plane()
        reconnected(lab)
        load.wait_for_more()
    assert updates(lab) == before, "the versions are hashes of the content: Envoy has them all"


async def test_kill_9_under_load_with_many_proxies_brings_them_all_back(lab: Lab) -> None:
    """Those of the incremental variant are sent nothing; and then a stop by SIGTERM is quick."""
    await asyncio.to_thread(lab.apply, dashscope("qwen"))
    fleet = Fleet(200, node=_node, wants={CDS: (), LDS: (), SDS: ("api-key/default/dashscope",)})
    before = await asyncio.to_thread(updates, lab)

    def all_synced() -> bool:
        states = [proxy["state"] for proxy in lab.mesh.status()["proxies"]]
        return states == ["SYNCED"] * 201

    with ExitStack() as stack:
        load = await asyncio.to_thread(
            stack.enter_context, running_load(lab.mesh.http_proxy, DASHSCOPE, ["qwen"])
        )
        async with fleet.connected(str(lab.mesh.xds)):
            await fleet.until(lambda proxy: proxy.received.count(SDS) == 1)
            await asyncio.to_thread(eventually, all_synced)
            kill(lab)
            await fleet.until(lambda proxy: proxy.end is grpc.StatusCode.UNAVAILABLE)
        await asyncio.to_thread(load.wait_for_more)
        await asyncio.to_thread(lab.mesh.start_control_plane)
        async with fleet.connected(str(lab.mesh.xds)):
            await asyncio.to_thread(eventually, all_synced)
            assert {tuple(proxy.received) for proxy in fleet.members if proxy.delta} == {()}
            control_plane = lab.mesh.control_plane
            assert control_plane
            control_plane.terminate()
            assert await asyncio.to_thread(control_plane.wait, 30) == 0
            await fleet.until(lambda proxy: proxy.end is grpc.StatusCode.UNAVAILABLE)
        await asyncio.to_thread(lab.mesh.start_control_plane)
        await asyncio.to_thread(reconnected, lab)
        await asyncio.to_thread(stack.close)
    assert await asyncio.to_thread(updates, lab) == before


def _node(number: int) -> Any:
    return protos.Node(
        id=f"sidecar~127.0.0.1~simulated-{number}.default~x",
        metadata={"NAMESPACE": "default", "WORKLOAD_NAME": f"simulated-{number % 20}"},
    )


def test_edits_while_it_was_dead_are_applied_after_the_restart(lab: Lab) -> None:
    """One object changes, one is new, one is gone."""
    lab.apply(dashscope("old"), provider("openai", OPENAI, KEYS[OPENAI], "gpt"))
    with running_load(lab.mesh.http_proxy, DASHSCOPE, ["old", "new"]) as load:
        kill(lab)
        moonshot = provider("moonshot", MOONSHOT, KEYS[MOONSHOT], "kimi")
        lab.mesh.replace(lab.mesh.config / "objects.yaml", f"{dashscope('new')}\n---\n{moonshot}")
        load.wait_for_more()
        assert lab.client.request(OPENAI).json()["model"] == "gpt"
        lab.mesh.start_control_plane()
        load.wait_for("new")
    assert lab.client.request(MOONSHOT).json()["model"] == "kimi"
    eventually(lambda: lab.client.request(OPENAI).status == 404)


def test_sigterm_ends_it_with_a_sidecar_attached_and_loses_no_request(lab: Lab) -> None:
    """SIGINT does the same: tests/unit/test_cli.py."""
    lab.apply(dashscope("qwen"))
    control_plane = lab.mesh.control_plane
    assert control_plane
    with running_load(lab.mesh.http_proxy, DASHSCOPE, ["qwen"]):
        control_plane.terminate()
        assert control_plane.wait(30) == 0
        assert json.loads(lab.mesh.log("control-plane").splitlines()[-1])["event"] == "stopped"
        with pytest.raises(StatusUnavailableError, match="is `llmplane serve` running there"):
            lab.mesh.status()
        lab.mesh.start_control_plane()
        reconnected(lab)


def test_the_log_is_a_line_of_json_an_event_and_has_no_key(lab: Lab) -> None:
    lab.apply(dashscope("qwen"))
    log = lab.mesh.log("control-plane")
    for line in log[: log.rindex("\n")].splitlines():  # what follows is being written
        assert {"event", "level", "timestamp"} <= json.loads(line).keys()
    assert not [key for key in KEYS.values() if key in log]


async def test_nothing_is_served_before_the_source_was_read() -> None:
    """An empty world would take away all that a sidecar has."""
    read, stop = asyncio.Event(), asyncio.Event()

    class SlowSource:
        async def states(self, stop: asyncio.Event) -> AsyncIterator[SourceState]:
            await read.wait()
            yield SourceState()
            await stop.wait()

    xds, admin = Address("127.0.0.1", free_port()), Address("127.0.0.1", free_port())
    running = asyncio.create_task(ControlPlane(SlowSource(), MeshSettings()).run(xds, admin, stop))
    node = protos.Node(id="sidecar~127.0.0.1~a.b~b", metadata={"NAMESPACE": "default"})
    request = protos.DeltaDiscoveryRequest(type_url=CDS, node=node)
    method = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"

    async def answers() -> grpc.StatusCode | bytes:
        """Return what a proxy that connects now gets first."""
        async with grpc.aio.insecure_channel(str(xds)) as channel:
            call = channel.stream_stream(method)()
            with suppress(grpc.aio.AioRpcError):  # the server may have ended it already
                await call.wait_for_connection()
                await write(call, request.SerializeToString())
                answer = await call.read()
                if isinstance(answer, bytes):
                    return answer
            return (await how_it_ended(call))[0]

    async def ready() -> int:
        reader, writer = await asyncio.open_connection(*admin)
        writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
        status = int((await reader.readline()).split()[1])
        writer.close()
        await writer.wait_closed()
        return status

    try:
        async with asyncio.timeout(60):
            while True:
                try:
                    assert await ready() == 503
                    assert await answers() is grpc.StatusCode.UNAVAILABLE
                    break
                except OSError:
                    await asyncio.sleep(0.01)
            read.set()
            while await ready() != 200:  # noqa: ASYNC110 - it is asked over the network
                await asyncio.sleep(0.01)
            assert protos.DeltaDiscoveryResponse.FromString(await answers()).type_url == CDS
    finally:
        read.set()
        stop.set()
        await running
    with pytest.raises(StatusUnavailableError):
        fetch_status(admin)
