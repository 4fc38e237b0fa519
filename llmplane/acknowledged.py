"""What stands in for resources that Envoys refuse, beyond the life of one control plane.

A version that was refused is replaced by the one that was acknowledged last (`xds.group`). A control plane
that was started since, or another replica with the same state directory, would not know that one any more.
"""

import base64
import json
import os
import tempfile
from pathlib import Path

import structlog

from translator import policies
from xds.resources import SDS, Resource

_LOG = structlog.get_logger(__name__)

_MOST = 256
"""Resources in the file; beyond this the oldest are forgotten."""

_Refused = tuple[str, str, str]
"""Type URL, name and version."""


class AcknowledgedFile:
    """Acknowledged resources by the refused version that they stand in for (an xds.group.Archive).

    Written when something is refused and read again when something has no stand-in: both are rare. Secrets
    and clients' API keys are never kept. A file that cannot be used is no error, but a warning in the log.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def put(self, refused: _Refused, good: Resource) -> None:
        """Remember what stands in for a refused version."""
        resources = self._read()
        if good.type_url == SDS or policies.holds_keys(good) or resources.get(refused) == good:
            return
        resources.pop(refused, None)
        resources[refused] = good
        newest = list(resources.items())[-_MOST:]
        records = [
            {
                "refused": key,
                "endpoints": resource.endpoints,
                "body": base64.b64encode(resource.body).decode(),
            }
            for key, resource in newest
        ]
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._file.parent)  # mode 0600
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(records, stream)
            Path(temporary).replace(self._file)
        except OSError as error:
            _LOG.warning("acknowledged versions cannot be kept", file=str(self._file), error=error.strerror)

    def get(self, refused: _Refused) -> Resource | None:
        """Return what stands in for a refused version, if that is known."""
        return self._read().get(refused)

    def _read(self) -> dict[_Refused, Resource]:
        try:
            records = json.loads(self._file.read_text(encoding="utf-8"))
            resources = {}
            for record in records:
                type_url, name, version = record["refused"]
                body = base64.b64decode(record["body"], validate=True)
                resources[type_url, name, version] = Resource.of_body(
                    type_url, name, body, endpoints=record["endpoints"]
                )
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            name = type(error).__name__
            _LOG.warning("acknowledged versions cannot be read", file=str(self._file), error=name)
            return {}
        return resources
