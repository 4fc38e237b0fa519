"""What stands in for resources that Envoys refuse, beyond the life of one control plane.

A version that was refused is replaced by the one that was acknowledged last (`xds.group`). A control plane
that was started since, or another replica, would not know that one any more. It is kept in a file, or in a
cluster (llmplane.kubeacknowledged).
"""

import base64
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from translator import policies
from xds.resources import SDS, Resource

_LOG = structlog.get_logger(__name__)

MOST = 256
"""Resources that are kept; beyond this the oldest are forgotten."""

Refused = tuple[str, str, str]
"""Type URL, name and version."""


def may_be_kept(good: Resource) -> bool:
    """Whether no secret and no client's API key is in a resource."""
    return good.type_url != SDS and not policies.holds_keys(good)


def record_of(refused: Refused, good: Resource) -> dict[str, Any]:
    """Return as JSON what stands in for a refused version."""
    body = base64.b64encode(good.body).decode()
    return {"refused": refused, "endpoints": good.endpoints, "body": body}


def read_record(record: Mapping[str, Any]) -> tuple[Refused, Resource]:
    """Return what a record says. Raises ValueError, KeyError and TypeError."""
    type_url, name, version = record["refused"]
    body = base64.b64decode(record["body"], validate=True)
    good = Resource.of_body(type_url, name, body, endpoints=record["endpoints"])
    return (type_url, name, version), good


class AcknowledgedFile:
    """Acknowledged resources by the refused version that they stand in for (an xds.group.Archive).

    Written when something is refused and read again when something has no stand-in: both are rare. Secrets
    and clients' API keys are never kept. A file that cannot be used is no error, but a warning in the log.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def put(self, refused: Refused, good: Resource) -> None:
        """Remember what stands in for a refused version."""
        resources = self._read()
        if not may_be_kept(good) or resources.get(refused) == good:
            return
        resources.pop(refused, None)
        resources[refused] = good
        records = [record_of(*each) for each in list(resources.items())[-MOST:]]
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._file.parent)  # mode 0600
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(records, stream)
            Path(temporary).replace(self._file)
        except OSError as error:
            _LOG.warning("acknowledged versions cannot be kept", file=str(self._file), error=error.strerror)

    def get(self, refused: Refused) -> Resource | None:
        """Return what stands in for a refused version, if that is known."""
        return self._read().get(refused)

    def _read(self) -> dict[Refused, Resource]:
        try:
            records = json.loads(self._file.read_text(encoding="utf-8"))
            return dict(read_record(record) for record in records)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            name = type(error).__name__
            _LOG.warning("acknowledged versions cannot be read", file=str(self._file), error=name)
            return {}
