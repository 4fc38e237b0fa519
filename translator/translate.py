"""(world, proxy) -> the resources of that proxy, and which object each comes from."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from crds.llmprovider import LLMProvider
from crds.problems import ObjectKey
from translator import (
    capture,
    global_rate_limits,
    lua,
    observability,
    policies,
    rate_limits,
    scopes,
    secrets,
    telemetry,
)
from translator.backends import backend_cluster
from translator.captured_routes import captured_routes
from translator.certificates import workload_certificates
from translator.clusters import Destination, closed_cluster, cluster
from translator.features import Feature
from translator.gateways import GatewayListener, Merged, merge
from translator.listeners import HTTP_PROXY_ROUTES, gateway_listener, sidecar_listener
from translator.memory import Memory
from translator.parts import Collection, Part, ResourceName
from translator.proxy import Proxy, ProxyType
from translator.routes import HostRoutes, RouteTable, gateway_route_table, route_table
from translator.rules import leads_to_mutual_tls, missing_features
from translator.services import ServiceDestination, service_cluster
from translator.world import World
from xds.resources import SDS, Guard, Resource


@dataclass(frozen=True, eq=False)
class Translation:
    """The resources of one proxy, and for each object the resources that it went into.

    Parts can share resources: what a name stands for is the same in all of them.
    """

    parts: tuple[Part, ...]
    missing: Mapping[ObjectKey | None, Sequence[Feature]]
    """What objects ask for, and this Envoy is too old for; None: what concerns the whole proxy."""
    uncertified: tuple[ObjectKey, ...]
    """Objects that ask for mutual TLS of the mesh, for which this Envoy has no certificate."""

    @cached_property
    def resources(self) -> tuple[Resource, ...]:
        """All resources."""
        return tuple({name: of for part in self.parts for name, of in part.resources.items()}.values())

    @cached_property
    def origins(self) -> Mapping[ObjectKey, frozenset[ResourceName]]:
        """For each object the resources that it went into; made when somebody asks for it."""
        found: dict[ObjectKey, frozenset[ResourceName]] = {}
        for part in self.parts:
            for key, names in part.origins.items():
                found[key] = found[key] | names if key in found else names
        return found

    def changed(self, before: "Translation") -> dict[ResourceName, Resource | None]:
        """Return all that is different from another translation, and perhaps some that is equal (None: gone).

        Parts that both have are not looked into, unless something is gone: they may still have it.
        """
        new, old = set(self.parts), set(before.parts)
        found: dict[ResourceName, Resource | None] = {
            name: resource for part in new - old for name, resource in part.resources.items()
        }
        gone = {name for part in old - new for name in part.resources} - found.keys()
        for part in new if gone else ():
            gone.difference_update(part.resources)
        return found | dict.fromkeys(gone)


NOTHING = Translation((), {}, ())
"""What a proxy has before the first translation."""


class Translator:
    """``translate`` depends on the world and the proxy alone, but for scopes that draining connections use.

    The instance remembers what it made of unchanged objects.
    """

    def __init__(self) -> None:
        self._world: World | None = None
        self._memory = Memory()
        self._scoped: set[tuple[Proxy, str]] = set()
        """Proxies and their routes that were scoped, ever: connections may still be using that form."""

    def translate(self, world: World, proxy: Proxy) -> Translation:
        """Make all resources of a proxy; every object was validated before, so that nothing here can fail."""
        if world is not self._world:
            self._world = world
            self._memory.begin()
        merged = merge(world, proxy)
        opened = tuple(merged.listeners)
        tables = self._tables(world, proxy, opened)
        parts = list(self._destinations(world, proxy, tables))
        found = Collection()
        self._add_backends(found, world, proxy, tables)
        services = tuple(dict.fromkeys(_services(world, proxy)))
        for service in services:
            certificates = workload_certificates(proxy) if service.mutual and proxy.certificate else None
            found.add(Resource.of(service_cluster(service, world.mesh, certificates)))
            for secret in certificates.resources if certificates else ():
                found.add(secret)
        if parts or any(service.tls for service in services):
            found.add(secrets.root_ca(world))
        self._add_listeners(found, world, proxy, opened, tables)
        parts.append(found.part())
        for table in tables:
            parts += self._routes(proxy, table)
        return Translation(
            tuple(parts),
            dict(_missing(world, proxy, tables)),
            tuple(_uncertified(world, proxy, merged)),
        )

    def _destinations(self, world: World, proxy: Proxy, tables: Iterable[RouteTable]) -> Iterator[Part]:
        """Make, for each host, the clusters that it leads to, and the secrets that they name."""
        # What of the proxy counts is named here: proxies share what is made.
        memory = self._memory.part("destinations", proxy.script(lua.SCRIPT_SHA256), proxy.version, world.mesh)
        hosts = (host for table in tables for host in (*table.hosts, *table.plain) if host.destinations)
        for host in hosts:
            key, objects = self._circumstances(world, host)
            yield memory.recall(key, objects, partial(self._clusters, world, proxy, host))

    def _circumstances(self, world: World, host: HostRoutes) -> tuple[Hashable, object]:
        """Return all that the clusters and secrets of a host depend on, as key and objects of a memory."""
        if not (host.secrets or world.held or world.incomplete):
            return host, None
        found = [world.secrets.get(key) for key in host.secrets]
        ids = tuple(map(id, found))
        held = tuple(target.cluster_name for target in host.destinations if target.provider.key in world.held)
        lacking: tuple[str, ...] = ()
        if world.incomplete:  # then what is lacking is held
            make = partial(_lacking, world, host)
            lacking = self._memory.recall(("lacking", host, ids), found, make)
        return (host, ids, held, lacking) if ids or held or lacking else host, found

    def _clusters(self, world: World, proxy: Proxy, host: HostRoutes) -> Part:
        found = Collection()
        for target in host.destinations:
            self._add_destination(found, world, proxy, target)
        return found.part()

    def _add_destination(self, found: Collection, world: World, proxy: Proxy, target: Destination) -> None:
        provider = target.provider
        certificate = _client_certificate(world, provider)
        if certificate is not None:
            found.add(certificate, provider.key)
        has_certificate = certificate is not None
        found.add(self._cluster(world, target, proxy, has_certificate=has_certificate), provider.key)
        name = secrets.api_key_name(provider, target.rule)
        if name is not None:
            key, held = secrets.current_api_key(world, provider, target.rule)
            has_prefix = not proxy.supports(Feature.CREDENTIAL_PREFIX)
            make = partial(secrets.api_key_resource, name, key, held=held, has_prefix=has_prefix)
            # Thousands of routes may lead to one provider.
            found.add(self._memory.recall(("key", name, key, held, has_prefix), None, make), provider.key)

    def _add_backends(
        self, found: Collection, world: World, proxy: Proxy, tables: Iterable[RouteTable]
    ) -> None:
        """Add the clusters of Services, and the workload's certificate where they ask for it."""
        for table in tables:
            for target, routes in table.backends.items():
                certificates = workload_certificates(proxy) if target.mutual else None
                found.add(Resource.of(backend_cluster(target, world, certificates)), *routes)
                for secret in certificates.resources if certificates else ():
                    found.add(secret, *routes)

    def _add_listeners(
        self,
        found: Collection,
        world: World,
        proxy: Proxy,
        opened: Iterable[GatewayListener],
        tables: Iterable[RouteTable],
    ) -> None:
        scoped = {table.name for table in tables if scopes.is_scoped(table)}
        if proxy.type is ProxyType.SIDECAR:
            listener = sidecar_listener(world, proxy, scoped=bool(scoped))
            if listener is not None:
                found.add(Resource.of(listener), *observability.objects(world, proxy))
                self._add_policies(found, world, proxy)
            if proxy.captures:
                self._add_capture(found, world, proxy, tables)
                self._add_policies(found, world, proxy)
        if opened:
            self._add_policies(found, world, proxy)
        for each in opened:
            made = gateway_listener(world, proxy, each, scoped)
            found.add(Resource.of(made), *each.objects, *observability.objects(world, proxy))
            for chain in each.chains:
                for secret in chain.certificates.resources if chain.certificates else ():
                    found.add(secret, chain.servers[0].gateway.key)

    def _add_policies(self, found: Collection, world: World, proxy: Proxy) -> None:
        for resource, objects in policies.resources(world, proxy):
            found.add(resource, *objects)

    def _add_capture(
        self, found: Collection, world: World, proxy: Proxy, tables: Iterable[RouteTable]
    ) -> None:
        for made in capture.clusters():
            found.add(Resource.of(made))
        for table in tables:
            for made in capture.listeners(world, proxy, table):
                found.add(Resource.of(made), *observability.objects(world, proxy))

    def _tables(
        self, world: World, proxy: Proxy, opened: Iterable[GatewayListener]
    ) -> tuple[RouteTable, ...]:
        if proxy.type is ProxyType.SIDECAR:
            return (route_table(world, proxy, HTTP_PROXY_ROUTES, self._memory),)
        return tuple(
            gateway_route_table(world, proxy, chain, self._memory)
            for listener in opened
            for chain in listener.chains
        )

    def _routes(self, proxy: Proxy, table: RouteTable) -> Iterator[Part]:
        """Make routes in the form that their listener uses, and in the one it used before."""
        if scopes.is_scoped(table):
            self._scoped.add((proxy, table.name))
        if scopes.needs_one(table):
            yield scopes.one_configuration(table, self._memory)
        with_scopes = scopes.needs_scopes(table) or (proxy, table.name) in self._scoped
        if with_scopes:
            yield from scopes.scoped_routes(table, self._memory)
        if proxy.captures:
            yield from captured_routes(table, self._memory, with_scopes=with_scopes)

    def _cluster(self, world: World, target: Destination, proxy: Proxy, *, has_certificate: bool) -> Resource:
        def make() -> Resource:
            made = cluster(target, world.mesh, proxy, client_certificate=has_certificate)
            return Resource.of(made, guard=Guard("", partial(_closed, target)))

        script = proxy.script(lua.SCRIPT_SHA256)
        what = (target.cluster_name, script, proxy.version, has_certificate, world.mesh)
        return self._memory.recall((id(target.provider), what), target.provider, make)


