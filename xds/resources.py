"""One named resource of xDS, encoded and framed once.

Encoding is what costs when one change goes to a thousand proxies, so a resource carries its bytes in the
form in which both protocol variants put them on the wire (`envoy/service/discovery/v3/discovery.proto`):

* delta: `DeltaDiscoveryResponse.resources` (field 2) of type `Resource` with name, version and resource;
* state of the world: `DiscoveryResponse.resources` (field 2) of type `google.protobuf.Any`.

The member `resource` of `Resource` is field 2 as well. It is put last, so the frame for state of the
world is the tail of the frame for delta, and one bytes object serves both. Only a time to live needs a
`Resource` in state of the world, too (xds_protocol, "TTL").
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

TYPE_URL_PREFIX: Final = "type.googleapis.com/"
CDS: Final = TYPE_URL_PREFIX + "envoy.config.cluster.v3.Cluster"
EDS: Final = TYPE_URL_PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment"
LDS: Final = TYPE_URL_PREFIX + "envoy.config.listener.v3.Listener"
SRDS: Final = TYPE_URL_PREFIX + "envoy.config.route.v3.ScopedRouteConfiguration"
RDS: Final = TYPE_URL_PREFIX + "envoy.config.route.v3.RouteConfiguration"
SDS: Final = TYPE_URL_PREFIX + "envoy.extensions.transport_sockets.tls.v3.Secret"
ECDS: Final = TYPE_URL_PREFIX + "envoy.config.core.v3.TypedExtensionConfig"

PUSH_ORDER: Final = (CDS, EDS, ECDS, LDS, SRDS, RDS, SDS)
"""Who may refer to whom: a type is sent before those that refer to it (xds_protocol, "Eventual
consistency")."""

ROUTES_FIRST: Final = (CDS, EDS, LDS, SRDS, RDS, ECDS, SDS)
"""The order of a snapshot that takes routes away with the filters that guard them."""

WILDCARD_TYPES: Final = frozenset({CDS, LDS, SRDS})
"""Types of which a client gets all when it names none. Envoy asks for scoped routes in this way, too."""

REFERRING_TYPES: Final = frozenset({LDS, SRDS, RDS, ECDS})
"""Types that put the many together; the others stand for themselves."""

_RESOURCE: Final = TYPE_URL_PREFIX + "envoy.service.discovery.v3.Resource"
_XDSTP: Final = "xdstp://"


def is_glob(name: str) -> bool:
    """Whether a name stands for a collection: `xdstp://AUTHORITY/TYPE/PATH/*`, perhaps with parameters."""
    return name.startswith(_XDSTP) and name.partition("?")[0].endswith("/*")


def glob_of(name: str) -> str:
    """Return the collection that a resource belongs to by its name, empty if it cannot be in any.

    As in Envoy (WatchMap::watchesInterestedIn), only the last part of the path varies in a collection.
    """
    if not name.startswith(_XDSTP):
        return ""
    path, mark, parameters = name.partition("?")
    return f"{path[: path.rindex('/')]}/*{mark}{parameters}"


def encode_field(number: int, payload: bytes) -> bytes:
    """Encode a length-delimited protobuf field (string, bytes or message)."""
    return b"".join((bytes(((number << 3) | 2,)), encode_varint(len(payload)), payload))


def encode_varint(value: int) -> bytes:
    """Encode a non-negative number in protobuf's base-128 form."""
    encoded = bytearray()
    while value >> 7:
        encoded.append((value & 0x7F) | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Resource:
    """A named resource; two with the same type, name and version have the same content.

    `version` is a hash of the content, so that replicas agree and a restart changes nothing. The bytes stay
    out of `repr`: a Secret holds a key.

    `held` says: this resource exists, but its newest content is not known (its source cannot be read). A
    client that has any version of it is left alone; one that has none gets the content given here, if there
    is any.
    """

    type_url: str
    name: str
    version: str
    held: bool = False
    endpoints: str = ""
    """Of a Cluster of type EDS: the name of its ClusterLoadAssignment, which has to follow it."""
    ttl: timedelta | None = None
    """After this time without a word from the server the client drops it; the server renews it in time."""
    guard: "Guard | None" = field(default=None, compare=False)
    """What stands in for it when it cannot be served, if its last good version does not."""
    delta_frame: bytes = field(default=b"", repr=False, compare=False)
    body_size: int = field(default=0, compare=False)

    @classmethod
    def of(
        cls,
        message: Message,
        name: str | None = None,
        *,
        held: bool = False,
        ttl: timedelta | None = None,
        guard: "Guard | None" = None,
    ) -> "Resource":
        """Encode `message`.

        Its name is, unless given, its field `name` (`cluster_name` of a ClusterLoadAssignment).
        """
        full_name = message.DESCRIPTOR.full_name
        type_url = TYPE_URL_PREFIX + full_name
        if name is None:
            name = str(getattr(message, "cluster_name" if type_url == EDS else "name"))
        content = message.SerializeToString(deterministic=True)
        body = encode_field(1, type_url.encode()) + encode_field(2, content)
        endpoints = _endpoints(message) if type_url == CDS else ""
        return cls.of_body(type_url, name, body, held=held, endpoints=endpoints, ttl=ttl, guard=guard)

    @classmethod
    def of_body(
        cls,
        type_url: str,
        name: str,
        body: bytes,
        *,
        held: bool = False,
        endpoints: str = "",
        ttl: timedelta | None = None,
        guard: "Guard | None" = None,
    ) -> "Resource":
        """Make a resource of an encoded `google.protobuf.Any`."""
        version = hashlib.sha256(body + _lifetime(ttl)).hexdigest()[:16]
        frame = encode_field(2, _head(name, version, ttl) + encode_field(2, body))
        return cls(type_url, name, version, held, endpoints, ttl, guard, frame, len(body))

    @classmethod
    def unknown(cls, type_url: str, name: str, version: str = "") -> "Resource":
        """Make a resource whose content is not known here; without a version it is held."""
        return cls(type_url, name, version, held=not version)

    def stand_in(self, good: "Resource | None") -> "Resource | None":
        """Return what is served when this one is refused: its last good version, but nothing that is open.

        If that is not known here, who has any version that is not open keeps it. (Where this one is the open
        one itself, there is nothing to close.)
        """
        if self.guard is None or self.version == self.guard.open:
            return good
        if good is None:
            return replace(self.guard.closed(), held=True, guard=self.guard)
        return self.guard.closed() if good.version == self.guard.open else good

    def instead_of(self, has: "Resource | None") -> "Resource | None":
        """Return what a client gets of this held resource that has, or was sent, `has`.

        Of what it has it cannot always tell the version (it is held then), so that it may be open.
        """
        if has is None or (self.guard is not None and (has.held or has.version == self.guard.open)):
            return self if self.delta_frame else None
        return has

    @property
    def body(self) -> bytes:
        """The encoded `google.protobuf.Any`; empty if the content is not known."""
        return self.delta_frame[len(self.delta_frame) - self.body_size :]

    @property
    def sotw_frame(self) -> memoryview:
        """The field of a DiscoveryResponse that carries this resource."""
        header = 1 + len(encode_varint(self.body_size))
        return memoryview(self.delta_frame)[len(self.delta_frame) - self.body_size - header :]

    @property
    def wrapped_frame(self) -> bytes:
        """The same with name, version and time to live, for clients that know this form."""
        wrapped = _head(self.name, self.version, self.ttl) + bytes(self.sotw_frame)
        return encode_field(2, encode_field(1, _RESOURCE.encode()) + encode_field(2, wrapped))

    @property
    def heartbeat_frame(self) -> bytes:
        """The field of a DeltaDiscoveryResponse that renews the time to live, without the content."""
        return encode_field(2, _head(self.name, self.version, self.ttl))


@dataclass(frozen=True, slots=True)
class Guard:
    """What a resource falls back to, so that it fails closed."""

    open: str
    """The version that restricts nothing; empty: there is none."""
    closed: Callable[[], Resource]
    """Lets nothing pass. It stands in where the last good version is `open`, or where there is none."""


def _head(name: str, version: str, ttl: timedelta | None) -> bytes:
    """Encode a `Resource` without its content."""
    return encode_field(3, name.encode()) + encode_field(1, version.encode()) + _lifetime(ttl)


def _lifetime(ttl: timedelta | None) -> bytes:
    if ttl is None:
        return b""
    duration = Duration()
    duration.FromTimedelta(ttl)
    return encode_field(6, duration.SerializeToString())


def _endpoints(cluster: Any) -> str:
    if cluster.WhichOneof("cluster_discovery_type") != "type" or cluster.type != cluster.EDS:
        return ""
    return str(cluster.eds_cluster_config.service_name or cluster.name)
