"""AuthorizationPolicies on a real gateway: what they deny, and that no way around them is left."""

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.envoy.conftest import DASHSCOPE, KEYS, Lab, own_address, running_lab
from tests.envoy.gateway import Gateway
from tests.support.client import MESSAGES, GatewayClient
from tests.support.policies import HOST, authorization_policy, request_authentication
from tests.support.tokens import Issuer
from translator.features import Feature

EXAMPLES = Path(__file__).parents[2] / "examples"
SEED = EXAMPLES / "004-ingress-gateway"
DENIED = (403, b"RBAC: access denied")
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def gateway_lab() -> Iterator[Lab]:
    with running_lab(environment={"API_KEY": KEYS[DASHSCOPE], "本机IP": "127.0.0.1"}) as lab:
        lab.start_gateway()
        yield lab


def ask(gateway: Gateway, host: str = HOST, path: str = CHAT, **options: Any) -> tuple[int, bytes]:
    """Send a request; return the status and, of one that is not answered by the provider, the body."""
    answer = gateway.client.request(host, path=path, **options)
    return answer.status, b"" if answer.status == 200 else answer.body


ALLOWED = (200, b"")


@pytest.fixture
def gateway(gateway_lab: Lab) -> Gateway:
    gateway_lab.fake.forget()
    return Gateway(gateway_lab)


def rule(*, source: Any = None, operation: Any = None, when: Any = None) -> dict[str, Any]:
    made = {
        "from": [{"source": source}] if source else None,
        "to": [{"operation": operation}] if operation else None,
        "when": [when] if when else None,
    }
    return {name: value for name, value in made.items() if value}


def deny(*rules: dict[str, Any], **spec: Any) -> str:
    return authorization_policy(*rules, name="istio-system/deny", action="DENY", **spec)


def allow(*rules: dict[str, Any], **spec: Any) -> str:
    return authorization_policy(*rules, name="istio-system/allow", **spec)


