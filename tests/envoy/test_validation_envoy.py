"""The verdict of `xds.validation` is Envoy's own: it refuses the same, for the same field and reason."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from llmplane.envoy import find_envoy
from xds import protos
from xds.validation import Violation, violations

ADDRESS = {"socket_address": {"address": "127.0.0.1", "port_value": 80}}


def cluster(**fields: Any) -> dict[str, Any]:
    return {"clusters": [{"name": "a", **fields}]}


def endpoint(**fields: Any) -> dict[str, Any]:
    """Return a cluster with one endpoint; fields of its locality."""
    localities = [{"lb_endpoints": [{"endpoint": {"address": ADDRESS}}], **fields}]
    return cluster(load_assignment={"cluster_name": "a", "endpoints": localities})


def filtered(name: str, message: Message) -> dict[str, Any]:
    """Return a cluster with an HTTP filter."""
    options = protos.HttpProtocolOptions(
        explicit_http_config={"http_protocol_options": {}},
        http_filters=[
            {"name": name, "typed_config": protos.pack(message)},
            {
                "name": "envoy.filters.http.upstream_codec",
                "typed_config": protos.pack(protos.UpstreamCodec()),
            },
        ],
    )
    name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return cluster(typed_extension_protocol_options={name: protos.pack(options)})


def tls(**fields: Any) -> dict[str, Any]:
    packed = protos.pack(protos.UpstreamTlsContext(**fields))
    return cluster(transport_socket={"name": "envoy.transport_sockets.tls", "typed_config": packed})


def listener(**fields: Any) -> dict[str, Any]:
    """Return a listener with a connection manager of these fields."""
    router = {"name": "envoy.filters.http.router", "typed_config": protos.pack(protos.Router())}
    made = {"stat_prefix": "a", "http_filters": [router], "route_config": {}, **fields}
    packed = protos.pack(protos.HttpConnectionManager(**made))
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": packed}]
    address = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}
    return {"listeners": [{"name": "a", "address": address, "filter_chains": [{"filters": filters}]}]}


def routes(**fields: Any) -> dict[str, Any]:
    return listener(route_config={"name": "a", **fields})


def route(**fields: Any) -> dict[str, Any]:
    made = {"match": {"prefix": "/"}, "direct_response": {"status": 200}, **fields}
    return routes(virtual_hosts=[{"name": "a", "domains": ["*"], "routes": [made]}])


def header(**fields: Any) -> dict[str, Any]:
    return routes(request_headers_to_add=[{"header": {"key": "a", "value": "b", **fields}}])


def action(**fields: Any) -> dict[str, Any]:
    return route(direct_response=None, redirect=None, route={"cluster_header": "a", **fields})


REFUSED = {
    "string.min_len": cluster(name=""),
    "string.max_bytes": tls(sni="ü" * 128),
    "string.max_bytes of an item": tls(
        common_tls_context={"validation_context": {"verify_certificate_spki": ["ü" * 44]}}
    ),
    "string.in of an item": listener(
        http_filters=[
            {"name": "a", "typed_config": protos.pack(protos.Router(strict_check_headers=["x-other"]))}
        ]
    ),
    "string.pattern": route(match={"path_separated_prefix": "/a/"}),
    "string.prefix": action(
        rate_limits=[{"actions": [{"remote_address": {}}], "hits_addend": {"format": "REQ(a)%"}}]
    ),
    "string.suffix": action(
        rate_limits=[{"actions": [{"remote_address": {}}], "hits_addend": {"format": "%REQ(a)"}}]
    ),
    "string.well_known_regex": header(key="a\n"),
    "string.well_known_regex, strict": filtered(
        "key",
        protos.CredentialInjector(
            credential={
                "name": "key",
                "typed_config": protos.pack(protos.GenericCredential(credential={"name": "a"}, header="a\n")),
            }
        ),
    ),
    "string.well_known_regex of an item": routes(response_headers_to_remove=["a", "b\0"]),
    "bytes.max_len": header(value="", raw_value=b"\0" * 16385),
    "bool.const": filtered(
        "rbac",
        protos.RBAC(
            rules={"policies": {"a": {"permissions": [{"any": False}], "principals": [{"any": True}]}}}
        ),
    ),
    "enum.defined_only": cluster(lb_policy=99),
    "enum.not_in": cluster(
        health_checks=[
            {
                "timeout": {"seconds": 1},
                "interval": {"seconds": 1},
                "healthy_threshold": {"value": 1},
                "unhealthy_threshold": {"value": 1},
                "http_health_check": {"path": "/", "method": "CONNECT"},
            }
        ]
    ),
    "uint32.lte": endpoint(priority=129),
    "uint32.gte in a wrapper": endpoint(load_balancing_weight={"value": 0}),
    "uint32.gte and lt": route(direct_response={"status": 600}),
    "uint64.lte in a wrapper": cluster(
        lb_policy="RING_HASH", ring_hash_lb_config={"minimum_ring_size": {"value": 8388609}}
    ),
    "double.gte and lte": cluster(common_lb_config={"healthy_panic_threshold": {"value": -1}}),
    "duration.gt": cluster(connect_timeout={}),
    "a negative duration": cluster(connect_timeout={"seconds": -1}),
    "a negative duration without a rule": listener(
        common_http_protocol_options={"idle_timeout": {"nanos": -1}}
    ),
    "a duration that is too long": cluster(
        common_http_protocol_options={"idle_timeout": {"seconds": 9_223_372_036}}
    ),
    "duration.gt of more than 0s": cluster(dns_refresh_rate={"nanos": 1_000_000}),
    "duration.gte": cluster(outlier_detection={"interval": {"seconds": 0}}),
    "duration.required": action(retry_policy={"retry_back_off": {}}),
    "message.required": route(match=None),
    "message.required of a wrapper": listener(
        http_filters=[{"name": "a", "typed_config": protos.pack(protos.Buffer())}]
    ),
    "any.required": cluster(load_balancing_policy={"policies": [{"typed_extension_config": {"name": "a"}}]}),
    "repeated.min_items": routes(virtual_hosts=[{"name": "a"}]),
    "repeated.max_items": routes(request_headers_to_add=[{"header": {"key": "a"}}] * 1001),
    "repeated.unique": action(internal_redirect_policy={"response_headers_to_copy": ["a", "b", "a"]}),
    "map.keys": cluster(metadata={"filter_metadata": {"": {}}}),
    "oneof.required": endpoint(lb_endpoints=[{"endpoint": {"address": {}}}]),
    "oneof.required in an Any": filtered("lua", protos.Lua(source_codes={"a": {}})),
    "a required member of a set oneof": route(match={"safe_regex": {}}),
}
"""By the kind of rule that is broken: static resources."""

ACCEPTED = {
    "the least": cluster(),
    "numbers at their bounds": endpoint(priority=0, load_balancing_weight={"value": 1}),
    "a number at its upper bound": cluster(common_lb_config={"healthy_panic_threshold": {"value": 100}}),
    "a string as long as allowed": tls(sni="a" * 255),
    "a route that answers": route(direct_response={"status": 599}),
    "the default value in a required oneof": route(match={"prefix": ""}),
    "an unset member of a oneof that is required itself": route(match={"path": "/"}),
    "an empty string whose rules are for others": action(
        rate_limits=[{"actions": [{"remote_address": {}}], "hits_addend": {"number": {"value": 1}}}]
    ),
    "a path without a slash at its end": route(match={"path_separated_prefix": "/a"}),
    "the longest duration": cluster(
        common_http_protocol_options={"idle_timeout": {"seconds": 9_223_372_035, "nanos": 999_999_999}}
    ),
    "an Any that Envoy does not look into": cluster(
        metadata={"typed_filter_metadata": {"a": protos.pack(protos.Buffer())}}
    ),
    "no items": routes(virtual_hosts=[]),
    "keys": cluster(metadata={"filter_metadata": {"a": {}}}),
}


def envoys_verdict(resources: dict[str, Any], folder: Path) -> str | None:
    """Return why Envoy refuses a bootstrap with these static resources, if it does."""
    bootstrap = protos.Bootstrap(node={"id": "a", "cluster": "a"}, static_resources=resources)
    config = folder / "bootstrap.json"
    config.write_text(json.dumps(protos.to_dict(bootstrap)), encoding="utf-8")
    command = [str(find_envoy()), "--mode", "validate", "-c", str(config), "-l", "critical"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return None if done.returncode == 0 else done.stderr


def our_verdict(resources: dict[str, Any]) -> list[Violation]:
    return violations(protos.Bootstrap(static_resources=resources))


CHAIN = re.compile(r"Proto constraint validation failed \((.*)\)", re.DOTALL)
LINK = re.compile(r"\w+ValidationError\.(.+?): |field: \"(\w+)\", reason: ")
DURATION = re.compile(r"Invalid duration: [\w -]+")


def violation_in(error: str) -> Violation:
    """Return what Envoy says as our type, with the path from the last Any on, without underscores.

    Envoy says `AValidationError.LbPolicy: embedded message failed validation | caused by ...`, for a oneof
    `field: "lb_config", reason: is required`, and for a bad duration not where it is.
    """
    if duration := DURATION.search(error):
        return Violation("", duration[0])
    chain = CHAIN.search(error)
    assert chain, error
    links = chain[1].split(" | caused by ")
    names = [match[1] or match[2] for match in map(LINK.match, links) if match]
    assert len(names) == len(links), error
    text = LINK.sub("", links[-1]).replace("1ms", "0.001s")
    return Violation(plain(".".join(names)), text)


def plain(path: str) -> str:
    return path.replace("_", "").replace('"', "").lower()


@pytest.mark.parametrize("resources", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted_by_both(resources: dict[str, Any], tmp_path: Path) -> None:
    assert envoys_verdict(resources, tmp_path) is None
    assert our_verdict(resources) == []


@pytest.mark.parametrize("resources", REFUSED.values(), ids=REFUSED)
def test_refused_by_both_for_the_same_field_and_reason(resources: dict[str, Any], tmp_path: Path) -> None:
    error = envoys_verdict(resources, tmp_path)
    assert error, "Envoy accepts it"
    theirs = violation_in(error)
    (ours,) = our_verdict(resources)
    assert ours.text == theirs.text
    if theirs.field:
        assert f".{plain(ours.field)}".endswith(f".{theirs.field}")
