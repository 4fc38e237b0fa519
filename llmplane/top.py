"""``llmplane top``: the LLM traffic of one or more Envoys, live in a terminal.

It reads what Prometheus would read (GET /stats/prometheus on port 15090) and shows the difference between
two readings. Nothing else is needed: no Prometheus, no control plane.
"""

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llmplane.address import Address
from llmplane.prices import Prices

_PATH = "/stats/prometheus"
_TIMEOUT = aiohttp.ClientTimeout(total=5)
_MODEL, _PROVIDER, _WORKLOAD = "model", "destination_service", "source_workload"
_TOKENS = {  # the seed's metrics have label names of their own
    "llmproxy_model": _MODEL,
    "llmproxy_destination_service": _PROVIDER,
    "llmproxy_source_workload": _WORKLOAD,
}
_COUNTERS = {  # prometheus_client gives each counter the suffix _total
    "asm_llm_proxy_prompt_tokens_total": "prompt",
    "asm_llm_proxy_completion_tokens_total": "completion",
    "llmplane_cached_tokens_total": "cached",
    "llmplane_fallbacks_total": "fallbacks",
    "llmplane_requests_total": "requests",
}
_HISTOGRAMS = {
    "llmplane_time_to_first_token_seconds_bucket": "first_token",
    "llmplane_request_duration_seconds_bucket": "duration",
}
_FILE_WIDTH = 240
"""Columns where the output is no terminal: nothing is to be cut."""
_TOO_MANY_REQUESTS = "429"
_FIRST_ERROR = 400


class Key(NamedTuple):
    """What a row is about."""

    workload: str
    provider: str
    model: str


