"""What was refused before, or elsewhere: an archive says so, and who comes later is not sent it."""

from dataclasses import replace
from itertools import count
from unittest.mock import patch

import pytest

from tests.xds import test_state_machines
from tests.xds.client import resource
from tests.xds.test_state_machines import (
    BAD,
    DeltaProxy,
    DictArchive,
    SotwProxy,
    group_of,
    has,
    publish,
    settle,
    versions_of,
)
from xds import protos
from xds.delta import DeltaSubscription
from xds.group import Group, Recent, Refusal
from xds.resources import CDS, ECDS, LDS, Guard, Resource
from xds.snapshot import Snapshot
from xds.sotw import SotwSubscription
from xds.stream import Stream

GOOD, REFUSED, OTHER = resource(CDS, "a"), resource(CDS, "a", BAD), resource(CDS, "b")
OTHER_2 = resource(CDS, "b", 2)
VARIANTS = pytest.mark.parametrize("variant", [DeltaProxy, SotwProxy])


def make_group(archive: DictArchive, *published: Resource, key: str = "group") -> Group:
    snapshot = Snapshot(published)
    return Group(key, snapshot, identifier="test", numbers=count(1), recent=Recent(), archive=archive)


def archive_with_a_refusal() -> DictArchive:
    """Return one in which REFUSED is, which another group refused instead of GOOD."""
    archive = DictArchive()
    proxy = DeltaProxy(make_group(archive, GOOD, OTHER, key="other"))
    settle(proxy)
    publish(proxy, REFUSED, OTHER)
    settle(proxy)
    assert dict(archive) == {(CDS, "a", REFUSED.version): GOOD}
    return archive


def was_refused(proxy: DeltaProxy) -> bool:
    return any(subscription.last_error for subscription in proxy.stream.subscriptions.values())


@VARIANTS
def test_a_newcomer_is_not_sent_what_others_refused(variant: type[DeltaProxy]) -> None:
    group = make_group(archive_with_a_refusal(), REFUSED, OTHER)
    assert [(each.group, each.version, each.detail) for each in group.refusals.values()] == [
        ("group", REFUSED.version, "bad")
    ], "known before anybody came"
    proxy = variant(group)
    settle(proxy)
    assert not was_refused(proxy)
    assert has(proxy) == versions_of(GOOD, OTHER)
    publish(proxy, resource(CDS, "a", 3), OTHER)
    settle(proxy)
    assert has(proxy) == versions_of(resource(CDS, "a", 3), OTHER)
    assert not group.refusals


@VARIANTS
def test_who_refused_it_is_not_sent_it_again_after_a_restart(variant: type[DeltaProxy]) -> None:
    proxy = variant(make_group(archive_with_a_refusal(), REFUSED, OTHER_2))
    proxy.has[CDS] = {each.name: each.version for each in (GOOD, OTHER)}
    proxy.connect()
    settle(proxy)
    assert not was_refused(proxy)
    assert has(proxy) == versions_of(GOOD, OTHER_2)


def test_what_others_refused_is_known_with_the_next_change_and_when_the_archive_has_more() -> None:
    for look in (Group.look_again, lambda group: group.publish(Snapshot([REFUSED, OTHER]))):
        archive = DictArchive()
        group = make_group(archive, REFUSED, OTHER)
        assert not group.refusals
        later = archive_with_a_refusal()
        archive.update(later)
        archive.refused.update(later.refused)
        look(group)
        proxy = DeltaProxy(group)
        settle(proxy)
        assert not was_refused(proxy)
        assert has(proxy) == versions_of(GOOD, OTHER)


def test_nothing_good_is_known_of_what_others_refused() -> None:
    archive = DictArchive()
    settle(DeltaProxy(make_group(archive, REFUSED, OTHER, key="other")))
    assert not archive
    newcomer = DeltaProxy(make_group(archive, REFUSED, OTHER))
    settle(newcomer)
    assert not was_refused(newcomer)
    assert has(newcomer) == versions_of(OTHER)


def test_what_is_forgotten_is_tried_again_with_the_next_change_and_not_before() -> None:
    archive = archive_with_a_refusal()
    group = make_group(archive, REFUSED, OTHER)
    archive.refused.clear()
    group.look_again()
    assert group.refusals
    group.publish(Snapshot([REFUSED, OTHER]))
    assert not group.refusals
    proxy = DeltaProxy(group)
    settle(proxy)
    assert was_refused(proxy)
    assert archive.refused, "and is known again"


def test_what_is_accepted_after_all_or_goes_away_is_forgotten() -> None:
    archive = archive_with_a_refusal()
    proxy = DeltaProxy(make_group(archive, REFUSED, OTHER))
    publish(proxy, OTHER)
    assert not archive.refused
    publish(proxy, REFUSED, OTHER)
    assert not proxy.group.refusals, "perhaps it is good now"

    archive = DictArchive()
    group = make_group(archive, REFUSED)
    one, two = DeltaProxy(group), DeltaProxy(group)
    while one.read() or two.read():
        pass
    one.answer()
    assert group.refusals
    assert archive.refused
    with patch.object(test_state_machines, "BAD_VERSIONS", set()):
        two.answer()
    assert not group.refusals
    assert not archive.refused


