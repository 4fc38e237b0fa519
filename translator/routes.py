"""Which hosts a proxy serves: LLMRoutes and LLMProviders -> virtual hosts.

On a sidecar each LLMRoute of the mesh, and each LLMProvider without one. On a gateway what LLMRoutes attach
to its Gateways, as VirtualServices do in Istio (networking/v1alpha3/gateway.proto, ``hosts``).

A changed route configuration is made anew by Envoy, all of it. So on a sidecar providers without an LLMRoute
have no virtual host of their own: a catch-all virtual host leads to the cluster that is named after the
request's host, and to add a provider is to add a cluster (translator.plain_providers).
"""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple, Self

from google.protobuf.message import Message

from crds.llmprovider import MAX_REQUEST_BYTES, LLMProvider
from crds.llmroute import LLMRoute
from crds.problems import ObjectKey
from translator.backends import Backend
from translator.clusters import Destination
from translator.features import Feature
from translator.gateways import Chain, intersection
from translator.hosts import authority, domains, names_of, scope_key, service_name, short_name
from translator.memory import Memory
from translator.plain_providers import PLAIN, is_written_otherwise
from translator.proxy import Proxy, ProxyType
from translator.rules import NOT_FORWARDED, Rules, Targets, applies, sending
from translator.world import MESH, MeshSettings, World
from xds import protos

ROUTES_HEADER = "x-envoy-llmplane-routes"
"""What a listener tells its routes: a sidecar's, the cluster of the plain provider that has the request's
host, if there is one; a gateway's, which listener it is (translator.scopes). Clients cannot set it."""

NORMAL_HOST = "normal_host"
"""Name of a listener's filter that writes the host as routes and clusters are named."""


@dataclass(frozen=True, slots=True, eq=False)
class HostRoutes:
    """The virtual host of LLMRoutes or of a provider, and the destinations that it leads to."""

    virtual_host: Message
    """Of a plain provider the catch-all virtual host."""
    names: tuple[str, ...]
    """The domains of the virtual host; of a plain provider the names of its host."""
    short_name: str
    """What all of them have in common (translator.hosts)."""
    destinations: tuple[Destination, ...]
    backends: tuple[Backend, ...]
    objects: tuple[ObjectKey, ...]
    place: int
    """A hash of the host, 64 bits."""
    bucket: int
    """The same for all hosts that have a scope in common (translator.scopes)."""
    removes: bool
    """Whether its routes themselves remove the headers that are not forwarded."""
    secrets: tuple[ObjectKey, ...]
    """The Secrets that the providers among the destinations refer to."""
    reachable: tuple[str, ...]
    """The hosts of clusters to which the catch-all virtual host, if it took their names, would lead."""

    @classmethod
    def of(
        cls,
        virtual_host: Any,
        names: "_Names",
        destinations: Iterable[Destination],
        backends: Iterable[Backend],
        objects: Iterable[ObjectKey],
        *,
        removes: bool,
    ) -> Self:
        """Put them together."""
        leads_to, services = tuple(destinations), tuple(backends)
        return cls(
            virtual_host,
            names.all,
            names.main,
            leads_to,
            services,
            tuple(objects),
            _hash(names.main),
            _hash(names.bucket),
            removes,
            tuple(dict.fromkeys(key for target in leads_to for key in target.provider.secrets)),
            (
                *(target.host for target in leads_to if not target.rule and not target.host_rewrite),
                *(service.host for service in services if service.cluster_name == PLAIN + service.host),
            ),
        )


