"""The Envoy bootstrap of a sidecar or gateway: who it is, where its control plane is, its own doors.

Everything else comes over ADS. The bootstrap is plain JSON (PyYAML would write a value such as ``n``
unquoted, which Envoy's loader reads as a boolean).
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from translator.proxy import ProxyType

STATS_PORT = 15090
"""Prometheus port, as Istio's."""
HEALTH_PORT = 15021
"""Health port, as Istio's."""

_TYPES = "type.googleapis.com"
_RECONNECT = {"retry_back_off": {"base_interval": "0.5s", "max_interval": "5s"}}
"""Envoy's own limit of 30 s would leave it without news for that long after a control plane was away."""


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """One Envoy: its identity, its control plane's address, where its own listeners are opened.

    ``admin_port`` 0 means that the admin interface is the Unix socket ``admin_socket`` only (mode 0600).
    """

    type: ProxyType
    xds_host: str
    xds_port: int
    namespace: str
    workload: str
    admin_socket: Path
    labels: Mapping[str, str] = field(default_factory=dict)
    bind_address: str = "127.0.0.1"
    admin_port: int = 0
    scripts: Mapping[str, Path] = field(default_factory=dict)
    """Lua scripts that lie on this Envoy's machine: sha256 of the text -> file."""
    instance: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    @property
    def node_id(self) -> str:
        """Istio's form ``<type>~<address>~<name>.<namespace>~<domain>``."""
        name = f"{self.workload}-{self.instance}.{self.namespace}"
        return f"{self.type}~{self.bind_address}~{name}~{self.namespace}.svc.cluster.local"


def bootstrap(proxy: ProxySettings) -> dict[str, Any]:
    """Make the bootstrap of ``proxy`` as a JSON-ready dictionary (envoy.config.bootstrap.v3.Bootstrap)."""
    return {
        "node": {
            "id": proxy.node_id,
            "cluster": f"{proxy.workload}.{proxy.namespace}",
            "metadata": {
                "NAMESPACE": proxy.namespace,
                "WORKLOAD_NAME": proxy.workload,
                "LABELS": dict(proxy.labels),
                "BIND_ADDRESS": proxy.bind_address,
                "LUA_SCRIPTS": {digest: str(path) for digest, path in proxy.scripts.items()},
            },
        },
        "admin": {"address": _admin_address(proxy)},
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
            "clusters": [_xds_cluster(proxy), _admin_cluster(proxy)],
            "listeners": [
                _door(proxy, "stats", STATS_PORT, "/stats/prometheus", "/stats/prometheus"),
                _door(proxy, "health", HEALTH_PORT, "/healthz/ready", "/ready"),
            ],
        },
    }


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
    protocol = f"{_TYPES}/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return _cluster(
        "xds-grpc",
        _socket(proxy.xds_host, proxy.xds_port),
        type="STRICT_DNS",
        typed_extension_protocol_options={
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": protocol,
                "explicit_http_config": {
                    # A control plane that died without a word is noticed and reconnected to.
                    "http2_protocol_options": {
                        "connection_keepalive": {"interval": "30s", "timeout": "10s"},
                    },
                },
            },
        },
    )


def _admin_cluster(proxy: ProxySettings) -> dict[str, Any]:
    return _cluster("admin", _admin_address(proxy), type="STATIC")


def _door(proxy: ProxySettings, name: str, port: int, path: str, admin_path: str) -> dict[str, Any]:
    """Make a listener that lets exactly one GET through to the admin interface, and nothing else."""
    connection_manager = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
    return {
        "name": name,
        "address": _socket(proxy.bind_address, port),
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
                                {
                                    "name": "envoy.filters.http.router",
                                    "typed_config": {
                                        "@type": f"{_TYPES}/envoy.extensions.filters.http.router.v3.Router"
                                    },
                                }
                            ],
                        },
                    }
                ]
            }
        ],
    }
