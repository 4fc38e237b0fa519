"""What a rate limit service spends on a call: `llmplane ratelimit`, beside the Envoy project's own.

A call is what Envoy makes when a request begins: one descriptor with its limit, of one of a hundred keys.
"""

import asyncio
import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc

from benchmarks.processes import cpu_seconds
from benchmarks.report import Table
from llmplane.ratelimit import SERVICE
from tests.support.ratelimit import ENVOYS_SERVICE, running_envoys_service, running_ratelimit
from tests.support.redis import running_redis
from xds import protos

_KEYS = 100
_AT_ONCE = 32


def measure(*, quick: bool) -> list[Table]:
    """Measure memory and, where there is a Redis, Redis; and the reference, where it was built."""
    calls = 500 if quick else 20_000
    directory = Path(tempfile.mkdtemp(prefix="bench-"))
    rows = []
    try:
        with ExitStack() as stack:
            memory = stack.enter_context(running_ratelimit(directory))
            rows.append(("llmplane ratelimit, memory", *_ask(memory.address.port, memory.process.pid, calls)))
            if shutil.which("redis-server"):
                redis = stack.enter_context(running_redis())
                server = stack.enter_context(running_ratelimit(directory, redis_url=redis.url))
                rows.append(
                    ("llmplane ratelimit, Redis", *_ask(server.address.port, server.process.pid, calls))
                )
                if ENVOYS_SERVICE.exists():
                    port, pid = stack.enter_context(running_envoys_service(directory, redis.port))
                    rows.append(("Envoy's ratelimit service, Redis", *_ask(port, pid, calls)))
    finally:
        shutil.rmtree(directory)
    return [
        Table(
            "ratelimit: one descriptor a call",
            ("service", "calls/s", "CPU us/call", "p50 ms", "p99 ms"),
            rows,
            f"{_AT_ONCE} calls at once, from one process on this machine, which limits calls/s. CPU is the "
            "service's, without Redis.",
        )
    ]


def _ask(port: int, pid: int, calls: int) -> tuple[float, float, float, float]:
    return asyncio.run(_measured(port, pid, calls))


async def _measured(port: int, pid: int, calls: int) -> tuple[float, float, float, float]:
    """Return calls/s, CPU in us, and the median and 99th percentile of the latency in ms."""
    requests = [_request(number) for number in range(_KEYS)]
    latencies: list[float] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = channel.unary_unary(f"/{SERVICE}/ShouldRateLimit")
        await asyncio.gather(*(ask(request) for request in requests))
        began, cpu = time.perf_counter(), cpu_seconds(pid)
        await asyncio.gather(*(_worker(ask, requests, calls // _AT_ONCE, latencies) for _ in range(_AT_ONCE)))
        seconds, cpu = time.perf_counter() - began, cpu_seconds(pid) - cpu
    latencies.sort()
    done = len(latencies)
    return done / seconds, cpu / done * 1e6, latencies[done // 2] * 1e3, latencies[done * 99 // 100] * 1e3


async def _worker(ask: Any, requests: list[bytes], calls: int, latencies: list[float]) -> None:
    for number in range(calls):
        began = time.perf_counter()
        await ask(requests[number % _KEYS])
        latencies.append(time.perf_counter() - began)


def _request(number: int) -> bytes:
    entries = {"policy": "shop/per-user", "rule": "default", "key": f"user-{number}", "tokens": "total"}
    descriptor = {
        "entries": [{"key": key, "value": value} for key, value in {**entries, "unit": "minute"}.items()],
        "limit": {"requests_per_unit": 1_000_000_000, "unit": "MINUTE"},
        "hits_addend": {"value": 113},
    }
    made: bytes = protos.RateLimitRequest(domain="llmplane", descriptors=[descriptor]).SerializeToString()
    return made
