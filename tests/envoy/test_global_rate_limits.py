"""Token limits that several Envoys share: a sidecar and a gateway, `llmplane ratelimit`, and a real Redis."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from llmplane.fakellm import Fault
from llmplane.local import free_port
from tests.envoy.conftest import DASHSCOPE, KEYS, Lab, running_lab
from tests.support.client import Answer, GatewayClient
from tests.support.identities import MeshCA, Pair
from tests.support.objects import backends, gateway, provider, rate_limit, route, server
from tests.support.policies import istio_object
from tests.support.ratelimit import (
    RateLimitServer,
    needs_envoys_service,
    running_envoys_service,
    running_ratelimit,
)
from tests.support.redis import RedisServer, needs_redis, running_redis
from tests.support.wait import eventually
from translator.features import Feature

pytestmark = [needs_redis, pytest.mark.needs(Feature.NEGATIVE_HITS)]

HOST = "llm.example.com"
GUARDED = "limits.example.com"
"""A service that wants a certificate of the mesh: the sidecar has one, the gateway has none."""
USED = 75
"""Tokens of each answer of the fake LLM."""
RESERVED = 100 + 13
"""What a request reserves: completionTokens, and a quarter of the bytes of its body."""
LABELS = 'policy="istio-system/shared",rule="default"'


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    found = Path(tempfile.mkdtemp(prefix="limits-"))
    yield found
    shutil.rmtree(found, ignore_errors=True)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with running_redis() as found:
        yield found


@pytest.fixture(scope="module")
def service(directory: Path, redis: RedisServer) -> Iterator[RateLimitServer]:
    with running_ratelimit(directory, redis_url=redis.url) as found:
        yield found


@pytest.fixture(scope="module")
def another_redis() -> Iterator[RedisServer]:
    """Run one that never dies: the Envoy project's service takes a while to get over that."""
    with running_redis() as found:
        yield found


@pytest.fixture(scope="module")
def envoys_service(directory: Path, another_redis: RedisServer) -> Iterator[int]:
    """Run the Envoy project's own service, if it is there."""
    with running_envoys_service(directory, another_redis.port) as (port, _):
        yield port


@pytest.fixture(scope="module")
def two_envoys(directory: Path, service: RateLimitServer, envoys_service: int) -> Iterator[Lab]:
    """Run a sidecar and a gateway that know all services: what gives back, what does not, and a dead one."""
    here = {"service": "127.0.0.1", "port": service.address.port, "timeout": "5s"}
    services = {
        "shared": {**here, "refunds": True},
        "upward": here,
        "envoys": {**here, "port": envoys_service},
        "dead": {**here, "port": free_port()},
        "guarded": {**here, "service": GUARDED, "port": 18081, "tls": {"mode": "MUTUAL"}},
    }
    mesh = {"extensionProviders": [{"name": name, "envoyRateLimit": of} for name, of in services.items()]}
    file = directory / "mesh.yaml"
    file.write_text(yaml.safe_dump(mesh))
    ca, port = MeshCA(), free_port()
    (directory / "mesh-ca.pem").write_bytes(ca.pem)
    chain, key = ca.issue("spiffe://cluster.local/ns/default/sa/sleep").write(directory, "sleep")
    certificate = ["--workload-cert", str(chain), "--workload-key", str(key)]
    with running_lab(
        options=["--mesh-config", str(file), "--connect-to", f"{GUARDED}:18081:127.0.0.1:{port}"],
        proxy_options=[*certificate, "--workload-ca", str(directory / "mesh-ca.pem")],
    ) as lab:
        lab.start_gateway()
        server_chain, server_key = Pair(*lab.authority.issue(GUARDED)).write(directory, "guarded")
        options = ["--cert-file", str(server_chain), "--key-file", str(server_key)]
        options += ["--client-ca-file", str(directory / "mesh-ca.pem")]
        with running_ratelimit(directory, *options, port=port):
            yield lab