def test_step_5_of_the_seed(gateway: Gateway) -> None:
    """The client of its address gets `RBAC: access denied`; the provider sees nothing of it."""
    folder = SEED / "step-5"
    gateway.lab.apply(*(file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.yaml"))))
    assert ask(gateway, path="/") == DENIED
    assert gateway.lab.all_seen() == ()


def test_the_seeds_policy_is_for_one_address(gateway: Gateway) -> None:
    files = sorted((SEED / "step-5").glob("*.yaml"))
    texts = [file.read_text(encoding="utf-8").replace("${本机IP}", "127.0.0.2") for file in files]
    gateway.lab.apply(*texts)
    assert ask(gateway, path="/") == ALLOWED


# Actions


def test_deny_wins_over_allow(gateway: Gateway) -> None:
    gateway.apply(allow({}), deny(rule(operation={"hosts": [HOST]})))
    assert ask(gateway) == DENIED


def test_with_an_allow_policy_all_others_are_denied(gateway: Gateway) -> None:
    gateway.apply(allow(rule(operation={"paths": [CHAT]})))
    assert ask(gateway) == ALLOWED
    assert ask(gateway, path="/") == DENIED


def test_an_allow_policy_without_rules_denies_all(gateway: Gateway) -> None:
    gateway.apply(allow())
    assert ask(gateway) == DENIED


def test_without_a_policy_all_are_allowed(gateway: Gateway) -> None:
    gateway.apply()
    assert ask(gateway) == ALLOWED


def test_audit_denies_nothing(gateway: Gateway) -> None:
    gateway.apply(authorization_policy({}, action="AUDIT"))
    assert ask(gateway) == ALLOWED


def test_a_policy_for_other_workloads_has_no_effect(gateway: Gateway) -> None:
    gateway.apply(deny({}, selector={"matchLabels": {"istio": "egressgateway"}}))
    assert ask(gateway) == ALLOWED


@pytest.mark.parametrize("policy", [deny({}), allow()])
def test_a_policy_that_is_only_tried_denies_nothing(gateway: Gateway, policy: str) -> None:
    annotation = '"metadata": {"annotations": {"istio.io/dry-run": "true"}, '
    gateway.apply(policy.replace('"metadata": {', annotation))
    before = would_deny(gateway)
    assert ask(gateway) == ALLOWED
    assert would_deny(gateway) == before + 1


def would_deny(gateway: Gateway) -> int:
    """Count the requests that policies on trial would have denied, as Envoy's statistics show it."""
    lines = gateway.admin("/stats?filter=istio_dry_run_.*shadow_denied").splitlines()
    return sum(int(line.rpartition(" ")[2]) for line in lines)


def test_a_provider_that_the_mesh_does_not_have_denies(gateway: Gateway) -> None:
    """Only what it would be asked about; the status names it."""
    gateway.apply(
        authorization_policy(rule(operation={"paths": ["/"]}), action="CUSTOM", provider={"name": "nobody"})
    )
    assert ask(gateway, path="/") == DENIED
    assert ask(gateway) == ALLOWED
    met, reason, message = gateway.lab.condition("rules")
    assert (met, reason) == (False, "ProviderNotFound")
    assert "no extensionProvider 'nobody'" in message


# What is compared


@pytest.mark.parametrize(
    ("operation", "options"),
    [
        ({"methods": ["POST"]}, {}),
        ({"notMethods": ["GET"]}, {}),
        ({"hosts": ["test.*"]}, {}),
        ({"hosts": ["*.com"]}, {}),
        ({"hosts": ["TEST.com"]}, {}),
        ({"hosts": ["test.com:80"]}, {}),
        ({"hosts": ["test.com:*"]}, {}),
        ({"notHosts": ["other.com"]}, {}),
        ({"paths": [CHAT]}, {}),
        ({"paths": [CHAT]}, {"path": f"{CHAT}?query"}),
        ({"paths": ["/v1/*"]}, {}),
        ({"paths": ["*/completions"]}, {}),
        ({"paths": ["/v1/{*}/completions"]}, {}),
        ({"paths": ["/{**}/completions"]}, {}),
        ({"notPaths": ["/other"]}, {}),
        ({"ports": ["80"]}, {}),
        ({"notPorts": ["8080"]}, {}),
    ],
)
def test_operations(gateway: Gateway, operation: dict[str, Any], options: dict[str, Any]) -> None:
    gateway.apply(deny(rule(operation=operation)))
    assert ask(gateway, **options) == DENIED


@pytest.mark.parametrize(
    "operation",
    [
        {"methods": ["GET"]},
        {"hosts": ["other.com"]},
        {"paths": ["/v1"]},
        {"paths": ["/{*}/completions"]},
        {"ports": ["8080"]},
        {"methods": ["POST"], "ports": ["8080"]},
    ],
)
def test_operations_that_do_not_match(gateway: Gateway, operation: dict[str, Any]) -> None:
    gateway.apply(deny(rule(operation=operation)))
    assert ask(gateway) == ALLOWED


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"ipBlocks": ["127.0.0.1"]}, DENIED),
        ({"ipBlocks": ["127.0.0.0/8"]}, DENIED),
        ({"ipBlocks": ["10.0.0.0/8"]}, ALLOWED),
        ({"notIpBlocks": ["127.0.0.1"]}, ALLOWED),
        ({"remoteIpBlocks": ["127.0.0.1"]}, DENIED),
        # There is no certificate, and no token.
        ({"namespaces": ["default"]}, ALLOWED),
        ({"notNamespaces": ["default"]}, DENIED),
        ({"principals": ["*"]}, ALLOWED),
        ({"serviceAccounts": ["default/sleep"]}, ALLOWED),
        ({"requestPrincipals": ["*"]}, ALLOWED),
        ({"notRequestPrincipals": ["*"]}, DENIED),
    ],
)
def test_sources(gateway: Gateway, source: dict[str, Any], expected: tuple[int, bytes]) -> None:
    gateway.apply(deny(rule(source=source)))
    assert ask(gateway) == expected


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ({"key": "request.headers[x-tier]", "values": ["gold"]}, DENIED),
        ({"key": "request.headers[X-Tier]", "values": ["g*"]}, DENIED),
        ({"key": "request.headers[x-tier]", "values": ["*"]}, DENIED),
        ({"key": "request.headers[x-tier]", "values": ["silver"]}, ALLOWED),
        ({"key": "request.headers[x-tier]", "notValues": ["gold"]}, ALLOWED),
        ({"key": "request.headers[x-other]", "notValues": ["gold"]}, DENIED),
        ({"key": "source.ip", "values": ["127.0.0.0/8"]}, DENIED),
        ({"key": "remote.ip", "values": ["127.0.0.1"]}, DENIED),
        ({"key": "destination.port", "values": ["80"]}, DENIED),
        ({"key": "destination.ip", "values": ["10.0.0.0/8"]}, ALLOWED),
        ({"key": "connection.sni", "values": ["*"]}, ALLOWED),
    ],
)
def test_conditions(gateway: Gateway, when: dict[str, Any], expected: tuple[int, bytes]) -> None:
    gateway.apply(deny(rule(when=when)))
    assert ask(gateway, headers={"x-tier": "gold"}) == expected


