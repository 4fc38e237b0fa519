"""When files are read again (llmplane.sources.watch)."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from watchfiles._rust_notify import WatchfilesRustInternalError

from llmplane.sources import watch


async def test_a_watch_that_cannot_be_made_for_a_while_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opens a thousand connections takes all files that the process may open, for some time."""
    file, make, tries = tmp_path / "a", watch.RustNotify, 0

    def make_or_refuse(*arguments: Any, **options: Any) -> object:
        nonlocal tries
        tries += 1
        if tries in (2, 3):
            raise WatchfilesRustInternalError("Too many open files (os error 24)")
        return make(*arguments, **options)

    monkeypatch.setattr(watch, "RustNotify", make_or_refuse)
    monkeypatch.setattr(watch, "LOOK_MS", 20)
    file.write_text("1")
    stop, seen = asyncio.Event(), []
    async with asyncio.timeout(60):
        async for _ in watch.changes([file], file.read_text, stop):
            seen.append(file.read_text())
            if seen[-1] == "1":  # another file of its name: it is watched anew
                (tmp_path / "b").write_text("2")
                (tmp_path / "b").replace(file)
            else:
                stop.set()
    assert (seen[0], seen[-1], tries) == ("1", "2", 4)


async def test_one_that_cannot_be_made_at_all_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> object:
        raise WatchfilesRustInternalError("Too many open files (os error 24)")

    monkeypatch.setattr(watch, "RustNotify", refuse)
    with pytest.raises(WatchfilesRustInternalError):
        await anext(watch.changes([tmp_path], lambda: 1, asyncio.Event()))
