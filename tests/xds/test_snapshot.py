"""Resources and snapshots: what makes two equal, and what a change costs."""

import subprocess
import sys
from weakref import ref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.xds.client import ALL_TYPES, eds_cluster, resource
from xds import protos
from xds.names import NONE, Names
from xds.resources import CDS, EDS, RDS, SDS, Resource, encode_varint
from xds.snapshot import EMPTY, ResourceSet, Snapshot

contents = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 3))


@pytest.mark.parametrize("type_url", ALL_TYPES)
@pytest.mark.parametrize("size", [1, 100, 20_000])
def test_both_frames_decode_to_the_resource(type_url: str, size: int) -> None:
    made = resource(type_url, "n" * size)
    delta = protos.DeltaDiscoveryResponse.FromString(made.delta_frame).resources
    sotw = protos.DiscoveryResponse.FromString(bytes(made.sotw_frame)).resources
    assert [(r.name, r.version, r.resource.SerializeToString()) for r in delta] == [
        (made.name, made.version, made.body)
    ]
    assert [body.SerializeToString() for body in sotw] == [made.body]
    assert sotw[0].type_url == type_url


@given(value=st.integers(0, 2**63))
def test_varint_is_that_of_protobuf(value: int) -> None:
    assert protos.UInt64Value(value=value).SerializeToString()[1:] == (encode_varint(value) if value else b"")


def test_version_is_that_of_the_content_in_any_process() -> None:
    """Python's own hashes differ from process to process; these must not."""
    program = "from tests.xds.client import *; print(Snapshot(resources(CDS, {'a': 1, 'b': 2}))[CDS].version)"
    versions = {
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout
        for _ in range(2)
    }
    assert versions == {f"{Snapshot([resource(CDS, 'b', 2), resource(CDS, 'a', 1)])[CDS].version}\n".encode()}


def test_key_of_a_secret_is_not_shown() -> None:
    secret = resource(SDS, "a", 1234)
    assert "1234" not in repr(secret) + repr(Snapshot([secret])) + repr(Snapshot([secret])[SDS])


def test_endpoints_of_a_cluster_are_known_by_name() -> None:
    other = protos.Cluster(name="a", type="EDS", eds_cluster_config={"service_name": "b"})
    assert [eds_cluster("a").endpoints, Resource.of(other).endpoints, resource(CDS, "a").endpoints] == [
        "a",
        "b",
        "",
    ]


def test_name_can_differ_from_that_of_the_message() -> None:
    made = Resource.of(protos.RouteConfiguration(name="a"), "b")
    assert (made.type_url, made.name) == (RDS, "b")


@given(before=contents, after=contents)
def test_replaced_set_is_the_set_made_anew(before: dict[str, int], after: dict[str, int]) -> None:
    old = ResourceSet({name: resource(CDS, name, content) for name, content in before.items()})
    anew = ResourceSet({name: resource(CDS, name, content) for name, content in after.items()})
    assert old.version != anew.version or before == after
    replaced = old.replace({name: anew.get(name) for name in before.keys() | after.keys()})
    assert replaced.version == anew.version
    assert replaced.changed(anew) == frozenset()
    assert (
        replaced.changed(old) == anew.changed(old) == {n for n in "abcdef" if before.get(n) != after.get(n)}
    )
    assert (replaced is old) == (before == after)


@given(before=contents, after=contents, asked=st.frozensets(st.sampled_from("abcdefg")))
def test_part_is_what_is_asked_for_and_the_same_for_all_who_ask(
    before: dict[str, int], after: dict[str, int], asked: frozenset[str]
) -> None:
    old = ResourceSet({name: resource(CDS, name, content) for name, content in before.items()})
    new = old.replace(
        {name: resource(CDS, name, after[name]) if name in after else None for name in "abcdef"}
    )
    parts = [old.part(Names(asked), EMPTY), new.part(Names(asked), EMPTY)]
    for part, whole in zip(parts, (before, after), strict=True):
        assert {name: part[name] for name in part} == {
            name: resource(CDS, name, whole[name]) for name in asked & whole.keys()
        }
    assert parts[1].changed(parts[0]) == new.changed(old) & asked
    assert new.part(Names(asked), EMPTY) is parts[1]
    assert (parts[0] is parts[1]) == (parts[1].changed(parts[0]) == frozenset())


ASKED = st.frozensets(
    st.sampled_from(["a", "b", "none", "xdstp://x/t/a", "xdstp://x/t/none", "xdstp://x/t/*"])
)


@given(before=ASKED, asked=ASKED)
def test_part_is_the_same_whatever_was_asked_for_before(
    before: frozenset[str], asked: frozenset[str]
) -> None:
    names = ("a", "b", "xdstp://x/t/a", "xdstp://x/t/b")
    whole, same = (ResourceSet({name: resource(CDS, name) for name in names}) for _ in range(2))
    near = whole.part(Names(before), EMPTY)
    changed = NONE.but(before, frozenset()).but(asked - before, before - asked)
    assert (changed, changed.globs) == (Names(asked), Names(asked).globs)
    part = whole.part(changed, near)
    assert part is whole.part(Names(asked), EMPTY)
    assert part.changed(same.part(Names(asked), EMPTY)) == frozenset()
    assert part.changed(near) == near.changed(part) == part.keys() ^ near.keys()


def test_part_has_the_members_of_collections() -> None:
    whole = Snapshot([resource(CDS, "a"), resource(CDS, "xdstp://x/t/a"), resource(CDS, "xdstp://x/u/a")])[
        CDS
    ]
    assert set(whole.part(Names(["a", "xdstp://x/t/*"]), EMPTY)) == {"a", "xdstp://x/t/a"}
    assert whole.part(Names(["xdstp://y/t/*"]), EMPTY) is EMPTY


def test_snapshot_shares_what_did_not_change() -> None:
    old = Snapshot([resource(CDS, "a"), resource(CDS, "b"), resource(EDS, "a")])
    new = old.replace([resource(CDS, "a", 2)], removals=[(CDS, "b"), (EDS, "ghost")])
    assert new[EDS] is old[EDS]
    assert new.diff(old) == {CDS: {"a", "b"}}
    assert old.diff(old) == {}
    assert list(new.replace(removals=[(CDS, "a")])) == [EDS]
    assert new[RDS] is EMPTY


def test_two_resources_with_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="two different resources"):
        Snapshot([resource(CDS, "a", 1), resource(CDS, "a", 2)])


def test_held_resources_are_known_and_differ_from_known_ones() -> None:
    known, held = resource(SDS, "a"), resource(SDS, "a", held=True)
    resources = Snapshot([held])[SDS]
    assert resources.held == {"a"}
    assert resources.replace({"a": known}).held == frozenset()
    assert Snapshot([known])[SDS].changed(resources) == {"a"}
    assert Resource.unknown(SDS, "a").body == b""


def test_names_of_which_there_is_nothing_are_not_kept() -> None:
    """Clients may ask for any, and `EMPTY` lives as long as the process."""
    full = Snapshot([resource(CDS, "a")])[CDS]
    for resources in (full, EMPTY):
        names = Names(["made up"])
        known = ref(names)
        assert resources.part(names, EMPTY) is EMPTY
        del names
        assert known() is None


def test_that_a_resource_is_held_is_part_of_the_version() -> None:
    """It is served in another way: two replicas of which only one knows it do not agree."""
    plain, held = (Snapshot([resource(CDS, "a", held=held)]) for held in (False, True))
    assert plain[CDS].version != held[CDS].version
