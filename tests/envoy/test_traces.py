"""Spans of a real Envoy for an OpenTelemetry collector."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.envoy.conftest import DASHSCOPE, KEYS, Lab, running_lab
from tests.support.collector import Collector, running_collector
from tests.support.objects import provider
from tests.support.wait import eventually

QWEN = provider("dashscope", DASHSCOPE, key=KEYS[DASHSCOPE], model="qwen-1.8b-chat")
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CLIENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Lab]:
    kinds = {
        "otel-grpc": {"port": collector.grpc_port},
        "otel-http": {"port": collector.http_port, "http": {"path": "/v1/traces"}},
    }
    mesh = {
        "extensionProviders": [
            {"name": name, "opentelemetry": {"service": "collector.example.com", **how}}
            for name, how in kinds.items()
        ]
    }
    mesh_file = tmp_path_factory.mktemp("mesh") / "mesh.yaml"
    mesh_file.write_text(yaml.safe_dump(mesh))
    options = ["--mesh-config", str(mesh_file)]
    for port in (collector.grpc_port, collector.http_port):
        options += ["--connect-to", f"collector.example.com:{port}:127.0.0.1:{port}"]
    with running_lab(options=options) as lab:
        lab.envoy_admin("/runtime_modify?tracing.opentelemetry.flush_interval_ms=100", method="POST")
        yield lab


@pytest.fixture
def lab(shared: Lab, collector: Collector) -> Lab:
    collector.exports.clear()
    shared.fake.forget()
    return shared


def tracing(**settings: Any) -> str:
    return json.dumps(
        {
            "apiVersion": "telemetry.istio.io/v1",
            "kind": "Telemetry",
            "metadata": {"name": "traces", "namespace": "istio-system"},
            "spec": {"tracing": [settings]},
        }
    )


@pytest.mark.parametrize("collector_name", ["otel-grpc", "otel-http"])
def test_a_span_says_what_the_model_did(lab: Lab, collector: Collector, collector_name: str) -> None:
    """OpenTelemetry's attributes, with the tokens, which are known only at the end of the answer."""
    tags = {
        "team": {"header": {"name": "x-team"}},
        "fixed": {"literal": {"value": "some-text"}},
        "status": {"formatter": {"value": "%RESPONSE_CODE%"}},
    }
    sampling = {"randomSamplingPercentage": 100, "customTags": tags}
    lab.apply(QWEN, tracing(providers=[{"name": collector_name}], **sampling))
    lab.client.request(DASHSCOPE, headers={"x-team": "red-team"})
    eventually(lambda: b"gen_ai.usage.output_tokens" in collector.data)
    for text in (
        "gen_ai.request.model",
        "qwen-1.8b-chat",
        "server.address",
        DASHSCOPE,
        "chat",
        "sleep.default",
    ):
        assert text.encode() in collector.data
    for text in ("red-team", "some-text", "istio.canonical_service"):
        assert text.encode() in collector.data
    # A number, as the semantic conventions want it: AnyValue.int_value (field 3).
    assert b"gen_ai.usage.output_tokens\x12\x02\x18\x48" in collector.data
    assert KEYS[DASHSCOPE].encode() not in collector.data


def test_the_clients_trace_goes_on(lab: Lab, collector: Collector) -> None:
    """The span is a child of the client's, and the provider gets the span's own context, as in Istio."""
    lab.apply(QWEN, tracing(providers=[{"name": "otel-grpc"}], randomSamplingPercentage=0))
    lab.client.request(DASHSCOPE, headers=CLIENT)
    eventually(lambda: bytes.fromhex(TRACE) in collector.data)
    assert bytes.fromhex(PARENT) in collector.data
    sent = dict(lab.seen().headers)["traceparent"]
    assert sent.split("-")[1] == TRACE
    assert sent.split("-")[2] != PARENT


def test_nothing_is_sampled_that_nobody_asks_for(lab: Lab, collector: Collector) -> None:
    lab.apply(QWEN, tracing(providers=[{"name": "otel-grpc"}], randomSamplingPercentage=0))
    lab.client.request(DASHSCOPE)
    lab.client.request(DASHSCOPE, headers=CLIENT)
    eventually(lambda: bytes.fromhex(TRACE) in collector.data)
    assert collector.data.count(b"gen_ai.usage.output_tokens") == 1


def test_span_reporting_can_be_switched_off(lab: Lab) -> None:
    lab.apply(QWEN, tracing(providers=[{"name": "otel-grpc"}], disableSpanReporting=True))
    lab.client.request(DASHSCOPE, headers=CLIENT)
    assert dict(lab.seen().headers)["traceparent"] == CLIENT["traceparent"]
    assert "opentelemetry" not in lab.envoy_admin("/config_dump?resource=dynamic_listeners")


def test_the_context_can_be_kept_from_the_provider(lab: Lab, collector: Collector) -> None:
    lab.apply(
        QWEN,
        tracing(
            providers=[{"name": "otel-grpc"}], randomSamplingPercentage=100, disableContextPropagation=True
        ),
    )
    lab.client.request(DASHSCOPE)
    eventually(lambda: b"gen_ai.request.model" in collector.data)
    assert "traceparent" not in dict(lab.seen().headers)
