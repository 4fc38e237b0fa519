"""A resource that breaks the API's own rules is held back, and costs no other one."""

from llmplane.checking import ResourceChecker
from xds import protos
from xds.resources import CDS, Resource


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


def test_the_check_can_be_switched_off() -> None:
    bad = cluster("bad", connect_timeout={"seconds": -1})
    assert ResourceChecker(enabled=False).check([bad], {}) == ({(CDS, "bad"): bad}, {})
