"""A real API server asks the webhooks of a control plane, which has just the rights that deploy/ gives it."""

import base64
import json
import re
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from llmplane import offline
from llmplane.address import Address
from llmplane.certificates import CertificateAuthority
from llmplane.envoy import find_envoy
from llmplane.fakellm import FakeLLM, Host, running_in_thread
from llmplane.local import LocalMesh, end, free_port
from llmplane.meshca import _data
from tests.envoy.conftest import DASHSCOPE, KEYS, own_address
from tests.support.client import ProxyClient
from tests.support.kube import ROOT, ApiServer, KubectlError
from tests.support.wait import eventually
from translator.world import MeshSettings

MANIFESTS = ROOT / "deploy" / "kubernetes"
WEBHOOKS = "mutatingwebhookconfigurations,validatingwebhookconfigurations"
ISTIO_OBJECT = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a}
spec: {}
"""


@dataclass(frozen=True)
class Webhooks:
    """A cluster whose webhooks are answered."""

    cluster: ApiServer
    control_plane: LocalMesh
    address: Address

    def create(self, namespace: str, text: str, *options: str) -> dict[str, Any]:
        """`kubectl create`, and return what came of it. Raises KubectlError."""
        made = self.cluster.kubectl("-n", namespace, "create", "-f", "-", "-o", "json", *options, text=text)
        found: dict[str, Any] = json.loads(made)
        return found

    def certificate(self) -> bytes:
        """Return the certificate that the webhooks show (PEM)."""
        return ssl.get_server_certificate(tuple(self.address)).encode()

    def wait_until_trusted(self) -> None:
        """Wait until the API server can ask them."""
        why = ""

        def are_trusted() -> bool:
            nonlocal why
            try:
                self.create("default", pod(labels={"sidecar.istio.io/inject": "true"}), "--dry-run=server")
                self.create("default", provider(), "--dry-run=server")
                self.create("default", ISTIO_OBJECT, "--dry-run=server")
            except KubectlError as error:
                why = str(error)
                return False
            return True

        try:
            eventually(are_trusted)
        except AssertionError:
            raise AssertionError(f"{why}\n{self.control_plane.log('control-plane')[-3000:]}") from None


@pytest.fixture(scope="module")
def webhooks(cluster: ApiServer) -> Iterator[Webhooks]:
    """Run a control plane as its ServiceAccount, and have the API server ask it on this machine."""
    cluster.kubectl("apply", "-k", str(MANIFESTS))
    cluster.kubectl("delete", WEBHOOKS, "--all")
    directory = Path(tempfile.mkdtemp(prefix="lab-"))
    address = Address("127.0.0.1", free_port())
    authority = CertificateAuthority.create()
    fake = FakeLLM({DASHSCOPE: Host(KEYS[DASHSCOPE])}, ca=authority)
    token = cluster.kubectl("-n", "llmplane-system", "create", "token", "llmplane").strip()
    kubeconfig = cluster.write_kubeconfig(directory / "kubeconfig", token, "llmplane-system")
    with running_in_thread(fake):
        control_plane = LocalMesh(
            directory,
            source=["--kubernetes", "--webhook-address", str(address)],
            serve_options=[
                *("--ca-file", str(authority.write(directory / "ca"))),
                *("--connect-to", f"{DASHSCOPE}:443:{fake.address}"),
            ],
            environment={"KUBECONFIG": str(kubeconfig)},
        )
        running = Webhooks(cluster, control_plane, address)
        try:
            control_plane.start_control_plane()
            for file in (MANIFESTS / "webhooks.yaml", MANIFESTS / "without-istio" / "webhooks.yaml"):
                cluster.apply(*map(yaml.safe_dump, _on_this_machine(file, address)))
            running.wait_until_trusted()
            yield running
        finally:
            control_plane.stop()
            cluster.kubectl("delete", WEBHOOKS, "--all")
            shutil.rmtree(directory, ignore_errors=True)


def _on_this_machine(file: Path, address: Address) -> Iterator[dict[str, Any]]:
    """Yield the manifests as they are, but that the API server asks an address and no Service."""
    for document in yaml.safe_load_all(file.read_text()):
        for webhook in document["webhooks"]:
            path = webhook["clientConfig"]["service"]["path"]
            webhook["clientConfig"] = {"url": f"https://{address}{path}"}
        yield document


def provider(name: str = "a", config: str = "{}") -> str:
    return f"""
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata: {{name: {name}}}
spec:
  host: {DASHSCOPE}
  path: /compatible-mode/v1/chat/completions
  configs: {{defaultConfig: {{openAIConfig: {config}}}}}
