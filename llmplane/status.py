"""``llmplane status``: the running control plane's objects and proxies, as tables."""

import json
import urllib.request
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from llmplane.address import Address

_TYPES = {"Cluster": "CDS", "Listener": "LDS", "RouteConfiguration": "RDS", "Secret": "SDS"}
"""The discovery services of a sidecar by their types, in the words of `istioctl proxy-status`."""


class StatusUnavailableError(RuntimeError):
    """There is no control plane to ask; the text says where it was looked for."""


def fetch_status(address: Address) -> dict[str, Any]:
    """Ask a control plane's admin endpoint. Raises StatusUnavailableError."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through http_proxy
    try:
        with opener.open(f"http://{address}/debug/status", timeout=10) as answer:
            status: dict[str, Any] = json.load(answer)
            return status
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise StatusUnavailableError(
            f"no llmplane answers at {address} ({why}): is `llmplane serve` running there?"
        ) from None


def format_status(status: Mapping[str, Any]) -> str:
    """Write a status for people: a table of objects, one of proxies, and everything that needs attention."""
    parts = [
        _table(
            ["KIND", "NAMESPACE", "NAME", "HOST", "STATE", "PROXIES"],
            [
                [o["kind"], o["namespace"], o["name"], o["host"], o["state"], o["programmed"]]
                for o in status["objects"]
            ],
            "No objects.",
        ),
        _table(
            ["PROXY", "ENVOY", *_TYPES.values(), "CONNECTED SINCE"],
            [
                [_name(p["node_id"]), p["version"], *_states(p["types"]), p["connected_since"]]
                for p in status["proxies"]
            ],
            "No proxy is connected.",
        ),
    ]
    if status["problems"]:
        parts.append("\n".join(["PROBLEMS", *status["problems"]]))
    return "\n\n".join(parts)


def _name(node_id: str) -> str:
    """Return `sleep-4f2a.default` of `sidecar~127.0.0.1~sleep-4f2a.default~default.svc.cluster.local`."""
    parts = node_id.split("~")
    return parts[2] if len(parts) == 4 else node_id  # noqa: PLR2004 - type, address, name, domain


def _states(types: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [types[name]["state"] if name in types else "-" for name in _TYPES]


def _table(headers: list[str], rows: list[list[str]], nothing: str) -> str:
    return tabulate(rows, headers=headers, tablefmt="plain", disable_numparse=True) if rows else nothing
