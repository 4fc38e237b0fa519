"""Many proxies in one process: each takes in what it is sent, acknowledges it, and remembers it.

    fleet = Fleet(200)
    async with fleet.connected(f"127.0.0.1:{port}"):
        await fleet.until(lambda proxy: proxy.has[CDS])

They are lines of raw gRPC, half of them of each variant, ten on each connection. When the server ends their
streams, they stay away until the next `connected`, and then bring along what they have.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from tests.xds.client import TIMEOUT, how_it_ended, write
from xds import protos
from xds.resources import CDS, LDS, RDS, SDS
from xds.server import AGGREGATED

ON_A_CONNECTION: Final = 10

WANTS: Final[Mapping[str, tuple[str, ...]]] = {CDS: (), LDS: (), RDS: ("routes",), SDS: ("key",)}
"""The names that each proxy asks for, by type; none: all."""


@dataclass
class Member:
    """One proxy."""

    node: Any
    delta: bool
    wants: Mapping[str, tuple[str, ...]]
    has: dict[str, dict[str, str]] = field(default_factory=dict)
    """Per type: the versions of the resources; of a member of the other variant, of the type as a whole."""
    received: list[str] = field(default_factory=list)
    """The types of the resources that came since it connected, one entry a resource."""
    end: grpc.StatusCode | None = None
    """How the server ended the stream."""

    async def run(self, channel: grpc.aio.Channel) -> None:
        """Open a stream, and answer what comes until it ends."""
        method = "DeltaAggregatedResources" if self.delta else "StreamAggregatedResources"
        call: Any = channel.stream_stream(f"/{AGGREGATED}/{method}")()
        self.received.clear()
        self.end = None
        try:
            for number, type_url in enumerate(self.wants):
                request = self._first(type_url)
                if number == 0:
                    request.node.CopyFrom(self.node)
                await write(call, request.SerializeToString())
            async for data in call:
                take = self._take_delta if self.delta else self._take_sotw
                await write(call, take(data).SerializeToString())
        except grpc.aio.AioRpcError:
            self.end, _ = await how_it_ended(call)

    def _first(self, type_url: str) -> Any:
        names, has = self.wants[type_url], self.has.setdefault(type_url, {})
        if self.delta:
            return protos.DeltaDiscoveryRequest(
                type_url=type_url, resource_names_subscribe=names, initial_resource_versions=has
            )
        return protos.DiscoveryRequest(type_url=type_url, resource_names=names, version_info=has.get("", ""))

    def _take_delta(self, data: bytes) -> Any:
        response = protos.DeltaDiscoveryResponse.FromString(data)
        has = self.has[response.type_url]
        has.update({resource.name: resource.version for resource in response.resources})
        for name in response.removed_resources:
            has.pop(name, None)
        self.received += [response.type_url] * len(response.resources)
        return protos.DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)

    def _take_sotw(self, data: bytes) -> Any:
        response = protos.DiscoveryResponse.FromString(data)
        self.has[response.type_url] = {"": response.version_info}
        self.received += [response.type_url] * len(response.resources)
        return protos.DiscoveryRequest(
            type_url=response.type_url,
            resource_names=self.wants[response.type_url],
            version_info=response.version_info,
            response_nonce=response.nonce,
        )


class Fleet:
    """So many proxies."""

    def __init__(
        self,
        count: int,
        *,
        node: Callable[[int], Any] = lambda number: protos.Node(id=f"proxy-{number}", cluster="mesh"),
        wants: Mapping[str, tuple[str, ...]] = WANTS,
    ) -> None:
        self.members = [Member(node(number), number % 2 == 0, wants) for number in range(count)]

    @asynccontextmanager
    async def connected(self, address: str) -> AsyncIterator[None]:
        """Open a stream for each, which the server or the end of the block ends."""
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
        tasks: list[asyncio.Task[None]] = []
        async with AsyncExitStack() as stack:
            for number, member in enumerate(self.members):
                if number % ON_A_CONNECTION == 0:
                    channel = grpc.aio.insecure_channel(address, options=options)
                    await stack.enter_async_context(channel)
                tasks.append(asyncio.create_task(member.run(channel)))
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def until(self, condition: Callable[[Member], object]) -> None:
        """Wait until something is true of each."""
        async with asyncio.timeout(TIMEOUT):
            for member in self.members:
                while not condition(member):  # noqa: ASYNC110 - nothing announces it
                    await asyncio.sleep(0.05)
