"""`llmplane ratelimit`, over raw gRPC (tests/envoy/test_global_rate_limits.py: with Envoys)."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from llmplane.address import Address
from llmplane.auth import ClientCA, FileAuthenticator, ServerCertificate, TokenFile
from llmplane.certificates import CertificateAuthority
from llmplane.cli import main
from llmplane.counters import Counters, MemoryCounters, RedisCounters
from llmplane.ratelimit import SERVICE, RateLimitService
from tests.support.identities import MeshCA, Pair
from tests.support.ratelimit import running_ratelimit
from tests.support.redis import RedisServer, needs_redis, running_redis
from xds import protos

METHOD = f"/{SERVICE}/ShouldRateLimit"
NOON = 1_800_014_400.0
TOKEN = "token-of-the-envoys-0001"  # noqa: S105
INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


def descriptor(
    hits: int | None = 1, key: str = "alice", limit: int = 100, unit: str = "MINUTE", **more: Any
) -> dict[str, Any]:
    """Make a descriptor of an LLM policy."""
    entries = {"policy": "shop/per-user", "rule": "default", "key": key, "tokens": "total"}
    return {
        "entries": [{"key": name, "value": value} for name, value in entries.items()],
        "limit": {"requests_per_unit": limit, "unit": unit},
        "hits_addend": None if hits is None else {"value": hits},
        **more,
    }


def call(channel: grpc.aio.Channel, *descriptors: dict[str, Any], **options: Any) -> Any:
    request = protos.RateLimitRequest(domain=options.pop("domain", "llmplane"), descriptors=descriptors)
    if "hits_addend" in options:
        request.hits_addend = options.pop("hits_addend")
    return channel.unary_unary(METHOD)(request.SerializeToString(), **options)


async def ask(channel: grpc.aio.Channel, *descriptors: dict[str, Any], **options: Any) -> Any:
    return protos.RateLimitResponse.FromString(await call(channel, *descriptors, **options))


def code(response: Any) -> str:
    name: str = protos.RateLimitResponse.Code.Name(response.overall_code)
    return name


async def refusal(channel: grpc.aio.Channel, *descriptors: dict[str, Any], **options: Any) -> Any:
    """Return the status that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(channel, *descriptors, **options)
    return raised.value.code(), raised.value.details()


@asynccontextmanager
async def serving(counters: Counters | None = None) -> AsyncIterator[tuple[RateLimitService, Any]]:
    """Run a service, whose clock stands still, and give a connection to it."""
    service = RateLimitService(counters or MemoryCounters(), clock=lambda: NOON)
    address = await service.start(Address("127.0.0.1", 0))
    async with grpc.aio.insecure_channel(str(address)) as channel:
        yield service, channel
    await service.stop()


@pytest.fixture
async def served() -> AsyncIterator[tuple[RateLimitService, Any]]:
    async with serving() as found:
        yield found


@pytest.fixture
def channel(served: tuple[RateLimitService, Any]) -> Any:
    return served[1]


async def test_a_descriptor_has_room_until_its_limit_is_used(channel: Any) -> None:
    first = await ask(channel, descriptor(60))
    assert code(first) == "OK"
    (status,) = first.statuses
    assert (status.current_limit.requests_per_unit, status.limit_remaining) == (100, 40)
    assert protos.RateLimitResponse.RateLimit.Unit.Name(status.current_limit.unit) == "MINUTE"
    assert status.duration_until_reset.seconds == 60

    second = await ask(channel, descriptor(41))
    assert code(second) == "OVER_LIMIT"
    assert second.statuses[0].limit_remaining == 40  # a smaller request may still pass
    assert code(await ask(channel, descriptor(40))) == "OK"


