"""What Prometheus gets at port 15090 of a real Envoy: seed 002's metrics to the letter, and all others."""

import json
import re
import shutil
import socketserver
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmplane.bootstrap import ProxySettings, bootstrap
from llmplane.fakellm import Fault
from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, OPENAI, Lab, running_lab
from tests.support.envoy import running_envoy
from tests.support.objects import backends, provider, route
from tests.support.serving import serving_tcp
from tests.support.wait import eventually
from translator.proxy import ProxyType

QWEN = provider("dashscope", DASHSCOPE, key=KEYS[DASHSCOPE], model="qwen-1.8b-chat")
FREE = provider("openai", OPENAI, key=KEYS[OPENAI], model=None)
"""A provider whose model clients choose."""
STREAM = b'{"stream": true, "messages": [{"role": "user", "content": "Hi"}]}'
CONFIG_MAP = """
apiVersion: v1
kind: ConfigMap
metadata:
  name: asm-llm-proxy-bootstrap-config
data:
  custom_bootstrap.json: |
    "stats_config": {
      "stats_tags":[
        { "tag_name": "llmproxy_source_workload", "regex": "(\\\\|llmproxy_source_workload=([^|]*))" },
        { "tag_name": "llmproxy_model", "regex": "(\\\\|llmproxy_model=([^|]*))" }
      ]
    }
"""
"""The document's ConfigMap, in short."""

