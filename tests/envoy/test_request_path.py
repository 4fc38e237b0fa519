"""What an application sends, and what the provider gets: the request path through the control plane."""

import hashlib
import json
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from llmplane.certificates import CertificateAuthority
from llmplane.fakellm import FakeLLM, Fault, Host, fingerprint, running_in_thread
from tests.envoy.conftest import DASHSCOPE, KEYLESS, KEYS, MOONSHOT, OPENAI, Lab
from tests.support.client import MESSAGES
from tests.support.objects import provider, secret
from tests.support.stream import running_piecewise_server

DASHSCOPE_PROVIDER = provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], model="qwen-turbo")
STRANGER = "stranger.example.com"
"""A host of which the fake LLM has no certificate: what it shows is for another name."""


def test_the_default_model_path_host_and_key_are_filled_in(lab: Lab) -> None:
    lab.apply(DASHSCOPE_PROVIDER)
    answer = lab.client.request(DASHSCOPE)
    assert answer.status == 200, answer.body
    seen = lab.seen()
    assert (seen.host, seen.sni, seen.path, seen.model) == (
        DASHSCOPE,
        DASHSCOPE,
        "/v1/chat/completions",
        "qwen-turbo",
    )
    assert seen.key_fingerprint == fingerprint(KEYS[DASHSCOPE])


@pytest.mark.parametrize(
    "host",
    [
        DASHSCOPE,
        f"{DASHSCOPE}:80",
        f"{DASHSCOPE}:443",
        DASHSCOPE.upper(),
        f"{DASHSCOPE}.",
        f"{DASHSCOPE}.:8080",
    ],
)
def test_a_host_may_be_written_in_several_ways(lab: Lab, host: str) -> None:
    lab.apply(DASHSCOPE_PROVIDER)
    assert lab.client.request(host).status == 200
    assert lab.seen().host == DASHSCOPE


def test_an_unknown_host_is_404(lab: Lab) -> None:
    lab.apply(DASHSCOPE_PROVIDER)
    answer = lab.client.request("unknown.example.com")
    assert answer.status == 404
    assert answer.error["code"] == "route_not_found"
    assert "unknown.example.com" in answer.error["message"]


# Headers


CLIENT_HEADERS = {
    # what a provider is to see
    "User-Agent": "an-sdk/1.0",
    "Accept": "text/event-stream",
    "OpenAI-Organization": "org-1",
    "X-Custom": "custom",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    # credentials
    "Authorization": "Bearer of-the-client",
    "X-Api-Key": "of-the-client",
    "Api-Key": "of-the-client",
    "X-Goog-Api-Key": "of-the-client",
    "Proxy-Authorization": "Basic b2YtdGhlLWNsaWVudA==",
    "Cookie": "session=of-the-client",
    # who and where the client is
    "X-Forwarded-For": "10.0.0.1",
    "X-Forwarded-Host": "inner.example.com",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Client-Cert": "By=spiffe://cluster.local/ns/default/sa/sleep",
    "Forwarded": "for=10.0.0.1",
    "Via": "1.1 inner",
    "X-Request-Id": "0af76519-16cd-43dd-8448-eb211c80319c",
    "X-Envoy-Peer-Metadata": "labels",
    # hop by hop
    "Connection": "keep-alive, X-Hop",
    "X-Hop": "hop",
    "Keep-Alive": "timeout=5",
    "Proxy-Connection": "keep-alive",
    "TE": "trailers",
    "Trailer": "X-Checksum",
    # about the body and the answer, which the proxy reads
    "Accept-Encoding": "gzip, br",
    "Content-Type": "application/x-www-form-urlencoded",  # what `curl --data` says
    "Expect": "100-continue",
}


