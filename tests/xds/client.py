"""A tiny language for conversations with the management server, over raw gRPC.

    async with world.delta() as proxy:
        await proxy.request(CDS)
        answer = await proxy.expect(CDS, {"a": 1})
        await proxy.ack(answer)
        await proxy.expect_nothing()

The server runs in the test's own event loop, so `world.publish(...)` is immediate. `expect_nothing` looks
at no clock: it asks for something else, whose answer would come after anything that is due.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import grpc
from grpc._cython import cygrpc

from xds import protos
from xds.resources import CDS, ECDS, EDS, LDS, RDS, SDS, SRDS, Resource
from xds.server import AGGREGATED, ManagementServer, Node, NodeRejected
from xds.snapshot import Snapshot

ALL_TYPES = (CDS, EDS, LDS, SRDS, RDS, SDS, ECDS)
FULL_TYPES = (CDS, LDS, SRDS)
"""Types that a client gets all of, and in state of the world always all of."""
NAMED_TYPES = (EDS, RDS, SDS, ECDS)
TIMEOUT = 60
"""Seconds after which a conversation counts as stuck."""

_MESSAGES = {
    CDS: lambda name, content: protos.Cluster(name=name, connect_timeout={"seconds": content}),
    EDS: lambda name, content: protos.ClusterLoadAssignment(
        cluster_name=name, policy={"overprovisioning_factor": {"value": content}}
    ),
    LDS: lambda name, content: protos.Listener(name=name, stat_prefix=str(content)),
    SRDS: lambda name, content: protos.ScopedRouteConfiguration(
        name=name, route_configuration_name=str(content)
    ),
    RDS: lambda name, content: protos.RouteConfiguration(name=name, internal_only_headers=[str(content)]),
    SDS: lambda name, content: protos.Secret(
        name=name, generic_secret={"secret": {"inline_string": f"key {content}"}}
    ),
    ECDS: lambda name, content: protos.TypedExtensionConfig(
        name=name, typed_config=protos.pack(protos.Cluster(name=str(content)))
    ),
}

_fences = count()


def resource(
    type_url: str, name: str, content: int = 1, *, held: bool = False, ttl: timedelta | None = None
) -> Resource:
    """Make a resource whose version depends on `content`, a small number."""
    return Resource.of(_MESSAGES[type_url](name, content), held=held, ttl=ttl)


def eds_cluster(name: str, content: int = 1) -> Resource:
    """Make a cluster whose endpoints come from EDS."""
    return Resource.of(
        protos.Cluster(
            name=name,
            type="EDS",
            eds_cluster_config={"eds_config": {"ads": {}}},
            connect_timeout={"seconds": content},
        )
    )


def resources(type_url: str, contents: Mapping[str, int]) -> list[Resource]:
    """Make resources of a type from names and contents."""
    return [resource(type_url, name, content) for name, content in contents.items()]


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until something becomes true that nothing announces."""
    async with asyncio.timeout(TIMEOUT):
        while not condition():  # noqa: ASYNC110 - as the docstring says
            await asyncio.sleep(0.01)


async def write(call: Any, data: bytes) -> None:
    """Send bytes. A stream that ended does not take them; that shows when something is expected of it.

    call.write would put INTERNAL in the place of the server's status, if the stream ended while it is under
    way (seen with grpcio 1.85).
    """
    with suppress(grpc.aio.AioRpcError, cygrpc.InternalError):
        await call.wait_for_connection()
        await call._cython_call.send_serialized_message(data)


async def how_it_ended(call: Any) -> tuple[grpc.StatusCode, str]:
    """Wait until the server ends a stream; return status and text."""
    async with asyncio.timeout(TIMEOUT):
        return await call.code(), await call.details()


@dataclass(frozen=True)
class Answer:
    """A response, in terms that both variants share."""

    type_url: str
    nonce: str
    version: str
    """Of the response; only state of the world uses it."""
    versions: dict[str, str]
    """Per resource; in state of the world computed from its content."""
    removed: tuple[str, ...]
    identifier: str
    ttls: dict[str, timedelta]
    """Of resources that have a time to live."""
    renewed: dict[str, str]
    """The versions of those that came without content."""


