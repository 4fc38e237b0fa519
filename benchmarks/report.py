"""Tables on the terminal, and the same as JSON in benchmarks/results/."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tabulate import tabulate

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Table:
    """One table; `note` says how to read it."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    note: str = ""

    def __str__(self) -> str:
        body = tabulate(self.rows, self.headers, missingval="-", floatfmt=".4g")
        return "\n".join(part for part in (f"## {self.title}", body, self.note) if part) + "\n"


def print_and_save(name: str, tables: Sequence[Table], *, quick: bool) -> None:
    """Print the tables of a benchmark; write them to `results/<name>.json`."""
    for table in tables:
        print(table, flush=True)
    RESULTS.mkdir(exist_ok=True)
    record = {
        "benchmark": name,
        "quick": quick,
        "machine": machine(),
        "tables": [asdict(table) for table in tables],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Where and when this was measured; a load average near the number of CPUs spoils absolute figures."""
    models = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _lines(file: str) -> list[str]:
    path = Path(file)
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def median_and_min(ratios: Sequence[float]) -> tuple[float, float]:
    """Return what is reported of ratios, one a round: most disturbance hits both sides of a round."""
    return statistics.median(ratios), min(ratios)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]