@dataclass(frozen=True, slots=True)
class RouteTable:
    """The routes of one proxy."""

    name: str
    hosts: tuple[HostRoutes, ...]
    """Those with a virtual host of their own."""
    can_be_scoped: bool
    """Whether Envoy is new enough for scoped routes."""
    has_wildcards: bool
    """Whether a host stands for many."""
    listener: str | None = None
    """What tells its scopes from those of other listeners; a sidecar has only one."""
    plain: tuple[HostRoutes, ...] = ()
    """Providers that the catch-all virtual host leads to."""
    catch_all: Message | None = None
    """Its routes are one for hosts that are not in lower case, and the one that leads to the cluster."""

    @property
    def routes(self) -> Message:
        """All of it as one route configuration."""
        return route_configuration(self.name, self.hosts, self.catch_all)

    @property
    def backends(self) -> Mapping[Backend, tuple[ObjectKey, ...]]:
        """The Services that the routes lead to, and the LLMRoutes that name them."""
        found: defaultdict[Backend, dict[ObjectKey, None]] = defaultdict(dict)
        for host in self.hosts:
            for backend in host.backends:
                found[backend].update(dict.fromkeys(host.objects))
        return {backend: tuple(keys) for backend, keys in found.items()}


def has_catch_all(proxy: Proxy) -> bool:
    """Whether the routes of a proxy have a catch-all virtual host, unless an LLMRoute takes all hosts."""
    if proxy.type is not ProxyType.SIDECAR:
        return False
    return not proxy.captures or proxy.supports(Feature.ROUTE_CACHE)


def route_table(world: World, proxy: Proxy, name: str, memory: Memory | None = None) -> RouteTable:
    """Make the routes of a sidecar: for each LLMRoute and each provider without one.

    A domain belongs to the first that claims it: two virtual hosts with one domain would make Envoy refuse
    the whole route configuration.
    """
    routes = world.routes_for(proxy)
    maker = _Maker(world, proxy, memory or Memory(), routes)
    hosts: list[HostRoutes] = []
    taken: set[str] = set()
    wildcards: list[str] = []
    for route in routes:
        names = _Names.of(route.spec.host, route.namespace, world, proxy)
        free = names.without(taken)
        if not free.all:
            continue
        if free.main.startswith("*"):
            wildcards.append(free.main[1:])
        taken.update(free.all)
        hosts.append(maker.of_route(route, free))
    # As in Istio, a route with a wildcard host comes before the providers below it.
    routed = tuple(wildcards)
    plain: list[HostRoutes] = []
    for host in sorted(maker.providers):
        made = maker.of_provider(maker.providers[host], taken, routed)
        if made is not None:
            taken.update(made.names)
            (plain if made.virtual_host is maker.catch_all else hosts).append(made)
    catch_all = None if "*" in taken else maker.catch_all
    if catch_all is not None:
        served = {target.host for of in plain for target in of.destinations}
        domain = world.mesh.cluster_domain
        reachable = {host for of in hosts for host in of.reachable} - served
        for host in sorted(host for host in reachable if short_name(host, "", domain) == host):
            made = maker.of_nobody(host, taken, routed)
            if made is not None:
                hosts.append(made)
    return RouteTable(
        name,
        tuple(hosts),
        proxy.supports(Feature.SCOPED_ROUTES),
        bool(wildcards),
        plain=tuple(plain),
        catch_all=catch_all,
    )


