"""The status of the cluster's objects: what became of each, as conditions.

`Accepted`: the object is valid, and counts. `ResolvedRefs`: what it refers to is there. `Programmed`: the
Envoys that it is for have acknowledged it, those of all replicas. One replica writes, only what is different,
and not too fast; the others tell it of their proxies.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

import structlog

from crds import kinds
from crds.problems import ObjectKey, Severity
from llmplane.background import running
from llmplane.events import Events, calls
from llmplane.kubeapi import Api, ApiError
from llmplane.leader import RENEW, Leader
from llmplane.replicas import Replicas, key_of, total
from llmplane.sources.kubernetes import Entry, path_of

_LOG = structlog.get_logger(__name__)

MANAGER = "llmplane"
"""Who owns the conditions (server-side apply)."""
_LOOK = 1.0
"""Seconds between two looks at what is to be written."""
_SHARE = 10
"""A look may take a tenth of the time."""
_PER_WRITE = 0.02
"""Seconds between two writes."""
_WRITE_AGAIN = 60.0
"""Seconds after which the same status is written again, if it was refused or somebody else has changed it."""
_LAST_WRITE = 5.0
"""Seconds that the end of the program waits for the API server."""
_MOST = 32_768
"""Characters that a message may have (metav1.Condition)."""
_CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
_SCHEMA_HOLDS = 60.0
"""Seconds after which it is asked again whose schema a kind has."""
_NOT_TOLD = frozenset({403, 404})
"""There is no such kind, or it may not be known whose it is."""
_GONE = frozenset({404, 409})
"""The object is not there any more, or another one has its name."""


class Figure(NamedTuple):
    """A condition, as far as it does not depend on what was written before."""

    type: str
    status: str
    reason: str
    message: str
    generation: int


def figures(entry: Entry, view: Mapping[str, Any] | None) -> tuple[Figure, ...]:
    """Return the conditions of an object; `view` is what the control plane says of the version it serves.

    Empty if that is not the newest good one yet.
    """
    texts = {
        severity: "; ".join(_place(each) for each in entry.problems if each.severity is severity)
        for severity in Severity
    }
    if entry.loaded is None:
        programmed = "nothing of it is sent to proxies"
        if view is not None:
            programmed = (
                f"the last good version ({view['generation']}) is in use at {view['programmed']} proxies"
            )
        return (
            Figure("Accepted", "False", "Invalid", texts[Severity.ERROR], entry.generation),
            Figure("Programmed", "False", "Invalid", programmed, entry.generation),
        )
    if view is None or view["generation"] != entry.generation:
        return ()
    found = {each["type"]: each for each in view["conditions"]}
    result = []
    for name in ("Accepted", "ResolvedRefs"):
        if each := found.get(name):
            parts = (each["message"], texts[Severity.WARNING] if name == "Accepted" else "")
            message = "; ".join(part for part in parts if part)
            result.append(Figure(name, str(each["status"]), each["reason"], message, entry.generation))
    result.append(Figure("Programmed", *_programmed(view, found.get("Programmed")), entry.generation))
    return tuple(result)


def _programmed(view: Mapping[str, Any], objection: Mapping[str, Any] | None) -> tuple[str, str, str]:
    acknowledged, _, reached = view["programmed"].partition("/")
    if objection is not None:
        return "False", objection["reason"], f"{acknowledged}/{reached} proxies; {objection['message']}"
    if unread := view.get("unread"):
        text = f"{acknowledged}/{reached} proxies; not read yet by {unread} of the replicas"
        return "False", "Pending", text
    if reached == "0":
        return "Unknown", "NoProxies", "no proxy that it is for is connected"
    if acknowledged != reached:
        return "False", "Pending", f"{acknowledged}/{reached} proxies"
    return "True", "Programmed", f"{acknowledged}/{reached} proxies"


def status_of(found: Iterable[Figure], before: Mapping[str, Any], now: str) -> dict[str, Any]:
    """Return the status to write; `before` is the one that is there."""
    known = {each.get("type"): each for each in before.get("conditions") or ()}
    conditions = []
    for figure in found:
        old = known.get(figure.type, {})
        same = old.get("status") == figure.status
        conditions.append(
            {
                "type": figure.type,
                "status": figure.status,
                "observedGeneration": figure.generation,
                "lastTransitionTime": old.get("lastTransitionTime", now) if same else now,
                "reason": figure.reason,
                "message": figure.message[:_MOST],
            }
        )
    word = next((each["reason"] for each in conditions if each["status"] != "True"), "OK")
    return {"status": word, "conditions": conditions}


def is_written(wanted: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether all of a status is there; conditions of others may be beside ours."""
    known = {each.get("type"): each for each in before.get("conditions") or ()}
    return before.get("status") == wanted["status"] and all(
        known.get(each["type"]) == each for each in wanted["conditions"]
    )


_Due = tuple[Entry, tuple[Figure, ...], dict[str, Any]]


