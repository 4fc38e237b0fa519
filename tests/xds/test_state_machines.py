"""The state machines by themselves: no server, no time. Whatever happens, every proxy ends at its best."""
# ruff: noqa: N802 - the numbers in the names are those of the list of checks

import weakref
from collections.abc import Hashable, Iterable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.xds.client import resource
from xds import delta as delta_module
from xds import group as group_module
from xds import protos
from xds.delta import MAX_PIECES, PARTS, PIECE, DeltaSubscription
from xds.group import Group, Recent, Refusal, Response
from xds.resources import CDS, EDS, LDS, RDS, SDS, Guard, Resource, glob_of
from xds.snapshot import Snapshot
from xds.sotw import SotwSubscription
from xds.status import State, state_of
from xds.stream import PATIENCE, Stream, TooManyTypesError
from xds.subscription import MAX_NAME, MAX_NAMES, MAX_PENDING, TooManyNamesError

BAD, ALSO_BAD = 9, 99
"""Contents that the simulated proxies refuse."""
TYPES = (CDS, EDS, LDS, RDS, SDS)
NAMED = (EDS, RDS, SDS)
LOOP = 500
"""Responses of which no history here needs so many."""
GLOB = "xdstp://x/t/*"
NAMES = ("a", "b", "xdstp://x/t/c", "xdstp://x/t/d")
TTL = timedelta(seconds=PATIENCE)


def any_resource(type_url: str, name: str, content: int) -> Resource:
    """Make a resource; those of one name have a time to live."""
    return resource(type_url, name, content, ttl=TTL if name == NAMES[-1] else None)


BAD_VERSIONS = {
    any_resource(type_url, name, bad).version
    for type_url in TYPES
    for name in NAMES
    for bad in (BAD, ALSO_BAD)
}


def group_of(*published: Resource) -> Group:
    return Group("group", Snapshot(published), identifier="test", numbers=count(1), recent=Recent())


def world_of(contents: dict[tuple[str, str], int]) -> Snapshot:
    return Snapshot(any_resource(type_url, name, content) for (type_url, name), content in contents.items())


