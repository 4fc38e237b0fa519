"""The objects that the translator works on, and who may see which of them (design decisions 6 and 7)."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from types import MappingProxyType
from typing import Protocol, Self, TypeVar, cast

from crds.apikeyauthentication import APIKeyAuthentication
from crds.authorizationpolicy import AuthorizationPolicy
from crds.core import Secret, Service
from crds.gateway import Gateway
from crds.llmprovider import LLMProvider
from crds.llmroute import LLMRoute
from crds.llmtokenratelimit import LLMTokenRateLimit
from crds.meshconfig import MeshConfig
from crds.meta import BaseObject
from crds.problems import ObjectKey
from crds.requestauthentication import RequestAuthentication
from crds.selection import LabelSelectingSpec
from crds.telemetry import Telemetry
from crds.unreadable import UnreadablePolicy
from translator.hosts import is_bare, short_name
from translator.proxy import Proxy, ProxyType

_K = TypeVar("_K", bound=BaseObject)


class _Policy(Protocol):
    """An object that is for the workloads that it selects."""

    @property
    def spec(self) -> LabelSelectingSpec: ...


_P = TypeVar("_P", bound=_Policy)

MESH = "mesh"
"""Istio's reserved gateway name: the sidecars."""

_AGE = attrgetter("age")


@dataclass(frozen=True, slots=True, eq=False)
class MeshSettings:
    """What holds for the whole mesh.

    ``config`` is what users write, ``trusted_ca`` the PEM bundle that providers' certificates are checked
    against; ``connect_to`` maps (host, port) to the (address, port) to connect to instead, as curl's option
    of that name does.
    """

    config: MeshConfig = field(default_factory=MeshConfig)
    cluster_domain: str = "cluster.local"
    trusted_ca: bytes = b""
    connect_to: Mapping[tuple[str, int], tuple[str, int]] = field(
        default_factory=lambda: MappingProxyType({})
    )


@dataclass(frozen=True, slots=True)
class _Providers:
    """The providers of a namespace, oldest first: how their hosts are found for a workload."""

    by_host: dict[str, LLMProvider] = field(default_factory=dict)
    """Those for every workload."""
    bare: list[LLMProvider] = field(default_factory=list)
    """The same, but their host is a Service's bare name: another one in each namespace."""
    selecting: list[LLMProvider] = field(default_factory=list)
    """Those that select workloads."""


