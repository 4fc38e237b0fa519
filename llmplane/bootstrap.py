"""The Envoy bootstrap of a sidecar or gateway: who it is, where its control plane is, its own doors.

Everything else comes over ADS. The bootstrap is plain JSON (PyYAML would write a value such as ``n``
unquoted, which Envoy's loader reads as a boolean).
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from translator.metrics import MILLISECONDS, SCOPE
from translator.proxy import ProxyType, WorkloadCertificate

STATS_PORT = 15090
"""Prometheus port, as Istio's."""
HEALTH_PORT = 15021
"""Health port, as Istio's."""

_RENAME = files("llmplane").joinpath("prometheus_door.lua").read_text(encoding="utf-8")

_SHOWN_STATISTICS = "/stats/prometheus?filter=%5B%5E~%5D%24&client="
"""All statistics whose names do not end in `~`: those are what rate_limits.lua counts in. The client's query
is the value of a parameter that nobody reads."""

_MAX_REGEX_PROGRAM = 32768
"""Istio's; Envoy's own limit of 100 refuses names of service accounts in an AuthorizationPolicy."""

_LATENCY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TIME_TO_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2.5, 5, 7.5, 10, 20, 30, 60)
_TIME_PER_OUTPUT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_BYTES = tuple(float(4**power) for power in range(3, 13))
_TOKENS = tuple(float(4**power) for power in range(14))
_BUCKETS: dict[str, Sequence[float]] = {
    "llmplane_time_to_first_token_seconds": _TIME_TO_FIRST_TOKEN,
    "llmplane_time_per_output_token_seconds": _TIME_PER_OUTPUT_TOKEN,
    "llmplane_request_bytes": _BYTES,
    "llmplane_response_bytes": _BYTES,
    # Those of OpenTelemetry's semantic conventions.
    "gen_ai_client_token_usage": _TOKENS,
    "gen_ai_server_time_to_first_token_seconds": (
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    ),
    "gen_ai_server_time_per_output_token_seconds": (
        *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5),
    ),
}
"""Upper bounds of histograms, seconds, bytes or tokens. Istio's histograms have Envoy's own, as in Istio."""
_IN_MILLISECONDS: dict[str, Sequence[float]] = {
    f"llmplane_request_duration_seconds{MILLISECONDS}": tuple(1000 * bound for bound in _LATENCY),
    f"gen_ai_client_operation_duration_seconds{MILLISECONDS}": tuple(10.0 * 2**power for power in range(14)),
}
"""The same, of those that are counted in milliseconds."""

_CA = "xds-ca"
_CERTIFICATE = "xds-client"
_TOKEN = "xds-token"  # noqa: S105 - a name
_TYPES = "type.googleapis.com"
_RECONNECT = {"retry_back_off": {"base_interval": "0.5s", "max_interval": "5s"}}
"""Envoy's own limit of 30 s would leave it without news for that long after a control plane was away."""


@dataclass(frozen=True, slots=True)
class XdsCredentials:
    """How an Envoy knows its control plane and proves who it is: files on Envoy's machine.

    With a ``ca_file`` it speaks TLS, and verifies the control plane's certificate and name. The token travels
    as ``authorization: Bearer ...``; it comes from its file by SDS, so ``/config_dump`` does not show it.
    """

    ca_file: Path | None = None
    client_cert_file: Path | None = None
    client_key_file: Path | None = None
    token_file: Path | None = None


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """One Envoy: its identity, its control plane's address, where its own listeners are opened.

    ``admin_port`` 0 means that the admin interface is the Unix socket ``admin_socket`` only (mode 0600).
    ``status_address`` is where health and metrics are asked for, ``bind_address`` unless it is given.
    """

    type: ProxyType
    xds_host: str
    xds_port: int
    namespace: str
    workload: str
    admin_socket: Path
    labels: Mapping[str, str] = field(default_factory=dict)
    bind_address: str = "127.0.0.1"
    status_address: str | None = None
    admin_port: int = 0
    scripts: Mapping[str, Path] = field(default_factory=dict)
    """Lua scripts that lie on this Envoy's machine: sha256 of the text -> file."""
    credentials: XdsCredentials = XdsCredentials()
    xds_ca: str = ""
    """The CAs of the control plane's certificate (PEM), where they are in no file."""
    capture: bool = False
    """Whether iptables hands it what the applications beside it send (deploy/image/capture.sh)."""
    capture_dns: bool = False
    """Whether that includes their DNS queries."""
    instance_ips: Sequence[str] = ()
    """The machine's addresses, of which capture needs to know whether one is IPv6."""
    certificate: WorkloadCertificate | None = None
    """Files of the workload's certificate, for mutual TLS in the mesh; only their paths go to the control
    plane."""
    sds_directory: Path | None = None
    """Where `secrets` lie as files of their own, which Envoy reads again when they or what they name change.
    None: they are in the bootstrap, and Envoy reads what they name at its start only."""
    instance: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    @property
    def node_id(self) -> str:
        """Istio's form ``<type>~<address>~<name>.<namespace>~<domain>``."""
        name = f"{self.workload}-{self.instance}.{self.namespace}"
        return f"{self.type}~{self.bind_address}~{name}~{self.namespace}.svc.cluster.local"


