"""The state-of-the-world variant of xDS for one resource type on one stream, without I/O.

Theory of operation: see `xds.subscription`. What is special here (xds_protocol, "How the client specifies
what resources to return", "Grouping resources into responses", "Deleting resources"):

* A request always names everything that the client wants. It answers the response with its nonce; if that
  is not the latest response, its names are those of the past and do not count.
* Listeners, clusters and scoped routes: every response is the full set, and what is absent is removed. So a
  removal that has to wait is a set in which the resource still is.
* Other types: a response holds what is new to the client; a removal cannot be expressed.
* An ACK is sent once. The same request once more asks for the resources again: Envoy does that for the
  endpoints of a changed cluster, with the old nonce, version and names, and waits 15 s for the answer
  (go-control-plane#245, go-control-plane#583, java-control-plane#131).

After a NACK of a full set, sets are tried that add parts of what was new to what the client has, each after
the answer to the one before. Of a client that came with resources of an earlier stream it is not known what
it has until its first ACK, and a trial that leaves something out could remove what is in use. So only one is
made, with what others accepted in the place of what differs: its ACK tells what the client has. Where nothing
of the kind is known, the culprits are those that Envoy names. It applies the other clusters and listeners of
the set, and is sent the next set, with the culprits, when something has changed. (In the delta variant a
client tells what it has.) For the same reason it is sent no full set, and no route configuration that it has,
as long as the snapshot is incomplete.

A time to live goes only to a client that says `xds.config.resource-in-sotw`, and is renewed with the content:
what comes without does not renew anything in Envoy 1.40, and in a full set it counts as absent.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from xds.group import NOTHING, ORIGIN, Group, Point, Response
from xds.resources import WILDCARD_TYPES, Resource, is_glob
from xds.snapshot import EMPTY, ResourceSet
from xds.subscription import (
    Deferral,
    LastError,
    Pending,
    Phase,
    Subscription,
    check_names,
)

PARTS: Final = 2
"""A refused set is searched by halves: only one trial at a time can be under way."""


class SotwSubscription(Subscription):
    """The state of one type on a state-of-the-world stream."""

    __slots__ = ("_full", "_named", "_reported", "_stuck", "_unknown", "_wraps")

    def __init__(self, type_url: str, group: Group, node_id: str, *, wraps: bool = False) -> None:
        super().__init__(type_url, group, node_id)
        self._wraps = wraps
        """The client knows resources that are wrapped into a `Resource`."""
        self._full = type_url in WILDCARD_TYPES
        self._named = False
        """The client named resources, ever; from then on an empty list means none, not all."""
        self._unknown = False
        """The client has resources from an earlier stream, it is not known which."""
        self._reported = ""
        """The version that the client had from an earlier stream, if all that it has is of this version."""
        self._stuck: tuple[str, ...] = ()
        """The versions of a set that was refused and cannot be tried in parts, and of one tried instead."""

    def request(
        self,
        *,
        names: Iterable[str] = (),
        version: str = "",
        nonce: str = "",
        error: str | None = None,
        wall_time: float = 0.0,
    ) -> None:
        """Take in a request: the answer to a response, or a change of the subscription, or both.

        The answer is an ACK, or a NACK if `error` is not None. Raises TooManyNamesError.
        """
        first = not self._started
        self._started = True
        again = False
        named = frozenset(names)
        if first:
            self.live = self._unknown = bool(version)
            self.renew_at = -math.inf if version else None  # it is not known for how long the client can wait
            if version and not self._full:
                self.held.own = {name: Resource.unknown(self.type_url, name) for name in named}
        elif nonce:
            answered = self._answered(nonce, version, error, wall_time)
            if nonce != self.nonce:
                return
            again = error is None and not answered
        self._subscribe(named, again=again)
        if first and self.wildcard and not self.names:
            self._reported = version

    def next_response(self, phase: Phase) -> Response | None:
        """Return the next response that can be sent in this phase, if there is any."""
        self._forget_refusals()
        if self._isolated and self.pending:
            return None
        while self._isolated:
            changes = self._differences(self._next_isolated(), self.point, phase)
            if changes:
                return (
                    self._send_set(self.held.base.replace(changes), phase)
                    if self._full
                    else self._send(changes, phase)
                )
        return self._next_set(phase) if self._full else self._next_part(phase)

    @property
    def failing(self) -> bool:
        """Whether the client refuses something that it should have."""
        return super().failing or bool(self._stuck)

    # Requests.

    def _answered(self, nonce: str, version: str, error: str | None, wall_time: float) -> bool:
        """Take in the answer to a response; False if it was answered before or is not known."""
        pending = self._take(nonce)
        if pending is None:
            return False
        if nonce == self.nonce:
            # Envoy answers only the latest of several responses that came while it was busy.
            earlier, self.pending = self.pending, ()
            for superseded in earlier:
                if error is None or (self._full and superseded.response.version == version):
                    self._accept(superseded)
                elif not self._full and superseded.response.changes:
                    self._isolate(list(superseded.response.changes), superseded.sequence, 1)
        if error is None:
            self._accept(pending)
        else:
            self._reject(pending, error, wall_time, PARTS)
        return True

    def _accept(self, pending: Pending) -> None:
        super()._accept(pending)
        self._unknown = False
        if self._stuck:
            self._stuck, self._more = (), True

    def _subscribe(self, asked: frozenset[str], *, again: bool) -> None:
        wildcard = "*" in asked or (not asked and not self._named and self.type_url in WILDCARD_TYPES)
        self._named = self._named or bool(asked)
        old = named = self.names
        if asked - {"*"} != old:
            asked -= {"*"}
            check_names(asked - old)
            named = self._group.names(self.type_url, old, asked - old, old - asked)
        added, removed = named - old, old - named
        begins, ends = wildcard and not self.wildcard, self.wildcard and not wildcard
        self.wildcard, self.names = wildcard, named
        if self._full:
            self.unanswered = (self.unanswered or begins or bool(added)) and (wildcard or bool(named))
            if (removed or ends) and not wildcard:
                self._narrow()
            return
        if begins:
            self.unanswered = True
            self._tip = EMPTY
        self._force(self._expand(added or (named if again and not removed else ())))
        if removed and not wildcard:
            if any(map(is_glob, removed)):
                removed = frozenset(name for name in self.held if not self._relevant(name))
            self.held.update(dict.fromkeys(removed))
            self.forced = dict.fromkeys(name for name in self.forced if name not in removed) or NOTHING

    def _narrow(self) -> None:
        """Forget what the client has of names that it does not want any more."""
        for pending in self.pending:
            if pending.target is not None:
                pending.target = self._part(pending.target)
        self.held.base = self._part(self.held.base)

    # Full sets.

    def _next_set(self, phase: Phase) -> Response | None:
        if phase.target is ORIGIN or not (self.wildcard or self.names):
            return None
        resources = phase.target[self.type_url]
        self.point, self._tip, self._more = phase.target, resources, False
        want, sent = self._want(resources, phase), self._sent_set
        if self._reported and want.version == self._reported:
            self.held.base, self._reported = want, ""
            self._unknown = self.unanswered = False
            return None
        if self._unknown:
            # What is not in the set is removed. Of what is in quarantine, that would be the version before.
            absent = [
                name for name in (*resources.held, *self.refused) if self._relevant(name) and name not in want
            ]
            want = want.replace({name: self._group.published(self.type_url, name) for name in absent})
            if phase.target.incomplete or not all(name in want for name in absent):
                return None
        self._reported = ""
        again = want.version in self._stuck
        if again and not self.pending:
            want = want.replace(self._group.good(self.type_url, want))
        if want.version in self._stuck or (want.version == sent.version and not self.unanswered):
            return None
        if not again:
            self._stuck = ()
        self.unanswered = False
        return self._send_set(want, phase)

    @property
    def _sent_set(self) -> ResourceSet:
        target = self.pending[-1].target if self.pending else None
        return self.held.base if target is None else target

    def _want(self, resources: ResourceSet, phase: Phase) -> ResourceSet:
        """Return the set that the client should have now."""
        sent = self._sent_set
        other: dict[str, Resource | None] = {}
        deferred = dict(self.deferred)
        for name in resources.changed(sent) if self.wildcard else sent:
            if name not in resources and name in sent and not self._removes(name, phase, deferred):
                other[name] = sent[name]
        self.deferred = {name: each for name, each in deferred.items() if name in other} or NOTHING
        for name in (*resources.held, *self.refused):
            other[name] = self._wanted(name, phase.target)
        if not self.wildcard:
            return resources.replace(other).part(self.names, sent)
        key = (self.type_url, resources, frozenset(other.items()))
        want = phase.target.variants.get(key)
        if want is None:
            want = phase.target.variants[key] = resources.replace(other)
        return want

    def _send_set(self, want: ResourceSet, phase: Phase) -> Response:
        sent = self._sent_set
        key = (self._form, self.type_url, sent, want)
        response = phase.target.shared.get(key)
        if response is None or response.number <= self._number:
            changes = {name: want.get(name) for name in sorted(want.changed(sent))}
            frames = self._frames(want.values())
            response = self._group.encode_sotw(self.type_url, want.version, frames, changes)
            phase.target.shared[key] = response
            if not sent:
                self._group.keep(phase.target, response)
        adds = any(name not in sent for name in response.changes)
        return self._await(Pending(response, phase.target.sequence, target=want, adds=adds))

    def _hold(self, pending: Pending) -> None:
        if not self._full:
            super()._hold(pending)
        elif pending.target is not None:
            self.held.base = pending.target

    def _settle(self) -> None:
        if not self._full:
            super()._settle()

    def _reject(self, pending: Pending, detail: str, wall_time: float, parts: int) -> None:
        target = pending.target
        if not self._full or target is None:
            super()._reject(pending, detail, wall_time, parts)
            return
        suspects = sorted(name for name in target.changed(self.held.base) if name in target)
        named = _named(detail, suspects) if self._unknown else []
        self.last_error = LastError(detail, tuple((named or suspects)[:10]), wall_time)
        if self.pending:
            # A later set is on its way and will be judged by itself.
            return
        if len(suspects) == 1:
            self._refuse(target[suspects[0]], detail, pending.sequence, wall_time)
        elif self._unknown or not suspects:
            self._stuck = (*self._stuck, target.version)
            self._more = True
            for name in named:
                self._refuse(target[name], detail, pending.sequence, wall_time)
        else:
            self._isolate(suspects, pending.sequence, parts)

    # Parts, of types whose responses need not be complete.

    def _next_part(self, phase: Phase) -> Response | None:
        changes: dict[str, Resource | None] = {
            name: resource for name, resource in self._answer(self.forced, phase) if resource is not None
        }
        self.forced = NOTHING
        due = False
        if phase.target is not ORIGIN:
            new = self._part(phase.target[self.type_url])
            names = new.changed(self._tip).union(self.kept)
            changes |= self._differences(names - changes.keys(), phase.target, phase)
            due, self.unanswered = self.unanswered, False
            self.point, self._tip = phase.target, new
        if changes or due:
            return self._send(changes, phase)
        self._settle()
        return None

    def _removes(self, name: str, phase: Phase, deferred: dict[str, Deferral]) -> bool:
        return self._full and super()._removes(name, phase, deferred)

    def _encode(self, changes: Mapping[str, Resource | None], point: Point) -> Response:
        frames = self._frames(resource for resource in changes.values() if resource is not None)
        return self._group.encode_sotw(self.type_url, point[self.type_url].version, frames, changes)

    @property
    def _form(self) -> tuple[type[Subscription], bool]:
        return type(self), self._wraps

    def _frames(self, resources: Iterable[Resource]) -> Iterator[bytes | memoryview]:
        for resource in resources:
            yield resource.wrapped_frame if self._wraps and resource.ttl else resource.sotw_frame

    # Times to live.

    def _expiring(self) -> list[Resource]:
        return super()._expiring() if self._wraps else []

    def _renew(self, expiring: list[Resource], phase: Phase) -> Response:
        if self._full:
            return self._send_set(self._sent_set, phase)
        return self._send({resource.name: resource for resource in expiring}, phase)


def _named(detail: str, names: Iterable[str]) -> list[str]:
    """Return which of these Envoy blames: `Error adding/updating cluster(s) NAME: words, NAME: words`."""
    return [name for name in names if any(f"{before}{name}: " in detail for before in ("(s) ", ", ", "\n"))]