class DeltaProxy:
    """A simulated client of the incremental variant: as Envoy, it drops a response with any bad member."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.has: dict[str, dict[str, str]] = {type_url: {} for type_url in TYPES}
        self.names: dict[str, set[str]] = {EDS: set(), RDS: set(), SDS: set()}
        self.received: list[tuple[str, Response, Any]] = []
        self.now = 0.0
        self.connect()

    def connect(self) -> None:
        self.received.clear()
        self.stream = Stream(self.group, "proxy", DeltaSubscription)
        for type_url in TYPES:
            self.stream.subscription(type_url).request(
                subscribe=sorted(self.names.get(type_url, ())), initial_versions=self.has[type_url]
            )

    def subscribe(self, type_url: str, *names: str) -> None:
        self.names[type_url].update(names)
        self.stream.subscription(type_url).request(subscribe=names)

    def unsubscribe(self, type_url: str, name: str) -> None:
        self._drop(type_url, name)
        self.stream.subscription(type_url).request(unsubscribe=[name])

    def _drop(self, type_url: str, name: str) -> None:
        self.names[type_url].discard(name)
        for member in [member for member in self.has[type_url] if not self.wants(type_url, member)]:
            del self.has[type_url][member]

    def read(self) -> bool:
        """Take the next response, without answering it."""
        assert len(self.received) < LOOP, "a loop"
        response = self.stream.next_response(self.now)
        if response is None:
            return False
        message = protos.DeltaDiscoveryResponse.FromString(response.data)
        self.received.append((message.type_url, response, message))
        return True

    def answer(self) -> None:
        """ACK or NACK the oldest response, if there is any."""
        if not self.received:
            return
        type_url, response, message = self.received.pop(0)
        versions = {r.name: r.version for r in message.resources if self.wants(type_url, r.name)}
        error = None
        unknown = {r.name: r.version for r in message.resources if not r.HasField("resource")}
        if not unknown.items() <= self.has[type_url].items():
            error = "an empty message"
        elif BAD_VERSIONS.isdisjoint(r.version for r in message.resources):
            self.has[type_url].update(versions)
            for name in message.removed_resources:
                self.has[type_url].pop(name, None)
        else:
            error = "bad"
        self.stream.subscription(type_url).request(nonce=response.nonce, error=error)

    def exchange(self) -> None:
        """Take and answer all that is there now."""
        while self.read():
            pass
        while self.received:
            self.answer()

    def wait(self) -> None:
        """Let some time pass."""
        self.now += PATIENCE / 2

    def reconnect(self) -> None:
        """Lose the stream, and open another."""
        self.connect()

    def wants(self, type_url: str, name: str) -> bool:
        """Whether it subscribed to this."""
        return type_url not in self.names or not self.names[type_url].isdisjoint({name, glob_of(name)})


class SotwProxy(DeltaProxy):
    """A simulated client of the state-of-the-world variant."""

    stream: Any

    def connect(self) -> None:
        self.received.clear()
        self.nonces = dict.fromkeys(TYPES, "")
        self.stream = Stream(self.group, "proxy", partial(SotwSubscription, wraps=True))
        for type_url in TYPES:
            self._request(type_url)

    def reconnect(self) -> None:
        """Do not: the server could not know what this client has (see `xds.sotw`)."""

    def _request(self, type_url: str, error: str | None = None) -> None:
        names = sorted(self.names.get(type_url, ()))
        self.stream.subscription(type_url).request(names=names, nonce=self.nonces[type_url], error=error)

    def subscribe(self, type_url: str, *names: str) -> None:
        self.names[type_url].update(names)
        self._request(type_url)

    def unsubscribe(self, type_url: str, name: str) -> None:
        self._drop(type_url, name)
        self._request(type_url)

    def read(self) -> bool:
        assert len(self.received) < LOOP, "a loop"
        response = self.stream.next_response(self.now)
        if response is None:
            return False
        message = protos.DiscoveryResponse.FromString(response.data)
        self.received.append((message.type_url, response, message))
        return True

    def answer(self) -> None:
        if not self.received:
            return
        type_url, response, message = self.received.pop(0)
        self.nonces[type_url] = response.nonce
        kind = {
            CDS: protos.Cluster,
            EDS: protos.ClusterLoadAssignment,
            LDS: protos.Listener,
            RDS: protos.RouteConfiguration,
            SDS: protos.Secret,
        }[type_url]
        members = []
        for packed in message.resources:
            wrapped = protos.Resource()
            body = wrapped.resource if packed.Unpack(wrapped) else packed
            ttl = wrapped.ttl.ToTimedelta() if wrapped.HasField("ttl") else None
            members.append(Resource.of(kind.FromString(body.value), ttl=ttl))
        error = None
        if BAD_VERSIONS.isdisjoint(r.version for r in members):
            if type_url not in self.names:
                self.has[type_url] = {}
            self.has[type_url].update({r.name: r.version for r in members if self.wants(type_url, r.name)})
        else:
            error = "bad"
        self._request(type_url, error=error)


def settle(proxy: DeltaProxy) -> int:
    """Answer everything, and let all deadlines pass; return the number of responses that it took."""
    responses = 0
    for _ in range(4):
        while proxy.read() or proxy.received:
            responses += 1
            assert responses < LOOP, "a loop"
            proxy.answer()
        proxy.now += 3 * PATIENCE + 1
    return responses


Step = tuple[Any, ...]
contents = st.dictionaries(
    st.tuples(st.sampled_from(TYPES), st.sampled_from(NAMES)), st.sampled_from([1, 2, BAD]), max_size=12
)
which = st.sampled_from([0, 1, 2])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), contents),
        st.tuples(
            st.sampled_from(["subscribe", "unsubscribe"]),
            which,
            st.sampled_from(NAMED),
            st.sampled_from((*NAMES, GLOB)),
        ),
        st.tuples(st.just("subscribe"), which, st.sampled_from(NAMED), *2 * [st.sampled_from(NAMES)]),
        st.tuples(st.sampled_from(["read", "answer", "exchange", "wait", "reconnect"]), which),
    ),
    min_size=5,
    max_size=40,
)


@settings(deadline=None)
@given(steps=steps, piece=st.sampled_from([PIECE, 1]))
def test_proxies_end_at_their_best(steps: list[Step], piece: int) -> None:
    """After any history: what is good arrived, what is bad did not, and what is not wanted is gone."""
    with patch.object(delta_module, "PIECE", piece):
        check_history(steps)


def check_history(steps: list[Step]) -> None:
    group = group_of()
    proxies = [DeltaProxy(group), DeltaProxy(group), SotwProxy(group)]
    last: dict[tuple[str, str], int] = {}
    for step, *arguments in steps:
        if step == "publish":
            (last,) = arguments
            group.publish(world_of(last))
        else:
            number, *rest = arguments
            getattr(proxies[number], step)(*rest)
    for proxy in 2 * proxies:
        settle(proxy)
    for proxy in proxies:
        for type_url in TYPES:
            check(
                proxy, type_url, {name: content for (kind, name), content in last.items() if kind == type_url}
            )


def views(proxies: list[DeltaProxy]) -> list[dict[str, dict[str, str]]]:
    """Return per proxy and type what the server believes that it has: the version of each name."""
    return [
        {
            type_url: {
                name: getattr(subscription.held.get(name), "version", "") for name in subscription.held
            }
            for type_url, subscription in proxy.stream.subscriptions.items()
        }
        for proxy in proxies
    ]


@settings(deadline=None)
@given(steps=steps, piece=st.sampled_from([PIECE, 1]))
def test_what_proxies_share_is_not_changed_by_any_of_them(steps: list[Step], piece: int) -> None:
    """What the server believes of a proxy changes only with that proxy, and in the end it is true."""
    group = group_of()
    proxies = [DeltaProxy(group), DeltaProxy(group), SotwProxy(group)]
    with patch.object(delta_module, "PIECE", piece):
        for step, *arguments in steps:
            before = views(proxies)
            if step == "publish":
                group.publish(world_of(*arguments))
                assert views(proxies) == before
            else:
                number, *rest = arguments
                getattr(proxies[number], step)(*rest)
                assert [view for index, view in enumerate(views(proxies)) if index != number] == [
                    view for index, view in enumerate(before) if index != number
                ]
        for proxy in 2 * proxies:
            settle(proxy)
    assert views(proxies[:2]) == [proxy.has for proxy in proxies[:2]]


@pytest.mark.parametrize("variant", [DeltaProxy, SotwProxy])
def test_proxies_that_ask_for_the_same_share_it_however_they_came_to_it(variant: type[DeltaProxy]) -> None:
    names = [f"{number:02}" for number in range(20)]
    group = group_of(*(resource(SDS, name) for name in names))
    at_once, one_by_one, more_at_first, again = (variant(group) for _ in range(4))
    at_once.names[SDS] = again.names[SDS] = set(names[1:])
    at_once.connect()
    again.connect()
    for name in names[1:]:
        one_by_one.subscribe(SDS, name)
        one_by_one.exchange()
    for name in names:
        more_at_first.subscribe(SDS, name)
    more_at_first.exchange()
    more_at_first.unsubscribe(SDS, names[0])
    proxies = (at_once, one_by_one, more_at_first, again)
    for proxy in proxies:
        settle(proxy)
    again.reconnect()
    group.publish(Snapshot([resource(SDS, name, 2) for name in names]))
    for proxy in proxies:
        settle(proxy)
    subscriptions = [proxy.stream.subscription(SDS) for proxy in proxies]
    assert len({id(subscription.names) for subscription in subscriptions}) == 1
    assert len({id(subscription.held.base) for subscription in subscriptions}) == 1
    assert [subscription.held.own for subscription in subscriptions] == [{}] * 4
    assert set(subscriptions[0].held) == set(names[1:])


class Counted(str):
    """A name that counts how often it, or any other, is looked up."""

    __slots__ = ()
    lookups = 0

    def __hash__(self) -> int:
        Counted.lookups += 1
        return super().__hash__()


def test_names_that_a_client_asked_for_before_are_not_looked_at_for_each_that_it_adds_or_drops() -> None:
    """Envoy can ask for each of thousands of secrets by itself: that must not cost their square."""
    names = [Counted(number) for number in range(200)]
    group = group_of(*(replace(resource(SDS, str(name)), name=name) for name in names))
    stream = Stream(group, "proxy", DeltaSubscription)
    subscription = stream.subscription(SDS)
    for change in ("subscribe", "unsubscribe"):
        lookups = []
        for name in names:
            before = Counted.lookups
            subscription.request(**{change: [name]})
            while (response := stream.next_response(0.0)) is not None:
                subscription.request(nonce=response.nonce)
            lookups.append(Counted.lookups - before)
        assert lookups[-1] == lookups[1], change
    assert not list(subscription.held)


def test_what_a_client_had_on_its_way_is_not_kept() -> None:
    """The sets of a client that asks name by name have the square of what it asks for."""
    names = [f"{number:03}" for number in range(200)]
    proxy = DeltaProxy(group_of(*(resource(SDS, name) for name in names)))
    on_the_way = []
    for name in names:
        proxy.subscribe(SDS, name)
        proxy.exchange()
        on_the_way.append(weakref.ref(proxy.stream.subscription(SDS).held.base))
    assert proxy.has[SDS].keys() == set(names)
    assert sum(each() is not None for each in on_the_way) < 20


def check(proxy: DeltaProxy, type_url: str, contents: dict[str, int]) -> None:
    """Compare what a proxy has of a type with what there is."""
    wanted = {name: content for name, content in contents.items() if proxy.wants(type_url, name)}
    has = proxy.has[type_url]
    good = {
        name: any_resource(type_url, name, content).version
        for name, content in wanted.items()
        if content != BAD
    }
    assert {name: has.get(name) for name in good} == good
    assert BAD_VERSIONS.isdisjoint(has.values())
    if type_url in (CDS, LDS) or not isinstance(proxy, SotwProxy):
        # What was refused may still refer to what vanished.
        refused = any(proxy.stream.subscription(other).refused for other in TYPES)
        assert refused or has.keys() <= wanted.keys()
    if not proxy.group.refusals:
        assert not proxy.stream.subscription(type_url).pending
        assert not proxy.stream.subscription(type_url).failing


@pytest.fixture
def delta() -> DeltaProxy:
    """Connect a proxy and give it a listener, a route, a cluster and a secret."""
    proxy = DeltaProxy(
        group_of(resource(CDS, "a"), resource(LDS, "a"), resource(RDS, "a"), resource(SDS, "a"))
    )
    proxy.subscribe(RDS, "a")
    proxy.subscribe(SDS, "a")
    settle(proxy)
    return proxy


def publish(proxy: DeltaProxy, *published: Resource) -> None:
    proxy.group.publish(Snapshot(published))


def read_all(proxy: DeltaProxy) -> list[tuple[str, list[str], list[str]]]:
    """Return what is sent now: (type, names, removed names) of each response."""
    while proxy.read():
        pass
    return [
        (
            type_url,
            sorted(name for name, r in response.changes.items() if r),
            [n for n, r in response.changes.items() if not r],
        )
        for type_url, response, _ in proxy.received
    ]


def answer_all(proxy: DeltaProxy) -> None:
    while proxy.received:
        proxy.answer()


def test_X2_cluster_is_swapped_in_four_steps(delta: DeltaProxy) -> None:
    """New cluster, ACK, routes, ACK, old cluster out, ACK, its secret out."""
    publish(delta, resource(CDS, "b"), resource(LDS, "a", 2), resource(RDS, "a", 2))
    assert read_all(delta) == [(CDS, ["b"], [])]
    answer_all(delta)
    assert read_all(delta) == [(LDS, ["a"], []), (RDS, ["a"], [])]
    answer_all(delta)
    assert read_all(delta) == [(CDS, [], ["a"])]
    answer_all(delta)
    assert read_all(delta) == [(SDS, [], ["a"])]
    answer_all(delta)
    assert read_all(delta) == []


def test_X2_each_step_waits_only_so_long(delta: DeltaProxy) -> None:
    """A cluster that never gets warm delays others once; a proxy that never answers, nothing for ever."""
    start = delta.now
    publish(delta, resource(CDS, "b"), resource(LDS, "a"), resource(RDS, "a", 2))
    assert read_all(delta) == [(CDS, ["b"], [])]
    assert delta.stream.wake_at(delta.now) == start + PATIENCE
    delta.now = start + PATIENCE
    assert read_all(delta)[1:] == [(RDS, ["a"], [])]
    delta.now = start + 2 * PATIENCE
    assert read_all(delta)[2:] == [(CDS, [], ["a"])]
    delta.now = start + 3 * PATIENCE
    assert read_all(delta)[3:] == [(SDS, [], ["a"])]
    assert delta.stream.wake_at(delta.now) is None


def test_X2_changes_that_add_no_cluster_wait_for_nothing(delta: DeltaProxy) -> None:
    publish(delta, resource(CDS, "a", 2), resource(LDS, "a", 2), resource(RDS, "a", 2), resource(SDS, "a", 2))
    assert [sent[0] for sent in read_all(delta)] == [CDS, LDS, RDS, SDS]


def test_X2_unanswered_cluster_delays_later_changes_no_more(delta: DeltaProxy) -> None:
    """One provider whose DNS never answers: after its time is over, other changes pass."""
    secret = resource(SDS, "a")
    publish(delta, resource(CDS, "a"), resource(CDS, "b"), resource(LDS, "a"), resource(RDS, "a", 2), secret)
    read_all(delta)
    delta.now += PATIENCE
    assert read_all(delta)[1:] == [(RDS, ["a"], [])]
    publish(delta, resource(CDS, "a"), resource(CDS, "b"), resource(LDS, "a"), resource(RDS, "a", 3), secret)
    assert read_all(delta)[2:] == [(RDS, ["a"], [])]


def test_X2_what_a_refused_route_may_need_is_not_removed(delta: DeltaProxy) -> None:
    """The proxy keeps its old route, so it keeps the old cluster, however long that takes."""
    publish(delta, resource(LDS, "a"), resource(RDS, "a", BAD))
    settle(delta)
    assert delta.has[CDS].keys() == {"a"}
    publish(delta, resource(LDS, "a"), resource(RDS, "a", 2))
    settle(delta)
    assert delta.has[CDS].keys() == set()


def test_X2_what_a_proxy_asks_for_and_lacks_is_answered_at_once(delta: DeltaProxy) -> None:
    """A new cluster may itself wait for it."""
    publish(delta, resource(CDS, "b"), resource(LDS, "a"), resource(RDS, "b"), resource(SDS, "b"))
    read_all(delta)
    delta.subscribe(RDS, "b")
    delta.subscribe(SDS, "b")
    assert read_all(delta)[1:] == [(RDS, ["b"], []), (SDS, ["b"], [])]


def test_large_refused_response_is_searched_in_few(delta: DeltaProxy) -> None:
    """One bad cluster among 3,000: parts of a sixteenth, three times."""
    clusters = [resource(CDS, f"c{number}") for number in range(3000)]
    publish(delta, *clusters, resource(CDS, "b", BAD))
    responses = settle(delta)
    assert len(delta.has[CDS]) == 3000
    assert responses < 4 * PARTS


def test_version_that_others_accepted_is_not_in_quarantine() -> None:
    """A proxy that refuses what others accept is alone with it: an Envoy of another version, say."""
    group = group_of(resource(CDS, "a"))
    content, odd, late = DeltaProxy(group), DeltaProxy(group), DeltaProxy(group)
    for proxy in (content, odd):
        settle(proxy)
    group.publish(Snapshot([resource(CDS, "a", 2)]))
    settle(content)
    odd.read()
    type_url, response, _ = odd.received.pop()
    odd.stream.subscription(type_url).request(nonce=response.nonce, error="not for me")
    assert not group.refusals
    settle(odd)
    settle(late)
    assert odd.has[CDS] == {"a": resource(CDS, "a", 1).version}
    assert content.has == late.has


def test_quarantine_ends_when_a_proxy_accepts() -> None:
    """The first to answer may be the odd one: its refusal counts only until another accepts."""
    group = group_of(resource(CDS, "a"))
    content, odd = DeltaProxy(group), DeltaProxy(group)
    for proxy in (content, odd):
        settle(proxy)
    group.publish(Snapshot([resource(CDS, "a", 2)]))
    content.read()
    odd.read()
    type_url, response, _ = odd.received.pop()
    odd.stream.subscription(type_url).request(nonce=response.nonce, error="not for me")
    assert [refusal.name for refusal in group.refusals.values()] == ["a"]
    settle(content)
    assert not group.refusals
    settle(odd)
    assert content.has[CDS] == {"a": resource(CDS, "a", 2).version}
    assert odd.has[CDS] == {"a": resource(CDS, "a", 1).version}


@pytest.mark.parametrize("before", ["open", "other"])
def test_what_restricts_is_closed_rather_than_open(before: str) -> None:
    """A refused policy is not replaced by no policy: by its last good version, or by one that denies."""
    good = Resource.of(protos.Cluster(name="a", alt_stat_name=before))
    opened = Resource.of(protos.Cluster(name="a", alt_stat_name="open"))
    closed = Resource.of(protos.Cluster(name="a", alt_stat_name="closed"))
    refused = Resource.of(protos.Cluster(name="a"), guard=Guard(opened.version, lambda: closed))
    group = group_of(good)
    proxy, newcomer = DeltaProxy(group), DeltaProxy(group)
    settle(proxy)
    group.publish(Snapshot([refused]))
    proxy.read()
    type_url, response, _ = proxy.received.pop()
    proxy.stream.subscription(type_url).request(nonce=response.nonce, error="refused")
    settle(proxy)
    settle(newcomer)
    expected = closed if before == "open" else good
    assert proxy.has[CDS] == newcomer.has[CDS] == {"a": expected.version}


def test_quarantine_survives_the_proxy_that_caused_it() -> None:
    """Newcomers get the version that was accepted last, also when nobody is connected any more."""
    group = group_of(resource(CDS, "a"))
    settle(DeltaProxy(group))
    group.publish(Snapshot([resource(CDS, "a", BAD)]))
    settle(DeltaProxy(group))
    newcomer = DeltaProxy(group)
    assert settle(newcomer) == sum(1 for _ in TYPES if _ in (CDS, LDS))
    assert newcomer.has[CDS] == {"a": resource(CDS, "a", 1).version}


def test_refused_version_after_a_restart_keeps_what_proxies_have() -> None:
    """The new server never saw the good version; who has it keeps it, newcomers do without."""
    group = group_of(resource(CDS, "a", BAD), resource(CDS, "b"))
    proxy = DeltaProxy(group)
    proxy.has[CDS] = {"a": resource(CDS, "a", 1).version, "b": resource(CDS, "b").version}
    proxy.connect()
    settle(proxy)
    assert proxy.has[CDS]["a"] == resource(CDS, "a", 1).version
    proxy.connect()
    newcomer = DeltaProxy(group)
    for each in (proxy, newcomer):
        settle(each)
    assert proxy.has[CDS]["a"] == resource(CDS, "a", 1).version
    assert newcomer.has[CDS].keys() == {"b"}


def test_what_is_held_and_closes_is_for_those_who_have_nothing() -> None:
    """Who has another version keeps it, and what closes is never taken for a good one."""
    closed = Resource.of(protos.Cluster(name="a", alt_stat_name="closed"), held=True)
    guard = Guard("", lambda: closed)
    versions = [replace(resource(CDS, "a", content), guard=guard) for content in (BAD, ALSO_BAD)]
    archive = DictArchive()
    snapshot = Snapshot(versions[:1])
    group = Group("group", snapshot, identifier="test", numbers=count(1), recent=Recent(), archive=archive)
    proxy, newcomer = DeltaProxy(group), DeltaProxy(group)
    proxy.has[CDS] = {"a": resource(CDS, "a", 1).version}
    proxy.connect()
    for each in (proxy, newcomer):
        settle(each)
    assert proxy.has[CDS] == {"a": resource(CDS, "a", 1).version}
    assert newcomer.has[CDS] == {"a": closed.version}
    group.publish(Snapshot(versions[1:]))
    for each in (newcomer, proxy):
        settle(each)
    assert proxy.has[CDS] == {"a": resource(CDS, "a", 1).version}
    assert newcomer.has[CDS] == {"a": closed.version}
    assert not archive


@pytest.mark.parametrize("placeholder", [True, False])
def test_held_resource_is_left_alone(placeholder: bool) -> None:
    """It is known to exist and its content is not: any version stays, who has none gets the placeholder."""
    held = resource(SDS, "a", 7, held=True) if placeholder else Resource.unknown(SDS, "a")
    group = group_of(held)
    owner, newcomer = DeltaProxy(group), DeltaProxy(group)
    owner.names[SDS], owner.has[SDS] = {"a"}, {"a": "any version"}
    owner.connect()
    newcomer.subscribe(SDS, "a")
    for proxy in (owner, newcomer):
        settle(proxy)
    assert owner.has[SDS] == {"a": "any version"}
    assert newcomer.has[SDS] == ({"a": held.version} if placeholder else {})
    group.publish(Snapshot([resource(SDS, "a", 1)]))
    for proxy in (owner, newcomer):
        settle(proxy)
        assert proxy.has[SDS] == {"a": resource(SDS, "a", 1).version}


def test_resource_that_becomes_held_stays(delta: DeltaProxy) -> None:
    publish(delta, resource(CDS, "a"), resource(LDS, "a"), resource(RDS, "a"), Resource.unknown(SDS, "a"))
    assert read_all(delta) == []


def test_same_step_is_the_same_bytes_for_all() -> None:
    """It is encoded once: the first load, a change under the wildcard, a change of what is named."""
    group = group_of(resource(CDS, "a"), resource(RDS, "a"))
    proxies = [DeltaProxy(group) for _ in range(3)] + [SotwProxy(group) for _ in range(3)]
    for content in (1, 2, 3):
        group.publish(Snapshot([resource(CDS, "a", content), resource(RDS, "a", content)]))
        for proxy in proxies:
            proxy.subscribe(RDS, "a") if content == 1 else None
            while proxy.read():
                pass
        for same in (proxies[:3], proxies[3:]):
            sent = [
                [id(response.data) for type_url, response, _ in p.received if type_url in (CDS, RDS)]
                for p in same
            ]
            assert len(sent[0]) == 2
            assert sent[0] == sent[1] == sent[2]
        for proxy in proxies:
            answer_all(proxy)


@pytest.mark.parametrize("variant", [DeltaProxy, SotwProxy])
def test_client_that_never_answers_is_remembered_in_bounded_space(variant: type[DeltaProxy]) -> None:
    group = group_of(resource(CDS, "a"))
    proxy = variant(group)
    for content in range(100, 100 + 3 * MAX_PENDING):
        group.publish(Snapshot([resource(CDS, "a", content)]))
        proxy.read()
    assert len(proxy.stream.subscription(CDS).pending) == MAX_PENDING
    settle(proxy)
    assert proxy.has[CDS] == {"a": resource(CDS, "a", content).version}


@pytest.mark.parametrize("kind", [DeltaSubscription, SotwSubscription])
def test_number_and_length_of_names_are_limited(
    kind: type[DeltaSubscription] | type[SotwSubscription],
) -> None:
    """Of all types together, too: the names of a client may not cost any amount of memory."""
    stream: Stream[Any] = Stream(group_of(), "proxy", kind)
    names = "subscribe" if kind is DeltaSubscription else "names"
    numbers = [str(number) for number in range(MAX_NAMES + 1)]
    for too_much in (numbers, ["x" * (MAX_NAME + 1)]):
        with pytest.raises(TooManyNamesError):
            stream.subscription(RDS).request(**{names: too_much})
    stream.subscription(RDS).request(**{names: [*numbers[:-2], "x" * MAX_NAME]})
    stream.check_names()
    stream.subscription(SDS).request(**{names: ["a", "b"]})
    with pytest.raises(TooManyNamesError):
        stream.check_names()
    with pytest.raises(TooManyTypesError):
        stream.subscription("x" * (MAX_NAME + 1))


def test_number_of_resources_that_a_client_brings_along_is_limited(delta: DeltaProxy) -> None:
    versions = {str(number): "1" for number in range(MAX_NAMES + 1)}
    stream = Stream(delta.group, "proxy", DeltaSubscription)
    with pytest.raises(TooManyNamesError):
        stream.subscription(CDS).request(initial_versions=versions)


def test_X2_full_sets_swap_a_cluster_in_steps_too() -> None:
    """In state of the world, the old cluster is in the set until the routes are accepted."""
    proxy = SotwProxy(group_of(resource(CDS, "a"), resource(LDS, "a"), resource(RDS, "a")))
    proxy.subscribe(RDS, "a")
    settle(proxy)
    publish(proxy, resource(CDS, "b"), resource(LDS, "a"), resource(RDS, "a", 2))
    assert read_all(proxy) == [(CDS, ["b"], [])]
    answer_all(proxy)
    assert proxy.has[CDS].keys() == {"a", "b"}
    assert read_all(proxy) == [(RDS, ["a"], [])]
    answer_all(proxy)
    assert read_all(proxy) == [(CDS, [], ["a"])]
    answer_all(proxy)
    assert proxy.has[CDS].keys() == {"b"}


def test_full_set_with_unknown_content_is_not_sent_over_what_a_proxy_has() -> None:
    """A set without it would remove it. A proxy that has nothing gets the set without it."""
    group = group_of(resource(CDS, "a"), Resource.unknown(CDS, "b"))
    owner = Stream(group, "owner", SotwSubscription)
    owner.subscription(CDS).request(version="from an earlier stream")
    assert owner.next_response(0) is None
    newcomer = SotwProxy(group)
    settle(newcomer)
    assert newcomer.has[CDS].keys() == {"a"}
    group.publish(Snapshot(resource(CDS, name) for name in "ab"))
    response = owner.next_response(0)
    assert response is not None
    assert response.changes.keys() == {"a", "b"}


# While something cannot be read, and nobody knows what was in it


def proxy_of_an_earlier_life(group: Group, *before: Resource) -> DeltaProxy:
    """Return a proxy that comes with resources of another server."""
    proxy = DeltaProxy(group)
    for each in before:
        proxy.has[each.type_url][each.name] = each.version
        if each.type_url in NAMED:
            proxy.names[each.type_url].add(each.name)
    proxy.connect()
    return proxy


def versions_of(*published: Resource) -> dict[tuple[str, str], str]:
    return {(each.type_url, each.name): each.version for each in published}


def has(proxy: DeltaProxy) -> dict[tuple[str, str], str]:
    return {(url, name): version for url, names in proxy.has.items() for name, version in names.items()}


def test_incomplete_snapshot_removes_nothing_and_leaves_routes_and_listeners_alone() -> None:
    """Routes of another life may lead to what is missing now. Clusters and secrets stand for themselves."""
    before = [resource(url, name) for url in (CDS, SDS) for name in "ab"]
    before += [resource(LDS, "in"), resource(RDS, "routes")]
    changed = [resource(CDS, "a", 2), resource(CDS, "c"), resource(SDS, "a", 2)]
    changed += [resource(LDS, "in", 2), resource(RDS, "routes", 2)]
    group = group_of()
    group.publish(Snapshot(changed, incomplete=True))
    proxy, newcomer = proxy_of_an_earlier_life(group, *before), DeltaProxy(group)
    for name in "ab":
        newcomer.subscribe(SDS, name)
    newcomer.subscribe(RDS, "routes")
    for each in (proxy, newcomer):
        settle(each)
    expected = versions_of(*before, resource(CDS, "a", 2), resource(CDS, "c"), resource(SDS, "a", 2))
    assert has(proxy) == expected
    assert has(newcomer) == versions_of(*changed), "who has nothing gets what there is"

    proxy.subscribe(SDS, "b")
    group.publish(Snapshot([*changed, resource(CDS, "d")], incomplete=True))
    settle(proxy)
    assert has(proxy) == {**expected, **versions_of(resource(CDS, "d"))}

    group.publish(Snapshot(changed))
    for each in (proxy, newcomer):
        settle(each)
        assert has(each) == versions_of(*changed), "now it is known that there is no more"


def test_routes_that_this_server_sent_change_while_the_snapshot_is_incomplete() -> None:
    """It knows what they refer to. Somebody's mistake in another file holds up nobody."""
    group = group_of()
    group.publish(Snapshot([resource(RDS, "routes")], incomplete=True))
    proxy = DeltaProxy(group)
    proxy.subscribe(RDS, "routes")
    settle(proxy)
    group.publish(Snapshot([resource(RDS, "routes", 2), resource(CDS, "a")], incomplete=True))
    settle(proxy)
    assert has(proxy) == versions_of(resource(RDS, "routes", 2), resource(CDS, "a"))
    group.publish(Snapshot([resource(RDS, "routes", 2)], incomplete=True))
    settle(proxy)
    assert has(proxy) == versions_of(resource(RDS, "routes", 2), resource(CDS, "a")), "it may be referred to"


