"""The xDS management server: the I/O around `xds.stream`, on grpc.aio.

Serves the aggregated discovery service and the separate services, each in both variants. A stream is the
task of its handler, which reads requests into the state machines; as long as these return something, a second
task writes it. The writer asks for the next response when the transport took the last one, so a slow client
holds one message and never a queue.
"""

import asyncio
import contextlib
import math
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, Final, Protocol
from weakref import WeakValueDictionary

import grpc
import structlog
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from xds import protos
from xds.delta import DeltaSubscription
from xds.group import NOTHING, Archive, Group, Recent, Refusal
from xds.nack import nack_text
from xds.observer import Observer, Progress
from xds.resources import CDS, ECDS, EDS, LDS, PUSH_ORDER, RDS, SDS, SRDS, Resource
from xds.snapshot import Snapshot
from xds.sotw import SotwSubscription
from xds.status import ProxyStatus, type_status
from xds.stream import MAX_TYPES, Stream, TooManyTypesError
from xds.subscription import MAX_NAME, MAX_NAMES, TooManyNamesError

log = structlog.get_logger(__name__)

AGGREGATED: Final = "envoy.service.discovery.v3.AggregatedDiscoveryService"
SERVICES: Final = {
    AGGREGATED: ("AggregatedResources", ""),
    "envoy.service.cluster.v3.ClusterDiscoveryService": ("Clusters", CDS),
    "envoy.service.endpoint.v3.EndpointDiscoveryService": ("Endpoints", EDS),
    "envoy.service.listener.v3.ListenerDiscoveryService": ("Listeners", LDS),
    "envoy.service.route.v3.ScopedRoutesDiscoveryService": ("ScopedRoutes", SRDS),
    "envoy.service.route.v3.RouteDiscoveryService": ("Routes", RDS),
    "envoy.service.secret.v3.SecretDiscoveryService": ("Secrets", SDS),
    "envoy.service.extension.v3.ExtensionConfigDiscoveryService": ("ExtensionConfigs", ECDS),
}
"""Per gRPC service: what follows `Stream` and `Delta` in the names of its methods, and its type."""

OPTIONS: Final = (
    # initial_resource_versions of 60,000 names are 4.6 MB, and gRPC's own limit is 4 MB.
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_concurrent_streams", 1 << 20),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    # So that proxies spread over replicas again. gRPC varies the age by a tenth either way.
    ("grpc.max_connection_age_ms", 11 * 3_600_000),
    ("grpc.max_connection_age_grace_ms", 120_000),
    # After a restart all proxies call at once. Of more than 1,000 calls not taken up yet gRPC cancels some,
    # and those that wait for 30 s (seen with grpcio 1.85; a thousand proxies with ten thousand secrets each).
    ("grpc.server.max_pending_requests", 1 << 20),
    ("grpc.server.max_pending_requests_hard_limit", 1 << 20),
    ("grpc.server_max_unrequested_time_in_server", 3_600),
    # Two servers would share a port without a word.
    ("grpc.so_reuseport", 0),
    # What a client may send before its request is read, and what is read at once. Larger requests have one
    # more round trip: the window grows to the size of the message that is asked for. With gRPC's own 64 KB,
    # a thousand proxies that come at once have their nodes (61 KB) in memory together, and the holes that
    # these leave in it cost 15 to 30 KB a stream.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4096),
    ("grpc.experimental.tcp_max_read_buffer_size", 4096),
    # Nobody asks for it here, and it costs 1 KB a stream.
    ("grpc.enable_channelz", 0),
)


WRAPS: Final = "xds.config.resource-in-sotw"
"""The client feature without which state of the world has no times to live."""

_WRAPPING: Final = partial(SotwSubscription, wraps=True)

RECHECK: Final = 1.0
"""Seconds until a change of who may get what is noticed."""

FIRST_REQUEST: Final = 30.0
"""Seconds that a client has for its first request; until then nobody knows who it is."""

MAX_NODE: Final = 512 << 10
"""Bytes of a node message, of which nobody knows yet whose it is; Envoy's has 61 KB."""

WRITE_GRACE: Final = 0.2
"""Seconds that a write may take when its stream ends; a client that does not read would keep it for ever."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Node:
    """Who a proxy says it is (`envoy.config.core.v3.Node`), as far as somebody asked for it."""

    id: str
    cluster: str
    metadata: dict[str, Any]
    version: str
    """Envoy's version, `1.40.0`; empty if the client does not say."""
    wraps: bool = False
    """The client knows resources that are wrapped into a `Resource` (`client_features`)."""


