"""Services of the mesh as destinations of an LLMRoute: an egress gateway, that has the keys, foremost.

Nothing of a provider is in their clusters, no key and no LLM filter: requests are passed on as they are.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from google.protobuf.message import Message

from crds.core import Service
from crds.llmprovider import ConnectionPool
from crds.llmroute import BackendObjectReference
from crds.problems import ObjectKey
from translator.certificates import Certificates, client_context, spiffe
from translator.clusters import circuit_breakers
from translator.endpoints import cluster_of
from translator.gateways import is_mutual
from translator.world import World
from xds import protos

_KEEP_ALIVE = timedelta(seconds=50)


class BackendNotFoundError(LookupError):
    """A Service or its port is not there; the text says which."""


class UnsupportedBackendError(BackendNotFoundError):
    """The kind of a backend is not supported; the text says which."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A port of a Service; each distinct one is a cluster."""

    key: ObjectKey
    host: str
    """Its name in the cluster's DNS."""
    port: int
    mutual: bool
    """Whether it is spoken to in mutual TLS of the mesh."""

    @property
    def cluster_name(self) -> str:
        """Istio's ``outbound|<port>|<subset>|<host>``."""
        return f"outbound|{self.port}||{self.host}"


def backend(world: World, ref: BackendObjectReference, namespace: str) -> Backend:
    """Look up what an object of this namespace refers to. Raises BackendNotFoundError."""
    if (ref.group, ref.kind) not in {("", "Service"), ("core", "Service")}:
        raise UnsupportedBackendError(f"{ref.kind} {ref.name} is not supported")
    key = ObjectKey("Service", ref.namespace or namespace, ref.name)
    service = world.services.get(key)
    if service is None:
        raise BackendNotFoundError(f"{key} does not exist")
    port = _port(service, ref.port)
    host = f"{key.name}.{key.namespace}.svc.{world.mesh.cluster_domain}"
    return Backend(key, host, port, is_mutual(world, service, port))


def _port(service: Service, number: int | None) -> int:
    ports = [port.port for port in service.spec.ports]
    if number is None and len(ports) == 1:
        return ports[0]
    if number not in ports:
        what = "no port is given" if number is None else f"has no port {number}"
        raise BackendNotFoundError(f"{service.key}: {what}, only {', '.join(map(str, ports)) or 'none'}")
    return number


def backend_cluster(target: Backend, world: World, certificates: Certificates | None) -> Message:
    """Make the cluster of a Service; with ``certificates`` it is spoken to in mutual TLS."""
    mesh = world.mesh
    address = target.host, target.port
    options: dict[str, Any] = {
        "explicit_http_config": {"http_protocol_options": {}},
        "common_http_protocol_options": {"idle_timeout": _KEEP_ALIVE},
    }
    if certificates is not None:
        # The gateway chooses its server by the SNI: the host that the request is for.
        options["upstream_http_protocol_options"] = {"auto_sni": True}
    made: Any = cluster_of(
        target.cluster_name,
        [mesh.connect_to.get(address, address)],
        mesh.config.connect_timeout,
        protos.HttpProtocolOptions(**options),
        guarded=True,
    )
    made.circuit_breakers.CopyFrom(circuit_breakers(ConnectionPool()))
    if certificates is not None:
        config = mesh.config
        domains = (config.trust_domain, *config.trust_domain_aliases)
        sans = [spiffe(f"{domain}/ns/{target.key.namespace}") for domain in domains]
        context = client_context(certificates, sans)
        made.transport_socket.CopyFrom(protos.TransportSocket(name="tls", typed_config=protos.pack(context)))
    return made
