"""What waits for what on one stream: the cases that only a certain order of events has."""

import pytest

from tests.xds.client import resource
from tests.xds.test_state_machines import (
    DeltaProxy,
    answer_all,
    group_of,
    has,
    proxy_of_an_earlier_life,
    publish,
    read_all,
    settle,
    versions_of,
)
from xds import delta as delta_module
from xds.delta import DeltaSubscription
from xds.resources import CDS, EDS, LDS, RDS
from xds.snapshot import Snapshot
from xds.status import State, state_of
from xds.stream import PATIENCE, Stream

A, B, IN, IN2 = resource(CDS, "a"), resource(CDS, "b"), resource(LDS, "in"), resource(LDS, "in", 2)


@pytest.fixture
def proxy() -> DeltaProxy:
    proxy = DeltaProxy(group_of(A, B, IN))
    settle(proxy)
    return proxy


def test_removal_waits_for_no_type_in_which_nothing_changed(proxy: DeltaProxy) -> None:
    """Listeners get to the newest point without a response, after the clusters were looked at."""
    publish(proxy, A, IN)
    assert read_all(proxy) == [(CDS, [], ["b"])]


def test_what_waits_for_its_removal_is_looked_at_again_and_not_synchronised(proxy: DeltaProxy) -> None:
    start = proxy.now
    publish(proxy, A, IN2)
    assert read_all(proxy) == [(LDS, ["in"], [])]
    assert proxy.stream.wake_at(start) == start + 2 * PATIENCE
    clusters = proxy.stream.subscription(CDS)
    assert not clusters.pending
    assert state_of(clusters, proxy.group) is State.STALE
    answer_all(proxy)
    assert read_all(proxy) == [(CDS, [], ["b"])]
    answer_all(proxy)
    assert state_of(clusters, proxy.group) is State.SYNCED


def test_endpoints_stay_as_long_as_the_removal_of_their_cluster_waits() -> None:
    proxy = DeltaProxy(group_of(A, resource(EDS, "a"), IN))
    proxy.subscribe(EDS, "a")
    settle(proxy)
    publish(proxy, IN2)
    assert read_all(proxy) == [(LDS, ["in"], [])]
    answer_all(proxy)
    assert read_all(proxy) == [(CDS, [], ["a"])]
    answer_all(proxy)
    assert read_all(proxy) == [(EDS, [], ["a"])]


def test_routes_of_an_earlier_stream_are_in_use() -> None:
    """They are changed after the new clusters, as those that this stream brought."""
    group = group_of(A, B, resource(RDS, "r", 2))
    proxy = proxy_of_an_earlier_life(group, A, resource(RDS, "r"))
    assert read_all(proxy) == [(CDS, ["b"], []), (LDS, [], [])]
    answer_all(proxy)
    assert read_all(proxy) == [(RDS, ["r"], [])]


def test_step_that_is_the_same_for_all_removes_nothing_of_an_incomplete_snapshot(proxy: DeltaProxy) -> None:
    """Nor listeners, which else are removed at once."""
    proxy.group.publish(Snapshot([resource(CDS, "a", 2)], incomplete=True))
    settle(proxy)
    assert has(proxy) == versions_of(resource(CDS, "a", 2), B, IN)


def test_first_pieces_of_what_is_new_do_not_make_the_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that has only some listeners yet uses none of them."""
    monkeypatch.setattr(delta_module, "PIECE", 1)
    listeners = [resource(LDS, name) for name in "abc"]
    stream = Stream(group_of(A, *listeners), "proxy", DeltaSubscription)
    stream.subscription(CDS).request()
    clusters = stream.next_response(0)
    assert clusters is not None
    stream.subscription(LDS).request()
    sent = []
    while response := stream.next_response(0):
        sent += response.changes.values()
        stream.subscription(LDS).request(nonce=response.nonce)
    assert sent == listeners, "and the clusters are not answered"