def bootstrap(proxy: ProxySettings) -> dict[str, Any]:
    """Make the bootstrap of ``proxy`` as a JSON-ready dictionary (envoy.config.bootstrap.v3.Bootstrap)."""
    own, common = own_part(proxy), common_part(proxy)
    resources, doors = own["static_resources"], common["static_resources"]
    metadata = {**own["node"]["metadata"], **common["node"]["metadata"]}
    return {
        "node": {**own["node"], "metadata": metadata},
        **{name: value for name, value in common.items() if name not in {"node", "static_resources"}},
        "static_resources": {
            **resources,
            "clusters": [*resources["clusters"], *doors["clusters"]],
            "listeners": doors["listeners"],
        },
    }


def own_part(proxy: ProxySettings) -> dict[str, Any]:
    """Return what only this proxy has: who it is, and where its control plane is."""
    own_secrets = [] if proxy.sds_directory else secrets(proxy)
    return {
        "node": {
            "id": proxy.node_id,
            "cluster": f"{proxy.workload}.{proxy.namespace}",
            "metadata": {
                "NAMESPACE": proxy.namespace,
                "WORKLOAD_NAME": proxy.workload,
                "LABELS": dict(proxy.labels),
                "BIND_ADDRESS": proxy.bind_address,
                **_capture(proxy),
                **_certificate(proxy),
            },
        },
        "static_resources": {
            "clusters": [_xds_cluster(proxy)],
            **({"secrets": own_secrets} if own_secrets else {}),
        },
    }


def common_part(proxy: ProxySettings) -> dict[str, Any]:
    """Return what all proxies on such a machine have: scripts, limits, and their own doors.

    Envoy merges it with the other part, where that is its option ``--config-yaml``.
    """
    return {
        "node": {"metadata": {"LUA_SCRIPTS": {digest: str(path) for digest, path in proxy.scripts.items()}}},
        "admin": {"address": _admin_address(proxy)},
        "layered_runtime": {
            "layers": [
                {"name": "static", "static_layer": {"re2.max_program_size.error_level": _MAX_REGEX_PROGRAM}},
                {"name": "admin", "admin_layer": {}},
            ]
        },
        "stats_config": {
            "stats_tags": _stats_tags(),
            "histogram_bucket_settings": [
                {"match": {"prefix": f"{SCOPE}.{name}"}, "buckets": buckets}
                for name, buckets in (_BUCKETS | _IN_MILLISECONDS).items()
            ],
        },
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                # Without it each ACK carries the whole node again, 61 KB in Envoy 1.40.
                "set_node_on_first_message_only": True,
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc", "retry_policy": _RECONNECT}}],
            },
            "cds_config": {"resource_api_version": "V3", "ads": {}},
            "lds_config": {"resource_api_version": "V3", "ads": {}},
        },
        "static_resources": {
            "clusters": [_admin_cluster(proxy)],
            "listeners": [
                _door(proxy, "stats", STATS_PORT, ("/stats/prometheus", _SHOWN_STATISTICS), [_lua(_RENAME)]),
                _door(proxy, "health", HEALTH_PORT, ("/healthz/ready", "/ready")),
            ],
        },
    }


