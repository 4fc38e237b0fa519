"""(world, proxy) -> the resources of that proxy, and which object each comes from."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

from google.protobuf.message import Message

from crds.llmprovider import LLMProvider
from crds.problems import ObjectKey
from translator import lua, secrets
from translator.clusters import Destination, cluster
from translator.listeners import HTTP_PROXY_ROUTES, listeners
from translator.proxy import Proxy, ProxyType
from translator.routes import route_table
from translator.world import World
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
    """``translate`` is a pure function; the instance only remembers what it made of unchanged providers.

    Objects are compared by identity: a source hands out the same object until its content changes.
    """

    def __init__(self) -> None:
        self._world: World | None = None
        self._made: dict[tuple[int, Hashable], tuple[LLMProvider, Resource]] = {}

    def translate(self, world: World, proxy: Proxy) -> Translation:
        """Make all resources of a proxy; every object was validated before, so that nothing here can fail."""
        if world is not self._world:
            self._world = world
            living = {id(provider) for of in world.providers.values() for provider in of}
            self._made = {slot: made for slot, made in self._made.items() if slot[0] in living}
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
            api_key = self._api_key(world, target)
            if api_key is not None:
                add(api_key, provider.key)
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
        def make() -> Resource:
            source = _data_source(script)
            return Resource.of(cluster(target, world.mesh, source, client_certificate=has_certificate))

        what = (target.cluster_name, script, has_certificate, world.mesh)
        return self._remembered(target.provider, what, make)

    def _api_key(self, world: World, target: Destination) -> Resource | None:
        name = secrets.api_key_name(target.provider, target.rule)
        if name is None:
            return None
        key, held = secrets.current_api_key(world, target.provider, target.rule)
        what = (name, key, held)
        return self._remembered(target.provider, what, lambda: secrets.api_key_resource(name, key, held=held))

    def _remembered(self, provider: LLMProvider, what: Hashable, make: Callable[[], Resource]) -> Resource:
        """Return what was made of this very object under the same circumstances, or make it."""
        slot = (id(provider), what)
        if slot not in self._made:
            self._made[slot] = (provider, make())  # the object is kept, so that its id stays its own
        return self._made[slot][1]


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
