"""What was acknowledged at one replica stands in at another one for what Envoys refuse."""

import json
import shutil
from collections.abc import Iterator

import pytest

from llmplane.kubeacknowledged import NAME
from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT
from tests.kube.lab import KubeLab, running_kube_lab
from tests.support.envoy import ask_admin
from tests.support.kube import ApiServer
from tests.support.objects import provider
from tests.support.wait import eventually

NAMESPACE = "acknowledged"
NOWHERE = "/nowhere/ca.pem"
"""A path on Envoy's machine: the control plane cannot know that nothing is there."""


@pytest.fixture(scope="module")
def lab(cluster: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeLab]:
    """Run a control plane in a namespace of its own, which no other one writes to."""
    cluster.kubectl("create", "namespace", NAMESPACE)
    file = cluster.write_kubeconfig(tmp_path_factory.mktemp("kube") / "config", "admin-token", NAMESPACE)
    with running_kube_lab(cluster, NAMESPACE, pod="one", kubeconfig=file) as lab:
        yield lab


def dashscope(model: str, **spec: object) -> str:
    return provider(f"{NAMESPACE}/dashscope", DASHSCOPE, KEYS[DASHSCOPE], model, **spec)


def bad(model: str) -> str:
    return dashscope(model, tls={"caCertificates": NOWHERE})


def model(lab: KubeLab, host: str) -> str:
    """Which model answers a request to this host, or the status of an error."""
    answer = lab.client.request(host)
    return str(answer.json()["model"] if answer.status == 200 else answer.status)


def is_refused(lab: KubeLab) -> bool:
    conditions = [c for item in lab.mesh.status()["objects"] for c in item["conditions"]]
    return "Refused" in [condition["reason"] for condition in conditions]


def end_all(lab: KubeLab) -> None:
    """End control plane and sidecar, and what the control plane had on its disk, as a rollout does."""
    lab.mesh.stop()
    shutil.rmtree(lab.mesh.directory / "state")


def start_newcomer(lab: KubeLab) -> None:
    """Start a sidecar that knows nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.mesh, "settle", lambda: None)  # what is refused is not synchronised
        lab.mesh.start_proxy()


def rejected(lab: KubeLab) -> int:
    """Return how often the sidecar refused clusters."""
    (address,) = lab.mesh.directory.glob("llmplane-*/*/admin.sock")
    stats = ask_admin(address, "/stats?format=json&filter=cds.update_rejected$")
    return sum(stat["value"] for stat in json.loads(stats)["stats"] if "value" in stat)


def kept(lab: KubeLab) -> dict[str, dict[str, str]]:
    """Return what is in the ConfigMap."""
    text = lab.kubectl("get", "configmaps", "-o", "json")
    found = {each["metadata"]["name"]: each for each in json.loads(text)["items"]}
    return {key: found.get(NAME, {}).get(key, {}) for key in ("binaryData", "data")}


def acknowledge_and_refuse(lab: KubeLab) -> None:
    lab.mesh.stop()
    lab.kubectl("delete", "llmproviders,configmaps", "--all", "--wait")
    lab.mesh.start_control_plane()
    lab.mesh.start_proxy()
    lab.apply(dashscope("one"))
    eventually(lambda: model(lab, DASHSCOPE) == "one")
    lab.apply(bad("two"))
    eventually(lambda: is_refused(lab))


def test_a_newcomer_after_a_rollout_gets_the_version_that_was_acknowledged_before(lab: KubeLab) -> None:
    acknowledge_and_refuse(lab)
    end_all(lab)
    assert len(kept(lab)["binaryData"]) == 1, "also what was refused just before the end"

    lab.mesh.start_control_plane()
    start_newcomer(lab)
    eventually(lambda: is_refused(lab))
    assert NOWHERE in str(lab.mesh.status()["problems"]), "Envoy's own words"
    lab.apply(provider(f"{NAMESPACE}/moonshot", MOONSHOT, KEYS[MOONSHOT], "one"))
    eventually(lambda: model(lab, MOONSHOT) == "one")
    eventually(lambda: model(lab, DASHSCOPE) == "one")
    assert rejected(lab) == 0
    assert len(kept(lab)["binaryData"]) == 1

    lab.apply(dashscope("three"))
    eventually(lambda: model(lab, DASHSCOPE) == "three")
    assert not is_refused(lab)


def test_a_newcomer_gets_it_also_when_another_replica_tells_of_it_later(lab: KubeLab) -> None:
    acknowledge_and_refuse(lab)
    end_all(lab)
    ((name, text),) = kept(lab)["binaryData"].items()
    lab.kubectl("delete", "configmap", NAME)
    lab.mesh.start_control_plane()
    start_newcomer(lab)
    eventually(lambda: is_refused(lab))
    lab.apply(provider(f"{NAMESPACE}/moonshot", MOONSHOT, KEYS[MOONSHOT], "one"))
    eventually(lambda: model(lab, MOONSHOT) == "one")
    assert model(lab, DASHSCOPE) == "503", "its cluster has no hosts"

    kind = f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {NAME}}}"
    lab.apply(f"{kind}\nbinaryData: {{{name}: {text}}}\n")
    eventually(lambda: model(lab, DASHSCOPE) == "one")
