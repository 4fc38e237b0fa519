"""A resource that breaks the API's own rules is held back, and costs no other one."""

from dataclasses import replace

import pytest

from llmplane.checking import ResourceChecker
from tests.xds.test_state_machines import DictArchive
from xds import protos
from xds.resources import CDS, Guard, Resource


def cluster(name: str, **fields: object) -> Resource:
    return Resource.of(protos.Cluster(name=name, **fields))


def test_a_violating_resource_is_held_back_and_named() -> None:
    """Envoys that have a version of it keep that: nobody knows here which."""
    good, bad = cluster("good"), cluster("bad", connect_timeout={"seconds": -1})
    served, wrong = ResourceChecker().check([good, bad], {})
    assert served == {(CDS, "good"): good, (CDS, "bad"): Resource.unknown(CDS, "bad")}
    assert list(wrong) == [(CDS, "bad")]
    assert "connect_timeout" in wrong[CDS, "bad"]


def test_it_stays_in_its_last_good_version() -> None:
    checker = ResourceChecker()
    before, _ = checker.check([cluster("a")], {})
    served, wrong = checker.check([cluster("a", connect_timeout={"seconds": -1})], before)
    assert served == before
    assert wrong


def test_after_a_restart_its_last_good_version_is_in_the_archive() -> None:
    """Also where a group is made anew, because its last proxy was away for a while."""
    archive = DictArchive()
    good, bad = cluster("a"), cluster("a", connect_timeout={"seconds": -1})
    ResourceChecker(archive).check([bad], {(CDS, "a"): good})
    assert dict(archive) == {(CDS, "a", bad.version): good}
    for before in ({}, {(CDS, "a"): Resource.unknown(CDS, "a")}):
        guarded = replace(bad, guard=Guard(open="", closed=lambda: cluster("a", alt_stat_name="closed")))
        served, wrong = ResourceChecker(archive).check([guarded], before)
        assert served == {(CDS, "a"): good}
        assert served[CDS, "a"].guard, "Envoys may refuse it, too"
        assert wrong
    other = cluster("a", connect_timeout={"seconds": -2})
    served, _ = ResourceChecker(archive).check([other], {(CDS, "a"): Resource.unknown(CDS, "a")})
    assert served == {(CDS, "a"): Resource.unknown(CDS, "a")}
    assert (CDS, "a", other.version) not in archive, "what is not known is not kept"


@pytest.mark.parametrize("before", ["nothing", "open", "other"])
def test_one_that_restricts_never_opens(before: str) -> None:
    """Where nothing was restricted before, nothing is let through; otherwise the last good version stays."""
    closed, opened, other = (cluster("a", alt_stat_name=name) for name in ("closed", "open", "other"))
    guard = Guard(open=opened.version, closed=lambda: closed)
    bad = Resource.of(protos.Cluster(name="a", connect_timeout={"seconds": -1}), guard=guard)
    known = {"nothing": {}, "open": {(CDS, "a"): opened}, "other": {(CDS, "a"): other}}
    served, wrong = ResourceChecker().check([bad], known[before])
    held = replace(closed, held=True)  # who has another version that is not open keeps it
    assert served == {(CDS, "a"): {"nothing": held, "open": closed, "other": other}[before]}
    assert wrong


def test_the_check_can_be_switched_off() -> None:
    bad = cluster("bad", connect_timeout={"seconds": -1})
    assert ResourceChecker(enabled=False).check([bad], {}) == ({(CDS, "bad"): bad}, {})
