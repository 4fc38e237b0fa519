"""The incremental variant of xDS for one resource type on one stream, without I/O.

Theory of operation: see `xds.subscription`. What is special here (xds_protocol, "Incremental xDS"):

* A client says on (re)connect which versions it has; it is sent only what differs.
* A response carries only what changed, and the names of what was removed. A name that was asked for and
  does not exist is answered as removed. A name that is asked for again is sent again.
* Changes of the subscription count whatever the nonce of their request; the nonce only tells which response
  is answered.
* A client that is exactly where the newest set began is sent the same bytes as all others that are.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from xds.group import ORIGIN, Point, Response
from xds.resources import ECDS, WILDCARD_TYPES, Resource
from xds.snapshot import EMPTY, ResourceSet
from xds.subscription import MAX_NAMES, Pending, Phase, Subscription, TooManyNamesError

PARTS: Final = 16
"""Parts in which a refused response is sent again: few members go one by one, thousands are searched."""


class DeltaSubscription(Subscription):
    """The state of one type on a delta stream."""

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
        subscribe = list(subscribe)
        reported = (initial_versions or {}) if first else {}
        if first and not subscribe and self.type_url in WILDCARD_TYPES:
            subscribe = ["*"]
        for name in subscribe:
            self._subscribe(name, reported)
        if len(self.names) > MAX_NAMES:
            raise TooManyNamesError
        for name in unsubscribe:
            self._unsubscribe(name)
        if reported:
            self._report(reported)

    def next_response(self, phase: Phase) -> Response | None:
        """Return the next response that can be sent in this phase, if there is any."""
        self._forget_refusals()
        while self._isolated:
            point = self.point if self.point is not ORIGIN else phase.newest
            changes = self._differences(self._isolated.popleft(), point, phase)
            if changes:
                return self._send(changes, phase)
        answers = self._answer(self.forced, phase) if self.forced else {}
        self.forced.clear()
        changes = {name: resource for name, resource in answers.items() if resource or self.type_url != ECDS}
        due = False
        if phase.target is not ORIGIN:
            new = phase.target[self.type_url]
            shared = self._shared(new, phase) if self._plain() and not changes else None
            names = set() if shared is not None else self._candidates(new) - changes.keys()
            if names:
                changes |= self._differences(names, phase.target, phase)
            due, self.unanswered = self.unanswered, False
            self.point = phase.target
            self._tip = new
            self._dirty.clear()
            if shared is not None:
                return self._await(shared)
        if changes or due:
            return self._send(changes, phase)
        self._settle()
        return None

    # Subscriptions.

    def _subscribe(self, name: str, reported: Mapping[str, str]) -> None:
        if name == "*":
            if self.wildcard:
                self.forced.update(dict.fromkeys(self._tip))
            self.wildcard = True
            self.unanswered = True
            # What is covered now was not examined so far.
            self._tip = EMPTY
            self.point = ORIGIN
            return
        self.names.add(name)
        if name in reported:
            self._dirty.add(name)
        else:
            self.forced[name] = None

    def _unsubscribe(self, name: str) -> None:
        if name == "*" and self.wildcard:
            self.wildcard = False
            self.unanswered = False
            kept = {name: self.held.get(name) for name in self.names}
            self.held.base, self.held.own = EMPTY, kept
            for pending in self.pending:
                pending.origin = pending.target = None
        elif name in self.names:
            self.names.discard(name)
            if self.wildcard:
                # The client cannot know whether the wildcard covers it: it is told.
                self.forced[name] = None
            else:
                self.held.own.pop(name, None)
                self.forced.pop(name, None)

    def _report(self, versions: Mapping[str, str]) -> None:
        """Take in what the client has from an earlier stream."""
        base = self._group.point[self.type_url]
        own: dict[str, Resource | None] = {}
        for name, version in versions.items():
            resource = base.get(name)
            if not self._relevant(name):
                continue
            if resource is None or resource.version != version:
                own[name] = Resource.unknown(self.type_url, name, version)
            elif not self.wildcard:
                own[name] = resource
        self.live = True
        self.held.own = own
        if self.wildcard:
            own.update((name, None) for name in base if name not in versions)
            self.held.base = self._tip = base
            self._dirty.update(own)
            self._group.report(self.type_url, base, own)

    # Responses.

    def _candidates(self, new: ResourceSet) -> set[str]:
        """Return the names that may have to be sent to bring the client to `new`."""
        changed = new.changed(self._tip)
        names = set(changed) if self.wildcard else self.names & changed
        names |= self._dirty
        names |= self.deferred.keys()
        names |= self.kept
        return names

    def _plain(self) -> bool:
        """Whether the client was sent exactly `_tip`, no more and no less."""
        if not self.wildcard or self.held.own or self._dirty or self.refused or self.deferred:
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
        if response.removes and (phase.target.incomplete or phase.removable < phase.target.sequence):
            return None
        adds = any(name not in old for name in response.changes)
        return Pending(response, phase.target.sequence, origin=old, target=new, adds=adds)

    def _encode(self, changes: Mapping[str, Resource | None], point: Point) -> Response:
        return self._group.encode_delta(self.type_url, point[self.type_url].version, changes)
