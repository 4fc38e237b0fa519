"""What a client may try to get around a policy, all of it in vain: the same request in other words."""

import base64
import hashlib
import hmac
import json
import socket
from collections.abc import Iterator, Mapping, Sequence

import h2.config
import h2.connection
import h2.events
import pytest

from tests.envoy.conftest import DASHSCOPE, Lab
from tests.envoy.gateway import Gateway
from tests.support.client import MESSAGES, Answer
from tests.support.objects import backends, route, secret
from tests.support.policies import (
    HOST,
    ROOT,
    api_key_authentication,
    authorization_policy,
    request_authentication,
)
from tests.support.tokens import Issuer

ALICE, BOB = "sk-of-alice-0123456789", "sk-of-bob-0123456789"
CLIENTS = secret(f"{ROOT}/clients", {"alice": ALICE, "bob": BOB})
ISSUER = Issuer("https://issuer.example.com")
EVERY_HOST = route("every", "*", {"backendRefs": backends(DASHSCOPE)}, gateways=[f"{ROOT}/ingress-gw"])
DENIED = (403, b"RBAC: access denied")


@pytest.fixture
def gateway(gateway_lab: Lab) -> Gateway:
    return Gateway(gateway_lab)


def deny(*, when: object = None, **operation: object) -> str:
    rule = {"to": [{"operation": operation}]} if operation else {"when": [when]}
    return authorization_policy(rule, action="DENY", name=f"{ROOT}/deny")


def send(gateway: Gateway, *headers: str, line: str = "POST / HTTP/1.1", host: str | None = HOST) -> Answer:
    """Send a request line and headers as they are, with a body that asks an LLM."""
    lines = [line, *([] if host is None else [f"host: {host}"]), *headers]
    lines += ["content-type: application/json", f"content-length: {len(MESSAGES)}", "connection: close"]
    return gateway.client.raw("\r\n".join((*lines, "", "")).encode() + MESSAGES)


def send_http_2(gateway: Gateway, **headers: str) -> tuple[int | None, bytes]:
    """Send a request over HTTP/2; `headers` are pseudo-headers (`authority`) and `host`, as they are.

    Return status and body, None for a stream or connection that Envoy breaks off.
    """
    sent = {"method": "POST", "scheme": "http", "path": "/", **headers}
    block = [(f":{name}" if name != "host" else name, value) for name, value in sent.items()]
    block.sort(key=lambda header: not header[0].startswith(":"))
    config = h2.config.H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
    peer = h2.connection.H2Connection(config)
    peer.initiate_connection()
    peer.send_headers(1, [*block, ("content-type", "application/json")])
    peer.send_data(1, MESSAGES, end_stream=True)
    status, body = None, b""
    with socket.create_connection((gateway.address, 80), 10) as connection:
        connection.sendall(peer.data_to_send())
        while data := connection.recv(65536):
            for event in peer.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    status = int(dict(event.headers)[b":status"])
                elif isinstance(event, h2.events.DataReceived):
                    body += event.data
                elif isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset)):
                    return status, body
    return status, body


# The host


@pytest.mark.parametrize(
    ("line", "host"),
    [
        ("POST http://test.com/ HTTP/1.1", "other.com"),
        ("POST http://TEST.com.:80/ HTTP/1.1", "other.com"),
        ("POST http://somebody@test.com/ HTTP/1.1", "other.com"),
        ("POST / HTTP/1.1", "\ttest.com  "),
    ],
)
def test_the_host_of_a_request_is_the_one_that_counts_for_its_route(
    gateway: Gateway, line: str, host: str
) -> None:
    """What a request line in absolute form names wins over Host, for policies and routes alike."""
    gateway.apply(EVERY_HOST, deny(hosts=[HOST]))
    answer = send(gateway, line=line, host=host)
    assert (answer.status, answer.body) == DENIED


@pytest.mark.parametrize(
    "headers",
    [
        {"authority": "test.com"},
        {"authority": "TEST.com.:80"},
        {"authority": "test.com", "host": "other.com"},
        {"host": "test.com"},
        {"authority": "test.com", "path": "//x/../"},
        {"authority": "test.com", "scheme": "https"},
    ],
)
def test_the_host_in_http_2(gateway: Gateway, headers: Mapping[str, str]) -> None:
    gateway.apply(EVERY_HOST, deny(hosts=[HOST]))
    assert send_http_2(gateway, **headers) == DENIED


