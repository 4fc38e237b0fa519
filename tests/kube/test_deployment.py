"""deploy/kubernetes on a real API server, and the control plane with exactly the rights that it gives."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.envoy.conftest import DASHSCOPE, KEYS
from tests.kube.lab import KubeLab, running_kube_lab
from tests.support.kube import ROOT, ApiServer
from tests.support.wait import eventually

ACCOUNT = "llmplane-system:llmplane"


@pytest.fixture(scope="module")
def applied(cluster: ApiServer) -> list[str]:
    """Apply all manifests twice, and return what the second time did.

    There is no kubelet that would run what they deploy, and so nobody behind the webhooks: these are taken
    away again (tests/kube/test_admission.py has some that are answered). So are the gateways' Services, by
    which the gateways of other tests would open the ports of these.
    """
    folders = [file.parent for file in sorted((ROOT / "deploy" / "kubernetes").rglob("kustomization.yaml"))]
    try:
        texts = [cluster.kubectl("apply", "-k", str(folder)) for folder in [*folders, *folders]]
    finally:
        cluster.kubectl("delete", "mutatingwebhookconfigurations,validatingwebhookconfigurations", "--all")
        cluster.kubectl("-n", "istio-system", "delete", "services", "--all")
    return "".join(texts[len(folders) :]).splitlines()


@pytest.fixture(scope="module")
def deployed(cluster: ApiServer, applied: list[str]) -> ApiServer:
    """Give the cluster with all manifests."""
    return cluster


@pytest.fixture(scope="module")
def lab(deployed: ApiServer) -> Iterator[KubeLab]:
    """Run the control plane as the service account."""
    deployed.kubectl("create", "namespace", "tenant")
    token = deployed.kubectl("-n", "llmplane-system", "create", "token", "llmplane").strip()
    with tempfile.TemporaryDirectory() as directory:
        file = deployed.write_kubeconfig(Path(directory) / "kubeconfig", token, "llmplane-system")
        with running_kube_lab(deployed, "tenant", kubeconfig=file) as lab:
            yield lab


def test_the_manifests_are_taken_and_stay_as_they_are(applied: list[str]) -> None:
    # kubectl's patch of a PodDisruptionBudget is never empty (its selector is replaced, not merged).
    rest = [line for line in applied if not line.startswith("poddisruptionbudget")]
    assert [line for line in rest if not line.endswith(" unchanged")] == []
    kinds = {line.partition("/")[0] for line in applied}
    assert {"deployment.apps", "mutatingwebhookconfiguration.admissionregistration.k8s.io"} <= kinds


def test_removing_it_does_not_remove_istio(deployed: ApiServer) -> None:
    """`kubectl delete -k` deletes namespaces with all that is in them."""
    text = deployed.kubectl("kustomize", str(ROOT / "deploy" / "kubernetes"))
    made = [each["metadata"]["name"] for each in yaml.safe_load_all(text) if each["kind"] == "Namespace"]
    assert made == ["llmplane-system"]


def test_the_pods_meet_the_restricted_standard(deployed: ApiServer) -> None:
    """The API server warns where a Deployment's pods would be refused."""
    answer = deployed.kubectl("-n", "llmplane-system", "get", "deployment", "llmplane", "-o", "yaml")
    replaced = deployed.kubectl("replace", "--dry-run=server", "--warnings-as-errors", "-f", "-", text=answer)
    assert "replaced" in replaced


def test_it_works_with_the_rights_that_it_has(lab: KubeLab) -> None:
    lab.apply(
        f"""
apiVersion: v1
kind: Secret
metadata: {{name: keys}}
stringData: {{dashscope: {KEYS[DASHSCOPE]}}}
---
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata: {{name: dashscope}}
spec:
  host: {DASHSCOPE}
  path: /compatible-mode/v1/chat/completions
  configs: {{defaultConfig: {{openAIConfig: {{model: m, apiKeySecretRef: {{name: keys, key: dashscope}}}}}}}}
"""
    )
    lab.answer_when(DASHSCOPE, lambda answer: answer.status == 401)
    eventually(lambda: "secrets is forbidden" in str(lab.mesh.status()["problems"]))
    why = f"Secret {lab.namespace}/keys cannot be read: secrets is forbidden"
    lab.condition_when("llmp", "dashscope", "ResolvedRefs", lambda found: why in found.get("message", ""))
    lab.kubectl(
        "create", "rolebinding", "llmplane-secrets", "--clusterrole=llmplane-secrets",
        f"--serviceaccount={ACCOUNT}",
    )  # fmt: skip
    lab.answer_when(DASHSCOPE, lambda answer: answer.status == 200)
    lab.kubectl("wait", "--for=condition=Programmed", "--timeout=60s", "llmp", "dashscope")
    before = published(lab)
    lab.cluster.apply(MESH)
    eventually(lambda: published(lab) > before)
    lab.kubectl("-n", "istio-system", "delete", "configmap", "istio")
    lease = lab.cluster.get("lease", "llmplane", "-n", "llmplane-system")
    assert lease["spec"]["holderIdentity"]
    assert "forbidden" not in lab.mesh.log("control-plane").replace("secrets is forbidden", "")