def _stats_tags() -> list[dict[str, str]]:
    """Make labels of what rate_limits.lua writes into the names of its metrics: `;policy=...;key=...;`.

    The last one takes away what Envoy puts in front of names from Lua.
    """
    labels = [
        {"tag_name": name, "regex": f"(;{name}=([^;]*))"}
        for name in ("policy", "rule", "key", "type", "unit")
    ]
    return [*labels, {"tag_name": "lua", "regex": f"^(.*\\.lua\\.()){SCOPE}\\."}]


def _capture(proxy: ProxySettings) -> dict[str, str]:
    """Return what Istio's proxies say of captured traffic."""
    if not proxy.capture:
        return {}
    return {
        "INTERCEPTION_MODE": "REDIRECT",
        "DNS_CAPTURE": str(proxy.capture_dns).lower(),
        "INSTANCE_IPS": ",".join(proxy.instance_ips),
    }


def _certificate(proxy: ProxySettings) -> dict[str, str]:
    """Return the files of the workload's certificate under Istio's names."""
    if proxy.certificate is None:
        return {}
    return {
        "TLS_CLIENT_CERT_CHAIN": proxy.certificate.chain,
        "TLS_CLIENT_KEY": proxy.certificate.key,
        "TLS_CLIENT_ROOT_CERT": proxy.certificate.root,
    }


def secrets(proxy: ProxySettings) -> list[dict[str, Any]]:
    """Return the credentials of the xDS connection as Envoy's secrets; they name files and hold no secret."""
    files, made = proxy.credentials, []
    if files.ca_file:
        validation = {"trusted_ca": _file(files.ca_file), "watched_directory": _parent(files.ca_file)}
        made.append({"name": _CA, "validation_context": validation})
    if files.client_cert_file and files.client_key_file:
        certificate = {
            "certificate_chain": _file(files.client_cert_file),
            "private_key": _file(files.client_key_file),
            "watched_directory": _parent(files.client_cert_file),
        }
        made.append({"name": _CERTIFICATE, "tls_certificate": certificate})
    if files.token_file:
        made.append({"name": _TOKEN, "generic_secret": {"secret": _file(files.token_file)}})
    return made


def secret_file(proxy: ProxySettings, name: str) -> Path:
    """Return where a secret lies, as a DiscoveryResponse. Raises ValueError without `sds_directory`."""
    if proxy.sds_directory is None:
        raise ValueError("the secrets of this proxy are in its bootstrap")
    return proxy.sds_directory / f"{name}.json"


def _secret(proxy: ProxySettings, name: str) -> dict[str, Any]:
    """Refer to a secret (envoy.extensions.transport_sockets.tls.v3.SdsSecretConfig)."""
    if proxy.sds_directory is None:
        return {"name": name}
    source = {"path_config_source": {"path": str(secret_file(proxy, name))}, "resource_api_version": "V3"}
    return {"name": name, "sds_config": source}


def _file(path: Path) -> dict[str, Any]:
    return {"filename": str(path)}


def _parent(path: Path) -> dict[str, Any]:
    return {"path": str(path.parent)}


def _socket(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _admin_address(proxy: ProxySettings) -> dict[str, Any]:
    if proxy.admin_port:
        return _socket("127.0.0.1", proxy.admin_port)
    return {"pipe": {"path": str(proxy.admin_socket), "mode": 0o600}}


def _cluster(name: str, address: dict[str, Any], **more: Any) -> dict[str, Any]:
    endpoint = {"lb_endpoints": [{"endpoint": {"address": address}}]}
    return {
        "name": name,
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [endpoint]},
        **more,
    }


def _xds_cluster(proxy: ProxySettings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "@type": f"{_TYPES}/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {
            # A control plane that died without a word is noticed and reconnected to.
            "http2_protocol_options": {"connection_keepalive": {"interval": "30s", "timeout": "10s"}},
        },
    }
    if proxy.credentials.token_file:
        options["http_filters"] = _bearer_token(proxy)
    tls = {"transport_socket": _tls(proxy)} if proxy.credentials.ca_file or proxy.xds_ca else {}
    return _cluster(
        "xds-grpc",
        _socket(proxy.xds_host, proxy.xds_port),
        type="STRICT_DNS",
        dns_lookup_family="ALL",  # `localhost` may be ::1 first, where nobody listens
        typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
        **tls,
    )


