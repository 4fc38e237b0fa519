"""The server with as many proxies as a large mesh has (tests/envoy/test_restart.py: the program, killed)."""
# ruff: noqa: N802 - the numbers in the names are those of the list of checks

import asyncio
from contextlib import AsyncExitStack
from typing import Final

import grpc

from tests.xds.client import TIMEOUT, World, eventually, resource
from tests.xds.fleet import WANTS, Fleet
from tests.xds.wire import running_wire
from xds import protos
from xds.resources import CDS, LDS, RDS, SDS, Resource
from xds.server import ManagementServer
from xds.status import State

CONTENT: Final = [
    *(resource(CDS, f"cluster-{number}") for number in range(20)),
    resource(LDS, "listener"),
    resource(RDS, "routes"),
    resource(SDS, "key"),
]


async def synced(world: World, count: int) -> None:
    """Wait until so many proxies were answered in all that they asked for, and acknowledged it."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            proxies = world.server.proxies()
            if len(proxies) == count and all(
                proxy.state is State.SYNCED and len(proxy.types) == len(WANTS) for proxy in proxies
            ):
                return
            await asyncio.sleep(0.1)


async def test_X10_a_thousand_proxies_come_back_after_a_restart_and_are_not_sent_what_they_have() -> None:
    """And the stop does not wait for them.

    Names in state of the world are the exception: the server could not know whether the client has them
    (S10), so it answers.
    """
    fleet = Fleet(1000)
    first, second = World(), World()
    first.port = second.port = await first.server.start("127.0.0.1:0")
    address = f"127.0.0.1:{first.port}"
    first.server.ready()
    first.publish(*CONTENT)
    async with fleet.connected(address):
        await synced(first, 1000)
        await first.server.stop()
        await fleet.until(lambda proxy: proxy.end is grpc.StatusCode.UNAVAILABLE)
    assert first.server.proxies() == []

    second.publish(*CONTENT)
    await second.server.start(address)
    second.server.ready()
    async with fleet.connected(address):
        await synced(second, 1000)
        assert {tuple(proxy.received) for proxy in fleet.members if proxy.delta} == {()}
        assert {tuple(proxy.received) for proxy in fleet.members if not proxy.delta} == {(RDS, SDS)}
        new = resource(CDS, "cluster-7", 2)
        second.add(new)
        await fleet.until(lambda proxy: CDS in proxy.received)
        assert {proxy.has[CDS]["cluster-7"] for proxy in fleet.members if proxy.delta} == {new.version}
        assert {proxy.received.count(CDS) for proxy in fleet.members} == {1, 20}
        await second.server.stop()


async def test_X7_proxies_that_do_not_read_or_are_cut_off_delay_none_of_two_hundred() -> None:
    """Ten never read what grows to megabytes for them, ten vanish without a word."""
    world = World()
    world.server = ManagementServer(world, identifier="test", keepalive_time=1, keepalive_timeout=3)
    world.port = await world.server.start("127.0.0.1:0")
    world.server.ready()
    world.publish(*CONTENT)
    behind = World()
    fleet = Fleet(200)
    async with (
        running_wire(world.port) as wire,
        fleet.connected(f"127.0.0.1:{world.port}"),
        AsyncExitStack() as stack,
    ):
        behind.port = wire.port
        for number in range(10):
            for place, name in ((world, "deaf"), (behind, "gone")):
                proxy = await stack.enter_async_context(place.delta(f"{name}-{number}"))
                await proxy.request(SDS, ["large"])
        await eventually(lambda: len(world.server.proxies()) == 220)
        wire.cut()
        for content in range(2, 12):
            block = {"secret": {"inline_bytes": bytes([content]) * 1_000_000}}
            world.add(
                Resource.of(protos.Secret(name="large", generic_secret=block)), resource(SDS, "key", content)
            )
            newest = (
                {"": world.snapshots["mesh"][SDS].version},
                {"key": resource(SDS, "key", content).version},
            )
            await fleet.until(lambda proxy, newest=newest: proxy.has[SDS] == newest[proxy.delta])
        await eventually(lambda: not [p for p in world.server.proxies() if p.node_id.startswith("gone")])
        assert len(world.server.proxies()) == 210
        await world.server.stop()
