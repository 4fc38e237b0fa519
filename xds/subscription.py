"""What both variants of the protocol have in common for one resource type on one stream.

Theory of operation
-------------------
A subscription knows what the client asks for (`wildcard`, `names`), what it **has** (`held`: accepted by
ACK, or reported on reconnect) and what was **sent** and not answered yet (`pending`, oldest first). What it
was last sent is `held` with `pending` on top. Sent and accepted are never mixed up: an ACK moves the changes
of its response into `held`, a NACK just takes the response out of `pending`, which rolls it back.

After a NACK the members of the refused response are sent again in parts (`isolated`), until a response with
a single member is refused: that is the culprit. The client is not sent this version again (`refused`), and
the group is told (see `xds.group`). Nothing is repeated that was refused, so there is no loop.

The next response does not wait for the answer to the last one, unless very many are unanswered (Envoy is
stopped, say): each has to be remembered, since it may still be refused. What else waits `Phase` describes:
changes of types that could refer to new clusters wait for `phase.target`; removals of what could still be
referred to wait in `deferred`.

`next_response` computes what is to be sent *now*; it is called when the transport can take a message, so
there is no queue, and of several changes only the latest is sent.

As long as a snapshot is incomplete, nothing is removed, and of what the client has from an earlier stream
(of unknown content: perhaps it refers to what is missing here) listeners and routes are not replaced. Both
are made good (`kept`) when the snapshot is complete again.

A client that asks for names is no other than one that asks for all: what it should have is a set of its own,
the part of its names (`ResourceSet.part`). Clients that ask for the same have the same set.

A name `xdstp://AUTHORITY/TYPE/PATH/*` subscribes to a collection (`globs`): to whatever is in it, like a
wildcard of its own. If nothing is, the collection itself is what does not exist.

A resource may have a time to live (`Resource.ttl`). Before half of it is over, what the client has is
renewed (`heartbeat`).

What may live here: plain values in, plain values out. No I/O, no clock (the time is an argument), no
knowledge of what a resource contains.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from xds.group import NOTHING, ORIGIN, Group, Holding, Point, Refusal, Response, nonce_of
from xds.names import NONE, Names, members_of
from xds.resources import ECDS, REFERRING_TYPES, Resource, glob_of
from xds.snapshot import EMPTY, ResourceSet

MAX_PENDING: Final = 32
"""Responses of a type whose answers are awaited; while there are so many, none is sent."""

MAX_NAMES: Final = 100_000
"""Names that a client may subscribe to, or say that it has: ten times what a large mesh has. A request that
adds or drops one of so many costs everybody some 10 ms, in which the others are copied."""

MAX_NAME: Final = 4096
"""Characters of a name, and of a type URL, that a client may use."""


class TooManyNamesError(Exception):
    """A client subscribed to more or longer names than memory should be spent on."""


def check_names(names: AbstractSet[str]) -> None:
    """Raise TooManyNamesError if names that are new are too many or too long (all: `Stream.check_names`)."""
    if len(names) > MAX_NAMES or any(len(name) > MAX_NAME for name in names):
        raise TooManyNamesError


@dataclass(slots=True)
class Phase:
    """What a type may send now; for make before break (see `xds.stream`)."""

    newest: Point
    target: Point
    """The point to which resources that the client has may be moved; older than `newest` while they have to
    wait."""
    now: float
    """Seconds, on any monotonic clock."""
    removable: float = math.inf
    """Resources that vanished up to the point with this sequence may be removed."""
    patience: float = 0.0
    """Seconds after which a removal waits no longer."""

    def may_remove(self, deferral: "Deferral") -> bool:
        """Whether a removal has waited enough."""
        return deferral.sequence <= self.removable or self.now >= deferral.since + self.patience


@dataclass(frozen=True, slots=True)
class Deferral:
    """A removal that waits."""

    sequence: int
    """Of the point at which the resource was seen to be gone."""
    since: float


@dataclass(slots=True)
class Pending:
    """A response that the client has not answered yet."""

    response: Response
    sequence: int
    """Of the point that it was made for."""
    origin: ResourceSet | None = None
    """The response takes a client from exactly `origin` to exactly `target`, if these are given."""
    target: ResourceSet | None = None
    adds: bool = False
    """It brings resources of which the client has no version."""
    excused: bool = False
    """Others waited long enough for its ACK."""


@dataclass(frozen=True, slots=True)
class LastError:
    """The last NACK of a type."""

    detail: str
    names: tuple[str, ...]
    """The members of the refused response, at most ten."""
    time: float
    """Seconds since the epoch."""


class Subscription:
    """One resource type on one stream; the base of `DeltaSubscription` and `SotwSubscription`."""

    __slots__ = (
        "_dirty",
        "_group",
        "_isolated",
        "_isolated_at",
        "_more",
        "_node_id",
        "_number",
        "_started",
        "_tip",
        "accepted_nonce",
        "accepted_version",
        "deferred",
        "forced",
        "held",
        "kept",
        "last_error",
        "live",
        "names",
        "noted",
        "noted_at",
        "pending",
        "point",
        "refused",
        "refused_at",
        "renew_at",
        "type_url",
        "unanswered",
        "waiting_since",
        "wildcard",
    )

    def __init__(self, type_url: str, group: Group, node_id: str) -> None:
        self.type_url = type_url
        self.wildcard = False
        self.names: Names = NONE
        self.held = Holding()
        self.pending: tuple[Pending, ...] = ()
        self.point: Point = ORIGIN
        """The point that the client was last brought to."""
        self.live = False
        """The client has configuration of this type that is in use."""
        self.waiting_since: float | None = None
        """Since when changes of this type wait for `Phase.target`."""
        self.deferred: Mapping[str, Deferral] = NOTHING
        self.kept: Mapping[str, None] = NOTHING
        """Names that were left alone because of an incomplete snapshot."""
        self.renew_at: float | None = None
        """When what has a time to live is renewed; None: the client has nothing of that kind."""
        self.refused: Mapping[str, Refusal] = NOTHING
        self.refused_at = math.inf
        """The sequence of the oldest point of which something is refused."""
        self.last_error: LastError | None = None
        self.noted = ""
        """The state in which it was last seen (`xds.observer`)."""
        self.noted_at = 0.0
        """When it got into that state, seconds since the epoch."""
        self.accepted_nonce = ""
        """Of the response that was accepted last."""
        self.accepted_version = ""
        """Of all resources of the type, in that response."""
        self.forced: Mapping[str, None] = NOTHING
        """Names to be answered whatever the client has."""
        self.unanswered = False
        """A response is due, even if it is empty."""
        self._group = group
        self._node_id = node_id
        self._started = False
        self._number = 0
        """Of the latest response."""
        self._tip: ResourceSet = EMPTY
        """The set that was last examined for changes."""
        self._dirty: Mapping[str, None] = NOTHING
        """Names to examine in addition to what changed since `_tip`."""
        self._more = False
        """What was sent last was a piece, and the others are to follow; or there is another set to try."""
        self._isolated: tuple[list[str], ...] = ()
        """Members of refused responses, in parts that are to be sent on their own."""
        self._isolated_at = math.inf
        """The sequence of the oldest point that `_isolated` belongs to."""

    # What the phases of other types depend on.

    @property
    def is_full(self) -> bool:
        """Whether so much is unanswered that nothing is sent until something is answered."""
        return len(self.pending) >= MAX_PENDING

    @property
    def adding(self) -> bool:
        """Whether resources that are new to the client were sent and not answered, or may have to be sent."""
        return (
            self.is_full
            or bool(self._isolated)
            or any(pending.adds and not pending.excused for pending in self.pending)
        )

    def is_at_rest(self, point: Point) -> bool:
        """Whether there is nothing to look for as long as this is the newest point, and no request comes."""
        return self.is_full or (
            self.point is point
            and self.waiting_since is None
            and not (self.forced or self.unanswered or self.deferred or self.refused)
            and not (self._dirty or self._isolated or self._more)
        )

    def excuse(self) -> None:
        """Stop others from waiting for what is unanswered now."""
        for pending in self.pending:
            pending.excused = True

    @property
    def settled_sequence(self) -> float:
        """The client answered everything of the points up to this sequence."""
        sequences = [float(pending.sequence) for pending in self.pending[:1]]
        if self._isolated:
            sequences.append(self._isolated_at)
        return min(sequences) - 1 if sequences else self.point.sequence

    @property
    def failing(self) -> bool:
        """Whether the client refuses something that it should have."""
        return bool(self.refused or self._isolated)

    @property
    def nonce(self) -> str:
        """The nonce of the latest response; empty: none yet."""
        return nonce_of(self._number) if self._number else ""

    def expects(self, nonce: str) -> bool:
        """Whether a nonce is the latest one, or that of an unanswered response."""
        return nonce == self.nonce or any(nonce == pending.response.nonce for pending in self.pending)

    # What the client has, was sent, and should have.

    def sent(self, name: str) -> Resource | None:
        """Return what the client was last sent under a name, or has."""
        for pending in reversed(self.pending):
            if name in pending.response.changes:
                return pending.response.changes[name]
        return self.held.get(name)

    def force_endpoints(self, names: Iterable[str]) -> None:
        """Send these again (EDS after a change of their clusters).

        Envoy 1.40 does not ask again for the endpoints of a changed cluster in the delta variant, and the
        cluster, with the ACK of CDS, waits 15 s for them (envoy#33607, envoy#13009).
        """
        self._force(name for name in names if self._relevant(name))

    def _force(self, names: Iterable[str]) -> None:
        self.forced = {**self.forced, **dict.fromkeys(names)} or NOTHING

    def _relevant(self, name: str) -> bool:
        return self.wildcard or self.names.cover(name)

    def _part(self, resources: ResourceSet) -> ResourceSet:
        """Return what the client asks for of these."""
        return resources if self.wildcard else resources.part(self.names, self._tip)

    def _expand(self, names: Iterable[str]) -> set[str]:
        """Put members in the place of collections, except of empty ones."""
        expanded = set(names)
        if globs := expanded & self.names.globs:
            members = members_of(globs, self._group.point[self.type_url])
            expanded -= {glob_of(name) for name in members}
            expanded |= members
        return expanded

    def _wanted(self, name: str, point: Point) -> Resource | None:
        """Return what the client should have: what it has, if that is to be left alone."""
        resource = point[self.type_url].get(name)
        if resource is None:
            return None
        if self._is_left(name, point):
            return self.sent(name)
        if resource.held:
            return resource.instead_of(self.sent(name))
        if self.refused:
            refusal = self.refused.get(name)
            if refusal is not None and refusal.version == resource.version:
                return self.held.get(name)
        return resource

    def _is_left(self, name: str, point: Point) -> bool:
        """Whether an incomplete point does not change what the client has from an earlier stream."""
        if not point.incomplete or self.type_url not in REFERRING_TYPES:
            return False
        sent = self.sent(name)
        return sent is not None and not sent.delta_frame

    def _answer(self, names: Iterable[str], phase: Phase) -> Iterator[tuple[str, Resource | None]]:
        """Return the resources that were asked for, with their names.

        A client waits for what it does not have, so this does not wait for `phase.target`.
        """
        resources = phase.target[self.type_url]
        get = resources.get
        plain = not (self.refused or resources.held or phase.target.incomplete)
        kept = dict(self.kept)
        for name in names:
            resource = get(name) if plain else self._wanted(name, phase.target)
            if resource is None:
                resource = self._wanted(name, phase.newest)
            if resource is None and phase.newest.incomplete and self.sent(name) is not None:
                kept[name] = None
                self.kept = kept
            elif resource is None or resource.delta_frame:
                yield name, resource

    def _differences(self, names: Iterable[str], point: Point, phase: Phase) -> dict[str, Resource | None]:
        """Return what is to be sent of these names, so that the client has what it should have."""
        differences: dict[str, Resource | None] = {}
        deferred, kept = dict(self.deferred), dict(self.kept)
        for name in names:
            kept.pop(name, None)
            if not self._relevant(name):
                deferred.pop(name, None)
                continue
            wanted = self._wanted(name, point)
            if wanted is not None:
                deferred.pop(name, None)
                if wanted.delta_frame and wanted != self.sent(name):
                    differences[name] = wanted
                elif self._is_left(name, point):
                    kept[name] = None
            elif self.sent(name) is None:
                deferred.pop(name, None)
            elif self._removes(name, phase, deferred):
                differences[name] = None
            elif phase.target.incomplete:
                kept[name] = None
        self.deferred, self.kept = deferred or NOTHING, kept or NOTHING
        return differences

    def _removes(self, name: str, phase: Phase, deferred: dict[str, Deferral]) -> bool:
        """Whether to remove a resource now; if not, the removal is put into `deferred`."""
        if self.type_url == ECDS or phase.target.incomplete:
            # Envoy drops the filter configuration of a listener that still wants it (envoy#32823).
            deferred.pop(name, None)
            return False
        deferral = deferred.get(name) or Deferral(phase.target.sequence, phase.now)
        if phase.may_remove(deferral):
            deferred.pop(name, None)
            return True
        deferred[name] = deferral
        return False

    # Sending.

    @property
    def _form(self) -> tuple[type["Subscription"], bool]:
        """What clients that can be sent the same bytes have in common."""
        return type(self), False

    def _encode(self, changes: Mapping[str, Resource | None], point: Point) -> Response:
        """Encode a response that is the same for all clients that get these changes."""
        raise NotImplementedError

    def _send(self, changes: Mapping[str, Resource | None], phase: Phase) -> Response:
        """Send these changes, in bytes that others can have already."""
        point = phase.target if phase.target is not ORIGIN else phase.newest
        key = (self._form, self.type_url, frozenset(changes))
        response = point.shared.get(key)
        if response is None or response.number <= self._number or response.changes != changes:
            response = point.shared[key] = self._encode(dict(sorted(changes.items())), point)
        adds = any(resource is not None and self.sent(name) is None for name, resource in changes.items())
        return self._await(Pending(response, point.sequence, adds=adds))

    def _await(self, pending: Pending) -> Response:
        """Note that a response is sent."""
        self._number = pending.response.number
        self.pending = (*self.pending, pending)
        return pending.response

    def heartbeat(self, now: float) -> Response | None:
        """Return a response that renews the times to live of what the client has, if that is due.

        It is for when there is nothing else to send; `now` in seconds of a monotonic clock.
        """
        if self.is_full:
            return None
        expiring = self._expiring()
        if not expiring:
            self.renew_at = None
            return None
        interval = min(ttl for resource in expiring if (ttl := resource.ttl)).total_seconds() / 2
        if self.renew_at is None or now < self.renew_at:
            self.renew_at = min(now + interval, self.renew_at or math.inf)
            return None
        self.renew_at = now + interval
        return self._renew(expiring, Phase(newest=self.point, target=self.point, now=now))

    def _expiring(self) -> list[Resource]:
        """Return what the client has that has a time to live."""
        resources = self.point[self.type_url]
        if not resources.expiring and self.renew_at is None:
            return []
        names = resources.expiring.union(resources.held, self.deferred, self.kept)
        sent = [self.sent(name) for name in sorted(names) if self._relevant(name)]
        return [resource for resource in sent if resource is not None and resource.ttl]

    def _renew(self, expiring: list[Resource], phase: Phase) -> Response:
        """Send a response that renews these, and changes nothing."""
        raise NotImplementedError

    def _settle(self) -> None:
        """If nothing is unanswered, express what the client has in terms of where it was brought to."""
        if not self.pending:
            self.held.rebase(self._tip)

    # Answers.

    def _take(self, nonce: str) -> Pending | None:
        for index, pending in enumerate(self.pending):
            if pending.response.nonce == nonce:
                self.pending = (*self.pending[:index], *self.pending[index + 1 :])
                return pending
        return None

    def _accept(self, pending: Pending) -> None:
        """Note that the client has the changes of a response (ACK)."""
        self._hold(pending)
        self._settle()
        # Before it got to any point it has only the first pieces, and the others must not wait.
        self.live = self.live or self.point is not ORIGIN
        self.accepted_nonce, self.accepted_version = pending.response.nonce, pending.response.version
        self._group.accept(self.type_url, pending.response)

    def _hold(self, pending: Pending) -> None:
        changes = pending.response.changes
        if pending.target is not None and pending.origin is self.held.base and not self.held.own:
            self.held.base = pending.target
        elif self.wildcard or changes.keys() <= self.names:
            self.held.update(changes)
        else:
            self.held.update({name: changes[name] for name in self.names.covered(changes.keys())})

    def _reject(self, pending: Pending, detail: str, wall_time: float, parts: int) -> None:
        """Roll back a refused response (NACK); send its members again in so many parts."""
        members = [name for name, resource in pending.response.changes.items() if resource is not None]
        removed = [name for name, resource in pending.response.changes.items() if resource is None]
        self.last_error = LastError(detail, tuple(members[:10]), wall_time)
        if not members:
            # A removal cannot be at fault. Sending it again would loop.
            self.held.update(dict.fromkeys(removed))
            return
        self._dirty = {**self._dirty, **dict.fromkeys(removed)} or NOTHING
        if len(members) == 1:
            resource = pending.response.changes[members[0]]
            assert resource is not None  # noqa: S101 - by the definition of members
            self._refuse(resource, detail, pending.sequence, wall_time)
        else:
            self._isolate(members, pending.sequence, parts)

    def _isolate(self, names: list[str], sequence: int, parts: int) -> None:
        """Have these sent again on their own, in so many parts; the sequence is that of their point."""
        self._isolated_at = min(self._isolated_at, sequence) if self._isolated else sequence
        self._isolated = (*self._isolated, *split(names, parts))

    def _next_isolated(self) -> list[str]:
        """Take the next part of what was refused."""
        first, *others = self._isolated
        self._isolated = tuple(others)
        return first

    def _refuse(self, resource: Resource, detail: str, sequence: int, wall_time: float) -> None:
        self.refused_at = min(self.refused_at, sequence) if self.refused else sequence
        refusal = Refusal(
            self._group.key, self.type_url, resource.name, resource.version, detail, wall_time, self._node_id
        )
        self.refused = {**self.refused, resource.name: refusal}
        self._group.refuse(refusal, self.held.get(resource.name))

    def _forget_refusals(self) -> None:
        """Forget what was refused of content that has changed since."""
        if self.refused:
            stands = self._group.stands
            self.refused = {name: each for name, each in self.refused.items() if stands(each)} or NOTHING


def split(names: list[str], parts: int) -> list[list[str]]:
    """Split a list into so many parts of about the same length, none of them empty."""
    size = math.ceil(len(names) / parts)
    return [names[start : start + size] for start in range(0, len(names), size)]
