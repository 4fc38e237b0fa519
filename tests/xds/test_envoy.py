"""A real Envoy on the server, in both variants."""
# ruff: noqa: N802 - the numbers in the names are those of the list of checks

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.support.envoy import Envoy, running_envoy
from tests.xds.client import World, eventually
from xds import protos
from xds.observer import Observer
from xds.resources import CDS, Resource
from xds.server import WRAPS
from xds.status import State

pytestmark = pytest.mark.envoy
both_variants = pytest.mark.parametrize("api_type", ["GRPC", "DELTA_GRPC"])

ADS = {"ads": {}, "resource_api_version": "V3"}


def bootstrap(xds_port: int, api_type: str) -> dict[str, Any]:
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    endpoint = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": xds_port}}}
    return {
        "node": {"id": "envoy", "cluster": "mesh"},
        "dynamic_resources": {
            "ads_config": {
                "api_type": api_type,
                "transport_api_version": "V3",
                "set_node_on_first_message_only": True,
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}],
            },
            "cds_config": ADS,
            "lds_config": ADS,
        },
        "static_resources": {
            "clusters": [
                {
                    "name": "xds",
                    "load_assignment": {
                        "cluster_name": "xds",
                        "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
                    },
                    "typed_extension_protocol_options": {
                        options: {
                            "@type": f"type.googleapis.com/{options}",
                            "explicit_http_config": {"http2_protocol_options": {}},
                        }
                    },
                }
            ]
        },
    }


def listener() -> Resource:
    manager = protos.HttpConnectionManager(
        stat_prefix="in",
        rds={"route_config_name": "routes", "config_source": ADS},
        http_filters=[{"name": "router", "typed_config": protos.pack(protos.Router())}],
    )
    return Resource.of(
        protos.Listener(
            name="in",
            address={"socket_address": {"address": "127.0.0.1", "port_value": 0}},
            filter_chains=[{"filters": [{"name": "http", "typed_config": protos.pack(manager)}]}],
        )
    )


def routes(cluster: str) -> Resource:
    route = {"match": {"prefix": "/"}, "route": {"cluster": cluster}}
    return Resource.of(
        protos.RouteConfiguration(
            name="routes", virtual_hosts=[{"name": "all", "domains": ["*"], "routes": [route]}]
        )
    )


def cluster(name: str, port: int, timeout: int = 5, ttl: timedelta | None = None) -> Resource:
    """Make a static cluster; with a time-out of 0 it violates the API's own rules (PGV)."""
    return Resource.of(
        protos.Cluster(
            name=name, connect_timeout={"seconds": timeout}, load_assignment=endpoints(name, port)
        ),
        ttl=ttl,
    )


def endpoints(name: str, port: int) -> dict[str, Any]:
    endpoint = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}]}


def eds_cluster(name: str, timeout: int) -> Resource:
    return Resource.of(
        protos.Cluster(
            name=name,
            type="EDS",
            eds_cluster_config={"eds_config": ADS},
            connect_timeout={"seconds": timeout},
        )
    )


@asynccontextmanager
async def envoy_on(world: World, api_type: str, start: dict[str, Any] | None = None) -> AsyncIterator[Envoy]:
    """Run Envoy in a thread, because the server needs this one."""
    manager = running_envoy(start or bootstrap(world.port, api_type))
    envoy = await asyncio.to_thread(manager.__enter__)
    try:
        yield envoy
    finally:
        await asyncio.to_thread(manager.__exit__, None, None, None)


@asynccontextmanager
async def upstream(answer: str) -> AsyncIterator[int]:
    """Serve one text on a port of its own."""

    async def handle(_: web.BaseRequest) -> web.Response:
        return web.Response(text=answer)

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


class Pushes(Observer):
    """Counts responses by their types."""

    def __init__(self) -> None:
        self.of: Counter[str] = Counter()

    def pushed(self, type_url: str, size: int, seconds: float) -> None:  # noqa: ARG002
        self.of[type_url] += 1


def answered(world: World) -> bool:
    return not any(status.unanswered for proxy in world.server.proxies() for status in proxy.types.values())


