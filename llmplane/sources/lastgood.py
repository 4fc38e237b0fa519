"""The last good version of each object on disk, so that a restart with a broken file changes nothing.

No key is kept in clear: placeholders are kept unfilled, keys that were written into a file are left out, and
Secrets are not kept at all.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from crds import document
from crds.loader import LoadedObject, load
from crds.placeholders import normalise
from crds.problems import ObjectKey

_LOG = structlog.get_logger(__name__)

_NOT_KEPT = "LLMPLANE_KEY_NOT_KEPT"
_MARK = f"${{{_NOT_KEPT}}}"
"""Instead of a key: a placeholder, so that what lies on the disk is a valid object."""
_PLACEHOLDER = re.compile(r"\$\{[^}]*\}")
_METADATA = ("name", "namespace", "labels", "creationTimestamp")
"""Not annotations: kubectl's last-applied-configuration repeats the object, with its key."""


class NoStateDirectoryError(RuntimeError):
    """There is no place for the last good versions; the text says what to set."""


def state_file(kind: str, paths: Sequence[Path]) -> Path:
    """Return where some state of a set of --config paths lies: below $XDG_STATE_HOME (~/.local/state).

    Raises NoStateDirectoryError.
    """
    try:
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except RuntimeError:
        raise NoStateDirectoryError("this user has no home directory: set XDG_STATE_HOME") from None
    name = hashlib.sha256("\0".join(sorted(str(path.absolute()) for path in paths)).encode()).hexdigest()
    return home / "llmplane" / f"{kind}-{name[:16]}.json"


class LastGood:
    """Good versions by object, read once and written when they change.

    A file that cannot be used is no error, but a warning in the log.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._records: dict[ObjectKey, tuple[str, str]] = {}
        """The file that an object came from, and its content as JSON."""
        self._digests: dict[ObjectKey, str] = {}
        self.found = False
        """Whether good versions of everything were remembered."""
        try:
            records = json.loads(file.read_text(encoding="utf-8"))
            self._records = {
                ObjectKey(*record["key"]): (record["file"], record["text"]) for record in records
            }
            self.found = True
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            _LOG.warning("last good versions cannot be read", file=str(file), error=type(error).__name__)

    def keys(self) -> set[ObjectKey]:
        """Return the objects of which a good version is known."""
        return set(self._records)

    def files(self) -> set[str]:
        """Return the files that they came from."""
        return {file for file, _ in self._records.values()}

    def get(self, key: ObjectKey, variables: Mapping[str, str]) -> tuple[LoadedObject, bool] | None:
        """Return the last good version of an object and whether its keys are known; None if there is none."""
        if key not in self._records:
            return None
        file, text = self._records[key]

        def fill(api_key: str) -> str:
            variable = normalise(api_key.strip()[2:-1])
            return api_key if variables.get(variable, "").strip() else _MARK

        content = json.dumps(_replace_keys(json.loads(text), fill))
        loaded = load(content, file, {**variables, _NOT_KEPT: "not-kept"})
        for item in loaded.objects:
            if item.key == key:
                self._digests[key] = item.digest  # `put` need not write it again
                return item, _MARK not in content
        return None

    def put(self, objects: Iterable[LoadedObject]) -> None:
        """Remember these good versions, and only these."""
        kept = {item.key: item for item in objects if item.kind != "Secret"}
        digests = {key: item.digest for key, item in kept.items()}
        if digests == self._digests:
            return
        self._records = {
            key: self._records[key]
            if key in self._records and self._digests.get(key) == item.digest
            else (item.file, json.dumps(_without_keys(item.text), default=str))
            for key, item in kept.items()
        }
        self._digests = digests
        self._write()

    def _write(self) -> None:
        records = [{"key": key, "file": file, "text": text} for key, (file, text) in self._records.items()]
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._file.parent)  # mode 0600
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(json.dumps(records))  # several times as fast as json.dump
            Path(temporary).replace(self._file)
        except OSError as error:
            _LOG.warning("last good versions cannot be kept", file=str(self._file), error=error.strerror)


def _without_keys(text: str) -> Any:
    """Read a document, and replace each apiKey that is more than a placeholder by a mark."""
    (chunk,) = document.split(text)
    root = document.compose(chunk).root
    content = root.plain() if root else {}
    content["metadata"] = {name: content["metadata"].get(name) for name in _METADATA}
    content.pop("status", None)

    def strip(api_key: str) -> str:
        return api_key if _PLACEHOLDER.fullmatch(api_key.strip()) else _MARK

    return _replace_keys(content, strip)


def _replace_keys(value: Any, replace: Callable[[str], str]) -> Any:
    """Replace the values of all members ``apiKey``. Those of request bodies too: no key gets on the disk."""
    if isinstance(value, list):
        return [_replace_keys(item, replace) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: replace(item) if name == "apiKey" and isinstance(item, str) else _replace_keys(item, replace)
        for name, item in value.items()
    }
