"""``llmplane status``: the running control plane's objects and proxies, as tables."""

import http.client
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from tabulate import tabulate

from llmplane.address import Address
from llmplane.bootstrap import XdsCredentials

_TYPES = {"Cluster": "CDS", "Listener": "LDS", "RouteConfiguration": "RDS", "Secret": "SDS"}
"""The discovery services of every sidecar by their types, in the words of `istioctl proxy-status`."""
_RARE_TYPES = {
    "ScopedRouteConfiguration": "SRDS",
    "ClusterLoadAssignment": "EDS",
    "TypedExtensionConfig": "ECDS",
}
_NO_TLS = " If that speaks TLS, give --xds-ca-file."
_UNITS = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))


class StatusUnavailableError(RuntimeError):
    """There is no control plane to ask; the text says where it was looked for."""


def fetch_status(
    address: Address, credentials: XdsCredentials | None = None, *, timeout: float = 10
) -> dict[str, Any]:
    """Ask a control plane's admin endpoint, over TLS if the credentials name a CA.

    Raises StatusUnavailableError, also if it does not answer within `timeout` seconds.
    """
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]  # never through http_proxy
    request = urllib.request.Request(f"http://{address}/debug/status")
    try:
        if credentials and credentials.ca_file:
            request.full_url = f"https://{address}/debug/status"
            context = ssl.create_default_context(cafile=credentials.ca_file)
            if credentials.client_cert_file:
                context.load_cert_chain(credentials.client_cert_file, credentials.client_key_file)
            handlers.append(urllib.request.HTTPSHandler(context=context))
        if credentials and credentials.token_file:
            token = credentials.token_file.read_text(encoding="ascii").strip()
            request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as answer:
            status: dict[str, Any] = json.load(answer)
            return status
    except urllib.error.HTTPError as error:
        with error:
            text = error.read(1000).decode(errors="replace").strip()
        raise StatusUnavailableError(f"{address} refuses to tell ({error.code}): {text}") from None
    except http.client.HTTPException:
        raise StatusUnavailableError(
            f"what answers at {address} does not speak {request.type.upper()}: is it the --admin-address of "
            f"`llmplane serve`?{_NO_TLS if request.type == 'http' else ''}"
        ) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise StatusUnavailableError(
            f"no llmplane answers at {address} ({why}): is `llmplane serve` running there?"
        ) from None


def format_status(status: Mapping[str, Any]) -> str:
    """Write a status for people: a table of objects, one of proxies, and everything that needs attention."""
    now = datetime.fromisoformat(status["time"])
    has = {name for p in status["proxies"] for name in p["types"]}
    types = {**_TYPES, **{name: short for name, short in _RARE_TYPES.items() if name in has}}
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
            ["PROXY", "ENVOY", *types.values(), "CONNECTED"],
            [
                [
                    short_name(p["node_id"]),
                    p["version"],
                    *(_state(p["types"].get(name), now) for name in types),
                    _ago(p["connected_since"], now),
                ]
                for p in status["proxies"]
            ],
            "No proxy is connected.",
        ),
    ]
    behind = [
        f"{short_name(p['node_id'])}: {types.get(name, name)} {_state(of, now)}: {reason}"
        for p in status["proxies"]
        for name, of in p["types"].items()
        for reason in _reasons(of)
    ]
    if behind:
        parts.append("\n".join(["NOT IN SYNC", *behind]))
    missing = [f"{short_name(p['node_id'])}: {text}" for p in status["proxies"] for text in p["missing"]]
    if missing:
        parts.append("\n".join(["TOO OLD FOR", *missing]))
    if status["problems"]:
        parts.append("\n".join(["PROBLEMS", *status["problems"]]))
    return "\n\n".join(parts)


def short_name(node_id: str) -> str:
    """Return `sleep-4f2a.default` of `sidecar~127.0.0.1~sleep-4f2a.default~default.svc.cluster.local`."""
    parts = node_id.split("~")
    return parts[2] if len(parts) == 4 else node_id  # noqa: PLR2004 - type, address, name, domain


def _state(of: Mapping[str, Any] | None, now: datetime) -> str:
    """Return `SYNCED`, or for how long it is something else: `NACK 5m`."""
    if of is None:
        return "-"
    return str(of["state"]) if of["state"] == "SYNCED" else f"{of['state']} {_ago(of['since'], now)}"


def _reasons(of: Mapping[str, Any]) -> Iterator[str]:
    """Say why a type of a proxy is not in sync."""
    if of["state"] == "NACK":
        error = of["error"]
        what = ", ".join(of["refused"] or error["names"]) or "what it was sent"
        yield f"it keeps what it had instead of {what}: {error['detail']}"
    elif of["state"] == "STALE":
        yield (
            f"{of['unanswered']} sent and not answered" if of["unanswered"] else "something waits to be sent"
        )


def _ago(time: str, now: datetime) -> str:
    """Return how long ago something was, in its largest unit: `5m`."""
    seconds = max(0, int((now - datetime.fromisoformat(time)).total_seconds()))
    unit, length = next((each for each in _UNITS if seconds >= each[1]), _UNITS[-1])
    return f"{seconds // length}{unit}"


def _table(headers: list[str], rows: list[list[str]], nothing: str) -> str:
    return tabulate(rows, headers=headers, tablefmt="plain", disable_numparse=True) if rows else nothing
