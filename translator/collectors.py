"""How Envoy reaches OpenTelemetry collectors."""

from google.protobuf.message import Message

from crds.extensionprovider import HttpService
from translator.services import ServiceDestination, http_uri
from xds import protos


def grpc_service(collector: ServiceDestination) -> Message:
    """Reach a collector over gRPC (envoy.config.core.v3.GrpcService)."""
    return protos.GrpcService(
        envoy_grpc={"cluster_name": collector.cluster_name, "authority": collector.host}
    )


def http_service(collector: ServiceDestination, http: HttpService) -> Message:
    """Reach a collector over HTTP (envoy.config.core.v3.HttpService)."""
    return protos.HttpService(
        http_uri=http_uri(collector, http.path, http.timeout),
        request_headers_to_add=[
            # A header value is a format string.
            {"header": {"key": header.name, "value": header.value.replace("%", "%%")}}
            for header in http.headers
        ],
    )
