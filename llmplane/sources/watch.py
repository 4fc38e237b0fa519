"""When to read files again."""

import asyncio
import stat
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path

from watchfiles._rust_notify import RustNotify, WatchfilesRustInternalError

QUIET_MS = 20
"""A change counts when nothing was written for this long, so that a file being written is read whole."""
LONGEST_QUIET_MS = 500
LOOK_MS = 1000
"""How often to look without being told: the kernel says nothing of what lies behind symbolic links or on
network file systems, or of a folder that comes back."""


async def changes(
    paths: Sequence[Path], look: Callable[[], object], stop: asyncio.Event
) -> AsyncIterator[bool]:
    """Yield now and after each change below ``paths``, until ``stop`` is set. No change is missed.

    ``look`` returns something that is different after a change; it is called each second, so it should be
    cheap. What is yielded is whether it was different; if not, two writes followed so fast on each other that
    the file system's clock does not tell them apart, or what was written is of no interest.
    """
    seen: object = None
    while not stop.is_set():
        watched = _identities(paths)
        try:
            # Not watchfiles.awatch: it begins to watch only when it is asked for the first change.
            watcher = RustNotify(
                [str(path) for path in watched],
                debug=False,
                force_polling=False,
                poll_delay_ms=LOOK_MS,
                recursive=True,
                ignore_permission_denied=True,
            )
        except FileNotFoundError:  # it vanished this very moment
            continue
        except (OSError, WatchfilesRustInternalError):
            if seen is None:
                raise
            await asyncio.sleep(LOOK_MS / 1000)  # too many files are open, say: that passes
            continue
        told: object = None
        while not stop.is_set():
            now = look()
            is_visible = isinstance(told, set) and _is_visible(path for _, path in told)
            if now != seen:
                seen = now if is_visible else await _at_rest(look, now)
                yield True
                if told == "timeout":  # the watch does not see everything (any more)
                    break
            elif is_visible:
                yield False
            if _identities(paths) != watched:  # a watch stays with what was replaced by another of its name
                break
            told = await asyncio.to_thread(watcher.watch, LONGEST_QUIET_MS, QUIET_MS, LOOK_MS, stop)


async def _at_rest(look: Callable[[], object], now: object) -> object:
    """Wait for the end of a change that was come across; return what there is then."""
    for _ in range(LONGEST_QUIET_MS // QUIET_MS):
        await asyncio.sleep(QUIET_MS / 1000)
        before, now = now, look()
        if now == before:
            break
    return now


def _identities(paths: Iterable[Path]) -> dict[Path, tuple[int, int, int]]:
    """Tell which of these files and folders exist, and which ones they are."""
    found = {}
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            continue
        # File systems give the number of a deleted file to the next one.
        written = 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
        found[path] = (status.st_dev, status.st_ino, written)
    return found


def _is_visible(changed: Iterable[str]) -> bool:
    """Whether something else changed than editors' own files (`.x.swp`)."""
    return any(not Path(path).name.startswith(".") for path in changed)
