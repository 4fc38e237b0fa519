"""Configuration for people has no secret in it, wherever in a resource it is."""

import json

import pytest

from llmplane.dump import to_yaml
from xds import protos
from xds.resources import Resource

KEY = "sk-of-a-client"


def test_keys_of_clients_are_redacted_within_a_chain_of_filters() -> None:
    keys = protos.ApiKeyAuth(credentials=[{"key": KEY, "client": "alice"}])
    chain = protos.FilterChainConfig(
        default_filter_chain={"filters": [{"name": "keys", "typed_config": protos.pack(keys)}]}
    )
    for config in (keys, chain):
        text = to_yaml([Resource.of(protos.TypedExtensionConfig(name="a", typed_config=protos.pack(config)))])
        assert KEY not in text
        assert "client: alice" in text
        assert "key: '[redacted]'" in text


@pytest.mark.parametrize(
    ("key", "is_secret"),
    [
        ({"kty": "oct", "k": "c2s"}, True),
        ({"kty": "RSA", "n": "bg", "d": "ZA"}, True),
        ({"kty": "RSA", "n": "bg"}, False),
    ],
)
def test_a_key_set_is_shown_if_it_can_only_verify(key: dict[str, str], is_secret: bool) -> None:
    provider = {"issuer": "alice", "local_jwks": {"inline_string": json.dumps({"keys": [key]})}}
    tokens = protos.pack(protos.JwtAuthentication(providers={"a": provider}))
    text = to_yaml([Resource.of(protos.TypedExtensionConfig(name="a", typed_config=tokens))])
    assert "issuer: alice" in text
    assert ("kty" not in text) == is_secret


def test_headers_of_envoys_own_calls_are_redacted_and_those_of_requests_are_not() -> None:
    uri = {"uri": "http://a/", "cluster": "a", "timeout": {"seconds": 1}}
    header = {"key": "x-team", "value": KEY}
    collector = protos.OpenTelemetryAccessLog(
        http_service={"http_uri": uri, "request_headers_to_add": [{"header": header}]}
    )
    service = {"server_uri": uri, "authorization_request": {"headers_to_add": [header]}}
    for config in (collector, protos.ExtAuthz(http_service=service)):
        text = to_yaml([Resource.of(protos.TypedExtensionConfig(name="a", typed_config=protos.pack(config)))])
        assert KEY not in text
        assert "key: x-team\n" in text
        assert "value: '[redacted]'" in text
    routes = protos.RouteConfiguration(
        name="a", request_headers_to_add=[{"header": {"key": "a", "value": "b"}}]
    )
    assert "value: b" in to_yaml([Resource.of(routes)])