def test_proxy_that_has_what_there_is_gets_changes_of_an_incomplete_snapshot() -> None:
    group = group_of()
    group.publish(Snapshot([resource(RDS, "routes")], incomplete=True))
    proxy = proxy_of_an_earlier_life(group, resource(RDS, "routes"))
    settle(proxy)
    group.publish(Snapshot([resource(RDS, "routes", 2)], incomplete=True))
    settle(proxy)
    assert has(proxy) == versions_of(resource(RDS, "routes", 2))


def test_removal_that_waits_when_the_snapshot_becomes_incomplete_is_given_up() -> None:
    proxy = DeltaProxy(group_of(resource(CDS, "a"), resource(CDS, "b"), resource(LDS, "in")))
    settle(proxy)
    proxy.group.publish(Snapshot([resource(CDS, "b"), resource(LDS, "in", 2)]))
    assert proxy.read(), "the listener; the cluster is removed after its ACK"
    proxy.group.publish(Snapshot([resource(CDS, "b"), resource(LDS, "in", 2)], incomplete=True))
    settle(proxy)
    assert proxy.has[CDS].keys() == {"a", "b"}
    assert not proxy.stream.subscription(CDS).deferred
    proxy.group.publish(Snapshot([resource(CDS, "b"), resource(LDS, "in", 2)]))
    settle(proxy)
    assert proxy.has[CDS].keys() == {"b"}


