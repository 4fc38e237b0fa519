"""Counters of fixed windows, in memory or in Redis: what `llmplane ratelimit` decides by.

A window begins at a multiple of its length since the Unix epoch; a month has 30 days, as in other rate limit
services. The hits of one call are taken all or none (`Counters.take`), in one step that nothing comes
between: in memory because nothing is awaited, in Redis because a script is one command there.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol

import structlog

_LOG = structlog.get_logger(__name__)

UNLIMITED: Final = 2**32 - 1
"""As a limit: what is used is counted, and never too much."""
MAX_COUNTERS: Final = 1_000_000
"""In memory: some 200 MB. Keys may come from clients; those beyond are not counted, but are an error."""

_LONGEST_BATCH: Final = 512
_LATER: Final = 60
"""Seconds that a counter outlives its window in Redis: the clocks of several servers differ."""


class CountersError(RuntimeError):
    """Nothing could be counted; the text says why."""


class Unit(StrEnum):
    """The length of a window, by Envoy's names (envoy.type.v3.RateLimitUnit)."""

    SECOND = "SECOND"
    MINUTE = "MINUTE"
    HOUR = "HOUR"
    DAY = "DAY"
    MONTH = "MONTH"

    def window(self, now: float) -> tuple[int, int]:
        """Return when the window of a moment begins, and the next one, in seconds since the epoch."""
        length = _SECONDS[self]
        begins = int(now) // length * length
        return begins, begins + length


_SECONDS: Final = {
    Unit.SECOND: 1,
    Unit.MINUTE: 60,
    Unit.HOUR: 3_600,
    Unit.DAY: 86_400,
    Unit.MONTH: 30 * 86_400,
}


@dataclass(frozen=True, slots=True)
class Hit:
    """What is to be counted for a key.

    A negative amount gives back, and never below zero. An amount of zero asks whether there is room for one.
    """

    key: str
    unit: Unit
    limit: int
    amount: int
    shadow: bool = False
    """Count it although there is no room."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How a counter stands after a call."""

    exceeded: bool
    """Whether the hit found no room. Then nothing of its call was counted, unless it is a shadow."""
    used: int
    reset: int
    """Seconds until the next window, rounded up."""


class Counters(Protocol):
    """Where counters are kept."""

    async def take(self, hits: Sequence[Hit], now: float) -> list[Standing]:
        """Count all hits, or none if one of them has no room. `now` is in seconds since the epoch.

        Raises CountersError.
        """

    async def is_available(self) -> bool:
        """Whether something can be counted."""

    async def close(self) -> None:
        """End connections."""


class MemoryCounters:
    """Counters of one process, gone with it."""

    def __init__(self, most: int = MAX_COUNTERS) -> None:
        self._most = most
        self._windows: dict[Unit, tuple[int, dict[str, int]]] = {}

    async def take(self, hits: Sequence[Hit], now: float) -> list[Standing]:
        """See Counters."""
        used: dict[tuple[Unit, str], int] = {}
        exceeded = []
        for hit in hits:
            place = (hit.unit, hit.key)
            before = used[place] if place in used else self._window(hit.unit, now).get(hit.key, 0)
            exceeded.append(hit.amount >= 0 and before + max(hit.amount, 1) > hit.limit)
            used[place] = max(before + hit.amount, 0)
        if any(over and not hit.shadow for hit, over in zip(hits, exceeded, strict=True)):
            used = {place: self._windows[place[0]][1].get(place[1], 0) for place in used}
        else:
            self._write(used)
        return [
            Standing(over, used[hit.unit, hit.key], _until_reset(hit.unit, now))
            for hit, over in zip(hits, exceeded, strict=True)
        ]

    async def is_available(self) -> bool:
        """See Counters."""
        return True

    async def close(self) -> None:
        """See Counters."""

    def _write(self, used: dict[tuple[Unit, str], int]) -> None:
        new = sum(key not in self._windows[unit][1] for unit, key in used)
        if new and new + sum(len(counters) for _, counters in self._windows.values()) > self._most:
            raise CountersError(
                f"more than {self._most} keys are in use; Redis has room for more (--redis-url)"
            )
        for (unit, key), number in used.items():
            if number or key in self._windows[unit][1]:
                self._windows[unit][1][key] = number

    def _window(self, unit: Unit, now: float) -> dict[str, int]:
        begins, _ = unit.window(now)
        if unit not in self._windows or self._windows[unit][0] < begins:
            self._windows[unit] = begins, {}
        return self._windows[unit][1]


