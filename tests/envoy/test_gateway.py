"""Ingress gateways: seed 004 as it is written, and what of a request a gateway trusts and passes on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmplane.fakellm import fingerprint
from tests.envoy.conftest import DASHSCOPE, KEYS, Lab, running_lab
from tests.support.client import GatewayClient

SEED = Path(__file__).parents[2] / "examples" / "004-ingress-gateway"


def seed(step: int) -> list[str]:
    """Return the objects of the seed after a step."""
    return [file.read_text(encoding="utf-8") for file in sorted((SEED / f"step-{step}").glob("*.yaml"))]


@pytest.fixture(scope="module")
def gateway_lab() -> Iterator[Lab]:
    with running_lab(environment={"API_KEY": KEYS[DASHSCOPE]}) as lab:
        lab.start_gateway()
        yield lab


@pytest.fixture
def client(gateway_lab: Lab) -> GatewayClient:
    """Give a client of port 80 of the gateway, which has what seed 004 has after step 3."""
    gateway_lab.apply(*seed(3))
    gateway_lab.fake.forget()
    return GatewayClient(gateway_lab.mesh.gateways[0].bind_address)


def test_the_seeds_request_is_answered_by_the_provider(gateway_lab: Lab, client: GatewayClient) -> None:
    answer = client.request("test.com")
    assert (answer.status, answer.json()["model"]) == (200, "qwen-1.8b-chat")
    seen = gateway_lab.seen()
    assert (seen.sni, seen.host, seen.path) == (DASHSCOPE, DASHSCOPE, "/compatible-mode/v1/chat/completions")


def test_a_host_that_no_route_has_is_told_in_openais_form(client: GatewayClient) -> None:
    answer = client.request("other.com")
    assert (answer.status, answer.error["code"]) == (404, "route_not_found")


def test_the_providers_own_host_is_not_open_to_everybody(client: GatewayClient) -> None:
    """On a sidecar a provider can be called without a route; on a gateway only routes attach."""
    assert client.request(DASHSCOPE).status == 404


@pytest.mark.parametrize("host", ["TEST.com", "test.com:80", "test.com.", "Test.Com.:8080"])
def test_a_host_is_one_whatever_way_it_is_written(client: GatewayClient, host: str) -> None:
    assert client.request(host).status == 200


def test_nothing_of_the_client_but_its_request_goes_on(gateway_lab: Lab, client: GatewayClient) -> None:
    secret = {
        "authorization": "Bearer of-the-client",
        "cookie": "session=1",
        "x-api-key": "of-the-client",
        "x-envoy-retry-on": "5xx",
        "x-forwarded-for": "203.0.113.7",
        "x-forwarded-host": "internal.example.com",
        "x-request-id": "1",
    }
    assert client.request("test.com", headers=secret).status == 200
    seen = gateway_lab.seen()
    assert {name.lower() for name, _ in seen.headers} == {
        "host",
        "content-type",
        "content-length",
        "authorization",
    }
    assert seen.key_fingerprint == fingerprint(KEYS[DASHSCOPE])


DENIED = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: not-from-there, namespace: istio-system}
spec:
  selector: {matchLabels: {istio: ingressgateway}}
  action: DENY
  rules: [{from: [{source: {remoteIpBlocks: [203.0.113.7]}}]}]
"""


def test_x_forwarded_for_counts_as_far_as_proxies_are_trusted(tmp_path: Path) -> None:
    config = tmp_path / "mesh.yaml"
    config.write_text("defaultConfig: {gatewayTopology: {numTrustedProxies: 1}}", encoding="utf-8")
    environment = {"API_KEY": KEYS[DASHSCOPE]}
    with running_lab(options=["--mesh-config", str(config)], environment=environment) as lab:
        client = GatewayClient(lab.start_gateway().bind_address)
        lab.apply(*seed(3), DENIED)
        for forwarded, status in {
            "203.0.113.7": 403,
            "198.51.100.1": 200,
            "203.0.113.7, 198.51.100.1": 200,  # what the client itself said is not trusted
            "198.51.100.1, 203.0.113.7": 403,
        }.items():
            headers = {"x-forwarded-for": forwarded, "x-forwarded-host": "a", "x-forwarded-proto": "https"}
            assert client.request("test.com", headers=headers).status == status, forwarded
        names = {name.lower() for seen in lab.all_seen() for name, _ in seen.headers}
        assert not [name for name in names if name.startswith("x-")]


def test_x_forwarded_for_of_strangers_means_nothing(gateway_lab: Lab, client: GatewayClient) -> None:
    gateway_lab.apply(*seed(3), DENIED)
    assert client.request("test.com", headers={"x-forwarded-for": "203.0.113.7"}).status == 200


def test_the_seeds_policy_denies_with_envoys_own_words(gateway_lab: Lab, client: GatewayClient) -> None:
    """Step 5: the text is what the document shows, and not OpenAI's JSON."""
    gateway_lab.apply(*(text.replace("${本机IP}", "127.0.0.1") for text in seed(5)))
    denied = client.request("test.com")
    assert (denied.status, denied.headers["content-type"]) == (403, "text/plain")
    assert denied.body == b"RBAC: access denied"
    assert gateway_lab.all_seen() == ()