class NodeRejected(Exception):  # noqa: N818 - it is no error of this program
    """Raised by `SnapshotSource.group` for a node that is not served; the text goes to the proxy."""

    def __init__(self, text: str, *, forbidden: bool = False) -> None:
        super().__init__(text)
        self.status = grpc.StatusCode.PERMISSION_DENIED if forbidden else grpc.StatusCode.INVALID_ARGUMENT


class Unauthenticated(NodeRejected):
    """Raised by `Authenticator.authenticate` for a peer that proves nothing; the text goes to the peer."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.status = grpc.StatusCode.UNAUTHENTICATED


class AuthenticationUnavailable(NodeRejected):
    """Raised by `Authenticator.authenticate` while it cannot tell who a peer is; that may come again."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.status = grpc.StatusCode.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class Peer:
    """Who opened a stream, as far as its connection tells; the names are of its verified certificate."""

    address: str
    uris: tuple[str, ...] = ()
    dns_names: tuple[str, ...] = ()
    chain: bytes = b""
    """That certificate, and those between it and a CA, in PEM. It was verified when the connection began."""


class Authenticator(Protocol):
    """Decides who a peer is: for each stream at its first request, and whenever that may have changed."""

    async def authenticate(
        self, peer: Peer, metadata: Mapping[str, str | bytes], node: Node, known: object = None
    ) -> object:
        """Return the identity for `SnapshotSource.group`. Raises NodeRejected; `metadata` is secret.

        `known` is the identity of a stream that was let in before and is looked at again.
        """

    def left(self, identity: object) -> None:
        """Take notice that a stream with this identity ended, or did not begin."""

    def revision(self) -> object:
        """Return what is different as soon as `authenticate` may decide differently; asked every second."""


class SnapshotSource(Protocol):
    """Where the server learns what a proxy should have."""

    def group(self, node: Node, identity: object) -> Hashable:
        """Return which snapshot this proxy gets. Raises NodeRejected.

        `node` is what the proxy claims, `identity` what the Authenticator made of it (None without one).
        """

    def snapshot(self, group: Hashable) -> Snapshot:
        """Return the current snapshot of a group; asked when the first proxy of a group connects."""