@dataclass(frozen=True)
class World:
    """Every valid object, indexed by namespace. A value: a changed object makes a new World."""

    mesh: MeshSettings = field(default_factory=MeshSettings)
    providers: Mapping[str, tuple[LLMProvider, ...]] = field(default_factory=dict)
    routes: Mapping[str, tuple[LLMRoute, ...]] = field(default_factory=dict)
    gateways: Mapping[str, tuple[Gateway, ...]] = field(default_factory=dict)
    authorization_policies: Mapping[str, tuple[AuthorizationPolicy, ...]] = field(default_factory=dict)
    request_authentications: Mapping[str, tuple[RequestAuthentication, ...]] = field(default_factory=dict)
    api_key_authentications: Mapping[str, tuple[APIKeyAuthentication, ...]] = field(default_factory=dict)
    token_rate_limits: Mapping[str, tuple[LLMTokenRateLimit, ...]] = field(default_factory=dict)
    telemetries: Mapping[str, tuple[Telemetry, ...]] = field(default_factory=dict)
    unreadable: tuple[UnreadablePolicy, ...] = ()
    """Security policies that cannot be read, and deny all to those they are for."""
    secrets: Mapping[ObjectKey, Secret] = field(default_factory=dict)
    services: Mapping[ObjectKey, Service] = field(default_factory=dict)
    held: frozenset[ObjectKey] = frozenset()
    """Providers whose key is not known at the moment: Envoys that have it keep it."""
    incomplete: bool = False
    """Some document cannot be read: what seems to be missing may be in it."""
    unread_secrets: Mapping[str, str] = field(default_factory=dict)
    """Namespaces whose Secrets cannot be read at the moment, and why."""

    @classmethod
    def of(
        cls,
        objects: Iterable[BaseObject],
        mesh: MeshSettings | None = None,
        *,
        held: Iterable[ObjectKey] = (),
        incomplete: bool = False,
        unreadable: Iterable[UnreadablePolicy] = (),
        unread_secrets: Mapping[str, str] | None = None,
    ) -> Self:
        """Index objects, in whatever order they come; kinds that nothing is made of are left out."""
        kinds: defaultdict[type[BaseObject], list[BaseObject]] = defaultdict(list)
        for item in objects:
            kinds[type(item)].append(item)

        def by_namespace(kind: type[_K]) -> Mapping[str, tuple[_K, ...]]:
            found: defaultdict[str, list[_K]] = defaultdict(list)
            for item in sorted(kinds[kind], key=_AGE):
                found[item.namespace].append(cast("_K", item))
            return {namespace: tuple(of) for namespace, of in found.items()}

        def by_key(kind: type[_K]) -> Mapping[ObjectKey, _K]:
            return {item.key: cast("_K", item) for item in kinds[kind]}

        return cls(
            mesh=mesh or MeshSettings(),
            providers=by_namespace(LLMProvider),
            routes=by_namespace(LLMRoute),
            gateways=by_namespace(Gateway),
            authorization_policies=by_namespace(AuthorizationPolicy),
            request_authentications=by_namespace(RequestAuthentication),
            api_key_authentications=by_namespace(APIKeyAuthentication),
            token_rate_limits=by_namespace(LLMTokenRateLimit),
            telemetries=by_namespace(Telemetry),
            unreadable=tuple(unreadable),
            secrets=by_key(Secret),
            services=by_key(Service),
            held=frozenset(held),
            incomplete=incomplete,
            unread_secrets=unread_secrets or {},
        )

    def lacks(self, secret: ObjectKey) -> str:
        """Say of a Secret that is not in `secrets` what that means."""
        why = self.unread_secrets.get(secret.namespace)
        what = "does not exist" if why is None else f"cannot be read: {why}"
        return f"Secret {secret.namespace}/{secret.name} {what}"

    def providers_for(self, proxy: Proxy) -> dict[str, LLMProvider]:
        """Return the provider of each host that this proxy may use, by short names (translator.hosts).

        A provider holds a key, so it reaches workloads of its own namespace only; one in the root namespace
        reaches all; ``workloadSelector`` narrows both. The most specific one wins: own namespace before
        root, selector before none, then the older, then the name.
        """
        found: dict[str, LLMProvider] = {}
        # From the least to the most specific.
        for namespace in dict.fromkeys((self.mesh.config.root_namespace, proxy.namespace)):
            of = self._providers.get(namespace, _Providers())
            found |= of.by_host
            for provider in of.bare:
                name = self._short_name(provider, proxy.namespace)
                rival = found.get(name)
                if rival is None or rival.namespace != namespace or provider.age < rival.age:
                    found[name] = provider
            for provider in reversed(of.selecting):
                if proxy.has_labels(selector_labels(provider)):
                    found[self._short_name(provider, proxy.namespace)] = provider
        return found

    def _short_name(self, provider: LLMProvider, namespace: str) -> str:
        return short_name(provider.spec.host, namespace, self.mesh.cluster_domain)

    @cached_property
    def _providers(self) -> Mapping[str, "_Providers"]:
        found: dict[str, _Providers] = {}
        for namespace, providers in self.providers.items():
            of = found[namespace] = _Providers()
            for provider in providers:
                if selector_labels(provider):
                    of.selecting.append(provider)
                elif is_bare(provider.spec.host):
                    of.bare.append(provider)
                else:
                    of.by_host.setdefault(self._short_name(provider, namespace), provider)
        return found

    @cached_property
    def providers_by_host(self) -> Mapping[str, Mapping[str, Sequence[LLMProvider]]]:
        """The providers of each namespace by the short names of their hosts, oldest first."""
        found: dict[str, defaultdict[str, list[LLMProvider]]] = {}
        for namespace, providers in self.providers.items():
            by_host = found[namespace] = defaultdict(list)
            for provider in providers:
                by_host[self._short_name(provider, namespace)].append(provider)
        return found

    def policies_for(self, proxy: Proxy, policies: Mapping[str, tuple[_P, ...]]) -> list[_P]:
        """Return the security policies of a gateway: its own namespace's, then the root's, the older first.

        A sidecar has none: they are for what comes in, and a sidecar here takes only what goes out.
        """
        if proxy.type is not ProxyType.ROUTER:
            return []
        labels = dict(proxy.labels)
        return [
            policy
            for namespace in dict.fromkeys((proxy.namespace, self.mesh.config.root_namespace))
            for policy in policies.get(namespace, ())
            if policy.spec.selects(labels, same_namespace=namespace == proxy.namespace)
        ]

    def routes_for(self, proxy: Proxy) -> list[LLMRoute]:
        """Return the mesh's LLMRoutes of this sidecar, winners first: own namespace, then root."""
        if proxy.type is not ProxyType.SIDECAR:
            return []
        return [
            route
            for namespace in dict.fromkeys((proxy.namespace, self.mesh.config.root_namespace))
            for route in self.routes.get(namespace, ())
            if MESH in route.gateways
        ]

    @cached_property
    def routes_by_gateway(self) -> Mapping[str, tuple[LLMRoute, ...]]:
        """The LLMRoutes of all namespaces by the gateways that they name (`namespace/name`), oldest first."""
        found: defaultdict[str, list[LLMRoute]] = defaultdict(list)
        for route in sorted((route for of in self.routes.values() for route in of), key=_AGE):
            for gateway in route.gateways - {MESH}:
                found[gateway].append(route)
        return {name: tuple(of) for name, of in found.items()}

    def gateways_for(self, proxy: Proxy) -> list[Gateway]:
        """Return the Gateways that select this gateway proxy, of all namespaces, oldest first."""
        if proxy.type is not ProxyType.ROUTER:
            return []
        gateways = [gateway for of in self.gateways.values() for gateway in of]
        return sorted((g for g in gateways if proxy.has_labels(g.spec.selector)), key=_AGE)


def selector_labels(provider: LLMProvider) -> Mapping[str, str]:
    """Return the labels that a workload must have to get this provider; none: every workload gets it."""
    selector = provider.spec.workload_selector
    return selector.labels if selector else {}
