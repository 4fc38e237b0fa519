"""Events (events.k8s.io/v1) for what somebody must act on: `kubectl describe` shows them at the object.

One for each object, its generation and what is wrong (a warning: one for all generations). Their name says
just that, so that neither another replica nor a restart tells it twice while the API server remembers it (an
hour, unless set otherwise).
"""

import hashlib
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import structlog

from crds.problems import Severity
from llmplane.kubeapi import Api, ApiError
from llmplane.sources.kubernetes import Entry

_LOG = structlog.get_logger(__name__)

CONTROLLER = "istio.alibabacloud.com/llmplane"
_NOTE = 1024
"""Bytes that a note may have (the API server says characters)."""
_AT_ONCE = 10
"""Events of one call; the others wait for the next one."""
_AGAIN = 3600.0
"""Seconds after which the same is told again."""
_MOST = 50_000
"""What is remembered of what was told."""
_CONFLICT = 409
_NOT_FOUND = 404
_PASSING = frozenset({"Pending", "NoProxies"})


class Call(NamedTuple):
    """Something that somebody must act on."""

    reason: str
    note: str
    of: str
    """What makes it another one: the object's generation, or what is said."""


def calls(entry: Entry, view: Mapping[str, Any] | None) -> Iterator[Call]:
    """Yield what is to be told of an object; `view` is what the control plane says of what it serves."""
    texts: dict[Severity, list[str]] = {severity: [] for severity in Severity}
    for problem in entry.problems:
        place = f"{problem.field}: " if problem.field else ""
        texts[problem.severity].append(f"{place}{problem.message}")
    if errors := texts[Severity.ERROR]:
        yield Call("Invalid", "; ".join(errors), str(entry.generation))
    if warnings := "; ".join(texts[Severity.WARNING]):
        yield Call("Warning", warnings, warnings)
    if view is None or view["generation"] != entry.generation or entry.loaded is None:
        return
    for each in view["conditions"]:
        if not each["status"] and each["reason"] not in _PASSING:
            yield Call(each["reason"], each["message"], str(entry.generation))


class Events:
    """Makes events; who calls it leads."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._told: dict[str, float] = {}
        """When an event of this name was made."""

    async def tell(self, found: Iterable[tuple[Entry, Call]]) -> None:
        """Make the events that were not made yet, a few at a time. Raises ApiError."""
        left = _AT_ONCE
        for entry, call in found:
            name = _name(entry, call)
            now = time.monotonic()
            if now - self._told.get(name, -_AGAIN) < _AGAIN:
                continue
            if not left:
                return
            left -= 1
            try:
                await self._api.post(
                    f"/apis/events.k8s.io/v1/namespaces/{entry.key.namespace}/events",
                    _event(name, entry, call),
                )
            except ApiError as error:
                if not error.is_of_request:
                    raise
                if error.status not in {_CONFLICT, _NOT_FOUND}:  # it is known, or its namespace is gone
                    _LOG.warning("an event cannot be made", object=str(entry.key), problem=str(error))
            self._told[name] = now
            if len(self._told) > _MOST:
                del self._told[next(iter(self._told))]


def _name(entry: Entry, call: Call) -> str:
    digest = hashlib.sha256(f"{entry.uid} {call.reason} {call.of}".encode()).hexdigest()
    return f"{entry.key.name[:200].rstrip('-.')}.{digest[:16]}"


def _note(text: str) -> str:
    whole = text.encode()
    return text if len(whole) <= _NOTE else f"{whole[: _NOTE - 4].decode(errors='ignore')} ..."


def _event(name: str, entry: Entry, call: Call) -> dict[str, Any]:
    key = entry.key
    about = {"name": key.name, "namespace": key.namespace, "uid": entry.uid}
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": key.namespace},
        "eventTime": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "reportingController": CONTROLLER,
        "reportingInstance": socket.gethostname()[:128],
        "action": "Configure",
        "type": "Warning",
        "reason": call.reason,
        "regarding": {"apiVersion": entry.api_version, "kind": key.kind, **about},
        "note": _note(call.note),
    }