def test_incomplete_full_set_is_not_sent_over_what_a_proxy_has() -> None:
    """State of the world: what is not in the set is removed. Secrets change, route tables stay."""
    changed = [
        resource(CDS, "a", 2),
        resource(LDS, "in", 2),
        resource(RDS, "routes", 2),
        resource(SDS, "a", 2),
    ]
    group = group_of()
    group.publish(Snapshot(changed, incomplete=True))
    owner = Stream(group, "owner", SotwSubscription)
    for url, names in ((CDS, ()), (LDS, ()), (RDS, ("routes",)), (SDS, ("a", "b"))):
        owner.subscription(url).request(names=names, version="from an earlier stream")
    response = owner.next_response(0)
    assert response is not None
    assert list(response.changes.values()) == [resource(SDS, "a", 2)]
    owner.subscription(SDS).request(names=["a", "b"], nonce=response.nonce)
    assert owner.next_response(0) is None

    newcomer = SotwProxy(group)
    newcomer.subscribe(RDS, "routes")
    newcomer.subscribe(SDS, "a")
    settle(newcomer)
    assert has(newcomer) == versions_of(*changed)

    group.publish(Snapshot(changed))
    sent: list[Resource | None] = []
    while (response := owner.next_response(0)) is not None:
        sent += response.changes.values()
    assert sent == [resource(CDS, "a", 2), resource(LDS, "in", 2), resource(RDS, "routes", 2)]


