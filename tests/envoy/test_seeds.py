"""The documents' YAML, unchanged, and their curl commands: what each step promises is what a client sees."""

import json
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, Lab, running_lab
from tests.support.wait import eventually
from translator.features import Feature

EXAMPLES = Path(__file__).parents[2] / "examples"
DOCUMENTS = {"000-traffic-routing": "qwen-1.8b-chat", "003-traffic-routing-ja": "qwen1.5-72b-chat"}
"""Folder of each document, and its default model."""


@pytest.fixture(scope="module")
def seeds_lab() -> Iterator[Lab]:
    names = {"API_KEY_OF_DASHSCOPE": DASHSCOPE, "YOUR_DASHSCOPE_API_KEY": DASHSCOPE}
    names |= {"API_KEY_OF_MOONSHOT": MOONSHOT, "YOUR_MOONSHOT_API_KEY": MOONSHOT}
    with running_lab(environment={name: KEYS[host] for name, host in names.items()}) as lab:
        yield lab


def step(lab: Lab, document: str, number: int) -> None:
    """Apply the complete state after a step of a document."""
    files = sorted((EXAMPLES / document / f"step-{number}").glob("*.yaml"))
    lab.apply(*(file.read_text(encoding="utf-8") for file in files))
    lab.fake.forget()


@pytest.mark.parametrize(("document", "model"), DOCUMENTS.items())
def test_step_2_a_provider_is_called_over_plain_http(seeds_lab: Lab, document: str, model: str) -> None:
    step(seeds_lab, document, 2)
    answer = seeds_lab.client.request(DASHSCOPE)
    assert (answer.status, answer.json()["model"]) == (200, model)
    seen = seeds_lab.seen()
    assert (seen.sni, seen.path) == (DASHSCOPE, "/compatible-mode/v1/chat/completions")


@pytest.mark.parametrize(("document", "model"), DOCUMENTS.items())
def test_step_3_subscribers_get_another_model(seeds_lab: Lab, document: str, model: str) -> None:
    step(seeds_lab, document, 3)
    assert seeds_lab.client.request(DASHSCOPE).json()["model"] == model
    subscriber = seeds_lab.client.request(DASHSCOPE, headers={"user-type": "subscriber"})
    assert subscriber.json()["model"] == "qwen-turbo"


@pytest.mark.parametrize(("document", "model"), DOCUMENTS.items())
def test_step_4_half_of_the_requests_go_to_moonshot(seeds_lab: Lab, document: str, model: str) -> None:
    step(seeds_lab, document, 4)
    models = Counter(seeds_lab.client.request("demo-llm-server").json()["model"] for _ in range(100))
    assert set(models) == {model, "moonshot-v1-8k"}
    assert min(models.values()) >= 25, models  # 50 expected, deviation 5
    assert {seen.provider for seen in seeds_lab.fake.seen} == {DASHSCOPE, MOONSHOT}


# Seed 002, beside what 000 leads to


@pytest.fixture(scope="module")
def observed_lab() -> Iterator[Lab]:
    """Give a lab where the document's two requests were made."""
    document = EXAMPLES / "002-observability"
    files = [*(EXAMPLES / "000-traffic-routing" / "step-4").glob("*.yaml"), *document.glob("objects/*.yaml")]
    with running_lab(
        options=["--mesh-config", str(document / "mesh.yaml")],
        environment={"API_KEY_OF_MOONSHOT": KEYS[MOONSHOT]},
    ) as lab:
        lab.apply(*(file.read_text(encoding="utf-8") for file in sorted(files)))
        assert lab.client.request(DASHSCOPE).status == 200
        assert lab.client.request(DASHSCOPE, headers={"user-type": "subscriber"}).status == 200
        yield lab


def test_the_access_log_tells_model_and_tokens(observed_lab: Lab) -> None:
    def lines() -> list[dict[str, object]]:
        found = observed_lab.mesh.log("sidecar").splitlines(keepends=True)
        return [json.loads(line) for line in found if line.startswith("{") and line.endswith("}\n")]

    eventually(lambda: len(lines()) == 2)
    tokens = {"request_prompt_tokens": "3", "request_completion_tokens": "72"}
    common = {"response_code": 200, "authority_for": DASHSCOPE, **tokens}
    assert lines()[0] | {"duration": 0} == {"request_model": "qwen-1.8b-chat", **common, "duration": 0}
    assert lines()[1] | {"duration": 0} == {"request_model": "qwen-turbo", **common, "duration": 0}


@pytest.mark.needs(Feature.METRICS)
def test_the_metrics_tell_tokens_and_the_telemetry_adds_the_model(observed_lab: Lab) -> None:
    url = f"http://{observed_lab.mesh.bind_address}:15090/stats/prometheus"
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    for model in ("qwen-1.8b-chat", "qwen-turbo"):
        labels = (
            'llmproxy_source_workload="sleep",llmproxy_source_workload_namespace="default",'
            f'llmproxy_destination_service="{DASHSCOPE}",llmproxy_model="{model}"'
        )
        assert f"asm_llm_proxy_prompt_tokens{{{labels}}} 3" in lines
        assert f"asm_llm_proxy_completion_tokens{{{labels}}} 72" in lines
        requests = [line for line in lines if line.startswith("istio_requests_total{")]
        assert [line for line in requests if line.endswith(f',model="{model}"}} 1')]