@pytest.mark.parametrize(
    "headers",
    [
        {"authority": "", "host": "test.com"},
        {"authority": "somebody@test.com"},
        {"authority": "test.com", "path": "http://test.com/"},
        {"authority": "test.com", "path": "*"},
        {"authority": "test.com", "method": "CONNECT", "protocol": "websocket"},
    ],
)
def test_what_is_no_request_in_http_2_is_broken_off(gateway: Gateway, headers: Mapping[str, str]) -> None:
    gateway.apply(EVERY_HOST, deny(hosts=[HOST]))
    assert send_http_2(gateway, **headers)[0] is None


@pytest.mark.parametrize(
    "host",
    [
        "test.com,other.com",
        "test.com:80:80",
        "test.com:",
        "test.com..",
        "te%73t.com",
        "a@test.com",
        "[test.com]",
    ],
)
def test_what_is_not_quite_the_host_has_not_its_routes(gateway: Gateway, host: str) -> None:
    gateway.apply(deny(hosts=[HOST]))
    assert send(gateway, host=host).error["code"] == "route_not_found"


@pytest.mark.parametrize(
    ("host", "headers"),
    [
        (HOST, ["host: other.com"]),
        ("other.com", [f"host: {HOST}"]),
        ("other.com", [f"x-forwarded-host: {HOST}", f"x-host: {HOST}", f"x-envoy-original-host: {HOST}"]),
    ],
)
def test_a_second_host_leads_nowhere(gateway: Gateway, host: str, headers: Sequence[str]) -> None:
    gateway.apply(deny(hosts=[HOST]))
    assert send(gateway, *headers, host=host).error["code"] == "route_not_found"


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("other.com", [f":authority: {HOST}"], 400),
        ("other.com\r\n test.com", [], 400),
        ("test.com/x", [], 400),
        (None, [], 400),
        (HOST, ["transfer-encoding: chunked"], 400),
        (HOST, [f"x-long: {'a' * 70_000}"], 431),
        (HOST, [f"x-{number}: 1" for number in range(150)], 431),
    ],
)
def test_what_is_no_request_is_refused(
    gateway: Gateway, host: str | None, headers: Sequence[str], status: int
) -> None:
    gateway.apply(EVERY_HOST)
    assert send(gateway, *headers, host=host).status == status
    assert gateway.lab.all_seen() == ()


# The method


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "TRACE"])
def test_a_header_changes_no_method(gateway: Gateway, method: str) -> None:
    """An LLM is asked by POST, whatever a header says that some servers take for the method."""
    gateway.apply(deny(methods=["POST"]))
    override = [f"{name}: POST" for name in ("x-http-method-override", "x-http-method", "x-method-override")]
    assert send(gateway, *override, line=f"{method} / HTTP/1.1").error["code"] == "method_not_allowed"
    answer = send(gateway, "x-http-method-override: GET")
    assert (answer.status, answer.body) == DENIED


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
def test_an_upgrade_gets_around_nothing(gateway: Gateway, upgrade: str) -> None:
    gateway.apply(deny(hosts=[HOST]))
    assert send(gateway, f"upgrade: {upgrade}", "connection: upgrade").status in {403, 405}
    assert gateway.client.raw(b"CONNECT test.com:80 HTTP/1.1\r\nhost: test.com\r\n\r\n").status in {403, 405}
    assert gateway.lab.all_seen() == ()


# Who the client is


@pytest.mark.parametrize(
    "headers",
    [
        [f"x-api-key: {BOB}", "x-llm-client: alice"],
        [f"x-api-key: {BOB}", "X-LLM-Client: alice", "connection: x-llm-client"],
        [f"x-api-key: {BOB}", f"x-api-key: {ALICE}"],
        [f"x-api-key: {BOB}", f"authorization: Bearer {ALICE}"],
    ],
)
def test_nobody_is_another_client(gateway: Gateway, headers: Sequence[str]) -> None:
    is_bob = {"key": "request.headers[x-llm-client]", "values": ["bob"]}
    gateway.apply(CLIENTS, api_key_authentication("clients"), deny(when=is_bob))
    assert send(gateway, f"x-api-key: {ALICE}").status == 200
    answer = send(gateway, *headers)
    assert (answer.status, answer.body) == DENIED