def test_these_headers_leave_and_no_others(lab: Lab) -> None:
    lab.apply(provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], model=None))
    assert (
        lab.client.request(DASHSCOPE, MESSAGES, CLIENT_HEADERS).status == 400
    )  # no model: the provider's answer
    assert dict(lab.seen().headers) == {
        "host": DASHSCOPE,
        "content-length": str(len(MESSAGES)),
        "content-type": "application/json",
        "authorization": f"Bearer sha256:{fingerprint(KEYS[DASHSCOPE])}",
        "user-agent": "an-sdk/1.0",
        "accept": "text/event-stream",
        "openai-organization": "org-1",
        "x-custom": "custom",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }


def test_the_client_gets_no_headers_of_envoy(lab: Lab) -> None:
    lab.apply(DASHSCOPE_PROVIDER)
    headers = lab.client.request(DASHSCOPE).headers
    assert not [name for name in headers if name.startswith("x-envoy-")]
    assert "aiohttp" in headers["server"], "the provider's own server header"


def test_a_client_cannot_ask_for_retries(lab: Lab) -> None:
    lab.apply(DASHSCOPE_PROVIDER)
    lab.fake.set_fault(DASHSCOPE, Fault(status=503))
    hints = {
        "x-envoy-retry-on": "5xx",
        "x-envoy-max-retries": "3",
        "x-envoy-hedge-on-per-try-timeout": "true",
    }
    assert lab.client.request(DASHSCOPE, headers=hints).status == 503
    assert len(lab.all_seen()) == 1


def test_a_client_cannot_set_timeouts(lab: Lab) -> None:
    lab.apply(DASHSCOPE_PROVIDER)
    lab.fake.set_fault(DASHSCOPE, Fault(delay=0.2))
    hints = {"x-envoy-upstream-rq-timeout-ms": "1", "x-envoy-upstream-rq-per-try-timeout-ms": "1"}
    assert lab.client.request(DASHSCOPE, headers=hints).status == 200


# Bodies


def test_a_10_mb_body_arrives_as_it_was_but_for_the_members(lab: Lab) -> None:
    lab.apply(DASHSCOPE_PROVIDER)
    body = b'{"messages": [{"role": "user", "content": "%b"}]}' % (
        b"0123456789 \\u4f60\xe5\xa5\xbd " * 480_000
    )
    assert len(body) > 10_000_000
    assert lab.client.request(DASHSCOPE, body).status == 200
    expected = b'{"model":"qwen-turbo",' + body[1:]
    assert lab.seen().sha256 == hashlib.sha256(expected).hexdigest()


def merged(lab: Lab, body: dict[str, Any]) -> Any:
    assert lab.client.request(DASHSCOPE, json.dumps(body).encode()).status < 500
    return json.loads(lab.seen().body)


def test_overrides_and_model_beat_the_client_who_beats_stream_and_defaults(lab: Lab) -> None:
    config = {
        "apiKey": KEYS[DASHSCOPE],
        "model": "qwen-turbo",
        "stream": False,
        "defaults": {"temperature": 0.3, "top_p": 0.9, "stop": ["END"], "seed": 12345678901234567890},
        "overrides": {"user": "mesh", "metadata": {"team": "a"}, "max_tokens": 100},
    }
    lab.apply(provider("dashscope", DASHSCOPE, configs={"defaultConfig": {"openAIConfig": config}}))
    messages = {"messages": [{"role": "user", "content": "Hi"}]}

    assert merged(lab, messages) == {
        **messages,
        "model": "qwen-turbo",
        "stream": False,
        "temperature": 0.3,
        "top_p": 0.9,
        "stop": ["END"],
        "seed": 12345678901234567890,
        "user": "mesh",
        "metadata": {"team": "a"},
        "max_tokens": 100,
    }
    client = {
        **messages,
        "model": "gpt-4",
        "stream": True,
        "temperature": 1,
        "top_p": None,  # an explicit null is the client's wish
        "user": "me",
        "metadata": {"team": "b", "more": 1},
        "max_tokens": 9999,
    }
    assert merged(lab, client) == {
        **messages,
        "model": "qwen-turbo",
        "stream": True,
        "stream_options": {"include_usage": True},  # so that its tokens are counted
        "temperature": 1,
        "top_p": None,
        "stop": ["END"],
        "seed": 12345678901234567890,
        "user": "mesh",
        "metadata": {"team": "a"},
        "max_tokens": 100,
    }


