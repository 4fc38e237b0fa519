"""State of the world, a client that comes with resources of an earlier stream, of unknown content."""

from collections.abc import Iterable

import pytest

from tests.xds.client import resource
from tests.xds.test_state_machines import DeltaProxy, SotwProxy, group_of, settle
from xds.group import Group, Response
from xds.resources import CDS, Resource
from xds.snapshot import Snapshot
from xds.sotw import SotwSubscription
from xds.status import State, state_of
from xds.stream import Stream

SAME, OLD, GOOD, BAD = (
    resource(CDS, name, content) for name, content in zip("abba", (1, 1, 2, 9), strict=True)
)
NEW = resource(CDS, "c")
ENVOY = "Error adding/updating cluster(s) {}: no such file"
"""What Envoy 1.40 says."""


class Client:
    """Refuses what has a bad member, with these words."""

    def __init__(
        self,
        group: Group,
        words: str = "bad",
        names: Iterable[str] = (),
        version: str = "of an earlier stream",
    ) -> None:
        self.group, self.words, self.names = group, words, list(names)
        self.stream = Stream(group, "proxy", SotwSubscription)
        self.subscription = self.stream.subscription(CDS)
        self.version = version
        self.subscription.request(names=names, version=version)

    def sets(self) -> list[set[Resource]]:
        """Answer all that comes; return the full sets that came."""
        seen = []
        while response := self.stream.next_response(0):
            assert len(seen) < 20, "a loop"
            seen.append(self.answer(response, bad=BAD in members(self)))
        return seen

    def answer(self, response: Response, *, bad: bool) -> set[Resource]:
        sent = members(self)
        self.version = self.version if bad else response.version
        error = self.words if bad else None
        self.subscription.request(
            names=self.names, version=self.version, nonce=response.nonce, error=error, wall_time=1.0
        )
        return sent

    @property
    def state(self) -> State:
        return state_of(self.subscription, self.group)


def members(client: Client) -> set[Resource]:
    """Return what is in the set that was sent last."""
    target = client.subscription.pending[-1].target
    assert target is not None
    return set(target.values())


def group_that_knows(*good: Resource) -> Group:
    group = group_of(*good)
    settle(SotwProxy(group))
    return group


def test_a_culprit_is_found_among_what_differs_from_what_others_accepted() -> None:
    """What others accepted takes nothing away from it; with that it is known what it has."""
    good = resource(CDS, "a")
    group = group_that_knows(good, OLD)
    group.publish(Snapshot([BAD, GOOD]))
    client = Client(group)
    assert client.sets() == [{BAD, GOOD}, {good, OLD}, {BAD, GOOD}, {BAD, OLD}, {good, GOOD}]
    assert list(client.subscription.refused) == ["a"]
    assert [refusal.name for refusal in group.refusals.values()] == ["a"]
    assert client.state is State.NACK
    group.publish(Snapshot([good, GOOD, NEW]))
    assert client.sets() == [{good, GOOD, NEW}]
    assert client.state is State.SYNCED


def test_what_others_accepted_is_tried_once() -> None:
    group = group_that_knows(resource(CDS, "b"))
    group.publish(Snapshot([BAD, GOOD]))
    client = Client(group)
    assert client.sets() == [{BAD, GOOD}, {BAD, OLD}]
    assert (client.state, group.refusals) == (State.NACK, {})
    group.publish(Snapshot([BAD, GOOD, NEW]))
    response = client.stream.next_response(0)
    assert response is not None
    assert client.state is State.STALE, "it may like this better"
    assert client.answer(response, bad=True) == {BAD, GOOD, NEW}
    assert client.sets() == [{BAD, OLD, NEW}]


