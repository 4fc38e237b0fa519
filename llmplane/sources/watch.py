"""When to look at files again."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

from watchfiles._rust_notify import RustNotify

_QUIET_MS = 20
"""A change counts when nothing was written for this long, so that a file being written is read whole."""
_LONGEST_QUIET_MS = 500
_LOOK_MS = 1000
"""How often to look without a change: the kernel tells nothing of what lies behind symbolic links or on
network file systems, or of a folder that comes back."""


async def changes(paths: Sequence[Path], stop: asyncio.Event) -> AsyncIterator[bool]:
    """Yield now and then, until ``stop`` is set: True after a change below ``paths``, False without one.

    Nothing that happens after the first item is missed.
    """
    while not stop.is_set():
        watched = _identities(paths)
        try:
            # Not watchfiles.awatch: it begins to watch only when it is asked for the first change.
            watcher = RustNotify(
                [str(path) for path in watched],
                debug=False,
                force_polling=False,
                poll_delay_ms=_LOOK_MS,
                recursive=True,
                ignore_permission_denied=True,
            )
        except FileNotFoundError:  # it vanished this very moment
            continue
        yield False
        # A watch stays with a file or folder that was replaced by another one of its name.
        while _identities(paths) == watched:
            found = await asyncio.to_thread(watcher.watch, _LONGEST_QUIET_MS, _QUIET_MS, _LOOK_MS, stop)
            if stop.is_set():
                return
            yield isinstance(found, set) and _is_visible(path for _, path in found)


def _identities(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Tell which of these files and folders exist, and which ones they are."""
    found = {}
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            continue
        found[path] = (status.st_dev, status.st_ino)
    return found


def _is_visible(changed: Iterable[str]) -> bool:
    """Whether something else changed than editors' own files (`.x.swp`)."""
    return any(not os.path.basename(path).startswith(".") for path in changed)  # noqa: PTH119 - often called