class StatusWriter:
    """Writes what `views` says of the objects that `entries` has, as long as the leader.

    `has_proxies` says whether any is connected to this replica.
    """

    def __init__(
        self,
        api: Api,
        leader: Leader,
        entries: Callable[[], Iterable[Entry]],
        views: Callable[[], Iterable[Mapping[str, Any]]],
        has_proxies: Callable[[], bool],
    ) -> None:
        self._api = api
        self._leader = leader
        self._replicas = Replicas(api, api.namespace)
        self._events = Events(api)
        self._entries = entries
        self._schemas = _Schemas(api)
        self._views = views
        self._has_proxies = has_proxies
        self._written: dict[str, tuple[tuple[Figure, ...], float]] = {}
        """What was written last of each object, by its uid, and when."""

    async def run(self) -> None:
        """Write until cancelled, then let another replica do it."""
        try:
            async with running(self._lead(), self._write()):
                await self._replicas.run()
        finally:
            await self._leave()

    async def _leave(self) -> None:
        """Give back what others would else wait for until it runs out."""
        try:
            async with asyncio.timeout(_LAST_WRITE):
                await self._leader.release()
                with suppress(ApiError):
                    await self._replicas.retire()
        except TimeoutError:
            _LOG.warning("the API server does not answer: the Lease and the counts of proxies will run out")

    async def _lead(self) -> None:
        while True:
            try:
                await self._leader.step()
                await self._replicas.renew()
            except ApiError as error:
                _LOG.warning("the counts of proxies cannot be renewed", problem=str(error))
            except Exception:  # noqa: BLE001 - a mistake of ours, whatever it is
                _LOG.exception("the Lease could not be looked after")
            await asyncio.sleep(RENEW)

    async def _write(self) -> None:
        while True:
            pause = 0.0
            try:
                pause = await self._look()
            except ApiError as error:
                _LOG.warning("a status cannot be written", problem=str(error))
                pause = max(RENEW, error.retry_after)
            except Exception:  # noqa: BLE001 - a mistake of ours, whatever it is
                _LOG.exception("a status could not be written")
            await asyncio.sleep(max(_LOOK, pause))

    async def _look(self) -> float:
        """Write what is to be written; return for how many seconds to rest. Raises ApiError."""
        began = time.monotonic()
        if not self._leader.is_leading:
            self._written.clear()  # from now on others write
            if not self._has_proxies():
                await self._replicas.retire()
                return 0.0
            views = list(self._views())
            look = time.monotonic() - began
            await self._replicas.tell(views)
            return _SHARE * look
        await self._replicas.retire()
        others = self._replicas.others()
        totals = {key_of(view): total(view, others) for view in self._views()}
        ours = await self._schemas.ours()
        entries = [entry for entry in self._entries() if entry.key.kind in ours]
        due = list(self._due(entries, totals))
        look = time.monotonic() - began
        rest = await self._write_all(due)
        await self._events.tell(
            (entry, call) for entry in entries for call in calls(entry, totals.get(entry.key))
        )
        await self._replicas.bury()
        return max(rest, _SHARE * look)

    def _due(self, entries: Iterable[Entry], views: Mapping[ObjectKey, Mapping[str, Any]]) -> Iterator[_Due]:
        """Yield what is to be written."""
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        there = set()
        for entry in entries:
            there.add(entry.uid)
            found = figures(entry, views.get(entry.key))
            if not found:
                continue
            status = status_of(found, entry.status, now)
            last, at = self._written.get(entry.uid, ((), 0.0))
            is_recent = last == found and time.monotonic() - at < _WRITE_AGAIN
            if not is_recent and not is_written(status, entry.status):
                yield entry, found, status
        for uid in self._written.keys() - there:
            del self._written[uid]

    async def _write_all(self, due: Iterable[_Due]) -> float:
        """Write these; return for how many seconds to rest. Raises ApiError.

        One that is refused, or a kind that may not be written, does not keep the others from it.
        """
        refused: set[str] = set()
        for entry, found, status in due:
            if not self._leader.is_leading:
                break
            if entry.key.kind in refused:
                continue
            metadata = {"name": entry.key.name, "namespace": entry.key.namespace, "uid": entry.uid}
            body = {"apiVersion": entry.api_version, "kind": entry.key.kind, "metadata": metadata}
            try:
                await self._api.apply(f"{path_of(entry)}/status", {**body, "status": status}, MANAGER)
            except ApiError as error:
                if not error.is_of_request:
                    raise
                if error.status not in _GONE:
                    refused.add(entry.key.kind)
                    _LOG.warning("a status is refused", object=str(entry.key), problem=str(error))
            self._written[entry.uid] = (found, time.monotonic())
            await asyncio.sleep(_PER_WRITE)
        return RENEW if refused else 0.0


class _Schemas:
    """Which kinds have the schema that we made, and so a status that is ours to write.

    Istio's kinds do where they were installed from crds/istio/, which their CRD says by a label. Where Istio
    itself is installed, their status is Istio's, and so is what it says of them: nothing is written there.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._ours: frozenset[str] = frozenset()
        self._until = 0.0

    async def ours(self) -> frozenset[str]:
        """Return the kinds; what the API server says of that holds for a minute. Raises ApiError."""
        if time.monotonic() < self._until:
            return self._ours
        found = {kind.__name__ for kind in kinds.OWN}
        for group, of in kinds.ISTIO.items():
            for kind in of:
                try:
                    crd = await self._api.get(f"{_CRDS}/{kinds.plural(kind.__name__)}.{group}")
                except ApiError as error:
                    if error.status not in _NOT_TOLD:
                        raise
                    continue
                if (crd["metadata"].get("labels") or {}).get("app.kubernetes.io/part-of") == MANAGER:
                    found.add(kind.__name__)
        self._ours, self._until = frozenset(found), time.monotonic() + _SCHEMA_HOLDS
        return self._ours


def _place(problem: Any) -> str:
    return f"{problem.field}: {problem.message}" if problem.field else str(problem.message)