@dataclass(slots=True)
class Traffic:
    """Counters of one row since Envoy started, or between two readings."""

    counters: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """``requests``, ``errors``, ``limited``, ``fallbacks``; ``prompt``, ``completion``, ``cached`` tokens."""
    buckets: dict[str, dict[float, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )
    """``first_token``, ``duration``: upper bound in seconds -> how many were not longer."""

    def add(self, other: "Traffic") -> None:
        """Take another one's numbers in."""
        for name, value in other.counters.items():
            self.counters[name] += value
        for name, buckets in other.buckets.items():
            for bound, value in buckets.items():
                self.buckets[name][bound] += value

    def since(self, before: "Traffic") -> "Traffic":
        """Return what came since a reading; an Envoy that was started anew begins at nothing."""
        if any(value < before.counters.get(name, 0) for name, value in self.counters.items()):
            return self
        made = Traffic()
        for name, value in self.counters.items():
            made.counters[name] = value - before.counters.get(name, 0)
        for name, buckets in self.buckets.items():
            known = before.buckets.get(name, {})
            for bound, value in buckets.items():
                made.buckets[name][bound] = value - known.get(bound, 0)
        return made

    def quantile(self, histogram: str, share: float) -> float | None:
        """Return a quantile in seconds as Prometheus' histogram_quantile does; None where nothing came."""
        buckets = sorted(self.buckets.get(histogram, {}).items())
        if not buckets or buckets[-1][1] <= 0:
            return None
        rank = share * buckets[-1][1]
        for (low, below), (high, up_to) in pairwise([(0.0, 0.0), *buckets]):
            if up_to >= rank:
                if math.isinf(high):
                    return low
                return low + (high - low) * ((rank - below) / (up_to - below) if up_to > below else 0)
        return None


Reading = Mapping[Key, Traffic]
"""What one Envoy's metrics say."""


def read_metrics(text: str) -> Reading:
    """Read Envoy's exposition. Raises ValueError where it is none."""
    found: defaultdict[Key, Traffic] = defaultdict(Traffic)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {_TOKENS.get(name, name): value for name, value in sample.labels.items()}
            if _MODEL not in labels or _PROVIDER not in labels:
                continue
            traffic = found[Key(labels.get(_WORKLOAD, ""), labels[_PROVIDER], labels[_MODEL])]
            if sample.name in _HISTOGRAMS:
                traffic.buckets[_HISTOGRAMS[sample.name]][float(labels["le"])] += sample.value
            elif sample.name in _COUNTERS:
                for name in _counted_as(sample.name, labels):
                    traffic.counters[name] += sample.value
    return {key: traffic for key, traffic in found.items() if traffic.counters or traffic.buckets}


def _counted_as(metric: str, labels: Mapping[str, str]) -> Iterator[str]:
    name = _COUNTERS[metric]
    yield name
    code = labels.get("response_code", "")
    if name != "requests" or not code.isdecimal():
        return
    if int(code) == 0 or int(code) >= _FIRST_ERROR:
        yield "errors"
    if code == _TOO_MANY_REQUESTS:
        yield "limited"


class Row(NamedTuple):
    """A line of the table: totals since the Envoys started, and what came in the last interval."""

    key: Key
    total: Traffic
    latest: Traffic


def rows(before: Sequence[Reading], now: Sequence[Reading]) -> list[Row]:
    """Join the readings of several Envoys, those with the most tokens first."""
    total: defaultdict[Key, Traffic] = defaultdict(Traffic)
    latest: defaultdict[Key, Traffic] = defaultdict(Traffic)
    for first, second in zip(before, now, strict=True):
        for key, traffic in second.items():
            total[key].add(traffic)
            latest[key].add(traffic.since(first.get(key, Traffic())))
    made = [Row(key, total[key], latest[key]) for key in total]
    return sorted(
        made, key=lambda row: (-row.total.counters["prompt"] - row.total.counters["completion"], row.key)
    )


def table(lines: Iterable[Row], seconds: float, prices: Prices | None) -> Table:
    """Draw the rows; rates are those of the last ``seconds``."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("WORKLOAD", "PROVIDER", "MODEL"):
        made.add_column(name, overflow="ellipsis", no_wrap=True)
    numbers = [
        "REQ/S",
        "ERR/S",
        "429/S",
        "FALLBACK/S",
        "TOK IN/S",
        "TOK OUT/S",
        "TTFT P50",
        "P95",
        "TIME P95",
        "TOKENS",
    ]
    for name in [*numbers, *([f"COST {prices.currency}"] if prices else [])]:
        made.add_column(name, justify="right", no_wrap=True)
    for row in lines:
        rates = [
            row.latest.counters[name] / seconds
            for name in ("requests", "errors", "limited", "fallbacks", "prompt", "completion")
        ]
        quantiles = [
            row.latest.quantile(*of)
            for of in (("first_token", 0.5), ("first_token", 0.95), ("duration", 0.95))
        ]
        count = row.total.counters
        cells = [
            *map(_rate, rates),
            *map(_duration, quantiles),
            f"{count['prompt'] + count['completion']:,.0f}",
        ]
        if prices:
            cost = prices.cost(row.key.model, count["prompt"], count["completion"], count["cached"])
            cells.append("-" if cost is None else f"{cost:,.4f}")
        made.add_row(*row.key, *cells)
    return made


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value else "-"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f}ms" if seconds < 1 else f"{seconds:.1f}s"


async def _read(session: aiohttp.ClientSession, address: Address) -> Reading | str:
    """Return what an Envoy says, or why it says nothing."""
    try:
        async with session.get(f"http://{address}{_PATH}") as answer:
            answer.raise_for_status()
            return read_metrics(await answer.text())
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        return f"{address}: {error or type(error).__name__}"


async def watch(addresses: Sequence[Address], interval: float, prices: Prices | None, *, once: bool) -> int:
    """Show the traffic of Envoys every ``interval`` seconds until interrupted, or one time.

    Returns the exit code: 1 where an Envoy could not be read the only time.
    """
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        before: list[Reading] = [{} for _ in addresses]
        began = time.monotonic()

        async def read() -> tuple[Group, bool]:
            nonlocal before, began
            answers = await asyncio.gather(*(_read(session, address) for address in addresses))
            now = [
                known if isinstance(answer, str) else answer
                for known, answer in zip(before, answers, strict=True)
            ]
            seconds, began = max(time.monotonic() - began, 0.001), time.monotonic()
            silent = [answer for answer in answers if isinstance(answer, str)]
            shown = Group(table(rows(before, now), seconds, prices), *(Text(each, "red") for each in silent))
            before = now
            return shown, not silent

        _, all_there = await read()
        await asyncio.sleep(interval)
        shown, all_there = await read()
        if once:
            console.print(shown)
            return 0 if all_there else 1
        with Live(shown, console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(interval)
                shown, _ = await read()
                live.update(shown, refresh=True)
