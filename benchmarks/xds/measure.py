"""The cells of the matrix: so many providers for so many streams, in both variants."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.report import percentile
from benchmarks.xds import worlds
from benchmarks.xds.processes import (
    LINEAR,
    LLMPLANE,
    SNAPSHOT,
    WHOLE,
    Process,
    TooSlowError,
    running_envoys,
    running_server,
)
from benchmarks.xds.worlds import Files

SMALL: Final = "small clusters"
REAL: Final = "real providers"

_MOST: Final = 100
"""Changes in a cell; fewer if they take more than `_SECONDS` for each server."""
_SECONDS: Final = 4.0
_LEAST: Final = 3

_CHEAP: Final = 100e6
"""Bytes that all streams get at the start, up to which the cold start is measured three times."""
_TOO_MUCH: Final = 4e9
"""Bytes beyond which a cell is not measured that sends everything to everybody."""


@dataclass(frozen=True)
class Cell:
    """What is measured."""

    world: str
    delta: bool
    providers: int
    streams: int

    @property
    def servers(self) -> Sequence[str]:
        """Who serves it."""
        return (LLMPLANE, *((WHOLE,) if self.world == REAL else ()), SNAPSHOT, LINEAR)

    @property
    def variant(self) -> str:
        """Name of the protocol's variant."""
        return "delta" if self.delta else "SotW"


@dataclass
class Figures:
    """What one server needed in one cell."""

    cold: list[float] = field(default_factory=list)
    """Milliseconds from when the first Envoy connects until all have acknowledged everything."""
    cold_cpu: list[float] = field(default_factory=list)
    """Milliseconds of the server's CPU time for that."""
    resumed: bool = False
    """The streams came with what they have; `cold` is until each was answered."""
    change: list[float] = field(default_factory=list)
    """Milliseconds from when one cluster changes until all have acknowledged it."""
    cpu: list[float] = field(default_factory=list)
    """Milliseconds of the server's CPU time for that."""
    sent: float = 0.0
    """Bytes of messages for a change and a stream."""
    memory: int = 0
    """Bytes of the server, at the end."""
    stream: float = 0.0
    """Bytes more than before the streams, for each."""
    note: str = ""
    """Why something is missing."""

    @property
    def p50(self) -> float | None:
        """The median of the changes."""
        return percentile(self.change, 50) if self.change else None

    @property
    def p99(self) -> float | None:
        """The 99th percentile of the changes."""
        return percentile(self.change, 99) if self.change else None


Results = dict[Cell, dict[str, Figures]]


class Worlds:
    """The files of each world, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str, int], Files] = {}

    def files(self, cell: Cell) -> Files:
        """Return those of a cell."""
        key = cell.world, cell.providers
        if key not in self._made:
            folder = Path(tempfile.mkdtemp(dir=self._folder))
            make = worlds.small if cell.world == SMALL else worlds.real
            self._made[key] = make(cell.providers, folder)
        return self._made[key]


def run(cells: Sequence[Cell], report: Callable[[str], None], *, most: int = _MOST) -> Results:
    """Measure all cells, with so many changes at most in each."""
    results: Results = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        of = Worlds(Path(folder))
        for cell in cells:
            began = time.monotonic()
            results[cell] = _measure(cell, of.files(cell), most)
            seconds = time.monotonic() - began
            report(f"{cell.world}, {cell.variant}, {cell.providers} x {cell.streams}: {seconds:.0f} s")
    return results


def _measure(cell: Cell, files: Files, most: int) -> dict[str, Figures]:
    found = {server: Figures() for server in cell.servers}
    total = files.size * cell.streams
    resume = cell.delta and total > _TOO_MUCH
    if total > _TOO_MUCH and not resume:
        for figures in found.values():
            figures.note = f"not measured: {total / 1e9:.0f} GB for each change"
        return found
    for _ in range(2 if total <= _CHEAP and most == _MOST else 0):
        for server, figures in found.items():
            with _connected(cell, server, files, figures, resume=resume):
                pass
    with ExitStack() as stack:
        live = {}
        for server, figures in found.items():
            try:
                live[server] = stack.enter_context(_connected(cell, server, files, figures, resume=resume))
            except TooSlowError:
                figures.note = "cold start: more than 60 s"
        _change(cell, found, live, most)
    return found


def _change(
    cell: Cell, found: dict[str, Figures], live: dict[str, tuple[Process, Process]], most: int
) -> None:
    """Change one cluster after the other, at each server in turn."""
    before = {server: envoys.ask("report") for server, (_, envoys) in live.items()}
    end = time.monotonic() + _SECONDS * len(live)
    for index in range(most):
        if time.monotonic() > end and index >= _LEAST:
            break
        for server, (process, _) in list(live.items()):
            try:
                answer = process.ask(f"change {index} {cell.streams}")
            except TooSlowError:
                found[server].note = "a change: more than 60 s"
                del live[server]
                continue
            found[server].change.append((answer["acknowledged_ns"] - answer["begin_ns"]) / 1e6)
            found[server].cpu.append(answer["cpu_ms"])
    for server, (process, envoys) in live.items():
        figures = found[server]
        bytes_sent = envoys.ask("report")["bytes"] - before[server]["bytes"]
        figures.sent = bytes_sent / cell.streams / len(figures.change)
        figures.stream = (process.memory - figures.memory) / cell.streams
        figures.memory = process.memory


@contextmanager
def _connected(
    cell: Cell, server: str, files: Files, figures: Figures, *, resume: bool
) -> Iterator[tuple[Process, Process]]:
    """Run a server, and Envoys that have everything. Raises TooSlowError."""
    with (
        running_server(server, files, cell.providers) as (process, address),
        running_envoys(address, files, cell.streams, delta=cell.delta, resume=resume) as envoys,
    ):
        figures.memory = process.memory
        figures.resumed = resume
        process.ask("begin")
        connected = envoys.ask("connect")
        answer = process.ask(f"acks {connected['messages']}")
        figures.cold.append((answer["acknowledged_ns"] - connected["begin_ns"]) / 1e6)
        figures.cold_cpu.append(answer["cpu_ms"])
        yield process, envoys