def synced(world: World) -> bool:
    return bool(world.server.proxies()) and all(p.state is State.SYNCED for p in world.server.proxies())


@both_variants
async def test_configuration_and_change_become_live(world: World, api_type: str) -> None:
    async with upstream("one") as one, upstream("two") as two:
        world.publish(listener(), routes("a"), cluster("a", one))
        async with envoy_on(world, api_type) as envoy, aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{await asyncio.to_thread(envoy.port, 'in')}/"
            await eventually(lambda: synced(world))
            assert await (await session.get(url)).text() == "one"
            world.publish(listener(), routes("a"), cluster("a", two))
            await eventually(lambda: synced(world))
            assert await (await session.get(url)).text() == "two"
            (proxy,) = world.server.proxies()
            assert (proxy.node_id, proxy.envoy_version.split(".")[0]) == ("envoy", "1")


@both_variants
async def test_bad_cluster_does_not_cost_a_good_one(world: World, api_type: str) -> None:
    """Envoy refuses the whole response for one cluster against the API's rules; only that one stays behind.

    Repaired, it gets through as well, and an Envoy that starts while it is bad comes up with all the others.
    """
    async with upstream("one") as one, upstream("two") as two:
        world.publish(listener(), routes("good"), cluster("bad", one), cluster("good", one))
        async with envoy_on(world, api_type) as envoy, aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{await asyncio.to_thread(envoy.port, 'in')}/"
            await eventually(lambda: synced(world))
            world.publish(listener(), routes("good"), cluster("bad", one, timeout=0), cluster("good", two))
            await eventually(lambda: bool(world.server.refusals()))
            (refusal,) = world.server.refusals()
            assert (refusal.name, "ConnectTimeout" in refusal.detail) == ("bad", True)
            async with envoy_on(world, api_type) as newcomer:
                port = await asyncio.to_thread(newcomer.port, "in")
                assert await (await session.get(f"http://127.0.0.1:{port}/")).text() == "two"
            await eventually(lambda: answered(world))
            assert await (await session.get(url)).text() == "two"
            world.publish(listener(), routes("bad"), cluster("bad", two), cluster("good", one))
            await eventually(lambda: synced(world))
            assert world.server.refusals() == []
            assert await (await session.get(url)).text() == "two"


@both_variants
async def test_endpoints_of_a_changed_cluster_are_there_at_once(world: World, api_type: str) -> None:
    """A server that waits to be asked for them keeps the cluster, and what needs it, warming for 15 s."""
    async with upstream("one") as one:
        load = Resource.of(protos.ClusterLoadAssignment(**endpoints("a", one)))
        world.publish(listener(), routes("a"), eds_cluster("a", 5), load)
        async with envoy_on(world, api_type) as envoy, aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{await asyncio.to_thread(envoy.port, 'in')}/"
            for timeout in (6, 7, 8):
                await eventually(lambda: synced(world))
                world.publish(listener(), routes("a"), eds_cluster("a", timeout), load)
            async with asyncio.timeout(60):
                await eventually(lambda: synced(world))
            assert (await asyncio.to_thread(envoy.stats, "cluster.a.init_fetch_timeout")).popitem()[1] == 0
            assert await (await session.get(url)).text() == "one"


@both_variants
async def test_swapping_clusters_loses_no_request(world: World, api_type: str) -> None:
    """X2: the route goes to a new cluster and the old one vanishes, in one publication, under load."""
    statuses: list[int] = []
    done = asyncio.Event()

    async def load(session: aiohttp.ClientSession, url: str) -> None:
        while not done.is_set():
            async with session.get(url) as response:
                await response.read()
                statuses.append(response.status)

    async with upstream("one") as one:
        world.publish(listener(), routes("c0"), cluster("c0", one))
        async with envoy_on(world, api_type) as envoy, aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{await asyncio.to_thread(envoy.port, 'in')}/"
            clients = [asyncio.create_task(load(session, url)) for _ in range(8)]
            for number in range(1, 21):
                world.publish(listener(), routes(f"c{number}"), cluster(f"c{number}", one))
                await eventually(lambda: synced(world))
            done.set()
            await asyncio.gather(*clients)
            clusters = await asyncio.to_thread(envoy.admin, "/clusters")
    assert set(statuses) == {200}
    assert b"c20::" in clusters
    assert b"c19::" not in clusters


