"""`llmplane ratelimit`: a small rate limit service (RLS) for limits that several Envoys share.

It is envoy.service.ratelimit.v3.RateLimitService, and has no limits of its own: each descriptor brings its
limit, as those of Envoy's `rate_limits` with `limit` do. Where it does more than other services:

- The descriptors of a call are counted all, or none if one of them is over its limit: a request that is
  refused uses up nothing.
- `is_negative_hits` gives back, and never below zero: a reservation is settled both ways.
- `hits_addend: 0` asks whether there is room for one.
- With the limit 4294967295 nothing is refused, only counted.
- The entry `shadow: true` belongs to no key: what it is with is told to be over its limit, but counted.

It stands beside `llmplane serve`, never in it: it is on the way of each request that has such a limit.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

import grpc
import structlog
from aiohttp import web
from google.protobuf.message import DecodeError, Message
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from llmplane import metrics
from llmplane.address import Address, AddressInUseError, check_free
from llmplane.counters import UNLIMITED, Counters, CountersError, Hit, Standing, Unit
from llmplane.httpserver import runner_of
from xds import protos
from xds.server import Authenticator, Node, NodeRejected, Peer

_LOG = structlog.get_logger(__name__)

SERVICE: Final = "envoy.service.ratelimit.v3.RateLimitService"

SHADOW: Final = ("shadow", "true")
_UNITS: Final = {1: Unit.SECOND, 2: Unit.MINUTE, 3: Unit.HOUR, 4: Unit.DAY, 5: Unit.MONTH}
"""By their numbers in envoy.type.v3.RateLimitUnit, the same as in RateLimitResponse.RateLimit.Unit."""
_OK, _OVER_LIMIT = 1, 2
_LONGEST_KEY: Final = 4096
"""Characters of all entries of a descriptor."""
_MAX_SERIES: Final = 1000
_OTHER: Final = ("other", "other")
_VERIFIED_FOR: Final = 1.0
"""Seconds until the credentials of a client are looked at again."""
_NOBODY: Final = Node(id="", cluster="", metadata={}, version="")
_SECONDS: Final = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)

_Context = grpc.aio.ServicerContext[bytes, bytes]


class BadDescriptorError(ValueError):
    """A request cannot be counted; the text says why."""


class _Metrics:
    """What the service counts, by policy and rule: values of the entries with these names."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._series: set[tuple[str, str]] = set()
        self.answers = Counter(
            "llmplane_ratelimit_requests_total",
            "Answers: OK, OVER_LIMIT, ERROR (counters fail), REFUSED (bad request or credentials).",
            ["code"],
            registry=self._registry,
        )
        for code in ("OK", "OVER_LIMIT", "ERROR", "REFUSED"):
            self.answers.labels(code)
        self._hits = Counter(
            "llmplane_ratelimit_hits_total",
            "Hits (tokens) that were counted: reserved, charged (without a limit) or refunded.",
            ["policy", "rule", "kind"],
            registry=self._registry,
        )
        self._limited = Counter(
            "llmplane_ratelimit_limited_total",
            "Descriptors over their limit.",
            ["policy", "rule"],
            registry=self._registry,
        )
        self.duration = Histogram(
            "llmplane_ratelimit_duration_seconds",
            "Seconds until an answer.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self.available = Gauge(
            "llmplane_ratelimit_counters_available",
            "Whether counters could be used when they were last.",
            registry=self._registry,
        )

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def counted(self, descriptors: Sequence[Message], hits: Sequence[Hit], found: Sequence[Standing]) -> None:
        """Count what was taken, or what was refused."""
        refused = any(of.exceeded and not hit.shadow for hit, of in zip(hits, found, strict=True))
        for descriptor, hit, standing in zip(descriptors, hits, found, strict=True):
            labels = self._labels(descriptor)
            if standing.exceeded:
                self._limited.labels(*labels).inc()
            if hit.amount and not refused:
                kind = "refunded" if hit.amount < 0 else "charged" if hit.limit == UNLIMITED else "reserved"
                self._hits.labels(*labels, kind).inc(abs(hit.amount))

    def _labels(self, descriptor: Any) -> tuple[str, str]:
        entries = {entry.key: entry.value for entry in descriptor.entries}
        labels = entries.get("policy", ""), entries.get("rule", "")
        if labels not in self._series:
            if len(self._series) >= _MAX_SERIES:
                return _OTHER
            self._series.add(labels)
        return labels