def gateway_route_table(world: World, proxy: Proxy, chain: Chain, memory: Memory | None = None) -> RouteTable:
    """Make the routes of a gateway's filter chain: only what LLMRoutes attach to its Gateways.

    The names of a virtual host are those that server and route have in common. Routes with a name in common
    are put together, the older first, but what takes all requests last (Istio's SortVHostRoutes). Names for
    which TLS clients come by another chain are not served: that one may ask them for a certificate.
    """
    attached = [
        (served, route)
        for served in chain.servers
        for route in world.routes_by_gateway.get(served.gateway.full_name, ())
    ]
    maker = _Maker(world, proxy, memory or Memory(), [route for _, route in attached])
    names: dict[str, tuple[str, dict[Rules, None]]] = {}
    redirected: set[str] = set()
    for served, route in attached:
        gateway = served.gateway
        hosts = domains(route.spec.host, route.namespace, "", world.mesh.cluster_domain)
        open_hosts = map(authority, served.server.hosts_for(route.namespace, gateway.namespace))
        common = intersection(tuple(open_hosts), hosts)
        if not common:
            continue
        rules = maker.rules(route, gateway.full_name)
        for name in common:
            names.setdefault(name, (hosts[-1] if name in hosts else name, {}))[1][rules] = None
        if served.server.https_redirect:
            redirected.update(common)
    for server in (served.server for served in chain.servers if served.server.https_redirect):
        redirected.update(server.open_names)
        for name in server.open_names:
            names.setdefault(name, (name, {}))
    groups: defaultdict[tuple[str, tuple[Rules, ...], bool], list[str]] = defaultdict(list)
    for name, (main, attached_rules) in names.items():
        if chain.others and not chain.takes(name):
            continue
        by_age = sorted(attached_rules, key=lambda of: of.route.age)
        groups[main, tuple(by_age), name in redirected].append(name)
    made = [
        maker.on_gateway(main, tuple(of), by_age, redirect=redirect)
        for (main, by_age, redirect), of in groups.items()
    ]
    others: defaultdict[str, list[str]] = defaultdict(list)
    for name in chain.others:
        others[scope_key(name)].append(name)
    made += [maker.of_other_connections(key, tuple(of)) for key, of in others.items()]
    has_wildcards = any(name.startswith("*") for name in names)
    can_be_scoped = proxy.supports(Feature.SCOPED_ROUTES)
    return RouteTable(chain.routes, tuple(made), can_be_scoped, has_wildcards, listener=chain.routes)


def route_configuration(name: str, hosts: Sequence[HostRoutes], catch_all: Message | None = None) -> Message:
    """Make a route configuration of these hosts."""
    # The headers are on the route configuration and not on each route, where they can be: bytes on the wire.
    removes = any(host.removes for host in hosts)
    return protos.RouteConfiguration(
        name=name,
        virtual_hosts=[*(host.virtual_host for host in hosts), *([catch_all] if catch_all else [])],
        request_headers_to_remove=[ROUTES_HEADER] if removes else NOT_FORWARDED,
    )


class _Names(NamedTuple):
    """The names of a host."""

    all: tuple[str, ...]
    main: str
    """The one that is the same for all clients, whichever others there are."""
    bucket: str
    """What the number of their bucket is a hash of."""

    @classmethod
    def of(cls, host: str, namespace: str, world: World, proxy: Proxy) -> Self:
        """Return all names by which a client beside a proxy may call a host of an object's namespace."""
        domain = world.mesh.cluster_domain
        names = domains(host, namespace, proxy.namespace, domain)
        main = authority(short_name(host, namespace, domain))
        return cls(tuple(names), main, cls._bucket(main, proxy))

    def without(self, taken: AbstractSet[str], endings: tuple[str, ...] = ()) -> "_Names":
        """Return those that no other object has, by itself or by its ending."""
        names = (name for name in self.all if name not in taken and not name.endswith(endings))
        return self._replace(all=tuple(names))

    @staticmethod
    def _bucket(name: str, proxy: Proxy) -> str:
        key = scope_key(name)
        # `chat.svc.example.com` has the scope of the bare name of a Service.
        return key if "." in key else f"{key}.{proxy.namespace}"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


class _Circumstances(NamedTuple):
    """All that the routes of an LLMRoute depend on, besides the object itself."""

    key: tuple[Hashable, ...]
    targets: Targets
    applying: tuple[bool, ...]
    mesh: MeshSettings