async def test_the_descriptors_of_a_call_are_counted_all_or_none(channel: Any) -> None:
    await ask(channel, descriptor(95, "a"))
    response = await ask(channel, descriptor(10, "a"), descriptor(10, "b"))
    assert code(response) == "OVER_LIMIT"
    assert [protos.RateLimitResponse.Code.Name(status.code) for status in response.statuses] == [
        "OVER_LIMIT",
        "OK",
    ]
    assert (await ask(channel, descriptor(100, "b"))).overall_code == 1


async def test_a_reservation_is_settled_up_and_down(channel: Any) -> None:
    """As Envoy does it when a stream ends: by is_negative_hits, or with a limit that is never reached."""
    await ask(channel, descriptor(50))
    await ask(channel, descriptor(30, is_negative_hits=True, limit=2**32 - 1))
    assert (await ask(channel, descriptor(50))).statuses[0].limit_remaining == 30
    assert code(await ask(channel, descriptor(90, limit=2**32 - 1))) == "OK"
    response = await ask(channel, descriptor(0))
    assert (code(response), response.statuses[0].limit_remaining) == ("OVER_LIMIT", 0)


@pytest.mark.parametrize(
    ("of_descriptor", "of_request", "counted"), [(5, 3, 5), (0, 3, 0), (None, 3, 3), (None, 0, 1)]
)
async def test_hits_are_the_descriptors_or_else_the_requests_or_else_one(
    channel: Any, of_descriptor: int | None, of_request: int, counted: int
) -> None:
    response = await ask(channel, descriptor(of_descriptor), hits_addend=of_request)
    assert response.statuses[0].limit_remaining == 100 - counted


async def test_what_differs_in_domain_or_in_an_entry_is_counted_apart(channel: Any) -> None:
    other = descriptor(100)
    other["entries"] = [{"key": "a", "value": "b|1:c"}]
    alike = descriptor(100)
    alike["entries"] = [{"key": "a", "value": "b"}, {"key": "c", "value": ""}]
    for each in (descriptor(100), descriptor(100, "bob"), descriptor(100, unit="HOUR"), other, alike):
        assert code(await ask(channel, each)) == "OK"
        assert code(await ask(channel, each)) == "OVER_LIMIT"
        assert code(await ask(channel, each, domain="another")) == "OK"


@pytest.mark.parametrize(
    ("descriptors", "domain", "why"),
    [
        ([], "llmplane", "a request needs a domain and a descriptor"),
        ([descriptor()], "", "a request needs a domain and a descriptor"),
        (
            [{"entries": [{"key": "a", "value": "b"}]}],
            "llmplane",
            "a descriptor has no limit: this service has none of its own",
        ),
        (
            [descriptor(unit="YEAR")],
            "llmplane",
            "the unit of a limit must be SECOND, MINUTE, HOUR, DAY or MONTH",
        ),
        (
            [descriptor(key="x" * 4096)],
            "llmplane",
            "the entries of a descriptor are longer than 4096 characters",
        ),
    ],
)
async def test_a_request_that_cannot_be_counted_says_why(
    channel: Any, descriptors: list[dict[str, Any]], domain: str, why: str
) -> None:
    assert await refusal(channel, *descriptors, domain=domain) == (INVALID, why)