"""


def pod(**metadata: Any) -> str:
    made = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": "sleep-", **metadata},
        # Without the API server's ServiceAccount plugin, which needs a controller manager.
        "spec": {"serviceAccountName": "default", "containers": [{"name": "sleep", "image": "sleep"}]},
    }
    return json.dumps(made)


def has_sidecar(pod: dict[str, Any]) -> bool:
    return any(each["name"] == "istio-proxy" for each in pod["spec"].get("initContainers", ()))


def labelled(cluster: ApiServer, namespace: str, label: str) -> str:
    cluster.kubectl("label", "namespace", namespace, label)
    return namespace


class TestValidation:
    def test_an_object_is_refused_in_the_words_of_validate(
        self, webhooks: Webhooks, namespace: str, tmp_path: Path
    ) -> None:
        text = provider(config="{defaults: {b: 1}, overrides: {b: 2}}")
        file = tmp_path / "object.yaml"
        file.write_text(text.replace("{name: a}", f"{{name: a, namespace: {namespace}}}"))
        told = "\n".join(map(str, offline.validate([file], {}, MeshSettings())[1]))
        with pytest.raises(KubectlError) as refused:
            webhooks.create(namespace, text)
        words = str(refused.value).partition("denied the request: ")[2]
        assert words.startswith(
            f"LLMProvider {namespace}/a: spec.configs.defaultConfig.openAIConfig.overrides.b: "
        )
        assert words in told

    def test_an_edit_is_refused_too(self, webhooks: Webhooks, namespace: str) -> None:
        webhooks.create(namespace, provider())
        wrong = provider(config="{defaults: {b: 1}, overrides: {b: 2}}")
        with pytest.raises(KubectlError, match="denied the request"):
            webhooks.cluster.kubectl("-n", namespace, "apply", "-f", "-", text=wrong)

    def test_what_validate_warns_of_is_a_warning(self, webhooks: Webhooks, namespace: str) -> None:
        text = provider(config="{apiKey: sk-1}")
        with pytest.raises(KubectlError, match=r"Warning: LLMProvider .*apiKey.*[\s\S]*1 warning received"):
            webhooks.create(namespace, text, "--warnings-as-errors", "--dry-run=server")
        assert webhooks.create(namespace, text)["spec"]["host"] == DASHSCOPE

    def test_istios_kinds_are_checked_where_there_is_no_istio(
        self, webhooks: Webhooks, namespace: str
    ) -> None:
        policy = {
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": "a"},
            "spec": {"action": "DENY", "rules": [{"when": [{"key": "request.nothing", "values": ["a"]}]}]},
        }
        with pytest.raises(KubectlError, match=r"denied the request: AuthorizationPolicy .*spec\.rules\[0\]"):
            webhooks.create(namespace, json.dumps(policy))


class TestInjection:
    @pytest.mark.parametrize("label", ["istio-injection=enabled", "llmplane-injection=enabled"])
    def test_a_pod_of_a_labelled_namespace_gets_a_sidecar(
        self, webhooks: Webhooks, namespace: str, label: str
    ) -> None:
        labelled(webhooks.cluster, namespace, label)
        made = webhooks.create(namespace, pod())
        assert [each["name"] for each in made["spec"]["initContainers"]] == ["istio-init", "istio-proxy"]
        assert made["spec"]["initContainers"][1]["restartPolicy"] == "Always"
        assert not has_sidecar(webhooks.create(namespace, pod(labels={"sidecar.istio.io/inject": "false"})))
        by_annotation = {"sidecar.istio.io/inject": "false"}
        assert not has_sidecar(webhooks.create(namespace, pod(annotations=by_annotation)))

    def test_elsewhere_only_a_pod_that_asks_for_it(self, webhooks: Webhooks, namespace: str) -> None:
        assert not has_sidecar(webhooks.create(namespace, pod()))
        wish = {"sidecar.istio.io/inject": "true"}
        assert has_sidecar(webhooks.create(namespace, pod(labels=wish)))
        assert has_sidecar(webhooks.create(namespace, pod(annotations=wish)))
        assert not has_sidecar(webhooks.create("kube-system", pod(labels=wish), "--dry-run=server"))
        labelled(webhooks.cluster, namespace, "istio-injection=disabled")
        assert not has_sidecar(webhooks.create(namespace, pod(labels=wish)))

    def test_an_annotation_that_cannot_be_followed_refuses_the_pod(
        self, webhooks: Webhooks, namespace: str
    ) -> None:
        labelled(webhooks.cluster, namespace, "istio-injection=enabled")
        wrong = {"traffic.sidecar.istio.io/excludeOutboundPorts": "http"}
        why = (
            "denied the request: annotation traffic.sidecar.istio.io/excludeOutboundPorts: 'http' is no port"
        )
        with pytest.raises(KubectlError, match=re.escape(why)):
            webhooks.create(namespace, pod(annotations=wrong))

    def test_the_gateways_of_deploy_get_their_proxy(self, webhooks: Webhooks) -> None:
        for name in ("ingress-gateway", "egress-gateway"):
            text = webhooks.cluster.kubectl("kustomize", str(MANIFESTS / name))
            (found,) = (each for each in yaml.safe_load_all(text) if each["kind"] == "Deployment")
            template = {"apiVersion": "v1", "kind": "Pod", **found["spec"]["template"]}
            template["metadata"]["generateName"] = f"{name}-"
            made = webhooks.create("istio-system", json.dumps(template), "--dry-run=server")
            (proxy,) = made["spec"]["containers"]
            assert (proxy["image"], proxy["command"]) == ("llmplane-proxy:0.1.0", ["envoy"])
            assert proxy["imagePullPolicy"] == "IfNotPresent", "an image that a node has is not asked for"
            assert "router~" in proxy["args"][3]
            assert 8080 in {port["containerPort"] for port in proxy["ports"]}

    def test_an_injected_pod_meets_the_restricted_standard_without_capture(
        self, webhooks: Webhooks, namespace: str
    ) -> None:
        labelled(webhooks.cluster, namespace, "istio-injection=enabled")
        labelled(webhooks.cluster, namespace, "pod-security.kubernetes.io/enforce=restricted")
        made = json.loads(pod(annotations={"sidecar.istio.io/interceptionMode": "NONE"}))
        made["spec"]["securityContext"] = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        made["spec"]["containers"][0]["securityContext"] = {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert has_sidecar(webhooks.create(namespace, json.dumps(made)))

    def test_the_documents_client_applied_and_run(
        self, webhooks: Webhooks, namespace: str, tmp_path: Path
    ) -> None:
        """Its sidecar's own command runs here, with the token and the fields that a kubelet would give it."""
        labelled(webhooks.cluster, namespace, "istio-injection=enabled")
        file = ROOT / "examples" / "000-traffic-routing" / "step-1" / "1-sleep.yaml"
        webhooks.cluster.kubectl("-n", namespace, "apply", "-f", str(file))
        deployment = webhooks.cluster.get("deployment", "sleep", "-n", namespace)
        template = {"apiVersion": "v1", "kind": "Pod", **deployment["spec"]["template"]}
        template["metadata"] |= {"name": "sleep", "creationTimestamp": None}
        made = webhooks.create(namespace, json.dumps(template))
        webhooks.create(namespace, provider(config=f"{{model: qwen-turbo, apiKey: {KEYS[DASHSCOPE]}}}"))
        address = own_address()
        process = run_sidecar(webhooks, made, address, tmp_path)
        try:
            client = ProxyClient(address)

            def answered() -> bool:
                with suppress(OSError):
                    return client.request(DASHSCOPE).status == 200
                return False

            try:
                eventually(answered)
            except AssertionError:
                logs = (tmp_path / "log").read_text(), webhooks.control_plane.log("control-plane")
                raise AssertionError("\n".join(log[-3000:] for log in logs)) from None
            (proxy,) = webhooks.control_plane.status()["proxies"]
            assert proxy["node_id"] == f"sidecar~{address}~sleep.{namespace}~{namespace}.svc.cluster.local"
        finally:
            end(process)


