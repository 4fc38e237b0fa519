"""The types of single values: what they take, what they refuse, in which words."""

from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from crds import values


def refusal(kind: Any, value: object) -> str:
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(kind).validate_python(value)
    (error,) = refused.value.errors()
    return str(error["ctx"]["error"])


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("dashscope.aliyuncs.com", "dashscope.aliyuncs.com"),
        ("API.Moonshot.CN", "api.moonshot.cn"),
        ("demo-llm-server", "demo-llm-server"),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
    ],
)
def test_a_host_is_a_name_or_an_address_in_lower_case(written: str, read: str) -> None:
    assert TypeAdapter(values.Host).validate_python(written) == read


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "is empty"),
        ("https://a.example.com", "must be a host name alone: remove 'https://'"),
        ("https://a.example.com:443/v1", "must be a host name alone: remove 'https://'"),
        ("a.example.com/v1", "must be a host name alone, without a path"),
        ("a.example.com:443", "must be a host name alone, without the port: 'a.example.com'"),
        ("192.0.2.1:80", "must be a host name alone, without the port: '192.0.2.1'"),
        ("*.example.com", "must not hold a wildcard"),
        ("a.example.com.", "must not end in a dot"),
        ("通义.example.com", "must be ASCII: write an international name in its 'xn--' form"),
        ("a_b.example.com", "is not a DNS name (labels of letters, digits and '-', by dots)"),
        ("a..example.com", "is not a DNS name (labels of letters, digits and '-', by dots)"),
        ("-a.example.com", "is not a DNS name (labels of letters, digits and '-', by dots)"),
        ("a b", "is not a DNS name (labels of letters, digits and '-', by dots)"),
        (f"{'a' * 64}.example.com", "is not a DNS name (labels of letters, digits and '-', by dots)"),
        (".".join(["a" * 50] * 6), "is longer than 253 characters"),
        ("192.0.2.256", "looks like an IP address, but is none"),
        ("[2001:db8::1]", "is not an IPv6 address (write it without brackets and zone)"),
        ("fe80::1%eth0", "is not an IPv6 address (write it without brackets and zone)"),
    ],
)
def test_what_is_no_host(written: str, message: str) -> None:
    assert refusal(values.Host, written) == message


@pytest.mark.parametrize(
    ("written", "read"), [("*", "*"), ("*.Example.com", "*.example.com"), ("Test.com", "test.com")]
)
def test_the_host_of_a_route_may_be_a_wildcard(written: str, read: str) -> None:
    assert TypeAdapter(values.RouteHost).validate_python(written) == read


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("*example.com", "may hold a wildcard only as '*' or as its first label ('*.example.com')"),
        ("a.*.com", "must not hold a wildcard"),
        ("*.", "is empty"),
        ("*.example.com:80", "must be a host name alone, without the port: 'example.com'"),
    ],
)
def test_what_is_no_host_of_a_route(written: str, message: str) -> None:
    assert refusal(values.RouteHost, written) == message


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("chat/completions", "must start with '/'"),
        ("", "must start with '/'"),
        ("/chat completions", "must hold visible ASCII characters only: percent-encode the others"),
        ("/聊天", "must hold visible ASCII characters only: percent-encode the others"),
        ("/chat\r\nx: y", "must hold visible ASCII characters only: percent-encode the others"),
        ("/chat#top", "must not hold a fragment ('#')"),
    ],
)
def test_what_is_no_path(written: str, message: str) -> None:
    assert refusal(values.RequestPath, written) == message


def test_a_path_may_have_a_query() -> None:
    path = "/openai/deployments/a/chat/completions?api-version=2024-10-21"
    assert TypeAdapter(values.RequestPath).validate_python(path) == path


@pytest.mark.parametrize("written", ["mesh", "gw", "istio-system/ingress-gw", "./gw", "my.gw"])
def test_names_of_gateways(written: str) -> None:
    assert TypeAdapter(values.GatewayName).validate_python(written) == written


@pytest.mark.parametrize("written", ["", "/gw", "ns/", "a/b/c", "GW", "*", "n.s/gw"])
def test_what_is_no_name_of_a_gateway(written: str) -> None:
    message = "must be 'mesh', 'name', 'namespace/name' or './name'"
    assert refusal(values.GatewayName, written) == message


