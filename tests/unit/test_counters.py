"""Counters of fixed windows: the same in memory and in a real Redis, and exact whoever counts at once."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence

import pytest
from structlog.testing import capture_logs

from llmplane.counters import (
    UNLIMITED,
    Counters,
    CountersError,
    Hit,
    MemoryCounters,
    RedisCounters,
    Standing,
    Unit,
)
from tests.support.redis import RedisServer, needs_redis, running_redis

NOON = 1_800_014_400.0
"""The beginning of a second, a minute and an hour."""


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture(params=["memory", pytest.param("redis", marks=needs_redis)])
async def counters(request: pytest.FixtureRequest) -> AsyncIterator[Counters]:
    made: Counters
    if request.param == "memory":
        made = MemoryCounters()
    else:
        server: RedisServer = request.getfixturevalue("redis")
        server.send("FLUSHALL")
        # Redis forgets by the real time; the tests' windows are in the future.
        made = RedisCounters(server.url, timeout=30)
    yield made
    await made.close()


def hit(amount: int, key: str = "k", limit: int = 100, unit: Unit = Unit.MINUTE) -> Hit:
    return Hit(key, unit, limit, amount)


async def take(counters: Counters, *hits: Hit, now: float = NOON) -> Sequence[Standing]:
    return await counters.take(hits, now)


async def used(counters: Counters, key: str = "k", unit: Unit = Unit.MINUTE, now: float = NOON) -> int:
    """Return how much of a key is used, without a change."""
    (standing,) = await counters.take([Hit(key, unit, UNLIMITED, 0)], now)
    return standing.used


async def test_what_has_room_is_counted_and_what_has_not_is_refused(counters: Counters) -> None:
    assert await take(counters, hit(60)) == [Standing(exceeded=False, used=60, reset=60)]
    assert await take(counters, hit(41)) == [Standing(exceeded=True, used=60, reset=60)]
    assert await take(counters, hit(40)) == [Standing(exceeded=False, used=100, reset=60)]


async def test_nothing_of_a_call_is_counted_if_one_of_its_hits_has_no_room(counters: Counters) -> None:
    await take(counters, hit(95, "a"))
    standings = await take(counters, hit(10, "a"), hit(10, "b"))
    assert [standing.exceeded for standing in standings] == [True, False]
    assert (await used(counters, "a"), await used(counters, "b")) == (95, 0)


async def test_a_shadow_is_counted_although_there_is_no_room_and_stops_no_other(counters: Counters) -> None:
    shadow = Hit("shadow", Unit.MINUTE, 100, 150, shadow=True)
    standings = await take(counters, shadow, hit(10, "a"))
    assert [standing.exceeded for standing in standings] == [True, False]
    assert (await used(counters, "shadow"), await used(counters, "a")) == (150, 10)
    await take(counters, shadow, hit(100, "a"))
    assert (await used(counters, "shadow"), await used(counters, "a")) == (150, 10)


async def test_two_hits_of_one_key_count_together(counters: Counters) -> None:
    standings = await take(counters, hit(60), hit(60))
    assert [standing.exceeded for standing in standings] == [False, True]
    assert await used(counters) == 0
    await take(counters, hit(60), hit(40))
    assert await used(counters) == 100


async def test_an_amount_of_zero_asks_for_room_for_one(counters: Counters) -> None:
    (before,) = await take(counters, hit(0))
    await take(counters, hit(100))
    (after,) = await take(counters, hit(0))
    assert (before.exceeded, after.exceeded) == (False, True)


async def test_a_charge_without_a_limit_goes_beyond_what_others_have(counters: Counters) -> None:
    await take(counters, hit(90))
    (standing,) = await take(counters, hit(50, limit=UNLIMITED))
    assert (standing.exceeded, standing.used) == (False, 140)
    assert (await take(counters, hit(1)))[0].exceeded


async def test_what_is_given_back_can_be_used_but_never_more(counters: Counters) -> None:
    await take(counters, hit(80))
    await take(counters, hit(-50))
    assert await used(counters) == 30
    await take(counters, hit(-50))
    assert await used(counters) == 0
    await take(counters, hit(-50, "never seen"))
    assert await used(counters, "never seen") == 0


@pytest.mark.parametrize(
    ("unit", "length"),
    [
        (Unit.SECOND, 1),
        (Unit.MINUTE, 60),
        (Unit.HOUR, 3_600),
        (Unit.DAY, 86_400),
        (Unit.MONTH, 2_592_000),
    ],
)
async def test_a_window_ends_at_a_multiple_of_its_length(counters: Counters, unit: Unit, length: int) -> None:
    begin = NOON // length * length
    (first,) = await take(counters, hit(70, unit=unit), now=begin)
    (last,) = await take(counters, hit(20, unit=unit), now=begin + length - 0.5)
    assert (first.reset, last.reset, last.used) == (length, 1, 90)
    (next_window,) = await take(counters, hit(70, unit=unit), now=begin + length)
    assert (next_window.exceeded, next_window.used) == (False, 70)


async def test_windows_of_one_key_are_apart(counters: Counters) -> None:
    await take(counters, hit(10), hit(20, unit=Unit.HOUR))
    assert await used(counters) == 10
    assert await used(counters, unit=Unit.HOUR) == 20


async def test_large_numbers_stay_exact(counters: Counters) -> None:
    for _ in range(3):
        await take(counters, hit(1_000_000_000_000_001, limit=UNLIMITED * 10**9))
    assert await used(counters) == 3_000_000_000_000_003


async def test_memory_and_redis_agree_on_a_long_history(counters: Counters) -> None:
    model = MemoryCounters()
    numbers = random.Random(7)  # noqa: S311
    now = NOON
    for _ in range(300):
        hits = [
            Hit(
                numbers.choice("abc"),
                Unit.MINUTE,
                numbers.choice([50, 100, UNLIMITED]),
                numbers.randint(-30, 60),
                numbers.random() < 0.2,
            )
            for _ in range(numbers.randint(1, 4))
        ]
        now += numbers.choice([0, 0, 1, 20])
        assert await counters.take(hits, now) == await model.take(hits, now)


async def test_memory_is_bounded_and_windows_that_are_over_are_forgotten() -> None:
    counters = MemoryCounters(most=3)
    for key in "abc":
        await take(counters, hit(1, key))
    with pytest.raises(CountersError, match="more than 3 keys"):
        await take(counters, hit(1, "d"))
    await take(counters, hit(1, "a"))  # those that are known go on
    await take(counters, hit(1, "d"), now=NOON + 60)


@needs_redis
async def test_several_processes_with_one_redis_never_give_more_than_the_limit(redis: RedisServer) -> None:
    redis.send("FLUSHALL")
    several = [RedisCounters(redis.url, timeout=30) for _ in range(4)]
    calls = [take(several[number % 4], hit(7, "shared", limit=1000)) for number in range(400)]
    taken = [not standings[0].exceeded for standings in await asyncio.gather(*calls)]
    assert sum(taken) == 1000 // 7
    assert await used(several[0], "shared") == 1000 // 7 * 7
    for counters in several:
        await counters.close()


@needs_redis
async def test_a_counter_outlives_its_window_by_a_minute_only(redis: RedisServer) -> None:
    redis.send("FLUSHALL")
    counters = RedisCounters(redis.url, timeout=30, prefix="p")
    await take(counters, hit(1, unit=Unit.HOUR))
    assert redis.send("EXPIRETIME", f"p:k:hour:{NOON:.0f}") == f":{NOON + 3660:.0f}\r\n".encode()
    await counters.close()


@needs_redis
async def test_a_redis_that_dies_is_an_error_and_one_that_is_back_is_used_at_once() -> None:
    with running_redis() as server, capture_logs() as logs:
        counters = RedisCounters(server.url, timeout=30)
        await take(counters, hit(10))
        server.stop()
        for _ in range(5):
            with pytest.raises(CountersError, match="Redis"):
                await take(counters, hit(10))
        assert not await counters.is_available()
        server.start()
        (standing,) = await take(counters, hit(10))
        assert standing.used == 10  # it was empty, and nothing was counted while it was away
        assert await counters.is_available()
        await counters.close()
    # One line when it failed and one when it was back, however often it was asked.
    assert [entry["event"] for entry in logs] == [
        "Redis cannot count; policies' failOpen decides",
        "Redis counts again",
    ]
    assert logs[1]["failures"] == 6


@needs_redis
async def test_a_redis_that_hangs_is_an_error_after_the_timeout() -> None:
    with running_redis() as server, capture_logs():
        counters = RedisCounters(server.url, timeout=2)
        await take(counters, hit(10))
        server.freeze()
        calls = [take(counters, hit(10)) for _ in range(20)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(outcome, CountersError) for outcome in outcomes)
        server.thaw()
        assert not (await take(counters, hit(1, "another")))[0].exceeded
        await counters.close()


@needs_redis
async def test_a_redis_that_may_not_be_used_says_so_without_the_password() -> None:
    secret = "pass-word-0123456789"  # noqa: S105
    with running_redis() as server, capture_logs() as logs:
        server.send("CONFIG", "SET", "requirepass", "another")
        counters = RedisCounters(f"redis://:{secret}@127.0.0.1:{server.port}")
        with pytest.raises(CountersError, match="invalid username-password pair") as raised:
            await take(counters, hit(1))
        await counters.close()
    assert secret not in f"{raised.value} {logs} {counters!r}"
