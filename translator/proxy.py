"""What the translator knows of one Envoy: the part of its node message that configuration depends on."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from typing import Any, Self


class ProxyType(StrEnum):
    """Istio's proxy types; a gateway calls itself ``router``."""

    SIDECAR = "sidecar"
    ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Proxy:
    """An Envoy as its configuration sees it: equal values get equal resources, so they share a snapshot.

    ``bind_address`` is where its own listeners are opened, ``scripts`` maps the sha256 of a Lua script to
    the path of the file that holds it on Envoy's machine (laid down with the bootstrap).
    """

    type: ProxyType
    namespace: str
    workload: str
    labels: frozenset[tuple[str, str]] = frozenset()
    bind_address: str = "127.0.0.1"
    scripts: frozenset[tuple[str, str]] = frozenset()

    @classmethod
    def from_node(cls, node_id: str, metadata: Mapping[str, Any]) -> Self:
        """Read an Envoy's node message.

        Its id has Istio's form ``<type>~<address>~<name>.<namespace>~<domain>``; ``NAMESPACE``,
        ``WORKLOAD_NAME``, ``LABELS``, ``BIND_ADDRESS`` and ``LUA_SCRIPTS`` come from its ``metadata``.

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
        )

    def has_labels(self, labels: Mapping[str, str]) -> bool:
        """Whether this proxy's workload carries all of ``labels`` (none: every workload does)."""
        return all(pair in self.labels for pair in labels.items())

    def script(self, digest: str) -> str | None:
        """Path of a Lua script on this Envoy's machine, None where it is not there."""
        return dict(self.scripts).get(digest)


def _pairs(value: object) -> frozenset[tuple[str, str]]:
    if not isinstance(value, Mapping):
        return frozenset()
    return frozenset((str(key), str(item)) for key, item in value.items())