@both_variants
async def test_restart_of_the_server_changes_nothing(world: World, api_type: str) -> None:
    """Envoy keeps what it has while the server is away, and the next server has nothing to send."""
    async with upstream("one") as one:
        world.publish(listener(), routes("a"), cluster("a", one))
        async with envoy_on(world, api_type) as envoy:
            await eventually(lambda: synced(world))
            await world.server.stop()
            successor = World()
            successor.snapshots = world.snapshots
            assert await successor.server.start(f"127.0.0.1:{world.port}") == world.port
            successor.server.ready()
            await eventually(lambda: len(successor.server.proxies()) == 1 and synced(successor))
            stats = await asyncio.to_thread(
                envoy.stats, "_manager.(cluster|listener)_(added|modified|removed)$"
            )
            await successor.server.stop()
    assert stats == {
        "cluster_manager.cluster_added": 2,
        "cluster_manager.cluster_modified": 0,
        "cluster_manager.cluster_removed": 0,
        "listener_manager.listener_added": 1,
        "listener_manager.listener_modified": 0,
        "listener_manager.listener_removed": 0,
    }


@both_variants
async def test_X4_cluster_with_a_time_to_live_stays_while_the_server_is_there(
    world: World, api_type: str
) -> None:
    """And goes when it is not: nobody says so to Envoy."""
    async with upstream("one") as one:
        mortal = cluster("a", one, ttl=timedelta(seconds=2))
        world.publish(listener(), routes("a"), mortal, cluster("b", one))
        started = bootstrap(world.port, api_type)
        started["node"]["client_features"] = [WRAPS]  # without it, state of the world has no times to live
        async with envoy_on(world, api_type, started) as envoy:
            await eventually(lambda: synced(world))
            renewals = Pushes()
            world.server.observer = renewals
            await eventually(lambda: renewals.of[CDS] >= 4)
            counters = "cluster_manager.cluster_(added|modified|removed)$"
            stats = await asyncio.to_thread(envoy.stats, counters)
            assert list(stats.values()) == [3, 0, 0], stats
            assert not [
                status for proxy in world.server.proxies() for status in proxy.types.values() if status.error
            ]
            await world.server.stop()
            await eventually(lambda: envoy.stats(counters)["cluster_manager.cluster_removed"] == 1)
            assert b"b::" in await asyncio.to_thread(envoy.admin, "/clusters")


@both_variants
async def test_X5_glob_collections_of_clusters_and_listeners(world: World, api_type: str) -> None:
    """Envoy is told of them in its bootstrap; in the delta variant, an empty one does not delay its start.

    (In state of the world there is no way to say that it is empty: Envoy waits for 15 s.)
    """
    prefix = "xdstp://test/envoy.config.cluster.v3.Cluster/"
    async with upstream("one") as one:
        world.publish(cluster(f"{prefix}foo/a", one), cluster(f"{prefix}bar/b", one), listener(), routes("a"))
        started = bootstrap(world.port, api_type)
        started["dynamic_resources"]["cds_resources_locator"] = f"{prefix}foo/*"
        if api_type == "DELTA_GRPC":
            empty = "xdstp://test/envoy.config.listener.v3.Listener/foo/*"
            started["dynamic_resources"]["lds_resources_locator"] = empty
        async with envoy_on(world, api_type, started) as envoy:

            def clusters() -> set[str]:
                lines = envoy.admin("/clusters").decode().splitlines()
                return {
                    line.rpartition("/")[2].partition("::")[0] for line in lines if line.startswith(prefix)
                }

            assert clusters() == {"a"}
            world.add(cluster(f"{prefix}foo/c", one))
            await eventually(lambda: synced(world))
            await eventually(lambda: clusters() == {"a", "c"})