def test_without_a_model_of_the_provider_the_clients_stays(lab: Lab) -> None:
    lab.apply(provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], model=None))
    assert lab.client.request(DASHSCOPE, b'{"model": "qwen-max", "messages": [1]}').status == 200
    assert lab.seen().model == "qwen-max"


# Operations


@pytest.mark.parametrize(
    "path", ["/", "/chat/completions", "/v1/chat/completions?timeout=5", "/any/v9/chat/completions"]
)
def test_the_providers_own_operation(lab: Lab, path: str) -> None:
    lab.apply(
        provider(
            "dashscope", DASHSCOPE, KEYS[DASHSCOPE], path="/compatible-mode/v1/chat/completions?version=2"
        )
    )
    assert lab.client.request(DASHSCOPE, path=path).status == 200
    assert lab.seen().path == "/compatible-mode/v1/chat/completions?version=2"


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        ("/completions", {"prompt": "Hi"}),
        ("/embeddings", {"input": "Hi"}),
        ("/responses", {"input": "Hi"}),
    ],
)
def test_other_operations_keep_the_clients_model(lab: Lab, operation: str, body: dict[str, str]) -> None:
    lab.apply(provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], path="/compatible-mode/v1/chat/completions"))
    sent = json.dumps({"model": "the-clients", **body}).encode()
    assert lab.client.request(DASHSCOPE, sent, path=f"/v1{operation}").status == 200
    seen = lab.seen()
    assert (seen.path, seen.body) == (f"/compatible-mode/v1{operation}", sent)


def test_the_list_of_models(lab: Lab) -> None:
    lab.apply(DASHSCOPE_PROVIDER)
    answer = lab.client.request(DASHSCOPE, None, method="GET", path="/v1/models?limit=5")
    assert [model["id"] for model in answer.json()["data"]] == [f"model-of-{DASHSCOPE}"]
    seen = lab.seen()
    assert (seen.path, seen.key_fingerprint) == ("/v1/models?limit=5", fingerprint(KEYS[DASHSCOPE]))


def test_further_operations_of_a_provider(lab: Lab) -> None:
    operations = [
        {"path": "/embeddings", "model": "text-embedding-v3"},
        {"path": "/images/generations"},
        {"path": "/files", "method": "GET"},
    ]
    lab.apply(provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], operations=operations))
    lab.client.request(DASHSCOPE, b'{"input": "Hi", "model": "mine"}', path="/v1/embeddings")
    lab.client.request(DASHSCOPE, b'{"prompt": "Hi", "model": "mine"}', path="/v1/images/generations")
    lab.client.request(DASHSCOPE, None, method="GET", path="/v1/files?purpose=batch")
    assert [(seen.path, seen.model) for seen in lab.all_seen()] == [
        ("/v1/embeddings", "text-embedding-v3"),
        ("/v1/images/generations", "mine"),
        ("/v1/files?purpose=batch", None),
    ]


# What is refused here: with an error as OpenAI's, without the key, and without a word to the provider

