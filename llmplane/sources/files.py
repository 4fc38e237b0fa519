"""Objects from YAML and JSON files, read again when they change.

A document that cannot be read costs nothing but itself: its object, if it can be told which, stays in its
last good version; if it cannot be told, nothing is removed at all (design decision 5). Until all was readable
once, in this process or by what `last_good` remembers, the state is `unknown`.
"""

import asyncio
import os
import stat
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from crds.loader import Loaded, Location, combine, load
from crds.problems import ObjectKey, Problem, Severity
from crds.unreadable import UnreadablePolicy
from llmplane.sources.keeping import Keeper
from llmplane.sources.lastgood import LastGood
from llmplane.sources.state import SourceState
from llmplane.sources.watch import changes

_SUFFIXES = (".yaml", ".yml", ".json")

_SOME_POLICY = UnreadablePolicy(ObjectKey("AuthorizationPolicy", "", ""), None)
"""What a file that was never readable may hold."""


_Stamp = tuple[int, int, int]
"""A file's number, size and time of the last write (ns): another one after a change."""

_CLOCK_NS = 1_000_000_000
"""A write can hide from the stamp if it follows another one within a tick of the file system's clock."""


@dataclass(frozen=True, slots=True)
class _Listing:
    """The files that count, and why others cannot be read although they should be there."""

    files: dict[Path, _Stamp]
    unreadable: dict[Path, str]
    refused: set[Path]
    """Those of the latter that are there, but whose content we do not get to see."""

    def fail(self, path: Path, error: OSError) -> None:
        """Note what the system says of a file or folder."""
        self.unreadable[path] = f"cannot be read: {error.strerror}"
        if not isinstance(error, FileNotFoundError):
            self.refused.add(path)

    def add(self, path: Path) -> None:
        """Look at a file."""
        try:
            status = path.stat()
        except OSError as error:
            self.fail(path, error)
            return
        if stat.S_ISREG(status.st_mode):
            self.files[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
        else:
            self.unreadable[path] = "is not a file"  # a pipe would be waited for


@dataclass(frozen=True, slots=True)
class _File:
    text: str
    loaded: Loaded
    stamp: _Stamp
    read_at: int
    """Nanoseconds since the epoch."""

    def is_still(self, stamp: _Stamp) -> bool:
        """Whether the file is surely what was read (git's rule for its index)."""
        return self.stamp == stamp and stamp[2] + _CLOCK_NS < self.read_at


class FileSource:
    """The objects below some folders (or in some files); hidden files and folders do not count.

    ``variables`` fill placeholders (crds.placeholders). ``last_good`` remembers good versions over a
    restart.
    """

    def __init__(
        self, paths: Sequence[Path], variables: Mapping[str, str], last_good: LastGood | None = None
    ) -> None:
        self._paths = tuple(paths)
        self._variables = variables
        self._keeper = Keeper(last_good, variables)
        self._files: dict[Path, _File] = {}
        self._listing = _Listing({}, {}, set())

    async def states(self, stop: asyncio.Event) -> AsyncIterator[SourceState]:
        """Yield the state now and whenever a file was replaced (by an equal one too), until ``stop`` is set.

        Good versions are put on disk after they were taken, which nobody waits for.
        """
        last = None
        async for changed in changes(self._paths, self._look, stop):
            state = self._read(self._listing)
            if not changed and state == last:
                continue
            last = state
            yield state
            self._keeper.put_on_disk()

    def read(self) -> SourceState:
        """Read all files now; an object that did not change keeps its identity."""
        return self._read(self._list())

    def _read(self, listing: _Listing) -> SourceState:
        found = _Listing(listing.files, dict(listing.unreadable), set(listing.refused))
        files: dict[Path, _File] = {}
        for path, stamp in listing.files.items():
            known = self._files.get(path)
            if known is not None and known.is_still(stamp):
                files[path] = known
                continue
            read_at = time.time_ns()
            try:
                # What is no UTF-8 becomes characters that no YAML may hold: it spoils its own document only.
                text = path.read_bytes().decode(errors="surrogateescape")
            except OSError as error:
                found.fail(path, error)
                continue
            if not text and self._keeper.had_objects_of(str(path)):
                # `generate > objects.yaml` has emptied the file long before it is written.
                found.unreadable[path] = (
                    "is empty: its objects stay until something is written or it is deleted"
                )
            elif known is not None and known.text == text:
                files[path] = replace(known, stamp=stamp, read_at=read_at)
            else:
                loaded = load(text, str(path), self._variables, known.loaded if known else None)
                files[path] = _File(text, loaded, stamp, read_at)
        self._files = files
        problems = [
            Problem(Severity.ERROR, str(path), 0, "", "", "", "", why)
            for path, why in found.unreadable.items()
        ]
        # What was never read may be a policy.
        closed = [
            (_SOME_POLICY, Location(str(path), 0))
            for path in sorted(found.refused)
            if not self._keeper.had_objects_of(str(path))
        ]
        return self._merge(problems, closed)

    def _list(self) -> _Listing:
        listing = _Listing({}, {}, set())
        visited: set[Path] = set()
        for path in self._paths:
            if path.is_dir():
                _walk(path, visited, listing)
            else:
                listing.add(path)
        return listing

    def _look(self) -> _Listing:
        """Return what is different after a change; all it costs is a system call for each file."""
        self._listing = self._list()
        return self._listing

    def _merge(
        self, problems: list[Problem], closed: Sequence[tuple[UnreadablePolicy, Location]]
    ) -> SourceState:
        """Put the files together, and keep what they do not tell."""
        loaded = combine(file.loaded for file in self._files.values())
        incomplete = bool(problems) or loaded.broken
        return self._keeper.merge(
            replace(loaded, unreadable=(*loaded.unreadable, *closed)),
            problems,
            doubtful=self._keeper.known() if incomplete else (),
            complete=not incomplete,
            incomplete=incomplete,
        )


def _walk(top: Path, visited: set[Path], listing: _Listing) -> None:
    """Add what is below a folder. Symbolic links are followed: volumes of Kubernetes consist of them."""

    def fail(error: OSError) -> None:
        listing.fail(Path(error.filename), error)

    for folder, folders, names in os.walk(top, onerror=fail, followlinks=True):
        real = Path(folder).resolve()
        if real in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(real)
        # A container's volume whose file does not exist becomes a folder of the file's name.
        for name in (name for name in folders if _counts(name)):
            listing.unreadable[Path(folder, name)] = "is a folder, not a file"
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _counts(name))
        for name in sorted(name for name in names if _counts(name)):
            listing.add(Path(folder, name))


def _counts(name: str) -> bool:
    """Editors' and Kubernetes' volumes' own files (`.x.swp`, `..data`) are no configuration."""
    return name.endswith(_SUFFIXES) and not name.startswith(".")
