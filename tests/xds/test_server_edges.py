"""The server around the protocol: what it tells others, and what it does when something of its own fails."""

from collections.abc import Mapping
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from tests.xds.client import World, eventually, how_it_ended, resource, write
from xds import protos
from xds.observer import Observer
from xds.resources import CDS
from xds.server import AGGREGATED, ManagementServer, Node, Peer
from xds.snapshot import Snapshot
from xds.status import State
from xds.stream import Stream


class Doorkeeper:
    """An `xds.server.Authenticator` that lets in everybody, and counts who is there."""

    def __init__(self) -> None:
        self.inside = 0

    async def authenticate(
        self,
        peer: Peer,  # noqa: ARG002
        metadata: Mapping[str, str | bytes],  # noqa: ARG002
        node: Node,
        known: object = None,  # noqa: ARG002
    ) -> object:
        self.inside += 1
        return node.id

    def left(self, identity: object) -> None:
        assert identity
        self.inside -= 1

    def revision(self) -> object:
        return None


async def test_authenticator_is_told_of_each_stream_that_it_let_in_and_that_is_not_served() -> None:
    world, doorkeeper = World(), Doorkeeper()
    world.server = ManagementServer(world, identifier="server under test", authenticator=doorkeeper)
    world.port = await world.server.start("127.0.0.1:0")
    world.server.ready()
    try:
        async with world.delta("unwanted") as unwanted:
            await unwanted.request(CDS)
            assert await unwanted.expect_end() == (grpc.StatusCode.PERMISSION_DENIED, "not wanted here")
        async with world.delta("wanted") as wanted:
            await wanted.request(CDS)
            await wanted.expect(CDS, {})
            assert doorkeeper.inside == 1
        await eventually(lambda: doorkeeper.inside == 0)
    finally:
        await world.server.stop()


async def test_stream_ends_if_what_is_to_be_written_cannot_be_made(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client comes again; a stream that stays and on which nothing comes any more would be worse."""

    def fail(*_: Any) -> None:
        raise ArithmeticError("a mistake of ours")

    async with world.delta() as proxy:
        await proxy.subscribe(CDS, [], {})
        monkeypatch.setattr(Stream, "next_response", fail)
        with capture_logs():
            world.set(CDS, {"a": 1})
            assert (await proxy.expect_end())[0] is grpc.StatusCode.UNKNOWN
        await eventually(lambda: not world.server.proxies())


async def test_listener_is_told_of_an_answer(world: World) -> None:
    """Nothing else changes when a proxy accepts what was published."""
    async with world.delta() as proxy:
        await proxy.request(CDS)
        answer = await proxy.expect(CDS, {})
        told: list[State] = []
        world.server.on_change = lambda: told.append(world.server.proxies()[0].state)
        await proxy.ack(answer)
        await proxy.expect_nothing()
        world.server.on_change = None
        assert State.SYNCED in told


class Convergence(Observer):
    """Remembers how long changes took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def converged(self, seconds: float) -> None:
        self.seconds.append(seconds)


async def test_change_began_when_it_was_noticed_and_not_when_it_was_published(world: World) -> None:
    world.server.observer = convergence = Convergence()
    long_ago = -1_000_000.0  # of the monotonic clock
    async with world.delta() as proxy:
        await proxy.subscribe(CDS, [], {})
        snapshot = Snapshot([resource(CDS, "a")])
        world.server.publish({"mesh": snapshot}, began=long_ago)
        await proxy.ack(await proxy.expect(CDS, {"a": 1}))
        await eventually(lambda: bool(convergence.seconds))
        assert convergence.seconds[0] > -long_ago


async def test_deadline_that_passes_while_a_stream_is_looked_at_is_not_missed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What still waited at the time that was looked at needs a timer, though the time is over meanwhile."""
    looked, slept = [], []
    next_response, wake_at = Stream.next_response, Stream.wake_at

    def look(self: Any, now: float) -> Any:
        looked.append(now)
        return next_response(self, now)

    def sleep(self: Any, now: float) -> Any:
        slept.append((now, looked[-1]))
        return wake_at(self, now)

    monkeypatch.setattr(Stream, "next_response", look)
    monkeypatch.setattr(Stream, "wake_at", sleep)
    async with world.delta() as proxy:
        await proxy.subscribe(CDS, [], {})
        await proxy.expect_nothing()
    assert slept
    assert all(now == looked_at for now, looked_at in slept)


@pytest.mark.parametrize(
    ("node", "status"),
    [
        ({"id": "x" * 5000}, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ({"id": "x", "metadata": {"a": "b" * 600_000}}, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ({"id": "x", "metadata": {"a": float("nan")}}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
    ids=["id", "metadata", "no number"],
)
async def test_node_is_bounded_before_anybody_knows_whose_it_is(
    world: World, node: dict[str, Any], status: grpc.StatusCode
) -> None:
    """Else what a client says of itself would be written to the log whole."""
    request = protos.DeltaDiscoveryRequest(type_url=CDS, node=protos.Node(**node))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{world.port}") as channel:
        call = channel.stream_stream(f"/{AGGREGATED}/DeltaAggregatedResources")()
        with capture_logs() as logs:
            await write(call, request.SerializeToString())
            assert (await how_it_ended(call))[0] is status
    assert max(len(str(line)) for line in [*logs, ""]) < 1000
