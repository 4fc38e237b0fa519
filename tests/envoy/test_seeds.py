"""The documents' YAML, unchanged, and their curl commands: what each step promises is what a client sees."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, Lab, running_lab

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
