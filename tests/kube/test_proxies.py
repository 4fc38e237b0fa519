"""Who is served: Envoys with the tokens of their Pods' ServiceAccounts, on a real API server."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from llmplane.local import end
from tests.envoy.conftest import DASHSCOPE, KEYS, own_address
from tests.kube.lab import KubeLab, running_kube_lab
from tests.support.kube import ApiServer
from tests.support.wait import eventually


@pytest.fixture(scope="module")
def lab(cluster: ApiServer) -> Iterator[KubeLab]:
    cluster.kubectl("create", "namespace", "proxies")
    with running_kube_lab(cluster, "proxies") as lab:
        yield lab


@pytest.fixture(autouse=True)
def served(lab: KubeLab) -> None:
    """Apply a provider for workloads with the label app=sleep, and give the Pod that label."""
    lab.kubectl("label", "pod", "sleep", "app=sleep", "--overwrite")
    lab.apply(
        f"""
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata: {{name: dashscope}}
spec:
  workloadSelector: {{labels: {{app: sleep}}}}
  host: {DASHSCOPE}
  path: /compatible-mode/v1/chat/completions
  configs: {{defaultConfig: {{openAIConfig: {{model: m, apiKey: {KEYS[DASHSCOPE]}}}}}}}
"""
    )
    lab.answer_when(DASHSCOPE, lambda answer: answer.status == 200)


@contextmanager
def another_sidecar(lab: KubeLab, name: str, options: Sequence[str]) -> Iterator[None]:
    """Start a sidecar of the namespace, and do not wait until it is configured."""
    arguments = ["--xds-address", str(lab.mesh.xds), "--workload", name, "--namespace", "proxies"]
    arguments += ["--bind-address", own_address(), *options, "--", "-l", "error"]
    envoy = lab.mesh.run(name, ["proxy", "sidecar", *arguments])
    try:
        yield
    finally:
        end(envoy)


def log(lab: KubeLab) -> str:
    return lab.mesh.log("control-plane")


def test_a_changed_label_of_the_pod_reaches_its_envoy(lab: KubeLab) -> None:
    """The Envoy still says app=sleep: what it says does not count."""
    lab.kubectl("label", "pod", "sleep", "app=awake", "--overwrite")
    lab.answer_when(DASHSCOPE, lambda answer: answer.status == 404)
    lab.kubectl("label", "pod", "sleep", "app=sleep", "--overwrite")
    lab.answer_when(DASHSCOPE, lambda answer: answer.status == 200)


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("none", "a bearer token is required: that of a ServiceAccount, for the audience llmplane"),
        ("of the API server", "the bearer token is refused"),
        ("of no pod", "is not bound to a Pod: a proxy needs one of a projected volume"),
        ("of another namespace", "is not what the credentials are for: elsewhere/other"),
    ],
)
def test_who_gets_nothing(lab: KubeLab, cluster: ApiServer, token: str, why: str) -> None:
    made = {
        "none": lambda: "",
        "of the API server": lambda: cluster.pod_token("proxies", "sleep", "https://kubernetes.default.svc"),
        "of no pod": lambda: cluster.kubectl(
            "-n", "proxies", "create", "token", "sleep", "--audience=llmplane"
        ).strip(),
        "of another namespace": lambda: _elsewhere(cluster),
    }[token]()
    file = lab.mesh.directory / "other-token"
    file.write_text(made)
    name = token.replace(" ", "-").lower()
    with another_sidecar(lab, name, ["--xds-token-file", str(file)] if made else []):
        eventually(lambda: any(f"~{name}-" in line and why in line for line in log(lab).splitlines()))


def _elsewhere(cluster: ApiServer) -> str:
    cluster.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: elsewhere}")
    return cluster.run_pod("elsewhere", "other")


def test_while_the_api_server_is_away_streams_go_on_and_new_ones_are_refused(lab: KubeLab) -> None:
    options = lab.credentials("proxies", "late")
    lab.cluster.kill()
    with another_sidecar(lab, "late", options):
        try:
            eventually(lambda: "tokens cannot be checked at the API server" in log(lab))
            assert [proxy["state"] for proxy in lab.mesh.status()["proxies"]] == ["SYNCED"]
        finally:
            lab.cluster.start()
        eventually(lambda: len(lab.mesh.status()["proxies"]) == 2)


def test_a_deleted_pod_ends_its_stream(lab: KubeLab) -> None:
    """Its Envoy keeps what it has; a new Pod of the name needs a token of its own."""
    lab.kubectl("delete", "pod", "sleep", "--force", "--grace-period=0")
    eventually(lambda: not lab.mesh.status()["proxies"])
    assert "of the token is gone" in log(lab)
    assert lab.client.request(DASHSCOPE).status == 200
    (lab.mesh.directory / "token.new").write_text(lab.cluster.run_pod("proxies", "sleep", app="sleep"))
    (lab.mesh.directory / "token.new").replace(lab.mesh.directory / "token")
    eventually(lambda: [proxy["state"] for proxy in lab.mesh.status()["proxies"]] == ["SYNCED"])