@pytest.mark.parametrize(
    "header",
    [
        f"x-api-key: {ALICE.upper()}",
        f"x-api-key: {ALICE[:-1]}",
        f"x-api-key: {ALICE},{ALICE}",
        f"authorization: Basic {ALICE}",
        f"authorization: Bearer {ALICE}, Bearer {ALICE}",
        "authorization: Bearer ",
        f"x_api_key: {ALICE}",
        f"cookie: x-api-key={ALICE}",
        "x-llm-client: alice",
    ],
)
def test_a_key_is_one_to_the_letter(gateway: Gateway, header: str) -> None:
    gateway.apply(CLIENTS, api_key_authentication("clients"))
    assert send(gateway, header).error["code"] == "invalid_api_key"


# Tokens


def encode(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def forged() -> Iterator[str]:
    claims = {"iss": ISSUER.name, "sub": "alice", "exp": 4102444800}
    yield f"{encode({'alg': 'none'})}.{encode(claims)}."
    yield f"{encode({'alg': 'None'})}.{encode(claims)}.AAAA"
    # Signed with what everybody knows, the public key, as if it were a secret.
    text = f"{encode({'alg': 'HS256'})}.{encode(claims)}"
    for known in (ISSUER.jwks.encode(), json.loads(ISSUER.jwks)["keys"][0]["n"].encode(), b""):
        signature = hmac.new(known, text.encode(), hashlib.sha256).digest()
        yield f"{text}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
    yield f"{ISSUER.token(sub='mallory').rpartition('.')[0]}.{ISSUER.token(sub='alice').rpartition('.')[2]}"


@pytest.mark.parametrize("token", list(forged()), ids=lambda token: f"{len(token)} letters")
def test_a_forged_token_is_refused(gateway: Gateway, token: str) -> None:
    gateway.apply(request_authentication({"issuer": ISSUER.name, "jwks": ISSUER.jwks}))
    assert gateway.ask(token=token).error["code"] == "invalid_token"


def test_of_two_tokens_none_may_be_bad(gateway: Gateway) -> None:
    gateway.apply(request_authentication({"issuer": ISSUER.name, "jwks": ISSUER.jwks}))
    good, bad = ISSUER.token(sub="alice"), ISSUER.token(sub="alice", exp=1)
    assert gateway.ask(token=good, path=f"/?access_token={good}").status == 200
    assert gateway.ask(token=good, path=f"/?access_token={bad}").status == 401
    assert gateway.ask(token=bad, path=f"/?access_token={good}").status == 401
    both = (f"authorization: Bearer {bad}", f"authorization: Bearer {good}")
    assert {send(gateway, *of).status for of in (both, both[::-1])} == {401}


def test_headers_of_claims_are_those_of_a_good_token_alone(gateway: Gateway) -> None:
    tokens = request_authentication(
        {
            "issuer": ISSUER.name,
            "jwks": ISSUER.jwks,
            "outputClaimToHeaders": [{"header": "x-subject", "claim": "sub"}],
        }
    )
    is_admin = {"when": [{"key": "request.headers[x-subject]", "values": ["admin"]}]}
    gateway.apply(tokens, authorization_policy(is_admin))
    preflight = ("origin: https://a.example.com", "access-control-request-method: POST")
    mallory = f"authorization: Bearer {ISSUER.token(sub='mallory')}"
    nobody = f"authorization: Bearer {ISSUER.sign({'iss': ISSUER.name, 'exp': 4102444800})}"
    for headers in ((), (mallory,), (nobody,), preflight):
        line = f"{'OPTIONS' if headers == preflight else 'POST'} / HTTP/1.1"
        answer = send(gateway, "x-subject: admin", "X-Subject: admin", *headers, line=line)
        assert (answer.status, answer.body) == DENIED
    assert gateway.ask(token=ISSUER.token(sub="admin")).status == 200
