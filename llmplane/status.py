"""``llmplane status``: the running control plane's objects and proxies, as tables."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from typing import Any

from tabulate import tabulate

from llmplane.address import Address


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
        raise StatusUnavailableError(
            f"no llmplane at {address} ({error}); is `llmplane serve` running, with this --admin-address?"
        ) from None


def format_status(status: Mapping[str, Any]) -> str:
    """Write a status as tables: objects, proxies, and everything that needs attention."""
    parts = [
        _table(
            ["KIND", "NAMESPACE", "NAME", "HOST", "STATE", "PROXIES"],
            (
                [o["kind"], o["namespace"], o["name"], o["host"], o["state"], o["programmed"]]
                for o in status["objects"]
            ),
            "no objects",
        ),
        _table(
            ["PROXY", "ENVOY", "STATE", "CONNECTED"],
            ([p["node_id"], p["version"], p["state"], p["connected_since"]] for p in status["proxies"]),
            "no proxy is connected",
        ),
    ]
    attention = [
        f"{o['kind']} {o['namespace']}/{o['name']}: {c['type']}: {c['reason']}: {c['message']}"
        for o in status["objects"]
        for c in o["conditions"]
        if not c["status"]
    ]
    attention += status["problems"]
    if attention:
        parts.append("\n".join(["PROBLEMS", *attention]))
    return "\n\n".join(parts)


def _table(headers: list[str], rows: Iterable[list[str]], nothing: str) -> str:
    rows = list(rows)
    return tabulate(rows, headers=headers, tablefmt="plain", disable_numparse=True) if rows else nothing
