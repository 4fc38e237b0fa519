"""The server around the protocol: who is let in, how it ends, hostile and slow clients (X checks)."""
# ruff: noqa: N802 - the numbers in the names are those of the list of checks

import asyncio
import gc
import os
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import grpc
import pytest

from tests.xds.client import TIMEOUT, Proxy, World, eventually, resource, resources, write
from tests.xds.wire import running_wire
from xds import protos, server
from xds.resources import CDS, ECDS, EDS, LDS, PUSH_ORDER, RDS, SDS, Resource
from xds.server import AGGREGATED, ManagementServer
from xds.snapshot import Snapshot
from xds.status import State
from xds.stream import MAX_TYPES

METHODS = [f"/{AGGREGATED}/{method}AggregatedResources" for method in ("Stream", "Delta")]
both_methods = pytest.mark.parametrize("method", METHODS)


async def test_X1_node_in_the_first_message_is_enough(world: World) -> None:
    """And another node in a later message changes nothing: the stream belongs to the first."""
    world.set(CDS, {"a": 1})
    world.set(CDS, {"b": 1}, group="other")
    async with world.delta() as proxy:
        await proxy.subscribe(CDS, [], {"a": 1})
        request = protos.DeltaDiscoveryRequest(type_url=CDS, resource_names_subscribe=["b"])
        request.node.id, request.node.cluster = "other", "other"
        await proxy.send(request)
        await proxy.expect(CDS, {}, removed=["b"])


async def test_X1_node_in_the_first_message_is_enough_in_state_of_the_world(world: World) -> None:
    world.set(CDS, {"a": 1})
    world.set(EDS, {"e": 1}, group="other")
    async with world.sotw() as proxy:
        await proxy.subscribe(CDS, [], {"a": 1})
        request = protos.DiscoveryRequest(type_url=EDS, resource_names=["e"])
        request.node.id, request.node.cluster = "other", "other"
        await proxy.send(request)
        await proxy.expect_nothing()


@pytest.mark.parametrize("variant", ["delta", "sotw"])
async def test_X2_cluster_is_made_before_the_route_moves_and_broken_after(world: World, variant: str) -> None:
    """In one publication a route moves from `old` to `new`: each step waits for the ACK of the one before."""
    world.publish(resource(CDS, "old"), resource(RDS, "routes"))
    async with getattr(world, variant)() as proxy:
        await proxy.subscribe(CDS, [], {"old": 1})
        await proxy.subscribe(RDS, ["routes"], {"routes": 1})
        await proxy.expect_nothing()
        world.publish(resource(CDS, "new"), resource(RDS, "routes", 2))
        full = variant == "sotw"
        added = await proxy.expect(CDS, {"old": 1, "new": 1} if full else {"new": 1})
        await proxy.expect_nothing()
        await proxy.ack(added)
        moved = await proxy.expect(RDS, {"routes": 2})
        await proxy.expect_nothing()
        await proxy.ack(moved)
        await proxy.ack(await proxy.expect(CDS, {"new": 1} if full else {}, removed=[] if full else ["old"]))
        await proxy.expect_nothing()


@pytest.mark.parametrize("variant", ["delta", "sotw"])
async def test_X2_types_are_pushed_in_the_order_of_their_references(world: World, variant: str) -> None:
    world.publish(*(resource(type_url, "a") for type_url in PUSH_ORDER))
    async with getattr(world, variant)() as proxy:
        for type_url in reversed(PUSH_ORDER):
            await proxy.subscribe(type_url, ["a"], {"a": 1})
        await proxy.expect_nothing()
        world.publish(*(resource(type_url, "a", 2) for type_url in PUSH_ORDER))
        assert [(await proxy.receive()).type_url for _ in PUSH_ORDER] == list(PUSH_ORDER)


@pytest.mark.parametrize("variant", ["delta", "sotw"])
async def test_routes_go_before_the_filters_that_guard_them_where_a_snapshot_says_so(
    world: World, variant: str
) -> None:
    """And filters before routes else: no route is open without them."""
    world.publish(resource(ECDS, "a"), resource(RDS, "a"))
    async with getattr(world, variant)() as proxy:
        for type_url in (ECDS, RDS):
            await proxy.subscribe(type_url, ["a"], {"a": 1})
        for content, routes_first in ((2, True), (3, False), (4, True)):
            changed = [resource(type_url, "a", content) for type_url in (ECDS, RDS)]
            world.server.publish({"mesh": Snapshot(changed, routes_first=routes_first)})
            received = [await proxy.receive() for _ in changed]
            assert [each.type_url for each in received] == ([RDS, ECDS] if routes_first else [ECDS, RDS])
            for each in received:
                await proxy.ack(each)