def test_where_nothing_is_known_envoy_says_who_it_was() -> None:
    """Left out of the set, the culprit would be removed. Envoy applies the others nevertheless."""
    group = group_of(BAD, GOOD)
    client = Client(group, ENVOY.format("a"))
    assert client.sets() == [{BAD, GOOD}]
    assert list(client.subscription.refused) == ["a"]
    assert [refusal.detail for refusal in group.refusals.values()] == [client.words]
    assert client.subscription.last_error is not None
    assert client.subscription.last_error.names == ("a",)
    group.publish(Snapshot([BAD, GOOD, NEW]))
    assert client.sets() == [{BAD, GOOD, NEW}]
    assert client.state is State.NACK
    newcomer = DeltaProxy(group)
    settle(newcomer)
    assert newcomer.has[CDS].keys() == {"b", "c"}
    group.publish(Snapshot([GOOD]))
    assert client.sets() == [{GOOD}]
    assert client.state is State.SYNCED


def test_what_a_refused_set_has_is_in_the_next_also_if_others_accept_the_culprit() -> None:
    group = group_of(BAD, OLD)
    other = Client(group)
    accepted = other.stream.next_response(0)
    assert accepted is not None
    other.answer(accepted, bad=False)
    group.publish(Snapshot([BAD, GOOD]))
    client = Client(group, ENVOY.format("a"))
    response = client.stream.next_response(0)
    assert response is not None
    assert client.answer(response, bad=True) == {BAD, GOOD}
    response = client.stream.next_response(0)
    assert response is not None
    assert client.stream.next_response(0) is None, "one trial at a time"
    assert client.answer(response, bad=True) == {BAD, OLD}
    assert client.stream.next_response(0) is None
    for content in (1, 2):
        group.publish(Snapshot([BAD, GOOD, resource(CDS, "c", content)]))
        assert client.stream.next_response(0)
        assert members(client) == {BAD, GOOD, resource(CDS, "c", content)}
    assert not group.refusals


def test_what_others_refused_keeps_no_other_change_from_it() -> None:
    """Nothing stands in for it, and it may have a version of it. Envoy applies the others nevertheless."""
    group = group_of(BAD, OLD)
    settle(SotwProxy(group))
    assert [refusal.name for refusal in group.refusals.values()] == ["a"]
    assert Client(group, names=["b"]).sets() == [{OLD}], "it does not ask for this"
    client = Client(group, ENVOY.format("a"))
    assert client.sets() == [{BAD, OLD}]
    group.publish(Snapshot([BAD, GOOD]))
    assert client.sets() == [{BAD, GOOD}, {BAD, OLD}]
    group.publish(Snapshot([SAME, GOOD]))
    assert client.sets() == [{SAME, GOOD}]


def test_who_has_the_set_without_what_others_refused_is_left_alone() -> None:
    group = group_of(BAD, OLD)
    settle(SotwProxy(group))
    client = Client(group, version=Snapshot([OLD])[CDS].version)
    assert client.sets() == []
    group.publish(Snapshot([BAD, GOOD]))
    assert client.sets() == [{GOOD}]


@pytest.mark.parametrize("words", ["in aa: b:", "", "the cluster a: is bad", "cluster(s) b:a: x"])
def test_words_that_name_nobody_blame_nobody(words: str) -> None:
    group = group_of(BAD, GOOD)
    client = Client(group, words)
    assert client.sets() == [{BAD, GOOD}]
    assert (client.subscription.refused, client.state) == ({}, State.NACK)


def test_client_that_asked_by_name_and_refuses_is_not_synchronised() -> None:
    """What it refuses is a part of all there is."""
    group = group_of(BAD, GOOD, NEW)
    client = Client(group, names=["a", "b"])
    assert client.sets() == [{BAD, GOOD}]
    assert client.state is State.NACK
    group.publish(Snapshot([SAME, GOOD, NEW]))
    assert client.sets() == [{SAME, GOOD}]
    assert client.state is State.SYNCED


def test_after_the_first_ack_what_it_has_is_known() -> None:
    client = Client(group_of(SAME, GOOD))
    assert client.sets() == [{SAME, GOOD}]
    client.group.publish(Snapshot([BAD, resource(CDS, "b", 3)]))
    client.sets()
    assert list(client.subscription.refused) == ["a"]
    held = client.subscription.held
    assert {held.get(name) for name in held} == {SAME, resource(CDS, "b", 3)}
