"""Who refused what: who counts as alike, for how long, and how much of it is kept."""

import json
from collections.abc import Hashable

import pytest

from llmplane import refusals
from llmplane.refusals import COUNTS, Refusals
from translator.proxy import Proxy, ProxyType
from xds.group import Refusal
from xds.resources import CDS

NOW = 1_800_000_000.0
SLEEP = Proxy(ProxyType.SIDECAR, "default", "sleep")


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals.time, "time", lambda: NOW)


def refusal(group: Hashable = SLEEP, version: object = 1, *, ago: float = 0, **fields: str) -> Refusal:
    words = {"detail": "no such file", "node_id": "sleep-1", **fields}
    return Refusal(group, CDS, "a", str(version), since=NOW - ago, **words)


def those_of(*noted: Refusal) -> Refusals:
    made = Refusals()
    for each in noted:
        made.add(each)
    return made


def test_they_are_read_as_they_were_written() -> None:
    written = those_of(refusal(), refusal(version=2, detail="\u2028", ago=-1))
    (first, second) = Refusals.read(written.dump()).of(SLEEP)
    assert first == Refusal(SLEEP, CDS, "a", "1", "no such file", NOW, "sleep-1", archived=True)
    assert second.detail == "\u2028"


@pytest.mark.parametrize(
    ("other", "alike"),
    [
        (Proxy(ProxyType.SIDECAR, "default", "sleep", frozenset({("app", "x")}), "10.0.0.1"), True),
        (Proxy(ProxyType.SIDECAR, "default", "other"), False),
        (Proxy(ProxyType.SIDECAR, "other", "sleep"), False),
        (Proxy(ProxyType.ROUTER, "default", "sleep"), False),
        (Proxy(ProxyType.SIDECAR, "default", "sleep", version=(1, 38)), False),
        ("anything else", False),
    ],
)
def test_labels_and_addresses_change_nothing(other: Hashable, *, alike: bool) -> None:
    found = those_of(refusal()).of(other)
    assert [(each.group, each.version) for each in found] == ([(other, "1")] if alike else [])


def test_who_is_no_proxy_of_ours_is_nobody() -> None:
    assert not Refusals().is_new(refusal("anything else"))


def test_after_a_while_it_is_tried_again() -> None:
    assert those_of(refusal(ago=COUNTS - 1)).of(SLEEP)
    assert not those_of(refusal(ago=COUNTS)).of(SLEEP)
    renewed = those_of(refusal(ago=COUNTS), refusal(node_id="sleep-2"))
    assert [(each.since, each.node_id) for each in renewed.of(SLEEP)] == [(NOW, "sleep-2")]


def test_that_many_refuse_at_once_is_noted_once() -> None:
    noted = those_of(refusal(ago=100))
    assert not noted.is_new(refusal(ago=50, node_id="sleep-2"))
    assert noted.is_new(refusal(ago=30, node_id="sleep-2"))
    assert noted.is_new(refusal(version=2, ago=50))


def test_what_is_older_changes_nothing() -> None:
    """Replicas write in any order."""
    noted = those_of(refusal(), refusal(ago=30, node_id="sleep-2"))
    assert [(each.since, each.node_id) for each in noted.of(SLEEP)] == [(NOW, "sleep-1")]


def test_who_accepts_it_after_all_drops_it_for_those_that_are_alike() -> None:
    other = Proxy(ProxyType.SIDECAR, "default", "other")
    noted = those_of(refusal(), refusal(other))
    noted.drop(refusal())
    assert not noted.of(SLEEP)
    assert noted.of(other)
    noted.drop(refusal(other))
    noted.drop(refusal(other))
    assert noted.dump() == "[]"


def test_what_does_not_count_and_the_oldest_are_forgotten() -> None:
    workloads = [Proxy(ProxyType.SIDECAR, "default", f"w{number}") for number in range(300)]
    versions = those_of(*(refusal(version=number) for number in range(300)))
    assert [int(each.version) for each in versions.of(SLEEP)] == list(range(44, 300))
    of_one = those_of(*(refusal(workload, ago=300 - number) for number, workload in enumerate(workloads)))
    assert [number for number in range(300) if of_one.of(workloads[number])] == list(range(44, 300))
    old = those_of(refusal(ago=COUNTS), refusal(version=2))
    assert [record["refused"][2] for record in json.loads(old.dump())] == ["2"]


def test_no_more_is_written_than_there_is_room_for() -> None:
    noted = those_of(*(refusal(version=number) for number in range(100)))
    text = noted.dump(5000)
    assert 4000 < len(text) <= 5000
    assert [each.version for each in Refusals.read(text).of(SLEEP)][-1] == "99"
