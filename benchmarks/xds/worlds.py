"""What the servers serve: files with the very same bytes for each of them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

from benchmarks.processes import provider, providers
from crds.loader import LoadedObject, load
from llmplane.bootstrap import ProxySettings, bootstrap
from llmplane.mesh import mesh_settings
from translator import lua
from translator.proxy import Proxy, ProxyType
from translator.translate import Translator
from translator.world import MeshSettings, World
from xds import protos
from xds.resources import CDS, ECDS, LDS, RDS, SDS, SRDS, WILDCARD_TYPES, Resource

CHANGED: Final = 64
"""So many clusters change in turn; they are spread over all."""

_MESSAGES: Final = {
    CDS: protos.Cluster,
    SDS: protos.Secret,
    LDS: protos.Listener,
    ECDS: protos.TypedExtensionConfig,
    SRDS: protos.ScopedRouteConfiguration,
    RDS: protos.RouteConfiguration,
}
"""By type URL, in the order in which an Envoy asks."""

_DOMAIN: Final = "example.com"
_SCRIPT: Final = Path("/run/llmplane/llm_provider.lua")


@dataclass(frozen=True)
class Files:
    """One world, as files."""

    world: Path
    """A DiscoveryResponse with all resources."""
    changed: Path
    """A DiscoveryResponse with some of the clusters in another form."""
    subscriptions: Path
    """What an Envoy asks for, as JSON."""
    clusters_only: Path
    """The same of the clusters alone."""
    node: Path
    """Its node message, as JSON."""
    size: int
    """Bytes of all resources."""
    resources: int
    """How many they are."""
    clusters: int
    """How many of them are clusters."""


def small(count: int, folder: Path) -> Files:
    """Write a world of TLS clusters of about 260 bytes, and nothing else."""
    world = [_small(number, 5) for number in range(count)]
    return _write(folder, world, [_small(number, 6) for number in spread(count)])


def real(count: int, folder: Path) -> Files:
    """Write all that llmplane sends for so many providers: TLS, key, Lua, trust roots, listener, routes."""
    world = translate(objects(count))
    changed = [resource for resource in translate(others(count)) if resource.type_url == CDS]
    return _write(folder, world, changed)


def spread(count: int) -> list[int]:
    """Return the numbers of the clusters that change."""
    return list(islice(cycle(range(0, count, max(1, count // CHANGED))), CHANGED))


def objects(count: int) -> tuple[LoadedObject, ...]:
    """Return the objects of so many providers."""
    return _loaded(providers(count, _DOMAIN).values())


def others(count: int) -> tuple[LoadedObject, ...]:
    """Return those that change, each with another model."""
    return _loaded(provider(f"provider-{number:04}", _DOMAIN, "other") for number in spread(count))


def mesh() -> MeshSettings:
    """Return the settings of `llmplane serve` without options."""
    return mesh_settings(None, (), None)


def translate(loaded: Iterable[LoadedObject]) -> Sequence[Resource]:
    """Translate objects for the sidecar that all streams are."""
    proxy = Proxy.from_node(_node()["id"], _node()["metadata"])
    return Translator().translate(World.of((item.object for item in loaded), mesh()), proxy).resources


def read(file: Path) -> list[Resource]:
    """Return the resources of a file."""
    response = protos.DiscoveryResponse.FromString(file.read_bytes())
    return [_resource(body) for body in response.resources]


def _loaded(texts: Iterable[str]) -> tuple[LoadedObject, ...]:
    loaded = load("---\n".join(texts), "benchmark.yaml", {})
    assert not loaded.problems
    return tuple(loaded.objects)


def _node() -> dict[str, Any]:
    settings = ProxySettings(
        type=ProxyType.SIDECAR,
        xds_host="127.0.0.1",
        xds_port=0,
        namespace="default",
        workload="sleep",
        admin_socket=Path("unused"),
        scripts={lua.SCRIPT_SHA256: _SCRIPT},
        instance="benchmark",
    )
    # Envoy adds its version and what it can do: the node message of Envoy 1.40 has 61 KB.
    extensions = [
        {"name": f"envoy.filters.http.{number:03}", "category": "envoy.filters.http"}
        for number in range(1300)
    ]
    version = {"version": {"major_number": 1, "minor_number": 40}}
    own = {"user_agent_name": "envoy", "user_agent_build_version": version, "extensions": extensions}
    node: dict[str, Any] = bootstrap(settings)["node"] | own
    return node


def _write(folder: Path, world: Sequence[Resource], changed: Sequence[Resource]) -> Files:
    names: dict[str, list[str]] = {}
    for resource in world:
        names.setdefault(resource.type_url, []).append(resource.name)
    asked = [
        {"type_url": type_url, "names": [] if type_url in WILDCARD_TYPES else names[type_url]}
        for type_url in _MESSAGES
        if type_url in names
    ]
    files = Files(
        folder / "world.pb",
        folder / "changed.pb",
        folder / "subscriptions.json",
        folder / "clusters-only.json",
        folder / "node.json",
        size=sum(resource.body_size for resource in world),
        resources=len(world),
        clusters=len(names[CDS]),
    )
    for file, resources in ((files.world, world), (files.changed, changed)):
        response = protos.DiscoveryResponse(
            resources=[protos.Any.FromString(resource.body) for resource in resources]
        )
        file.write_bytes(response.SerializeToString())
    files.subscriptions.write_text(json.dumps(asked), encoding="utf-8")
    files.clusters_only.write_text(json.dumps(asked[:1]), encoding="utf-8")
    files.node.write_text(json.dumps(_node()), encoding="utf-8")
    return files


def _small(number: int, seconds: int) -> Resource:
    host = f"provider-{number:05}.example.com"
    address = {"socket_address": {"address": host, "port_value": 443}}
    return Resource.of(
        protos.Cluster(
            name=f"cluster-{number:05}",
            type="STRICT_DNS",
            connect_timeout={"seconds": seconds},
            load_assignment={
                "cluster_name": f"cluster-{number:05}",
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
            },
            transport_socket={
                "name": "envoy.transport_sockets.tls",
                "typed_config": protos.pack(protos.UpstreamTlsContext(sni=host)),
            },
        )
    )


def _resource(body: Any) -> Resource:
    name = _MESSAGES[body.type_url].FromString(body.value).name
    return Resource.of_body(body.type_url, name, body.SerializeToString())