def test_tokens(gateway: Gateway) -> None:
    """The rules that need a token: who made it, for whom, and what it says."""
    issuer = Issuer("https://accounts.example.com")
    tokens = request_authentication({"issuer": issuer.name, "jwks": issuer.jwks})

    def send(**claims: Any) -> int:
        return ask(gateway, headers={"authorization": f"Bearer {issuer.token(**claims)}"})[0]

    gateway.apply(tokens, allow(rule(source={"requestPrincipals": [f"{issuer.name}/*"]})))
    assert (ask(gateway), send()) == (DENIED, 200)
    gateway.apply(tokens, allow(rule(source={"requestPrincipals": [f"{issuer.name}/alice"]})))
    assert (send(sub="alice"), send(sub="bob")) == (200, 403)
    gateway.apply(tokens, allow(rule(when={"key": "request.auth.audiences", "values": ["llm"]})))
    assert (send(aud="llm"), send(aud=["llm", "other"]), send(aud="other")) == (200, 200, 403)
    gateway.apply(tokens, allow(rule(when={"key": "request.auth.claims[team]", "values": ["research"]})))
    assert (send(team="research"), send(team=["a", "research"]), send(team="sales"), send()) == (
        200,
        200,
        403,
        403,
    )
    gateway.apply(tokens, allow(rule(when={"key": "request.auth.claims[realm][roles]", "values": ["llm"]})))
    assert (send(realm={"roles": ["llm"]}), send(realm={"roles": []})) == (200, 403)


