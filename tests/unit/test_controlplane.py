"""A mistake of ours in the middle of the way does not end the program, nor what already works."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
from google.protobuf.message import Message

from llmplane import controlplane, refusals
from llmplane.acknowledged import AcknowledgedFile
from llmplane.address import Address
from llmplane.controlplane import ControlPlane
from llmplane.sources.state import SourceState
from tests.support.control_plane import NODE, RunningControlPlane, running_control_plane
from tests.support.objects import provider
from translator.proxy import Proxy
from translator.world import MeshSettings
from xds import protos, validation
from xds.resources import CDS, LDS

ANY = Address("127.0.0.1", 0)


class ThreeStates:
    """A source of three states; it ends the program after the last one."""

    async def states(self, stop: asyncio.Event) -> AsyncIterator[SourceState]:
        for held in (1, 2, 3):
            yield SourceState(incomplete=held % 2 == 0)
        stop.set()


async def test_refusals_that_cannot_be_renewed_are_logged_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It goes on beside the source, and ends with it."""
    tried = asyncio.Semaphore(0)

    def fails(*_: object) -> None:
        tried.release()
        raise ValueError("a mistake")

    class UntilTriedTwice:
        async def states(self, stop: asyncio.Event) -> AsyncIterator[SourceState]:
            yield SourceState()
            for _ in range(2):
                await tried.acquire()
            stop.set()

    monkeypatch.setattr(controlplane, "_RENEWAL", 0.001)
    monkeypatch.setattr(ControlPlane, "_renew_once", fails)
    archive = AcknowledgedFile(tmp_path / "acknowledged.json")
    running = ControlPlane(UntilTriedTwice(), MeshSettings(), acknowledged=archive)
    with structlog.testing.capture_logs() as logs:
        async with asyncio.timeout(60):
            await running.run(ANY, ANY, asyncio.Event())
    events = [line["event"] for line in logs]
    assert events.count("refusals could not be renewed; proxies keep what they have") >= 2
    assert events[-1] == "stopped"


async def test_a_state_that_cannot_be_taken_over_is_logged_and_the_next_one_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []

    def world_of(state: SourceState, mesh: MeshSettings) -> object:
        taken.append(state)
        if len(taken) == 1:
            raise ValueError("a mistake")
        return real(state, mesh)

    real = controlplane.world_of
    control_plane = ControlPlane(ThreeStates(), MeshSettings())
    taken.clear()
    monkeypatch.setattr(controlplane, "world_of", world_of)
    with structlog.testing.capture_logs() as logs:
        await control_plane.run(ANY, ANY, asyncio.Event())
    events = [entry["event"] for entry in logs]
    assert any("could not be taken over" in event for event in events)
    assert "serving" in events, "the second state was served"


async def test_what_is_held_back_stays_a_problem_when_something_else_changes(
    running: RunningControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def violations(message: Message) -> list[str]:
        return ["too good"] if b"a.example.com" in message.SerializeToString() else []

    monkeypatch.setattr(validation, "violations", violations)
    problem = "LLMProvider default/a: outbound|443||a.example.com is held back: too good"
    async with running.proxy() as proxy:
        await proxy.request(CDS)
        for number in range(3):
            status = await running.apply(
                provider("a", "a.example.com"), provider("b", f"{number}.example.com")
            )
            assert status["problems"] == [problem]
            assert [each["state"] for each in status["objects"]] == ["Refused", "OK"]
        status = await running.apply(provider("b", "0.example.com"))
        assert status["problems"] == []


async def test_what_is_held_back_and_comes_from_no_object_is_a_problem(
    running: RunningControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def violations(message: Message) -> list[str]:
        return ["too good"] if protos.Listener.DESCRIPTOR.full_name in message.type_url else []

    monkeypatch.setattr(validation, "violations", violations)
    async with running.proxy() as proxy:
        await proxy.request(CDS)
        status = await running.apply(provider("a", "a.example.com"))
    assert status["problems"] == ["127.0.0.1_15080 is held back: too good"]


async def test_what_is_held_back_stays_at_the_proxies_that_come_with_it(
    running: RunningControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart nobody knows here what they have; only who has nothing is without it."""
    monkeypatch.setattr(validation, "violations", lambda _: ["too good"])
    await running.apply(provider("a", "a.example.com"))
    async with running.proxy() as proxy:
        for type_url, name in ((CDS, "outbound|443||a.example.com"), (LDS, "127.0.0.1_15080")):
            await proxy.request(type_url, has={name: "of-before", "gone": "of-before"})
            answer = await proxy.receive()
            assert (answer.type_url, answer.removed) == (type_url, ("gone",))
            assert name not in answer.versions
            await proxy.ack(answer)


async def test_what_was_refused_before_a_restart_is_tried_again_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was missing at the proxy may be there now. Until then it is not sent, and the status says so."""
    archive = AcknowledgedFile(tmp_path / "state" / "file.json")
    (tmp_path / "config").mkdir()
    name = "outbound|443||a.example.com"
    async with running_control_plane(tmp_path / "config", archive) as running:
        await running.apply(provider("a", "a.example.com"))
        async with running.proxy() as proxy:
            await proxy.request(CDS)
            refused = await proxy.receive()
            await proxy.nack(refused, "no such filter")
            await running.status_when(lambda status: status["problems"])
    monkeypatch.setattr(controlplane, "_RENEWAL", 0.01)
    async with running_control_plane(tmp_path / "config", archive) as running, running.proxy() as proxy:
        await proxy.request(CDS)
        closed = await proxy.receive()
        assert closed.versions[name] != refused.versions[name]
        await proxy.ack(closed)
        problems = (await running.status())["problems"]
        assert problems == [f"LLMProvider default/a: {NODE} refused {name}: no such filter"]
        monkeypatch.setattr(refusals, "COUNTS", 0)
        again = await proxy.receive()
        assert again.versions == {name: refused.versions[name]}
        await proxy.ack(again)
        await running.status_when(lambda status: not status["problems"])


async def test_what_proxies_here_refuse_is_not_forgotten_by_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that nobody refused it at has it from there, however long ago that was."""
    monkeypatch.setattr(controlplane, "_RENEWAL", 0.01)
    archive = AcknowledgedFile(tmp_path / "state" / "file.json")
    (tmp_path / "config").mkdir()
    async with running_control_plane(tmp_path / "config", archive) as running:
        await running.apply(provider("a", "a.example.com"))
        async with running.proxy() as proxy:
            await proxy.request(CDS)
            await proxy.nack(await proxy.receive(), "no such filter")
            await running.status_when(lambda status: status["problems"])
            group = Proxy.from_node(NODE, {"NAMESPACE": "default"})
            (first,) = archive.refusals(group)
            monkeypatch.setattr(refusals, "_RENEWED", 0)
            async with asyncio.timeout(60):
                while next(iter(archive.refusals(group))).since == first.since:  # noqa: ASYNC110 - nothing tells
                    await asyncio.sleep(0.01)
        (last,) = archive.refusals(group)
        assert (last.detail, last.node_id) == ("no such filter", NODE)
