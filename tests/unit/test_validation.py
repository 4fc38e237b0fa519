"""The API's own rules: what breaks one is named by its path, with the text that Envoy would give."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

from llmplane.envoy import find_envoy
from tools import derive_validation_rules
from xds import protos, validation
from xds.validation import Validator, Violation, violations

CASES = Path(__file__).parent.parent / "golden" / "cases"
SECRETS = {"generic_secret", "tls_certificate"}


def golden_resources(case: Path) -> Iterator[Message]:
    for resource in yaml.safe_load_all(case.read_text(encoding="utf-8")):
        shown = {name: {} if name in SECRETS else value for name, value in resource.items()}
        packed = json_format.ParseDict(shown, protos.Any(), descriptor_pool=protos.POOL)
        full_name = packed.type_url.rpartition("/")[2]
        yield GetMessageClass(protos.POOL.FindMessageTypeByName(full_name)).FromString(packed.value)


def golden_cases() -> list[Path]:
    return sorted(CASES.glob("*.envoy.yaml"))


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: str(case.name.partition(".")[0]))
def test_what_is_served_breaks_no_rule(case: Path) -> None:
    for resource in golden_resources(case):
        assert violations(resource) == []


# Each kind of rule: a message that keeps it, and one that breaks it

ADDRESS = {"socket_address": {"address": "127.0.0.1", "port_value": 80}}
HASH = "0" * 64


CHECKED_HEADERS = [
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-max-retries",
    "x-envoy-retry-grpc-on",
    "x-envoy-retry-on",
]


def connection_manager(**fields: Any) -> Message:
    rds = {"config_source": {"ads": {}}, "route_config_name": "a"}
    made: Message = protos.HttpConnectionManager(**{"stat_prefix": "a", "rds": rds, **fields})
    return made


def route(**fields: Any) -> Message:
    made: Message = protos.Route(**{"match": {"prefix": "/"}, "direct_response": {"status": 200}, **fields})
    return made


GOOD = {
    "a duration at its bound": connection_manager(request_headers_timeout={}),
    "a duration that is not set": protos.Cluster(name="a"),
    "a duration outside an excluded range": protos.Listener(
        udp_listener_config={
            "quic_options": {"quic_protocol_options": {"connection_keepalive": {"initial_interval": {}}}}
        }
    ),
    "a number at its upper bound": protos.LocalityLbEndpoints(priority=128),
    "not a number": protos.Percent(value=math.nan),
    "a wrapper that is not set": protos.LbEndpoint(endpoint={"address": ADDRESS}),
    "an empty string whose rules are for others": protos.RouteRateLimit(
        actions=[{"generic_key": {"descriptor_value": "a"}}], hits_addend={}
    ),
    "an empty string that may be empty": protos.UpstreamTlsContext(sni=""),
    "a string of as many bytes as allowed": protos.UpstreamTlsContext(sni="a" * 255),
    "an odd name of a header where rules are not strict": protos.HeaderValueOption(header={"key": "a b/ü"}),
    "a pseudo-header": protos.RouteConfiguration(internal_only_headers=[":path"]),
    "a string of a list": protos.Router(strict_check_headers=["x-envoy-max-retries"]),
    "a list that may be empty": protos.RouteConfiguration(),
    "a member of a required oneof with the default value": protos.RouteMatch(prefix=""),
    "another member of a oneof than one that is required itself": protos.StringMatcher(exact="a"),
    "a defined value of an enum": protos.Cluster(name="a", type="STRICT_DNS"),
    "an Any that Envoy does not look into": protos.Metadata(
        typed_filter_metadata={"a": protos.pack(protos.Buffer())}
    ),
    "a message that is not looked into, because its field has a rule for an Any": protos.HttpFilter(
        name="a", config_discovery={"config_source": {}, "type_urls": ["a"]}
    ),
    "an Any of a type that is not known here": protos.TypedExtensionConfig(
        name="a", typed_config=protos.Any(type_url="type.googleapis.com/not.Known", value=b"\xff")
    ),
    "fields of Struct have no rules": protos.Metadata(filter_metadata={"a": protos.struct({"": [{}]})}),
}

BAD = [
    (protos.Cluster(), "name", "value length must be at least 1 characters"),
    (protos.Cluster(name="a", connect_timeout={}), "connect_timeout", "value must be greater than 0s"),
    (
        protos.Cluster(name="a", connect_timeout={"nanos": -1}),
        "connect_timeout",
        "Invalid duration: Expected positive duration",
    ),
    (
        protos.Cluster(name="a", common_http_protocol_options={"idle_timeout": {"nanos": 10**9}}),
        "common_http_protocol_options.idle_timeout",
        "Invalid duration: Duration out-of-range",
    ),
    (
        protos.Cluster(name="a", dns_refresh_rate={"nanos": 999_999}),
        "dns_refresh_rate",
        "value must be greater than 0.001s",
    ),
    (
        protos.HttpUri(uri="a", cluster="a", timeout={"seconds": 2**32}),
        "timeout",
        "value must be inside range [0s, 4294967296s)",
    ),
    (protos.HttpUri(uri="a", cluster="a"), "timeout", "value is required"),
    (
        protos.Listener(
            udp_listener_config={
                "quic_options": {
                    "quic_protocol_options": {"connection_keepalive": {"initial_interval": {"nanos": 1}}}
                }
            }
        ),
        "udp_listener_config.quic_options.quic_protocol_options.connection_keepalive.initial_interval",
        "value must be outside range (0s, 0.001s)",
    ),
    (protos.Cluster(name="a", type=99), "type", "value must be one of the defined enum values"),
    (
        protos.SubjectAltNameMatcher(matcher={"exact": "a"}),
        "san_type",
        "value must not be in list [SAN_TYPE_UNSPECIFIED]",
    ),
    (protos.SubjectAltNameMatcher(san_type="DNS"), "matcher", "value is required"),
    (protos.LocalityLbEndpoints(priority=129), "priority", "value must be less than or equal to 128"),
    (
        protos.LbEndpoint(load_balancing_weight={}),
        "load_balancing_weight",
        "value must be greater than or equal to 1",
    ),
    (protos.Percent(value=100.5), "value", "value must be inside range [0, 100]"),
    (protos.Percent(value=-math.inf), "value", "value must be inside range [0, 100]"),
    (protos.Buffer(), "max_request_bytes", "value is required and must not be nil."),
    (protos.Buffer(max_request_bytes={}), "max_request_bytes", "value must be greater than 0"),
    (
        connection_manager(max_request_headers_kb={"value": 8193}),
        "max_request_headers_kb",
        "value must be inside range (0, 8192]",
    ),
    (
        protos.LocalReplyConfig(
            mappers=[{"filter": {"not_health_check_filter": {}}, "status_code": {"value": 600}}]
        ),
        "mappers[0].status_code",
        "value must be inside range [200, 600)",
    ),
    (protos.UpstreamTlsContext(sni="ü" * 128), "sni", "value length must be at most 255 bytes"),
    (
        protos.CertificateValidationContext(verify_certificate_hash=[HASH, "0"]),
        "verify_certificate_hash[1]",
        "value length must be at least 64 characters",
    ),
    (
        protos.RouteConfiguration(internal_only_headers=["a", "b\n"]),
        "internal_only_headers[1]",
        r'value does not match regex pattern "^[^\x00\n\r]*$"',
    ),
    (protos.RBACPermission(any=False), "any", "value must equal true"),
    (
        protos.RouteMatch(path_separated_prefix="/a/"),
        "path_separated_prefix",
        'value does not match regex pattern "^[^?#]+[^?#/]$"',
    ),
    (
        protos.Router(strict_check_headers=["x-other"]),
        "strict_check_headers[0]",
        f"value must be in list [{' '.join(CHECKED_HEADERS)}]",
    ),
    (
        protos.RouteRateLimit(
            actions=[{"generic_key": {"descriptor_value": "a"}}], hits_addend={"format": "a"}
        ),
        "hits_addend.format",
        'value does not have prefix "%"',
    ),
    (
        protos.RouteRateLimit(
            actions=[{"generic_key": {"descriptor_value": "a"}}], hits_addend={"format": "%a"}
        ),
        "hits_addend.format",
        'value does not have suffix "%"',
    ),
    (
        protos.HeaderValueOption(header={"key": "a", "raw_value": b"\0" * 16385}),
        "header.raw_value",
        "value length must be between 0 and 16384 bytes, inclusive",
    ),
    (protos.VirtualHost(name="a"), "domains", "value must contain at least 1 item(s)"),
    (
        protos.VirtualHost(name="a", domains=["a"], request_headers_to_add=[{"header": {"key": "a"}}] * 1001),
        "request_headers_to_add",
        "value must contain no more than 1000 item(s)",
    ),
    (
        route(
            route={"cluster": "a", "internal_redirect_policy": {"response_headers_to_copy": ["b", "a", "b"]}}
        ),
        "route.internal_redirect_policy.response_headers_to_copy[2]",
        "repeated value must contain unique items",
    ),
    (
        protos.Matcher(matcher_tree={"input": {"name": "a", "typed_config": {}}, "exact_match_map": {}}),
        "matcher_tree.exact_match_map.map",
        "value must contain at least 1 pair(s)",
    ),
    (
        protos.Metadata(filter_metadata={"": {}}),
        'filter_metadata[""]',
        "value length must be at least 1 characters",
    ),
    (protos.TypedExtensionConfig(name="a"), "typed_config", "value is required"),
    (protos.RouteMatch(), "path_specifier", "is required"),
    (protos.RouteMatch(safe_regex={}), "safe_regex.regex", "value length must be at least 1 characters"),
]


@pytest.mark.parametrize("message", GOOD.values(), ids=GOOD)
def test_a_message_that_keeps_the_rules(message: Message) -> None:
    assert violations(message) == []


@pytest.mark.parametrize(
    ("message", "field", "text"), BAD, ids=[f"{field}: {text}" for _, field, text in BAD]
)
def test_a_message_that_breaks_one_rule(message: Message, field: str, text: str) -> None:
    assert violations(message) == [(field, text)]


def test_violations_are_found_in_lists_maps_and_any_and_named_by_their_path() -> None:
    filters = [
        {"name": "lua", "typed_config": protos.pack(protos.Lua(source_codes={"a": {}}))},
        {"name": "key", "typed_config": protos.pack(protos.CredentialInjector())},
    ]
    options = protos.HttpProtocolOptions(http_filters=filters)
    cluster = protos.Cluster(
        name="a",
        load_assignment={"cluster_name": "a", "endpoints": [{"priority": 1}, {"priority": 500}]},
        typed_extension_protocol_options={"http.v3": protos.pack(options)},
    )
    inside = 'typed_extension_protocol_options["http.v3"]'
    assert {str(violation) for violation in violations(cluster)} == {
        "load_assignment.endpoints[1].priority: value must be less than or equal to 128",
        f"{inside}.upstream_protocol_options: is required",
        f'{inside}.http_filters[0].typed_config.source_codes["a"].specifier: is required',
        f"{inside}.http_filters[1].typed_config.credential: value is required",
    }


def test_of_an_any_the_content_is_checked() -> None:
    assert violations(protos.pack(protos.Buffer())) == violations(protos.Buffer()) != []


def test_an_any_whose_content_cannot_be_read_is_a_violation() -> None:
    packed = protos.Any(type_url=protos.type_url(protos.Lua), value=b"\xff")
    message = protos.TypedExtensionConfig(name="a", typed_config=packed)
    full_name = "envoy.extensions.filters.http.lua.v3.Lua"
    assert violations(message) == [Violation("typed_config", f"value is not a {full_name}")]


def test_a_violation_does_not_show_the_value() -> None:
    value = protos.struct({"key": "sk-secret"})
    header = protos.HeaderValueOption(header={"key": "a", "value": "sk-secret\n"})
    cluster = protos.Cluster(metadata={"filter_metadata": {"a": value}})
    assert "sk-secret" not in f"{violations(header)}{violations(cluster)}"
    assert violations(header)
    assert violations(cluster)


# Messages of any form

RESOURCES = [resource for case in golden_cases() for resource in golden_resources(case)]
CLASSES = sorted(
    {cls for cls in vars(protos).values() if isinstance(cls, type(protos.Cluster))},
    key=lambda cls: str(cls.DESCRIPTOR.full_name),
)


@settings(deadline=None)
@given(resource=st.sampled_from(RESOURCES), data=st.data())
def test_no_change_of_some_bytes_makes_it_fail(resource: Message, data: st.DataObject) -> None:
    encoded = bytearray(resource.SerializeToString(deterministic=True))
    positions = st.integers(0, len(encoded) - 1)
    for position, byte in data.draw(st.dictionaries(positions, st.integers(0, 255), max_size=5)).items():
        encoded[position] = byte
    try:
        changed = type(resource).FromString(bytes(encoded))
    except DecodeError:
        return
    assert all(violation.field and violation.text for violation in violations(changed))


@settings(deadline=None)
@given(message_class=st.sampled_from(CLASSES), encoded=st.binary(max_size=50))
def test_no_bytes_make_it_fail(message_class: Any, encoded: bytes) -> None:
    try:
        message = message_class.FromString(encoded)
    except DecodeError:
        return
    assert all(violation.text for violation in violations(message))


# The rules


def test_all_rules_are_known() -> None:
    Validator(json.loads(validation.RULES.read_text(encoding="utf-8"))).compile_all()


@pytest.mark.parametrize(
    "rules",
    [
        {"string": {"email": True}},
        {"timestamp": {"lt_now": True}},
        {"message": {"other": True}},
        {"repeated": {"ignore_empty": True}},
        {"repeated": {"items": {"string": {"email": True}}}},
        {"repeated": {"items": {"other": {}}}},
    ],
    ids=json.dumps,
)
def test_an_unknown_rule_is_refused(rules: dict[str, Any]) -> None:
    field = "domains" if "repeated" in rules else "name"
    validator = Validator({f"envoy.config.route.v3.VirtualHost.{field}": rules})
    with pytest.raises(ValueError, match=f"unknown rule for envoy.config.route.v3.VirtualHost.{field}"):
        validator.compile_all()


def test_a_rule_for_an_unknown_field_is_refused() -> None:
    validator = Validator({"envoy.config.route.v3.VirtualHost.nmae": {"string": {"min_len": 1}}})
    with pytest.raises(KeyError, match="nmae"):
        validator.compile_all()


@pytest.mark.envoy
def test_the_committed_rules_are_those_inside_envoy() -> None:
    assert derive_validation_rules.derive(find_envoy()) == validation.RULES.read_text(encoding="utf-8")
