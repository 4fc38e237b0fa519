"""llmplane as a process that is measured: `python -m benchmarks.xds.server`.

With `--world` and `--changed` it is the management server alone, which serves the bytes of those files. With
`--providers` it is the whole control plane but for the files: a change is a changed LLMProvider, which is
translated. Commands and answers are those of `go/serve.go`.
"""

import asyncio
import gc
import json
import logging
import resource as usage
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Hashable
from pathlib import Path
from typing import Any, Final, Protocol

import click
import structlog

from benchmarks.xds import worlds
from llmplane.address import Address
from llmplane.controlplane import ControlPlane
from llmplane.metrics import Figures, Metrics
from llmplane.sources.state import SourceState
from xds.resources import CDS, Resource
from xds.server import ManagementServer, Node
from xds.snapshot import Snapshot

PATIENCE: Final = 60.0
"""Seconds that a change may take until all have acknowledged it."""


class _Plane(Protocol):
    server: ManagementServer

    async def start(self) -> int:
        """Serve; return the port."""

    def prepare(self, index: int) -> Callable[[], None]:
        """Do what need not be in the time of a change, and return what is."""


class _Bytes:
    """The management server alone, with one group of proxies."""

    def __init__(self, world: Path, changed: Path) -> None:
        self.server = ManagementServer(self, identifier="llmplane", observer=Metrics(Figures))
        self._resources = {(each.type_url, each.name): each for each in worlds.read(world)}
        self._changed = worlds.read(changed)
        self._originals = [self._resources[CDS, each.name] for each in self._changed]
        self._snapshot = Snapshot(self._resources.values())

    def group(self, node: Node, identity: object) -> Hashable:  # noqa: ARG002 - all are the same
        return "group"

    def snapshot(self, group: Hashable) -> Snapshot:  # noqa: ARG002
        return self._snapshot

    async def start(self) -> int:
        port = await self.server.start("127.0.0.1:0")
        self.server.ready()
        return port

    def prepare(self, index: int) -> Callable[[], None]:
        changed: Resource = _turn(self._changed, self._originals, index)
        self._resources[CDS, changed.name] = changed
        # As llmplane makes it, of all resources; what is different is found out when it is published.
        self._snapshot = Snapshot(self._resources.values())
        return lambda: self.server.publish({"group": self._snapshot})


class _Whole:
    """The control plane, with a source that is in memory."""

    def __init__(self, providers: int) -> None:
        self._objects = list(worlds.objects(providers))
        self._numbers = worlds.spread(providers)
        self._changed = worlds.others(providers)
        self._originals = [self._objects[number] for number in self._numbers]
        self._states: asyncio.Queue[SourceState] = asyncio.Queue()
        self._serving = asyncio.Event()
        self._plane = ControlPlane(self, worlds.mesh())
        self.server = self._plane.server

    async def states(self, stop: asyncio.Event) -> AsyncIterator[SourceState]:  # noqa: ARG002
        yield SourceState(objects=tuple(self._objects))
        self._serving.set()
        while True:
            yield await self._states.get()

    async def start(self) -> int:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        self._running = asyncio.create_task(
            self._plane.run(Address("127.0.0.1", port), Address("127.0.0.1", 0), asyncio.Event())
        )
        await self._serving.wait()
        return port

    def prepare(self, index: int) -> Callable[[], None]:
        changed = _turn(self._changed, self._originals, index)
        self._objects[self._numbers[index % len(self._numbers)]] = changed
        state = SourceState(objects=tuple(self._objects))
        return lambda: self._states.put_nowait(state)


def _turn(changed: Any, originals: Any, index: int) -> Any:
    """Return the other form of one, and the next time the original."""
    forms = originals if index // len(changed) % 2 else changed
    return forms[index % len(changed)]


class _Acks:
    """Counts ACKs: the management server calls `note` after each, and once when something is published."""

    def __init__(self) -> None:
        self._came: list[int] = []
        self._began = 0.0
        self._more = asyncio.Event()

    def begin(self) -> None:
        self._came.clear()
        self._began = _cpu_milliseconds()

    def note(self) -> None:
        self._came.append(time.time_ns())
        self._more.set()

    async def answer(self, count: int, **fields: float) -> None:
        """Wait for so many, and say when the last came and what CPU time was used since `begin`."""
        try:
            async with asyncio.timeout(PATIENCE):
                while len(self._came) < count:
                    self._more.clear()
                    await self._more.wait()
            fields["acknowledged_ns"] = self._came[count - 1]
        except TimeoutError:
            fields["missing"] = count - len(self._came)
        _answer(**fields, cpu_ms=_cpu_milliseconds() - self._began)


async def _run(plane: _Plane) -> None:
    acks = _Acks()
    plane.server.on_change = acks.note
    port = await plane.start()
    gc.collect()
    gc.freeze()  # as llmplane does when it begins to serve
    _answer(port=port)
    while line := await asyncio.to_thread(sys.stdin.readline):
        command, *numbers = line.split()
        if command == "begin":
            acks.begin()
            _answer(ready=True)
        elif command == "acks":
            await acks.answer(int(numbers[0]))
        else:
            index, count = map(int, numbers)
            apply = plane.prepare(index)
            acks.begin()
            begin, wall = time.perf_counter(), time.time_ns()
            apply()
            publish = (time.perf_counter() - begin) * 1000
            await acks.answer(count + 1, begin_ns=wall, publish_ms=publish)


def _answer(**fields: float) -> None:
    print(json.dumps(fields), flush=True)


def _cpu_milliseconds() -> float:
    used = usage.getrusage(usage.RUSAGE_SELF)
    return (used.ru_utime + used.ru_stime) * 1000


@click.command()
@click.option("--world", type=click.Path(path_type=Path))
@click.option("--changed", type=click.Path(path_type=Path))
@click.option("--providers", type=int)
def main(world: Path | None, changed: Path | None, providers: int | None) -> None:
    """Serve until standard input ends."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    if providers is not None:
        asyncio.run(_run(_Whole(providers)))
    else:
        assert world is not None
        assert changed is not None
        asyncio.run(_run(_Bytes(world, changed)))


if __name__ == "__main__":
    main()
