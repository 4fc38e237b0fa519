"""HTTPS at a gateway: certificates by host, their rotation, clients' certificates, and what goes wrong."""

import http.client
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509

from llmplane.certificates import CertificateAuthority, write_pair
from tests.envoy.conftest import DASHSCOPE, KEYS, Lab, running_lab
from tests.support.client import MESSAGES, GatewayClient
from tests.support.objects import backends, gateway, provider, route, secret, server
from tests.support.wait import eventually

EXAMPLES = Path(__file__).parents[2] / "examples"
A, B, C = "a.example.com", "b.example.com", "c.example.com"
PROVIDER = provider("istio-system/llm", DASHSCOPE, KEYS[DASHSCOPE], model="m")
TO_LLM = {"backendRefs": backends(DASHSCOPE)}


@dataclass(frozen=True)
class TlsLab:
    lab: Lab
    address: str
    folder: Path

    def client(self, context: ssl.SSLContext | None = None, sni: str | None = None) -> GatewayClient:
        """Return a client of port 443 that trusts the lab's CA."""
        return GatewayClient(self.address, 443, context or self.lab.authority.client_context(), sni)

    def certificate(self, *names: str) -> dict[str, str]:
        """Return the values of a Secret of the type kubernetes.io/tls."""
        chain, key = self.lab.authority.issue(*names)
        return {"tls.crt": chain.decode(), "tls.key": key.decode()}

    def apply(self, *objects: str) -> None:
        """Apply objects, and a route for each host that leads to the provider."""
        routes = [route(host[0], host, TO_LLM, gateways=["istio-system/gw"]) for host in (A, B, C)]
        self.lab.apply(PROVIDER, *objects, *routes)

    def served(self, host: str) -> x509.Certificate:
        """Return the certificate that a client is shown for a host."""
        context = self.lab.authority.client_context()
        with (
            socket.create_connection((self.address, 443), 10) as connection,
            context.wrap_socket(connection, server_hostname=host) as tls,
        ):
            return x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")

    def refuses(self, client: GatewayClient, host: str) -> bool:
        """Whether a request is refused below HTTP."""
        try:
            client.request(host)
        except (ssl.SSLError, ConnectionError, http.client.BadStatusLine):
            return True
        return False


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsLab]:
    with running_lab() as lab:
        found = lab.start_gateway()
        yield TlsLab(lab, found.bind_address, tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls(shared: TlsLab) -> TlsLab:
    shared.lab.apply("")
    shared.lab.fake.forget()
    return shared


def https(*hosts: str, mode: str = "SIMPLE", name: str = "https", **settings: object) -> dict[str, object]:
    return {
        **server(*hosts, protocol="HTTPS", number=443, tls={"mode": mode, **settings}),
        "port": {"name": name, "number": 443, "protocol": "HTTPS"},
    }


def test_each_host_has_its_certificate_and_only_its_routes(tls: TlsLab) -> None:
    tls.apply(
        secret("istio-system/a", tls.certificate(A)),
        secret("istio-system/b", tls.certificate(B)),
        gateway(
            "istio-system/gw",
            https(A, name="a", credentialName="a"),
            https(B, name="b", credentialName="b"),
        ),
    )
    assert tls.client().request(A).status == 200
    assert tls.client().request(B).status == 200
    wrong = tls.client(sni=A).request(B)
    assert (wrong.status, wrong.error["code"]) == (404, "route_not_found")
    assert tls.refuses(tls.client(), C), "no server has this name"


def test_a_certificate_is_replaced_while_connections_go_on(tls: TlsLab) -> None:
    gw = gateway("istio-system/gw", https(A, credentialName="a"))
    tls.apply(secret("istio-system/a", tls.certificate(A)), gw)
    before = tls.served(A)
    connection = http.client.HTTPSConnection(tls.address, 443, timeout=60)
    raw = socket.create_connection((tls.address, 443), 10)
    connection.sock = tls.lab.authority.client_context().wrap_socket(raw, server_hostname=A)
    with connection.sock:
        connection.request("GET", "/models", headers={"Host": A})
        assert connection.getresponse().read()
        tls.apply(secret("istio-system/a", tls.certificate(A)), gw)
        eventually(lambda: tls.served(A) != before)
        connection.request("GET", "/models", headers={"Host": A})
        assert connection.getresponse().read(), "the connection of before goes on"


def test_certificates_in_files_are_read_again_when_they_change(tls: TlsLab) -> None:
    files = tls.folder / "cert.pem", tls.folder / "key.pem"
    write_pair(*files, tls.lab.authority.issue(A))
    paths = {"serverCertificate": str(files[0]), "privateKey": str(files[1])}
    tls.apply(gateway("istio-system/gw", https(A, **paths)))
    before = tls.served(A)
    write_pair(*files, tls.lab.authority.issue(A))
    eventually(lambda: tls.served(A) != before)


def test_http_2_is_spoken_where_the_client_offers_it(tls: TlsLab) -> None:
    tls.apply(
        secret("istio-system/a", tls.certificate(A)), gateway("istio-system/gw", https(A, credentialName="a"))
    )
    for offered, chosen in ((["h2", "http/1.1"], "h2"), (["http/1.1"], "http/1.1"), ([], None)):
        context = tls.lab.authority.client_context()
        if offered:
            context.set_alpn_protocols(offered)
        with (
            socket.create_connection((tls.address, 443), 10) as connection,
            context.wrap_socket(connection, server_hostname=A) as wrapped,
        ):
            assert wrapped.selected_alpn_protocol() == chosen


def test_clients_without_a_good_certificate_are_refused(tls: TlsLab) -> None:
    clients = CertificateAuthority.create()
    tls.apply(
        secret("istio-system/a", tls.certificate(A)),
        secret("istio-system/a-cacert", {"cacert": clients.pem.decode()}),
        secret("istio-system/b", {**tls.certificate(B), "ca.crt": clients.pem.decode()}),
        gateway(
            "istio-system/gw",
            https(A, name="a", mode="MUTUAL", credentialName="a"),
            https(B, name="b", mode="OPTIONAL_MUTUAL", credentialName="b"),
        ),
    )

    def shown(authority: CertificateAuthority) -> ssl.SSLContext:
        context = tls.lab.authority.client_context()
        files = tls.folder / "client.pem", tls.folder / "client-key.pem"
        write_pair(*files, authority.issue("spiffe://elsewhere.org/ns/a/sa/partner"))
        context.load_cert_chain(*files)
        return context

    good, bad = shown(clients), shown(CertificateAuthority.create())
    assert tls.client(good).request(A).status == 200
    assert tls.refuses(tls.client(), A)
    assert tls.refuses(tls.client(bad), A)
    assert tls.client(good).request(B).status == 200
    assert tls.client().request(B).status == 200
    assert tls.refuses(tls.client(bad), B)


@pytest.mark.parametrize("opened", ["*.example.com", "*"])
@pytest.mark.parametrize("routed", [(A, B), ("*.example.com",), ("*",)])
def test_no_open_connection_reaches_a_host_that_asks_for_certificates(
    tls: TlsLab, opened: str, routed: tuple[str, ...]
) -> None:
    """Domain fronting: the name in the handshake is one of the open server, the Host that of the other."""
    clients = CertificateAuthority.create()
    tls.lab.apply(
        PROVIDER,
        secret("istio-system/open", tls.certificate("*.example.com")),
        secret("istio-system/b", {**tls.certificate(B), "ca.crt": clients.pem.decode()}),
        gateway("istio-system/gw", https(opened, name="open", credentialName="open")),
        gateway(
            "istio-system/partners", https(B, "*.b.example.com", name="b", mode="MUTUAL", credentialName="b")
        ),
        *(route(f"r{i}", host, TO_LLM, gateways=["istio-system/gw"]) for i, host in enumerate(routed)),
    )
    client = tls.client(sni=A)
    assert client.request(A).status == 200
    for host in (B, B.upper(), f"{B}.:443", f"a.{B}"):
        answer = client.request(host)
        assert (answer.status, answer.error["code"]) == (421, "misdirected_request")
    assert [seen.method for seen in tls.lab.all_seen()] == ["POST"]


def test_a_host_that_asks_for_certificates_stays_closed_while_its_secret_is_missing(tls: TlsLab) -> None:
    """Its server is left out, but the wildcard of another one does not take its place."""
    tls.apply(
        secret("istio-system/open", tls.certificate("*.example.com")),
        gateway(
            "istio-system/gw",
            https("*.example.com", name="open", credentialName="open"),
            https(B, name="b", mode="MUTUAL", credentialName="not-there-yet"),
        ),
    )
    assert tls.client().request(A).status == 200
    answer = tls.client().request(B)
    assert (answer.status, answer.error["code"]) == (421, "misdirected_request")


def test_old_versions_of_tls_are_refused(tls: TlsLab) -> None:
    tls.apply(
        secret("istio-system/a", tls.certificate(A)),
        gateway("istio-system/gw", https(A, credentialName="a", minProtocolVersion="TLSV1_3")),
    )
    context = tls.lab.authority.client_context()
    assert tls.client(context).request(A).status == 200
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert tls.refuses(tls.client(context), A)


def test_plain_http_is_redirected(tls: TlsLab) -> None:
    tls.apply(
        secret("istio-system/a", tls.certificate(A)),
        gateway("istio-system/gw", server("*", tls={"httpsRedirect": True}), https(A, credentialName="a")),
    )
    for host in (A, "unknown.example.com"):
        claims = {"x-forwarded-proto": "https", "x-forwarded-scheme": "https", "forwarded": "proto=https"}
        answer = GatewayClient(tls.address).request(host, headers=claims, path="/v1/chat/completions")
        assert (answer.status, answer.headers["location"]) == (301, f"https://{host}/v1/chat/completions")
    assert tls.client().request(A).status == 200
    assert [seen.provider for seen in tls.lab.all_seen()] == [DASHSCOPE]


def test_the_example_of_a_locked_down_gateway(tls: TlsLab) -> None:
    """Each host belongs to one namespace, partners need a certificate, and nobody takes a host over."""
    gateway_, provider_, routes = (
        (EXAMPLES / "locked-down-gateway" / name).read_text(encoding="utf-8")
        for name in ("1-gateway.yaml", "2-llmprovider.yaml", "3-llmroutes.yaml")
    )
    takeover = (EXAMPLES / "locked-down-gateway-takeover" / "takeover.yaml").read_text(encoding="utf-8")
    llm, partners = "llm.example.com", "partners.example.com"
    common = (
        gateway_,
        provider_,
        secret("istio-system/llm-example-com", tls.certificate(llm)),
        secret("istio-system/partners", tls.certificate(partners)),
        secret("istio-system/partners-cacert", {"cacert": tls.lab.authority.pem.decode()}),
        secret("istio-system/dashscope", {"api-key": KEYS[DASHSCOPE]}),
    )
    with_certificate = tls.lab.authority.client_context()
    files = tls.folder / "partner.pem", tls.folder / "partner-key.pem"
    write_pair(*files, tls.lab.authority.issue("spiffe://example.org/ns/a/sa/partner"))
    with_certificate.load_cert_chain(*files)

    tls.lab.apply(*common, routes)
    assert tls.client().request(llm).status == 200
    assert tls.client(with_certificate).request(partners).status == 200
    assert tls.refuses(tls.client(), partners)
    assert tls.client(sni=llm).request(partners).status == 404
    assert GatewayClient(tls.address).request(llm).status == 301
    tls.lab.apply(*common, takeover)
    assert tls.client(with_certificate).request(partners).status == 404
    met, reason, message = tls.lab.condition("takeover", "Accepted")
    assert (met, reason) == (False, "NotAllowedByGateway")
    assert "does not take host partners.example.com from namespace team-a" in message


def test_a_missing_secret_holds_up_nothing(tls: TlsLab) -> None:
    """Envoy would wait 15 s for it, with all listeners of its start."""
    gw = gateway(
        "istio-system/gw",
        server(A),
        https(A, name="a", credentialName="a"),
        https(B, name="b", credentialName="not-there-yet"),
    )
    tls.apply(secret("istio-system/a", tls.certificate(A)), gw)
    assert tls.client().request(A).status == 200
    assert GatewayClient(tls.address).request(A).status == 200
    assert tls.refuses(tls.client(), B)
    met, reason, message = tls.lab.condition("gw")
    assert (met, reason) == (False, "SecretNotFound")
    assert "Secret istio-system/not-there-yet does not exist" in message
    secrets = [secret("istio-system/a", tls.certificate(A))]
    secrets.append(secret("istio-system/not-there-yet", tls.certificate(B)))
    tls.apply(*secrets, gw)
    eventually(lambda: not tls.refuses(tls.client(), B))


def test_a_conflict_is_a_status_and_not_a_broken_listener(tls: TlsLab) -> None:
    tls.apply(
        secret("istio-system/a", tls.certificate(A)),
        gateway("istio-system/gw", https(A, credentialName="a")),
        gateway("istio-system/plain", server(A, number=443)),
        gateway("istio-system/twice", https(A, B, credentialName="a")),
    )
    assert tls.client().request(A).status == 200
    assert "already taken by Gateway istio-system/gw for HTTPS" in tls.lab.condition("plain", "Accepted")[2]
    assert f"{A} at port 443 is already taken" in tls.lab.condition("twice", "Accepted")[2]


def test_the_key_is_not_in_a_dump(tls: TlsLab) -> None:
    certificate = tls.certificate(A)
    tls.apply(secret("istio-system/a", certificate), gateway("istio-system/gw", https(A, credentialName="a")))
    assert tls.client().request(A).status == 200
    key = "".join(certificate["tls.key"].splitlines()[1:-1])
    dump = tls.lab.envoy_admin("/config_dump", "istio-ingressgateway")
    assert "kubernetes://istio-system/a" in dump
    assert key[:40] not in dump.replace("\\n", "")
    assert key[:40] not in tls.lab.mesh.log("control-plane").replace("\\n", "")


def test_a_request_over_http_2_is_answered(tls: TlsLab) -> None:
    tls.apply(
        secret("istio-system/a", tls.certificate(A)), gateway("istio-system/gw", https(A, credentialName="a"))
    )
    ca = tls.lab.authority.write(tls.folder / "ca")
    command = ["curl", "--silent", "--show-error", "--http2", "--cacert", str(ca), "--max-time", "10"]
    command += ["--resolve", f"{A}:443:{tls.address}", f"https://{A}/", "--json", MESSAGES.decode()]
    command += ["--write-out", "%{http_version} %{http_code}", "--output", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.stdout == "2 200", done.stderr
