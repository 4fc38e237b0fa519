"""The last good version of each object on disk, so that a restart with a broken file changes nothing.

No key is kept in clear: placeholders are kept unfilled, keys that were written into a file are left out, and
Secrets are not kept at all.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog
import yaml

from crds.loader import LoadedObject, load
from crds.problems import ObjectKey

_LOG = structlog.get_logger(__name__)
_NOT_KEPT = "LLMPLANE_KEY_NOT_KEPT"


def state_file(paths: Sequence[Path]) -> Path:
    """Return where the state of a set of --config paths lies: below $XDG_STATE_HOME (~/.local/state)."""
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    name = hashlib.sha256("\0".join(sorted(str(path.resolve()) for path in paths)).encode()).hexdigest()
    return home / "llmplane" / f"last-good-{name[:16]}.json"


class LastGood:
    """Good versions by object, read once, written when they change; a file that cannot be used is no error."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._texts: dict[ObjectKey, tuple[str, str]] = {}
        self._digests: dict[ObjectKey, str] = {}
        try:
            records = json.loads(file.read_text(encoding="utf-8"))
            self._texts = {ObjectKey(*record["key"]): (record["file"], record["text"]) for record in records}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            _LOG.warning("last good versions cannot be read", file=str(file), error=type(error).__name__)

    def keys(self) -> Iterator[ObjectKey]:
        """Return the objects of which a good version is known."""
        return iter(tuple(self._texts))

    def get(self, key: ObjectKey, variables: Mapping[str, str]) -> tuple[LoadedObject, bool] | None:
        """Return the last good version of an object and whether its keys are all known; None if there is none."""
        if key not in self._texts:
            return None
        file, text = self._texts[key]
        loaded = load(text, file, {**variables, _NOT_KEPT: "not-kept"})
        return next(((item, _NOT_KEPT not in text) for item in loaded.objects if item.key == key), None)

    def put(self, objects: Iterable[LoadedObject]) -> None:
        """Remember these good versions, and only these."""
        kept = {item.key: item for item in objects if item.kind != "Secret"}
        if {key: item.digest for key, item in kept.items()} == self._digests:
            return
        self._texts = {
            key: self._texts[key]
            if self._digests.get(key) == item.digest
            else (item.file, _without_keys(item.text))
            for key, item in kept.items()
        }
        self._digests = {key: item.digest for key, item in kept.items()}
        self._write()

    def _write(self) -> None:
        records = [{"key": key, "file": file, "text": text} for key, (file, text) in self._texts.items()]
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._file.parent)  # mode 0600
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(records, stream)
            Path(temporary).replace(self._file)
        except OSError as error:
            _LOG.warning("last good versions cannot be kept", file=str(self._file), error=error.strerror)


def _without_keys(text: str) -> str:
    """Return a document as JSON, each apiKey that is more than a placeholder replaced by a mark."""
    return json.dumps(_strip(yaml.safe_load(text)))


def _strip(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, list):
        return [_strip(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: _strip_key(item) if name == "apiKey" else _strip(item) for name, item in value.items()}


def _strip_key(key: Any) -> Any:  # noqa: ANN401
    is_placeholder = isinstance(key, str) and key.startswith("${") and key.endswith("}") and key.count("${") == 1
    return key if is_placeholder else f"${{{_NOT_KEPT}}}"
