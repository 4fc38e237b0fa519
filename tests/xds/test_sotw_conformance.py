"""The rules of the state-of-the-world variant, each against the running server over raw gRPC.

The numbers are those of the project's list of checks; `P` is Envoy's docs/root/api-docs/xds_protocol.rst.
"""
# ruff: noqa: N802 - the numbers in the names are those of the list of checks

from datetime import timedelta
from typing import Final

import grpc
import pytest

from tests.xds.client import (
    ALL_TYPES,
    FULL_TYPES,
    NAMED_TYPES,
    World,
    eds_cluster,
    resource,
)
from xds.resources import CDS, ECDS, EDS, LDS, RDS, SDS, SRDS, Resource, encode_field
from xds.server import WRAPS

TTL: Final = timedelta(seconds=0.1)
FOO: Final = "xdstp://authority/type/foo/"
BAR: Final = "xdstp://authority/type/bar/"

all_types = pytest.mark.parametrize("type_url", ALL_TYPES)
full_types = pytest.mark.parametrize("type_url", FULL_TYPES)
named_types = pytest.mark.parametrize("type_url", NAMED_TYPES)


@full_types
@pytest.mark.parametrize("names", [[], ["*"]])
async def test_S01_S06_wildcard_gets_everything(world: World, type_url: str, names: list[str]) -> None:
    """Naming nothing in the first request, or `*`, subscribes to all (P "How the client specifies")."""
    world.set(type_url, {"a": 1, "b": 1})
    async with world.sotw() as proxy:
        await proxy.request(type_url, names)
        await proxy.expect(type_url, {"a": 1, "b": 1})


@all_types
async def test_S02_ack_is_silent(world: World, type_url: str) -> None:
    world.set(type_url, {"a": 1})
    async with world.sotw() as proxy:
        await proxy.subscribe(type_url, ["a"], {"a": 1})
        await proxy.expect_nothing()


@full_types
async def test_S03_every_response_is_the_full_set(world: World, type_url: str) -> None:
    """And what is absent is removed (P "Grouping Resources Into Responses", "Deleting Resources")."""
    world.set(type_url, {"a": 1, "b": 1})
    async with world.sotw() as proxy:
        await proxy.subscribe(type_url, [], {"a": 1, "b": 1})
        world.set(type_url, {"a": 2, "b": 1})
        await proxy.ack(await proxy.expect(type_url, {"a": 2, "b": 1}))
        world.set(type_url, {"b": 1})
        await proxy.ack(await proxy.expect(type_url, {"b": 1}))
        world.set(type_url, {})
        await proxy.expect(type_url, {})


@all_types
async def test_S04_nack_is_not_answered_until_something_changes(world: World, type_url: str) -> None:
    """A NACK is a request with error_detail; go-control-plane answers it at once, for ever (#962)."""
    world.set(type_url, {"a": 1})
    async with world.sotw() as proxy:
        await proxy.request(type_url, ["a"])
        await proxy.nack(await proxy.expect(type_url, {"a": 1}))
        await proxy.expect_nothing()
        world.set(type_url, {"a": 2})
        await proxy.expect(type_url, {"a": 2})


@all_types
async def test_S04_only_error_detail_makes_a_nack(world: World, type_url: str) -> None:
    """P "ACK and NACK semantics": the version in a request is what the client has, no verdict."""
    world.set(type_url, {"a": 1})
    async with world.sotw() as proxy:
        await proxy.request(type_url, ["a"])
        answer = await proxy.expect(type_url, {"a": 1})
        await proxy.request(type_url, ["a"], version="", nonce=answer.nonce)
        await proxy.expect_nothing()
        assert world.server.refusals() == []
        world.set(type_url, {"a": 2})
        answer = await proxy.expect(type_url, {"a": 2})
        await proxy.request(type_url, ["a"], version=answer.version, nonce=answer.nonce, error="invalid")
        await proxy.expect_nothing()
        assert [refusal.name for refusal in world.server.refusals()] == ["a"]