def test_the_example_by_token(gateway: Gateway) -> None:
    issuer = Issuer("https://accounts.example.com")
    folder = EXAMPLES / "authorization-by-token"
    tokens, policy = (file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.yaml")))
    key_set = f"{issuer.name}/.well-known/jwks.json"
    gateway.apply(tokens.replace(f"jwksUri: {key_set}", f"jwks: '{issuer.jwks}'"), policy)

    def send(path: str = "/", method: str = "POST", audience: str = "llm-gateway", **claims: Any) -> int:
        token = issuer.token(aud=audience, **claims)
        body: dict[str, Any] = {"body": None} if method == "GET" else {}
        headers = {"authorization": f"Bearer {token}"}
        return ask(gateway, path=path, method=method, headers=headers, **body)[0]

    assert ask(gateway) == DENIED
    assert (send(groups=["research"]), send(CHAT, groups=["research"])) == (200, 200)
    assert (send(groups=["sales"]), send("/v1/embeddings", groups=["research"])) == (403, 403)
    assert send("/v1/models", "GET") == 200
    assert ask(gateway, path="/v1/models", method="GET", body=None) == DENIED


# Ways around


@pytest.mark.parametrize(
    "host",
    ["test.com", "test.com:80", "test.com:99999", "TEST.com", "test.com.", "test.com.:80", "Test.Com.:1"],
)
def test_no_way_of_writing_the_host_gets_around_a_policy(gateway: Gateway, host: str) -> None:
    gateway.apply(deny(rule(operation={"hosts": [HOST]})))
    assert ask(gateway, host) == DENIED


@pytest.mark.parametrize(
    "path",
    [
        "/v1/./chat/completions",
        "/v1/other/../chat/completions",
        "/other/%2e%2e/v1/chat/completions",
        "/v1/%63hat/completions",
        "\\v1\\chat\\completions",
    ],
)
def test_no_dot_or_code_in_the_path_gets_around_a_policy(gateway: Gateway, path: str) -> None:
    gateway.apply(deny(rule(operation={"paths": [CHAT]})))
    status, _ = ask(gateway, path=path)
    assert status in {400, 403}


@pytest.mark.parametrize(
    "path",
    ["//v1/chat/completions", "/v1//chat/completions", "/V1/chat/completions", "/v1/chat%2fcompletions"],
)
def test_what_is_no_allowed_path_is_denied(gateway: Gateway, path: str) -> None:
    """Whoever writes ALLOW need not think of them all."""
    gateway.apply(allow(rule(operation={"paths": [CHAT]})))
    assert ask(gateway, path=path) == DENIED


@pytest.mark.parametrize("claimed", ["10.1.2.3", "10.1.2.3, 10.1.2.4", "127.0.0.1, 10.1.2.3"])
def test_nobody_can_claim_another_address(gateway: Gateway, claimed: str) -> None:
    """Without trusted proxies (numTrustedProxies: 0), X-Forwarded-For says nothing."""
    headers = {"x-forwarded-for": claimed, "x-envoy-external-address": "10.1.2.3", "x-real-ip": "10.1.2.3"}
    gateway.apply(deny(rule(source={"remoteIpBlocks": ["127.0.0.1"]})))
    assert ask(gateway, headers=headers) == DENIED
    gateway.apply(deny(rule(source={"ipBlocks": ["127.0.0.1"]})))
    assert ask(gateway, headers=headers) == DENIED
    gateway.apply(allow(rule(source={"remoteIpBlocks": ["10.0.0.0/8"]})))
    assert ask(gateway, headers=headers) == DENIED


# Change


@pytest.mark.needs(Feature.FILTER_CHAIN)
def test_a_change_holds_for_the_next_request_of_a_connection_that_is_open(gateway: Gateway) -> None:
    gateway.apply()
    connection = http.client.HTTPConnection(gateway.address, 80, timeout=30)

    def status() -> int:
        headers = {"host": HOST, "content-type": "application/json"}
        connection.request("POST", CHAT, MESSAGES, headers)
        response = connection.getresponse()
        response.read()
        return response.status

    try:
        assert status() == 200
        gateway.apply(deny({}))
        assert status() == 403
        gateway.apply(deny(rule(operation={"methods": ["GET"]})))
        assert status() == 200
    finally:
        connection.close()


def test_an_invalid_change_leaves_the_policy_in_force(gateway: Gateway) -> None:
    gateway.apply(deny(rule(source={"ipBlocks": ["127.0.0.1"]})))
    assert ask(gateway) == DENIED
    gateway.apply(deny(rule(source={"ipBlocks": ["127.0.0.1/99"]})))
    assert ask(gateway) == DENIED
    gateway.apply(deny(rule(source={"ipBlocks": ["127.0.0.2"]})))
    assert ask(gateway) == ALLOWED


def test_a_gateway_that_starts_serves_nothing_before_it_has_its_policies(gateway: Gateway) -> None:
    """Listeners wait for their policies: of many requests during the start, none gets through."""
    gateway.apply(deny({}))
    address = own_address()
    statuses: set[int] = set()
    stop = threading.Event()

    def ask_on_and_on() -> None:
        client = GatewayClient(address)
        while not stop.is_set():
            try:
                statuses.add(client.request(HOST, path=CHAT).status)
            except OSError:  # it does not listen yet
                stop.wait(0.002)

    thread = threading.Thread(target=ask_on_and_on)
    thread.start()
    try:
        gateway.lab.mesh.start_gateway("second", bind_address=address)
        while not statuses:
            stop.wait(0.01)
    finally:
        stop.set()
        thread.join()
    assert statuses == {403}
