"""Work that goes on beside other work."""

import asyncio

import pytest

from llmplane.background import end, running


async def fails() -> None:
    raise ValueError("x")


class Slow:
    """Takes its time to end."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.is_ending = asyncio.Event()
        self.has_ended = False

    async def run(self) -> None:
        try:
            self.has_begun.set()
            await asyncio.Event().wait()
        finally:
            self.is_ending.set()
            await self.may_end.wait()
            self.has_ended = True


async def test_what_fails_ends_all_at_once() -> None:
    """Nobody would miss it otherwise before the end of the program."""
    slow = Slow()
    slow.may_end.set()
    with pytest.raises(ValueError, match="x"):
        async with asyncio.timeout(60) as deadline, running(fails(), slow.run()):
            await asyncio.Event().wait()
    assert not deadline.expired()
    assert slow.has_ended


async def test_what_is_ending_is_not_disturbed_by_a_failure_elsewhere() -> None:
    """It gives back a Lease, for example, while what it ran beside ends too."""
    slow = Slow()

    async def run() -> None:
        async with running(fails(), slow.run()):
            try:
                await asyncio.Event().wait()
            finally:
                async with asyncio.timeout(60):
                    await slow.is_ending.wait()
                slow.may_end.set()

    with pytest.raises(ValueError, match="x"):
        await run()
    assert slow.has_ended


async def test_a_failure_of_the_block_ends_the_work() -> None:
    slow = Slow()
    slow.may_end.set()

    async def run() -> None:
        async with running(slow.run()):
            await slow.has_begun.wait()
            await fails()

    with pytest.raises(ValueError, match="x"):
        await run()
    assert slow.has_ended


async def test_who_is_cancelled_cancels_the_work() -> None:
    slow = Slow()
    slow.may_end.set()

    async def run() -> None:
        async with running(slow.run()):
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await slow.has_begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slow.has_ended


async def test_who_is_cancelled_while_it_waits_ends() -> None:
    slow = Slow()
    work = asyncio.create_task(slow.run())
    await asyncio.sleep(0)
    ending = asyncio.create_task(end(work))
    await slow.is_ending.wait()
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert work.cancelled()
