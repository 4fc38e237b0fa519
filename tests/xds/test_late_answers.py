"""Answers that come late, or one for several responses: none is mistaken for that of another response."""

from datetime import timedelta
from typing import Any

import pytest

from tests.xds.client import resource
from tests.xds.test_state_machines import (
    BAD,
    DeltaProxy,
    SotwProxy,
    answer_all,
    group_of,
    has,
    publish,
    read_all,
    settle,
    versions_of,
)
from xds.resources import CDS, EDS, LDS, RDS
from xds.snapshot import Snapshot
from xds.sotw import SotwSubscription
from xds.status import State, state_of
from xds.stream import PATIENCE, Stream
from xds.subscription import MAX_PENDING

MANY = MAX_PENDING + 10

variants = pytest.mark.parametrize("variant", [DeltaProxy, SotwProxy])


@variants
def test_a_late_nack_counts_however_many_responses_came_after_it(variant: type[DeltaProxy]) -> None:
    """Envoy is stopped for a while: one bad change, many good ones, and all the answers at once."""
    bad, good = resource(CDS, "a", BAD), resource(CDS, "a")
    proxy = variant(group_of(good, resource(CDS, "b")))
    settle(proxy)
    for content in range(2, MANY):
        publish(proxy, bad, resource(CDS, "b", content))
        read_all(proxy)
    settle(proxy)
    assert has(proxy) == versions_of(good, resource(CDS, "b", MANY - 1))
    assert [refusal.name for refusal in proxy.group.refusals.values()] == ["a"]
    assert state_of(proxy.stream.subscription(CDS), proxy.group) is State.NACK
    newcomer = variant(proxy.group)
    settle(newcomer)
    assert has(newcomer) == has(proxy)


@variants
def test_what_changes_while_very_much_is_unanswered_follows_in_one_response(
    variant: type[DeltaProxy],
) -> None:
    proxy = variant(group_of())
    published = []
    for number in range(MANY):
        published.append(resource(CDS, f"c{number}"))
        publish(proxy, *published)
        read_all(proxy)
    subscription = proxy.stream.subscription(CDS)
    assert len(subscription.pending) == MAX_PENDING
    assert state_of(subscription, proxy.group) is State.STALE
    answer_all(proxy)
    assert proxy.read()
    assert not proxy.stream.next_response(proxy.now)
    answer_all(proxy)
    assert has(proxy) == versions_of(*published)
    publish(proxy, *published[5:])
    settle(proxy)
    assert has(proxy) == versions_of(*published[5:])


@variants
def test_clusters_that_are_never_answered_do_not_stop_routes(variant: type[DeltaProxy]) -> None:
    """They wait, for there may be a new cluster among what could not be sent."""
    proxy = variant(group_of(resource(CDS, "c"), resource(RDS, "r")))
    proxy.subscribe(RDS, "r")
    settle(proxy)
    for content in range(2, MANY):
        publish(proxy, resource(CDS, "c", content), resource(RDS, "r"))
        read_all(proxy)
    proxy.received.clear()
    for content in (2, 3):
        publish(proxy, resource(CDS, "c", MANY), resource(RDS, "r", content))
        assert read_all(proxy) == []
        assert proxy.stream.wake_at(proxy.now) == proxy.now + PATIENCE
        proxy.now += PATIENCE
        assert read_all(proxy) == [(RDS, ["r"], [])]
        proxy.answer()


@pytest.mark.parametrize("type_url", [CDS, EDS])
def test_nothing_is_renewed_while_very_much_is_unanswered(type_url: str) -> None:
    """In state of the world, a renewal is a response as any other, and has to be remembered."""
    proxy = SotwProxy(group_of())
    if type_url == EDS:
        proxy.subscribe(EDS, "a")
    for content in range(1, MANY):
        publish(proxy, resource(type_url, "a", content, ttl=timedelta(seconds=PATIENCE)))
        read_all(proxy)
    for _ in range(MANY):
        proxy.now += PATIENCE
        read_all(proxy)
    assert len(proxy.stream.subscription(type_url).pending) == MAX_PENDING


@pytest.mark.parametrize(("type_url", "names"), [(CDS, []), (RDS, ["a", "b", "c"])])
def test_nack_of_the_latest_response_settles_those_before_it(type_url: str, names: list[str]) -> None:
    """An Envoy that was busy answers only the latest, and says which version it took last."""
    before = [resource(type_url, name) for name in "abc"]
    stream = Stream(group_of(*before), "proxy", SotwSubscription)
    subscription = stream.subscription(type_url)
    subscription.request(names=names)
    first = stream.next_response(0)
    assert first is not None
    subscription.request(names=names, version=first.version, nonce=first.nonce)
    good, bad = [resource(type_url, name, 2) for name in "ab"], resource(type_url, "c", BAD)
    responses: list[Any] = []
    for published in ([good[0], *before[1:]], [*good, bad]):
        stream.group.publish(Snapshot(published))
        responses.append(stream.next_response(0))
    version = responses[0].version
    subscription.request(names=names, version=version, nonce=responses[1].nonce, error="c is bad")
    for _ in range(10):
        response = stream.next_response(0)
        if response is None:
            break
        assert names or "a" not in response.changes, "it has this already"
        error = "c is bad" if bad in response.changes.values() else None
        version = version if error else response.version
        subscription.request(names=names, version=version, nonce=response.nonce, error=error)
    assert list(subscription.refused) == ["c"]
    assert {subscription.held.get(name) for name in subscription.held} == {*good, before[2]}
    assert not subscription.pending


def test_what_a_lone_refuser_has_stays_in_its_full_set() -> None:
    """Another proxy accepted the version, so it is in no quarantine; who refuses it keeps its own."""
    group = group_of(resource(CDS, "a"))
    content, odd = DeltaProxy(group), SotwProxy(group)
    for proxy in (content, odd):
        settle(proxy)
    group.publish(Snapshot([resource(CDS, "a", 2), resource(CDS, "b")]))
    settle(content)
    names = {"names": [], "error": "a is not for me"}
    for _ in range(10):
        if not odd.read():
            break
        _, response, _ = odd.received.pop()
        error = names["error"] if resource(CDS, "a", 2) in response.changes.values() else None
        odd.stream.subscription(CDS).request(nonce=response.nonce, error=error)
    assert not group.refusals
    held = odd.stream.subscription(CDS).held
    assert {held.get(name) for name in held} == {resource(CDS, "a"), resource(CDS, "b")}


def test_removal_that_was_refused_with_a_bad_member_is_not_forgotten() -> None:
    proxy = DeltaProxy(group_of(resource(LDS, "a")))
    settle(proxy)
    publish(proxy, resource(LDS, "b", BAD))
    settle(proxy)
    assert has(proxy) == {}
    publish(proxy, resource(LDS, "b"))
    settle(proxy)
    assert has(proxy) == versions_of(resource(LDS, "b"))
