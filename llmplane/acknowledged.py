"""What Envoys refuse, and what stands in for it, beyond the life of one control plane.

A version that was refused is replaced by the one that was acknowledged last (`xds.group`). A control plane
that was started since, or another replica, would know neither. Both are kept in files, or in a cluster
(llmplane.kubeacknowledged).
"""

import base64
import json
import os
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import structlog

from llmplane.refusals import Refusals, Refused
from translator import policies
from xds.group import Refusal
from xds.resources import SDS, Resource

_LOG = structlog.get_logger(__name__)

_T = TypeVar("_T")

MOST = 256
"""Resources that are kept; beyond this the oldest are forgotten."""


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

    Written when something is refused. Who refused is in a file beside it. Whether another process has written
    is looked for whenever something is published. Secrets and clients' API keys are never kept. A file that
    cannot be used is no error, but a warning in the log.
    """

    def __init__(self, file: Path) -> None:
        self._resources: _File[dict[Refused, Resource]] = _File(file, _read_resources)
        self._refusals = _File(file.with_suffix(".refused.json"), Refusals.read)

    def put(self, refused: Refused, good: Resource) -> None:
        """Remember what stands in for a refused version."""
        resources = self._resources.content()
        if not may_be_kept(good) or resources.get(refused) == good:
            return
        resources.pop(refused, None)
        resources[refused] = good
        if len(resources) > MOST:
            del resources[next(iter(resources))]
        self._resources.write(json.dumps([record_of(*each) for each in resources.items()]))

    def get(self, refused: Refused) -> Resource | None:
        """Return what stands in for a refused version, if that is known."""
        return self._resources.content().get(refused)

    def add(self, refusal: Refusal) -> None:
        """Remember who refused a version."""
        refusals = self._refusals.content()
        if refusals.is_new(refusal):
            refusals.add(refusal)
            self._refusals.write(refusals.dump())

    def drop(self, refusal: Refusal) -> None:
        """Forget that."""
        refusals = self._refusals.content()
        if refusals.has(refusal):
            refusals.drop(refusal)
            self._refusals.write(refusals.dump())

    def refusals(self, group: Hashable) -> Iterable[Refusal]:
        """Return what proxies like those of a group refused lately."""
        return self._refusals.content().of(group)


def _read_resources(text: str) -> dict[Refused, Resource]:
    return dict(read_record(record) for record in json.loads(text))


class _File(Generic[_T]):
    """A file of which the content is read again when it changed. It is replaced as a whole."""

    def __init__(self, path: Path, read: Callable[[str], _T]) -> None:
        self._path = path
        self._read = read
        self._content = read("[]")
        self._state: object = None

    def content(self) -> _T:
        """Return what is in it; nothing if it cannot be read."""
        try:
            status = self._path.stat()
            if (state := (status.st_ino, status.st_ctime_ns, status.st_size)) != self._state:
                self._state = state
                self._content = self._read(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self._content = self._read("[]")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._content = self._read("[]")
            name = type(error).__name__
            _LOG.warning("acknowledged versions cannot be read", file=str(self._path), error=name)
        return self._content

    def write(self, text: str) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._path.parent)  # mode 0600
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            Path(temporary).replace(self._path)
        except OSError as error:
            _LOG.warning("acknowledged versions cannot be kept", file=str(self._path), error=error.strerror)
