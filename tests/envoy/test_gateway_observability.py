"""Access logs, metrics and traces of a real gateway: as of sidecars, and by client besides."""

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator

import pytest
import yaml

from llmplane.fakellm import Fault
from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, Lab, running_lab
from tests.envoy.gateway import GATEWAY, Gateway
from tests.envoy.test_metrics_exposition import parsed, total
from tests.support.collector import Collector, running_collector
from tests.support.objects import backends, provider, route, secret
from tests.support.policies import HOST, ROOT, api_key_authentication, opened
from tests.support.wait import eventually

ALICE, BOB = "sk-of-alice-0123456789", "sk-of-bob-0123456789"
CLIENTS = [
    secret(f"{ROOT}/clients", {"alice": ALICE, "bob": BOB}),
    api_key_authentication("clients"),
]
STREAM = b'{"stream": true, "messages": [{"role": "user", "content": "Hi"}]}'
LOG = {
    "name": "%REQ(X-NAME)%",
    "host": "%REQ(:AUTHORITY)%",
    "protocol": "%PROTOCOL%",
    "client": "%FILTER_STATE(llm.client:PLAIN)%",
    "model": "FILTER_STATE(wasm.asm.llmproxy.request_model:PLAIN)",
    "prompt": "FILTER_STATE(wasm.asm.llmproxy.request_prompt_tokens:PLAIN)",
    "completion": "FILTER_STATE(wasm.asm.llmproxy.request_completion_tokens:PLAIN)",
    "code": "%RESPONSE_CODE%",
}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


@pytest.fixture(scope="module")
def gateway_lab(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Lab]:
    otel = {"service": "collector.example.com", "port": collector.grpc_port}
    mesh = {
        "accessLogFile": "/dev/stdout",
        "accessLogEncoding": "JSON",
        "accessLogFormat": json.dumps(LOG),
        "extensionProviders": [{"name": "otel", "opentelemetry": otel}],
        "defaultProviders": {"tracing": ["otel"]},
        "defaultConfig": {"tracing": {"sampling": 100}},
    }
    file = tmp_path_factory.mktemp("mesh") / "mesh.yaml"
    file.write_text(yaml.safe_dump(mesh))
    connect = f"collector.example.com:{collector.grpc_port}:127.0.0.1:{collector.grpc_port}"
    with running_lab(options=["--mesh-config", str(file), "--connect-to", connect]) as lab:
        lab.start_gateway()
        yield lab


@pytest.fixture
def gw(gateway_lab: Lab) -> Gateway:
    for host in gateway_lab.fake.hosts:
        gateway_lab.fake.set_fault(host, None)
    return Gateway(gateway_lab)


def page(gw: Gateway) -> str:
    with urllib.request.urlopen(f"http://{gw.address}:15090/stats/prometheus", timeout=60) as answer:
        return str(answer.read().decode())


def count(gw: Gateway, name: str, **labels: str) -> float:
    return total(parsed(page(gw)), name, **labels)


def logged(gw: Gateway, name: str) -> dict[str, object]:
    """Return what the gateway's Envoy prints of the request with this `x-name`; it does each second."""
    found: list[dict[str, object]] = []

    def look() -> bool:
        lines = gw.lab.mesh.log(GATEWAY).splitlines(keepends=True)
        found[:] = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]
        found[:] = [line for line in found if line.pop("name") == name]
        return bool(found)

    eventually(look)
    (line,) = found
    return line


def test_log_metrics_and_trace_of_a_request(gw: Gateway, collector: Collector) -> None:
    gw.apply(*CLIENTS)
    before = {name: count(gw, f"asm_llm_proxy_{name}_tokens") for name in ("prompt", "completion")}
    collector.exports.clear()
    assert gw.ask({"x-api-key": ALICE, "x-name": "first"}).status == 200
    assert logged(gw, "first") == {
        "host": DASHSCOPE,
        "protocol": "HTTP/1.1",
        "client": "alice",
        "model": "some-model",
        "prompt": "3",
        "completion": "72",
        "code": 200,
    }
    eventually(lambda: count(gw, "asm_llm_proxy_completion_tokens") == before["completion"] + 72)
    assert count(gw, "asm_llm_proxy_prompt_tokens") == before["prompt"] + 3
    text = page(gw)
    assert f'llmproxy_source_workload="{GATEWAY}",llmproxy_source_workload_namespace="{ROOT}"' in text
    assert f'istio_requests_total{{reporter="source",source_workload="{GATEWAY}"' in text
    eventually(lambda: b"gen_ai.usage.output_tokens\x12\x02\x18\x48" in collector.data)
    for key in (ALICE, KEYS[DASHSCOPE]):
        assert key not in gw.lab.mesh.log(GATEWAY) + text
        assert key.encode() not in collector.data