def test_what_a_proxy_comes_with_was_accepted() -> None:
    archive = archive_with_a_refusal()
    proxy = DeltaProxy(make_group(archive, REFUSED, OTHER))
    proxy.has[CDS] = {"a": REFUSED.version}
    proxy.connect()
    assert not proxy.group.refusals
    assert not archive.refused


def test_what_was_accepted_here_is_not_held_back_because_others_refuse_it() -> None:
    archive = archive_with_a_refusal()
    refused, archive.refused = archive.refused, {}
    proxy = DeltaProxy(make_group(archive, REFUSED))
    with patch.object(test_state_machines, "BAD_VERSIONS", set()):
        settle(proxy)
    archive.refused = refused
    publish(proxy, REFUSED, OTHER)
    assert not proxy.group.refusals
    settle(proxy)
    assert has(proxy) == versions_of(REFUSED, OTHER)


def test_a_proxy_that_refuses_what_others_came_with_is_alone() -> None:
    """A server that was started since knows it from those who report having it."""
    group = group_of(REFUSED)
    owner, misfit = DeltaProxy(group), DeltaProxy(group)
    owner.has[CDS] = {"a": REFUSED.version}
    owner.connect()
    settle(misfit)
    assert was_refused(misfit)
    assert not group.refusals


def test_the_first_good_version_may_be_accepted_after_the_refusal() -> None:
    """Answers come late: it stands in from then on, also for newcomers, and is in the archive."""
    archive = DictArchive()
    group = make_group(archive, GOOD)
    proxy = DeltaProxy(group)
    proxy.read()
    publish(proxy, REFUSED)
    proxy.read()
    late = proxy.received.pop(0)
    proxy.answer()
    assert group.refusals
    proxy.received.append(late)
    proxy.answer()
    newcomer = DeltaProxy(group)
    settle(newcomer)
    assert has(newcomer) == versions_of(GOOD)
    assert dict(archive) == {(CDS, "a", REFUSED.version): GOOD}


def policy(text: str) -> Resource:
    """Make a policy that Envoys refuse; closed is one named so, open another."""
    opened, closed = (
        Resource.of(protos.TypedExtensionConfig(name="p", typed_config=protos.pack(protos.Node(id=of))))
        for of in ("open", "closed")
    )
    made = protos.TypedExtensionConfig(name="p", typed_config=protos.pack(protos.Node(id=text)))
    return Resource.of(made, guard=Guard(opened.version, lambda: closed))


@pytest.mark.parametrize(
    ("has", "sent"), [("nothing", "closed"), ("open", "closed"), ("closed", None), ("other", None)]
)
def test_of_a_refused_policy_any_version_stays_that_is_not_open(has: str, sent: str | None) -> None:
    """After a restart, where nothing good is known."""
    group = make_group(DictArchive(), policy("bad"))
    group.refuse(Refusal("group", ECDS, "p", policy("bad").version, "", 0, ""), None)
    subscription = (stream := Stream(group, "proxy", DeltaSubscription)).subscription(ECDS)
    versions = {} if has == "nothing" else {"p": policy(has).version}
    subscription.request(subscribe=["p"], initial_versions=versions)
    response = stream.next_response(0)
    assert (response and response.changes["p"]) == (sent and replace(policy(sent), held=True))


def test_one_that_is_open_itself_closes_nothing() -> None:
    """Whoever removed the policies wants no other ones instead."""
    opened = policy("open")
    assert opened.stand_in(None) is None
    assert opened.stand_in(policy("other")) == policy("other")


def test_a_client_that_cannot_tell_whether_its_policy_is_open_gets_the_closed_one() -> None:
    """In state of the world it says one version for all."""
    group = make_group(DictArchive(), policy("bad"))
    group.refuse(Refusal("group", ECDS, "p", policy("bad").version, "", 0, ""), None)
    stream = Stream(group, "proxy", SotwSubscription)
    stream.subscription(ECDS).request(names=["p"], version="1")
    response = stream.next_response(0)
    assert response is not None
    assert response.changes == {"p": replace(policy("closed"), held=True)}


def test_what_is_held_is_not_taken_for_good_because_a_proxy_comes_with_it() -> None:
    closed = resource(LDS, "a", 7, held=True)
    archive = DictArchive()
    proxy = DeltaProxy(make_group(archive, closed))
    proxy.has[LDS] = {"a": closed.version}
    proxy.connect()
    publish(proxy, resource(LDS, "a", BAD))
    settle(proxy)
    assert proxy.group.refusals
    assert not archive
