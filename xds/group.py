"""What the streams of one group of proxies share: a history, encoded responses, quarantine.

All proxies of a group are sent the same resources. What they should have moves from `Point` to `Point`; a
stream compares where it is with the newest point and never sees a queue of those between. A response that
takes a stream from one set of resources to the next is encoded once, nonce included, and the same bytes go
to every stream at the same place (a nonce need only be unique within its stream; a stream uses responses in
the order of their numbers).

Quarantine: a version of a resource that a proxy refused (NACK) and that no proxy of the group ever accepted
(ACK) is replaced, for all proxies of the group, by the version that was accepted last, or else is held: who
has any version keeps it, newcomers go without. That lasts until the content changes, or until some proxy
accepts that very version after all; a proxy that refuses what others accept is alone with its refusal (see
`Subscription.refused`).

What is refused is told to an archive, and that is asked whenever there is something new: what proxies like
these refused lately, in an earlier process or at another server, begins in quarantine.

No I/O and no clock in here.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Never, Protocol
from weakref import WeakValueDictionary

from xds.names import Names
from xds.resources import PUSH_ORDER, ROUTES_FIRST, Resource, encode_field
from xds.snapshot import EMPTY, ResourceSet, Snapshot

MAX_DETAIL: Final = 1024
"""Characters of an Envoy's error text that are kept."""

NOTHING: Final[Mapping[str, Never]] = MappingProxyType({})
"""What most streams have most of the time, in many respects; one for all."""

RECENT: Final = 32 << 20
"""Bytes of responses that are kept for proxies that come one after the other."""


class Response:
    """An encoded response and what it does to the client that accepts it."""

    __slots__ = (
        "__weakref__",
        "accepted",
        "changes",
        "data",
        "endpoints",
        "nonce",
        "number",
        "removes",
        "type_url",
        "version",
    )

    def __init__(
        self,
        data: bytes,
        number: int,
        changes: Mapping[str, Resource | None],
        *,
        type_url: str,
        version: str,
    ) -> None:
        self.data = data
        self.number = number
        self.nonce = nonce_of(number)
        self.type_url = type_url
        self.version = version
        """Of all resources of the type."""
        self.changes = changes
        """Per name what the client has afterwards (None: nothing)."""
        self.removes = any(resource is None for resource in changes.values())
        self.endpoints = frozenset(r.endpoints for r in changes.values() if r is not None and r.endpoints)
        self.accepted = False
        """Whether any client accepted it."""


def nonce_of(number: int) -> str:
    """Return the nonce of the response with this number; numbers grow over all responses of a server."""
    return f"{number:x}"


class Recent:
    """Responses for proxies to come, of all groups: those of their newest points.

    Others live only until the last client answered them: what a client asks for can be anything, and what
    takes clients from one point to the next is of no use to those that come later.
    """

    def __init__(self) -> None:
        self._responses: dict[int, list[Response]] = {}
        """By the sequence of the point that they are for."""
        self._size = 0

    def keep(self, sequence: int, response: Response) -> None:
        """Keep a response; if that is too much, all that is of the oldest points is let go."""
        self._responses.setdefault(sequence, []).append(response)
        self._size += _size(response)
        while self._size > RECENT:
            self.forget(next(iter(self._responses)))

    def forget(self, sequence: int) -> None:
        """Let go what is of this point."""
        self._size -= sum(map(_size, self._responses.pop(sequence, ())))


def _size(response: Response) -> int:
    return len(response.data) + 1024  # the object, and what it says of the changes


class Point:
    """What the proxies of a group should have, at one step of its history; the sequence grows."""

    __slots__ = ("_sets", "incomplete", "sequence", "shared", "variants")

    def __init__(self, sequence: int, sets: Mapping[str, ResourceSet], *, incomplete: bool = False) -> None:
        self.sequence = sequence
        self.incomplete = incomplete
        """Proxies may rightly have more than this (`Snapshot.incomplete`)."""
        self._sets = sets
        self.shared: WeakValueDictionary[Hashable, Response] = WeakValueDictionary()
        """Responses that several streams can use; each lives until the last client answered it, or longer
        (`Recent`)."""
        self.variants: WeakValueDictionary[Hashable, ResourceSet] = WeakValueDictionary()
        """Sets that are, for several streams, between two points; each lives as long as a client has it."""

    def __getitem__(self, type_url: str) -> ResourceSet:
        return self._sets.get(type_url, EMPTY)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sets)


