"""Envoy's format strings and CEL expressions: how they are read, and what none of them may read."""

from typing import Any

import pytest

from crds.cel import cel
from crds.credentials import may_hold_credential
from crds.formats import Operator, check_format, commands, json_format, operators, text_format


def test_operators_are_found_as_envoy_finds_them() -> None:
    text = "a %DURATION%%% %REQ(X-A?:PATH):9% %CEL(size('a') > (1))% %START_TIME(%Y-%m)%"
    assert list(operators(text)) == [
        Operator("DURATION"),
        Operator("REQ", "X-A?:PATH", 9),
        Operator("CEL", "size('a') > (1)"),
        Operator("START_TIME", "%Y-%m"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100%", "has a '%' at character 4 that begins no operator"),
        ("%DURATIN%", "%DURATIN%: is no operator of Envoy 1.40"),
        ("%DURATION:5%", "%DURATION%: takes neither an argument nor a length"),
        ("%REQ(a?b?c)%", "%REQ%: takes the name of a header, and at most one alternative after a '?'"),
        ("%REQ(x-none?Authorization)%", "%REQ%: must not read the header 'Authorization'"),
        ("%SECRET(x)%", "%SECRET%: is not supported: it prints a secret"),
        (
            "%ENVIRONMENT(MY_DASHSCOPE)%",
            "%ENVIRONMENT%: must not read the environment variable 'MY_DASHSCOPE'",
        ),
        (
            "%DYNAMIC_METADATA(envoy.filters.http.jwt_authn:payload)%",
            "%DYNAMIC_METADATA%: must name one value",
        ),
        ("%METADATA(DYNAMIC:envoy.filters.http.jwt_authn)%", "%METADATA%: must name one value"),
        ("%FILTER_STATE(some.api_key)%", "%FILTER_STATE%: must not read the filter state 'some.api_key'"),
        ("%CEL(request.headers)%", "%CEL%: must name one header, as request.headers['name']"),
    ],
)
def test_mistakes_and_leaks_are_told(text: str, expected: str) -> None:
    with pytest.raises(ValueError) as told:  # noqa: PT011 - the text is compared
        check_format(text)
    assert str(told.value).startswith(expected)


def test_a_bare_operator_is_read_as_an_operator() -> None:
    """As seed 002 prints it."""
    bare = "FILTER_STATE(wasm.asm.llmproxy.request_model:PLAIN)"
    made = json_format({"model": bare, "list": [bare, 1, None], "text": f"model {bare}", "other": "NOPE(a)"})
    assert made == {
        "model": f"%{bare}%",
        "list": [f"%{bare}%", 1, None],
        "text": f"model {bare}",
        "other": "NOPE(a)",
    }
    assert text_format(f"model {bare} tokens") == f"model %{bare}% tokens\n"
    assert text_format(f"model %{bare}%") == f"model %{bare}%\n"
    assert commands(made) == {"FILTER_STATE"}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "authorization",
            "Proxy-Authorization",
            "x-api-key",
            "api-key",
            "x-goog-api-key",
            "Cookie",
            "set-cookie",
        ),
        *("x-auth-token", "ocp-apim-subscription-key", "x-amz-security-token", "X_API_KEY", "session"),
    ],
)
def test_names_of_credentials(name: str) -> None:
    assert may_hold_credential(name)


@pytest.mark.parametrize(
    "name",
    [
        *("llm.time_to_first_token", "llm.time_per_output_token"),
        *(":authority", "x-ratelimit-remaining-tokens", "idempotency-key", "user-agent", "x-request-id"),
        "wasm.asm.llmproxy.request_prompt_tokens",
    ],
)
def test_names_that_are_harmless(name: str) -> None:
    assert not may_hold_credential(name)


@pytest.mark.parametrize(
    "expression",
    [
        'filter_state["wasm.asm.llmproxy.request_model"]',
        "request.headers['x-team'] == 'red' && response.code >= 400",
        "'authorization' in request.headers",
        "!(response.code in [200, 201]) || request.path.startsWith('/v1')",
        "'a' in filter_state ? filter_state['a'] : 'none'",
        "metadata.filter_metadata['envoy.filters.http.jwt_authn']['payload']['sub']",
        "upstream.request_attempt_count > 1u",
    ],
)
def test_expressions(expression: str) -> None:
    assert cel(expression) == expression


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("request.headers['authorization']", "must not read the header 'authorization'"),
        ("request.headers.authorization", "must not read the header 'authorization'"),
        ("request.headers['author' + 'ization']", "must name one header"),
        ("request['headers']['x']", "must name one attribute of request"),
        ("[request][0]", "must name one attribute of request"),
        ("size(request.headers)", "must name one header"),
        ("filter_state", "must name one entry of filter_state"),
        ("metadata.filter_metadata['envoy.filters.http.jwt_authn']['payload']", "must name one entry"),
        ("request.headers.map(h, h)", "must name one header"),
        ("[1].exists(x, x > 0)", "uses the method 'exists', which Envoy does not have"),
        ("string(1)", "uses the function 'string', which Envoy does not have"),
        ("request.path.matches('(')", "calls matches() with a pattern that is no regular expression"),
        ("request.path ==", "is no CEL expression that Envoy takes"),
        ("model", "uses 'model', which is no attribute of Envoy"),
    ],
)
def test_expressions_that_are_refused(expression: str, expected: str) -> None:
    with pytest.raises(ValueError) as told:  # noqa: PT011 - the text is compared
        cel(expression)
    assert str(told.value).startswith(expected)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes"])
def test_only_json_is_a_format(value: Any) -> None:
    with pytest.raises(ValueError, match="is no value that JSON has"):
        json_format({"a": value})
