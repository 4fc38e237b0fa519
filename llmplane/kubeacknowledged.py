"""What Envoys refuse, and what stands in for it, in a cluster: one ConfigMap of all replicas.

As llmplane.acknowledged has it in a file. Each replica has in memory what it put itself, and what a watch
says of the ConfigMap, so that it can answer at once. It writes in the background: it reads, adds what is new
and writes with the resourceVersion that it has read; if another replica was faster, it does so again. So
none loses what another one has written. An entry belongs to no replica: it is there for those to come.

Stand-ins are compressed (`binaryData`); who refused what can be read (`data`).
"""

import asyncio
import base64
import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import structlog

from llmplane.acknowledged import MOST, may_be_kept, read_record, record_of
from llmplane.kubeapi import Api, ApiError
from llmplane.refusals import Refusals, Refused, audience
from llmplane.sources.reflector import Reflector
from xds.group import Refusal
from xds.resources import Resource

_LOG = structlog.get_logger(__name__)

NAME = "llmplane-acknowledged"
"""Of the ConfigMap."""
_MOST_BYTES = 1_000_000
"""In base64, of all entries; a ConfigMap may have 1 MiB before that (Kubernetes' MaxSecretSize)."""
_MOST_CHARACTERS = 200_000
"""Of the JSON that says who refused what: there is so much room beside the entries."""
_REFUSALS = "refusals"
"""Its place in the ConfigMap."""
_MOST_DUE = 4096
"""Changes of it that wait to be written; beyond this the oldest are forgotten."""
_PAUSE = 1.0
"""Seconds between two writes."""
_FAILURE_PAUSE = 5.0
"""Seconds until it is tried again what failed."""
_TRIES = 10
"""Of a write that another replica was faster than; with each, one of them has written."""
_BETWEEN_TRIES = 0.1
"""Seconds, at most."""
_LAST_WRITE = 2.0
"""Seconds that the last write may take when the program ends."""
_CONFLICT = 409
_NOT_FOUND = 404

_Entries = dict[str, str]
"""Compressed records by the digests of what they stand in for, the oldest first."""


_Changes = dict[tuple[Refused, str], tuple[Callable[[Refusals, Refusal], None], Refusal]]
"""What is to be done with a refusal, by version and audience: `Refusals.add` or `Refusals.drop`."""


class _Content(NamedTuple):
    """What the ConfigMap has."""

    entries: _Entries
    refusals: str