def run_sidecar(
    webhooks: Webhooks, made: dict[str, Any], address: str, folder: Path
) -> subprocess.Popen[bytes]:
    """Do what a kubelet does with a pod's istio-proxy, on an address and in a folder of its own."""
    metadata = made["metadata"]
    (container,) = (each for each in made["spec"]["initContainers"] if each["name"] == "istio-proxy")
    fields = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "status.podIP": address,
        "status.podIPs": address,
    }
    values = {each["name"]: fields[each["valueFrom"]["fieldRef"]["fieldPath"]] for each in container["env"]}
    here = {
        "/etc/llmplane": str(folder / "image"),
        "/etc/istio/proxy": str(folder / "own"),
        "/var/run/secrets/tokens": str(folder / "tokens"),
        "0.0.0.0": address,  # noqa: S104
        '"BIND_ADDRESS":"127.0.0.1"': f'"BIND_ADDRESS":"{address}"',
        '{"address":"llmplane.llmplane-system.svc"': '{"address":"127.0.0.1"',
    }

    def moved(text: str) -> str:
        for there, place in here.items():
            text = text.replace(there, place)
        return re.sub(r"\$\((\w+)\)", lambda name: values[name[1]], text)

    for name in ("image", "own", "tokens"):
        (folder / name).mkdir()
    token = webhooks.cluster.pod_token(metadata["namespace"], metadata["name"])
    (folder / "tokens" / "istio-token").write_text(token)
    dockerfile = (ROOT / "deploy" / "image" / "Dockerfile").read_text()
    (copied,) = re.findall(r"^COPY (.+) /etc/llmplane/$", dockerfile, re.MULTILINE)
    for file in (ROOT / name for name in copied.split()):
        (folder / "image" / file.name).write_text(moved(file.read_text()))
    assert container["command"] == ["envoy"]
    arguments = [moved(argument) for argument in container["args"]]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen([str(find_envoy()), *arguments], stdout=log, stderr=log)


