"""LLMProvider -> cluster: everything of a provider lives in its cluster's upstream HTTP filter chain.

Upstream filters run again for each attempt, after the cluster was picked and on the client's original body:
a retry on another provider gets that provider's model, path, host and key (design decision 1).
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

from google.protobuf.message import Message

from crds.llmprovider import MAX_REQUEST_BYTES, ConnectionPool, LLMProvider, OutlierDetection
from translator import lua, older_envoy, secrets
from translator.endpoints import cluster_of, is_ip
from translator.errors import LIMIT_METADATA
from translator.features import Feature
from translator.hosts import authority, stat_name
from translator.operations import operations
from translator.proxy import Proxy
from translator.world import MeshSettings
from xds import protos

_UNLIMITED = 2**32 - 1
BUFFER_SLACK = 64 * 1024
"""Envoy refuses a body that just fits into its buffer, and rounds limits below 1 MiB up to it."""
HOST_METADATA = ("llm", "host")
"""Namespace and key of a cluster's metadata that hold the host of its provider."""
_ADS = {"ads": {}, "resource_api_version": "V3"}

_ERRORS_WITH_429 = {
    "http_response_headers_match": {
        "headers": [{"name": ":status", "string_match": {"safe_regex": {"regex": "429|5.."}}}]
    }
}
"""Which answers outlier detection counts. It replaces Envoy's own rule, so that 5xx has to be in it."""


@dataclass(frozen=True, slots=True, eq=False)
class Destination:
    """A provider as one rule uses it; each distinct one is a cluster."""

    provider: LLMProvider
    host: str
    """The provider's host, of a Service its short name."""
    rule: str | None
    """Name of the ``routeSpecificConfigs`` entry, None for ``defaultConfig``."""
    host_rewrite: str | None
    """``:authority`` to send, where it is not the provider's host."""

    @classmethod
    def of(
        cls, provider: LLMProvider, host: str, rule: str | None = None, host_rewrite: str | None = None
    ) -> Self:
        """Normalise: a rule without an entry uses the default, a rewrite to the own host is none.

        ``host`` is the short name of the provider's host (translator.hosts).
        """
        return cls(
            provider,
            host,
            rule if rule in provider.spec.configs.route_specific_configs else None,
            host_rewrite if host_rewrite != provider.spec.host else None,
        )

    @property
    def cluster_name(self) -> str:
        """Istio's ``outbound|<port>|<subset>|<host>``, the rule's name in the subset's place.

        It stays the same whatever changes of the provider, so that an Envoy that refuses the change, and
        those that come later, keep the version before.
        """
        subset = (self.rule or "") + (f"@{self.host_rewrite}" if self.host_rewrite else "")
        return f"outbound|443|{subset}|{authority(self.host)}"

    def __eq__(self, other: object) -> bool:
        """Two uses are one when they make the same cluster (a host has one provider for a proxy)."""
        return isinstance(other, Destination) and self.cluster_name == other.cluster_name

    def __hash__(self) -> int:
        return hash(self.cluster_name)


def cluster(target: Destination, mesh: MeshSettings, proxy: Proxy, *, client_certificate: bool) -> Message:
    """Make the cluster of a destination; of the proxy, its version and where its Lua script lies count.

    ``client_certificate`` says that the certificate of ``tls.credentialName`` is there (a cluster that waits
    for one would hold up its whole update).
    """
    spec = target.provider.spec
    pool, outliers = spec.traffic_policy.connection_pool, spec.traffic_policy.outlier_detection
    options = protos.HttpProtocolOptions(
        # HTTP/1.1: a connection a stream, so that one that breaks takes no other stream with it.
        explicit_http_config={"http_protocol_options": {}},
        # By default shorter than what providers allow (60 s and more): a request on a connection that the
        # other side is just closing fails, and is not retried.
        common_http_protocol_options={"idle_timeout": pool.http.idle_timeout},
        http_filters=_upstream_filters(target, mesh, proxy),
        outlier_detection={"error_matcher": _ERRORS_WITH_429} if outliers and outliers.count_429 else None,
    )
    made: Any = cluster_of(
        target.cluster_name,
        [mesh.connect_to.get(address, address) for address in spec.addresses],
        pool.tcp.connect_timeout or mesh.config.connect_timeout,
        options,
        guarded=True,
    )
    made.circuit_breakers.CopyFrom(circuit_breakers(pool))
    # Metrics show it, also for requests that no host of the cluster got.
    made.metadata.filter_metadata[HOST_METADATA[0]].update({HOST_METADATA[1]: spec.host})
    if spec.max_request_bytes != MAX_REQUEST_BYTES:
        namespace, key = LIMIT_METADATA
        made.metadata.filter_metadata[namespace].update({key: str(spec.max_request_bytes)})
    if spec.tls.mode != "DISABLE":
        made.transport_socket.CopyFrom(_tls(target.provider, client_certificate=client_certificate))
    if outliers is not None:
        made.outlier_detection.CopyFrom(_outlier_detection(outliers))
    return made


def closed_cluster(target: Destination) -> Message:
    """Make a cluster without hosts, for a destination whose own one cannot be used.

    Else a host that only its cluster makes known would be unknown: captured requests for it would pass on.
    """
    made: Any = protos.Cluster(
        name=target.cluster_name,
        alt_stat_name=stat_name(target.cluster_name),
        connect_timeout=timedelta(seconds=1),
    )
    made.metadata.filter_metadata[HOST_METADATA[0]].update({HOST_METADATA[1]: target.provider.spec.host})
    return made


