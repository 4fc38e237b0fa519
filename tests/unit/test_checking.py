"""A resource that breaks the API's own rules is held back, and costs no other one."""

import pytest

from llmplane.checking import ResourceChecker
from xds import protos
from xds.resources import CDS, Guard, Resource


def cluster(name: str, **fields: object) -> Resource:
    return Resource.of(protos.Cluster(name=name, **fields))


def test_a_violating_resource_is_left_out_and_named() -> None:
    good, bad = cluster("good"), cluster("bad", connect_timeout={"seconds": -1})
    served, wrong = ResourceChecker().check([good, bad], {})
    assert served == {(CDS, "good"): good}
    assert list(wrong) == [(CDS, "bad")]
    assert "connect_timeout" in wrong[CDS, "bad"]


def test_it_stays_in_its_last_good_version() -> None:
    checker = ResourceChecker()
    before, _ = checker.check([cluster("a")], {})
    served, wrong = checker.check([cluster("a", connect_timeout={"seconds": -1})], before)
    assert served == before
    assert wrong


@pytest.mark.parametrize("before", ["nothing", "open", "other"])
def test_one_that_restricts_never_opens(before: str) -> None:
    """Where nothing was restricted before, nothing is let through; otherwise the last good version stays."""
    closed, opened, other = (cluster("a", alt_stat_name=name) for name in ("closed", "open", "other"))
    guard = Guard(open=opened.version, closed=lambda: closed)
    bad = Resource.of(protos.Cluster(name="a", connect_timeout={"seconds": -1}), guard=guard)
    known = {"nothing": {}, "open": {(CDS, "a"): opened}, "other": {(CDS, "a"): other}}
    served, wrong = ResourceChecker().check([bad], known[before])
    assert served == {(CDS, "a"): other if before == "other" else closed}
    assert wrong


def test_the_check_can_be_switched_off() -> None:
    bad = cluster("bad", connect_timeout={"seconds": -1})
    assert ResourceChecker(enabled=False).check([bad], {}) == ({(CDS, "bad"): bad}, {})