@pytest.mark.parametrize(
    ("written", "milliseconds"),
    [
        ("0", 0),
        ("0s", 0),
        ("10s", 10_000),
        ("250ms", 250),
        ("1h30m", 5_400_000),
        ("1.5h", 5_400_000),
        (".5s", 500),
        ("1.s", 1000),
        ("5000us", 5),
        ("5000µs", 5),
        ("1000000ns", 1),
        ("1s1s", 2000),
    ],
)
def test_durations_have_the_grammar_of_go(written: str, milliseconds: int) -> None:
    assert values.duration(written) == timedelta(milliseconds=milliseconds)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (10, "must be a duration with its unit, such as 10s"),
        (True, "must be a duration with its unit, such as 10s"),
        ("", "must be a duration such as 10s, 1h30m or 250ms"),
        ("10", "must be a duration such as 10s, 1h30m or 250ms"),
        ("s", "must be a duration such as 10s, 1h30m or 250ms"),
        ("10 s", "must be a duration such as 10s, 1h30m or 250ms"),
        ("1d", "must be a duration such as 10s, 1h30m or 250ms"),
        ("10sec", "must be a duration such as 10s, 1h30m or 250ms"),
        ("x10s", "must be a duration such as 10s, 1h30m or 250ms"),
        ("-1s", "must not be negative"),
        ("1.5ms", "must be a whole number of milliseconds"),
        ("999us", "must be a whole number of milliseconds"),
        ("9999999h", "is longer than 292 years"),
    ],
)
def test_what_is_no_duration(written: object, message: str) -> None:
    assert refusal(values.Duration, written) == message


def test_a_time_that_cannot_be_endless_is_at_least_a_millisecond() -> None:
    assert refusal(values.PositiveDuration, "0s") == "must be at least 1ms"


@given(st.integers(0, 10**8), st.integers(0, 59), st.integers(0, 999))
def test_the_parts_of_a_duration_add_up(minutes: int, seconds: int, milliseconds: int) -> None:
    read = values.duration(f"{minutes}m{seconds}s{milliseconds}ms")
    assert read == timedelta(minutes=minutes, seconds=seconds, milliseconds=milliseconds)


@given(st.text() | st.from_regex(r"([0-9.]{1,25}[nuµmsh]{1,2}){1,3}"))
def test_no_text_breaks_the_reader_of_durations(text: str) -> None:
    with suppress(ValueError):
        assert values.duration(text) >= timedelta(0)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "is empty"),
        ("a(", "is no regular expression of RE2: missing ): a("),
        ("(?=a)", "is no regular expression of RE2: invalid perl operator: (?="),
        (r"(a)\1", r"is no regular expression of RE2: invalid escape sequence: \1"),
        ("a{2000}", "is no regular expression of RE2: invalid repetition size: {2000}"),
        ("a{97}", "is too large for Envoy: an RE2 program of 101 instructions, at most 100"),
        ("\ud800", "is no Unicode text"),
    ],
)
def test_what_envoy_does_not_take_as_a_regular_expression(written: str, message: str) -> None:
    assert refusal(values.Regex, written) == message


@pytest.mark.parametrize("written", ["*", "a{96}", "(?i)gpt-.*", r"\d+", "千问.*"])
def test_regular_expressions(written: str) -> None:
    assert TypeAdapter(values.Regex).validate_python(written) == written


@pytest.mark.parametrize("written", ["", "user type", "user:type", "用户", "a\n"])
def test_what_is_no_name_of_a_header(written: str) -> None:
    with pytest.raises(ValueError, match=r"^is not the name of a header$"):
        values.header_name(written)


def test_json_is_nested_within_bounds() -> None:
    deep: object = 1
    for _ in range(values.MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(ValidationError, match="is nested deeper than 64 levels"):
        TypeAdapter(values.JsonMembers).validate_python({"a": deep})


def test_json_from_an_api_server_may_hold_what_utf_8_cannot() -> None:
    with pytest.raises(ValidationError, match="is no Unicode text"):
        TypeAdapter(values.JsonMembers).validate_python({"a": "\ud800"})