class Limited:
    """Two Envoys under a limit."""

    def __init__(self, lab: Lab, service: RateLimitServer) -> None:
        self.lab = lab
        self.service = service
        self._gateway = GatewayClient(lab.mesh.gateways[0].bind_address)

    def apply(self, *more: str, tokens: int = 1000, **spec: Any) -> None:
        """Give all workloads so many tokens, for each value of the header x-user."""
        limit = {"tokens": tokens, "unit": "Month"}
        default = {
            "mode": "Global",
            "provider": {"name": "shared"},
            "keys": [{"header": "x-user"}],
            "rules": [{"limits": [limit]}],
            "reservation": {"completionTokens": 100},
        }
        self.lab.apply(
            gateway("istio-system/ingress-gw", server()),
            provider("istio-system/provider", DASHSCOPE, KEYS[DASHSCOPE]),
            route("istio-system/on-the-gateway", HOST, *_to_provider(), gateways=["ingress-gw", "mesh"]),
            istio_object(
                "istio.alibabacloud.com/v1beta1",
                "LLMTokenRateLimit",
                "istio-system/shared",
                {**default, **spec},
            ),
            *more,
        )

    def by_sidecar(self, user: str = "alice", **options: Any) -> Answer:
        return self.lab.client.request(HOST, headers={"x-user": user.encode().decode("latin-1")}, **options)

    def by_gateway(self, user: str = "alice", **options: Any) -> Answer:
        return self._gateway.request(HOST, headers={"x-user": user.encode().decode("latin-1")}, **options)

    def hits(self, kind: str) -> int:
        """Return how many tokens the service ever reserved, charged or refunded."""
        return round(self.service.metric(f'llmplane_ratelimit_hits_total{{kind="{kind}",{LABELS}}}'))

    def used(self) -> int:
        return self.hits("reserved") + self.hits("charged") - self.hits("refunded")

    def wait_for(self, used: int) -> None:
        """Wait until all is settled, which Envoy does when the client has its answer already."""
        eventually(lambda: self.used() == used)


def _to_provider() -> list[dict[str, Any]]:
    return [{"backendRefs": backends(DASHSCOPE)}]


@pytest.fixture
def limited(two_envoys: Lab, service: RateLimitServer, redis: RedisServer) -> Limited:
    redis.send("FLUSHALL")
    two_envoys.fake.set_fault(DASHSCOPE, None)
    return Limited(two_envoys, service)


def test_two_envoys_share_a_limit_and_settle_what_they_reserved(limited: Limited) -> None:
    limited.apply()
    before = limited.used()
    passed = 0
    for number in range(20):
        answer = (limited.by_sidecar, limited.by_gateway)[number % 2]()
        if answer.status != 200:
            break
        passed += 1
        limited.wait_for(before + USED * passed)
        assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
        assert answer.headers["x-ratelimit-remaining-tokens"] == str(1000 - USED * (passed - 1) - RESERVED)
    assert answer.status == 429
    assert passed == (1000 - RESERVED) // USED + 1
    assert limited.by_gateway("bob").status == 200  # another value of the key has tokens of its own
    assert "hits_addend" not in limited.lab.mesh.log("sidecar")  # as Envoy warns where a number is missing


