"""The rules of the incremental variant, each against the running server over raw gRPC.

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
    resources,
)
from xds.resources import CDS, ECDS, EDS, LDS, RDS, SDS, SRDS, Resource, encode_field
from xds.status import State

TTL: Final = timedelta(seconds=0.1)
FOO: Final = "xdstp://authority/type/foo/"
BAR: Final = "xdstp://authority/type/bar/"

all_types = pytest.mark.parametrize("type_url", ALL_TYPES)
full_types = pytest.mark.parametrize("type_url", FULL_TYPES)
named_types = pytest.mark.parametrize("type_url", NAMED_TYPES)


@full_types
@pytest.mark.parametrize("names", [[], ["*"]])
async def test_D01_D02_wildcard_gets_everything(world: World, type_url: str, names: list[str]) -> None:
    """Naming nothing in the first request, or `*`, subscribes to all (P "How the client specifies")."""
    world.set(type_url, {"a": 1, "b": 1})
    async with world.delta() as proxy:
        await proxy.request(type_url, names)
        await proxy.expect(type_url, {"a": 1, "b": 1})


@all_types
async def test_D03_ack_is_silent(world: World, type_url: str) -> None:
    world.set(type_url, {"a": 1})
    async with world.delta() as proxy:
        await proxy.subscribe(type_url, ["a"], {"a": 1})
        await proxy.expect_nothing()


@all_types
async def test_D04_only_what_changed_is_sent(world: World, type_url: str) -> None:
    """And the version of a resource comes from its content: the same again is the same version."""
    world.set(type_url, {"a": 1, "b": 1})
    async with world.delta() as proxy:
        first = await proxy.subscribe(type_url, ["a", "b"], {"a": 1, "b": 1})
        world.set(type_url, {"a": 2, "b": 1})
        await proxy.ack(await proxy.expect(type_url, {"a": 2}))
        world.set(type_url, {"a": 1, "b": 1})
        again = await proxy.expect(type_url, {"a": 1})
        assert again.versions["a"] == first.versions["a"]


@all_types
async def test_D05_nack_is_silent_until_the_next_change(world: World, type_url: str) -> None:
    world.set(type_url, {"a": 1})
    async with world.delta() as proxy:
        await proxy.request(type_url, ["a"])
        await proxy.nack(await proxy.expect(type_url, {"a": 1}))
        await proxy.expect_nothing()
        world.set(type_url, {"a": 2})
        await proxy.expect(type_url, {"a": 2})


@all_types
async def test_D05b_good_members_of_a_refused_response_are_delivered(world: World, type_url: str) -> None:
    """The members come again one by one; only the culprit is refused again, and then left alone."""
    world.set(type_url, {"bad": 1, "good": 1, "other": 1})
    async with world.delta() as proxy:
        await proxy.subscribe(type_url, ["bad", "good", "other"], {"bad": 1, "good": 1, "other": 1})
        world.set(type_url, {"bad": 2, "good": 2, "other": 1})
        await proxy.nack(await proxy.expect(type_url, {"bad": 2, "good": 2}), "bad is bad")
        alone = [await proxy.receive(), await proxy.receive()]
        assert [list(answer.versions) for answer in alone] == [["bad"], ["good"]]
        await proxy.nack(alone[0], "bad is bad")
        await proxy.ack(alone[1])
        await proxy.expect_nothing()
        (refusal,) = world.server.refusals()
        assert (refusal.name, refusal.detail) == ("bad", "bad is bad")
        world.set(type_url, {"bad": 3, "good": 2, "other": 1})
        await proxy.ack(await proxy.expect(type_url, {"bad": 3}))
        assert world.server.refusals() == []


@pytest.mark.parametrize("type_url", [t for t in ALL_TYPES if t != ECDS])
async def test_D06_unknown_name_is_answered_as_removed(world: World, type_url: str) -> None:
    """P "Knowing When a Requested Resource Does Not Exist"."""
    world.set(type_url, {"a": 1})
    async with world.delta() as proxy:
        await proxy.request(type_url, ["a", "ghost"])
        await proxy.expect(type_url, {"a": 1}, removed=["ghost"])


@all_types
async def test_D07_subscribing_again_sends_again(world: World, type_url: str) -> None:
    """P "Subscribing to Resources": the client may have forgotten it."""
    world.set(type_url, {"a": 1, "b": 1})
    async with world.delta() as proxy:
        first = await proxy.subscribe(type_url, ["a", "b"], {"a": 1, "b": 1})
        await proxy.request(type_url, ["a"])
        again = await proxy.expect(type_url, {"a": 1})
        assert again.nonce != first.nonce


@all_types
async def test_D08_unchanged_resources_are_not_sent_on_reconnect(world: World, type_url: str) -> None:
    world.set(type_url, {"a": 1, "b": 1})
    async with world.delta() as proxy:
        await proxy.request(type_url, ["*"], has=resources(type_url, {"a": 1, "b": 1}))
        await proxy.expect(type_url, {})
        world.set(type_url, {"a": 1, "b": 2})
        await proxy.expect(type_url, {"b": 2})


@full_types
async def test_D08_legacy_wildcard_brings_its_versions_along(world: World, type_url: str) -> None:
    """So does Envoy: on reconnect, too, it names nothing. An answer is due all the same, an empty one."""
    world.set(type_url, {"a": 1, "b": 2})
    async with world.delta() as proxy:
        await proxy.request(type_url, has=resources(type_url, {"a": 1, "b": 1, "gone": 1}))
        await proxy.ack(await proxy.expect(type_url, {"b": 2}, removed=["gone"]))
    async with world.delta() as proxy:
        await proxy.request(type_url, has=resources(type_url, {"a": 1, "b": 2}))
        await proxy.ack(await proxy.expect(type_url, {}))
        await proxy.expect_nothing()


@named_types
async def test_D08_unchanged_named_resources_are_not_sent_on_reconnect(world: World, type_url: str) -> None:
    world.set(type_url, {"a": 1, "b": 1})
    async with world.delta() as proxy:
        await proxy.request(type_url, ["a", "b"], has=resources(type_url, {"a": 1, "b": 1}))
        await proxy.expect_nothing()
        world.set(type_url, {"a": 1, "b": 2})
        await proxy.expect(type_url, {"b": 2})


@pytest.mark.parametrize("type_url", [t for t in ALL_TYPES if t != ECDS])
async def test_D09_vanished_resources_are_removed_on_reconnect(world: World, type_url: str) -> None:
    world.set(type_url, {"a": 1})
    async with world.delta() as proxy:
        await proxy.request(type_url, ["a", "gone"], has=resources(type_url, {"a": 1, "gone": 1}))
        await proxy.expect(type_url, {}, removed=["gone"])


@all_types
async def test_D10_stale_resources_are_sent_on_reconnect(world: World, type_url: str) -> None:
    world.set(type_url, {"a": 2, "b": 1})
    async with world.delta() as proxy:
        await proxy.request(type_url, ["a", "b"], has=resources(type_url, {"a": 1, "b": 1}))
        await proxy.expect(type_url, {"a": 2})


@all_types
async def test_D11_unsubscribing_the_wildcard_keeps_explicit_names(world: World, type_url: str) -> None:
    world.set(type_url, {"a": 1, "b": 1})
    async with world.delta() as proxy:
        await proxy.subscribe(type_url, ["*", "a"], {"a": 1, "b": 1})
        await proxy.request(type_url, unsubscribe=["*"])
        await proxy.expect_nothing()
        world.set(type_url, {"a": 2, "b": 2})
        await proxy.expect(type_url, {"a": 2})
        await proxy.expect_nothing()


@pytest.mark.parametrize("type_url", [t for t in ALL_TYPES if t != ECDS])
async def test_D12_unsubscribing_a_name_under_the_wildcard_is_answered(world: World, type_url: str) -> None:
    """P "Unsubscribing From Resources": the client cannot know whether the wildcard covers it."""
    world.set(type_url, {"a": 1})
    async with world.delta() as proxy:
        await proxy.request(type_url, ["*", "a", "ghost"])
        await proxy.ack(await proxy.expect(type_url, {"a": 1}, removed=["ghost"]))
        await proxy.request(type_url, unsubscribe=["a"])
        await proxy.expect(type_url, {"a": 1})
        await proxy.request(type_url, unsubscribe=["ghost"])
        await proxy.expect(type_url, {}, removed=["ghost"])


@all_types
async def test_D13_unsubscribing_what_was_not_subscribed_is_ignored(world: World, type_url: str) -> None:
    world.set(type_url, {"a": 1, "b": 1})
    async with world.delta() as proxy:
        await proxy.subscribe(type_url, ["a"], {"a": 1})
        await proxy.request(type_url, unsubscribe=["b", "ghost"])
        await proxy.expect_nothing()
        world.set(type_url, {"a": 2, "b": 2})
        await proxy.expect(type_url, {"a": 2})


@all_types
@pytest.mark.parametrize("nonce", ["stale", "first"])
async def test_D14_subscriptions_count_with_any_nonce(world: World, type_url: str, nonce: str) -> None:
    """P: "the server must honor" them "even if the nonce is stale"."""
    world.set(type_url, {"a": 1, "b": 1})
    async with world.delta() as proxy:
        first = await proxy.subscribe(type_url, ["a"], {"a": 1})
        world.set(type_url, {"a": 2, "b": 1})
        await proxy.expect(type_url, {"a": 2})
        await proxy.request(type_url, ["b"], nonce=first.nonce if nonce == "first" else nonce)
        await proxy.expect(type_url, {"b": 1})


@all_types
async def test_D15_unsubscribing_the_last_name_is_no_wildcard(world: World, type_url: str) -> None:
    world.set(type_url, {"a": 1, "b": 1})
    async with world.delta() as proxy:
        await proxy.subscribe(type_url, ["a"], {"a": 1})
        await proxy.request(type_url, unsubscribe=["a"])
        await proxy.expect_nothing()
        world.set(type_url, {"a": 2, "b": 2})
        await proxy.expect_nothing()


@pytest.mark.parametrize("type_url", [t for t in ALL_TYPES if t != ECDS])
async def test_D16_removal_is_announced(world: World, type_url: str) -> None:
    world.set(type_url, {"a": 1, "b": 1})
    async with world.delta() as proxy:
        await proxy.subscribe(type_url, ["a", "b"], {"a": 1, "b": 1})
        world.set(type_url, {"b": 1})
        await proxy.ack(await proxy.expect(type_url, {}, removed=["a"]))
        await proxy.expect_nothing()


@all_types
async def test_D17_later_creation_of_a_subscribed_name_is_pushed(world: World, type_url: str) -> None:
    async with world.delta() as proxy:
        await proxy.request(type_url, ["a"])
        if type_url != ECDS:
            await proxy.ack(await proxy.expect(type_url, {}, removed=["a"]))
        await proxy.expect_nothing()
        world.set(type_url, {"a": 1})
        await proxy.expect(type_url, {"a": 1})


async def test_D18_request_without_type_is_an_error(world: World) -> None:
    async with world.delta() as proxy:
        await proxy.request("")
        status, _ = await proxy.expect_end()
        assert status is grpc.StatusCode.INVALID_ARGUMENT


async def test_D19_types_are_independent(world: World) -> None:
    """The nonce of one type means nothing for another, and a NACK of one does not touch another."""
    world.publish(resource(CDS, "a"), resource(RDS, "a"))
    async with world.delta() as proxy:
        clusters = await proxy.subscribe(CDS, [], {"a": 1})
        await proxy.request(RDS, ["a"])
        await proxy.nack(await proxy.expect(RDS, {"a": 1}))
        await proxy.request(RDS, nonce=clusters.nonce, error="not of this type")
        await proxy.expect_nothing()
        world.publish(resource(CDS, "a", 2), resource(RDS, "a"))
        await proxy.expect(CDS, {"a": 2})


@full_types
async def test_D20_empty_wildcard_is_answered(world: World, type_url: str) -> None:
    """Otherwise Envoy waits for 15 s (initial_fetch_timeout) before it goes on."""
    async with world.delta() as proxy:
        await proxy.request(type_url)
        await proxy.ack(await proxy.expect(type_url, {}))
        await proxy.expect_nothing()


async def test_D21_node_id_is_required(world: World) -> None:
    async with world.delta(node_id="") as proxy:
        await proxy.request(CDS)
        status, text = await proxy.expect_end()
        assert (status, "node.id" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)


@all_types
async def test_D22_control_plane_identifier_is_filled(world: World, type_url: str) -> None:
    world.set(type_url, {"a": 1})
    async with world.delta() as proxy:
        answer = await proxy.subscribe(type_url, ["a"], {"a": 1})
        assert answer.identifier == "server under test"


@all_types
async def test_D23_nothing_twice_in_one_response(world: World, type_url: str) -> None:
    """A resource that is covered by the wildcard and by its name is one; every answer is checked."""
    world.set(type_url, {"a": 1})
    async with world.delta() as proxy:
        await proxy.subscribe(type_url, ["*", "a", "a"], {"a": 1})
        await proxy.expect_nothing()


@all_types
async def test_D24_nonces_are_unique(world: World, type_url: str) -> None:
    nonces = []
    async with world.delta() as proxy:
        await proxy.request(type_url, ["*"])
        nonces.append((await proxy.expect(type_url, {})).nonce)
        for content in (1, 2, 1, 2):
            world.set(type_url, {"a": content})
            nonces.append((await proxy.expect(type_url, {"a": content})).nonce)
        await proxy.request(type_url, ["a"])
        nonces.append((await proxy.expect(type_url, {"a": 2})).nonce)
    assert len(set(nonces)) == len(nonces)


@all_types
async def test_D25_changes_do_not_wait_for_an_ack(world: World, type_url: str) -> None:
    """Envoy withholds the ACK of clusters while one of them waits for DNS; the next change goes out."""
    world.set(type_url, {"a": 1})
    async with world.delta() as proxy:
        await proxy.request(type_url, ["a"])
        unanswered = [await proxy.expect(type_url, {"a": 1})]
        for content in (2, 3):
            world.set(type_url, {"a": content})
            unanswered.append(await proxy.expect(type_url, {"a": content}))
        for answer in unanswered:
            await proxy.ack(answer)
        await proxy.expect_nothing()


@all_types
async def test_D26_change_between_send_and_ack_is_neither_lost_nor_doubled(
    world: World, type_url: str
) -> None:
    world.set(type_url, {"a": 1, "b": 1})
    async with world.delta() as proxy:
        await proxy.request(type_url, ["a", "b"])
        first = await proxy.expect(type_url, {"a": 1, "b": 1})
        world.set(type_url, {"a": 1, "b": 2})
        second = await proxy.expect(type_url, {"b": 2})
        await proxy.ack(first)
        await proxy.ack(second)
        await proxy.expect_nothing()


async def test_D27_endpoints_follow_their_changed_cluster_unasked(world: World) -> None:
    """Envoy does not ask for them, and keeps cluster and ACK back for 15 s (envoy#33607, envoy#13009)."""
    world.publish(eds_cluster("a"), eds_cluster("b"), resource(EDS, "a"), resource(EDS, "b"))
    async with world.delta() as proxy:
        await proxy.subscribe(CDS, [], [eds_cluster("a"), eds_cluster("b")])
        await proxy.subscribe(EDS, ["a", "b"], {"a": 1, "b": 1})
        world.publish(eds_cluster("a", 2), eds_cluster("b"), resource(EDS, "a"), resource(EDS, "b"))
        await proxy.expect(CDS, [eds_cluster("a", 2)])
        await proxy.expect(EDS, {"a": 1})
        await proxy.expect_nothing()


async def test_D28_extension_configs_are_never_removed(world: World) -> None:
    """Envoy would take the filter away from a listener that still wants it (envoy#32823)."""
    world.set(ECDS, {"a": 1, "b": 1})
    async with world.delta() as proxy:
        await proxy.request(ECDS, ["a", "b", "ghost"])
        await proxy.ack(await proxy.expect(ECDS, {"a": 1, "b": 1}))
        world.set(ECDS, {"b": 1})
        await proxy.expect_nothing()
        world.set(ECDS, {"a": 2, "b": 1})
        await proxy.expect(ECDS, {"a": 2})


async def test_D29_endpoints_asked_for_before_clusters_come_again_after_them(world: World) -> None:
    """On reconnect Envoy may ask in this order (envoy#36951)."""
    world.publish(eds_cluster("a"), resource(EDS, "a"))
    async with world.delta() as proxy:
        await proxy.subscribe(EDS, ["a"], {"a": 1})
        await proxy.request(CDS)
        await proxy.expect(CDS, [eds_cluster("a")])
        await proxy.expect(EDS, {"a": 1})


async def test_X3_a_key_rotation_is_a_secret_and_nothing_else(world: World) -> None:
    """And a type that this server never heard of is served by name like any other, on the same stream."""
    type_url = "type.googleapis.com/envoy.service.runtime.v3.Runtime"
    runtime = Resource.of_body(type_url, "layer", encode_field(1, type_url.encode()))
    world.publish(resource(CDS, "a"), resource(ECDS, "filter"), resource(SDS, "key"), runtime)
    async with world.delta() as proxy:
        await proxy.subscribe(CDS, [], {"a": 1})
        await proxy.subscribe(ECDS, ["filter"], {"filter": 1})
        await proxy.subscribe(SDS, ["key"], {"key": 1})
        await proxy.request(runtime.type_url, ["layer"])
        assert (await proxy.receive()).type_url == runtime.type_url
        world.add(resource(SDS, "key", 2))
        await proxy.ack(await proxy.expect(SDS, {"key": 2}))
        await proxy.expect_nothing()


@all_types
async def test_X4_time_to_live_is_told_and_renewed_without_the_content(world: World, type_url: str) -> None:
    """P "TTL". Only what has one is renewed, for as long as it has one."""
    mortal, immortal = resource(type_url, "a", ttl=TTL), resource(type_url, "b")
    world.publish(mortal, immortal)
    async with world.delta() as proxy:
        first = await proxy.subscribe(type_url, ["a", "b"], [mortal, immortal])
        assert first.ttls == {"a": TTL}
        for _ in range(3):
            heartbeat = await proxy.receive()
            assert (heartbeat.versions, heartbeat.removed) == ({}, ())
            assert (heartbeat.renewed, heartbeat.ttls) == ({"a": mortal.version}, {"a": TTL})
            await proxy.ack(heartbeat)
        assert [status.state for status in world.server.proxies()] == [State.SYNCED]
        world.add(resource(type_url, "a"))
        while (answer := await proxy.receive()).renewed:
            pass
        assert answer.versions == {"a": resource(type_url, "a").version}
        assert answer.ttls == {}
        await proxy.expect_nothing()


@all_types
async def test_X4_what_a_client_brings_from_an_earlier_stream_is_renewed_at_once(
    world: World, type_url: str
) -> None:
    """Nobody knows how much of its time is over."""
    mortal = resource(type_url, "a", ttl=timedelta(days=1))
    world.publish(mortal)
    async with world.delta() as proxy:
        await proxy.request(type_url, ["a"], has=[mortal])
        assert (await proxy.receive()).renewed == {"a": mortal.version}
        await proxy.expect_nothing()


@all_types
async def test_X5_glob_collection_is_its_members(world: World, type_url: str) -> None:
    """Of one level, as in Envoy; parameters are part of the name."""
    world.set(type_url, {FOO + "a": 1, FOO + "deep/a": 1, FOO + "a?p=1": 1, BAR + "a": 1, "a": 1})
    async with world.delta() as proxy:
        await proxy.subscribe(type_url, [FOO + "*"], {FOO + "a": 1})
        world.add(resource(type_url, FOO + "b"), resource(type_url, BAR + "b"))
        await proxy.ack(await proxy.expect(type_url, {FOO + "b": 1}))
        await proxy.subscribe(type_url, [FOO + "*?p=1"], {FOO + "a?p=1": 1})
        await proxy.request(type_url, [FOO + "*"])
        await proxy.ack(await proxy.expect(type_url, {FOO + "a": 1, FOO + "b": 1}))
        world.set(type_url, {FOO + "a": 2})
        gone = [] if type_url == ECDS else [FOO + "b", FOO + "a?p=1"]
        await proxy.ack(await proxy.expect(type_url, {FOO + "a": 2}, removed=gone))
        await proxy.request(type_url, unsubscribe=[FOO + "*"])
        await proxy.expect_nothing()
        world.set(type_url, {FOO + "a": 3})
        await proxy.expect_nothing()


@pytest.mark.parametrize("type_url", [t for t in ALL_TYPES if t != ECDS])
async def test_X5_empty_collection_is_answered_as_removed(world: World, type_url: str) -> None:
    """With an empty response, an Envoy that starts would wait for 15 s (initial_fetch_timeout)."""
    async with world.delta() as proxy:
        await proxy.request(type_url, [FOO + "*"])
        await proxy.ack(await proxy.expect(type_url, {}, removed=[FOO + "*"]))
        world.set(type_url, {FOO + "a": 1})
        await proxy.expect(type_url, {FOO + "a": 1})


@all_types
async def test_X5_members_that_a_client_has_are_not_sent_on_reconnect(world: World, type_url: str) -> None:
    world.set(type_url, {FOO + "a": 1, FOO + "b": 2})
    async with world.delta() as proxy:
        has = resources(type_url, {FOO + "a": 1, FOO + "b": 1, FOO + "gone": 1})
        await proxy.request(type_url, [FOO + "*"], has=has)
        await proxy.expect(type_url, {FOO + "b": 2}, removed=[] if type_url == ECDS else [FOO + "gone"])


@all_types
async def test_X5_name_that_its_collection_covers_stays_when_it_is_unsubscribed(
    world: World, type_url: str
) -> None:
    """As with the wildcard (D12): the client is told what covers it."""
    world.set(type_url, {FOO + "a": 1})
    async with world.delta() as proxy:
        await proxy.subscribe(type_url, [FOO + "*", FOO + "a"], {FOO + "a": 1})
        await proxy.request(type_url, unsubscribe=[FOO + "a"])
        await proxy.ack(await proxy.expect(type_url, {FOO + "a": 1}))
        world.set(type_url, {FOO + "a": 2})
        await proxy.expect(type_url, {FOO + "a": 2})


async def test_X5_members_without_a_name_of_their_own_are_renewed_with_their_content(world: World) -> None:
    """Envoy does not remember their versions, so that a heartbeat of them would be an error to it."""
    mortal = resource(CDS, FOO + "a", ttl=TTL)
    world.publish(mortal)
    async with world.delta() as proxy:
        await proxy.subscribe(CDS, [FOO + "*"], [mortal])
        assert (await proxy.expect(CDS, [mortal])).ttls == {FOO + "a": TTL}


@pytest.mark.parametrize(
    ("service", "type_url"),
    [
        ("cluster.v3.ClusterDiscoveryService/DeltaClusters", CDS),
        ("endpoint.v3.EndpointDiscoveryService/DeltaEndpoints", EDS),
        ("listener.v3.ListenerDiscoveryService/DeltaListeners", LDS),
        ("route.v3.ScopedRoutesDiscoveryService/DeltaScopedRoutes", SRDS),
        ("route.v3.RouteDiscoveryService/DeltaRoutes", RDS),
        ("secret.v3.SecretDiscoveryService/DeltaSecrets", SDS),
        ("extension.v3.ExtensionConfigDiscoveryService/DeltaExtensionConfigs", ECDS),
    ],
)
async def test_separate_services_know_their_type(world: World, service: str, type_url: str) -> None:
    world.set(type_url, {"a": 1})
    async with world.delta(method=f"/envoy.service.{service}") as proxy:
        await proxy.request("", ["a"])
        await proxy.ack(await proxy.expect(type_url, {"a": 1}))
        await proxy.request("type.googleapis.com/another", ["a"])
        status, _ = await proxy.expect_end()
        assert status is grpc.StatusCode.INVALID_ARGUMENT