@full_types
async def test_S04_good_members_of_a_refused_set_are_delivered(world: World, type_url: str) -> None:
    """Halves of what is new are tried, on top of what the client accepted; the culprit stays as it was."""
    world.set(type_url, {"bad": 1, "good": 1, "same": 1})
    async with world.sotw() as proxy:
        await proxy.subscribe(type_url, [], {"bad": 1, "good": 1, "same": 1})
        world.set(type_url, {"bad": 2, "good": 2, "same": 1})
        await proxy.nack(await proxy.expect(type_url, {"bad": 2, "good": 2, "same": 1}))
        await proxy.nack(await proxy.expect(type_url, {"bad": 2, "good": 1, "same": 1}))
        await proxy.ack(await proxy.expect(type_url, {"bad": 1, "good": 2, "same": 1}))
        await proxy.expect_nothing()
        async with world.sotw("newcomer") as newcomer:
            await newcomer.subscribe(type_url, [], {"bad": 1, "good": 2, "same": 1})
        world.set(type_url, {"bad": 3, "good": 2, "same": 1})
        await proxy.expect(type_url, {"bad": 3, "good": 2, "same": 1})


@named_types
async def test_S04_good_members_of_a_refused_part_are_delivered(world: World, type_url: str) -> None:
    world.set(type_url, {"bad": 1, "good": 1})
    async with world.sotw() as proxy:
        await proxy.request(type_url, ["bad", "good"])
        await proxy.nack(await proxy.expect(type_url, {"bad": 1, "good": 1}))
        await proxy.nack(await proxy.expect(type_url, {"bad": 1}))
        await proxy.ack(await proxy.expect(type_url, {"good": 1}))
        await proxy.expect_nothing()


async def test_S04_a_refused_set_of_unknown_origin_is_not_tried_in_parts(world: World) -> None:
    """A client of an earlier stream has resources that a trial could remove."""
    world.set(CDS, {"a": 1, "b": 1})
    async with world.sotw() as proxy:
        await proxy.request(CDS, version="from an earlier stream")
        await proxy.nack(await proxy.expect(CDS, {"a": 1, "b": 1}))
        await proxy.expect_nothing()
        world.set(CDS, {"a": 2, "b": 1})
        await proxy.ack(await proxy.expect(CDS, {"a": 2, "b": 1}))


@all_types
async def test_S05_stale_nonce_is_ignored(world: World, type_url: str) -> None:
    """P "Resource Updates": a later request, with the newest nonce, will say what the client wants."""
    world.set(type_url, {"a": 1, "b": 1})
    async with world.sotw() as proxy:
        first = await proxy.subscribe(type_url, ["a"], {"a": 1})
        world.set(type_url, {"a": 2, "b": 1})
        second = await proxy.expect(type_url, {"a": 2})
        await proxy.request(type_url, ["a", "b"], nonce=first.nonce)
        await proxy.request(type_url, ["a", "b"], nonce="of no response")
        await proxy.expect_nothing()
        await proxy.request(type_url, ["a", "b"], nonce=second.nonce, version=second.version)
        await proxy.expect(type_url, {"a": 2, "b": 1} if type_url in FULL_TYPES else {"b": 1})


@full_types
async def test_S07_named_subset_is_served(world: World, type_url: str) -> None:
    """Clients of gRPC name clusters and listeners; go-control-plane never answers them in its ADS mode."""
    world.set(type_url, {"a": 1, "b": 1, "c": 1})
    async with world.sotw() as proxy:
        await proxy.subscribe(type_url, ["a", "b", "ghost"], {"a": 1, "b": 1})
        world.set(type_url, {"a": 1, "b": 1, "c": 2})
        await proxy.expect_nothing()
        world.set(type_url, {"a": 2, "c": 2})
        await proxy.expect(type_url, {"a": 2})


@all_types
async def test_S08_added_name_is_sent_at_an_unchanged_version(world: World, type_url: str) -> None:
    """Also if it was sent before, then unsubscribed."""
    world.set(type_url, {"a": 1, "b": 1})
    async with world.sotw() as proxy:
        both = {"a": 1, "b": 1}
        only_b = both if type_url in FULL_TYPES else {"b": 1}
        await proxy.subscribe(type_url, ["a"], {"a": 1})
        await proxy.subscribe(type_url, ["a", "b"], only_b)
        await proxy.request(type_url, ["a"])
        await proxy.expect_nothing()
        await proxy.subscribe(type_url, ["a", "b"], only_b)


