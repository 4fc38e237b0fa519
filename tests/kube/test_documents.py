"""The four documents, from their first command to their last: kubectl, curl, an API server, Envoys.

The YAML is the documents', with keys and address filled in, as their readers do. There is no kubelet: what
`kubectl exec` would run in a Pod runs here, with the Pod's sidecar as its HTTP proxy; `kubectl logs` is that
Envoy's output.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, own_address
from tests.kube.lab import KubeLab, running_kube_lab
from tests.support.kube import ROOT, ApiServer
from tests.support.wait import eventually

EXAMPLES = ROOT / "examples"
MESSAGES = '{"messages": [{"role": "user", "content": "Please introduce yourself"}]}'
SUBSCRIBER = ("--header", "user-type: subscriber")
ROUTING = {"000-traffic-routing": "qwen-1.8b-chat", "003-traffic-routing-ja": "qwen1.5-72b-chat"}
"""Folder of each document, and its default model."""


@pytest.fixture(scope="module")
def running(cluster: ApiServer) -> Iterator[KubeLab]:
    with running_kube_lab(cluster, "default") as lab:
        yield lab


@pytest.fixture
def lab(running: KubeLab) -> Iterator[KubeLab]:
    """Give the module's lab, and leave nothing behind."""
    yield running
    kinds = "llmproviders,llmroutes,gateways,authorizationpolicies,telemetries"
    for namespace in ("default", "istio-system"):
        running.cluster.kubectl("-n", namespace, "delete", kinds, "--all", "--wait")
    running.cluster.kubectl("-n", "istio-system", "delete", "configmap", "istio", "--ignore-not-found")
    eventually(lambda: curl_status(running) == "404")


def apply(lab: KubeLab, file: Path) -> None:
    """`kubectl apply -f FILE`, after the reader filled in what stands between `${` and `}`."""

    def value(found: re.Match[str]) -> str:
        name = found[0].lower()
        return "127.0.0.1" if "ip}" in name else KEYS[MOONSHOT if "moonshot" in name else DASHSCOPE]

    lab.cluster.apply(re.sub(r"\$\{[^}]*\}", value, file.read_text(encoding="utf-8")))


def apply_step(lab: KubeLab, document: str, number: int) -> None:
    for file in sorted((EXAMPLES / document / f"step-{number}").glob("*.yaml")):
        apply(lab, file)


def in_pod(lab: KubeLab, *command: str) -> str:
    """`kubectl exec deployment/sleep -it -- COMMAND`."""
    return run(*command, http_proxy=lab.mesh.http_proxy)


def run(*command: str, **environment: str) -> str:
    found = subprocess.run(
        [command[0], "--silent", *command[1:]],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], **environment},
        timeout=30,
    )
    return found.stdout


def curl(url: str, *options: str) -> tuple[str, ...]:
    """Return the documents' command."""
    content_type = ("--header", "Content-Type: application/json")
    return ("curl", "--location", url, *content_type, *options, "--data", MESSAGES)


def curl_status(lab: KubeLab) -> str:
    return in_pod(lab, "curl", "--output", "/dev/null", "--write-out", "%{http_code}", f"http://{DASHSCOPE}")


def answer(text: str) -> dict[str, Any]:
    """Return what the documents show: an OpenAI answer; empty if it is none."""
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError:
        return {}
    return found if found.get("object") == "chat.completion" else {}


def model(lab: KubeLab, url: str, *options: str) -> str:
    return str(answer(in_pod(lab, *curl(url, *options))).get("model"))


@pytest.mark.parametrize(("document", "default_model"), ROUTING.items())
def test_traffic_routing(lab: KubeLab, document: str, default_model: str) -> None:
    apply_step(lab, document, 1)  # the application
    lab.kubectl("apply", "-f", str(EXAMPLES / document / "step-2"))
    resolved = lab.condition_when(
        "llmprovider", "dashscope-qwen", "ResolvedRefs", lambda found: found.get("status") == "False"
    )
    assert re.search(r"the placeholder \$\{.*\} was not filled in", resolved["message"])

    apply_step(lab, document, 2)  # a provider
    eventually(lambda: model(lab, f"http://{DASHSCOPE}") == default_model)

    apply_step(lab, document, 3)  # another model for subscribers
    eventually(lambda: model(lab, f"http://{DASHSCOPE}", *SUBSCRIBER) == "qwen-turbo")
    assert model(lab, f"http://{DASHSCOPE}") == default_model

    apply_step(lab, document, 4)  # half of the requests to another provider
    lab.kubectl("wait", "--for=condition=Programmed", "--timeout=60s", "llmproviders,llmroutes", "--all")
    seen = [model(lab, "http://demo-llm-server") for _ in range(40)]
    assert set(seen) == {default_model, "moonshot-v1-8k"}

    found = lab.condition_when("llmroute", "demo-llm-server", "Programmed", bool)
    assert (found["reason"], found["message"]) == ("Programmed", "1/1 proxies")
    table = lab.kubectl("get", "llmprovider", "dashscope-qwen", "--no-headers").split()
    assert table[:5] == ["dashscope-qwen", DASHSCOPE, "/compatible-mode/v1/chat/completions", "OK", "True"]


