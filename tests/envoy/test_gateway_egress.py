"""Egress gateways: sidecars and ingress gateways without any key send to the gateway that alone has it."""

import http.client
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmplane.certificates import CertificateAuthority, write_pair
from llmplane.fakellm import fingerprint
from tests.envoy.conftest import DASHSCOPE, KEYS, Lab, own_address, running_lab
from tests.support.client import GatewayClient
from tests.support.wait import eventually

EXAMPLE = Path(__file__).parents[2] / "examples" / "egress-gateway"
EGRESS = "istio-egressgateway.istio-system.svc.cluster.local:80"


@dataclass(frozen=True)
class Workload:
    """The files of a workload's certificate."""

    directory: Path
    authority: CertificateAuthority

    def certify(self, identity: str, authority: CertificateAuthority | None = None) -> None:
        """Issue a certificate for `DOMAIN/ns/NAMESPACE/sa/NAME`, in the place of the one before."""
        pair = (authority or self.authority).issue(f"spiffe://{identity}")
        write_pair(self.directory / "cert.pem", self.directory / "key.pem", pair)

    @property
    def options(self) -> list[str]:
        """Options of `llmplane proxy`."""
        files = {"cert": "cert.pem", "key": "key.pem", "ca": "ca.pem"}
        return [f"--workload-{name}={self.directory / file}" for name, file in files.items()]

    def context(self) -> ssl.SSLContext:
        """Return the TLS context of a client with this certificate, that takes any server."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.load_cert_chain(self.directory / "cert.pem", self.directory / "key.pem")
        return context


@dataclass(frozen=True)
class Mesh:
    """A lab with three Envoys."""

    lab: Lab
    ingress: GatewayClient
    egress: str
    sidecar: Workload
    egress_workload: Workload

    def served_by_egress(self) -> bytes:
        """Return the certificate that the egress gateway shows to the sidecar."""
        with (
            socket.create_connection((self.egress, 8080), 10) as connection,
            self.sidecar.context().wrap_socket(connection, server_hostname=DASHSCOPE) as tls,
        ):
            return tls.getpeercert(binary_form=True) or b""

    def client_of_egress(self, context: ssl.SSLContext | None) -> GatewayClient:
        """Return a client that goes to the egress gateway itself."""
        return GatewayClient(self.egress, 8080, context)


@contextmanager
def running_mesh(folder: Path) -> Iterator[Mesh]:
    authority = CertificateAuthority.create()
    workloads = {}
    for name, identity in {
        "sleep": "default/sa/sleep",
        "ingress": "istio-system/sa/ingress",
        "egress": "istio-system/sa/egress",
    }.items():
        authority.write(folder / name)
        workloads[name] = Workload(folder / name, authority)
        workloads[name].certify(f"cluster.local/ns/{identity}")
    egress, ingress = own_address(), own_address()
    with running_lab(
        options=["--connect-to", f"{EGRESS}:{egress}:8080"], proxy_options=workloads["sleep"].options
    ) as lab:
        lab.start_gateway(options=workloads["ingress"].options, bind_address=ingress)
        labels = {"istio": "egressgateway"}
        options = workloads["egress"].options
        lab.start_gateway("istio-egressgateway", labels=labels, options=options, bind_address=egress)
        yield Mesh(lab, GatewayClient(ingress), egress, workloads["sleep"], workloads["egress"])


@pytest.fixture(scope="module")
def shared_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with running_mesh(tmp_path_factory.mktemp("workloads")) as mesh:
        yield mesh


@pytest.fixture
def mesh(shared_mesh: Mesh) -> Mesh:
    """Give three Envoys with the objects of examples/egress-gateway."""
    files = sorted(EXAMPLE.glob("*.yaml"))
    shared_mesh.lab.apply(*(file.read_text(encoding="utf-8") for file in files))
    shared_mesh.lab.fake.forget()
    return shared_mesh


def test_a_sidecar_without_a_key_is_answered_by_way_of_the_egress_gateway(mesh: Mesh) -> None:
    answer = mesh.lab.client.request(DASHSCOPE)
    assert (answer.status, answer.json()["model"]) == (200, "qwen-1.8b-chat")
    seen = mesh.lab.seen()
    assert (seen.sni, seen.path) == (DASHSCOPE, "/compatible-mode/v1/chat/completions")
    assert seen.key_fingerprint == fingerprint(KEYS[DASHSCOPE])


def test_clients_from_outside_come_in_by_the_ingress_and_leave_by_the_egress(mesh: Mesh) -> None:
    assert mesh.ingress.request("test.com").json()["model"] == "qwen-1.8b-chat"
    assert mesh.lab.seen().key_fingerprint == fingerprint(KEYS[DASHSCOPE])


def test_a_short_name_of_a_service_reaches_the_egress_gateway_in_full(mesh: Mesh) -> None:
    assert mesh.lab.client.request("demo-llm-server").json()["model"] == "qwen-1.8b-chat"


def test_only_the_egress_gateway_has_keys_and_a_way_out(mesh: Mesh) -> None:
    """The documents' promise."""
    for workload, has_key in {
        "sleep": False,
        "istio-ingressgateway": False,
        "istio-egressgateway": True,
    }.items():
        assert mesh.lab.client.request(DASHSCOPE).status == 200
        dump = mesh.lab.envoy_admin("/config_dump", workload)
        assert ("api-key/istio-system/dashscope" in dump) == has_key, workload
        assert (f"outbound|443||{DASHSCOPE}" in dump) == has_key, workload
        assert KEYS[DASHSCOPE] not in dump