class TestCertificates:
    def test_another_authority_is_taken_without_a_restart(self, webhooks: Webhooks) -> None:
        """The one that ends soon does not issue any more, but is trusted."""
        old = CertificateAuthority.create("llmplane", timedelta(days=20))
        new = CertificateAuthority.create("llmplane", timedelta(days=3000))
        patch = json.dumps({"data": _data([old, new])})
        webhooks.cluster.kubectl("-n", "llmplane-system", "patch", "secret", "llmplane-ca", "-p", patch)

        def is_of_the_new_one() -> bool:
            shown = x509.load_pem_x509_certificate(webhooks.certificate())
            try:
                shown.verify_directly_issued_by(new.certificate)
            except InvalidSignature:
                return False
            return True

        def are_both_trusted() -> bool:
            found = webhooks.cluster.get("mutatingwebhookconfiguration", "llmplane")["webhooks"]
            bundles = {base64.b64decode(each["clientConfig"]["caBundle"]) for each in found}
            return bundles == {old.pem + new.pem}

        eventually(is_of_the_new_one)
        eventually(are_both_trusted)
        webhooks.wait_until_trusted()

    def test_nothing_gets_by_while_no_webhook_answers(self, webhooks: Webhooks, namespace: str) -> None:
        """But pods that need no sidecar start."""
        authority = webhooks.cluster.get("secret", "llmplane-ca", "-n", "llmplane-system")["data"]
        assert webhooks.control_plane.control_plane
        end(webhooks.control_plane.control_plane)
        try:
            webhooks.create(namespace, pod())
            labelled(webhooks.cluster, namespace, "istio-injection=enabled")
            with pytest.raises(KubectlError, match="failed calling webhook"):
                webhooks.create(namespace, pod())
            webhooks.create(namespace, pod(labels={"sidecar.istio.io/inject": "false"}))
            with pytest.raises(KubectlError, match="failed calling webhook"):
                webhooks.create(namespace, provider())
        finally:
            webhooks.control_plane.start_control_plane()
        webhooks.wait_until_trusted()
        again = webhooks.cluster.get("secret", "llmplane-ca", "-n", "llmplane-system")["data"]
        assert again == authority