def _upstream_filters(target: Destination, mesh: MeshSettings, proxy: Proxy) -> list[dict[str, Any]]:
    provider = target.provider
    config = provider.spec.config_for(target.rule)
    limit = None if provider.spec.max_request_bytes == MAX_REQUEST_BYTES else provider.spec.max_request_bytes
    context = lua.filter_context(
        authority(target.host_rewrite or provider.spec.host),
        operations(provider.spec, config),
        mesh.config.llm_metrics.max_client_models,
        limit,
    )
    filters = [("llm.provider", _lua(context, proxy))]
    if limit is not None:
        largest = min(limit + BUFFER_SLACK, _UNLIMITED)
        # In front: it bounds what Envoy holds for the script, in place of the limit of the route.
        filters.insert(0, ("llm.limit", protos.Buffer(max_request_bytes={"value": largest})))
    key = secrets.api_key_name(provider, target.rule)
    if key is not None:
        filters.append(("llm.key", _credential_injector(key, proxy)))
    filters.append(("codec", protos.UpstreamCodec()))
    return [{"name": name, "typed_config": protos.pack(config)} for name, config in filters]


def _lua(context: dict[str, Any], proxy: Proxy) -> Message:
    file = proxy.script(lua.SCRIPT_SHA256)
    if not proxy.supports(Feature.LUA_CONTEXT):
        has_filter_state = proxy.supports(Feature.LUA_FILTER_STATE)
        text = older_envoy.source(context, file, has_filter_state=has_filter_state)
        return protos.Lua(default_source_code={"inline_string": text})
    # In the file that the bootstrap laid down or, without one, here.
    source = {"filename": file} if file is not None else {"inline_string": lua.SCRIPT}
    return protos.Lua(shared_vm_id="llm", default_source_code=source, filter_context=protos.struct(context))


def _credential_injector(secret_name: str, proxy: Proxy) -> Message:
    credential = protos.GenericCredential(
        header=lua.CREDENTIAL_HEADER,
        header_value_prefix=secrets.BEARER if proxy.supports(Feature.CREDENTIAL_PREFIX) else None,
        credential={"name": secret_name, "sds_config": _ADS},
    )
    return protos.CredentialInjector(
        overwrite=True,
        credential={
            "name": "key",
            "typed_config": protos.pack(credential),
        },
    )


def _tls(provider: LLMProvider, *, client_certificate: bool) -> Message:
    """TLS to a provider, its certificate and name verified (design decision 16)."""
    settings = provider.spec.tls
    sni = settings.sni or provider.spec.host
    validation: dict[str, Any] = {}
    if settings.ca_certificates:
        validation["trusted_ca"] = {"filename": settings.ca_certificates}
    if is_ip(sni):  # TLS has no SNI for addresses: the certificate is checked for the address instead
        sni = ""
        validation["match_typed_subject_alt_names"] = [
            {"san_type": "IP_ADDRESS", "matcher": {"exact": provider.spec.host}}
        ]
    common: dict[str, Any] = {}
    if settings.insecure_skip_verify:
        pass
    elif settings.ca_certificates:
        common["validation_context"] = validation
    else:
        common["combined_validation_context"] = {
            "default_validation_context": validation,
            "validation_context_sds_secret_config": {"name": secrets.ROOT_CA, "sds_config": _ADS},
        }
    if client_certificate:
        name = secrets.client_certificate_name(provider)
        common["tls_certificate_sds_secret_configs"] = [{"name": name, "sds_config": _ADS}]
    context = protos.UpstreamTlsContext(
        common_tls_context=common,
        sni=sni,
        auto_sni_san_validation=bool(sni) and not settings.insecure_skip_verify,
    )
    return protos.TransportSocket(name="tls", typed_config=protos.pack(context))


def circuit_breakers(pool: ConnectionPool) -> Message:
    """Make circuit breakers, in Istio a connection pool. Envoy's own defaults would be limits, too."""
    limits = {
        "max_connections": pool.tcp.max_connections,
        "max_pending_requests": pool.http.http1_max_pending_requests,
        "max_requests": pool.http.http2_max_requests,
        "max_retries": pool.http.max_retries,
    }
    thresholds = {name: {"value": limit or _UNLIMITED} for name, limit in limits.items()}
    return protos.CircuitBreakers(thresholds=[thresholds])


def _outlier_detection(detection: OutlierDetection) -> Message:
    """Istio's DestinationRule.outlierDetection in Envoy's words.

    Of 100 % Envoy would eject the guard too, whose connections all fail: then the cluster has no host left,
    answers 503 at once, and no other provider is tried. The guard is the last to go, so 99 % keeps it.
    """
    return protos.OutlierDetection(
        consecutive_5xx={"value": detection.consecutive_5xx_errors},
        enforcing_consecutive_5xx={"value": 100 if detection.consecutive_5xx_errors else 0},
        consecutive_gateway_failure={"value": detection.consecutive_gateway_errors},
        enforcing_consecutive_gateway_failure={"value": 100 if detection.consecutive_gateway_errors else 0},
        enforcing_success_rate={"value": 0},
        interval=detection.interval,
        base_ejection_time=detection.base_ejection_time,
        max_ejection_percent={"value": min(detection.max_ejection_percent, 99)},
    )