def test_a_refused_client_learns_when_to_come_again_in_openais_words(limited: Limited) -> None:
    limited.apply(tokens=120)
    assert limited.by_sidecar().status == 200
    answer = limited.by_gateway()
    assert answer.status == 429
    assert answer.error["type"] == "tokens"
    assert answer.error["code"] == "rate_limit_exceeded"
    assert "Rate limit reached" in answer.error["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 30 * 86400
    assert answer.headers["x-ratelimit-limit-tokens"] == "120"
    assert re.fullmatch(r"(\d+h)?(\d+m)?\d+s", answer.headers["x-ratelimit-reset-tokens"])
    assert not {"x-envoy-ratelimited", "x-ratelimit-limit", "x-ratelimit-reset"} & answer.headers.keys()


def test_the_openai_sdk_raises_its_rate_limit_error(limited: Limited) -> None:
    limited.apply(tokens=50)
    address = limited.lab.mesh.gateways[0].bind_address
    headers = {"Host": HOST, "x-user": "alice"}
    with openai.OpenAI(
        base_url=f"http://{address}/v1", api_key="none", default_headers=headers, max_retries=0
    ) as client:
        client.chat.completions.create(model="any", messages=[{"role": "user", "content": "Hi"}])
        with pytest.raises(openai.RateLimitError) as raised:
            client.chat.completions.create(model="any", messages=[{"role": "user", "content": "Hi"}])
    assert raised.value.code == "rate_limit_exceeded"


@pytest.mark.parametrize("user", ["", "a,b;c", "-", "x" * 300, "π|ü", "%REQ(x)%"])
def test_a_value_of_the_key_is_settled_where_it_was_reserved(limited: Limited, user: str) -> None:
    limited.apply(tokens=200)
    before = limited.used()
    for number in (1, 2):
        assert limited.by_sidecar(user).status == 200
        limited.wait_for(before + USED * number)
    assert limited.by_sidecar(user).status == 429


def test_parallel_requests_at_both_envoys_never_use_more_than_the_limit(limited: Limited) -> None:
    limited.apply()
    before = limited.used()
    asks = [limited.by_sidecar, limited.by_gateway] * 20
    with ThreadPoolExecutor(20) as threads:
        statuses = list(threads.map(lambda ask: ask().status, asks))
    assert set(statuses) <= {200, 429}
    passed = statuses.count(200)
    assert 1000 // RESERVED <= passed <= 1000 // USED
    limited.wait_for(before + USED * passed)


def test_a_stream_that_used_more_than_it_reserved_is_charged_the_rest(limited: Limited) -> None:
    limited.apply(reservation={"completionTokens": 0, "bytesPerToken": 100})
    before, charged = limited.used(), limited.hits("charged")
    body = b'{"stream": true, "messages": [{"role": "user", "content": "Hi"}]}'
    assert limited.by_sidecar(body=body).status == 200
    limited.wait_for(before + USED)
    assert limited.hits("charged") - charged == USED - 1


def test_of_a_stream_that_is_broken_off_the_reservation_stays(limited: Limited) -> None:
    limited.apply()
    before = limited.used()
    limited.lab.fake.set_fault(DASHSCOPE, Fault(chunk_delay=0.2))
    body = b'{"stream": true, "messages": [{"role": "user", "content": "Hi"}]}'
    with limited.lab.client.open(HOST, body, {"x-user": "alice"}) as response:
        response.read(10)
    limited.lab.fake.set_fault(DASHSCOPE, None)
    assert limited.by_gateway("bob").status == 200
    eventually(lambda: limited.used() - before >= USED + 100)


def test_a_service_that_cannot_give_back_keeps_what_was_reserved(limited: Limited) -> None:
    limited.apply(provider={"name": "upward"})
    before, refunded = limited.used(), limited.hits("refunded")
    for _ in range(3):
        assert limited.by_sidecar().status == 200
    assert limited.used() - before == 3 * RESERVED
    assert limited.hits("refunded") == refunded
    _, reason, message = limited.lab.condition("shared", "Accepted")
    assert reason == "Accepted"
    assert "gives nothing back" in message


@needs_envoys_service
def test_the_envoy_projects_service_counts_for_the_same_policies(
    limited: Limited, another_redis: RedisServer
) -> None:
    """As deploy/ratelimit configures it. It keeps what was reserved, and counts what it refuses."""
    limited.apply(tokens=400, provider={"name": "envoys"}, reservation={"completionTokens": 10})
    for number in range(6):
        answer = (limited.by_sidecar, limited.by_gateway)[number % 2]()
        assert answer.status == 200
        assert answer.headers["x-ratelimit-remaining-tokens"] == str(400 - USED * number - 23)
        eventually(lambda used=USED * (number + 1): used == _counted(another_redis))
    answer = limited.by_sidecar()
    assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
    assert answer.headers["x-ratelimit-remaining-tokens"] == "0"
    assert _counted(another_redis) == USED * 6 + 23


def _counted(redis: RedisServer) -> int:
    """Return the one counter of Envoy's service."""
    found = redis.send(
        "KEYS", "llmplane_policy_istio-system/shared_rule_default_key_alice_tokens_total_unit_month_*"
    )
    if not found.startswith(b"*1"):
        return 0
    return int(redis.send("GET", found.split(b"\r\n")[2].decode()).split(b"\r\n")[1])


@pytest.mark.parametrize("name", ["dead", "unknown"])
def test_a_service_that_is_not_there_is_fail_open_or_not(limited: Limited, name: str) -> None:
    limited.apply(provider={"name": name})
    for answer in (limited.by_sidecar(), limited.by_gateway()):
        assert (answer.status, answer.error["code"]) == (503, "rate_limit_unavailable")
    limited.apply(provider={"name": name}, failOpen=True)
    assert limited.by_sidecar().status == limited.by_gateway().status == 200
    if name == "unknown":
        is_met, reason, message = limited.lab.condition("shared")
        assert (is_met, reason) == (False, "ProviderNotFound")
        assert "requests that it limits pass without a limit" in message


def test_a_service_can_ask_for_a_certificate_of_the_mesh(limited: Limited) -> None:
    limited.apply(provider={"name": "guarded"})
    assert limited.by_sidecar().status == 200
    assert limited.by_gateway().status == 503


def test_beside_a_limit_of_an_envoy_the_nearest_is_told_and_the_one_that_refused(limited: Limited) -> None:
    def told(answer: Answer) -> tuple[int, str]:
        assert "x-ratelimit-limit" not in answer.headers
        return answer.status, answer.headers["x-ratelimit-limit-tokens"]

    own = rate_limit("istio-system/own", rules=[{"limits": [{"tokens": 50 * RESERVED, "unit": "Hour"}]}])
    limited.apply(own, tokens=100 * RESERVED)
    assert told(limited.by_sidecar("near-its-own")) == (200, str(50 * RESERVED))
    limited.apply(own, tokens=RESERVED)
    answers = [told(limited.by_sidecar("near-the-shared")) for _ in range(2)]
    assert answers == [(200, str(RESERVED)), (429, str(RESERVED))]


def test_in_shadow_mode_nothing_is_refused(limited: Limited) -> None:
    limited.apply(tokens=50, shadow=True)
    name = f"llmplane_ratelimit_limited_total{{{LABELS}}}"
    before, used = limited.service.metric(name), limited.used()
    for _ in range(3):
        answer = limited.by_gateway()
        assert answer.status == 200
        assert not [header for header in answer.headers if header.startswith("x-ratelimit")]
    assert limited.service.metric(name) > before
    limited.wait_for(used + 3 * USED)  # all is counted, also beyond the limit


def test_a_redis_that_dies_and_comes_back(limited: Limited, redis: RedisServer) -> None:
    limited.apply()
    assert limited.by_sidecar().status == 200
    redis.stop()
    try:
        assert limited.by_gateway().status == 503
        limited.apply(failOpen=True)
        assert limited.by_gateway().status == 200
        limited.apply()
    finally:
        redis.start()
    assert limited.by_gateway().status == 200


def test_what_passed_while_the_service_was_away_is_charged_if_it_is_back_in_time(
    limited: Limited, redis: RedisServer
) -> None:
    limited.apply(failOpen=True)
    before = limited.used()
    limited.lab.fake.set_fault(DASHSCOPE, Fault(chunk_delay=0.06))
    redis.stop()
    try:
        body = b'{"stream": true, "messages": [{"role": "user", "content": "Hi"}]}'
        with limited.lab.client.open(HOST, body, {"x-user": "alice"}) as response:
            assert response.status == 200
            redis.start()
            response.read()
    finally:
        redis.start()
    limited.wait_for(before + USED)


def test_a_policy_of_other_requests_costs_no_call(limited: Limited) -> None:
    limited.apply()
    name = 'llmplane_ratelimit_requests_total{code="OK"}'
    before = limited.service.metric(name)
    answer = limited.lab.client.request(HOST, None, method="GET", path="/v1/models")
    assert answer.status == 200
    assert limited.service.metric(name) == before