class RateLimitService:
    """Answers ShouldRateLimit. Without `authenticator` everybody may ask."""

    def __init__(
        self,
        counters: Counters,
        authenticator: Authenticator | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.metrics = _Metrics()
        self._counters = counters
        self._authenticator = authenticator
        self._clock = clock
        self._verified: dict[tuple[bytes, object], float] = {}
        self._server: grpc.aio.Server | None = None

    async def start(self, address: Address, credentials: grpc.ServerCredentials | None = None) -> Address:
        """Listen; return the address with the real port. Raises OSError and RuntimeError."""
        check_free(address)
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handler = grpc.unary_unary_rpc_method_handler(self._should_rate_limit)
        handlers = {"ShouldRateLimit": handler}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        if credentials is None:
            port = self._server.add_insecure_port(str(address))
        else:
            port = self._server.add_secure_port(str(address), credentials)
        await self._server.start()
        return Address(address.host, port)

    async def stop(self) -> None:
        """End calls and connections."""
        if self._server is not None:
            await self._server.stop(grace=0.5)

    async def is_available(self) -> bool:
        """Whether something can be counted."""
        available = await self._counters.is_available()
        self.metrics.available.set(available)
        return available

    async def decide(self, request: Any) -> Any:
        """Count the descriptors of a RateLimitRequest, and answer with a RateLimitResponse.

        Raises BadDescriptorError and CountersError.
        """
        if not request.domain or not request.descriptors:
            raise BadDescriptorError("a request needs a domain and a descriptor")
        hits = [_hit(request, descriptor) for descriptor in request.descriptors]
        found = await self._counters.take(hits, self._clock())
        self.metrics.counted(request.descriptors, hits, found)
        over = any(standing.exceeded for standing in found)
        return protos.RateLimitResponse(
            overall_code=_OVER_LIMIT if over else _OK,
            statuses=[
                {
                    "code": _OVER_LIMIT if standing.exceeded else _OK,
                    "current_limit": {
                        "requests_per_unit": descriptor.limit.requests_per_unit,
                        "unit": descriptor.limit.unit,
                    },
                    "limit_remaining": max(hit.limit - standing.used, 0),
                    "duration_until_reset": {"seconds": standing.reset},
                }
                for descriptor, hit, standing in zip(request.descriptors, hits, found, strict=True)
            ],
        )

    async def _should_rate_limit(self, data: bytes, context: _Context) -> bytes:
        began = time.perf_counter()
        try:
            await self._authenticate(context)
            response = await self.decide(protos.RateLimitRequest.FromString(data))
        except NodeRejected as error:
            await self._refuse(context, error.status, str(error))
        except (BadDescriptorError, DecodeError) as error:
            await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except CountersError as error:
            self.metrics.answers.labels("ERROR").inc()
            self.metrics.available.set(0)
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        self.metrics.available.set(1)
        self.metrics.answers.labels("OVER_LIMIT" if response.overall_code == _OVER_LIMIT else "OK").inc()
        self.metrics.duration.observe(time.perf_counter() - began)
        answer: bytes = response.SerializeToString()
        return answer

    async def _refuse(self, context: _Context, status: grpc.StatusCode, text: str) -> None:
        self.metrics.answers.labels("REFUSED").inc()
        await context.abort(status, text)

    async def _authenticate(self, context: _Context) -> None:
        """Let whoever proves to be a proxy ask, whichever it is. Raises NodeRejected."""
        if self._authenticator is None:
            return
        metadata: Mapping[str, str | bytes] = dict(context.invocation_metadata() or ())
        names = context.auth_context()
        chain = b"".join((*names.get("x509_pem_cert", ()), *names.get("x509_pem_cert_chain", ())))
        proof, now = (chain, metadata.get("authorization")), time.monotonic()
        if self._verified.get(proof, 0.0) > now:
            return
        peer = Peer(
            context.peer(),
            tuple(name.decode() for name in names.get("peer_uri", ())),
            tuple(name.decode() for name in names.get("peer_dns", ())),
            chain,
        )
        self._authenticator.left(await self._authenticator.authenticate(peer, metadata, _NOBODY))
        self._verified = {known: until for known, until in self._verified.items() if until > now}
        self._verified[proof] = now + _VERIFIED_FOR


class _Admin:
    """The admin endpoints: health and metrics, for everybody."""

    def __init__(self, service: RateLimitService) -> None:
        self._service = service
        app = web.Application()
        app.router.add_get("/healthz", self._get_healthz)
        app.router.add_get("/readyz", self._get_readyz)
        app.router.add_get("/metrics", self._get_metrics)
        self._runner = runner_of(app)

    async def start(self, address: Address) -> Address:
        await self._runner.setup()
        await web.TCPSite(self._runner, address.host, address.port).start()
        return Address(address.host, self._runner.addresses[0][1])

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _get_healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _get_readyz(self, _: web.Request) -> web.Response:
        if await self._service.is_available():
            return web.Response(text="ok\n")
        return web.Response(status=503, text="Redis does not answer\n")

    async def _get_metrics(self, _: web.Request) -> web.Response:
        body = self._service.metrics.exposition()
        return web.Response(body=body, headers={"Content-Type": metrics.CONTENT_TYPE})


async def run(
    counters: Counters,
    address: Address,
    admin_address: Address,
    stop: asyncio.Event,
    *,
    credentials: grpc.ServerCredentials | None = None,
    authenticator: Authenticator | None = None,
) -> None:
    """Serve until `stop` is set. Raises AddressInUseError."""
    service = RateLimitService(counters, authenticator)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(counters.close)
        admin = _Admin(service)
        stack.push_async_callback(admin.stop)
        try:
            admin_address = await admin.start(admin_address)
        except OSError as error:
            raise AddressInUseError.of("--admin-address", admin_address, error) from None
        try:
            address = await service.start(address, credentials)
        except (OSError, RuntimeError) as error:
            raise AddressInUseError.of("--address", address, error) from None
        stack.push_async_callback(service.stop)
        await service.is_available()  # so that the log says at once what is wrong
        _LOG.info("serving rate limits", address=str(address), admin=str(admin_address))
        await stop.wait()


def _hit(request: Any, descriptor: Any) -> Hit:
    """Read a descriptor. Raises BadDescriptorError."""
    limit = descriptor.limit
    if not descriptor.HasField("limit"):
        raise BadDescriptorError("a descriptor has no limit: this service has none of its own")
    unit = _UNITS.get(limit.unit)
    if unit is None:
        raise BadDescriptorError("the unit of a limit must be SECOND, MINUTE, HOUR, DAY or MONTH")
    # Two lists of entries are never one key: each text stands behind its length.
    entries = [(entry.key, entry.value) for entry in descriptor.entries]
    is_shadow = SHADOW in entries
    texts = [request.domain, *(text for entry in entries if entry != SHADOW for text in entry)]
    key = "|".join(f"{len(text)}:{text}" for text in texts)
    if len(key) > _LONGEST_KEY:
        raise BadDescriptorError(f"the entries of a descriptor are longer than {_LONGEST_KEY} characters")
    amount = descriptor.hits_addend.value if descriptor.HasField("hits_addend") else request.hits_addend or 1
    amount = -amount if descriptor.is_negative_hits else amount
    return Hit(key, unit, limit.requests_per_unit, amount, is_shadow)
