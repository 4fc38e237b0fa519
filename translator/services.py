"""Services that Envoy itself calls, not on behalf of a client: authorization, key sets, collectors.

Their clusters have no LLM filters and no key; their names differ from those of provider clusters, so that a
provider with the same host keeps its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

from google.protobuf.message import Message

from translator import secrets
from translator.certificates import Certificates
from translator.endpoints import cluster_of, is_ip
from translator.world import MeshSettings
from xds import protos

_ADS = {"ads": {}, "resource_api_version": "V3"}


@dataclass(frozen=True, slots=True)
class ServiceDestination:
    """A service by its host and port, and how it is spoken to; each distinct one is a cluster."""

    host: str
    port: int
    tls: bool = False
    """Verified against the mesh's trust roots, by its host."""
    http2: bool = False
    """As gRPC needs."""
    mutual: bool = False
    """With the certificate of the proxy's workload, if it has one."""

    @classmethod
    def of(
        cls, service: str, port: int, *, tls: bool = False, http2: bool = False, mutual: bool = False
    ) -> Self:
        """Read Istio's ``[<namespace>/]<host>`` of an extensionProvider (MeshConfig.ExtensionProvider)."""
        return cls(service.rpartition("/")[2], port, tls=tls, http2=http2, mutual=mutual)

    @property
    def cluster_name(self) -> str:
        """In the form of Istio's names, with what the service is spoken to by in front."""
        scheme = ("grpc" if self.http2 else "http") + ("s" if self.tls else "") + ("-mutual" * self.mutual)
        return f"service|{self.port}|{scheme}|{self.host}"


def service_cluster(
    service: ServiceDestination, mesh: MeshSettings, certificates: Certificates | None = None
) -> Message:
    """Make the cluster of a service. A name that does not resolve delays no other cluster.

    ``certificates`` are the workload's, for a service that is ``mutual``.
    """
    address = service.host, service.port
    http: dict[str, Any] = {"http2_protocol_options": {}} if service.http2 else {"http_protocol_options": {}}
    options = protos.HttpProtocolOptions(explicit_http_config=http)
    addresses = [mesh.connect_to.get(address, address)]
    made: Any = cluster_of(service.cluster_name, addresses, mesh.config.connect_timeout, options)
    if service.tls:
        made.transport_socket.CopyFrom(_tls(service.host, certificates.own if certificates else ()))
    return made


def http_uri(service: ServiceDestination, path: str, timeout: timedelta) -> Message:
    """Make the address of an HTTP service (envoy.config.core.v3.HttpUri)."""
    scheme = "https" if service.tls else "http"
    uri = f"{scheme}://{service.host}:{service.port}{path}"
    return protos.HttpUri(uri=uri, cluster=service.cluster_name, timeout=timeout)


def _tls(host: str, own: Iterable[str]) -> Message:
    validation: dict[str, Any] = {}
    if is_ip(host):  # no SNI for addresses: the certificate must be for the address
        validation = {
            "match_typed_subject_alt_names": [{"san_type": "IP_ADDRESS", "matcher": {"exact": host}}]
        }
    context = protos.UpstreamTlsContext(
        common_tls_context={
            "combined_validation_context": {
                "default_validation_context": validation,
                "validation_context_sds_secret_config": {"name": secrets.ROOT_CA, "sds_config": _ADS},
            },
            "tls_certificate_sds_secret_configs": [{"name": name, "sds_config": _ADS} for name in own],
        },
        sni="" if is_ip(host) else host,
        auto_sni_san_validation=not is_ip(host),
    )
    return protos.TransportSocket(name="tls", typed_config=protos.pack(context))