_SCRIPT: Final = """
local used, taken, exceeded, over = {}, {}, {}, 0
for i, key in ipairs(KEYS) do
  local limit, amount = tonumber(ARGV[4 * i - 3]), tonumber(ARGV[4 * i - 2])
  used[key] = used[key] or tonumber(redis.call('GET', key) or 0)
  local before = taken[key] or used[key]
  exceeded[i] = amount >= 0 and before + math.max(amount, 1) > limit and 1 or 0
  if ARGV[4 * i] == '0' then over = over + exceeded[i] end
  taken[key] = math.max(before + amount, 0)
end
if over == 0 then
  for i, key in ipairs(KEYS) do
    if taken[key] and taken[key] ~= used[key] then
      redis.call('SET', key, string.format('%.0f', taken[key]), 'EXAT', ARGV[4 * i - 1])
      used[key], taken[key] = taken[key], nil
    end
  end
end
local answer = {}
for i, key in ipairs(KEYS) do
  answer[2 * i - 1], answer[2 * i] = exceeded[i], used[key]
end
return answer
"""
"""The same as MemoryCounters. KEYS: a counter a hit; ARGV: limit, amount, when the counter may go, shadow."""


@dataclass(slots=True)
class _Call:
    arguments: list[Any]
    answer: asyncio.Future[list[int]] = field(default_factory=asyncio.Future)


class RedisCounters:
    """Counters that several servers share, in one Redis (6.2 or newer; not a cluster of several).

    Calls that come while others are under way go together, as one pipeline. `url` is that of Redis
    (`redis://`, `rediss://` for TLS, `unix://`); it may hold a password, so that no text here shows it.
    `timeout` is in seconds, for connecting and for an answer.

    Raises ValueError if the URL cannot be used, and ImportError without the extra `llmplane[ratelimit]`.
    """

    def __init__(
        self, url: str, *, timeout: float = 1.0, prefix: str = "llmplane", log_interval: float = 10.0
    ) -> None:
        # A server with counters in memory does without this package.
        from redis.asyncio import Redis  # noqa: PLC0415
        from redis.asyncio.retry import Retry  # noqa: PLC0415
        from redis.backoff import NoBackoff  # noqa: PLC0415

        # No retries: whether a hit was counted before a connection broke cannot be known.
        self._redis: Any = Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0)
        )
        self._prefix = prefix
        self._waiting: list[_Call] = []
        self._sending: asyncio.Task[None] | None = None
        self._trouble = _Trouble(log_interval)

    async def take(self, hits: Sequence[Hit], now: float) -> list[Standing]:
        """See Counters."""
        keys, values = [], []
        for hit in hits:
            begins, ends = hit.unit.window(now)
            keys.append(f"{self._prefix}:{hit.key}:{hit.unit.lower()}:{begins}")
            values += [hit.limit, hit.amount, ends + _LATER, int(hit.shadow)]
        call = _Call([_SCRIPT, len(keys), *keys, *values])
        self._waiting.append(call)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())
        answer = await call.answer
        return [
            Standing(bool(exceeded), used, _until_reset(hit.unit, now))
            for hit, exceeded, used in zip(hits, answer[::2], answer[1::2], strict=True)
        ]

    async def is_available(self) -> bool:
        """See Counters."""
        from redis.exceptions import RedisError  # noqa: PLC0415

        try:
            await self._redis.ping()
        except (RedisError, OSError) as error:
            self._trouble.note(_text(error))
            return False
        self._trouble.over()
        return True

    async def close(self) -> None:
        """See Counters."""
        if self._sending is not None:
            self._sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sending
        await self._redis.aclose()

    async def _send(self) -> None:
        """Send what waits, until nothing does."""
        try:
            while self._waiting:
                # A call is cancelled when its client has gone: it must not count later.
                calls = [call for call in self._waiting if not call.answer.done()]
                calls, self._waiting = calls[:_LONGEST_BATCH], calls[_LONGEST_BATCH:]
                await self._send_together(calls)
        finally:
            self._sending = None
            for call in self._waiting:  # cancelled
                call.answer.cancel()

    async def _send_together(self, calls: Sequence[_Call]) -> None:
        from redis.exceptions import RedisError  # noqa: PLC0415

        answers: Sequence[list[int] | Exception]
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for call in calls:
                    pipeline.eval(*call.arguments)
                answers = await pipeline.execute(raise_on_error=False)
        except (RedisError, OSError) as error:
            answers = [error] * len(calls)
        for call, answer in zip(calls, answers, strict=True):
            if isinstance(answer, Exception):
                self._trouble.note(_text(answer))
                if not call.answer.done():
                    call.answer.set_exception(CountersError(f"Redis: {_text(answer)}"))
            elif not call.answer.done():
                call.answer.set_result(answer)
        if not any(isinstance(answer, Exception) for answer in answers):
            self._trouble.over()


class _Trouble:
    """Logs when Redis fails and works again; while it fails, once in `interval` seconds."""

    def __init__(self, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = interval
        self._clock = clock
        self._failures = 0
        self._logged = -math.inf

    def note(self, problem: str) -> None:
        self._failures += 1
        if self._clock() - self._logged >= self._interval:
            self._logged = self._clock()
            _LOG.error(
                "Redis cannot count; policies' failOpen decides", problem=problem, failures=self._failures
            )

    def over(self) -> None:
        if self._failures:
            _LOG.info("Redis counts again", failures=self._failures)
            self._failures, self._logged = 0, -math.inf


def _text(error: Exception) -> str:
    """Return what happened in words, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _until_reset(unit: Unit, now: float) -> int:
    return max(math.ceil(unit.window(now)[1] - now), 1)