LINE = f"http://{DASHSCOPE}/v1/realtime HTTP/1.1\r\nHost: {DASHSCOPE}\r\n"
WEBSOCKET = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZQ==\r\n"
)


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({"body": b'{"messages": ['}, 400, "invalid_json"),
        ({"body": b"[1]"}, 400, "invalid_json"),
        ({"body": b""}, 400, "empty_body"),
        ({"headers": {"Content-Encoding": "gzip"}}, 415, "unsupported_content_encoding"),
        ({"headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 415, "unsupported_media_type"),
        ({"method": "GET", "body": None}, 405, "method_not_allowed"),
        ({"method": "PUT"}, 405, "method_not_allowed"),
        ({"method": "DELETE", "path": "/v1/models/qwen"}, 404, "unknown_url"),
        ({"method": "PUT", "path": "/v1/chat/completions"}, 405, "method_not_allowed"),
        ({"method": "POST", "path": "/v1/models"}, 405, "method_not_allowed"),
        ({"path": "/v1/files"}, 404, "unknown_url"),
        ({"path": "/v1/audio/transcriptions"}, 404, "unknown_url"),
        ({"path": "/admin"}, 404, "unknown_url"),
    ],
)
def test_other_requests_are_refused(lab: Lab, request_: dict[str, Any], status: int, code: str) -> None:
    lab.apply(DASHSCOPE_PROVIDER)
    answer = lab.client.request(DASHSCOPE, **request_)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert answer.error["type"] == "invalid_request_error"
    assert KEYS[DASHSCOPE].encode() not in answer.body
    assert lab.all_seen() == ()


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (f"CONNECT {DASHSCOPE}:443 HTTP/1.1\r\nHost: {DASHSCOPE}:443\r\n\r\n", 405, "unsupported_request"),
        (f"GET {LINE}{WEBSOCKET}\r\n", 405, "unsupported_request"),
        (f"POST {LINE}X-Long: {'x' * 70_000}\r\n\r\n", 431, "bad_request"),
        (
            f"POST {LINE.replace('/v1/realtime', '/')}Transfer-Encoding: chunked\r\n\r\nno-number\r\n",
            400,
            "bad_request",
        ),
        (f"POST http://{DASHSCOPE}/ HTTP/1.0\r\n\r\n", 426, "bad_request"),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\x03\x03\r\n\r\n", 400, "bad_request"),  # TLS
    ],
    ids=["CONNECT", "websocket", "headers", "framing", "HTTP/1.0", "TLS"],
)
def test_what_is_no_plain_http_request_is_refused(lab: Lab, data: str, status: int, code: str) -> None:
    lab.apply(DASHSCOPE_PROVIDER)
    answer = lab.client.raw(data.encode("latin-1"))
    assert (answer.status, answer.error["code"]) == (status, code)
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["message"]
    assert lab.all_seen() == ()


@pytest.mark.parametrize("framing", ["content-length", "chunked"])
def test_a_body_of_34_mb_is_too_large(lab: Lab, framing: str) -> None:
    lab.apply(DASHSCOPE_PROVIDER)
    body = b'{"messages": "%b"}' % (b"x" * 34_000_000)
    head = b"POST http://%b/ HTTP/1.1\r\nHost: %b\r\n" % (DASHSCOPE.encode(), DASHSCOPE.encode())
    if framing == "chunked":
        data = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        data = head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    answer = lab.client.raw(data)
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert lab.all_seen() == ()


# Answers


@pytest.mark.parametrize(
    ("status", "retry_after"), [(400, None), (404, None), (429, 7), (500, None), (503, 30)]
)
def test_an_error_of_the_provider_passes_as_it_is(lab: Lab, status: int, retry_after: int | None) -> None:
    lab.apply(DASHSCOPE_PROVIDER)
    lab.fake.set_fault(DASHSCOPE, Fault(status=status, retry_after=retry_after))
    answer = lab.client.request(DASHSCOPE)
    assert answer.status == status
    assert answer.error["message"] == f"A fault that was asked for: {status}.", "the provider's own body"
    assert answer.headers.get("retry-after") == (str(retry_after) if retry_after else None)
    assert len(lab.all_seen()) == 1, "a request is never sent twice unless that is asked for"


def test_a_connection_reset_by_the_provider_is_a_503(lab: Lab) -> None:
    lab.apply(DASHSCOPE_PROVIDER)
    lab.fake.set_fault(DASHSCOPE, Fault(reset=True))
    answer = lab.client.request(DASHSCOPE)
    assert (answer.status, answer.error["code"]) == (503, "provider_unreachable")
    assert len(lab.all_seen()) == 1, "the provider may have done its work"