class AcknowledgedConfigMap:
    """Acknowledged resources by the refused version that they stand in for (an xds.group.Archive).

    Secrets and clients' API keys are never kept. That it cannot be written is a warning in the log. `changed`
    is called when something was read, and so is `on_change`.
    """

    def __init__(self, api: Api, changed: Callable[[], None]) -> None:
        self.on_change: Callable[[], None] | None = None
        """Of whom it is an archive: what was not in it may be now."""
        self._changed = changed
        self._api = api
        self._path = f"/api/v1/namespaces/{api.namespace}/configmaps"
        self._metadata = {"name": NAME, "namespace": api.namespace}
        self.reflector: Reflector[_Content] = Reflector(
            api, (self._path,), _changed_content, self._take, fieldSelector=f"metadata.name={NAME}"
        )
        """What all replicas have written."""
        self._refusals = Refusals()
        """The same, read, with what is yet to be written."""
        self._own: dict[Refused, Resource] = {}
        """What was put here, the oldest first."""
        self._due: set[Refused] = set()
        """Those of them that are yet to be written."""
        self._due_refusals: _Changes = {}
        """What is yet to be added to the refusals, and to be dropped."""
        self._is_due = asyncio.Event()
        self._failure = ""

    def put(self, refused: Refused, good: Resource) -> None:
        """Remember what stands in for a refused version."""
        if not may_be_kept(good):
            return
        if self._own.get(refused) == good and _digest(refused) in self._read().entries:
            return
        self._own.pop(refused, None)
        self._own[refused] = good
        self._due.add(refused)
        if len(self._own) > MOST:
            oldest = next(iter(self._own))
            del self._own[oldest]
            self._due.discard(oldest)
        self._is_due.set()

    def get(self, refused: Refused) -> Resource | None:
        """Return what stands in for a refused version, if that is known."""
        if (own := self._own.get(refused)) is not None:
            return own
        if (text := self._read().entries.get(_digest(refused))) is None:
            return None
        try:
            of, good = read_record(json.loads(gzip.decompress(base64.b64decode(text))))
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            kind = type(error).__name__
            _LOG.warning("an acknowledged version cannot be read", resource=refused[1], error=kind)
            return None
        return good if of == refused else None

    def add(self, refusal: Refusal) -> None:
        """Remember who refused a version."""
        if self._refusals.is_new(refusal):
            self._change(Refusals.add, refusal)

    def drop(self, refusal: Refusal) -> None:
        """Forget that."""
        if self._refusals.has(refusal):
            self._change(Refusals.drop, refusal)

    def refusals(self, group: Hashable) -> Iterable[Refusal]:
        """Return what proxies like those of a group refused lately."""
        return self._refusals.of(group)

    def _change(self, change: Callable[[Refusals, Refusal], None], refusal: Refusal) -> None:
        change(self._refusals, refusal)
        self._due_refusals[refusal.refused, audience(refusal.group)] = change, refusal
        if len(self._due_refusals) > _MOST_DUE:
            del self._due_refusals[next(iter(self._due_refusals))]
        self._is_due.set()

    async def write(self) -> None:
        """Write what is put, until cancelled; what is left then is written at once, if that is possible."""
        try:
            while True:
                await self._is_due.wait()
                self._is_due.clear()
                await asyncio.sleep(await self._try())
        finally:
            with suppress(ApiError, TimeoutError):
                async with asyncio.timeout(_LAST_WRITE):
                    await self._store()

    async def _try(self) -> float:
        """Write what is due; return for how many seconds to rest."""
        try:
            await self._store()
        except ApiError as error:
            self._is_due.set()
            if str(error) != self._failure:
                self._failure = str(error)
                _LOG.warning("acknowledged versions cannot be shared", problem=self._failure)
            return max(_FAILURE_PAUSE, error.retry_after)
        except Exception:  # noqa: BLE001 - a mistake of ours, whatever it is
            _LOG.exception("acknowledged versions could not be shared")
            return _FAILURE_PAUSE
        self._failure = ""
        return _PAUSE

    async def _store(self) -> None:
        """Write what is due, again as long as others are faster. Raises ApiError."""
        for left in reversed(range(_TRIES)):
            due = {refused: good for refused, good in self._own.items() if refused in self._due}
            changes = dict(self._due_refusals)
            if not due and not changes:
                return
            try:
                written = await self._merge(due, changes)
            except ApiError as error:
                if error.status != _CONFLICT or not left:
                    raise
                await asyncio.sleep(random.uniform(0, _BETWEEN_TRIES))  # noqa: S311 - others wait, too
                continue
            self._due -= {refused for refused, good in due.items() if self._own.get(refused) is good}
            for key, change in changes.items():
                if self._due_refusals.get(key) is change:
                    del self._due_refusals[key]
            if without := [refused[1] for refused in due if _digest(refused) not in written]:
                _LOG.warning("acknowledged versions are too large to be shared", resources=without[:10])

    async def _merge(self, due: Mapping[Refused, Resource], changes: _Changes) -> _Entries:
        """Add entries to those that there are, and change the refusals; return the entries then.

        Raises ApiError, with 409 if another replica wrote meanwhile.
        """
        try:
            found = await self._api.get(f"{self._path}/{NAME}")
        except ApiError as error:
            if error.status != _NOT_FOUND:
                raise
            found = {}
        before = _content(found)
        entries = await asyncio.to_thread(merged, before.entries, due)  # compressing megabytes takes its time
        refusals = _read_refusals(before.refusals)
        for change, refusal in changes.values():
            change(refusals, refusal)
        text = refusals.dump(_MOST_CHARACTERS)
        if list(entries.items()) == list(before.entries.items()) and text == before.refusals:
            return entries
        data = {f"{number:03}.{digest}": text for number, (digest, text) in enumerate(entries.items())}
        content = {"binaryData": data, "data": {_REFUSALS: text}}
        if found:
            await self._api.put(f"{self._path}/{NAME}", {**found, **content})
        else:
            body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": self._metadata}
            await self._api.post(self._path, {**body, **content})
        return entries

    def _take(self) -> None:
        self._refusals = _read_refusals(self._read().refusals)
        for change, refusal in self._due_refusals.values():
            change(self._refusals, refusal)
        self._changed()
        if self.on_change is not None:
            self.on_change()

    def _read(self) -> _Content:
        return next(iter(self.reflector.items.values()), _Content({}, ""))


def merged(entries: Mapping[str, str], due: Mapping[Refused, Resource]) -> _Entries:
    """Return entries with those that are due; the newest of them, as many as a ConfigMap can have."""
    all_of_them = dict(entries)
    for refused, good in due.items():
        record = json.dumps(record_of(refused, good)).encode()
        text = base64.b64encode(gzip.compress(record, 6, mtime=0)).decode()
        if all_of_them.get(_digest(refused)) != text:
            all_of_them.pop(_digest(refused), None)
            all_of_them[_digest(refused)] = text
    newest: list[tuple[str, str]] = []
    size = 0
    for digest, text in reversed(all_of_them.items()):
        if len(newest) < MOST and size + len(text) <= _MOST_BYTES:
            newest.append((digest, text))
            size += len(text)
    return dict(reversed(newest))


def _content(document: Mapping[str, Any]) -> _Content:
    """Return what the ConfigMap has; the names of its entries begin with their place."""
    data: dict[str, str] = document.get("binaryData") or {}
    entries = {name.partition(".")[2]: text for name, text in sorted(data.items())}
    return _Content(entries, (document.get("data") or {}).get(_REFUSALS, ""))


def _changed_content(document: Mapping[str, Any], known: _Content | None) -> _Content:
    found = _content(document)
    return known if known == found and known is not None else found


def _read_refusals(text: str) -> Refusals:
    try:
        return Refusals.read(text or "[]")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning("refused versions cannot be read", error=type(error).__name__)
        return Refusals()


def _digest(refused: Refused) -> str:
    """Return what a refused version is called in a ConfigMap, which takes few characters."""
    return hashlib.sha256("\0".join(refused).encode()).hexdigest()[:32]