def test_full_set_that_a_proxy_has_is_recognised_in_an_incomplete_snapshot() -> None:
    group = group_of()
    group.publish(Snapshot([resource(CDS, "a")], incomplete=True))
    owner = Stream(group, "owner", SotwSubscription)
    owner.subscription(CDS).request(version=group.point[CDS].version)
    assert owner.next_response(0) is None
    group.publish(Snapshot([resource(CDS, "a", 2)], incomplete=True))
    response = owner.next_response(0)
    assert response is not None
    assert list(response.changes.values()) == [resource(CDS, "a", 2)]


class DictArchive(dict[tuple[str, str, str], Resource]):
    """An `xds.group.Archive` in memory: what stands in for what. All groups are alike."""

    def __init__(self, *args: dict[tuple[str, str, str], Resource]) -> None:
        super().__init__(*args)
        self.refused: dict[tuple[str, str, str], Refusal] = {}

    def put(self, refused: tuple[str, str, str], good: Resource) -> None:
        self[refused] = good

    def add(self, refusal: Refusal) -> None:
        self.refused[refusal.refused] = replace(refusal, archived=True)

    def drop(self, refusal: Refusal) -> None:
        self.refused.pop(refusal.refused, None)

    def refusals(self, group: Hashable) -> Iterable[Refusal]:
        return [replace(refusal, group=group) for refusal in self.refused.values()]


