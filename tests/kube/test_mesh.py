"""From `kubectl apply` to an answer: a real API server, a real Envoy."""

from collections.abc import Iterator

import pytest

from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT
from tests.kube.lab import KubeLab, running_kube_lab
from tests.support.kube import ApiServer
from tests.support.wait import eventually


@pytest.fixture(scope="module")
def running(cluster: ApiServer) -> Iterator[KubeLab]:
    with running_kube_lab(cluster, "default") as lab:
        yield lab


@pytest.fixture
def lab(running: KubeLab) -> KubeLab:
    """Give the module's lab without objects."""
    running.kubectl("delete", "llmproviders,llmroutes,secrets", "--all", "--wait")
    running.answer_when(DASHSCOPE, lambda answer: answer.status == 404)
    running.fake.forget()
    return running


def provider(config: str) -> str:
    return f"""
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata: {{name: dashscope-qwen}}
spec:
  host: {DASHSCOPE}
  path: /compatible-mode/v1/chat/completions
  configs: {{defaultConfig: {{openAIConfig: {{model: qwen-turbo, {config}}}}}}}
"""


def secret(key: str) -> str:
    return f"apiVersion: v1\nkind: Secret\nmetadata: {{name: keys}}\nstringData: {{dashscope: {key}}}\n"


WITH_SECRET = provider("apiKeySecretRef: {name: keys, key: dashscope}")


def test_a_changed_secret_is_in_use_by_the_next_requests(lab: KubeLab) -> None:
    lab.apply(secret("sk-wrong"))
    lab.apply(WITH_SECRET)
    lab.answer_when(DASHSCOPE, lambda answer: b"sk-wrong" not in answer.body and answer.status == 401)
    lab.apply(secret(KEYS[DASHSCOPE]))
    lab.answer_when(DASHSCOPE, lambda answer: answer.status == 200)  # it takes no other key


def test_a_missing_secret_is_a_condition_and_a_401_and_holds_nobody_up(lab: KubeLab) -> None:
    lab.apply(WITH_SECRET)
    other = provider(f"apiKey: {KEYS[MOONSHOT]}").replace("dashscope-qwen", "moonshot")
    lab.apply(other.replace(DASHSCOPE, MOONSHOT))
    lab.answer_when(MOONSHOT, lambda answer: answer.status == 200)
    answer = lab.answer_when(DASHSCOPE, lambda answer: answer.status == 401)
    assert answer.error["message"]
    found = lab.condition_when(
        "llmp", "dashscope-qwen", "ResolvedRefs", lambda found: found.get("status") == "False"
    )
    assert found["reason"] == "SecretNotFound"
    assert "Secret default/keys does not exist" in found["message"]

    lab.apply(secret(KEYS[DASHSCOPE]))
    lab.answer_when(DASHSCOPE, lambda answer: answer.status == 200)
    lab.kubectl("wait", "--for=condition=ResolvedRefs", "--timeout=60s", "llmp", "dashscope-qwen")


def test_what_only_the_model_can_refuse_is_told_and_the_last_good_version_stays(lab: KubeLab) -> None:
    lab.apply(provider(f"apiKey: {KEYS[DASHSCOPE]}"))
    lab.answer_when(DASHSCOPE, lambda answer: answer.status == 200)
    lab.apply(provider(f"apiKey: {KEYS[DASHSCOPE]}, defaults: {{a: 1}}, overrides: {{a: 2}}"))
    accepted = lab.condition_when(
        "llmp", "dashscope-qwen", "Accepted", lambda found: found.get("status") == "False"
    )
    assert (accepted["reason"], accepted["observedGeneration"]) == ("Invalid", 2)
    assert accepted["message"] == (
        "spec.configs.defaultConfig.openAIConfig.overrides.a: 'a' is in defaults too: set it in one of them"
    )
    told = "the last good version (1) is in use at 1/1 proxies"
    lab.condition_when("llmp", "dashscope-qwen", "Programmed", lambda found: found.get("message") == told)
    assert lab.client.request(DASHSCOPE).status == 200


def test_an_edit_that_changes_nothing_for_proxies_is_programmed_at_once(lab: KubeLab) -> None:
    lab.apply(provider(f"apiKey: {KEYS[DASHSCOPE]}"))
    lab.kubectl("wait", "--for=condition=Programmed", "--timeout=60s", "llmp", "dashscope-qwen")
    lab.kubectl("patch", "llmp", "dashscope-qwen", "--type=merge", "-p", '{"spec": {"port": 443}}')
    lab.condition_when(
        "llmp", "dashscope-qwen", "Programmed", lambda found: found.get("observedGeneration") == 2
    )
    assert lab.condition_when("llmp", "dashscope-qwen", "Programmed", bool)["status"] == "True"


def test_no_proxy_is_concerned(lab: KubeLab) -> None:
    selecting = "spec:\n  workloadSelector: {labels: {app: other}}"
    lab.apply(provider(f"apiKey: {KEYS[DASHSCOPE]}").replace("spec:", selecting))
    lab.condition_when(
        "llmp", "dashscope-qwen", "Programmed", lambda found: found.get("reason") == "NoProxies"
    )
    assert lab.condition_when("llmp", "dashscope-qwen", "Programmed", bool)["status"] == "Unknown"


def test_the_api_server_dies_and_returns(lab: KubeLab) -> None:
    """Envoys go on; what was changed after it came back arrives."""
    lab.apply(provider(f"apiKey: {KEYS[DASHSCOPE]}"))
    lab.answer_when(DASHSCOPE, lambda answer: answer.status == 200)
    lab.cluster.kill()
    try:
        eventually(lambda: "stays in use" in str(lab.mesh.status()["problems"]))
        assert lab.client.request(DASHSCOPE).status == 200
    finally:
        lab.cluster.start()
    lab.apply(provider(f"apiKey: {KEYS[DASHSCOPE]}").replace("qwen-turbo", "qwen-max"))
    lab.answer_when(DASHSCOPE, lambda answer: answer.json().get("model") == "qwen-max")
    eventually(lambda: "stays in use" not in str(lab.mesh.status()["problems"]))