ORIGIN: Final = Point(0, {})
"""Before anything was sent."""


class Holding:
    """What a client holds of one type: a set that many share, and what is different (None: absent)."""

    __slots__ = ("base", "own")

    def __init__(self) -> None:
        self.base: ResourceSet = EMPTY
        self.own: Mapping[str, Resource | None] = NOTHING

    def get(self, name: str) -> Resource | None:
        """Return what the client has under that name."""
        return self.own[name] if name in self.own else self.base.get(name)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of what the client has."""
        yield from (name for name in self.base if name not in self.own)
        yield from (name for name, resource in self.own.items() if resource is not None)

    def update(self, changes: Mapping[str, Resource | None]) -> None:
        """Note that the client has these (None: nothing)."""
        get = self.base.get
        own = self.own if isinstance(self.own, dict) else {}
        for name, resource in changes.items():
            if resource is (other := get(name)) or resource == other:
                own.pop(name, None)
            else:
                own[name] = resource
        self.own = own or NOTHING

    def rebase(self, base: ResourceSet) -> None:
        """Express the same holding in terms of another set."""
        if base is self.base:
            return
        changed = base.changed(self.base).difference(self.own)
        own = {**self.own, **{name: self.base.get(name) for name in changed}}
        get = base.get
        self.base = base
        # Most are the very same object.
        self.own = {
            name: resource
            for name, resource in own.items()
            if resource is not (other := get(name)) and resource != other
        } or NOTHING


@dataclass(frozen=True, slots=True)
class Refusal:
    """A version of a resource that is in quarantine, and why."""

    group: Hashable
    type_url: str
    name: str
    version: str
    detail: str
    """Envoy's words (error_detail.message), cut at MAX_DETAIL."""
    since: float
    """Seconds since the epoch."""
    node_id: str
    """The proxy that refused it first."""
    archived: bool = False
    """It was refused in another group, at another server or in an earlier process."""

    @property
    def refused(self) -> tuple[str, str, str]:
        """What an archive calls the version."""
        return self.type_url, self.name, self.version


class Archive(Protocol):
    """Remembers refused versions, for other groups, replicas and later processes.

    Such a version is called by type URL, name and version.
    """

    def put(self, refused: tuple[str, str, str], good: Resource) -> None:
        """Remember the version that was accepted last for a refused one."""

    def get(self, refused: tuple[str, str, str]) -> Resource | None:
        """Return it, if it is known."""

    def add(self, refusal: Refusal) -> None:
        """Remember who refused it."""

    def drop(self, refusal: Refusal) -> None:
        """Forget that: proxies of its group accept it, or it has gone."""

    def refusals(self, group: Hashable) -> Iterable[Refusal]:
        """Return what proxies like those of a group refused lately."""


