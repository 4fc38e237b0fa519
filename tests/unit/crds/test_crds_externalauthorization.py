"""envoyExtAuthzHttp and envoyExtAuthzGrpc: what Istio's mesh configuration takes, and what it refuses."""

from datetime import timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from crds.externalauthorization import EnvoyExtAuthzGrpc, EnvoyExtAuthzHttp
from crds.problems import field_name
from crds.validation import findings

SERVICE = {"service": "my-ext-authz.foo.svc.cluster.local", "port": 8000}
Model = type[EnvoyExtAuthzHttp] | type[EnvoyExtAuthzGrpc]


def problems(model: Model, **fields: Any) -> list[str]:
    try:
        model.model_validate({**SERVICE, **fields})
    except ValidationError as error:
        return [f"{field_name(one.path)}: {one.message}" for one in findings(model, error)]
    return []


@pytest.mark.parametrize("model", [EnvoyExtAuthzHttp, EnvoyExtAuthzGrpc])
def test_the_defaults_are_istios(model: Model) -> None:
    made = model.model_validate(SERVICE)
    assert (made.timeout, made.fail_open, made.status_on_error) == (timedelta(seconds=600), False, None)
    assert made.include_request_body_in_check is None


@pytest.mark.parametrize("model", [EnvoyExtAuthzHttp, EnvoyExtAuthzGrpc])
@pytest.mark.parametrize(
    "fields",
    [
        {"service": "foo/my-ext-authz.foo.svc.cluster.local"},
        {"service": "my-ext-authz"},
        {"service": "127.0.0.1", "port": 65535},
        {"statusOnError": "503"},
        {"timeout": "0.5s", "failOpen": True, "clearRouteCache": True},
        {
            "includeRequestBodyInCheck": {
                "maxRequestBytes": 1,
                "allowPartialMessage": True,
                "packAsBytes": True,
            }
        },
    ],
)
def test_what_is_taken(model: Model, fields: dict[str, Any]) -> None:
    assert problems(model, **fields) == []


@pytest.mark.parametrize("model", [EnvoyExtAuthzHttp, EnvoyExtAuthzGrpc])
@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"service": ""}, "service: is empty"),
        ({"service": "http://authz.example.com"}, "service: must be"),
        ({"service": "authz.example.com:8000"}, "service: must be a host name alone, without the port"),
        ({"service": "*.example.com"}, "service: must not hold a wildcard"),
        ({"port": 0}, "port: must be at least 1"),
        ({"port": 999999}, "port: must be at most 65535"),
        ({"statusOnError": "999"}, "statusOnError: must be a status code that Envoy knows, such as '403'"),
        ({"statusOnError": "0"}, "statusOnError: must be a status code"),
        ({"statusOnError": "denied"}, "statusOnError: must be a status code"),
        ({"statusOnError": 403}, "statusOnError: must be a string, but is a number: write it in quotes"),
        ({"timeout": "0s"}, "timeout: must be at least 1ms"),
        ({"failOpen": "yes"}, "failOpen: must be true or false"),
        ({"includeRequestBodyInCheck": {}}, "includeRequestBodyInCheck.maxRequestBytes: is missing"),
        (
            {"includeRequestBodyInCheck": {"maxRequestBytes": 0}},
            "includeRequestBodyInCheck.maxRequestBytes: must be at least 1",
        ),
        ({"failopen": True}, "failopen: unknown field, did you mean 'failOpen'?"),
    ],
)
def test_what_is_refused(model: Model, fields: dict[str, Any], problem: str) -> None:
    (found,) = problems(model, **fields)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"pathPrefix": "check"}, "pathPrefix: must begin with '/'"),
        ({"pathPrefix": "/a b"}, "pathPrefix: must begin with '/' and hold visible ASCII characters only"),
        (
            {"includeRequestHeadersInCheck": ["a", "*"]},
            (
                'includeRequestHeadersInCheck[1]: a single wildcard ("*") is not supported, '
                "change it to either prefix or suffix match"
            ),
        ),
        ({"headersToUpstreamOnAllow": ["a b"]}, "headersToUpstreamOnAllow[0]: is not the name of a header"),
        ({"headersToDownstreamOnDeny": [""]}, "headersToDownstreamOnDeny[0]: is not the name of a header"),
        (
            {"includeAdditionalHeadersInCheck": {"a b": "c"}},
            'includeAdditionalHeadersInCheck["a b"]: is not the name of a header',
        ),
        (
            {"includeAdditionalHeadersInCheck": {"a": "b\nc: d"}},
            "includeAdditionalHeadersInCheck.a: must not hold control characters",
        ),
    ],
)
def test_what_is_refused_over_http(fields: dict[str, Any], problem: str) -> None:
    (found,) = problems(EnvoyExtAuthzHttp, **fields)
    assert found.startswith(problem)


def test_headers_may_begin_or_end_with_a_wildcard() -> None:
    assert problems(EnvoyExtAuthzHttp, includeRequestHeadersInCheck=["x-tier", "x-team-*", "*-id"]) == []


def test_headers_are_for_http_only() -> None:
    """Over gRPC, all are sent."""
    (found,) = problems(EnvoyExtAuthzGrpc, includeRequestHeadersInCheck=["a"])
    assert found.startswith("includeRequestHeadersInCheck: unknown field")
