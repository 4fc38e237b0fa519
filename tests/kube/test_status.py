"""The status of objects with two replicas, events, and the status of Istio's kinds, on a real API server."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.envoy.conftest import DASHSCOPE, KEYS
from tests.kube.lab import KubeLab, running_kube_lab
from tests.support.kube import ApiServer
from tests.support.wait import eventually

NAMESPACE = "replicas"
NOWHERE = "/nowhere/ca.pem"
"""A path on Envoy's machine: the control plane cannot know that nothing is there."""


@pytest.fixture(scope="module")
def replicas(cluster: ApiServer) -> Iterator[list[KubeLab]]:
    """Run two replicas with one sidecar each, those of the Pods `one` and `two`."""
    cluster.kubectl("create", "namespace", NAMESPACE)
    with (
        running_kube_lab(cluster, NAMESPACE, pod="one") as one,
        running_kube_lab(cluster, NAMESPACE, pod="two") as two,
    ):
        yield [one, two]


@pytest.fixture(autouse=True)
def clean(replicas: list[KubeLab]) -> Iterator[None]:
    yield
    replicas[0].kubectl("delete", "llmproviders,events,authorizationpolicies", "--all", "--wait")


def provider(model: str, *, key: str = "", tls: str = "", app: str = "") -> str:
    selector = f"workloadSelector: {{labels: {{app: {app}}}}}" if app else ""
    return f"""
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata: {{name: dashscope, namespace: {NAMESPACE}}}
spec:
  host: {DASHSCOPE}
  path: /compatible-mode/v1/chat/completions
  {selector}
  tls: {{{tls}}}
  configs: {{defaultConfig: {{openAIConfig: {{model: {model}, {key or f"apiKey: {KEYS[DASHSCOPE]}"}}}}}}}
"""


def by_role(replicas: list[KubeLab]) -> tuple[KubeLab, KubeLab]:
    """Return the replica that leads, and the other one."""

    def leader() -> KubeLab | None:
        lease = replicas[0].cluster.get("lease", "llmplane", "-n", "default")
        holder = lease["spec"]["holderIdentity"]
        running = ((lab.mesh.control_plane, lab) for lab in replicas)
        return next((lab for process, lab in running if process and f"_{process.pid}_" in holder), None)

    eventually(leader, 60)
    first = leader()
    assert first
    return first, next(lab for lab in replicas if lab is not first)


def programmed(lab: KubeLab) -> dict[str, Any]:
    """Return the condition of the provider."""
    status = lab.cluster.get("llmprovider", "dashscope", "-n", NAMESPACE).get("status", {})
    return next((each for each in status.get("conditions", ()) if each["type"] == "Programmed"), {})


def says(lab: KubeLab, message: str, *, status: str = "True") -> bool:
    found = programmed(lab)
    return (found.get("status"), found.get("message")) == (status, message)


def test_the_proxies_of_all_replicas_are_added_up_also_when_the_leader_is_killed(
    replicas: list[KubeLab],
) -> None:
    leader, other = by_role(replicas)
    leader.apply(provider("m"))
    eventually(lambda: says(leader, "2/2 proxies"))

    assert leader.mesh.control_plane
    leader.mesh.control_plane.kill()
    leader.mesh.control_plane.wait()
    # Its proxy is of no replica now, and of the first one again as soon as that is back.
    other.apply(provider("another"))
    eventually(lambda: says(other, "1/1 proxies") and programmed(other)["observedGeneration"] == 2, 90)
    leader.mesh.start_control_plane()
    eventually(lambda: says(other, "2/2 proxies"), 60)
    other.apply(provider("a-third"))
    eventually(lambda: says(other, "2/2 proxies") and programmed(other)["observedGeneration"] == 3)
    assert by_role(replicas)[0] is other


def test_what_envoy_says_at_the_other_replica_is_on_the_object(replicas: list[KubeLab]) -> None:
    leader, other = by_role(replicas)
    app = "one" if other is replicas[0] else "two"
    leader.apply(provider("m", app=app))
    eventually(lambda: says(leader, "1/1 proxies"))
    leader.apply(provider("m", app=app, tls=f"caCertificates: {NOWHERE}"))
    eventually(lambda: programmed(leader).get("reason") == "Refused")
    found = programmed(leader)
    assert found["status"] == "False"
    assert found["message"].startswith("0/1 proxies; sidecar~")
    assert NOWHERE in found["message"], "Envoy's own words"
    eventually(lambda: "Refused" in events_of(leader))
    assert NOWHERE in events_of(leader)["Refused"]["note"]


def events_of(lab: KubeLab) -> dict[str, dict[str, Any]]:
    """Return the events of the provider by their reasons; there is one of each."""
    uid = lab.cluster.get("llmprovider", "dashscope", "-n", NAMESPACE)["metadata"]["uid"]
    about = f"regarding.kind=LLMProvider,regarding.name=dashscope,regarding.uid={uid}"
    text = lab.kubectl("get", "events.v1.events.k8s.io", "--field-selector", about, "-o", "json")
    found = json.loads(text)["items"]
    events = {event["reason"]: event for event in found}
    assert len(events) == len(found)
    return events


def test_what_somebody_must_act_on_is_an_event(replicas: list[KubeLab]) -> None:
    lab, _ = by_role(replicas)
    lab.apply(provider("m", key="apiKeySecretRef: {name: nothing, key: k}"))
    eventually(lambda: "SecretNotFound" in events_of(lab))
    assert "Secret replicas/nothing does not exist" in events_of(lab)["SecretNotFound"]["note"]
    lab.apply(provider("m"))
    eventually(lambda: "Warning" in events_of(lab))
    assert "put the key into a Secret" in events_of(lab)["Warning"]["note"]
    lab.apply(provider("m", key="defaults: {a: 1}, overrides: {a: 2}"))
    eventually(lambda: "Invalid" in events_of(lab))
    described = lab.kubectl("describe", "llmprovider", "dashscope")
    assert "'a' is in defaults too" in described


POLICY = f"""
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: custom, namespace: {NAMESPACE}}}
spec: {{action: CUSTOM, provider: {{name: nobody}}, rules: [{{}}]}}
"""


def test_istios_kinds_have_a_status_where_they_are_those_of_this_project(replicas: list[KubeLab]) -> None:
    """Where Istio installed its own, their status is Istio's (tests/unit/test_kubernetes_status.py)."""
    lab, _ = by_role(replicas)
    lab.apply(POLICY)
    found = lab.condition_when("authorizationpolicy", "custom", "ResolvedRefs", bool)
    assert (found["status"], found["reason"]) == ("False", "ProviderNotFound")