def test_observability(lab: KubeLab) -> None:
    """After the first document: access logs, metrics of tokens, and the model in Istio's metrics."""
    apply_step(lab, "000-traffic-routing", 1)
    apply_step(lab, "000-traffic-routing", 3)
    mesh = (EXAMPLES / "002-observability" / "mesh.yaml").read_text(encoding="utf-8")
    lab.cluster.apply(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "istio", "namespace": "istio-system"},
                "data": {"mesh": mesh},
            }
        )
    )
    for file in sorted((EXAMPLES / "002-observability" / "objects").glob("*.yaml")):
        apply(lab, file)
    annotation = {"sidecar.istio.io/bootstrapOverride": "asm-llm-proxy-bootstrap-config"}
    patch = {"spec": {"template": {"metadata": {"annotations": annotation}}}}
    lab.kubectl("patch", "deployment", "sleep", "-p", json.dumps(patch))

    def metric(name: str, **labels: str) -> bool:
        stats = run("curl", f"{lab.mesh.bind_address}:15090/stats/prometheus").splitlines()
        pairs = [f'{label}="{value}"' for label, value in labels.items()]
        return any(line.startswith(f"{name}{{") and all(pair in line for pair in pairs) for line in stats)

    for name, options in (("qwen-1.8b-chat", ()), ("qwen-turbo", SUBSCRIBER)):
        # The first requests may come before all of this is in effect.
        eventually(
            lambda n=name, o=options: (
                model(lab, f"http://{DASHSCOPE}", *o) == n
                and has_logged(lab, n)
                and metric("istio_requests_total", source_workload="sleep", model=n)
            )
        )

    where = {
        "llmproxy_source_workload": "sleep",
        "llmproxy_source_workload_namespace": "default",
        "llmproxy_destination_service": DASHSCOPE,
    }
    for name in ("qwen-1.8b-chat", "qwen-turbo"):
        for kind in ("prompt", "completion"):
            counter = f"asm_llm_proxy_{kind}_tokens"
            eventually(lambda n=name, c=counter: metric(c, **where, llmproxy_model=n))


def has_logged(lab: KubeLab, name: str) -> bool:
    """Whether the access log (`kubectl logs deployments/sleep -c istio-proxy`) has a request of a model."""
    lines = [
        line
        for line in lab.mesh.log("sidecar").splitlines(keepends=True)
        if line.startswith("{") and line.endswith("}\n")  # not one that is being written
    ]
    return any(
        entry["request_model"] == name and int(entry["request_prompt_tokens"]) > 0
        for entry in map(json.loads, lines)
        if entry["response_code"] == 200
    )


def test_ingress_gateway(lab: KubeLab) -> None:
    options = lab.credentials("istio-system", "istio-ingressgateway", istio="ingressgateway")
    gateway = lab.mesh.start_gateway(bind_address=own_address(), options=options)
    command = curl(f"{gateway.bind_address}:80", "--header", "host: test.com")
    apply_step(lab, "004-ingress-gateway", 3)
    lab.when(lambda: run(*command), lambda text: answer(text).get("model") == "qwen-1.8b-chat")
    lab.kubectl("wait", "--for=condition=Programmed", "--timeout=60s", "llmroute", "--all")
    of_istio = ["wait", "--for=condition=Programmed", "--timeout=60s", "gateways", "--all"]
    lab.cluster.kubectl("-n", "istio-system", *of_istio)

    apply(lab, EXAMPLES / "004-ingress-gateway" / "step-5" / "5-auth-policy.yaml")
    lab.when(lambda: run(*command), lambda text: text == "RBAC: access denied")