def test_archive_tells_a_later_server_what_stands_in_for_a_refused_version() -> None:
    """Also for proxies of other groups, and for another replica: they refuse the same version."""
    archive = DictArchive()

    def group(*published: Resource) -> Group:
        snapshot = Snapshot(published)
        return Group("group", snapshot, identifier="test", numbers=count(1), recent=Recent(), archive=archive)

    proxy = DeltaProxy(group(resource(CDS, "a"), resource(CDS, "b")))
    settle(proxy)
    publish(proxy, resource(CDS, "a", BAD), resource(CDS, "b", 2))
    settle(proxy)
    assert list(archive.values()) == [resource(CDS, "a")]

    later = DeltaProxy(group(resource(CDS, "a", BAD), resource(CDS, "b", 2)))
    settle(later)
    assert has(later) == versions_of(resource(CDS, "a"), resource(CDS, "b", 2))
    publish(later, resource(CDS, "a", 3), resource(CDS, "b", 2))
    settle(later)
    assert has(later) == versions_of(resource(CDS, "a", 3), resource(CDS, "b", 2))


@pytest.mark.parametrize("variant", [DeltaProxy, SotwProxy])
def test_what_stands_in_may_become_known_after_the_refusal(variant: type[DeltaProxy]) -> None:
    """Another replica may say what it is a moment later."""
    bad = resource(CDS, "a", BAD)
    archive = DictArchive()
    snapshot = Snapshot([bad, resource(CDS, "b")])
    group = Group("group", snapshot, identifier="test", numbers=count(1), recent=Recent(), archive=archive)
    proxy = variant(group)
    settle(proxy)
    point = group.point
    group.look_again()
    assert group.point is point
    archive.put((CDS, "a", bad.version), resource(CDS, "a"))
    group.look_again()
    settle(proxy)
    assert has(proxy) == versions_of(resource(CDS, "a"), resource(CDS, "b"))
    point = group.point
    group.look_again()
    assert group.point is point