def test_each_piece_of_a_stream_passes_at_once(lab: Lab) -> None:
    with running_piecewise_server() as server:
        plaintext: dict[str, Any] = {
            "tls": {"mode": "DISABLE"},
            "endpoints": [{"address": "127.0.0.1", "port": server.port}],
        }
        lab.apply(provider("piecewise", "piecewise.example.com", **plaintext))
        server.send(b"data: 0\n\n")
        with lab.client.open("piecewise.example.com") as response:
            for number in range(3):
                assert response.read1() == b"data: %d\n\n" % number
                server.send(b"data: %d\n\n" % (number + 1))
            server.end()
            assert response.read() == b"data: 3\n\n"


def test_a_stream_arrives_whole(lab: Lab) -> None:
    lab.apply(DASHSCOPE_PROVIDER)
    answer = lab.client.request(DASHSCOPE, b'{"messages": [1], "stream": true}')
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.body.startswith(b"data: {")
    assert answer.body.endswith(b"data: [DONE]\n\n")


# Where the provider is, and how it is made sure that it is the provider


def endpoint(fake: FakeLLM) -> dict[str, Any]:
    return {"address": "127.0.0.1", "port": fake.port}


@pytest.fixture
def other() -> Iterator[FakeLLM]:
    """Run a second fake LLM, under a CA that nobody trusts."""
    with running_in_thread(
        FakeLLM({DASHSCOPE: Host(KEYS[DASHSCOPE])}, ca=CertificateAuthority.create())
    ) as fake:
        yield fake


@pytest.fixture
def plaintext() -> Iterator[FakeLLM]:
    """Run a fake LLM without TLS and without a key."""
    with running_in_thread(FakeLLM({KEYLESS: Host()})) as fake:
        yield fake


def assert_unreachable(lab: Lab, host: str) -> None:
    answer = lab.client.request(host)
    assert (answer.status, answer.error["code"]) == (503, "provider_unreachable")
    assert KEYS[DASHSCOPE].encode() not in answer.body


def test_a_certificate_of_another_name_is_refused(lab: Lab) -> None:
    lab.apply(provider("stranger", STRANGER, KEYS[DASHSCOPE], endpoints=[endpoint(lab.fake)]))
    assert_unreachable(lab, STRANGER)
    assert lab.all_seen() == ()


def test_a_certificate_of_an_unknown_ca_is_refused(lab: Lab, other: FakeLLM) -> None:
    lab.apply(provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], endpoints=[endpoint(other)]))
    assert_unreachable(lab, DASHSCOPE)
    assert other.seen == ()


def test_a_ca_of_ones_own(lab: Lab, other: FakeLLM) -> None:
    file = lab.mesh.directory / "other-ca.pem"
    assert other._ca
    file.write_bytes(other._ca.pem)
    tls = {"caCertificates": str(file)}
    lab.apply(
        provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], endpoints=[endpoint(other)], tls=tls),
        provider("moonshot", MOONSHOT, KEYS[MOONSHOT], tls=tls),
    )
    assert lab.client.request(DASHSCOPE).status == 200
    assert_unreachable(lab, MOONSHOT)  # its certificate is of the CA that others trust
    assert (len(other.seen), lab.all_seen()) == (1, ())


def test_verification_can_be_given_up(lab: Lab, other: FakeLLM) -> None:
    tls = {"insecureSkipVerify": True}
    lab.apply(
        provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], endpoints=[endpoint(other)], tls=tls),
        provider("stranger", STRANGER, endpoints=[endpoint(lab.fake)], tls=tls),
    )
    assert lab.client.request(DASHSCOPE).status == 200
    assert lab.client.request(STRANGER).status == 421, "it was reached, and plays no host of this name"


def test_another_server_name(lab: Lab) -> None:
    """`tls.sni` is asked for and verified; the Host header stays the provider's."""
    lab.apply(provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], tls={"sni": MOONSHOT}))
    assert lab.client.request(DASHSCOPE).status == 200
    seen = lab.seen()
    assert (seen.sni, seen.host) == (MOONSHOT, DASHSCOPE)
    lab.apply(provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], tls={"sni": STRANGER}))
    assert_unreachable(lab, DASHSCOPE)