class Group:
    """The shared state of the proxies that get the same snapshot."""

    def __init__(
        self,
        key: Hashable,
        snapshot: Snapshot,
        *,
        identifier: str,
        numbers: Iterator[int],
        recent: Recent,
        archive: Archive | None = None,
    ) -> None:
        self.key = key
        self._archive = archive
        self.point = ORIGIN
        self.refusals: dict[tuple[str, str], Refusal] = {}
        self.wakers: set[Callable[[], None]] = set()
        """One of each stream, called whenever there is a new point."""
        self._snapshot = Snapshot()
        self.order = PUSH_ORDER
        """In which order types are sent."""
        self._good: dict[str, Holding] = {}
        self._names: WeakValueDictionary[int, Names] = WeakValueDictionary()
        """By their hash, what clients ask for; shared, since most ask for the same."""
        self._control_plane = encode_field(1, identifier.encode())
        self._numbers = numbers
        self._recent = recent
        self.publish(snapshot)

    def publish(self, snapshot: Snapshot) -> None:
        """Make `snapshot` what the proxies of the group should have."""
        sets = {}
        for type_url in {*snapshot, *self._snapshot}:
            old, new = self._snapshot[type_url], snapshot[type_url]
            sets[type_url] = new if new.changed(old) else old
        self._snapshot = Snapshot.from_sets(sets, incomplete=snapshot.incomplete)
        self.order = ROUTES_FIRST if snapshot.routes_first else PUSH_ORDER
        for key, refusal in list(self.refusals.items()):
            if not self.has(refusal):
                self._lift(key)
            elif refusal.archived:
                del self.refusals[key]  # unless it still counts
        self._recall()
        self._step()

    def has(self, refusal: Refusal) -> bool:
        """Whether the refused version is still the one that the proxies should have, or stands in for it."""
        resources = (of[refusal.type_url].get(refusal.name) for of in (self._snapshot, self.point))
        return any(resource is not None and resource.version == refusal.version for resource in resources)

    def stands(self, refusal: Refusal) -> bool:
        """Whether the refusal of one proxy still counts: by quarantine, or because others accept the version.

        If the version was away meanwhile, and nobody looked, it is tried again.
        """
        good = self._good_of(refusal.type_url).get(refusal.name)
        quarantined = self.refusals.get((refusal.type_url, refusal.name))
        return self.has(refusal) and refusal.version in {
            other.version for other in (good, quarantined) if other
        }

    def refuse(self, refusal: Refusal, fallback: Resource | None) -> None:
        """Put a resource into quarantine, unless it is of the past or a proxy of the group accepted it.

        `fallback` is what the refusing proxy has instead; it counts if nothing better is known. After that,
        the archive is asked.
        """
        good = self._good_of(refusal.type_url)
        last = good.get(refusal.name)
        if not self.has(refusal) or (last is not None and last.version == refusal.version):
            return
        if last is None and fallback is not None and fallback.delta_frame and not fallback.held:
            good.update({refusal.name: fallback})
        self.refusals[refusal.type_url, refusal.name] = refusal
        self._archive_good(refusal)
        if self._archive is not None:
            self._archive.add(refusal)
        self._step()

    def look_again(self) -> None:
        """Ask the archive again, in which there is more than before."""
        self._recall()
        self._step()

    def accept(self, type_url: str, response: Response) -> None:
        """Note that a proxy accepted a response; what it brought is good for the group."""
        if response.accepted:
            return
        response.accepted = True
        good = self._good_of(type_url)
        # What is held is what closes, where nothing good is known.
        good.update({name: new for name, new in response.changes.items() if new is None or not new.held})
        self.note_accepted(type_url, response.changes)
        good.rebase(self.point[type_url])

    def note_accepted(self, type_url: str, accepted: Mapping[str, Resource | None]) -> None:
        """Lift the quarantine of what a proxy accepted, now or before it came here.

        For what stays in quarantine, this may be the first that is known to be good.
        """
        quarantined = [key for key in self.refusals if key[0] == type_url and key[1] in accepted]
        for key in quarantined:
            resource = accepted[key[1]]
            if resource is not None and resource.version == self.refusals[key].version:
                self._lift(key)
            else:
                self._archive_good(self.refusals[key])
        if quarantined:
            self._step()

    def report(self, type_url: str, base: ResourceSet, exceptions: Mapping[str, Resource | None]) -> None:
        """Note that a proxy came with the resources of `base` except `exceptions`: they are good."""
        good = self._good_of(type_url)
        good.rebase(base)
        good.own = {
            name: resource
            for name, resource in good.own.items()
            if name not in base or name in exceptions or name in base.held
        } or NOTHING

    def encode_delta(
        self,
        type_url: str,
        version: str,
        changes: Mapping[str, Resource | None],
        heartbeats: Iterable[bytes] = (),
    ) -> Response:
        """Encode a DeltaDiscoveryResponse, with frames that change nothing besides."""
        number = next(self._numbers)
        parts: list[bytes | memoryview] = [encode_field(1, version.encode())]
        parts += [resource.delta_frame for resource in changes.values() if resource is not None]
        parts += heartbeats
        parts.append(encode_field(4, type_url.encode()))
        parts.append(encode_field(5, nonce_of(number).encode()))
        parts += [encode_field(6, name.encode()) for name, resource in changes.items() if resource is None]
        parts.append(encode_field(7, self._control_plane))
        return Response(b"".join(parts), number, changes, type_url=type_url, version=version)

    def encode_sotw(
        self,
        type_url: str,
        version: str,
        frames: Iterable[bytes | memoryview],
        changes: Mapping[str, Resource | None],
    ) -> Response:
        """Encode a DiscoveryResponse of the frames of resources, which brings `changes` to the client."""
        number = next(self._numbers)
        parts: list[bytes | memoryview] = [encode_field(1, version.encode())]
        parts += frames
        parts.append(encode_field(4, type_url.encode()))
        parts.append(encode_field(5, nonce_of(number).encode()))
        parts.append(encode_field(6, self._control_plane))
        return Response(b"".join(parts), number, changes, type_url=type_url, version=version)

    def good(self, type_url: str, names: Iterable[str]) -> dict[str, Resource | None]:
        """Return the versions of these that were accepted last, of those of which one is known."""
        get = self._good_of(type_url).get
        return {name: resource for name in names if (resource := get(name)) is not None}

    def published(self, type_url: str, name: str) -> Resource | None:
        """Return what proxies should have but for quarantine, if it has any content."""
        resource = self._snapshot[type_url].get(name)
        return resource if resource is not None and resource.delta_frame else None

    def keep(self, point: Point, response: Response) -> None:
        """Keep a response for proxies to come; it should name nothing but what there is."""
        if point is self.point:
            self._recent.keep(point.sequence, response)

    def forget(self) -> None:
        """Let go what is kept for proxies to come."""
        self._recent.forget(self.point.sequence)

    def names(self, type_url: str, old: Names, added: frozenset[str], removed: frozenset[str]) -> Names:
        """Return names as one object for all clients, made of the strings of the resources.

        A thousand proxies with ten thousand secrets each would have ten million strings. `old` is what the
        client asked for before: only what is new is looked at.
        """
        get = self.point[type_url].get
        known = (name if (resource := get(name)) is None else resource.name for name in added)
        new = old.but(frozenset(known), removed)
        shared = self._names.setdefault(hash(new), new)
        return shared if shared is new or shared == new else new

    def _good_of(self, type_url: str) -> Holding:
        return self._good.setdefault(type_url, Holding())

    def _lift(self, key: tuple[str, str]) -> None:
        """End a quarantine."""
        refusal = self.refusals.pop(key)
        if self._archive is not None:
            self._archive.drop(refusal)

    def _recall(self) -> None:
        """Put into quarantine what proxies like these refused lately, but for what was accepted here."""
        if self._archive is None:
            return
        for refusal in self._archive.refusals(self.key):
            resource = self._snapshot[refusal.type_url].get(refusal.name)
            good = self._good_of(refusal.type_url).get(refusal.name)
            if resource is None or resource.version != refusal.version:
                continue
            if good is None or good.version != refusal.version:
                self.refusals.setdefault((refusal.type_url, refusal.name), refusal)
        for refusal in self.refusals.values():
            if self._good_of(refusal.type_url).get(refusal.name) is None:
                self._archive_good(refusal)

    def _archive_good(self, refusal: Refusal) -> None:
        """Tell the archive what stands in for a refused version, or ask it."""
        if self._archive is None:
            return
        good = self._good_of(refusal.type_url)
        if (known := good.get(refusal.name)) is not None:
            self._archive.put(refusal.refused, known)
        elif (found := self._archive.get(refusal.refused)) is not None:
            good.update({refusal.name: found})

    def _step(self) -> None:
        """Move to a new point if what the proxies should have is different from the current one."""
        replacements: dict[str, dict[str, Resource | None]] = {}
        for type_url, name in self.refusals:
            good = self._good_of(type_url).get(name)
            refused = self._snapshot[type_url].get(name)
            stand_in = refused.stand_in(good) if refused else good
            replacements.setdefault(type_url, {})[name] = stand_in or Resource.unknown(type_url, name)
        sets = {}
        for type_url in {*self._snapshot, *self.point}:
            current = self.point[type_url]
            new = self._snapshot[type_url].replace(replacements.get(type_url, {}))
            sets[type_url] = new if new.changed(current) else current
        incomplete = self._snapshot.incomplete
        if (
            self.point is ORIGIN
            or incomplete is not self.point.incomplete
            or any(self.point[type_url] is not new for type_url, new in sets.items())
        ):
            self.forget()
            self.point = Point(next(self._numbers), sets, incomplete=incomplete)
            for wake in self.wakers:
                wake()