class _Closed(Exception):  # noqa: N818 - an outcome
    """A stream is to be ended with this status."""

    def __init__(self, status: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.end = status, text


class ManagementServer:
    """Keeps every connected proxy on the newest good version of its group's snapshot.

    All methods belong to the event loop that `start` ran in. `identifier` is what Envoy shows as the
    statistic `control_plane.identifier`. A peer from which nothing came for `keepalive_time` seconds is sent
    a ping, and is dropped if it does not answer it within `keepalive_timeout` seconds.
    """

    def __init__(
        self,
        source: SnapshotSource,
        *,
        identifier: str,
        authenticator: Authenticator | None = None,
        archive: Archive | None = None,
        observer: Observer | None = None,
        keepalive_time: float = 30,
        keepalive_timeout: float = 10,
    ) -> None:
        self.on_change: Callable[[], None] | None = None
        """Called after everything that changes `proxies()` or `refusals()`; it should be quick."""
        self._source = source
        self._authenticator = authenticator
        self._archive = archive
        self.observer = observer or Observer()
        self.change_began: float | None = None
        """While a change is being published: when it began (`time.monotonic`)."""
        time_ms, timeout_ms = round(keepalive_time * 1000), round(keepalive_timeout * 1000)
        self._options = (
            *OPTIONS,
            ("grpc.keepalive_time_ms", time_ms),
            ("grpc.keepalive_timeout_ms", timeout_ms),
            # A half-open connection is noticed only with the time-out of the ping (seen with grpcio 1.85).
            ("grpc.http2.ping_timeout_ms", timeout_ms),
        )
        self._identifier = identifier
        self._numbers: Iterator[int] = count(1)
        self._recent = Recent()
        self._groups: dict[Hashable, Group] = {}
        self._latest: WeakValueDictionary[Hashable, Node] = WeakValueDictionary()
        """The proxy of each group that came last."""
        self._connections: set[_Connection] = set()
        self._ready = False
        self._stopping = False
        self._server: grpc.aio.Server | None = None
        self._rechecking: asyncio.Task[None] | None = None

    async def start(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Listen on `address` (`host:port`, port 0: any), without TLS if no credentials; return the port.

        Raises RuntimeError if that address cannot be had.
        """
        self._server = grpc.aio.server(options=self._options)
        for service, (methods, type_url) in SERVICES.items():
            handlers = {
                f"Stream{methods}": grpc.stream_stream_rpc_method_handler(
                    self._handler(type_url, delta=False)
                ),
                f"Delta{methods}": grpc.stream_stream_rpc_method_handler(self._handler(type_url, delta=True)),
            }
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        await self._server.start()
        if self._authenticator is not None:
            self._rechecking = asyncio.create_task(self._recheck(self._authenticator))
        return port

    def ready(self) -> None:
        """Begin to serve. Until then streams are refused: an empty world would remove what is in use."""
        self._ready = True

    async def stop(self) -> None:
        """End all streams, then the server. Proxies keep what they have, and connect again."""
        self._stopping = True
        if self._rechecking is not None:
            self._rechecking.cancel()
        for connection in list(self._connections):
            connection.close(_Closed(grpc.StatusCode.UNAVAILABLE, "stopping"))
        if self._server is not None:
            await self._server.stop(grace=0.5)

    def publish(self, snapshots: Mapping[Hashable, Snapshot], *, began: float | None = None) -> None:
        """Make these the newest snapshots of their groups; groups that no proxy asked for are skipped.

        `began` is when the change that they come from was noticed (`time.monotonic`).
        """
        self.change_began = began
        for key, snapshot in snapshots.items():
            if key in self._groups:
                self._groups[key].publish(snapshot)
        self.change_began = None
        self.changed()

    def groups(self) -> list[Hashable]:
        """Return the groups that have proxies now."""
        return [key for key, group in self._groups.items() if group.wakers]

    def forget(self, key: Hashable) -> None:
        """Forget what is known of a group without proxies: what they accepted and what they refused."""
        if key in self._groups and not self._groups[key].wakers:
            self._groups.pop(key).forget()

    def look_again(self) -> None:
        """Ask the archive again: there is more in it, which another replica put there."""
        for group in self._groups.values():
            group.look_again()
        self.changed()

    def proxies(self) -> list[ProxyStatus]:
        """Return the state of each stream, ordered by node id."""
        statuses = [connection.status() for connection in self._connections]
        return sorted(statuses, key=lambda status: (status.node_id, status.connected_since))

    def resources(self, key: Hashable) -> list[Resource]:
        """Return what the proxies of a group should have, with what stands in for what is in quarantine."""
        point = self._groups[key].point
        types = sorted(point, key=lambda url: (PUSH_ORDER.index(url) if url in PUSH_ORDER else math.inf, url))
        return [point[type_url][name] for type_url in types for name in sorted(point[type_url])]

    def refusals(self) -> list[Refusal]:
        """Return what is in quarantine."""
        return [refusal for group in self._groups.values() for refusal in group.refusals.values()]

    def changed(self) -> None:
        """Tell whoever listens that the status changed."""
        if self.on_change is not None:
            self.on_change()

    def _handler(
        self, type_url: str, *, delta: bool
    ) -> Callable[[Any, grpc.aio.ServicerContext[bytes, bytes]], Awaitable[None]]:
        async def handle(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            if self._stopping or not self._ready:
                text = "stopping" if self._stopping else "not ready: sources are still being read"
                await context.abort(grpc.StatusCode.UNAVAILABLE, text)
            connection = _Connection(self, context, type_url, delta=delta)
            try:
                end = await connection.run()
            except _Closed as closed:
                end = closed.end
            # gRPC's call keeps the exception of an abort, and with it all that is in reach here, in a circle.
            del connection
            if end is not None:
                await context.abort(*end)

        return handle

    async def _recheck(self, authenticator: Authenticator) -> None:
        """End the streams of those who may not have any more what they get."""
        while True:
            await asyncio.sleep(RECHECK)
            try:
                revision = authenticator.revision()
                for connection in list(self._connections):
                    if connection.revision != revision:
                        await connection.recheck()
            except Exception:  # the authenticator's own; who is connected stays so until the next time
                log.exception("credentials could not be checked again")

    @property
    def authenticates(self) -> bool:
        """Whether peers have to prove who they are."""
        return self._authenticator is not None

    def revision(self) -> object:
        """Return which `authenticate` is asked now."""
        return self._authenticator and self._authenticator.revision()

    async def authenticate(
        self, peer: Peer, metadata: Mapping[str, str | bytes], node: Node, known: object = None
    ) -> object:
        """Return who a peer is. Raises NodeRejected."""
        if self._authenticator is None:
            return None
        return await self._authenticator.authenticate(peer, metadata, node, known)

    def group(self, node: Node, identity: object) -> Hashable:
        """Return the group of a proxy. Raises NodeRejected."""
        return self._source.group(node, identity)

    def join(self, connection: "_Connection", node: Node, identity: object) -> Group:
        """Put a stream into its group. Raises NodeRejected."""
        try:
            key = self.group(node, identity)
        except BaseException:
            self._left(identity)
            raise
        group = self._groups.get(key)
        if group is None:
            group = Group(
                key,
                self._source.snapshot(key),
                identifier=self._identifier,
                numbers=self._numbers,
                recent=self._recent,
                archive=self._archive,
            )
            self._groups[key] = group
        elif not group.wakers:
            # It may not have been published to while nobody was there.
            group.publish(self._source.snapshot(key))
        group.wakers.add(connection.begin)
        self._connections.add(connection)
        return group

    def share(self, key: Hashable, node: Node) -> Node:
        """Return the node with the metadata of the one before it in its group, if both say the same."""
        latest = self._latest.get(key)
        if latest is not None and latest.metadata == node.metadata:
            node = replace(node, metadata=latest.metadata)
        self._latest[key] = node
        return node

    def leave(self, connection: "_Connection", group: Group) -> None:
        """Take a stream out of its group."""
        group.wakers.discard(connection.begin)
        self._connections.discard(connection)
        self._left(connection.identity)
        self.changed()

    def _left(self, identity: object) -> None:
        if self._authenticator is not None:
            self._authenticator.left(identity)


class _Connection:
    """One stream of one proxy."""

    __slots__ = (
        "__weakref__",
        "_context",
        "_delta",
        "_ending",
        "_metadata",
        "_node",
        "_peer",
        "_progress",
        "_reader",
        "_server",
        "_since",
        "_stream",
        "_timer",
        "_type_url",
        "_who",
        "_why",
        "_writer",
        "identity",
        "revision",
    )

    def __init__(
        self,
        server: ManagementServer,
        context: "grpc.aio.ServicerContext[bytes, bytes]",
        type_url: str,
        *,
        delta: bool,
    ) -> None:
        self._server = server
        self._context = context
        self._type_url = type_url
        self._delta = delta
        self._ending = False
        # Asked for once, at the start: when a client was killed, peer() of its call crashes the process as
        # long as the handler still runs (segmentation fault, seen with grpcio 1.85).
        self._peer = context.peer()
        names = context.auth_context()
        self._who = Peer(
            self._peer,
            tuple(name.decode(errors="replace") for name in names.get("peer_uri", ())),
            tuple(name.decode(errors="replace") for name in names.get("peer_dns", ())),
            b"".join((*names.get("x509_pem_cert", ()), *names.get("x509_pem_cert_chain", ()))),
        )
        metadata = context.invocation_metadata() if server.authenticates else None
        self._metadata = dict(metadata) if metadata else NOTHING
        self.revision: object = None
        """Of the credentials by which it was let in."""
        self.identity: object = None
        """What the authenticator made of it."""
        self._reader: asyncio.Task[Any]
        """The task of the handler."""
        self._writer: asyncio.Task[None] | None = None
        """What writes responses; None: nothing is due."""
        self._timer: asyncio.TimerHandle | None = None
        """When something will have waited long enough."""
        self._why: BaseException | None = None
        """Why this side ends the stream."""
        self._since = time.time()
        self._node: Node
        self._stream: Stream[DeltaSubscription] | Stream[SotwSubscription]
        self._progress = Progress()

    def begin(self) -> None:
        """Take notice of a new point of the group."""
        began = self._server.change_began
        self._progress.begin(time.monotonic() if began is None else began)
        self.wake()

    def wake(self) -> None:
        """Look for something to send."""
        if self._writer is None and not self._ending:
            self._writer = asyncio.create_task(self._write_responses())
            self._writer.add_done_callback(self._written)

    def close(self, why: BaseException) -> None:
        """End the stream."""
        if self._why is None and not self._ending:
            self._why = why
            self._reader.cancel()

    async def recheck(self) -> None:
        """End the stream if its peer may not have it any more, or should have something else."""
        self.revision = self._server.revision()
        try:
            identity = await self._server.authenticate(self._who, self._metadata, self._node, self.identity)
            key = self._server.group(self._node, identity)
        except AuthenticationUnavailable as unavailable:
            log.warning("proxy cannot be checked again", node=self._node.id, reason=str(unavailable))
        except NodeRejected as rejected:
            log.warning("proxy is cut off", node=self._node.id, peer=self._peer, reason=str(rejected))
            self._server.observer.node_rejected(rejected.status.name)
            self.close(_Closed(rejected.status, str(rejected)))
        else:
            if key != self._stream.group.key:
                self.close(
                    _Closed(grpc.StatusCode.UNAVAILABLE, "the credentials stand for another proxy now")
                )

    async def run(self) -> tuple[grpc.StatusCode, str] | None:
        """Serve the stream until either side ends it; return how this side does. Raises _Closed.

        What a task of it raised is not raised again: a task, its exception and the frame in which that is
        raised would keep each other, and the last request, until all garbage is collected.
        """
        reader = asyncio.current_task()
        assert reader is not None  # noqa: S101 - gRPC runs each call in a task
        self._reader = reader
        try:
            async with asyncio.timeout(FIRST_REQUEST):
                request = self._request(await self._context.read())
        except TimeoutError:
            raise _Closed(grpc.StatusCode.DEADLINE_EXCEEDED, "no request came") from None
        if request is None:
            return None
        self._node = _node(request)
        try:
            self.revision = self._server.revision()
            self.identity = await self._server.authenticate(self._who, self._metadata, self._node)
            group = self._server.join(self, self._node, self.identity)
        except NodeRejected as rejected:
            log.warning("proxy rejected", node=self._node.id, peer=self._peer, reason=str(rejected))
            self._server.observer.node_rejected(rejected.status.name)
            raise _Closed(rejected.status, str(rejected)) from None
        self._node = self._server.share(group.key, self._node)
        if self._delta:
            self._stream = Stream(group, self._node.id, DeltaSubscription)
        else:
            kind = _WRAPPING if self._node.wraps else SotwSubscription
            self._stream = Stream(group, self._node.id, kind)
        log.info("proxy connected", node=self._node.id, peer=self._peer, delta=self._delta)
        try:
            while request is not None:
                self._take_in(request)
                del request  # Envoy's node message alone has 61 KB
                request = self._request(await self._context.read())
        except asyncio.CancelledError:
            why, self._why = self._why, None
            if why is None or reader.uncancel():
                raise  # gRPC ends the call
            if isinstance(why, _Closed):
                return why.end
            try:
                raise why from None
            finally:
                del why
        finally:
            try:
                await self._end()
            finally:  # gRPC may cancel the handler at that very moment
                self._server.leave(self, group)
            self._stream.subscriptions.clear()  # gRPC can keep a call, and what it can reach, for a while
            log.info("proxy disconnected", node=self._node.id, peer=self._peer)
        return None

    async def _end(self) -> None:
        """End what is written; a write that is under way may end by itself, within WRITE_GRACE.

        1. A write is cancelled while its batch is under way. 2. gRPC does not note that the initial metadata
        was sent. 3. It sends them again, with the status; the core refuses that (TOO_MANY_OPERATIONS). 4. The
        client never learns that the stream ended (seen with grpcio 1.85).
        """
        self._ending = True
        self._sleep(None)
        writer = self._writer
        if writer is None:
            return
        try:
            await asyncio.wait({writer}, timeout=WRITE_GRACE)
        finally:
            writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)

    def _request(self, data: Any) -> Any:
        """Return the request that was read, None at the end. Raises _Closed."""
        if not isinstance(data, bytes):  # grpc.aio.EOF
            return None
        message = protos.DeltaDiscoveryRequest if self._delta else protos.DiscoveryRequest
        with contextlib.suppress(DecodeError):
            return message.FromString(data)
        del data  # the exception keeps what is in reach here
        raise _Closed(grpc.StatusCode.INVALID_ARGUMENT, "not a discovery request")

    async def _write_responses(self) -> None:
        """Write until nothing is due."""
        clock = asyncio.get_running_loop().time
        while not self._ending:
            began = clock()
            response = self._stream.next_response(began)
            if response is None:
                self._note()
                self._sleep(self._stream.wake_at(began))
                self._writer = None
                return
            await self._context.write(response.data)
            self._server.observer.pushed(response.type_url, len(response.data), clock() - began)

    def _written(self, writer: asyncio.Task[None]) -> None:
        if not writer.cancelled() and (error := writer.exception()) is not None:
            self.close(error)

    def _sleep(self, wake_at: float | None) -> None:
        """Look again at that time of the event loop, if nothing comes before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if wake_at is None else asyncio.get_running_loop().call_at(wake_at, self.wake)

    def _note(self) -> None:
        converged = self._progress.note(self._stream.subscriptions, self._stream.group)
        if converged is not None:
            self._server.observer.converged(converged)

    def _take_in(self, request: Any) -> None:
        """Take in a request. Raises _Closed."""
        type_url = sys.intern(request.type_url) or self._type_url
        if not type_url:
            raise _Closed(grpc.StatusCode.INVALID_ARGUMENT, "type_url is required on an aggregated stream")
        if self._type_url and type_url != self._type_url:
            raise _Closed(grpc.StatusCode.INVALID_ARGUMENT, f"this service has only {self._type_url}")
        detail = request.error_detail
        error = nack_text(type_url, detail.message) if request.HasField("error_detail") else None
        try:
            known = type_url in self._stream.subscriptions
            subscription = self._stream.subscription(type_url)
            if known and request.response_nonce and not subscription.expects(request.response_nonce):
                self._server.observer.nonce_expired(type_url)
            last_error = subscription.last_error
            if isinstance(subscription, DeltaSubscription):
                subscription.request(
                    subscribe=request.resource_names_subscribe,
                    unsubscribe=request.resource_names_unsubscribe,
                    initial_versions=dict(request.initial_resource_versions),
                    nonce=request.response_nonce,
                    error=error,
                    wall_time=time.time(),
                )
            else:
                subscription.request(
                    names=request.resource_names,
                    version=request.version_info,
                    nonce=request.response_nonce,
                    error=error,
                    wall_time=time.time(),
                )
            self._stream.check_names()
        except TooManyNamesError:
            text = f"more than {MAX_NAMES} names, or one of more than {MAX_NAME} characters"
            raise _Closed(grpc.StatusCode.RESOURCE_EXHAUSTED, text) from None
        except TooManyTypesError:
            raise _Closed(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {MAX_TYPES} types") from None
        if subscription.last_error is not None and subscription.last_error is not last_error:
            self._server.observer.rejected(type_url)
            log.warning(
                "response refused; the proxy keeps its last good configuration",
                node=self._node.id,
                type_url=type_url,
                names=subscription.last_error.names,
                detail=subscription.last_error.detail,
            )
        self.wake()
        if request.response_nonce:
            self._server.changed()

    def status(self) -> ProxyStatus:
        """Describe this stream."""
        self._note()
        return ProxyStatus(
            node_id=self._node.id,
            node_cluster=self._node.cluster,
            metadata=self._node.metadata,
            envoy_version=self._node.version,
            group=self._stream.group.key,
            delta=self._delta,
            connected_since=self._since,
            peer=self._peer,
            types={
                type_url: type_status(subscription, self._stream.group)
                for type_url, subscription in self._stream.subscriptions.items()
            },
        )


def _node(request: Any) -> Node:
    """Return the node of a stream's first request. Raises _Closed."""
    node = request.node
    if not node.id:
        raise _Closed(grpc.StatusCode.INVALID_ARGUMENT, "missing node information: node.id is required")
    if len(node.id) > MAX_NAME or node.ByteSize() > MAX_NODE:
        text = f"node.id of more than {MAX_NAME} characters, or node of more than {MAX_NODE} bytes"
        raise _Closed(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
    try:
        metadata = _interned(json_format.MessageToDict(node.metadata)) if node.HasField("metadata") else {}
    except ValueError:
        text = f"node {node.id!r}: metadata has a number that is none in JSON"
        raise _Closed(grpc.StatusCode.INVALID_ARGUMENT, text) from None
    version = node.user_agent_build_version.version
    known = node.HasField("user_agent_build_version")
    return Node(
        id=node.id,
        cluster=sys.intern(node.cluster),
        metadata=metadata,
        version=sys.intern(f"{version.major_number}.{version.minor_number}.{version.patch}") if known else "",
        wraps=WRAPS in node.client_features,
    )


def _interned(value: Any) -> Any:
    """Return the same JSON with texts that all have in common: proxies say much the same of themselves."""
    match value:
        case str():
            return sys.intern(value)
        case dict():
            return {sys.intern(key): _interned(each) for key, each in value.items()}
        case list():
            return [_interned(each) for each in value]
    return value