def _closed(target: Destination) -> Resource:
    """Make what stands in for a cluster where no good version is known; who has one keeps it."""
    return Resource.of(closed_cluster(target), held=True)


def _lacking(world: World, host: HostRoutes) -> tuple[str, ...]:
    """Name the clusters of a host that lack a key or a certificate."""
    return tuple(
        target.cluster_name
        for target in host.destinations
        if secrets.lacks_a_secret(world, target.provider, target.rule)
    )


def _services(world: World, proxy: Proxy) -> Iterator[ServiceDestination]:
    """Name the services that policies have this proxy call."""
    yield from policies.services(world, proxy)
    yield from observability.services(world, proxy)


def _missing(
    world: World, proxy: Proxy, tables: Iterable[RouteTable]
) -> Iterator[tuple[ObjectKey | None, Sequence[Feature]]]:
    if proxy.version is None:
        return
    if not proxy.supports(Feature.METRICS) and telemetry.metrics(world, proxy) is not None:
        yield None, [Feature.METRICS]
    if not proxy.supports(Feature.TOKEN_LIMITS):
        newest = replace(proxy, version=None)
        for key in rate_limits.objects(world, newest):
            yield key, [Feature.TOKEN_LIMITS]
    for key in policies.that_change_late(world, proxy):
        yield key, [Feature.FILTER_CHAIN]
    if proxy.supports(Feature.FALLBACK):
        return
    served = {key for table in tables for host in table.hosts for key in host.objects}
    for routes in world.routes.values():
        for route in routes:
            if route.key in served and (features := missing_features(route, proxy)):
                yield route.key, features


def _uncertified(world: World, proxy: Proxy, merged: Merged) -> Iterator[ObjectKey]:
    if proxy.certificate is not None:
        return
    for refusal in merged.refusals:
        if refusal.reason == "NoWorkloadCertificate":
            yield refusal.served.gateway.key
    attached = [
        route
        for gateway in world.gateways_for(proxy)
        for route in world.routes_by_gateway.get(gateway.full_name, ())
    ]
    for route in (*world.routes_for(proxy), *attached):
        if route.has_backends and leads_to_mutual_tls(world, route):
            yield route.key
    yield from global_rate_limits.mutual(world, rate_limits.policies(world, proxy))


def _client_certificate(world: World, provider: LLMProvider) -> Resource | None:
    if provider.spec.tls.credential_name is None:
        return None
    try:
        return secrets.client_certificate(world, provider)
    except secrets.MissingSecretError:
        if world.incomplete:
            return Resource.unknown(SDS, secrets.client_certificate_name(provider))
        return None