async def test_X3_key_rotation_is_a_secret_and_nothing_else(world: World) -> None:
    world.publish(resource(CDS, "a"), resource(SDS, "key"))
    async with world.delta() as proxy:
        await proxy.subscribe(CDS, [], {"a": 1})
        await proxy.subscribe(SDS, ["key"], {"key": 1})
        world.publish(resource(CDS, "a"), resource(SDS, "key", 2))
        await proxy.ack(await proxy.expect(SDS, {"key": 2}))
        await proxy.expect_nothing()


async def test_X6_sixty_thousand_initial_versions_are_taken(world: World) -> None:
    """That request is larger than the 4 MB that gRPC takes if nobody says otherwise."""
    known = {f"outbound|443||provider-{number}.example.com": "0123456789abcdef" for number in range(60_000)}
    world.set(CDS, {"a": 1})
    async with world.delta() as proxy:
        await proxy.request(CDS, has=known)
        await proxy.expect(CDS, {"a": 1}, removed=known)


@pytest.mark.parametrize("variant", ["delta", "sotw"])
async def test_X6_response_of_many_megabytes_passes(world: World, variant: str) -> None:
    large = Resource.of(
        protos.Secret(name="a", generic_secret={"secret": {"inline_bytes": bytes(40_000_000)}})
    )
    world.publish(large)
    async with getattr(world, variant)() as proxy:
        await proxy.subscribe(SDS, ["a"], [large])


@both_methods
async def test_X8_nothing_is_served_before_the_world_is_complete(method: str) -> None:
    """An empty world would remove what is in use (istio#25495)."""
    world = World()
    world.port = await world.server.start("127.0.0.1:0")
    async with world.delta(method=method) as proxy:
        status, _ = await proxy.expect_end()
        assert status is grpc.StatusCode.UNAVAILABLE
    world.server.ready()
    async with world.delta() as proxy:
        await proxy.subscribe(CDS, [], {})
    await world.server.stop()


