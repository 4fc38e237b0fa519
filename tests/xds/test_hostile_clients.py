"""Clients that send whatever comes to their mind: memory stays bounded, and all others are served as ever.

Each round throws the same kinds of things at the server. What it kept of one would be there again after each.
"""

import asyncio
import gc
import random
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import grpc
import structlog
from structlog.testing import capture_logs

from tests.xds.client import TIMEOUT, World, eventually
from xds import protos
from xds.resources import CDS, ECDS, EDS, LDS, RDS, SDS, SRDS
from xds.server import AGGREGATED

ROUNDS: Final = 4
WARM: Final = 2
"""Rounds after which what is made once is there."""
GROWTH: Final = 2 << 20
"""Bytes that the other rounds together may leave behind; each sends some 15 MB."""
TYPES: Final = (CDS, EDS, LDS, SRDS, RDS, SDS, ECDS, "", "type.googleapis.com/made.up")
NAMES: Final = ("*", "", "a", "b", "xdstp://a/b/*", "xdstp://a/b/c?d=e", "\0", "é" * 200)
NONCES: Final = ("", *map(str, range(10)), "f" * 1000)


class Hostile:
    """A client of one variant."""

    def __init__(self, channel: grpc.aio.Channel, dice: random.Random) -> None:
        self.dice = dice
        self.delta = dice.random() < 0.5
        method = "DeltaAggregatedResources" if self.delta else "StreamAggregatedResources"
        self.call: Any = channel.stream_stream(f"/{AGGREGATED}/{method}")()

    async def run(self, kind: str) -> None:
        """Send all of one kind and only then read, until the server has enough of it."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with asyncio.timeout(TIMEOUT):
                for data in getattr(self, kind)():
                    await self.call.write(data)
                await self.call.done_writing()
                while isinstance(await self.call.read(), bytes):
                    pass
        self.call.cancel()

    def request(self, **fields: Any) -> Any:
        return (protos.DeltaDiscoveryRequest if self.delta else protos.DiscoveryRequest)(**fields)

    def names(self, names: list[str]) -> dict[str, list[str]]:
        return {"resource_names_subscribe" if self.delta else "resource_names": names}

    def hello(self) -> bytes:
        node = protos.Node(id="hostile", cluster=f"hostile-{self.dice.randrange(5)}")
        return bytes(self.request(type_url=CDS, node=node, **self.names(["*"])).SerializeToString())

    def anything(self) -> Iterator[bytes]:
        """Send requests of which each field may be anything, and bytes that were such a request once."""
        dice = self.dice
        yield self.hello()
        for _ in range(100):
            request = self.request(type_url=dice.choice(TYPES), response_nonce=dice.choice(NONCES))
            request.MergeFrom(self.request(**self.names(dice.choices(NAMES, k=dice.randrange(4)))))
            if self.delta:
                request.resource_names_unsubscribe.extend(dice.choices(NAMES, k=dice.randrange(3)))
                request.initial_resource_versions.update(dict.fromkeys(dice.choices(NAMES, k=2), "1"))
            else:
                request.version_info = dice.choice(NONCES)
            if dice.random() < 0.3:
                request.error_detail.message = dice.choice(NAMES) * dice.randrange(2000)
            data = bytearray(request.SerializeToString())
            if dice.random() < 0.02 and data:  # garbage ends the stream
                data[dice.randrange(len(data))] = dice.randrange(256)
            yield bytes(data)

    def the_same_again(self) -> Iterator[bytes]:
        """Ask for all again and again, and read no answer."""
        yield self.hello()
        yield from [self.request(type_url=CDS, **self.names(["*", "a"])).SerializeToString()] * 500

    def many_names(self) -> Iterator[bytes]:
        yield self.hello()
        for type_url in (RDS, SDS):
            names = [f"{self.dice.random()}" * 10 for _ in range(10_000)]
            yield self.request(type_url=type_url, **self.names(names)).SerializeToString()

    def other_names(self) -> Iterator[bytes]:
        """Ask for many names, and then for others and others."""
        yield self.hello()
        names = [f"{self.dice.random()}" for _ in range(5_000 if self.delta else 500)]
        yield self.request(type_url=SDS, **self.names(names)).SerializeToString()
        for number in range(200):
            request = self.request(type_url=SDS)
            if self.delta:
                request.resource_names_subscribe.append(f"{number}")
                request.resource_names_unsubscribe.append(names[number])
            else:
                names[number] = f"{number}"
                request.resource_names.extend(names)
            yield request.SerializeToString()

    def large_garbage(self) -> Iterator[bytes]:
        yield self.dice.randbytes(2_000_000)

    def large_texts(self) -> Iterator[bytes]:
        """Refuse everything, at length."""
        yield self.hello()
        for nonce in range(0, 200, 10):
            detail = {"code": 13, "message": "no" * 100_000}
            yield self.request(
                type_url=CDS, response_nonce=f"{nonce:x}", error_detail=detail
            ).SerializeToString()


KINDS: Final = ("anything", "the_same_again", "many_names", "other_names", "large_garbage", "large_texts")


async def hostile_round(world: World, dice: random.Random) -> None:
    """Let some of each kind do their worst, and wait until none of them is left."""
    address, options = f"127.0.0.1:{world.port}", (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(address, options=options) as channel, asyncio.TaskGroup() as group:
        for kind in KINDS * 2:
            group.create_task(Hostile(channel, dice).run(kind))
    await eventually(lambda: len(world.server.proxies()) == 1)


async def test_memory_is_bounded_and_other_streams_are_unharmed(world: World) -> None:
    structlog.reset_defaults()
    dice = random.Random(3)  # noqa: S311 - the same each time
    sizes = []
    tracemalloc.start()
    try:
        with capture_logs() as logged:
            async with world.delta() as good:
                await good.subscribe(CDS, [], {})
                for content in range(1, ROUNDS + 1):
                    worst = asyncio.create_task(hostile_round(world, dice))
                    for group in ("mesh", *(f"hostile-{number}" for number in range(5))):
                        world.set(CDS, {"a": content}, group=group)
                    await good.ack(await good.expect(CDS, {"a": content}))
                    await worst
                    gc.collect()
                    sizes.append(tracemalloc.get_traced_memory()[0])
                    logged.clear()
                await good.expect_nothing()
    finally:
        tracemalloc.stop()
    assert sizes[-1] - sizes[WARM - 1] < GROWTH, sizes