MESH = """
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: "accessLogFile: /dev/stdout"}
"""


def published(lab: KubeLab) -> int:
    return lab.mesh.log("control-plane").count('"published"')


def test_a_replica_may_tell_the_one_that_leads_of_its_proxies(deployed: ApiServer) -> None:
    """As llmplane.replicas does: by server-side apply, also of what is not there yet."""
    metadata = "metadata: {name: llmplane-replicas, namespace: llmplane-system}"
    account = f"--as=system:serviceaccount:{ACCOUNT}"
    for kind in ("apiVersion: v1\nkind: ConfigMap", "apiVersion: coordination.k8s.io/v1\nkind: Lease"):
        answer = deployed.kubectl("apply", "--server-side", account, "-f", "-", text=f"{kind}\n{metadata}\n")
        assert answer.strip().endswith("serverside-applied")


def test_it_may_share_what_stands_in_for_what_envoys_refuse(lab: KubeLab) -> None:
    """A bad provider makes the ConfigMap, a second one changes it."""
    for name in ("first", "second"):
        lab.apply(plain_provider(name))
        lab.kubectl("wait", "--for=condition=Programmed", "--timeout=60s", "llmp", name)
        lab.apply(plain_provider(name, tls="caCertificates: /nowhere/ca.pem"))
        lab.condition_when("llmp", name, "Programmed", lambda found: found.get("reason") == "Refused")
    eventually(lambda: len(shared(lab)) == 2)
    lab.kubectl("delete", "llmp", "first", "second")
    assert "cannot be shared" not in lab.mesh.log("control-plane")


def shared(lab: KubeLab) -> dict[str, str]:
    """Return the entries of the ConfigMap."""
    text = lab.cluster.kubectl("-n", "llmplane-system", "get", "configmaps", "-o", "json")
    found = {each["metadata"]["name"]: each for each in json.loads(text)["items"]}
    data: dict[str, str] = found.get("llmplane-acknowledged", {}).get("binaryData", {})
    return data


def plain_provider(name: str, tls: str = "") -> str:
    return f"""
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata: {{name: {name}}}
spec:
  host: {name}.example.com
  path: /v1/chat/completions
  tls: {{{tls}}}
  configs: {{defaultConfig: {{openAIConfig: {{model: m}}}}}}
"""


@pytest.mark.parametrize(
    "may_not",
    [
        ("list", "secrets", "--all-namespaces"),
        ("get", "secrets", "--namespace=default"),
        ("list", "configmaps", "--namespace=istio-system"),
        ("update", "llmproviders.istio.alibabacloud.com", "--namespace=default"),
        ("create", "pods", "--namespace=llmplane-system"),
        ("update", "leases.coordination.k8s.io/other", "--namespace=llmplane-system"),
        ("patch", "configmaps/other", "--namespace=llmplane-system"),
        ("update", "configmaps/llmplane-replicas", "--namespace=llmplane-system"),
        ("get", "configmaps/other", "--namespace=llmplane-system"),
        ("delete", "pods", "--namespace=default"),
        ("get", "secrets/llmplane-keys", "--namespace=llmplane-system"),
        ("create", "mutatingwebhookconfigurations"),
        ("patch", "mutatingwebhookconfigurations/istio-sidecar-injector"),
    ],
)
def test_what_it_may_not_do(deployed: ApiServer, may_not: tuple[str, ...]) -> None:
    account = f"--as=system:serviceaccount:{ACCOUNT}"
    answer = deployed.kubectl("auth", "can-i", *may_not, account, check=False)
    assert answer.strip() == "no"
