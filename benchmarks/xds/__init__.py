"""The management server's cost for many providers and many Envoys, beside go-control-plane's caches.

All servers serve the same bytes to the same client, a Go program that looks at no resource; each is a process
of its own, and they take turns with each change.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.report import Table, median_and_min
from benchmarks.xds import plot, worlds
from benchmarks.xds.measure import REAL, SMALL, Cell, Figures, Results, run
from benchmarks.xds.processes import LINEAR, LLMPLANE, SNAPSHOT, build
from xds.snapshot import Snapshot

_PLOT: Final = Path(__file__).parents[2] / "docs" / "images" / "xds-cost.svg"

_AIMS: Final = (
    ("one change, 5,000 clusters, 1 Envoy, delta", 10, 5000, 1, True),
    ("one change, 1,000 clusters, 1,000 Envoys, delta", 350, 1000, 1000, True),
    ("one change, 1,000 clusters, 1,000 Envoys, SotW", 1000, 1000, 1000, False),
)
"""What, at most so many milliseconds, providers, streams, delta."""


def measure(*, quick: bool) -> list[Table]:
    """Measure the whole matrix, and draw how the cost grows."""
    build()
    counts, streams, most = ((100,), (1, 100), 4) if quick else ((100, 1000, 10_000), (1, 100, 1000), 100)
    cells = [
        Cell(world, delta, count, number)
        for world in (SMALL, REAL)
        for delta in (True, False)
        for count in counts
        for number in streams
    ]
    if not quick:
        cells += [Cell(world, delta=True, providers=5000, streams=1) for world in (SMALL, REAL)]
    translated = _translate(counts)
    results = run(cells, lambda text: print(text, flush=True), most=most)
    if not quick:
        _PLOT.parent.mkdir(exist_ok=True)
        _PLOT.write_text(plot.draw(results), encoding="utf-8")
    return [
        translated,
        *_matrix(results),
        _memory(results, counts),
        *([] if quick else [_aims(results, translated)]),
    ]


def _translate(counts: Sequence[int]) -> Table:
    rows = []
    for count in counts:
        loaded = worlds.objects(count)
        times = []
        for _ in range(5):
            gc.collect()
            begin = time.perf_counter()
            Snapshot(worlds.translate(loaded))
            times.append(time.perf_counter() - begin)
        median, least = median_and_min(times)
        rows.append([count, median * 1000, least * 1000, median / count * 1e6])
    return Table(
        "xds: translate and encode all providers, cold",
        ["providers", "ms", "ms (min)", "µs a provider"],
        rows,
        "In one process, from objects to the snapshot that is served; the aim for 10,000 is 3 s.",
    )


def _matrix(results: Results) -> Iterator[Table]:
    headers = ["providers", "streams", "server", "cold ms", "CPU ms", "change p50 ms", "p99", "of"]
    headers += ["CPU ms", "bytes", "KB a stream", "x llmplane (median)", "(min)", ""]
    for world in (SMALL, REAL):
        for delta in (True, False):
            rows: list[list[Any]] = []
            for cell, found in results.items():
                if (cell.world, cell.delta) == (world, delta):
                    rows += ([cell.providers, cell.streams, *row] for row in _rows(cell, found))
            yield Table(
                f"xds: {world}, {'delta' if delta else 'state of the world'}",
                headers,
                rows,
                "Times: until the server has all ACKs. CPU: the server's. Bytes and KB: for one stream. "
                "x llmplane: how much longer a change takes than with llmplane, of neighbours in time.",
            )


def _rows(cell: Cell, found: dict[str, Figures]) -> Iterator[list[Any]]:
    for server, figures in found.items():
        cold = (
            f"{_median(figures.cold):.4g}{' (resumed)' if figures.resumed else ''}" if figures.cold else None
        )
        yield [
            server,
            cold,
            _median(figures.cold_cpu),
            figures.p50,
            figures.p99,
            len(figures.change),
            _median(figures.cpu),
            round(figures.sent) or None,
            figures.stream / 1000 if figures.change and cell.streams > 1 else None,
            *_ratio(figures, found[LLMPLANE]),
            figures.note,
        ]


def _memory(results: Results, counts: Sequence[int]) -> Table:
    rows = []
    for world in (SMALL, REAL):
        cells = [Cell(world, delta=True, providers=count, streams=1) for count in counts]
        for server in cells[0].servers:
            of = [results[cell][server].memory for cell in cells]
            spread = cells[-1].providers - cells[0].providers
            rows.append(
                [
                    world,
                    server,
                    *(memory / 1e6 for memory in of),
                    (of[-1] - of[0]) / spread / 1000 if spread else None,
                ]
            )
    return Table(
        "xds: memory of the server with one Envoy (RssAnon)",
        ["world", "server", *(f"MB, {count}" for count in counts), "KB a provider"],
        rows,
    )


def _aims(results: Results, translated: Table) -> Table:
    count, median, *_ = translated.rows[-1]
    rows: list[list[Any]] = [[f"translate and encode {count} providers, cold", 3000, median]]
    for name, aim, providers, streams, delta in _AIMS:
        for world in (SMALL, REAL):
            found = results[Cell(world, delta, providers, streams)]
            row = [f"{name}, {world}", aim, found[LLMPLANE].p50, found[LLMPLANE].p99]
            rows.append([*row, found[SNAPSHOT].p50, found[LINEAR].p50])
    for delta in (True, False):
        for world in (SMALL, REAL):
            found = results[Cell(world, delta, 1000, 1000)]
            of = [found[server].stream / 1000 for server in (LLMPLANE, SNAPSHOT, LINEAR)]
            variant = "delta" if delta else "SotW"
            rows.append([f"KB a stream, 1,000 x 1,000, {variant}, {world}", 60, of[0], None, *of[1:]])
    return Table("xds: aims (ms or KB)", ["", "aim", "llmplane", "p99", SNAPSHOT, LINEAR], rows)


def _ratio(figures: Figures, ours: Figures) -> tuple[float | None, float | None]:
    ratios = [theirs / own for theirs, own in zip(figures.change, ours.change, strict=False)]
    return median_and_min(ratios) if ratios else (None, None)


def _median(values: Sequence[float]) -> float | None:
    return median_and_min(values)[0] if values else None