def _tls(proxy: ProxySettings) -> dict[str, Any]:
    """Make the transport socket that verifies the control plane's CA and name."""
    host = proxy.xds_host
    kind = "IP_ADDRESS" if _is_ip(host) else "DNS"
    names = {"match_typed_subject_alt_names": [{"san_type": kind, "matcher": {"exact": host}}]}
    common: dict[str, Any] = {"tls_params": {"tls_minimum_protocol_version": "TLSv1_2"}}
    if proxy.xds_ca:
        common["validation_context"] = {"trusted_ca": {"inline_string": proxy.xds_ca}, **names}
    else:
        common["combined_validation_context"] = {
            "default_validation_context": names,
            "validation_context_sds_secret_config": _secret(proxy, _CA),
        }
    if proxy.credentials.client_cert_file:
        common["tls_certificate_sds_secret_configs"] = [_secret(proxy, _CERTIFICATE)]
    name = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
    config: dict[str, Any] = {"@type": f"{_TYPES}/{name}", "common_tls_context": common}
    if kind == "DNS":
        config["sni"] = host
    return {"name": "envoy.transport_sockets.tls", "typed_config": config}


def _bearer_token(proxy: ProxySettings) -> list[dict[str, Any]]:
    """Make the upstream filters that add the token: `initial_metadata` would show it in `/config_dump`."""
    filters = f"{_TYPES}/envoy.extensions.filters.http"
    generic = f"{_TYPES}/envoy.extensions.http.injected_credentials.generic.v3.Generic"
    credential = {
        "name": "envoy.http.injected_credentials.generic",
        "typed_config": {
            "@type": generic,
            "credential": _secret(proxy, _TOKEN),
            "header": "authorization",
            "header_value_prefix": "Bearer ",
        },
    }
    return [
        {
            "name": "envoy.filters.http.credential_injector",
            "typed_config": {
                "@type": f"{filters}.credential_injector.v3.CredentialInjector",
                "overwrite": True,
                "credential": credential,
            },
        },
        {
            "name": "envoy.filters.http.upstream_codec",
            "typed_config": {"@type": f"{filters}.upstream_codec.v3.UpstreamCodec"},
        },
    ]


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _admin_cluster(proxy: ProxySettings) -> dict[str, Any]:
    return _cluster("admin", _admin_address(proxy), type="STATIC")


def _lua(script: str) -> dict[str, Any]:
    return {
        "name": "envoy.filters.http.lua",
        "typed_config": {
            "@type": f"{_TYPES}/envoy.extensions.filters.http.lua.v3.Lua",
            "default_source_code": {"inline_string": script},
        },
    }


def _door(
    proxy: ProxySettings,
    name: str,
    port: int,
    paths: tuple[str, str],
    filters: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Make a listener that lets exactly one GET through to the admin interface, and nothing else.

    ``paths`` are that of the request, and that of the admin interface.
    """
    path, admin_path = paths
    connection_manager = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
    return {
        "name": name,
        "address": _socket(proxy.status_address or proxy.bind_address, port),
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": {
                            "@type": f"{_TYPES}/{connection_manager}",
                            "stat_prefix": name,
                            "route_config": {
                                "name": name,
                                "virtual_hosts": [
                                    {
                                        "name": name,
                                        "domains": ["*"],
                                        "routes": [
                                            {
                                                "match": {
                                                    "path": path,
                                                    "headers": [
                                                        {
                                                            "name": ":method",
                                                            "string_match": {"exact": "GET"},
                                                        }
                                                    ],
                                                },
                                                # The admin interface answers protobuf or gzip when asked to.
                                                "request_headers_to_remove": ["accept", "accept-encoding"],
                                                "route": {"cluster": "admin", "prefix_rewrite": admin_path},
                                            }
                                        ],
                                    }
                                ],
                            },
                            "http_filters": [
                                *filters,
                                {
                                    "name": "envoy.filters.http.router",
                                    "typed_config": {
                                        "@type": f"{_TYPES}/envoy.extensions.filters.http.router.v3.Router"
                                    },
                                },
                            ],
                        },
                    }
                ]
            }
        ],
    }