@pytest.mark.parametrize("variant", [DeltaProxy, SotwProxy])
def test_proxy_that_refuses_the_stand_in_as_well_goes_without(variant: type[DeltaProxy]) -> None:
    """No loop: it is offered once."""
    bad = resource(CDS, "a", BAD)
    archive = DictArchive({(CDS, "a", bad.version): resource(CDS, "a", ALSO_BAD)})
    snapshot = Snapshot([bad, resource(CDS, "b")])
    group = Group("group", snapshot, identifier="test", numbers=count(1), recent=Recent(), archive=archive)
    proxy = variant(group)
    settle(proxy)
    assert has(proxy) == versions_of(resource(CDS, "b"))
    publish(proxy, bad, resource(CDS, "b", 2))
    settle(proxy)
    assert has(proxy) == versions_of(resource(CDS, "b", 2))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everything new go in a response of its own."""
    monkeypatch.setattr(delta_module, "PIECE", 1)


def routed(*names: str) -> Group:
    """Make a group with clusters, listeners and routes of these names."""
    return group_of(*(resource(type_url, name) for type_url in (RDS, LDS, CDS) for name in names))


@pytest.mark.usefixtures("small_pieces")
def test_X2_pieces_of_what_is_new_keep_the_order_of_the_types() -> None:
    proxy = DeltaProxy(routed("a", "b"))
    proxy.subscribe(RDS, "a")
    proxy.subscribe(RDS, "b")
    pieces = read_all(proxy)
    assert [type_url for type_url, _, _ in pieces] == [CDS, CDS, LDS, LDS, RDS, RDS]
    assert all(len(names) == 1 for _, names, _ in pieces)
    answer_all(proxy)
    assert proxy.stream.next_response(0) is None
    assert has(proxy) == versions_of(*(resource(url, name) for url in (CDS, LDS, RDS) for name in "ab"))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("variant", [DeltaProxy, SotwProxy])
def test_proxies_that_come_one_after_the_other_are_sent_the_same_bytes(variant: type[DeltaProxy]) -> None:
    group = routed("a", "b")
    sent = []
    for _ in range(2):
        proxy = variant(group)
        responses = []
        while proxy.read():
            responses.append(proxy.received[-1][1].data)
            proxy.answer()
        sent.append(responses)
        del proxy
    assert len(sent[0]) > 1
    assert all(one is other for one, other in zip(*sent, strict=True))


def test_what_is_kept_for_proxies_to_come_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "RECENT", 10_000)
    numbers, recent = count(1), Recent()
    responses = []
    for key in range(100):
        snapshot = Snapshot([resource(CDS, "a")])
        proxy = DeltaProxy(Group(key, snapshot, identifier="test", numbers=numbers, recent=recent))
        responses.append(next_of(proxy))
    assert 0 < sum(response() is not None for response in responses) < 10


@pytest.mark.parametrize("variant", [DeltaProxy, SotwProxy])
def test_only_what_brings_proxies_to_the_newest_point_is_kept(variant: type[DeltaProxy]) -> None:
    proxy = variant(group_of(resource(CDS, "a")))
    first = next_of(proxy)
    assert first() is not None
    publish(proxy, resource(CDS, "a", 2))
    assert first() is None
    step = next_of(proxy)
    assert step() is None
    newcomer = next_of(variant(proxy.group))
    assert newcomer() is not None
    proxy.group.forget()
    assert newcomer() is None


def next_of(proxy: DeltaProxy) -> weakref.ref[Response]:
    """Let a proxy take and accept all that there is; return the first response."""
    assert proxy.read()
    response = weakref.ref(proxy.received[-1][1])
    proxy.exchange()
    return response


@pytest.mark.usefixtures("small_pieces")
def test_pieces_are_shared_and_a_proxy_that_has_them_all_is_as_any_other() -> None:
    group = routed("a", "b", "c")
    one, other = DeltaProxy(group), DeltaProxy(group)
    for proxy in (one, other):
        while proxy.read():
            pass
    assert [response for _, response, _ in one.received] == [response for _, response, _ in other.received]
    for proxy in (one, other):
        answer_all(proxy)
    group.publish(Snapshot([resource(CDS, "a", 2), resource(CDS, "b", 2)]))
    assert read_all(one)[0] == (CDS, ["a", "b"], []), "what it has does not go in pieces, nor do removals"
    assert other.read()
    assert one.received[0][1] is other.received[0][1]


@pytest.mark.usefixtures("small_pieces")
def test_change_between_two_pieces_is_not_lost() -> None:
    proxy = DeltaProxy(routed("a", "b", "c"))
    assert proxy.read()
    assert state_of(proxy.stream.subscription(CDS), proxy.group) is State.STALE
    proxy.answer()
    assert state_of(proxy.stream.subscription(CDS), proxy.group) is State.STALE, "there is more to come"
    publish(proxy, resource(CDS, "a", 2), resource(CDS, "c", 2), resource(CDS, "d"))
    settle(proxy)
    assert has(proxy) == versions_of(resource(CDS, "a", 2), resource(CDS, "c", 2), resource(CDS, "d"))


@pytest.mark.usefixtures("small_pieces")
def test_all_pieces_follow_of_what_is_asked_for_later() -> None:
    """The stream is at the newest point already: a listener that comes later asks for its many routes."""
    proxy = DeltaProxy(routed("a", "b", "c", "d"))
    proxy.subscribe(RDS, "a")
    settle(proxy)
    proxy.subscribe(RDS, "b", "c", "d")
    assert sorted(read_all(proxy)) == [(RDS, [name], []) for name in "bcd"]
    answer_all(proxy)
    assert proxy.has[RDS].keys() == set("abcd")


@pytest.mark.usefixtures("small_pieces")
def test_pieces_that_stay_unanswered_are_few() -> None:
    """Envoy withholds the ACK of clusters until they are warm; what is unanswered has to be remembered."""
    proxy = DeltaProxy(group_of(*(resource(CDS, f"{number:03}") for number in range(100))))
    sizes = [len(names) for type_url, names, _ in read_all(proxy) if type_url == CDS]
    assert sizes == [1] * MAX_PIECES + [100 - MAX_PIECES]


def test_X4_times_to_live_are_renewed_after_half_of_the_shortest() -> None:
    mortal = [resource(CDS, "a", ttl=timedelta(seconds=10)), resource(CDS, "b", ttl=timedelta(seconds=30))]
    proxy = DeltaProxy(group_of(*mortal, resource(CDS, "c")))
    settle(proxy)
    start = proxy.now
    assert (proxy.read(), proxy.stream.wake_at(start)) == (True, start + 5)
    proxy.now = start + 4.9
    proxy.answer()
    assert not proxy.read()
    proxy.now = start + 5
    assert proxy.read()
    (_, _, message) = proxy.received.pop()
    assert {r.name: r.version for r in message.resources} == {r.name: r.version for r in mortal}
    publish(proxy, resource(CDS, "a"), resource(CDS, "b"))
    settle(proxy)
    assert proxy.stream.wake_at(proxy.now) is None


@pytest.mark.parametrize("variant", [DeltaProxy, SotwProxy])
def test_X4_what_waits_for_its_removal_is_renewed_as_long_as_it_waits(variant: type[DeltaProxy]) -> None:
    """The route that uses it is refused, so the cluster stays."""
    mortal = resource(CDS, "a", ttl=timedelta(seconds=10))
    proxy = variant(group_of(mortal, resource(RDS, "a")))
    proxy.subscribe(RDS, "a")
    settle(proxy)
    publish(proxy, resource(RDS, "a", BAD))
    settle(proxy)
    assert proxy.has[CDS] == {"a": mortal.version}
    proxy.now += 10
    assert proxy.read()
    assert proxy.received[0][0] == CDS
    proxy.answer()
    publish(proxy, resource(RDS, "a", 2))
    settle(proxy)
    assert proxy.has[CDS] == {}
    assert proxy.stream.wake_at(proxy.now) is None


def test_X4_what_cannot_be_read_for_now_is_renewed() -> None:
    """Its source is away: who has any version keeps it."""
    mortal = resource(SDS, "a", ttl=timedelta(seconds=10))
    proxy = DeltaProxy(group_of(mortal))
    proxy.subscribe(SDS, "a")
    settle(proxy)
    publish(proxy, Resource.unknown(SDS, "a"))
    settle(proxy)
    proxy.now += 10
    assert proxy.read()
    assert [r.version for r in proxy.received[0][2].resources] == [mortal.version]