Sample = tuple[str, frozenset[tuple[str, str]]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    mesh_file = tmp_path_factory.mktemp("mesh") / "mesh.yaml"
    mesh_file.write_text(yaml.safe_dump({"llmMetrics": {"genAI": True, "maxClientModels": 3}}))
    with running_lab(options=["--mesh-config", str(mesh_file)]) as lab:
        yield lab


@pytest.fixture
def lab(shared: Lab) -> Lab:
    for host in shared.fake.hosts:
        shared.fake.set_fault(host, None)
    return shared


def page(lab: Lab) -> str:
    with urllib.request.urlopen(
        f"http://{lab.mesh.bind_address}:15090/stats/prometheus", timeout=60
    ) as answer:
        return str(answer.read().decode())


def values(lab: Lab) -> dict[Sample, float]:
    """Return what the page of the sidecar says."""
    return parsed(page(lab))


def parsed(text: str) -> dict[Sample, float]:
    """Return what a page says, by names and labels; prometheus_client's parser renames counters."""
    found = {}
    for name, labels, value in _SAMPLE.findall(text):
        pairs = [(label, _unescaped(text)) for label, text in _LABEL.findall(labels)]
        found[name, frozenset(pairs)] = float(value)
    return found


_SAMPLE = re.compile(r"^([a-z_0-9]+){(.*)} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def total(found: Mapping[Sample, float], name: str, **labels: str) -> float:
    """Return the sum of the series of a metric that have these labels."""
    return sum(
        value
        for (metric, has), value in found.items()
        if metric == name and labels.items() <= dict(has).items()
    )


class Growth:
    """How much metrics grew since this was made: the tests share an Envoy."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._before = values(lab)

    def of(self, name: str, **labels: str) -> float:
        return total(values(self._lab), name, **labels) - total(self._before, name, **labels)


def telemetry(overrides: list[dict[str, Any]], name: str = "mesh") -> str:
    return json.dumps(
        {
            "apiVersion": "telemetry.istio.io/v1",
            "kind": "Telemetry",
            "metadata": {"name": name, "namespace": "istio-system"},
            "spec": {"metrics": [{"providers": [{"name": "prometheus"}], "overrides": overrides}]},
        }
    )


MODEL_DIMENSION = telemetry(
    [
        {
            "match": {"metric": "REQUEST_COUNT"},
            "tagOverrides": {"model": {"value": 'filter_state["wasm.asm.llmproxy.request_model"]'}},
        }
    ]
)
"""The document's step 3."""


def test_the_documents_metrics(lab: Lab) -> None:
    """Names, labels and their order as the document prints them; its ConfigMap changes nothing."""
    lab.apply(QWEN, MODEL_DIMENSION, CONFIG_MAP)
    lab.client.request(DASHSCOPE)
    eventually(lambda: 'model="qwen-1.8b-chat"' in page(lab))
    text = page(lab)
    for kind in ("prompt", "completion"):
        assert re.search(
            rf'^asm_llm_proxy_{kind}_tokens{{llmproxy_source_workload="sleep",'
            r'llmproxy_source_workload_namespace="default",'
            rf'llmproxy_destination_service="{DASHSCOPE}",llmproxy_model="qwen-1.8b-chat"}} \d+$',
            text,
            re.MULTILINE,
        )
    unknown = dict.fromkeys(("workload", "workload_namespace", "principal", "app", "version"), "unknown")
    destination = "".join(f'destination_{name}="{value}",' for name, value in unknown.items())
    assert (
        'istio_requests_total{reporter="source",source_workload="sleep",source_canonical_service="sleep",'
        'source_canonical_revision="latest",source_workload_namespace="default",source_principal="unknown",'
        'source_app="sleep",source_version="",source_cluster="unknown",'
        f'{destination}destination_service="{DASHSCOPE}",destination_canonical_service="unknown",'
        f'destination_canonical_revision="latest",destination_service_name="{DASHSCOPE}",'
        'destination_service_namespace="unknown",destination_cluster="unknown",request_protocol="http",'
        'response_code="200",grpc_response_status="",response_flags="-",'
        'connection_security_policy="unknown",model="qwen-1.8b-chat"} '
    ) in text


def test_tokens_are_counted_exactly(lab: Lab) -> None:
    lab.apply(QWEN)
    growth = Growth(lab)
    for body in (STREAM, b'{"messages": [{"role": "user", "content": "Hi"}]}'):
        lab.client.request(DASHSCOPE, body)
    eventually(lambda: growth.of("llmplane_requests_total", response_code="200", operation="chat") == 2)
    assert growth.of("asm_llm_proxy_prompt_tokens", llmproxy_model="qwen-1.8b-chat") == 6
    assert growth.of("asm_llm_proxy_completion_tokens", llmproxy_model="qwen-1.8b-chat") == 144
    assert growth.of("llmplane_estimated_completion_tokens_total") == 0


def test_parts_of_the_tokens(lab: Lab) -> None:
    lab.apply(QWEN)
    lab.fake.set_fault(DASHSCOPE, Fault(cached_tokens=2, reasoning_tokens=5))
    growth = Growth(lab)
    lab.client.request(DASHSCOPE)
    eventually(lambda: growth.of("llmplane_cached_tokens_total", model="qwen-1.8b-chat") == 2)
    assert growth.of("llmplane_reasoning_tokens_total") == 5
    assert growth.of("llmplane_estimated_prompt_tokens_total") == 0
    assert growth.of("llmplane_retries_total") == 0


def test_latency_by_model_and_provider(lab: Lab) -> None:
    lab.apply(provider("dashscope", DASHSCOPE, key=KEYS[DASHSCOPE], model="slow"))
    lab.fake.set_fault(DASHSCOPE, Fault(delay=0.2))
    lab.client.request(DASHSCOPE, STREAM)
    labels = {"model": "slow", "destination_service": DASHSCOPE}
    name = "llmplane_time_to_first_token_seconds"
    gen_ai = {"gen_ai_request_model": "slow", "gen_ai_operation_name": "chat", "server_address": DASHSCOPE}
    expected = [
        (f"{name}_count", labels),
        ("llmplane_request_duration_seconds_count", labels),
        ("llmplane_time_per_output_token_seconds_count", labels),
        ("gen_ai_server_time_to_first_token_seconds_count", gen_ai),
        *(
            ("gen_ai_client_token_usage_count", {**gen_ai, "gen_ai_token_type": kind})
            for kind in ("input", "output")
        ),
    ]

    def counts() -> list[float]:
        found = values(lab)
        return [total(found, of, **selected) for of, selected in expected]

    # Envoy makes histograms now and then, each from what there is at that moment.
    eventually(lambda: counts() == [1] * len(expected))
    found = values(lab)
    assert total(found, f"{name}_sum", **labels) > 0.15
    assert total(found, f"{name}_bucket", le="0.1", **labels) == 0


def test_a_fallback_is_counted(lab: Lab) -> None:
    rule = {"backendRefs": [{**ref, "priority": i} for i, ref in enumerate(backends(DASHSCOPE, MOONSHOT))]}
    lab.apply(
        QWEN,
        provider("moonshot", MOONSHOT, key=KEYS[MOONSHOT], model="moonshot-v1-8k"),
        route("both", "demo-llm-server", {**rule, "retries": {"attempts": 2, "retryOn": "5xx"}}),
    )
    lab.fake.set_fault(DASHSCOPE, Fault(status=503))
    growth = Growth(lab)
    assert lab.client.request("demo-llm-server").status == 200
    labels = {"destination_service": MOONSHOT, "model": "moonshot-v1-8k"}
    eventually(lambda: growth.of("llmplane_fallbacks_total", **labels) == 1)
    assert growth.of("llmplane_retries_total", **labels) >= 1
    assert growth.of("llmplane_retried_prompt_tokens_total", **labels) > 0
    assert growth.of("llmplane_requests_total", response_code="200", **labels) == 1


def test_what_there_is_not_is_unknown(lab: Lab) -> None:
    """A request that no provider got has no model and no operation."""
    lab.apply(QWEN)
    growth = Growth(lab)
    lab.client.request("nowhere.example.com")
    labels = {"destination_service": "unknown", "response_code": "404", "response_flags": "NC"}
    llm = {"model": "unknown", "operation": "", "source_workload": "sleep"}
    eventually(lambda: growth.of("llmplane_requests_total", **labels, **llm) == 1)
    istio = {"destination_service_name": "unknown", "source_version": "", "grpc_response_status": ""}
    assert growth.of("istio_requests_total", **labels, **istio) == 1


def test_errors_by_provider(lab: Lab) -> None:
    lab.apply(QWEN)
    lab.fake.set_fault(DASHSCOPE, Fault(status=429))
    growth = Growth(lab)
    assert lab.client.request(DASHSCOPE).status == 429
    labels = {"destination_service": DASHSCOPE, "model": "qwen-1.8b-chat", "response_code": "429"}
    eventually(lambda: growth.of("llmplane_requests_total", **labels) == 1)
    assert growth.of("asm_llm_proxy_prompt_tokens") == 0


def test_models_that_clients_choose_are_bounded(lab: Lab) -> None:
    """The first three by name (llmMetrics.maxClientModels), all others together; nothing is lost."""
    lab.apply(FREE, MODEL_DIMENSION)
    growth = Growth(lab)
    for number in range(10):
        body = json.dumps({"model": f"own-{number}", "messages": [{"role": "user", "content": "Hi"}]})
        assert lab.client.request(OPENAI, body.encode()).status == 200
    eventually(lambda: growth.of("llmplane_requests_total", destination_service=OPENAI) == 10)
    models = {
        dict(labels)["model"]
        for (name, labels) in values(lab)
        if name in {"istio_requests_total", "llmplane_requests_total"} and "model" in dict(labels)
    }
    assert len({model for model in models if model.startswith("own-")}) <= 3
    assert growth.of("llmplane_requests_total", model="other") >= 7
    assert growth.of("istio_requests_total", model="other") >= 7


def test_a_model_is_what_it_is_in_a_label(lab: Lab) -> None:
    """A model named like a metric, with quotes and other characters, spoils no line."""
    odd = 'envoy_llmx_a "b"\\c|d=e{}'
    lab.apply(provider("openai", OPENAI, key=KEYS[OPENAI], model=odd))
    growth = Growth(lab)
    lab.client.request(OPENAI)
    eventually(lambda: growth.of("llmplane_requests_total", model=odd) == 1)
    assert growth.of("asm_llm_proxy_prompt_tokens", llmproxy_model=odd) == 3


def test_overrides(lab: Lab) -> None:
    """Istio's: metrics switched off, labels removed and changed; LLM metrics by their own names."""
    lab.apply(
        QWEN,
        telemetry(
            [
                {"match": {"metric": "REQUEST_DURATION"}, "disabled": True},
                {
                    "match": {"metric": "REQUEST_COUNT"},
                    "tagOverrides": {
                        "source_app": {"operation": "REMOVE"},
                        "reporter": {"value": "'me'"},
                        "method": {"value": "request.method"},
                    },
                },
                {
                    "match": {"customMetric": "llmplane_requests_total"},
                    "tagOverrides": {"team": {"value": "request.headers['x-team']"}},
                },
            ]
        ),
    )
    growth = Growth(lab)
    lab.client.request(DASHSCOPE, headers={"x-team": "red"})
    eventually(lambda: growth.of("llmplane_requests_total", team="red") == 1)
    assert growth.of("istio_requests_total", reporter="me", method="POST") == 1
    assert not any(
        "source_app" in dict(labels) for (_, labels) in values(lab) if dict(labels).get("reporter") == "me"
    )
    assert "istio_request_duration_milliseconds" not in listener(lab)
    assert "istio_request_bytes" in listener(lab)


def listener(lab: Lab) -> str:
    """Return the listeners that Envoy has now."""
    return lab.envoy_admin("/config_dump?resource=dynamic_listeners&mask=active_state")


def test_counters_survive_a_changed_telemetry(lab: Lab) -> None:
    """The listener is replaced; what was counted stays."""
    lab.apply(QWEN)
    lab.client.request(DASHSCOPE)
    eventually(lambda: total(values(lab), "llmplane_requests_total", model="qwen-1.8b-chat") >= 1)
    before = total(values(lab), "llmplane_requests_total", model="qwen-1.8b-chat")
    lab.apply(QWEN, MODEL_DIMENSION)
    lab.client.request(DASHSCOPE)
    eventually(lambda: total(values(lab), "llmplane_requests_total", model="qwen-1.8b-chat") == before + 1)


def test_nothing_is_logged_per_request(lab: Lab) -> None:
    """A metric without its value would be an error line; a client that goes away is no exception."""
    lab.apply(QWEN, MODEL_DIMENSION)
    lab.client.request(DASHSCOPE)
    lab.client.request("nowhere.example.com")
    lab.fake.set_fault(DASHSCOPE, Fault(status=500))
    lab.client.request(DASHSCOPE)
    lab.fake.set_fault(DASHSCOPE, Fault(delay=20))
    growth = Growth(lab)
    with pytest.raises(TimeoutError):
        lab.client.request(DASHSCOPE, timeout=0.2)
    eventually(lambda: growth.of("llmplane_requests_total", response_flags="DC") == 1)
    assert "[error]" not in lab.mesh.log("sidecar")


def test_only_our_metrics_lose_the_prefix(lab: Lab) -> None:
    lab.apply(QWEN)
    lab.client.request(DASHSCOPE)
    eventually(lambda: "\nllmplane_requests_total{" in page(lab))
    text = page(lab)
    assert not re.search("^(# TYPE )?envoy_llmx", text, re.MULTILINE)
    assert "envoy_cluster_upstream_rq_total" in text
    assert not re.search(r'le="\d+\.\d{8}', text)


def test_promtool_can_read_it(lab: Lab) -> None:
    """All that it complains of are names that are not ours to choose, and help texts, which Envoy lacks."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool (Debian package prometheus)")
    lab.apply(QWEN, MODEL_DIMENSION)
    lab.client.request(DASHSCOPE, STREAM)
    eventually(lambda: "llmplane_time_to_first_token_seconds_count" in page(lab))
    command = [promtool, "check", "metrics"]
    done = subprocess.run(command, input=page(lab), capture_output=True, text=True, check=False, timeout=60)
    said = [line for line in done.stderr.splitlines() if not line.startswith("envoy_")]
    allowed = ("no help text", "base unit", 'should have "_total" suffix')
    assert [line for line in said if not any(text in line for text in allowed)] == []
    own = [line for line in said if line.startswith(("llmplane_", "gen_ai_")) and "no help text" not in line]
    assert own == []


@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
def test_names_are_found_wherever_a_page_is_cut(size: int) -> None:
    """The filter of port 15090 sees a page in pieces of any size, and may miss its last line break."""
    lines = [
        "# TYPE envoy_llmx_a counter",
        'envoy_llmx_a{b="envoy_llmx_c",d="\\nenvoy_llmx_"} 1',
        "envoy_x 2",
    ]
    lines += ['envoy_llmx_h_bucket{le="0.10000000000000000555"} 3', 'envoy_llmx_h_bucket{le="+Inf"} 3']
    expected = [
        re.sub("^(# TYPE )?envoy_llmx_", r"\1", line).replace("0.10000000000000000555", "0.1")
        for line in lines
    ]
    lines += ['envoy_llmx_p{llmx_a="a=1\x1fb?=\x1fc=\x1fg@=a\x1f",d="e",llmx_f="f?=\\"=,\x1f"} 4']
    expected += ['p{a="1",b="unknown",c="",g="1",d="e",f="\\"=,"} 4']
    lines += [
        "# TYPE envoy_llmx_t_seconds__ms histogram",
        'envoy_llmx_t_seconds__ms_bucket{a="b",le="2500"} 5',
    ]
    expected += ["# TYPE t_seconds histogram", 't_seconds_bucket{a="b",le="2.5"} 5']
    lines += ['envoy_llmx_t_seconds__ms_bucket{le="+Inf"} 6', "envoy_llmx_t_seconds__ms_sum{} 1234.5"]
    expected += ['t_seconds_bucket{le="+Inf"} 6', "t_seconds_sum{} 1.2345"]
    lines += ['envoy_llmx_t_seconds__ms_count{a="t__ms_sum{} 1"} 7']
    expected += ['t_seconds_count{a="t__ms_sum{} 1"} 7']
    text = "\n".join(lines * 3)
    with cut_page(text.encode(), size) as port, running_envoy(stats_door(port)) as envoy:
        connection = HTTPConnection("127.0.0.1", envoy.port("stats"))
        connection.request("GET", "/stats/prometheus")
        assert connection.getresponse().read().decode() == "\n".join(expected * 3)
        connection.close()


def stats_door(port: int) -> dict[str, Any]:
    """Return the bootstrap's port 15090 alone, in front of another server than the admin interface."""
    socket = Path("/nowhere.sock")
    made = bootstrap(ProxySettings(ProxyType.SIDECAR, "127.0.0.1", 1, "default", "sleep", socket))
    (door,) = (each for each in made["static_resources"]["listeners"] if each["name"] == "stats")
    door["address"]["socket_address"]["port_value"] = 0
    (cluster,) = (each for each in made["static_resources"]["clusters"] if each["name"] == "admin")
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    endpoint["endpoint"]["address"] = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    return {"static_resources": {"listeners": [door], "clusters": [cluster]}}


@contextmanager
def cut_page(content: bytes, size: int) -> Iterator[int]:
    """Serve a page in pieces, each in a packet of its own; yield the port."""

    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            head = f"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {len(content)}\r\n\r\n"
            self.wfile.write(head.encode())
            for start in range(0, len(content), size):
                self.wfile.write(content[start : start + size])
                time.sleep(0.001)

    with serving_tcp(Handler) as port:
        yield port
