"""AuthorizationPolicies that look at the client's certificate, on a real gateway with mutual TLS."""

import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmplane.certificates import CertificateAuthority, write_pair
from tests.envoy.conftest import DASHSCOPE, KEYS, Lab, running_lab
from tests.support.client import GatewayClient
from tests.support.objects import backends, provider, route
from tests.support.policies import HOST, authorization_policy, istio_object

LONG = "a-service-account-with-a-name-of-the-length-that-generated-names-have"


@dataclass(frozen=True)
class Gateway:
    """A gateway that takes clients with a certificate only."""

    lab: Lab
    authority: CertificateAuthority
    folder: Path

    def apply(self, *policies: str) -> None:
        files = {
            "serverCertificate": "server.pem",
            "privateKey": "server-key.pem",
            "caCertificates": "ca.pem",
        }
        server = {
            "hosts": [HOST],
            "port": {"name": "https", "number": 443, "protocol": "HTTPS"},
            "tls": {"mode": "MUTUAL"} | {name: str(self.folder / file) for name, file in files.items()},
        }
        spec = {"selector": {"istio": "ingressgateway"}, "servers": [server]}
        self.lab.apply(
            istio_object("networking.istio.io/v1", "Gateway", "istio-system/ingress-gw", spec),
            provider("istio-system/provider", DASHSCOPE, KEYS[DASHSCOPE]),
            route("test", HOST, {"backendRefs": backends(DASHSCOPE)}, gateways=["istio-system/ingress-gw"]),
            *policies,
        )

    def ask(self, identity: str) -> int:
        """Send a request with the certificate of an identity (`DOMAIN/ns/NAMESPACE/sa/NAME`)."""
        pair = self.folder / "client.pem", self.folder / "client-key.pem"
        write_pair(*pair, self.authority.issue(f"spiffe://{identity}"))
        context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        context.load_cert_chain(*pair)
        address = self.lab.mesh.gateways[0].bind_address
        return GatewayClient(address, 443, context).request(HOST).status


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("certificates")
    authority = CertificateAuthority.create()
    authority.write(folder)
    write_pair(folder / "server.pem", folder / "server-key.pem", authority.issue(HOST))
    config = folder / "mesh.yaml"
    config.write_text(json.dumps({"trustDomain": "new-td", "trustDomainAliases": ["old-td"]}))
    with running_lab(options=["--mesh-config", str(config)]) as lab:
        lab.start_gateway()
        yield Gateway(lab, authority, folder)


TEAM_A = "new-td/ns/team-a/sa/app"


@pytest.mark.parametrize(
    ("source", "allowed", "denied"),
    [
        ({"principals": [TEAM_A]}, TEAM_A, "new-td/ns/team-a/sa/other"),
        ({"principals": [TEAM_A]}, "old-td/ns/team-a/sa/app", "partner/ns/team-a/sa/app"),
        ({"principals": ["cluster.local/ns/team-a/sa/app"]}, TEAM_A, "new-td/ns/team-b/sa/app"),
        ({"principals": ["*/sa/app"]}, TEAM_A, "new-td/ns/team-a/sa/app2"),
        ({"notPrincipals": ["*/sa/bot"]}, TEAM_A, "new-td/ns/team-a/sa/bot"),
        ({"namespaces": ["team-a"]}, TEAM_A, "new-td/ns/team-a2/sa/app"),
        ({"namespaces": ["team-*"]}, TEAM_A, "new-td/ns/guests/sa/team-a"),
        ({"notNamespaces": ["guests"]}, TEAM_A, "new-td/ns/guests/sa/app"),
        ({"serviceAccounts": ["team-a/app"]}, TEAM_A, "new-td/ns/team-a/sa/app-2"),
        ({"serviceAccounts": ["app"]}, "new-td/ns/istio-system/sa/app", TEAM_A),
        ({"serviceAccounts": [f"team-a/{LONG}"]}, f"new-td/ns/team-a/sa/{LONG}", TEAM_A),
        ({"trustDomains": ["old-td"]}, TEAM_A, "partner/ns/team-a/sa/app"),
    ],
)
def test_sources(gateway: Gateway, source: dict[str, Any], allowed: str, denied: str) -> None:
    gateway.apply(authorization_policy({"from": [{"source": source}]}))
    assert (gateway.ask(allowed), gateway.ask(denied)) == (200, 403)


@pytest.mark.parametrize(
    ("condition", "denied"),
    [
        ({"key": "source.namespace", "values": ["team-a"]}, "new-td/ns/team-b/sa/app"),
        ({"key": "source.principal", "values": [TEAM_A]}, "new-td/ns/team-b/sa/app"),
        ({"key": "source.serviceAccount", "notValues": ["team-a/bot"]}, "new-td/ns/team-a/sa/bot"),
        ({"key": "source.trustDomain", "values": ["new-td"]}, "partner/ns/team-a/sa/app"),
    ],
)
def test_conditions(gateway: Gateway, condition: dict[str, Any], denied: str) -> None:
    gateway.apply(authorization_policy({"when": [condition]}))
    assert (gateway.ask(TEAM_A), gateway.ask(denied)) == (200, 403)


@pytest.mark.parametrize(("name", "status"), [("test.com", 200), ("*.com", 200), ("other.com", 403)])
def test_the_name_in_the_tls_handshake(gateway: Gateway, name: str, status: int) -> None:
    gateway.apply(authorization_policy({"when": [{"key": "connection.sni", "values": [name]}]}))
    assert gateway.ask(TEAM_A) == status