def test_an_ip_address_as_host(lab: Lab) -> None:
    """TLS has no server name for one: the certificate has to be for the address."""
    with running_in_thread(FakeLLM({"127.0.0.5": Host()}, ca=lab.authority)) as fake:
        lab.apply(
            provider("address", "127.0.0.5", endpoints=[endpoint(fake)]),
            provider("another", "127.0.0.6", endpoints=[endpoint(fake)]),
        )
        assert lab.client.request("127.0.0.5:80").status == 200
        (seen,) = fake.seen
        assert (seen.host, seen.sni) == ("127.0.0.5", None)
        assert_unreachable(lab, "127.0.0.6")


class AsksForACertificate(CertificateAuthority):
    """Issues for servers that let in only who shows `client`, a PEM certificate."""

    client = b""

    def server_context(self, *names: str) -> ssl.SSLContext:
        context = super().server_context(*names)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.client.decode())
        return context


def self_signed() -> tuple[bytes, bytes]:
    """Return a certificate and its key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "sleep")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    certificate = builder.not_valid_before(now).not_valid_after(now + timedelta(days=1)).sign(key, SHA256())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM), private


def test_a_certificate_of_our_own(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = self_signed()
    monkeypatch.setattr(AsksForACertificate, "client", certificate)
    asking = AsksForACertificate(lab.authority.certificate, lab.authority._key)
    with running_in_thread(FakeLLM({KEYLESS: Host()}, ca=asking)) as fake:
        tls = {"mode": "MUTUAL", "credentialName": "client-certificate"}
        keyless = provider("keyless", KEYLESS, tls=tls, endpoints=[endpoint(fake)])
        lab.apply(keyless)
        assert_unreachable(lab, KEYLESS)
        met, reason, message = lab.condition("keyless")
        assert (met, reason) == (False, "SecretNotFound")
        assert "spec.tls.credentialName: Secret default/client-certificate does not exist" in message
        lab.apply(
            keyless, secret("client-certificate", {"tls.crt": certificate.decode(), "tls.key": key.decode()})
        )
        assert lab.client.request(KEYLESS).status == 200
        assert key.decode().splitlines()[1] not in lab.envoy_admin("/config_dump")


def test_a_ca_file_that_is_not_there_costs_that_provider_only(lab: Lab) -> None:
    broken = provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], tls={"caCertificates": "/nowhere/ca.pem"})
    lab.mesh.apply("objects.yaml", f"{broken}\n---\n{provider('keyless', KEYLESS)}", settle=False)
    lab.mesh._wait("Envoy refused it", lambda: "Programmed" in json.dumps(lab.mesh.status()["objects"]))
    met, reason, message = lab.condition("dashscope", "Programmed")
    assert (met, reason) == (False, "Refused")
    assert "/nowhere/ca.pem" in message
    assert lab.client.request(KEYLESS).status == 200


def test_without_tls(lab: Lab, plaintext: FakeLLM) -> None:
    lab.apply(provider("keyless", KEYLESS, tls={"mode": "DISABLE"}, endpoints=[endpoint(plaintext)]))
    assert lab.client.request(KEYLESS).status == 200
    assert plaintext.seen[0].sni is None


def test_the_port_of_a_provider(lab: Lab, plaintext: FakeLLM) -> None:
    spec: dict[str, Any] = {
        "tls": {"mode": "DISABLE"},
        "port": plaintext.port,
        "endpoints": [{"address": "127.0.0.1"}],
    }
    lab.apply(provider("keyless", KEYLESS, **spec))
    assert lab.client.request(KEYLESS).status == 200
    assert plaintext.seen[0].host == KEYLESS, "the port is not part of it"


def test_requests_are_spread_over_endpoints(lab: Lab) -> None:
    with running_in_thread(FakeLLM({KEYLESS: Host()}, listen=[("127.0.0.1", 0)] * 2)) as fake:
        endpoints = [{"address": host, "port": port} for host, port in fake.addresses]
        lab.apply(provider("keyless", KEYLESS, tls={"mode": "DISABLE"}, endpoints=endpoints))
        for _ in range(4):
            assert lab.client.request(KEYLESS).status == 200
        clusters = lab.envoy_admin("/clusters")
    for host, port in fake.addresses:
        assert f"{host}:{port}::rq_total::2" in clusters


# Keys


def test_a_keyless_provider_gets_no_credential_at_all(lab: Lab) -> None:
    lab.apply(provider("keyless", KEYLESS))
    assert lab.client.request(KEYLESS, headers={"Authorization": "Bearer of-the-client"}).status == 200
    assert lab.seen().header("authorization") == []


def key_from_secret(name: str) -> dict[str, Any]:
    config = {"model": "m", "apiKeySecretRef": {"name": name, "key": "api-key"}}
    return {"configs": {"defaultConfig": {"openAIConfig": config}}}


def test_the_key_may_be_in_a_secret(lab: Lab) -> None:
    keys = secret(
        "keys", {"api-key": f"{KEYS[DASHSCOPE]}\n"}
    )  # as `kubectl create secret --from-file` makes it
    lab.apply(provider("dashscope", DASHSCOPE, **key_from_secret("keys")), keys)
    assert lab.client.request(DASHSCOPE).status == 200
    assert lab.seen().key_fingerprint == fingerprint(KEYS[DASHSCOPE])


def test_a_missing_secret_is_a_401_that_says_so_and_concerns_nobody_else(lab: Lab) -> None:
    lab.apply(
        provider("dashscope", DASHSCOPE, **key_from_secret("nowhere")),
        provider("moonshot", MOONSHOT, KEYS[MOONSHOT]),
    )
    answer = lab.client.request(DASHSCOPE)
    assert (answer.status, answer.error["code"]) == (401, "provider_key_missing")
    assert "Secret" in answer.error["message"]
    assert lab.all_seen() == ()
    met, reason, message = lab.condition("dashscope")
    assert (met, reason) == (False, "SecretNotFound")
    assert "Secret default/nowhere does not exist" in message
    assert lab.client.request(MOONSHOT).status == 200

    lab.apply(
        provider("dashscope", DASHSCOPE, **key_from_secret("nowhere")),
        secret("nowhere", {"api-key": KEYS[DASHSCOPE]}),
    )
    assert lab.client.request(DASHSCOPE).status == 200, "the Secret is there now"


def test_a_wrong_key_is_the_providers_own_401(lab: Lab) -> None:
    lab.apply(provider("dashscope", DASHSCOPE, "sk-wrong"))
    answer = lab.client.request(DASHSCOPE)
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")


def test_no_key_is_ever_shown(lab: Lab) -> None:
    """Neither by Envoy's admin interface nor in a log, the status or an error."""
    lab.apply(
        provider("dashscope", DASHSCOPE, "${ API_KEY of dashscope}"),
        provider("openai", OPENAI, KEYS[OPENAI], tls={"sni": STRANGER}),
        provider("moonshot", MOONSHOT, **key_from_secret("keys")),
        secret("keys", {"api-key": KEYS[MOONSHOT]}),
    )
    answers = [lab.client.request(host) for host in (DASHSCOPE, MOONSHOT, OPENAI)]
    answers.append(lab.client.request(DASHSCOPE, b"{"))
    assert [answer.status for answer in answers] == [200, 200, 503, 400]
    shown = {f"answer {number}": answer.body.decode() for number, answer in enumerate(answers)}
    shown |= {
        page: lab.envoy_admin(page) for page in ("/config_dump?include_eds", "/clusters", "/stats", "/certs")
    }
    shown |= {"status": json.dumps(lab.mesh.status())}
    shown |= {name: lab.mesh.log(name) for name in ("control-plane", "sidecar")}
    shown |= {str(file): file.read_text() for file in (lab.mesh.directory / "state").rglob("*.json")}
    assert "generic_secret" in shown["/config_dump?include_eds"], "the dump has the secrets"
    for key in KEYS.values():
        assert [place for place, text in shown.items() if key in text] == []
