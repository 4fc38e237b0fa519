"""(world, proxy) -> the resources of that proxy, and which object each comes from."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import Message

from crds.llmprovider import LLMProvider
from crds.problems import ObjectKey
from translator import lua, secrets
from translator.clusters import Destination, cluster
from translator.listeners import HTTP_PROXY_ROUTES, listeners
from translator.proxy import Proxy, ProxyType
from translator.routes import route_table
from translator.world import MeshSettings, World
from xds import protos
from xds.resources import Resource

ResourceName = tuple[str, str]
"""Type URL and name."""


@dataclass(frozen=True, slots=True)
class Translation:
    """The resources of one proxy, and for each object the resources that it went into."""

    resources: tuple[Resource, ...]
    origins: Mapping[ObjectKey, frozenset[ResourceName]]


class Translator:
    """``translate`` is a pure function; the instance only remembers the clusters of unchanged providers.

    Objects are compared by identity: a source hands out the same object until its content changes.
    """

    def __init__(self) -> None:
        self._world: World | None = None
        self._clusters: dict[_ClusterKey, tuple[LLMProvider, Resource]] = {}

    def translate(self, world: World, proxy: Proxy) -> Translation:
        """Make all resources of a proxy; every object was validated before, so that nothing here can fail."""
        if world is not self._world:
            self._world = world
            living = {id(provider) for of in world.providers.values() for provider in of}
            self._clusters = {key: made for key, made in self._clusters.items() if key[0] in living}
        table = route_table(world, proxy, HTTP_PROXY_ROUTES)
        resources: dict[ResourceName, Resource] = {}
        origins: defaultdict[ObjectKey, set[ResourceName]] = defaultdict(set)

        def add(resource: Resource, *objects: ObjectKey) -> None:
            name = (resource.type_url, resource.name)
            resources.setdefault(name, resource)
            for key in objects:
                origins[key].add(name)

        script = proxy.script(lua.SCRIPT_SHA256)
        for target in table.destinations:
            provider = target.provider
            certificate = _client_certificate(world, provider)
            if certificate is not None:
                add(certificate, provider.key)
            add(self._cluster(world, target, script, has_certificate=certificate is not None), provider.key)
            key_name = secrets.api_key_name(provider, target.rule)
            if key_name is not None:
                add(secrets.api_key_resource(world, key_name, provider, target.rule), provider.key)
        if table.destinations:
            add(secrets.root_ca(world))
        for listener in listeners(proxy, world.mesh):
            add(Resource.of(listener))
        if proxy.type is ProxyType.SIDECAR:
            add(Resource.of(table.routes), *table.objects)
        return Translation(
            tuple(resources.values()), {key: frozenset(names) for key, names in origins.items()}
        )

    def _cluster(
        self, world: World, target: Destination, script: str | None, *, has_certificate: bool
    ) -> Resource:
        key = (id(target.provider), target.cluster_name, script, has_certificate, world.mesh)
        if key not in self._clusters:
            made = cluster(target, world.mesh, _data_source(script), client_certificate=has_certificate)
            self._clusters[key] = (target.provider, Resource.of(made))
        return self._clusters[key][1]


_ClusterKey = tuple[int, str, str | None, bool, MeshSettings]


def _data_source(script: str | None) -> Message:
    """Say where the Lua text is: in the file that the bootstrap laid down, or, without one, here."""
    if script is not None:
        return protos.DataSource(filename=script)
    return protos.DataSource(inline_string=lua.SCRIPT)


def _client_certificate(world: World, provider: LLMProvider) -> Resource | None:
    if provider.spec.tls.credential_name is None:
        return None
    try:
        return secrets.client_certificate(world, provider)
    except secrets.MissingSecretError:
        return None