@full_types
async def test_S09_reconnect_with_the_current_version_is_not_sent_it_again(
    world: World, type_url: str
) -> None:
    """Only on the pure wildcard does the version say what the client has."""
    world.set(type_url, {"a": 1})
    async with world.sotw() as proxy:
        version = (await proxy.subscribe(type_url, [], {"a": 1})).version
    async with world.sotw() as proxy:
        await proxy.request(type_url, version=version)
        await proxy.expect_nothing()
        world.set(type_url, {"a": 2})
        await proxy.expect(type_url, {"a": 2})


@all_types
async def test_S10_first_request_with_an_old_nonce_is_answered(world: World, type_url: str) -> None:
    """The nonce belongs to the stream before; what the names were then, nobody knows."""
    world.set(type_url, {"a": 1})
    async with world.sotw() as proxy:
        earlier = await proxy.subscribe(type_url, ["a"], {"a": 1})
    async with world.sotw() as proxy:
        await proxy.request(type_url, ["a"], nonce=earlier.nonce, version=earlier.version)
        await proxy.expect(type_url, {"a": 1})
    async with world.sotw() as proxy:
        await proxy.request(type_url, ["a"], nonce="old", version="old")
        await proxy.expect(type_url, {"a": 1})


@named_types
async def test_S11_named_types_get_what_they_named(world: World, type_url: str) -> None:
    """Only that, only what changed of it, and a removal cannot be expressed."""
    world.set(type_url, {"a": 1, "b": 1, "c": 1})
    async with world.sotw() as proxy:
        await proxy.subscribe(type_url, ["a", "b", "ghost"], {"a": 1, "b": 1})
        world.set(type_url, {"a": 1, "b": 2, "c": 2})
        await proxy.ack(await proxy.expect(type_url, {"b": 2}))
        world.set(type_url, {"a": 1})
        await proxy.expect_nothing()
        world.set(type_url, {"a": 1, "ghost": 1})
        await proxy.expect(type_url, {"ghost": 1})


@full_types
async def test_S12_empty_wildcard_is_answered(world: World, type_url: str) -> None:
    """Otherwise Envoy waits for 15 s (initial_fetch_timeout) before it goes on."""
    async with world.sotw() as proxy:
        await proxy.request(type_url)
        await proxy.ack(await proxy.expect(type_url, {}))
        await proxy.expect_nothing()


@all_types
async def test_S13_S17_clearing_the_names_is_no_wildcard(world: World, type_url: str) -> None:
    """P has this as an example in four steps. Nothing is sent, above all no empty set."""
    world.set(type_url, {"a": 1, "b": 1})
    async with world.sotw() as proxy:
        await proxy.subscribe(type_url, ["a"], {"a": 1})
        await proxy.request(type_url, [])
        await proxy.expect_nothing()
        world.set(type_url, {"a": 2, "b": 2})
        await proxy.expect_nothing()


async def test_S14_request_without_type_is_an_error(world: World) -> None:
    async with world.sotw() as proxy:
        await proxy.request("")
        status, _ = await proxy.expect_end()
        assert status is grpc.StatusCode.INVALID_ARGUMENT


@all_types
async def test_S15_control_plane_identifier_is_filled(world: World, type_url: str) -> None:
    world.set(type_url, {"a": 1})
    async with world.sotw() as proxy:
        assert (await proxy.subscribe(type_url, ["a"], {"a": 1})).identifier == "server under test"


@full_types
async def test_S16_dropping_the_wildcard_ends_it(world: World, type_url: str) -> None:
    world.set(type_url, {"a": 1, "b": 1})
    async with world.sotw() as proxy:
        await proxy.subscribe(type_url, ["*", "a"], {"a": 1, "b": 1})
        await proxy.request(type_url, ["a"])
        await proxy.expect_nothing()
        world.set(type_url, {"a": 1, "b": 2})
        await proxy.expect_nothing()
        world.set(type_url, {"a": 2, "b": 2})
        await proxy.expect(type_url, {"a": 2})


@all_types
async def test_S18_change_between_send_and_ack_is_not_lost(world: World, type_url: str) -> None:
    """Nor does it wait for the ACK."""
    world.set(type_url, {"a": 1})
    async with world.sotw() as proxy:
        await proxy.request(type_url, ["a"])
        first = await proxy.expect(type_url, {"a": 1})
        world.set(type_url, {"a": 2})
        second = await proxy.expect(type_url, {"a": 2})
        await proxy.ack(first)
        await proxy.ack(second)
        await proxy.expect_nothing()