async def test_X9_connections_end_after_a_long_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that proxies spread over replicas again; a proxy that comes back is sent nothing that it has."""
    ages = (("grpc.max_connection_age_ms", 100), ("grpc.max_connection_age_grace_ms", 100))
    options = [(name, value) for name, value in server.OPTIONS if name not in dict(ages)]
    assert len(options) == len(server.OPTIONS) - len(ages)
    monkeypatch.setattr(server, "OPTIONS", (*options, *ages))
    replica = World()
    replica.port = await replica.server.start("127.0.0.1:0")
    replica.server.ready()
    replica.set(CDS, {"a": 1})
    async with replica.delta() as proxy:
        await proxy.subscribe(CDS, [], {"a": 1})
        await proxy.expect_end()
    async with replica.delta() as proxy:
        await proxy.request(CDS, has=[resource(CDS, "a")])
        await proxy.expect(CDS, {})
    await replica.server.stop()


@pytest.mark.parametrize("variant", ["delta", "sotw"])
async def test_X10_stop_ends_the_streams_and_does_not_wait_for_them(world: World, variant: str) -> None:
    async with getattr(world, variant)() as proxy:
        await proxy.subscribe(CDS, [], {})
        async with asyncio.timeout(TIMEOUT):
            await world.server.stop()
        assert await proxy.expect_end() == (grpc.StatusCode.UNAVAILABLE, "stopping")
    assert world.server.proxies() == []


async def test_X11_source_decides_who_is_served(world: World) -> None:
    async with world.delta(node_id="unwanted guest") as proxy:
        await proxy.request(CDS)
        assert await proxy.expect_end() == (grpc.StatusCode.PERMISSION_DENIED, "not wanted here")
    assert world.server.proxies() == []


async def test_X12_status_tells_what_each_proxy_was_sent_and_refused(world: World) -> None:
    changes = []
    world.server.on_change = lambda: changes.append(world.server.proxies())
    world.publish(resource(CDS, "a"), resource(CDS, "b"))

    def clusters() -> State:
        (status,) = world.server.proxies()
        return status.types[CDS].state

    async with world.delta("sidecar-1") as proxy:
        await proxy.request(CDS)
        answer = await proxy.expect(CDS, {"a": 1, "b": 1})
        assert clusters() is State.STALE
        await proxy.ack(answer)
        await proxy.expect_nothing()
        assert clusters() is State.SYNCED
        world.publish(resource(CDS, "a", 2), resource(CDS, "b"))
        await proxy.nack(await proxy.expect(CDS, {"a": 2}), "x" * 5000)
        await proxy.expect_nothing()
        (status,) = world.server.proxies()
        assert (status.node_id, status.group, status.delta, status.state) == (
            "sidecar-1",
            "mesh",
            True,
            State.NACK,
        )
        error = status.types[CDS].error
        assert error is not None
        assert (error.names, error.detail, status.types[CDS].refused) == (("a",), "x" * 1024, ("a",))
        (refusal,) = world.server.refusals()
        assert (refusal.type_url, refusal.name, refusal.node_id) == (CDS, "a", "sidecar-1")
        assert world.server.groups() == ["mesh"]
    async with world.delta() as proxy:
        await proxy.subscribe(CDS, [], {"a": 1, "b": 1})
    assert changes


async def test_X13_ack_of_one_proxy_is_not_that_of_another(world: World) -> None:
    world.set(CDS, {"a": 1})
    async with world.delta("one") as one, world.delta("other") as other:
        await one.subscribe(CDS, [], {"a": 1})
        await other.request(CDS)
        await other.expect(CDS, {"a": 1})
        await one.expect_nothing()
        assert [proxy.types[CDS].state for proxy in world.server.proxies()] == [State.SYNCED, State.STALE]


async def test_groups_are_apart(world: World) -> None:
    """One sees nothing of the other, and its quarantine does not reach there."""
    world.set(CDS, {"a": 1}, group="one")
    world.set(CDS, {"a": 1, "b": 1}, group="other")
    async with world.delta(cluster="one") as one, world.delta(cluster="other") as other:
        await one.request(CDS)
        await one.nack(await one.expect(CDS, {"a": 1}))
        await one.expect_nothing()
        await other.subscribe(CDS, [], {"a": 1, "b": 1})
        assert [refusal.group for refusal in world.server.refusals()] == ["one"]


async def test_group_without_proxies_is_asked_for_again_and_can_be_forgotten(world: World) -> None:
    world.set(CDS, {"a": 1})
    async with world.delta() as proxy:
        await proxy.request(CDS)
        await proxy.nack(await proxy.expect(CDS, {"a": 1}))
        await proxy.expect_nothing()
        world.server.forget("mesh")
        assert len(world.server.refusals()) == 1
    await eventually(lambda: not world.server.groups())
    world.snapshots["mesh"] = Snapshot(resources(CDS, {"a": 1, "b": 1}))
    async with world.delta() as proxy:
        await proxy.request(CDS)
        await proxy.ack(await proxy.expect(CDS, {"b": 1}))
    await eventually(lambda: not world.server.groups())
    world.server.forget("mesh")
    assert world.server.refusals() == []


async def test_port_is_not_shared(world: World) -> None:
    """Two servers on one port would each get some of the proxies, without a word."""
    with pytest.raises(RuntimeError):
        await ManagementServer(world, identifier="second").start(f"127.0.0.1:{world.port}")


# Hostile and broken clients. In each case a good proxy beside them goes on.


async def goes_on(world: World, proxy: Proxy, content: int) -> None:
    world.set(CDS, {"a": content})
    await proxy.expect(CDS, {"a": content})


@both_methods
async def test_garbage_ends_its_stream_only(world: World, method: str) -> None:
    async with world.delta() as good:
        await good.request(CDS)
        await good.expect(CDS, {})
        for number, garbage in enumerate([b"\xff\xff\xff", b"\x0a\x7f", os.urandom(64) + b"\x0a\xff", b""]):
            async with world.delta(method=method) as bad:
                await write(bad.call, garbage)
                status, _ = await bad.expect_end()
                assert status is grpc.StatusCode.INVALID_ARGUMENT
            await goes_on(world, good, number + 1)


async def test_bytes_that_are_no_http2_end_their_connection_only(world: World) -> None:
    """A port scanner, a browser, a client that speaks TLS."""
    hello = bytes.fromhex("16030100c8010000c40303") + os.urandom(190)
    settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    async with world.delta() as good:
        await good.request(CDS)
        await good.expect(CDS, {})
        for number, garbage in enumerate([b"GET / HTTP/1.1\r\n\r\n", hello, settings + os.urandom(5000)]):
            reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
            writer.write(garbage)
            async with asyncio.timeout(TIMEOUT):
                with suppress(ConnectionError):
                    await reader.read()
            writer.close()
            await goes_on(world, good, number + 1)


@both_methods
async def test_of_a_request_that_ends_its_stream_nothing_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Not even until the next collection of garbage: a flood of such would cost hundreds of megabytes."""
    known: WeakSet[Any] = WeakSet()
    begin = server._Connection.__init__

    def noted(connection: Any, *arguments: Any, **options: Any) -> None:
        begin(connection, *arguments, **options)
        known.add(connection)

    monkeypatch.setattr(server._Connection, "__init__", noted)
    gc.disable()
    try:
        good = protos.DiscoveryRequest(type_url=CDS, node={"id": "a"}).SerializeToString()
        garbage = b"\xff" * 1000
        for requests in ([garbage], [good, garbage]):
            async with world.delta(method=method) as bad:
                for request in requests:
                    await write(bad.call, request)
                assert (await bad.expect_end())[0] is grpc.StatusCode.INVALID_ARGUMENT
        await eventually(lambda: not known)
    finally:
        gc.enable()