class World:
    """A running server, and what it serves."""

    def __init__(self) -> None:
        self.snapshots: dict[Hashable, Snapshot] = {}
        self.server = ManagementServer(self, identifier="server under test")
        self.port = 0

    def group(self, node: Node, identity: object) -> Hashable:  # noqa: ARG002
        if node.id.startswith("unwanted"):
            raise NodeRejected("not wanted here", forbidden=True)
        return node.cluster

    def snapshot(self, group: Hashable) -> Snapshot:
        return self.snapshots.get(group, Snapshot())

    def publish(self, *published: Resource, group: str = "mesh") -> None:
        """Make exactly these the resources of a group."""
        self.snapshots[group] = Snapshot(published)
        self.server.publish({group: self.snapshots[group]})

    def set(self, type_url: str, contents: Mapping[str, int], group: str = "mesh") -> None:
        """Make exactly these the resources of a type, and leave the other types alone."""
        snapshot = self.snapshot(group)
        others = [r for other in snapshot for r in snapshot[other].values() if other != type_url]
        self.publish(*others, *resources(type_url, contents), group=group)

    def add(self, *added: Resource, group: str = "mesh") -> None:
        """Put in these, and leave all others alone."""
        self.snapshots[group] = self.snapshot(group).replace(added)
        self.server.publish({group: self.snapshots[group]})

    @asynccontextmanager
    async def delta(
        self, node_id: str = "proxy", cluster: str = "mesh", method: str = ""
    ) -> AsyncIterator["Delta"]:
        """Open a stream of the incremental variant."""
        async with self._stream(method or f"/{AGGREGATED}/DeltaAggregatedResources") as call:
            yield Delta(call, node_id, cluster)

    @asynccontextmanager
    async def sotw(
        self, node_id: str = "proxy", cluster: str = "mesh", method: str = "", features: Iterable[str] = ()
    ) -> AsyncIterator["Sotw"]:
        """Open a stream of the state-of-the-world variant."""
        async with self._stream(method or f"/{AGGREGATED}/StreamAggregatedResources") as call:
            yield Sotw(call, node_id, cluster, features)

    @asynccontextmanager
    async def _stream(self, method: str) -> AsyncIterator[Any]:
        options = (("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", options=options) as channel:
            call = channel.stream_stream(method)()
            yield call
            call.cancel()


class Proxy:
    """One stream to the server; the first request carries the node, later ones do not."""

    def __init__(self, call: Any, node_id: str, cluster: str, features: Iterable[str] = ()) -> None:
        self.call = call
        self._node: Any = protos.Node(id=node_id, cluster=cluster, client_features=list(features))

    async def send(self, request: Any) -> None:
        """Send a request, with the node if it is the first."""
        if self._node is not None:
            request.node.CopyFrom(self._node)
            self._node = None
        await write(self.call, request.SerializeToString())

    async def receive(self) -> Answer:
        """Return the next response."""
        async with asyncio.timeout(TIMEOUT):
            data = await self.call.read()
        assert isinstance(data, bytes), f"the server ended the stream: {await how_it_ended(self.call)}"
        return self._decode(data)

    def _decode(self, data: bytes) -> Answer:
        raise NotImplementedError

    async def expect(
        self, type_url: str, contents: Mapping[str, int] | Iterable[Resource], removed: Iterable[str] = ()
    ) -> Answer:
        """Take the next response: it must hold exactly these resources, and nothing twice."""
        answer = await self.receive()
        wanted = resources(type_url, contents) if isinstance(contents, Mapping) else list(contents)
        assert answer.type_url == type_url
        assert answer.versions == {r.name: r.version for r in wanted}
        assert sorted(answer.removed) == sorted(removed)
        assert answer.renewed == {}
        return answer

    async def expect_nothing(self) -> None:
        """Make sure that no response is due."""
        fence = f"type.googleapis.com/fence.{next(_fences)}"
        await self._fence(fence)
        answer = await self.receive()
        assert answer.type_url == fence, f"expected nothing, got {answer}"

    async def _fence(self, type_url: str) -> None:
        raise NotImplementedError

    async def expect_end(self) -> tuple[grpc.StatusCode, str]:
        """Wait for the server to end the stream, whatever it sends before; return status and text."""
        async with asyncio.timeout(TIMEOUT):
            with suppress(grpc.aio.AioRpcError):
                while isinstance(await self.call.read(), bytes):
                    pass
        return await how_it_ended(self.call)


class Delta(Proxy):
    """A stream of the incremental variant."""

    async def request(
        self,
        type_url: str,
        subscribe: Iterable[str] = (),
        unsubscribe: Iterable[str] = (),
        has: Iterable[Resource] | Mapping[str, str] = (),
        *,
        nonce: str = "",
        error: str | None = None,
    ) -> None:
        versions = dict(has) if isinstance(has, Mapping) else {r.name: r.version for r in has}
        await self.send(
            protos.DeltaDiscoveryRequest(
                type_url=type_url,
                resource_names_subscribe=list(subscribe),
                resource_names_unsubscribe=list(unsubscribe),
                initial_resource_versions=versions,
                response_nonce=nonce,
                error_detail=None if error is None else {"code": 13, "message": error},
            )
        )

    async def ack(self, answer: Answer) -> None:
        await self.request(answer.type_url, nonce=answer.nonce)

    async def nack(self, answer: Answer, error: str = "invalid") -> None:
        await self.request(answer.type_url, nonce=answer.nonce, error=error)

    async def subscribe(
        self, type_url: str, names: Iterable[str], contents: Mapping[str, int] | Iterable[Resource]
    ) -> Answer:
        """Request, expect these resources, and ACK."""
        await self.request(type_url, names)
        answer = await self.expect(type_url, contents)
        await self.ack(answer)
        return answer

    def _decode(self, data: bytes) -> Answer:
        response = protos.DeltaDiscoveryResponse.FromString(data)
        names = [r.name for r in response.resources]
        assert len(set(names)) == len(names), f"duplicates in {names}"
        assert all(
            r.resource.type_url == response.type_url for r in response.resources if r.HasField("resource")
        )
        return Answer(
            response.type_url,
            response.nonce,
            response.system_version_info,
            {r.name: r.version for r in response.resources if r.HasField("resource")},
            tuple(response.removed_resources),
            response.control_plane.identifier,
            {r.name: r.ttl.ToTimedelta() for r in response.resources if r.HasField("ttl")},
            {r.name: r.version for r in response.resources if not r.HasField("resource")},
        )

    async def _fence(self, type_url: str) -> None:
        await self.request(type_url, ["*"])


class Sotw(Proxy):
    """A stream of the state-of-the-world variant; it remembers version, nonce and names, as Envoy does."""

    def __init__(self, call: Any, node_id: str, cluster: str, features: Iterable[str] = ()) -> None:
        super().__init__(call, node_id, cluster, features)
        self._names: dict[str, list[str]] = {}
        self._accepted: dict[str, str] = {}
        self._nonces: dict[str, str] = {}

    async def request(
        self,
        type_url: str,
        names: Iterable[str] = (),
        version: str | None = None,
        nonce: str | None = None,
        error: str | None = None,
    ) -> None:
        self._names[type_url] = list(names)
        await self.send(
            protos.DiscoveryRequest(
                type_url=type_url,
                resource_names=self._names[type_url],
                version_info=self._accepted.get(type_url, "") if version is None else version,
                response_nonce=self._nonces.get(type_url, "") if nonce is None else nonce,
                error_detail=None if error is None else {"code": 13, "message": error},
            )
        )

    async def ack(self, answer: Answer) -> None:
        self._accepted[answer.type_url] = answer.version
        await self.request(answer.type_url, self._names[answer.type_url], nonce=answer.nonce)

    async def nack(self, answer: Answer, error: str = "invalid") -> None:
        await self.request(answer.type_url, self._names[answer.type_url], nonce=answer.nonce, error=error)

    async def subscribe(
        self, type_url: str, names: Iterable[str], contents: Mapping[str, int] | Iterable[Resource]
    ) -> Answer:
        """Request, expect these resources, and ACK."""
        await self.request(type_url, names)
        answer = await self.expect(type_url, contents)
        await self.ack(answer)
        return answer

    def _decode(self, data: bytes) -> Answer:
        response = protos.DiscoveryResponse.FromString(data)
        versions, ttls = {}, {}
        for packed in response.resources:
            wrapped = protos.Resource()
            body = wrapped.resource if packed.Unpack(wrapped) else packed
            assert body.type_url == response.type_url
            if body.type_url in _MESSAGES:
                message = type(_MESSAGES[body.type_url]("", 1)).FromString(body.value)
                ttl = wrapped.ttl.ToTimedelta() if wrapped.HasField("ttl") else None
                decoded = Resource.of(message, ttl=ttl)
                assert (wrapped.name, wrapped.version) in (("", ""), (decoded.name, decoded.version))
                if ttl is not None:
                    ttls[decoded.name] = ttl
                assert decoded.name not in versions, f"{decoded.name} twice"
                versions[decoded.name] = decoded.version
        self._nonces[response.type_url] = response.nonce
        return Answer(
            response.type_url,
            response.nonce,
            response.version_info,
            versions,
            (),
            response.control_plane.identifier,
            ttls,
            {},
        )

    async def _fence(self, type_url: str) -> None:
        await self.request(type_url, ["*"])