@all_types
async def test_S19_versions_belong_to_resources(world: World, type_url: str) -> None:
    """They are equal on all streams, and the same content again has the same version again."""
    versions = []
    for content in (1, 2, 1):
        world.set(type_url, {"a": content})
        async with world.sotw("one") as one, world.sotw("other") as other:
            answers = [await proxy.subscribe(type_url, ["a"], {"a": content}) for proxy in (one, other)]
        assert answers[0].version == answers[1].version
        versions.append(answers[0].version)
    assert versions[0] == versions[2] != versions[1]


async def test_S20_endpoints_of_a_changed_cluster_are_sent_again(world: World) -> None:
    """Envoy asks for them with the old nonce, version and names: what looks like an ACK waits for an answer.

    They are sent unasked, right after the clusters; and a second such request is answered at any time.
    """
    world.publish(eds_cluster("a"), resource(EDS, "a"))
    async with world.sotw() as proxy:
        await proxy.subscribe(CDS, [], [eds_cluster("a")])
        answer = await proxy.subscribe(EDS, ["a"], {"a": 1})
        world.publish(eds_cluster("a", 2), resource(EDS, "a"))
        await proxy.ack(await proxy.expect(CDS, [eds_cluster("a", 2)]))
        unasked = await proxy.expect(EDS, {"a": 1})
        await proxy.request(EDS, ["a"], nonce=answer.nonce)
        await proxy.ack(unasked)
        await proxy.expect_nothing()
        await proxy.request(EDS, ["a"])
        await proxy.ack(await proxy.expect(EDS, {"a": 1}))
        await proxy.expect_nothing()


@all_types
async def test_S21_nothing_twice_in_one_response(world: World, type_url: str) -> None:
    """Every answer is checked for it; this is the case in which it would happen."""
    world.set(type_url, {"a": 1})
    async with world.sotw() as proxy:
        await proxy.subscribe(type_url, ["*", "a", "a"], {"a": 1})
        await proxy.expect_nothing()


