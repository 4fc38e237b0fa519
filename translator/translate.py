"""(world, proxy) -> the resources of that proxy, and which object each comes from."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import Message

from crds.llmprovider import LLMProvider
from crds.problems import ObjectKey
from translator import lua, scopes, secrets
from translator.clusters import Destination, cluster
from translator.listeners import HTTP_PROXY_ROUTES, listeners
from translator.memory import Memory
from translator.proxy import Proxy, ProxyType
from translator.routes import HostRoutes, RouteTable, route_table
from translator.world import World
from xds import protos
from xds.resources import SDS, Resource

ResourceName = tuple[str, str]
"""Type URL and name."""


@dataclass(frozen=True, slots=True)
class Translation:
    """The resources of one proxy, and for each object the resources that it went into."""

    resources: tuple[Resource, ...]
    origins: Mapping[ObjectKey, frozenset[ResourceName]]


class Translator:
    """``translate`` depends on the world and the proxy alone, but for scopes that draining connections use.

    The instance remembers what it made of unchanged objects.
    """

    def __init__(self) -> None:
        self._world: World | None = None
        self._memory = Memory()
        self._scoped: set[Proxy] = set()
        """Proxies whose routes were scoped, ever: connections may still be using that form."""

    def translate(self, world: World, proxy: Proxy) -> Translation:
        """Make all resources of a proxy; every object was validated before, so that nothing here can fail."""
        if world is not self._world:
            self._world = world
            self._memory.begin()
        table = route_table(world, proxy, HTTP_PROXY_ROUTES, self._memory)
        resources: dict[ResourceName, Resource] = {}
        origins: defaultdict[ObjectKey, set[ResourceName]] = defaultdict(set)

        def add(resource: Resource, *objects: ObjectKey) -> None:
            name = (resource.type_url, resource.name)
            resources.setdefault(name, resource)
            for key in objects:
                origins[key].add(name)

        script = proxy.script(lua.SCRIPT_SHA256)
        destinations = table.destinations
        for target in destinations:
            provider = target.provider
            certificate = _client_certificate(world, provider)
            if certificate is not None:
                add(certificate, provider.key)
            add(self._cluster(world, target, script, has_certificate=certificate is not None), provider.key)
            api_key = self._api_key(world, target)
            if api_key is not None:
                add(api_key, provider.key)
        if destinations:
            add(secrets.root_ca(world))
        for listener in listeners(proxy, world.mesh, scoped=scopes.is_scoped(table)):
            add(Resource.of(listener))
        for resource, hosts in self._routes(proxy, table):
            add(resource, *(host.object for host in hosts))
        return Translation(
            tuple(resources.values()), {key: frozenset(names) for key, names in origins.items()}
        )

    def _routes(self, proxy: Proxy, table: RouteTable) -> Iterator[tuple[Resource, Sequence[HostRoutes]]]:
        """Make the routes of a sidecar in the form that its listener uses, and in the one it used before."""
        if proxy.type is not ProxyType.SIDECAR:
            return
        if scopes.is_scoped(table):
            self._scoped.add(proxy)
        if scopes.needs_one(table):
            yield Resource.of(table.routes), table.hosts
        if scopes.needs_scopes(table) or proxy in self._scoped:
            yield from scopes.scoped_routes(table, self._memory)

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
        return self._memory.recall((id(provider), what), provider, make)


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
        if world.incomplete:
            return Resource.unknown(SDS, secrets.client_certificate_name(provider))
        return None
