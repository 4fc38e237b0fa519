"""The incremental variant of xDS for one resource type on one stream, without I/O.

Theory of operation: see `xds.subscription`. What is special here (xds_protocol, "Incremental xDS"):

* A client says on (re)connect which versions it has; it is sent only what differs.
* A response carries only what changed, and the names of what was removed. A name that was asked for and
  does not exist is answered as removed. A name that is asked for again is sent again.
* Changes of the subscription count whatever the nonce of their request; the nonce only tells which response
  is answered.
* A client that is exactly where the newest set began is sent the same bytes as all others that are.
* What is large and wholly new to the client goes in pieces, one right after the other: Envoy takes a response
  apart as a whole, and keeps the memory (54 MB of 254 for 10,000 hosts in one answer).
"""

import math
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Final
from weakref import ref

from xds.group import NOTHING, ORIGIN, Point, Response
from xds.names import NONE, members_of
from xds.resources import ECDS, WILDCARD_TYPES, Resource
from xds.snapshot import EMPTY, ResourceSet
from xds.subscription import Pending, Phase, Subscription, check_names

PARTS: Final = 16
"""Parts in which a refused response is sent again: few members go one by one, thousands are searched."""


PIECE: Final = 1 << 18
"""Bytes of resources in one response, if they are new to the client."""

MAX_PIECES: Final = 16
"""With so many unanswered, the rest is not cut any more. (Envoy may answer late, see `xds.stream`.)"""

WORTH: Final = 16
"""A step is kept for proxies to come if it has so many bytes for each name of the set that it leads to. The
set is kept with it, and a client that asks name by name comes to as many sets."""