async def test_D21_node_id_is_required(world: World) -> None:
    async with world.sotw(node_id="") as proxy:
        await proxy.request(CDS)
        status, text = await proxy.expect_end()
        assert (status, "node.id" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_X3_a_key_rotation_is_a_secret_and_nothing_else(world: World) -> None:
    """And a type that this server never heard of is served by name like any other, on the same stream."""
    type_url = "type.googleapis.com/envoy.service.runtime.v3.Runtime"
    runtime = Resource.of_body(type_url, "layer", encode_field(1, type_url.encode()))
    world.publish(resource(CDS, "a"), resource(ECDS, "filter"), resource(SDS, "key"), runtime)
    async with world.sotw() as proxy:
        await proxy.subscribe(CDS, [], {"a": 1})
        await proxy.subscribe(ECDS, ["filter"], {"filter": 1})
        await proxy.subscribe(SDS, ["key"], {"key": 1})
        await proxy.request(runtime.type_url, ["layer"])
        assert (await proxy.receive()).type_url == runtime.type_url
        world.add(resource(SDS, "key", 2))
        await proxy.ack(await proxy.expect(SDS, {"key": 2}))
        await proxy.expect_nothing()


@all_types
async def test_X4_time_to_live_is_told_and_renewed(world: World, type_url: str) -> None:
    """P "SotW TTL". What is sent without the content renews nothing in Envoy, and clusters would vanish."""
    mortal, immortal = resource(type_url, "a", ttl=TTL), resource(type_url, "b")
    world.publish(mortal, immortal)
    async with world.sotw(features=[WRAPS]) as proxy:
        first = await proxy.subscribe(type_url, ["a", "b"], [mortal, immortal])
        assert first.ttls == {"a": TTL}
        for _ in range(3):
            again = await proxy.expect(type_url, [mortal, immortal] if type_url in FULL_TYPES else [mortal])
            assert (again.version, again.ttls) == (first.version, {"a": TTL})
            await proxy.ack(again)
        world.add(resource(type_url, "a"))
        while (answer := await proxy.receive()).ttls:
            pass
        assert answer.versions["a"] == resource(type_url, "a").version
        await proxy.ack(answer)
        await proxy.expect_nothing()


@all_types
async def test_X4_client_without_the_feature_is_not_told_of_a_time_to_live(
    world: World, type_url: str
) -> None:
    world.publish(resource(type_url, "a", ttl=TTL))
    async with world.sotw() as proxy, world.sotw(features=[WRAPS]) as other:
        await proxy.request(type_url, ["a"])
        answer = await proxy.receive()
        assert (answer.versions, answer.ttls) == ({"a": resource(type_url, "a").version}, {})
        await proxy.ack(answer)
        await other.request(type_url, ["a"])
        for _ in range(3):
            assert (await other.receive()).ttls == {"a": TTL}
        await proxy.expect_nothing()


@full_types
async def test_X4_what_a_client_brings_from_an_earlier_stream_is_renewed_at_once(
    world: World, type_url: str
) -> None:
    """Nobody knows how much of its time is over."""
    mortal = resource(type_url, "a", ttl=timedelta(days=1))
    world.publish(mortal)
    async with world.sotw(features=[WRAPS]) as proxy:
        version = (await proxy.subscribe(type_url, [], [mortal])).version
    async with world.sotw(features=[WRAPS]) as proxy:
        await proxy.request(type_url, version=version)
        await proxy.ack(await proxy.expect(type_url, [mortal]))
        await proxy.expect_nothing()


@all_types
async def test_X5_glob_collection_is_its_members(world: World, type_url: str) -> None:
    """Of one level, as in Envoy; parameters are part of the name."""
    world.set(type_url, {FOO + "a": 1, FOO + "deep/a": 1, FOO + "a?p=1": 1, BAR + "a": 1, "a": 1})
    full = type_url in FULL_TYPES
    async with world.sotw() as proxy:
        await proxy.subscribe(type_url, [FOO + "*"], {FOO + "a": 1})
        world.add(resource(type_url, FOO + "b"), resource(type_url, BAR + "b"))
        both = {FOO + "a": 1, FOO + "b": 1}
        await proxy.ack(await proxy.expect(type_url, both if full else {FOO + "b": 1}))
        await proxy.subscribe(
            type_url, [FOO + "*", FOO + "*?p=1"], {FOO + "a?p=1": 1, **(both if full else {})}
        )
        await proxy.request(type_url, [FOO + "*?p=1"])
        await proxy.expect_nothing()
        await proxy.subscribe(
            type_url, [FOO + "*", FOO + "*?p=1"], {**both, FOO + "a?p=1": 1} if full else both
        )
        world.set(type_url, {FOO + "a": 2})
        await proxy.ack(await proxy.expect(type_url, {FOO + "a": 2}))
        await proxy.request(type_url, [])
        await proxy.expect_nothing()
        world.set(type_url, {FOO + "a": 3})
        await proxy.expect_nothing()


@full_types
async def test_X5_empty_collection_is_an_empty_set(world: World, type_url: str) -> None:
    async with world.sotw() as proxy:
        await proxy.subscribe(type_url, [FOO + "*"], {})
        world.set(type_url, {FOO + "a": 1})
        await proxy.expect(type_url, {FOO + "a": 1})


@pytest.mark.parametrize(
    ("service", "type_url"),
    [
        ("cluster.v3.ClusterDiscoveryService/StreamClusters", CDS),
        ("endpoint.v3.EndpointDiscoveryService/StreamEndpoints", EDS),
        ("listener.v3.ListenerDiscoveryService/StreamListeners", LDS),
        ("route.v3.ScopedRoutesDiscoveryService/StreamScopedRoutes", SRDS),
        ("route.v3.RouteDiscoveryService/StreamRoutes", RDS),
        ("secret.v3.SecretDiscoveryService/StreamSecrets", SDS),
        ("extension.v3.ExtensionConfigDiscoveryService/StreamExtensionConfigs", ECDS),
    ],
)
async def test_separate_services_know_their_type(world: World, service: str, type_url: str) -> None:
    world.set(type_url, {"a": 1})
    async with world.sotw(method=f"/envoy.service.{service}") as proxy:
        await proxy.request("", ["a"])
        await proxy.expect(type_url, {"a": 1})
        await proxy.request("type.googleapis.com/another", ["a"])
        status, _ = await proxy.expect_end()
        assert status is grpc.StatusCode.INVALID_ARGUMENT