class _Maker:
    """Makes the virtual hosts of one route configuration."""

    def __init__(self, world: World, proxy: Proxy, memory: Memory, routes: Sequence[LLMRoute]) -> None:
        self.providers = world.providers_for(proxy)
        self._world = world
        self._proxy = proxy
        self._memory = memory
        # A Service gets the headers that a provider does not get, such as those that a gateway checks.
        self._removes = any(route.has_backends for route in routes)
        circumstances = ("hosts of providers", self._removes, world.mesh, has_catch_all(proxy))
        self._for_all = memory.part(*circumstances)
        self._for_namespace = memory.part(*circumstances, proxy.namespace)
        self.catch_all: Message | None = None
        if has_catch_all(proxy):
            self.catch_all = self._for_all.recall("catch-all", None, self._made_catch_all)

    def rules(self, route: LLMRoute, gateway: str = MESH) -> Rules:
        """Make the routes of an LLMRoute for requests that come in by a gateway."""
        circumstances = self._circumstances(route, gateway)
        key = ("rules", id(route), *circumstances.key)
        return self._memory.recall(key, (route, circumstances), lambda: self._rules(route, circumstances))

    def of_route(self, route: LLMRoute, names: _Names) -> HostRoutes:
        """Make the virtual host of an LLMRoute."""
        circumstances = self._circumstances(route, MESH)

        def make() -> HostRoutes:
            rules = self._rules(route, circumstances)
            made = self._virtual_host(route.spec.host, names.all, rules.routes)
            return HostRoutes.of(
                made, names, rules.destinations, rules.backends, (route.key,), removes=self._removes
            )

        return self._memory.recall((id(route), names, *circumstances.key), (route, circumstances), make)

    def _circumstances(self, route: LLMRoute, gateway: str) -> "_Circumstances":
        targets = Targets.of(self._world, route, self.providers, self._proxy)
        applying = applies(route, self._proxy, gateway)
        mesh = self._world.mesh
        key = (targets.identity, applying, self._proxy.version, self._removes, id(mesh))
        return _Circumstances(key, targets, applying, mesh)

    def _rules(self, route: LLMRoute, circumstances: "_Circumstances") -> Rules:
        return Rules.of(
            route,
            circumstances.targets,
            circumstances.applying,
            self._proxy,
            cluster_domain=circumstances.mesh.cluster_domain,
            removes=self._removes,
        )

    def of_provider(
        self, provider: LLMProvider, taken: AbstractSet[str], routed: tuple[str, ...]
    ) -> HostRoutes | None:
        """Make the virtual host of a provider without a route, with the names that are not taken.

        None if there is no such name, or if the provider is not exported to the proxy's namespace. ``routed``
        are endings of names that LLMRoutes with a wildcard host take.
        """
        # Nearly all providers are the same for all proxies: then this is all that a provider costs.
        made = self._for_all.recall(id(provider), provider, lambda: self._made_for_all(provider))
        if made is None:
            made = self._for_namespace.recall(id(provider), provider, lambda: self._made_here(provider))
        if made is None:
            return None
        if taken.isdisjoint(made.names) and not (routed and any(n.endswith(routed) for n in made.names)):
            return made
        names = self._names(provider).without(taken, routed)
        make = partial(self._made, provider, names)
        return self._for_namespace.recall((id(provider), names), provider, make) if names.all else None

    def _names(self, provider: LLMProvider) -> _Names:
        return _Names.of(provider.spec.host, self._proxy.namespace, self._world, self._proxy)

    def _made_for_all(self, provider: LLMProvider) -> HostRoutes | None:
        """Make what is the same for proxies of all namespaces, or None where these count."""
        domain = self._world.mesh.cluster_domain
        is_service = service_name(provider.spec.host, self._proxy.namespace, domain) is not None
        if is_service or "." not in scope_key(provider.spec.host) or not provider.is_exported_to_all:
            return None
        return self._made(provider, self._names(provider))

    def _made_here(self, provider: LLMProvider) -> HostRoutes | None:
        if not provider.exported_to(self._proxy.namespace):
            return None
        return self._made(provider, self._names(provider))

    def _made(self, provider: LLMProvider, names: _Names) -> HostRoutes:
        short = short_name(provider.spec.host, self._proxy.namespace, self._world.mesh.cluster_domain)
        target = Destination.of(provider, short)
        made = self.catch_all
        if made is None:
            route = self._default_route({"cluster": target.cluster_name})
            made = self._virtual_host(provider.spec.host, names.all, [route])
        return HostRoutes.of(made, names, (target,), (), (provider.key,), removes=self._removes)

    def _default_route(
        self, destination: Mapping[str, Any], headers: Sequence[Mapping[str, Any]] = (), **more: Any
    ) -> Message:
        return protos.Route(
            name="default",
            match={"prefix": "/", "headers": headers},
            route={**destination, **sending(None, [])},
            request_headers_to_remove=NOT_FORWARDED if self._removes else (),
            **more,
        )

    def _made_catch_all(self) -> Message:
        by_host = {"cluster_header": ROUTES_HEADER, "cluster_not_found_response_code": "NOT_FOUND"}
        regex = is_written_otherwise(self._world.mesh.cluster_domain)
        otherwise = {"name": ":authority", "string_match": {"safe_regex": {"regex": regex}}}
        enabled = protos.FilterConfig(config={})
        filters = {NORMAL_HOST: protos.pack(enabled)}
        routes = [
            self._default_route(by_host, [otherwise], typed_per_filter_config=filters),
            self._default_route(by_host),
        ]
        return self._virtual_host("plain providers", ["*"], routes)

    def of_nobody(self, short: str, taken: AbstractSet[str], routed: tuple[str, ...]) -> HostRoutes | None:
        """Make the virtual host of names that the catch-all virtual host must not take; None: all are taken.

        They would lead to a cluster that is there for LLMRoutes alone: of a provider that is not exported to
        the proxy's namespace, or whose host is an LLMRoute's, too.
        """
        namespace, domain = self._proxy.namespace, self._world.mesh.cluster_domain
        every = _Names.of(short, namespace, self._world, self._proxy)
        every = every._replace(all=tuple(names_of(short, namespace, domain)))
        names = every.without(taken, routed)
        if not names.all:
            return None

        def make() -> HostRoutes:
            made = protos.VirtualHost(name=names.all[0], domains=names.all)
            return HostRoutes.of(made, names, (), (), (), removes=self._removes)

        return self._for_all.recall(("nobody", names), None, make)

    def on_gateway(
        self, main: str, names: tuple[str, ...], rules: tuple[Rules, ...], *, redirect: bool
    ) -> HostRoutes:
        """Make the virtual host of the LLMRoutes that share some names."""
        mesh = self._world.mesh

        def make() -> HostRoutes:
            routes: list[Any] = [route for of in rules for route in of.routes]
            routes.sort(key=lambda route: not route.match.headers)
            made = self._virtual_host(names[0], names, routes, require_tls="ALL" if redirect else "NONE")
            return HostRoutes.of(
                made,
                _Names(names, main, scope_key(main)),
                dict.fromkeys(target for of in rules for target in of.destinations),
                dict.fromkeys(target for of in rules for target in of.backends),
                (of.route.key for of in rules),
                removes=self._removes,
            )

        key = ("host", main, names, tuple(map(id, rules)), redirect, id(mesh))
        return self._memory.recall(key, (rules, mesh), make)

    def of_other_connections(self, key: str, names: tuple[str, ...]) -> HostRoutes:
        """Make the virtual host of names that are served on connections for other TLS server names only."""
        refusal = protos.Route(
            match={"prefix": "/"}, direct_response={"status": HTTPStatus.MISDIRECTED_REQUEST}
        )
        made = self._virtual_host(f"misdirected {key}", names, [refusal])
        return HostRoutes.of(made, _Names(names, names[0], key), (), (), (), removes=self._removes)

    def _virtual_host(
        self, name: str, names: Sequence[str], routes: Sequence[Message], **more: Any
    ) -> Message:
        limit = {"value": MAX_REQUEST_BYTES}
        return protos.VirtualHost(
            name=name, domains=names, routes=routes, request_body_buffer_limit=limit, **more
        )