async def test_bytes_that_are_no_request_are_refused(channel: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await channel.unary_unary(METHOD)(b"\xff\xff")
    assert raised.value.code() is INVALID


async def test_calls_at_the_same_time_never_get_more_than_the_limit(channel: Any) -> None:
    answers = await asyncio.gather(*(ask(channel, descriptor(7, limit=1000)) for _ in range(200)))
    assert sum(code(answer) == "OK" for answer in answers) == 1000 // 7


async def test_metrics_tell_what_was_counted_by_policy_and_rule(
    served: tuple[RateLimitService, Any],
) -> None:
    service, channel = served
    await ask(channel, descriptor(50))
    await ask(channel, descriptor(20, limit=2**32 - 1))
    await ask(channel, descriptor(10, limit=2**32 - 1, is_negative_hits=True))
    await ask(channel, descriptor(90))
    await refusal(channel)
    text = service.metrics.exposition().decode()
    labels = 'policy="shop/per-user",rule="default"'
    for line in (
        f'llmplane_ratelimit_hits_total{{kind="reserved",{labels}}} 50.0',
        f'llmplane_ratelimit_hits_total{{kind="charged",{labels}}} 20.0',
        f'llmplane_ratelimit_hits_total{{kind="refunded",{labels}}} 10.0',
        f"llmplane_ratelimit_limited_total{{{labels}}} 1.0",
        'llmplane_ratelimit_requests_total{code="OK"} 3.0',
        'llmplane_ratelimit_requests_total{code="OVER_LIMIT"} 1.0',
        'llmplane_ratelimit_requests_total{code="REFUSED"} 1.0',
        "llmplane_ratelimit_counters_available 1.0",
    ):
        assert f"\n{line}\n" in text
    assert "alice" not in text  # keys are not bounded


async def test_policies_beyond_a_thousand_share_their_metrics(served: tuple[RateLimitService, Any]) -> None:
    service, channel = served
    many = []
    for number in range(1005):
        made = descriptor()
        made["entries"][0]["value"] = f"shop/{number}"
        many.append(made)
    await ask(channel, *many)
    text = service.metrics.exposition().decode()
    assert 'llmplane_ratelimit_hits_total{kind="reserved",policy="other",rule="other"} 5.0\n' in text


class Guarded:
    """A service with TLS that asks for credentials, and its files."""

    def __init__(self, directory: Path, *, mutual: bool, tokens: bool) -> None:
        self.authority, self.mesh = CertificateAuthority.create(), MeshCA()
        server = Pair(*self.authority.issue("localhost")).write(directory, "server")
        client_ca, token_file = directory / "mesh.pem", directory / "tokens"
        client_ca.write_bytes(self.mesh.pem)
        token_file.write_text(f"# of the Envoys\n* {TOKEN}\n")
        authenticator = FileAuthenticator(
            TokenFile(token_file) if tokens else None, ClientCA(client_ca) if mutual else None
        )
        self.service = RateLimitService(MemoryCounters(), authenticator, clock=lambda: NOON)
        self._credentials = ServerCertificate(*server, client_ca if mutual else None).credentials()
        self._port = 0

    @asynccontextmanager
    async def channel(self, pair: Pair | None = None) -> AsyncIterator[grpc.aio.Channel]:
        """Run it, and connect with a client certificate or without."""
        address = await self.service.start(Address("127.0.0.1", 0), self._credentials)
        names = (pair.key, pair.certificate) if pair else (None, None)
        credentials = grpc.ssl_channel_credentials(self.authority.pem, *names)
        async with grpc.aio.secure_channel(f"localhost:{address.port}", credentials) as channel:
            yield channel
        await self.service.stop()


async def test_a_client_with_a_certificate_of_the_mesh_may_ask(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, mutual=True, tokens=False)
    pair = guarded.mesh.issue("spiffe://cluster.local/ns/shop/sa/sleep")
    async with guarded.channel(pair) as channel:
        assert code(await ask(channel, descriptor())) == "OK"


async def test_a_client_without_a_certificate_of_the_mesh_may_not(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, mutual=True, tokens=False)
    async with guarded.channel() as channel:
        assert (await refusal(channel, descriptor()))[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_client_needs_a_token_of_the_file(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, mutual=False, tokens=True)
    async with guarded.channel() as channel:
        assert await refusal(channel, descriptor()) == (UNAUTHENTICATED, "a bearer token is required")
        for wrong in ("Bearer another-token-000000", TOKEN):
            metadata = [("authorization", wrong)]
            assert await refusal(channel, descriptor(), metadata=metadata) == (
                UNAUTHENTICATED,
                "the bearer token is not known",
            )
        right = [("authorization", f"Bearer {TOKEN}")]
        for _ in range(2):
            assert code(await ask(channel, descriptor(), metadata=right)) == "OK"
    assert TOKEN not in guarded.service.metrics.exposition().decode()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--cert-file", "a"), "--cert-file and --key-file belong together"),
        (("--client-ca-file", "a"), "--client-ca-file needs --cert-file: it is for mutual TLS"),
        (
            ("--address", "0.0.0.0:0", "--token-file", "a"),
            "--token-file needs --cert-file: tokens travel in clear without TLS",
        ),
        (
            ("--address", "0.0.0.0:0"),
            "--address 0.0.0.0:0: other machines reach it; give --client-ca-file or --token-file, or",
        ),
        (
            ("--redis-url", "http://:secret@redis"),
            "--redis-url cannot be used: it is redis://HOST:PORT, rediss://HOST:PORT or unix:///PATH",
        ),
        (("--cert-file", "a", "--key-file", "a"), "a: has no certificate in PEM form"),
    ],
)
def test_options_that_do_not_go_together_are_told(
    options: tuple[str, ...], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_text("")
    result = CliRunner().invoke(main, ["ratelimit", *options])
    assert result.exit_code
    assert f"Error: {why}" in result.stderr
    assert "secret" not in result.stderr


@pytest.mark.parametrize("option", ["--address", "--admin-address"])
def test_a_taken_port_is_told(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        addresses = {"--address": "127.0.0.1:0", "--admin-address": "127.0.0.1:0"}
        addresses[option] = f"127.0.0.1:{taken.getsockname()[1]}"
        words = [word for pair in addresses.items() for word in pair]
        result = CliRunner().invoke(main, ["ratelimit", *words])
    assert result.stderr.endswith(f"Error: {option} {addresses[option]}: Address already in use\n")


@needs_redis
def test_the_process_says_whether_it_can_count(tmp_path: Path) -> None:
    redis = RedisServer()
    with running_ratelimit(tmp_path, redis_url=redis.url) as server:
        assert server.get("/readyz") == (503, "Redis does not answer\n")
        assert server.get("/healthz") == (200, "ok\n")
        assert server.metric("llmplane_ratelimit_counters_available") == 0
        redis.start()
        try:
            assert server.get("/readyz") == (200, "ok\n")
            assert server.metric("llmplane_ratelimit_counters_available") == 1
        finally:
            redis.stop()
    log = server.log.read_text()
    assert "Redis cannot count; policies' failOpen decides" in log
    assert "Redis counts again" in log


@needs_redis
def test_servers_that_share_a_redis_share_their_limits(tmp_path: Path) -> None:
    async def count(servers: list[Address]) -> int:
        channels = [grpc.aio.insecure_channel(str(address)) for address in servers]
        asked = [ask(channels[n % 2], descriptor(7, unit="MONTH", limit=1000)) for n in range(200)]
        answers = await asyncio.gather(*asked)
        for channel in channels:
            await channel.close()
        return sum(code(answer) == "OK" for answer in answers)

    with (
        running_redis() as redis,
        running_ratelimit(tmp_path, redis_url=redis.url) as one,
        running_ratelimit(tmp_path, redis_url=redis.url) as two,
    ):
        assert asyncio.run(count([one.address, two.address])) == 1000 // 7
        assert one.get("/healthz") == (200, "ok\n")


@needs_redis
async def test_while_redis_is_away_calls_fail_and_then_they_work_again() -> None:
    with running_redis() as redis:
        counters = RedisCounters(redis.url, timeout=30)
        async with serving(counters) as (service, channel):
            assert code(await ask(channel, descriptor())) == "OK"
            redis.stop()
            status, text = await refusal(channel, descriptor())
            assert status is grpc.StatusCode.UNAVAILABLE
            assert text.startswith("Redis: ")
            assert "llmplane_ratelimit_counters_available 0.0" in service.metrics.exposition().decode()
            redis.start()
            assert code(await ask(channel, descriptor())) == "OK"
        await counters.close()
