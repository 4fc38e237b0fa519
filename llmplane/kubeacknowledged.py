"""What stands in for resources that Envoys refuse, in a cluster: one ConfigMap of all replicas.

As llmplane.acknowledged has it in a file. Each replica has in memory what it put itself, and what a watch
says of the ConfigMap, so that it can answer at once. It writes in the background: it reads, adds what is new
and writes with the resourceVersion that it has read; if another replica was faster, it does so again. So
none loses what another one has written. An entry belongs to no replica: it is there for those to come.
"""

import asyncio
import base64
import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import structlog

from llmplane.acknowledged import MOST, Refused, may_be_kept, read_record, record_of
from llmplane.kubeapi import Api, ApiError
from llmplane.sources.reflector import Reflector
from xds.resources import Resource

_LOG = structlog.get_logger(__name__)

NAME = "llmplane-acknowledged"
"""Of the ConfigMap."""
_MOST_BYTES = 1_000_000
"""In base64, of all entries; a ConfigMap may have 1 MiB before that (Kubernetes' MaxSecretSize)."""
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
        self.reflector: Reflector[_Entries] = Reflector(
            api, (self._path,), _changed_entries, self._take, fieldSelector=f"metadata.name={NAME}"
        )
        """What all replicas have written."""
        self._own: dict[Refused, Resource] = {}
        """What was put here, the oldest first."""
        self._due: set[Refused] = set()
        """Those of them that are yet to be written."""
        self._is_due = asyncio.Event()
        self._failure = ""

    def put(self, refused: Refused, good: Resource) -> None:
        """Remember what stands in for a refused version."""
        if not may_be_kept(good):
            return
        if self._own.get(refused) == good and _digest(refused) in self._read():
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
        if (text := self._read().get(_digest(refused))) is None:
            return None
        try:
            of, good = read_record(json.loads(gzip.decompress(base64.b64decode(text))))
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            kind = type(error).__name__
            _LOG.warning("an acknowledged version cannot be read", resource=refused[1], error=kind)
            return None
        return good if of == refused else None

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
            if not due:
                return
            try:
                written = await self._merge(due)
            except ApiError as error:
                if error.status != _CONFLICT or not left:
                    raise
                await asyncio.sleep(random.uniform(0, _BETWEEN_TRIES))  # noqa: S311 - others wait, too
                continue
            self._due -= {refused for refused, good in due.items() if self._own.get(refused) is good}
            if without := [refused[1] for refused in due if _digest(refused) not in written]:
                _LOG.warning("acknowledged versions are too large to be shared", resources=without[:10])

    async def _merge(self, due: Mapping[Refused, Resource]) -> _Entries:
        """Add entries to those that there are, and return what is there then.

        Raises ApiError, with 409 if another replica wrote meanwhile.
        """
        try:
            found = await self._api.get(f"{self._path}/{NAME}")
        except ApiError as error:
            if error.status != _NOT_FOUND:
                raise
            found = {}
        before = _entries(found)
        entries = await asyncio.to_thread(merged, before, due)  # compressing megabytes takes its time
        if list(entries.items()) == list(before.items()):
            return entries
        data = {f"{number:03}.{digest}": text for number, (digest, text) in enumerate(entries.items())}
        if found:
            await self._api.put(f"{self._path}/{NAME}", {**found, "binaryData": data})
        else:
            body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": self._metadata}
            await self._api.post(self._path, {**body, "binaryData": data})
        return entries

    def _take(self) -> None:
        self._changed()
        if self.on_change is not None:
            self.on_change()

    def _read(self) -> _Entries:
        return next(iter(self.reflector.items.values()), {})


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


def _entries(document: Mapping[str, Any]) -> _Entries:
    """Return the entries of the ConfigMap, whose names begin with their place."""
    data: dict[str, str] = document.get("binaryData") or {}
    return {name.partition(".")[2]: text for name, text in sorted(data.items())}


def _changed_entries(document: Mapping[str, Any], known: _Entries | None) -> _Entries:
    found = _entries(document)
    return known if known == found and known is not None else found


def _digest(refused: Refused) -> str:
    """Return what a refused version is called in a ConfigMap, which takes few characters."""
    return hashlib.sha256("\0".join(refused).encode()).hexdigest()[:32]
