"""What other replicas say of their proxies, so that the one who writes the status can add it up.

Each replica that does not lead, and has proxies, puts its counts into an entry of its own of one ConfigMap,
when they changed; a Lease has the time of each. Through the API server, because it is there, knows who may
write what (RBAC), and survives every replica: no replica needs the address or the certificate of another.
"""

import asyncio
import base64
import gzip
import json
import secrets
import socket
import time
import zlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import structlog

from crds.problems import ObjectKey
from llmplane.kubeapi import Api
from llmplane.sources.reflector import Reflector

_LOG = structlog.get_logger(__name__)

NAME = "llmplane-replicas"
"""Of the ConfigMap, and of the Lease."""
_FRESH = 12.0
"""Seconds for which counts hold that are not renewed; they are renewed every llmplane.leader.RENEW."""
_STALE = 60.0
"""Seconds after which what a replica left behind is removed."""
_PER_SECOND = 100_000
"""Bytes that a replica may write in a second, over time: ten thousand objects are about 100 KB."""
_LONGEST = 1000
"""Characters of a message that is handed on."""
_BEAT = "replicas.llmplane/"

View = Mapping[str, Any]
"""What a control plane says of an object (ControlPlane.objects)."""


class Count(NamedTuple):
    """The proxies of a replica that an object is for."""

    uid: str
    generation: int | None
    """The version that they are counted for."""
    acknowledged: int
    reached: int
    reason: str = ""
    """Why the object does not do all of its work at some of them, if that is so."""
    message: str = ""

    @classmethod
    def of(cls, view: View) -> "Count":
        """Take a replica's own count."""
        acknowledged, _, reached = view["programmed"].partition("/")
        objection = next((each for each in view["conditions"] if each["type"] == "Programmed"), None)
        words = (objection["reason"], objection["message"][:_LONGEST]) if objection else ("", "")
        return cls(view["uid"] or "", view["generation"], int(acknowledged), int(reached), *words)


def key_of(view: View) -> ObjectKey:
    """Return which object a view is of."""
    return ObjectKey(view["kind"], view["namespace"], view["name"])


def total(view: View, others: Iterable[Mapping[ObjectKey, Count]]) -> dict[str, Any]:
    """Return a view with the proxies of other replicas.

    Those of a replica that has another version of the object have not acknowledged this one; of those of a
    replica that does not have it, it cannot be told whether it is for them: `unread` counts such replicas.
    """
    own = Count.of(view)
    acknowledged, reached, unread = own.acknowledged, own.reached, 0
    objections = [own] if own.reason else []
    for counts in others:
        count = counts.get(key_of(view))
        if count is None:
            unread += 1
            continue
        reached += count.reached
        if (count.uid, count.generation) == (own.uid, own.generation):
            acknowledged += count.acknowledged
            objections += [count] if count.reason else []
    conditions = [each for each in view["conditions"] if each["type"] != "Programmed"]
    if objections:
        message = "; ".join(dict.fromkeys(each.message for each in objections))
        objection = {"status": False, "reason": objections[0].reason, "message": message}
        conditions.append({"type": "Programmed", **objection})
    programmed = f"{acknowledged}/{reached}"
    return {**view, "programmed": programmed, "conditions": conditions, "unread": unread}


