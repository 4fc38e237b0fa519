"""Services of the mesh as destinations of an LLMRoute: an egress gateway, that has the keys, foremost.

Nothing of a provider is in their clusters, no key and no LLM filter: requests are passed on as they are.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from google.protobuf.message import Message

from crds.core import Service
from crds.llmroute import BackendObjectReference
from crds.problems import ObjectKey
from translator.certificates import Certificates, client_context, spiffe
from translator.clusters import DNS, GUARD, is_ip
from translator.gateways import is_mutual
from translator.hosts import stat_name
from translator.world import World
from xds import protos

_HTTP_PROTOCOL_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_KEEP_ALIVE = timedelta(seconds=50)
_UNLIMITED = {"value": 2**32 - 1}


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
    host, port = mesh.connect_to.get((target.host, target.port), (target.host, target.port))
    options: dict[str, Any] = {
        "explicit_http_config": {"http_protocol_options": {}},
        "common_http_protocol_options": {"idle_timeout": _KEEP_ALIVE},
    }
    if certificates is not None:
        # The gateway chooses its server by the SNI: the host that the request is for.
        options["upstream_http_protocol_options"] = {"auto_sni": True}
    endpoint = {"address": {"socket_address": {"address": host, "port_value": port}}}
    made = protos.Cluster(
        name=target.cluster_name,
        alt_stat_name=stat_name(target.cluster_name),
        cluster_type=None if is_ip(host) else DNS,
        connect_timeout=mesh.config.connect_timeout,
        wait_for_warm_on_init={"value": False},
        load_assignment={
            "cluster_name": target.cluster_name,
            "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}, GUARD],
            "policy": {"overprovisioning_factor": {"value": 100 * 10_000}},
        },
        circuit_breakers={
            "thresholds": [
                {
                    "max_connections": _UNLIMITED,
                    "max_pending_requests": _UNLIMITED,
                    "max_requests": _UNLIMITED,
                    "max_retries": _UNLIMITED,
                }
            ]
        },
        common_lb_config={"healthy_panic_threshold": {"value": 0}},
        upstream_connection_options={"tcp_keepalive": {"keepalive_time": {"value": 300}}},
    )
    made.typed_extension_protocol_options[_HTTP_PROTOCOL_OPTIONS].CopyFrom(
        protos.pack(protos.HttpProtocolOptions(**options))
    )
    if certificates is not None:
        config = mesh.config
        domains = (config.trust_domain, *config.trust_domain_aliases)
        sans = [spiffe(f"{domain}/ns/{target.key.namespace}") for domain in domains]
        context = client_context(certificates, sans)
        made.transport_socket.CopyFrom(protos.TransportSocket(name="tls", typed_config=protos.pack(context)))
    return made
