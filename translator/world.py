"""The objects that the translator works on, and who may see which of them (design decisions 6 and 7)."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Self

from crds.core import Secret
from crds.llmprovider import LLMProvider
from crds.llmroute import LLMRoute
from crds.meta import BaseObject
from crds.problems import ObjectKey
from translator.proxy import Proxy, ProxyType

MESH = "mesh"
"""Istio's reserved gateway name: the sidecars."""


@dataclass(frozen=True, slots=True, eq=False)
class MeshSettings:
    """What holds for the whole mesh.

    ``trusted_ca`` is the PEM bundle that providers' certificates are checked against; ``connect_to`` maps
    (host, port) to the (address, port) to connect to instead, as curl's option of that name does;
    ``max_request_bytes`` bounds the body of an LLM request.
    """

    root_namespace: str = "istio-system"
    proxy_http_port: int = 15080
    connect_timeout: timedelta = timedelta(seconds=10)
    cluster_domain: str = "cluster.local"
    trusted_ca: bytes = b""
    connect_to: Mapping[tuple[str, int], tuple[str, int]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    max_request_bytes: int = 32 * 1024 * 1024


@dataclass(frozen=True)
class World:
    """Every valid object, indexed by namespace. A value: a changed object makes a new World."""

    mesh: MeshSettings = field(default_factory=MeshSettings)
    providers: Mapping[str, tuple[LLMProvider, ...]] = field(default_factory=dict)
    routes: Mapping[str, tuple[LLMRoute, ...]] = field(default_factory=dict)
    secrets: Mapping[ObjectKey, Secret] = field(default_factory=dict)
    held: frozenset[ObjectKey] = frozenset()
    """Providers whose key is not known at the moment: Envoys that have it keep it."""
    incomplete: bool = False
    """Some document cannot be read: what seems to be missing may be in it."""

    @classmethod
    def of(
        cls,
        objects: Iterable[BaseObject],
        mesh: MeshSettings | None = None,
        *,
        held: Iterable[ObjectKey] = (),
        incomplete: bool = False,
    ) -> Self:
        """Index objects, in whatever order they come; kinds that nothing is made of are left out."""
        providers: defaultdict[str, list[LLMProvider]] = defaultdict(list)
        routes: defaultdict[str, list[LLMRoute]] = defaultdict(list)
        secrets: dict[ObjectKey, Secret] = {}
        for item in objects:
            match item:
                case LLMProvider():
                    providers[item.metadata.namespace].append(item)
                case LLMRoute():
                    routes[item.metadata.namespace].append(item)
                case Secret():
                    secrets[item.key] = item
        return cls(
            mesh=mesh or MeshSettings(),
            providers={namespace: tuple(sorted(of, key=_age)) for namespace, of in providers.items()},
            routes={namespace: tuple(sorted(of, key=_age)) for namespace, of in routes.items()},
            secrets=secrets,
            held=frozenset(held),
            incomplete=incomplete,
        )

    def providers_for(self, proxy: Proxy) -> dict[str, LLMProvider]:
        """Return the provider of each host that this proxy may use.

        A provider holds a key, so it reaches workloads of its own namespace only; one in the root namespace
        reaches all; ``workloadSelector`` narrows both. The most specific one wins: own namespace before
        root, selector before none, then the older, then the name.
        """
        found: dict[str, LLMProvider] = {}
        for namespace in dict.fromkeys((proxy.namespace, self.mesh.root_namespace)):
            selecting = [p for p in self.providers.get(namespace, ()) if proxy.has_labels(selector_labels(p))]
            for provider in sorted(selecting, key=lambda p: not selector_labels(p)):
                found.setdefault(provider.spec.host, provider)
        return found

    def routes_for(self, proxy: Proxy) -> list[LLMRoute]:
        """Return the mesh's LLMRoutes of this sidecar, winners first: own namespace, then root."""
        if proxy.type is not ProxyType.SIDECAR:
            return []
        return [
            route
            for namespace in dict.fromkeys((proxy.namespace, self.mesh.root_namespace))
            for route in self.routes.get(namespace, ())
            if MESH in route.gateways
        ]


def selector_labels(provider: LLMProvider) -> Mapping[str, str]:
    """Return the labels that a workload must have to get this provider; none: every workload gets it."""
    selector = provider.spec.workload_selector
    return selector.labels if selector else {}


def _age(item: LLMProvider | LLMRoute) -> tuple[str, str]:
    """Sort the older first, objects without a timestamp (files) by name alone."""
    created = item.metadata.creation_timestamp
    return (created.isoformat() if created else "", item.metadata.name)