class Replicas:
    """The other replicas of this control plane."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api = api
        self._name = secrets.token_hex(6)
        self._manager = f"llmplane-{self._name}"
        self._config_map = f"/api/v1/namespaces/{namespace}/configmaps"
        self._lease = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._metadata = {"name": NAME, "namespace": namespace}
        only = f"metadata.name={NAME}"
        self._entries: Reflector[dict[str, str]] = Reflector(
            api, (self._config_map,), partial(_strings, "binaryData", ""), lambda: None, fieldSelector=only
        )
        self._beats: Reflector[dict[str, str]] = Reflector(
            api, (self._lease,), _beats, self._see, fieldSelector=only
        )
        self._seen: dict[str, tuple[str, float]] = {}
        """The newest beat of each other replica, and when it was seen, by one's own clock."""
        self._read: dict[str, tuple[str, Mapping[ObjectKey, Count]]] = {}
        """What an entry means."""
        self._told = b""
        self._may_tell_at = 0.0

    async def run(self) -> None:
        """Watch what others say, for ever."""
        await asyncio.gather(self._entries.run(), self._beats.run())

    def others(self) -> list[Mapping[ObjectKey, Count]]:
        """Return the counts of each other replica that is alive."""
        entries = self._all()
        now = time.monotonic()
        alive = [
            name
            for name, (_, at) in self._seen.items()
            if name in entries and name != self._name and now - at < _FRESH
        ]
        return [self._counts(name, entries[name]) for name in alive]

    async def tell(self, views: Iterable[View]) -> None:
        """Write the counts of this replica, if they changed; at a bounded rate. Raises ApiError.

        Also if they are not there any more: who could not renew them for a while was taken for dead.
        """
        counts = [[*key_of(view), *Count.of(view)] for view in views]
        text = gzip.compress(json.dumps(counts).encode(), 6, mtime=0)
        now = time.monotonic()
        is_there = not self._entries.is_synced or self._name in self._all()
        if (text == self._told and is_there) or now < self._may_tell_at:
            return
        self._may_tell_at = now + 1 + len(text) / _PER_SECOND
        if not self._told:
            await self._beat()
        await self._apply(self._manager, {self._name: base64.b64encode(text).decode()})
        self._told = text

    async def renew(self) -> None:
        """Say that the counts still hold; call it every RENEW seconds. Raises ApiError."""
        if self._told:
            await self._beat()

    async def retire(self) -> None:
        """Take the own counts back: there are no proxies, or this replica leads. Raises ApiError."""
        if self._told:
            await self._remove(self._manager)
            self._told = b""

    async def bury(self) -> None:
        """Remove what dead replicas left behind. Raises ApiError."""
        now = time.monotonic()
        entries = self._all()
        for name in [name for name, (_, at) in self._seen.items() if now - at > _STALE]:
            if name in entries or name in next(iter(self._beats.items.values()), {}):
                await self._remove(f"llmplane-{name}")
            del self._seen[name]
            self._read.pop(name, None)

    def _all(self) -> Mapping[str, str]:
        """Return the entries of all replicas."""
        return next(iter(self._entries.items.values()), {})

    def _see(self) -> None:
        for name, beat in next(iter(self._beats.items.values()), {}).items():
            if name != self._name and self._seen.get(name, ("",))[0] != beat:
                self._seen[name] = (beat, time.monotonic())

    def _counts(self, name: str, text: str) -> Mapping[ObjectKey, Count]:
        if self._read.get(name, ("",))[0] != text:
            counts: dict[ObjectKey, Count] = {}
            try:
                for kind, namespace, of, *rest in json.loads(gzip.decompress(base64.b64decode(text))):
                    counts[ObjectKey(kind, namespace, of)] = Count(*rest)
            # It is of another version of this program.
            except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
                _LOG.warning("the counts of a replica cannot be read", replica=name, problem=str(error))
            self._read[name] = text, counts
        return self._read[name][1]

    async def _beat(self) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        await self._apply_beat(self._manager, {f"{_BEAT}{self._name}": f"{now} {socket.gethostname()}"})

    async def _remove(self, manager: str) -> None:
        """Have a replica own nothing any more: what it had goes with that."""
        await self._apply(manager, {})
        await self._apply_beat(manager, {})

    async def _apply(self, manager: str, data: Mapping[str, str]) -> None:
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": self._metadata}
        await self._api.apply(f"{self._config_map}/{NAME}", {**body, "binaryData": data}, manager)

    async def _apply_beat(self, manager: str, annotations: Mapping[str, str]) -> None:
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
        metadata = {**self._metadata, "annotations": annotations}
        await self._api.apply(f"{self._lease}/{NAME}", {**body, "metadata": metadata}, manager)


def _strings(
    member: str, prefix: str, document: Mapping[str, Any], known: dict[str, str] | None
) -> dict[str, str]:
    found = {
        name.removeprefix(prefix): value
        for name, value in (document.get(member) or {}).items()
        if name.startswith(prefix)
    }
    return known if known == found and known is not None else found


def _beats(document: Mapping[str, Any], known: dict[str, str] | None) -> dict[str, str]:
    return _strings("annotations", _BEAT, document["metadata"], known)