@both_methods
async def test_client_that_never_says_who_it_is_is_let_go(
    world: World, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """It could keep any number of streams, without any credentials."""
    monkeypatch.setattr(server, "FIRST_REQUEST", 0.1)
    async with world.delta(method=method) as silent:
        assert await silent.expect_end() == (grpc.StatusCode.DEADLINE_EXCEEDED, "no request came")


@both_methods
async def test_wrong_nonces_and_unasked_answers_are_ignored(world: World, method: str) -> None:
    world.set(CDS, {"a": 1})
    delta = "Delta" in method
    async with world.delta() if delta else world.sotw() as proxy:
        await proxy.subscribe(CDS, [], {"a": 1})
        for nonce in ("", "0", "ffff", "x" * 1000):
            for error in (None, "nothing was wrong"):
                await proxy.request(CDS, nonce=nonce or "-", error=error)
                await proxy.request(EDS, ["a"], nonce=nonce or "-", error=error)
                if delta:
                    await proxy.expect(EDS, {}, removed=["a"])
        await proxy.expect_nothing()
        assert world.server.refusals() == []
        await goes_on(world, proxy, 2)


async def test_made_up_types_are_limited(world: World) -> None:
    async with world.delta() as proxy:
        for number in range(MAX_TYPES + 1):
            await proxy.request(f"type.googleapis.com/made.up.{number}", ["*"])
        assert (await proxy.expect_end())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("variant", ["delta", "sotw"])
async def test_X7_client_that_never_reads_delays_nobody(world: World, variant: str) -> None:
    """It holds one message; what changes meanwhile is not queued, and when it reads it gets the newest."""
    block = {"secret": {"inline_bytes": bytes(1_000_000)}}
    async with getattr(world, variant)("deaf") as deaf, world.delta("good") as good:
        await deaf.request(SDS, [f"s{number}" for number in range(50)])
        await good.request(SDS, ["*"])
        await good.expect(SDS, [])
        for number in range(50):
            published = Resource.of(protos.Secret(name=f"s{number}", generic_secret=block))
            world.publish(published)
            answer = await good.receive()
            assert published.version in answer.versions.values()
            await good.ack(answer)
        received = 0
        versions: dict[str, str] = {}
        while published.name not in versions:
            versions |= (await deaf.receive()).versions
            received += 1
        assert received < 50


@pytest.mark.parametrize("unread", [1, 20_000_000], ids=["idle", "in the middle of a message"])
@pytest.mark.parametrize("variant", ["delta", "sotw"])
async def test_X9_half_open_client_delays_nobody_and_is_dropped(variant: str, unread: int) -> None:
    world = World()
    world.server = ManagementServer(world, identifier="test", keepalive_time=1, keepalive_timeout=3)
    world.port = await world.server.start("127.0.0.1:0")
    world.server.ready()
    behind = World()
    async with running_wire(world.port) as wire, world.delta("good") as good:
        behind.port = wire.port
        await good.request(CDS)
        await good.expect(CDS, {})
        await good.request(SDS, ["*"])
        await good.expect(SDS, [])
        async with getattr(behind, variant)("gone") as gone:
            await gone.request(SDS, ["*"])
            await gone.expect(SDS, [])
            wire.cut()
            block = {"secret": {"inline_bytes": bytes(unread)}}
            secret = Resource.of(protos.Secret(name="large", generic_secret=block))
            world.publish(secret)
            await good.ack(await good.expect(SDS, [secret]))
            for content in range(1, 20):
                world.publish(secret, resource(CDS, "a", content))
                await good.ack(await good.expect(CDS, {"a": content}))
            await eventually(lambda: [proxy.node_id for proxy in world.server.proxies()] == ["good"])
    await world.server.stop()


async def test_killed_client_leaves_nothing_behind(world: World) -> None:
    async with world.delta("good") as good:
        await good.request(CDS)
        await good.expect(CDS, {})
        for _ in range(20):
            async with world.delta("killed") as killed:
                await killed.request(CDS)
                await killed.receive()
        await goes_on(world, good, 1)
        await eventually(lambda: len(world.server.proxies()) == 1)


class DyingCall:
    """A call whose client closed its side, and does not read: a write to it never ends."""

    def __init__(self) -> None:
        request = protos.DeltaDiscoveryRequest(type_url=CDS, node={"id": "dying", "cluster": "mesh"})
        self.requests: list[object] = [request.SerializeToString()]
        self.writing = asyncio.Event()

    def peer(self) -> str:
        return "peer"

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def read(self) -> object:
        if not self.requests:
            await self.writing.wait()
        return self.requests.pop() if self.requests else grpc.aio.EOF

    async def write(self, _: bytes) -> None:
        self.writing.set()
        await asyncio.Event().wait()


async def test_handler_cancelled_while_it_ends_leaves_nothing_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is found dead while its stream is being ended anyway; gRPC cancels the handler then."""
    monkeypatch.setattr(server, "WRITE_GRACE", TIMEOUT)
    call: Any = DyingCall()
    connection = server._Connection(world.server, call, "", delta=True)
    handler = asyncio.create_task(connection.run())
    await eventually(lambda: connection._ending)
    assert [proxy.node_id for proxy in world.server.proxies()] == ["dying"]
    handler.cancel()
    with pytest.raises(asyncio.CancelledError):
        await handler
    assert world.server.proxies() == []
    assert world.server.groups() == []


async def test_write_that_never_ends_does_not_keep_a_stream(world: World) -> None:
    call: Any = DyingCall()
    async with asyncio.timeout(TIMEOUT):
        await server._Connection(world.server, call, "", delta=True).run()
    assert world.server.proxies() == []


async def test_running_write_is_not_cancelled_when_a_stream_ends(world: World) -> None:
    """Otherwise gRPC sends the initial metadata twice, and the client never learns of the end."""
    outcomes = []

    class SlowCall(DyingCall):
        async def write(self, _: bytes) -> None:
            self.writing.set()
            try:
                await eventually(lambda: connection._ending)
                await asyncio.sleep(0)
                outcomes.append("written")
            except asyncio.CancelledError:
                outcomes.append("cancelled")
                raise

    call: Any = SlowCall()
    connection = server._Connection(world.server, call, "", delta=True)
    await connection.run()
    assert outcomes == ["written"]


async def test_status_does_not_touch_the_call(world: World) -> None:
    """Of a client that was just killed, gRPC's call is no longer safe to ask: peer() crashes the process."""
    async with world.delta() as proxy:
        await proxy.subscribe(CDS, [], {})
        (connection,) = world.server._connections
        call, connection._context = connection._context, None
        assert world.server.proxies()[0].peer.startswith("ipv4:127.0.0.1:")
        connection._context = call


async def test_client_that_closes_its_side_is_let_go(world: World) -> None:
    async with world.delta() as proxy:
        await proxy.request(CDS)
        await proxy.expect(CDS, {})
        await proxy.call.done_writing()
        assert (await proxy.expect_end())[0] is grpc.StatusCode.OK


async def test_X7_latest_of_many_changes_wins(world: World) -> None:
    """Changes that come faster than the transport takes them are not sent one by one."""
    async with world.delta() as proxy:
        await proxy.subscribe(LDS, [], {})
        for content in range(100):
            world.set(LDS, {"a": content})
        await proxy.ack(await proxy.expect(LDS, {"a": 99}))
        await proxy.expect_nothing()


async def test_many_proxies_get_one_change(world: World) -> None:
    world.publish(*resources(CDS, {f"c{number}": 1 for number in range(100)}), resource(RDS, "a"))
    async with asyncio.timeout(TIMEOUT):
        async with asyncio.TaskGroup() as group:
            arrived = asyncio.Barrier(51)

            async def watch(number: int) -> None:
                async with (
                    world.delta(f"proxy-{number}") if number % 2 else world.sotw(f"proxy-{number}") as proxy
                ):
                    await proxy.request(CDS)
                    await proxy.ack(await proxy.receive())
                    await arrived.wait()
                    assert resource(CDS, "c7", 2).version in (await proxy.receive()).versions.values()

            for number in range(50):
                group.create_task(watch(number))
            await arrived.wait()
            world.set(CDS, {f"c{number}": 1 + (number == 7) for number in range(100)})
