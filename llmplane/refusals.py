"""Who refused what, as it is kept beyond the life of one control plane: plain values, and JSON.

Proxies that are as similar as an `audience` says refuse the same. So that what has healed outside (a file on
Envoy's machine that is there now) is tried again, a refusal counts only for a while.
"""

import json
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from translator.features import version_text
from translator.proxy import Proxy
from xds.group import Refusal

MOST = 256
"""Refused versions that are kept, and audiences of each; beyond this the oldest are forgotten."""

COUNTS = 600.0
"""Seconds that a refusal counts, from when a proxy refused last."""

_RENEWED = 60.0
"""Seconds after which it is of interest that another proxy of the same audience refuses."""

Refused = tuple[str, str, str]
"""Type URL, name and version."""


def audience(group: Hashable) -> str:
    """Return who refuses what a proxy of this group refused, also after it was made anew; empty: nobody."""
    if not isinstance(group, Proxy):
        return ""
    version = version_text(group.version) if group.version else ""
    return f"{group.type}~{group.workload}.{group.namespace}~{version}"


@dataclass(slots=True)
class _Entry:
    """A refused version."""

    detail: str
    node_id: str
    audiences: dict[str, float] = field(default_factory=dict)
    """When each refused it last, in seconds since the epoch; the oldest first."""


class Refusals:
    """Refused versions, the oldest first."""

    def __init__(self) -> None:
        self._entries: dict[Refused, _Entry] = {}

    @classmethod
    def read(cls, text: str) -> Self:
        """Read what `dump` made. Raises ValueError, KeyError, TypeError and AttributeError."""
        read = cls()
        for record in json.loads(text):
            type_url, name, version = (str(each) for each in record["refused"])
            audiences = {str(of): float(since) for of, since in record["audiences"].items()}
            entry = _Entry(str(record["detail"]), str(record["node"]), audiences)
            read._entries[type_url, name, version] = entry
        return read

    def dump(self, most: int | None = None) -> str:
        """Return them as JSON; if that would be more than `most` characters, the newest of them."""
        records = [json.dumps(_record(refused, entry)) for refused, entry in self._entries.items()]
        while records and most is not None and sum(map(len, records)) + 2 * len(records) > most:
            del records[0]
        return f"[{', '.join(records)}]"

    def has(self, refusal: Refusal) -> bool:
        """Whether proxies of this audience are known to refuse this."""
        entry = self._entries.get(refusal.refused)
        return entry is not None and audience(refusal.group) in entry.audiences

    def is_new(self, refusal: Refusal) -> bool:
        """Whether it is worth noting that proxies of this audience refuse this."""
        if not self.has(refusal):
            return bool(audience(refusal.group))
        since = self._entries[refusal.refused].audiences[audience(refusal.group)]
        return refusal.since - since >= _RENEWED

    def add(self, refusal: Refusal) -> None:
        """Note a refusal, and forget those that do not count any more."""
        entry = self._entries.pop(refusal.refused, None) or _Entry(refusal.detail, refusal.node_id)
        self._entries[refusal.refused] = entry
        since = max(refusal.since, entry.audiences.pop(of := audience(refusal.group), refusal.since))
        entry.audiences[of] = since
        if since == refusal.since:
            entry.detail, entry.node_id = refusal.detail, refusal.node_id
        for each in self._entries.values():
            newest = sorted(each.audiences.items(), key=lambda item: item[1])[-MOST:]
            each.audiences = {of: since for of, since in newest if refusal.since - since < COUNTS}
        counting = [(refused, each) for refused, each in self._entries.items() if each.audiences]
        self._entries = dict(counting[-MOST:])

    def drop(self, refusal: Refusal) -> None:
        """Forget that proxies of this audience refuse this."""
        if (entry := self._entries.get(refusal.refused)) is not None:
            entry.audiences.pop(audience(refusal.group), None)
            if not entry.audiences:
                del self._entries[refusal.refused]

    def of(self, group: Hashable) -> list[Refusal]:
        """Return what proxies of the audience of a group refuse, as refusals of that group."""
        if not self._entries:
            return []
        found, now = audience(group), time.time()
        return [
            Refusal(group, *refused, entry.detail, since, entry.node_id, archived=True)
            for refused, entry in self._entries.items()
            if (since := entry.audiences.get(found)) is not None and now - since < COUNTS
        ]


def _record(refused: Refused, entry: _Entry) -> Mapping[str, Any]:
    return {
        "refused": refused,
        "detail": entry.detail,
        "node": entry.node_id,
        "audiences": entry.audiences,
    }
