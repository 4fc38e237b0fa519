"""The action CUSTOM on a real gateway; what else of the mesh configuration changes for policies."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from llmplane.local import free_port
from tests.envoy.conftest import DASHSCOPE, KEYS, Lab, running_lab
from tests.support.authorization import (
    DENIED,
    AuthorizationService,
    running_grpc_service,
    running_http_service,
)
from tests.support.client import MESSAGES, Answer, GatewayClient
from tests.support.objects import backends, route
from tests.support.objects import provider as llm_provider
from tests.support.policies import HOST, authorization_policy, opened
from tests.support.policies import gateway as gateway_object

CHAT = "/v1/chat/completions"
ALLOW = {"x-ext-authz": "allow"}
HTTP_FIELDS = {
    "includeRequestHeadersInCheck": ["x-ext-authz", "x-team-*"],
    "includeAdditionalHeadersInCheck": {"x-gateway": "ingress"},
    "headersToUpstreamOnAllow": ["x-user"],
    "headersToDownstreamOnDeny": ["x-reason"],
    "headersToDownstreamOnAllow": ["x-user"],
}


def provider(name: str, kind: str, port: int, **fields: Any) -> dict[str, Any]:
    return {"name": name, kind: {"service": f"{name}.example.com", "port": port, **fields}}


def mesh_config() -> dict[str, Any]:
    http, grpc = "envoyExtAuthzHttp", "envoyExtAuthzGrpc"
    body = {"includeRequestBodyInCheck": {"maxRequestBytes": 100}}
    return {
        "extensionProviders": [
            provider("http", http, 1, **HTTP_FIELDS),
            provider("http-prefix", http, 1, pathPrefix="/check", **HTTP_FIELDS, **body),
            provider("http-routing", http, 1, clearRouteCache=True, **HTTP_FIELDS),
            provider("grpc", grpc, 2),
            provider("grpc-routing", grpc, 2, clearRouteCache=True),
            provider("grpc-body", grpc, 2, **body),
            *(provider(f"{kind}-down", of, 3) for kind, of in (("http", http), ("grpc", grpc))),
            *(
                provider(f"{kind}-open", of, 3, failOpen=True)
                for kind, of in (("http", http), ("grpc", grpc))
            ),
            *(
                provider(f"{kind}-status", of, 3, statusOnError="503")
                for kind, of in (("http", http), ("grpc", grpc))
            ),
        ],
        "defaultConfig": {"gatewayTopology": {"numTrustedProxies": 1}},
        "pathNormalization": {"normalization": "DECODE_AND_MERGE_SLASHES"},
    }


@dataclass(frozen=True)
class Gateway:
    """A gateway with a host that a provider serves, and authorization services."""

    lab: Lab
    client: GatewayClient
    services: dict[str, AuthorizationService]

    def apply(self, *policies: str) -> None:
        """Make these the policies of the gateway."""
        self.lab.apply(*opened(DASHSCOPE, KEYS[DASHSCOPE]), *policies)
        for service in self.services.values():
            service.asked.clear()

    def ask(self, path: str = CHAT, **options: Any) -> Answer:
        return self.client.request(HOST, path=path, **options)


def custom(provider: str, *rules: dict[str, Any]) -> str:
    return authorization_policy(*(rules or ({},)), action="CUSTOM", provider={"name": provider})


@pytest.fixture(scope="module")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    config = tmp_path_factory.mktemp("mesh") / "mesh.yaml"
    config.write_text(json.dumps(mesh_config()), encoding="utf-8")
    with running_http_service() as http, running_grpc_service() as grpc:
        options = ["--mesh-config", str(config), *addresses(http.port, grpc.port)]
        with running_lab(options=options) as lab:
            address = lab.start_gateway().bind_address
            yield Gateway(lab, GatewayClient(address), {"http": http, "grpc": grpc})


def addresses(http: int, grpc: int) -> Iterator[str]:
    """Say where the services of the mesh configuration are; nobody listens at those with port 3."""
    ports = {1: http, 2: grpc, 3: free_port()}
    for each in mesh_config()["extensionProviders"]:
        (service,) = (value for name, value in each.items() if name != "name")
        yield "--connect-to"
        yield f"{service['service']}:{service['port']}:127.0.0.1:{ports[service['port']]}"


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Gateway:
    shared_gateway.lab.fake.forget()
    return shared_gateway


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_the_service_decides(gateway: Gateway, kind: str) -> None:
    gateway.apply(custom(kind))
    assert gateway.ask(headers=ALLOW).status == 200
    denied = gateway.ask()
    assert (denied.status, denied.body, denied.headers["x-reason"]) == (403, DENIED, "policy")


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_it_is_asked_about_what_the_rules_match_only(gateway: Gateway, kind: str) -> None:
    gateway.apply(custom(kind, {"to": [{"operation": {"paths": ["/"]}}]}))
    assert gateway.ask().status == 200
    assert gateway.services[kind].asked == []
    assert gateway.ask("/").status == 403
    assert gateway.services[kind].only().path == "/"


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize(("provider", "model"), [("", "some-model"), ("-routing", "for-alice")])
def test_what_it_says_of_the_client_may_choose_the_route(
    gateway: Gateway, kind: str, provider: str, model: str
) -> None:
    """With clearRouteCache, the headers that it sets are there for the matches of an LLMRoute."""
    alice = {"matches": [{"headers": {"x-user": {"exact": "alice"}}}], "name": "alice"}
    others = {"backendRefs": backends(DASHSCOPE)}
    config = {"model": "some-model", "apiKey": KEYS[DASHSCOPE]}
    configs = {
        "defaultConfig": {"openAIConfig": config},
        "routeSpecificConfigs": {"alice": {"openAIConfig": {"model": "for-alice"}}},
    }
    gateway.lab.apply(
        gateway_object(),
        llm_provider("istio-system/provider", DASHSCOPE, configs=configs),
        route("test", HOST, {**alice, **others}, others, gateways=["istio-system/ingress-gw"]),
        custom(f"{kind}{provider}"),
    )
    assert gateway.ask(headers=ALLOW).json()["model"] == model


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_what_it_allows_may_still_be_denied(gateway: Gateway, kind: str) -> None:
    """DENY and ALLOW are looked at behind it."""
    deny = authorization_policy({}, name="istio-system/deny", action="DENY")
    gateway.apply(custom(kind), deny)
    assert gateway.ask(headers=ALLOW).body == b"RBAC: access denied"
    gateway.apply(custom(kind), authorization_policy(name="istio-system/allow-nothing"))
    assert gateway.ask(headers=ALLOW).body == b"RBAC: access denied"


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize(("provider", "status"), [("down", 403), ("status", 503)])
def test_a_service_that_cannot_be_asked_denies(
    gateway: Gateway, kind: str, provider: str, status: int
) -> None:
    """With the status of statusOnError."""
    gateway.apply(custom(f"{kind}-{provider}"))
    answer = gateway.ask(headers=ALLOW)
    assert (answer.status, answer.error["code"]) == (status, "authorization_unavailable")
    assert gateway.lab.all_seen() == ()


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_fail_open_says_otherwise(gateway: Gateway, kind: str) -> None:
    gateway.apply(custom(f"{kind}-open"))
    assert gateway.ask().status == 200


def test_an_http_service_is_told_of_the_headers_that_were_asked_for(gateway: Gateway) -> None:
    gateway.apply(custom("http"))
    secret = {"authorization": "Bearer of-the-client", "cookie": "session=1", "x-team-name": "research"}
    answer = gateway.ask(f"{CHAT}?a=b", headers={**ALLOW, **secret})
    assert (answer.status, answer.headers["x-user"]) == (200, "alice")
    asked = gateway.services["http"].only()
    assert (asked.method, asked.path, asked.body) == ("POST", f"{CHAT}?a=b", b"")
    assert {name: value for name, value in asked.headers.items() if not name.startswith("x-envoy-")} == {
        "host": HOST,
        "content-length": "0",
        "x-ext-authz": "allow",
        "x-team-name": "research",
        "x-gateway": "ingress",
        "authorization": "Bearer of-the-client",  # Envoy sends it always, in Istio, too
    }
    assert KEYS[DASHSCOPE] not in str(asked)


def test_an_http_service_with_a_prefix_and_the_body(gateway: Gateway) -> None:
    gateway.apply(custom("http-prefix"))
    assert gateway.ask(headers=ALLOW).status == 200
    asked = gateway.services["http"].only()
    assert (asked.path, asked.body) == (f"/check{CHAT}", MESSAGES)


def test_a_grpc_service_is_told_of_all_headers(gateway: Gateway) -> None:
    gateway.apply(custom("grpc"))
    gateway.ask(headers={**ALLOW, "authorization": "Bearer of-the-client"})
    asked = gateway.services["grpc"].only()
    assert (asked.method, asked.path, asked.body) == ("POST", CHAT, b"")
    assert asked.headers["authorization"] == "Bearer of-the-client"
    assert KEYS[DASHSCOPE] not in str(asked)


def test_a_grpc_service_with_the_body(gateway: Gateway) -> None:
    gateway.apply(custom("grpc-body"))
    assert gateway.ask(headers=ALLOW).status == 200
    assert gateway.services["grpc"].only().body == MESSAGES


@pytest.mark.parametrize("provider", ["http-prefix", "grpc-body"])
def test_a_body_that_is_too_long_for_the_service(gateway: Gateway, provider: str) -> None:
    gateway.apply(custom(provider))
    body = json.dumps({"messages": [{"role": "user", "content": "a" * 100}]}).encode()
    assert gateway.ask(body=body, headers=ALLOW).status == 413
    assert gateway.lab.all_seen() == ()


def test_two_services_for_one_workload_deny(gateway: Gateway) -> None:
    second = custom("grpc").replace('"name": "rules"', '"name": "more-rules"')
    gateway.apply(custom("http"), second)
    assert gateway.ask(headers=ALLOW).body == b"RBAC: access denied"
    met, reason, _ = gateway.lab.condition("rules", "Accepted")
    assert (met, reason) == (False, "Conflicted")


# What the mesh configuration changes


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("10.9.9.9, 10.1.2.3", "10.1.2.3"),
        ("10.1.2.3, 10.9.9.9", "10.9.9.9"),
        (None, "127.0.0.1"),
    ],
)
def test_with_a_trusted_proxy_its_word_for_the_client_counts(
    gateway: Gateway, forwarded: str | None, client: str
) -> None:
    """The proxy adds the client's address at the end; what is in front of that, anybody may claim."""
    headers = {"x-forwarded-for": forwarded} if forwarded else {}
    gateway.apply(authorization_policy({"from": [{"source": {"remoteIpBlocks": [client]}}]}))
    assert gateway.ask(headers=headers).status == 200
    gateway.apply(authorization_policy({"from": [{"source": {"notRemoteIpBlocks": [client]}}]}))
    assert gateway.ask(headers=headers).status == 403
    gateway.apply(authorization_policy({"from": [{"source": {"ipBlocks": ["127.0.0.1"]}}]}))
    assert gateway.ask(headers=headers).status == 200, "ipBlocks are about the TCP peer"


@pytest.mark.parametrize(
    "path",
    [
        "//v1//chat/completions",
        "/v1/chat%2fcompletions",
        "/v1/chat%5Ccompletions",
        "/v1/x/..//chat/completions",
    ],
)
def test_slashes_can_be_normalised_too(gateway: Gateway, path: str) -> None:
    deny = {"to": [{"operation": {"paths": [CHAT]}}]}
    gateway.apply(authorization_policy(deny, action="DENY"))
    assert gateway.ask(path).status == 403
