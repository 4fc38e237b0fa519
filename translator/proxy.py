"""What the translator knows of one Envoy: the part of its node message that configuration depends on."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from typing import Any, NamedTuple, Self

from translator.features import Feature, Version, read_version


class ProxyType(StrEnum):
    """Istio's proxy types; a gateway calls itself ``router``."""

    SIDECAR = "sidecar"
    ROUTER = "router"


class WorkloadCertificate(NamedTuple):
    """Files on Envoy's machine: a workload's certificate chain, its key, and the CAs of the mesh (PEM)."""

    chain: str
    key: str
    root: str


@dataclass(frozen=True, slots=True)
class Proxy:
    """An Envoy as its configuration sees it: equal values get equal resources, so they share a snapshot.

    ``bind_address`` is where its own listeners are opened, ``scripts`` maps the sha256 of a Lua script to
    the path of the file that holds it on Envoy's machine (laid down with the bootstrap). ``version`` is that
    of an Envoy that lacks some feature, None for all others. ``captures`` says that its applications'
    connections are handed to it, ``captures_dns`` that their DNS queries are; ``has_ipv6`` counts only then.
    """

    type: ProxyType
    namespace: str
    workload: str
    labels: frozenset[tuple[str, str]] = frozenset()
    bind_address: str = "127.0.0.1"
    scripts: frozenset[tuple[str, str]] = frozenset()
    version: Version | None = None
    certificate: WorkloadCertificate | None = None
    captures: bool = False
    captures_dns: bool = False
    has_ipv6: bool = False

    @classmethod
    def from_node(cls, node_id: str, metadata: Mapping[str, Any], version: str = "") -> Self:
        """Read an Envoy's node message.

        Its id has Istio's form ``<type>~<address>~<name>.<namespace>~<domain>``; ``NAMESPACE``,
        ``WORKLOAD_NAME``, ``LABELS``, ``BIND_ADDRESS`` and ``LUA_SCRIPTS`` come from its ``metadata``. Its
        ``version`` is that of its ``user_agent_build_version``, if it says one.
        The files of its workload's certificate are in Istio's ``TLS_CLIENT_CERT_CHAIN``, ``TLS_CLIENT_KEY``
        and ``TLS_CLIENT_ROOT_CERT``.

        Raises ValueError, naming the field, for a node that says no type or no namespace.
        """
        kind = node_id.split("~", 1)[0]
        if kind not in tuple(ProxyType):
            raise ValueError(
                f"node.id {node_id!r}: must begin with 'sidecar~' or 'router~' "
                "(Istio's form type~address~name~domain)"
            )
        namespace = metadata.get("NAMESPACE")
        if not isinstance(namespace, str) or not namespace:
            raise ValueError(f"node {node_id!r}: metadata.NAMESPACE is missing")
        bind_address = metadata.get("BIND_ADDRESS", "127.0.0.1")
        try:
            ip_address(bind_address)
        except ValueError:
            raise ValueError(
                f"node {node_id!r}: metadata.BIND_ADDRESS {bind_address!r} is no IP address"
            ) from None
        return cls(
            type=ProxyType(kind),
            namespace=namespace,
            workload=str(metadata.get("WORKLOAD_NAME", "")),
            labels=_pairs(metadata.get("LABELS")),
            bind_address=bind_address,
            scripts=_pairs(metadata.get("LUA_SCRIPTS")),
            version=read_version(version),
            certificate=_certificate(metadata),
            **_capture(metadata) if kind == ProxyType.SIDECAR else {},
        )

    def supports(self, feature: Feature) -> bool:
        """Whether this Envoy has a feature. One that says no version is taken to be new."""
        return self.version is None or self.version >= feature.since

    def has_labels(self, labels: Mapping[str, str]) -> bool:
        """Whether this proxy's workload carries all of ``labels`` (none: every workload does)."""
        return all(pair in self.labels for pair in labels.items())

    def script(self, digest: str) -> str | None:
        """Path of a Lua script on this Envoy's machine, None where it is not there."""
        return dict(self.scripts).get(digest)


def _capture(metadata: Mapping[str, Any]) -> dict[str, bool]:
    if metadata.get("INTERCEPTION_MODE") != "REDIRECT":
        return {}
    return {
        "captures": True,
        "captures_dns": str(metadata.get("DNS_CAPTURE")).lower() == "true",
        "has_ipv6": ":" in str(metadata.get("INSTANCE_IPS")),
    }


def _certificate(metadata: Mapping[str, Any]) -> WorkloadCertificate | None:
    names = ("TLS_CLIENT_CERT_CHAIN", "TLS_CLIENT_KEY", "TLS_CLIENT_ROOT_CERT")
    files = [str(metadata.get(name) or "") for name in names]
    return WorkloadCertificate(*files) if all(files) else None


def _pairs(value: object) -> frozenset[tuple[str, str]]:
    if not isinstance(value, Mapping):
        return frozenset()
    return frozenset((str(key), str(item)) for key, item in value.items())