class DeltaSubscription(Subscription):
    """The state of one type on a delta stream."""

    __slots__ = ()

    def request(
        self,
        *,
        subscribe: Iterable[str] = (),
        unsubscribe: Iterable[str] = (),
        initial_versions: Mapping[str, str] | None = None,
        nonce: str = "",
        error: str | None = None,
        wall_time: float = 0.0,
    ) -> None:
        """Take in a request: the answer to a response, or a change of the subscription, or both.

        The answer is an ACK, or a NACK if `error` is not None. Raises TooManyNamesError.
        """
        first = not self._started
        self._started = True
        if not first and (pending := self._take(nonce)) is not None:
            if error is None:
                self._accept(pending)
            else:
                self._reject(pending, error, wall_time, PARTS)
        asked, dropped = frozenset(subscribe), frozenset(unsubscribe)
        reported = (initial_versions or {}) if first else {}
        check_names(reported.keys())
        if "*" in asked or (first and not asked and self.type_url in WILDCARD_TYPES):
            self._subscribe_to_all()
        if asked:
            self._subscribe(asked - {"*"}, reported)
        if "*" in dropped and self.wildcard:
            self._unsubscribe_from_all()
        if dropped := dropped & self.names:
            self._unsubscribe(dropped)
        if reported:
            self._report(reported)

    def next_response(self, phase: Phase) -> Response | None:
        """Return the next response that can be sent in this phase, if there is any."""
        self._forget_refusals()
        while self._isolated:
            point = self.point if self.point is not ORIGIN else phase.newest
            changes = self._differences(self._next_isolated(), point, phase)
            if changes:
                return self._send(changes, phase)
        new = self._part(phase.target[self.type_url])
        plain = self._plain()
        changes = {} if plain and self._brings_forced(new) else self._answers(phase)
        if changes and self.forced:
            return self._send(changes, phase)
        due = False
        if phase.target is not ORIGIN:
            shared = None
            if plain and not changes:
                piece = self._piece(new, phase)
                shared = self._shared(piece, phase)
                if shared is not None and piece is not new:
                    self._tip = piece
                    self._more = True
                    return self._await(shared)
            if shared is None:
                names = self._candidates(new) - changes.keys()
                changes |= self._differences(names, phase.target, phase)
            due, self.unanswered = self.unanswered, False
            self.point = phase.target
            self._tip = new
            self._more = False
            self._dirty = NOTHING
            if shared is not None:
                return self._await(shared)
        if changes or due:
            return self._send(changes, phase)
        self._settle()
        return None

    # Subscriptions.

    def _subscribe_to_all(self) -> None:
        if self.wildcard:
            self._force(self._tip)
        self.wildcard = True
        self.unanswered = True
        # What is covered now was not examined so far.
        self._tip = EMPTY
        self.point = ORIGIN

    def _unsubscribe_from_all(self) -> None:
        self.wildcard = False
        self.unanswered = False
        kept = {name: self.held.get(name) for name in self.names.covered({*self.names, *self.held})}
        self.held.base, self.held.own = EMPTY, kept
        self._detach()

    def _subscribe(self, names: frozenset[str], reported: Mapping[str, str]) -> None:
        check_names(names)
        self.names = self._group.names(self.type_url, self.names, names - self.names, NONE)
        if names == self.names:
            names = self.names  # the texts that others have as well
        asked = self._expand(names) | members_of(names & self.names.globs, reported)
        self._force(asked - reported.keys())

    def _unsubscribe(self, names: frozenset[str]) -> None:
        globs = names & self.names.globs
        members = names | members_of(globs, {*self.held.own, *self._tip} if globs else ())
        self.names = self._group.names(self.type_url, self.names, NONE, names)
        self._detach()
        gone = frozenset(member for member in members if not self._relevant(member))
        self.held.update(dict.fromkeys(gone))
        # The client cannot know whether another subscription covers the others: it is told.
        self.forced = {
            name: None for name in (*self.forced, *(members - gone)) if name not in gone
        } or NOTHING

    def _detach(self) -> None:
        """Note that what is unanswered brings the client to no set that others have as well."""
        for pending in self.pending:
            pending.origin = pending.target = None

    def _report(self, versions: Mapping[str, str]) -> None:
        """Take in what the client has from an earlier stream."""
        base = self._part(self._group.point[self.type_url])
        own: dict[str, Resource | None] = {name: None for name in base if name not in versions}
        for name, version in versions.items():
            resource = base.get(name)
            if (resource is None or resource.version != version) and self._relevant(name):
                own[name] = Resource.unknown(self.type_url, name, version)
        self.live = True
        self.renew_at = -math.inf  # it is not known for how long the client can wait
        self.held.base, self.held.own = base, own or NOTHING
        self._tip = base
        self._dirty = {**self._dirty, **dict.fromkeys(own)} or NOTHING
        self._group.note_accepted(self.type_url, own)
        if self.wildcard:
            self._group.report(self.type_url, base, own)

    # Responses.

    def _answers(self, phase: Phase) -> dict[str, Resource | None]:
        """Return what was asked for, as much as one response should hold; the rest is left in `forced`."""
        changes: dict[str, Resource | None] = {}
        size = 0
        names = iter(self.forced)
        for name, resource in self._answer(names, phase):
            if resource is not None:
                size += len(resource.delta_frame)
            if resource is not None or self.type_url != ECDS:
                changes[name] = resource
            if size >= PIECE and len(self.pending) < MAX_PIECES:
                break
        self.forced = dict.fromkeys(names) or NOTHING
        return changes

    def _piece(self, goal: ResourceSet, phase: Phase) -> ResourceSet:
        """Return a set on the way from `_tip` to `goal`, if that is far and only adds; otherwise `goal`."""
        if len(self.pending) >= MAX_PIECES:
            return goal
        # Not the sets themselves: the key would keep them, and so all that a client had on its way.
        key = (PIECE, self.type_url, ref(self._tip), ref(goal))
        piece = phase.target.variants.get(key)
        if piece is None:
            piece = phase.target.variants[key] = _cut(self._tip, goal)
        return piece

    def _candidates(self, new: ResourceSet) -> frozenset[str]:
        """Return the names that may have to be sent to bring the client to `new`."""
        names = new.changed(self._tip)
        return names.union(self._dirty, self.deferred, self.kept)

    def _brings_forced(self, new: ResourceSet) -> bool:
        """Whether what was asked for is among what the step from `_tip` to `new` adds; if so, forget it."""
        if not self.forced:
            return True
        changed = new.changed(self._tip)
        if not self.forced.keys() <= changed or not self._tip.keys().isdisjoint(changed):
            return False
        self.forced = NOTHING
        return True

    def _plain(self) -> bool:
        """Whether the client was sent exactly `_tip`, no more and no less."""
        if self.held.own or self._dirty or self.refused or self.deferred:
            return False
        base = self.held.base
        for pending in self.pending:
            if pending.origin is not base or pending.target is None:
                return False
            base = pending.target
        return base is self._tip

    def _shared(self, new: ResourceSet, phase: Phase) -> Pending | None:
        """Return the step from `_tip` to `new` that is the same for all, if this client can take it."""
        old = self._tip
        key = (self.type_url, old, new)
        response = phase.target.shared.get(key)
        if response is None or response.number <= self._number:
            names = new.changed(old)
            if not names or self.type_url == ECDS or not new.held.isdisjoint(names):
                return None
            response = self._encode({name: new.get(name) for name in sorted(names)}, phase.target)
            phase.target.shared[key] = response
            if self.point in (ORIGIN, phase.target) and len(response.data) >= WORTH * len(new):
                self._group.keep(phase.target, response)
        if response.removes and (phase.target.incomplete or phase.removable < phase.target.sequence):
            return None
        adds = any(name not in old for name in response.changes)
        return Pending(response, phase.target.sequence, origin=old, target=new, adds=adds)

    def _renew(self, expiring: list[Resource], phase: Phase) -> Response:
        # To Envoy 1.40, what comes without content and under no name that it asked for is an error: it does
        # not remember the versions of members of collections.
        frames = [
            resource.heartbeat_frame if self.wildcard or resource.name in self.names else resource.delta_frame
            for resource in expiring
        ]
        version = phase.target[self.type_url].version
        response = self._group.encode_delta(self.type_url, version, {}, frames)
        self._number = response.number
        return response

    def _encode(self, changes: Mapping[str, Resource | None], point: Point) -> Response:
        return self._group.encode_delta(self.type_url, point[self.type_url].version, changes)


def _cut(old: ResourceSet, goal: ResourceSet) -> ResourceSet:
    changed = goal.changed(old)
    sizes = accumulate(len(goal[name].delta_frame) for name in changed)
    if not old.keys().isdisjoint(changed) or all(size <= PIECE for size in sizes):
        return goal
    names: list[str] = []
    size = 0
    for name in goal:
        if name in changed:
            size += len(goal[name].delta_frame)
            if names and size > PIECE:
                return old.towards(goal, frozenset(names))
            names.append(name)
    return goal
