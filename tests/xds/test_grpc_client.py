"""gRPC's own `xds:///` client on the server: an independent client, of the state-of-the-world variant only.

It does what Envoy never does: it names its listeners and clusters, changes the names under one nonce,
unsubscribes.
"""

import asyncio
import json
import os
import sys
from typing import Any

import grpc

from tests.xds.client import TIMEOUT, World
from xds import protos
from xds.resources import Resource

ADS: dict[str, Any] = {"ads": {}, "resource_api_version": "V3"}

CLIENT = """
import grpc, sys
with grpc.insecure_channel("xds:///service.test") as channel:
    call = channel.unary_unary("/test/Which")
    for _ in sys.stdin:
        try:
            answer = call(b"", wait_for_ready=True, timeout=60).decode()
        except grpc.RpcError as error:
            answer = error.code().name
        print(answer, flush=True)
"""


async def backend(name: str) -> tuple["grpc.aio.Server", int]:
    """Start a gRPC server that answers with its name."""

    async def which(request: bytes, context: Any) -> bytes:
        return name.encode()

    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    handlers = {"Which": grpc.unary_unary_rpc_method_handler(which)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


def listener() -> Resource:
    router = {"name": "router", "typed_config": protos.pack(protos.Router())}
    manager = protos.HttpConnectionManager(
        rds={"route_config_name": "routes", "config_source": ADS}, http_filters=[router]
    )
    return Resource.of(
        protos.Listener(name="service.test", api_listener={"api_listener": protos.pack(manager)})
    )


def routes(cluster: str) -> Resource:
    hosts = [
        {
            "name": "all",
            "domains": ["service.test"],
            "routes": [{"match": {"prefix": ""}, "route": {"cluster": cluster}}],
        }
    ]
    return Resource.of(protos.RouteConfiguration(name="routes", virtual_hosts=hosts))


def cluster(name: str, port: int) -> list[Resource]:
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    locality = {
        "locality": {"region": "here"},
        "load_balancing_weight": {"value": 1},
        "lb_endpoints": [{"endpoint": {"address": address}}],
    }
    return [
        Resource.of(
            protos.Cluster(
                name=name, type="EDS", eds_cluster_config={"eds_config": ADS, "service_name": f"eds-{name}"}
            )
        ),
        Resource.of(protos.ClusterLoadAssignment(cluster_name=f"eds-{name}", endpoints=[locality])),
    ]


async def test_grpc_client_follows_the_routes(world: World) -> None:
    (one, one_port), (two, two_port) = await backend("one"), await backend("two")
    clusters = [*cluster("one", one_port), *cluster("two", two_port)]
    world.publish(listener(), routes("one"), *clusters)
    bootstrap = {
        "xds_servers": [
            {
                "server_uri": f"127.0.0.1:{world.port}",
                "channel_creds": [{"type": "insecure"}],
                "server_features": ["xds_v3"],
            }
        ],
        "node": {"id": "grpc", "cluster": "mesh"},
    }
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CLIENT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "GRPC_XDS_BOOTSTRAP_CONFIG": json.dumps(bootstrap)},
    )
    assert client.stdin is not None
    assert client.stdout is not None

    async def which() -> str:
        client.stdin.write(b"\n")
        return (await client.stdout.readline()).decode().strip()

    async with asyncio.timeout(TIMEOUT):
        assert await which() == "one"
        for name in ("two", "one", "two"):
            world.publish(listener(), routes(name), *clusters)
            while await which() != name:
                pass
        world.publish(listener(), routes("two"), *cluster("two", one_port))
        while await which() != "one":
            pass
        (proxy,) = world.server.proxies()
        assert not proxy.delta
        client.stdin.close()
        await client.wait()
    await one.stop(None)
    await two.stop(None)