def test_the_clients_own_credentials_get_to_the_egress_gateway_and_no_further(mesh: Mesh) -> None:
    """There they can be checked (RequestAuthentication); to the provider they never go."""
    headers = {"authorization": "Bearer of-the-client", "cookie": "a=b"}
    assert mesh.lab.client.request(DASHSCOPE, headers=headers).status == 200
    seen = mesh.lab.seen()
    assert seen.key_fingerprint == fingerprint(KEYS[DASHSCOPE])
    assert "cookie" not in {name.lower() for name, _ in seen.headers}


def refuses(client: GatewayClient) -> bool:
    try:
        client.request(DASHSCOPE)
    except (ssl.SSLError, ConnectionError, http.client.BadStatusLine):
        return True
    return False


def test_whoever_is_not_of_the_mesh_is_refused(mesh: Mesh, tmp_path: Path) -> None:
    stranger = Workload(tmp_path, CertificateAuthority.create())
    stranger.certify("cluster.local/ns/default/sa/sleep")
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname = False
    nobody.verify_mode = ssl.CERT_NONE
    assert mesh.client_of_egress(mesh.sidecar.context()).request(DASHSCOPE).status == 200
    assert refuses(mesh.client_of_egress(None)), "plain HTTP"
    assert refuses(mesh.client_of_egress(nobody)), "no certificate"
    assert refuses(mesh.client_of_egress(stranger.context())), "another CA"
    stranger.certify("elsewhere.org/ns/default/sa/sleep", mesh.sidecar.authority)
    assert refuses(mesh.client_of_egress(stranger.context())), "another trust domain"


def test_certificates_of_workloads_rotate_without_a_restart(mesh: Mesh) -> None:
    """Connections that are open go on with the one before."""
    before = mesh.served_by_egress()
    mesh.egress_workload.certify("cluster.local/ns/istio-system/sa/egress")
    eventually(lambda: mesh.served_by_egress() != before)
    assert mesh.lab.client.request(DASHSCOPE).status == 200


def test_a_service_that_is_gone_is_a_503_and_told(mesh: Mesh) -> None:
    files = [file for file in sorted(EXAMPLE.glob("*.yaml")) if "service" not in file.name]
    mesh.lab.apply(*(file.read_text(encoding="utf-8") for file in files))
    assert mesh.lab.client.request(DASHSCOPE).status == 503
    met, reason, message = mesh.lab.condition("dashscope-route")
    assert (met, reason) == (False, "BackendNotFound")
    assert "Service istio-system/istio-egressgateway does not exist" in message


def test_an_egress_gateway_that_is_away_is_a_503(mesh: Mesh) -> None:
    texts = [file.read_text(encoding="utf-8") for file in sorted(EXAMPLE.glob("*.yaml"))]
    mesh.lab.apply(*(text.replace("targetPort: 8080", "targetPort: 8081") for text in texts))
    eventually(lambda: mesh.lab.client.request(DASHSCOPE).status == 503)