def test_who_asked_is_a_label(gw: Gateway) -> None:
    """By names of the configuration only: what has no good key is `unknown`, whoever it says it is."""
    gw.apply(*CLIENTS)
    name = "llmplane_requests_total"
    of = {client: {"client": client} for client in ("alice", "bob", "unknown")}
    before = {client: count(gw, name, **labels) for client, labels in of.items()}
    for key in (ALICE, ALICE, BOB):
        assert gw.ask({"x-api-key": key}).status == 200
    assert gw.ask({"x-api-key": "sk-of-mallory", "x-llm-client": "mallory"}).status == 401
    assert gw.ask({"x-llm-client": "alice"}).status == 401
    growth = {"alice": 2, "bob": 1, "unknown": 2}
    eventually(
        lambda: (
            {client: count(gw, name, **labels) - before[client] for client, labels in of.items()} == growth
        )
    )
    clients = {dict(labels).get("client") for (metric, labels) in parsed(page(gw)) if metric == name}
    assert clients == {"alice", "bob", "unknown"}


def test_a_fallback_behind_a_gateway(gw: Gateway) -> None:
    rule = {"backendRefs": [{**ref, "priority": i} for i, ref in enumerate(backends(DASHSCOPE, MOONSHOT))]}
    gateway, first, _ = opened(DASHSCOPE, KEYS[DASHSCOPE])
    second = provider(f"{ROOT}/second", MOONSHOT, KEYS[MOONSHOT], "moonshot-v1-8k")
    gw.lab.apply(gateway, first, second, route("test", HOST, rule, gateways=[f"{ROOT}/ingress-gw"]))
    gw.lab.fake.set_fault(DASHSCOPE, Fault(status=503))
    before = count(gw, "llmplane_fallbacks_total", destination_service=MOONSHOT)
    assert gw.ask({"x-name": "fallback"}).status == 200
    assert logged(gw, "fallback")["model"] == "moonshot-v1-8k"
    eventually(lambda: count(gw, "llmplane_fallbacks_total", destination_service=MOONSHOT) == before + 1)


def test_a_stream_over_http2(gw: Gateway) -> None:
    """A client that speaks HTTP/2 gets its stream without the usage chunk; the tokens are counted."""
    curl = shutil.which("curl")
    if (
        curl is None
        or "HTTP2" not in subprocess.run([curl, "-V"], capture_output=True, text=True, check=True).stdout
    ):
        pytest.skip("no curl with HTTP/2")
    gw.apply()
    command = [curl, "-sS", "--http2-prior-knowledge", f"http://{gw.address}/v1/chat/completions"]
    command += [
        "-H",
        f"host: {HOST}",
        "-H",
        "content-type: application/json",
        "-H",
        "x-name: http2",
        "-d",
        STREAM.decode(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.endswith("data: [DONE]\n\n")
    assert '"choices": []' not in done.stdout
    assert '"choices":[]' not in done.stdout
    line = logged(gw, "http2")
    assert (line["protocol"], line["prompt"], line["completion"]) == ("HTTP/2", "3", "72")


def test_a_stream_that_is_cut_short_is_an_estimate(gw: Gateway) -> None:
    """The client goes away: what it got until then is counted, and said to be estimated."""
    gw.apply()
    gw.lab.fake.set_fault(DASHSCOPE, Fault(chunk_delay=0.2))
    names = ("asm_llm_proxy_completion_tokens", "llmplane_estimated_completion_tokens_total")
    before = [count(gw, name) for name in names]
    with gw.client.open(HOST, STREAM) as answer:
        while b"content" not in answer.readline():
            pass
        while b"content" not in answer.readline():  # the first one may be empty
            pass
    eventually(lambda: all(count(gw, name) > old for name, old in zip(names, before, strict=True)))
    grown = [count(gw, name) - old for name, old in zip(names, before, strict=True)]
    assert grown[0] == grown[1] < 72
