"""No credential shows, wherever one may look: keys of providers and clients, tokens, keys of certificates."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmplane.local import end
from tests.envoy.conftest import DASHSCOPE, KEYS, Lab, running_lab
from tests.envoy.gateway import GATEWAY
from tests.support.client import GatewayClient
from tests.support.control_plane import fetch
from tests.support.objects import backends, gateway, provider, route, secret, server
from tests.support.policies import (
    ROOT,
    api_key_authentication,
    authorization_policy,
    istio_object,
    request_authentication,
)
from tests.support.tokens import Issuer

HOST = "a.example.com"
CLIENT_KEY = "sk-of-alice-0123456789"
ISSUER = Issuer("https://issuer.example.com")
TOKEN = ISSUER.token()
TOKENS = {
    "issuer": ISSUER.name,
    "jwks": ISSUER.jwks,
    "forwardOriginalToken": True,
    "fromHeaders": [{"name": "x-token"}],
    "fromParams": ["token"],
}
NEEDS_TOKEN = authorization_policy({"from": [{"source": {"requestPrincipals": ["*"]}}]})
ACCESS_LOG = istio_object(
    "telemetry.istio.io/v1",
    "Telemetry",
    f"{ROOT}/log",
    {"accessLogging": [{"providers": [{"name": "envoy"}]}]},
)


class Secrets:
    """What must not show, and the places where it did."""

    def __init__(self, lab: Lab) -> None:
        chain, key = lab.authority.issue(HOST)
        self.certificate = {"tls.crt": chain.decode(), "tls.key": key.decode()}
        pem = "".join(self.certificate["tls.key"].splitlines()[1:-1])
        self._texts = {
            "the provider's key": KEYS[DASHSCOPE],
            "the client's key": CLIENT_KEY,
            "the token": TOKEN.rpartition(".")[2],
            "the certificate's key": pem[60:120],
        }
        self.shown: list[str] = []

    def look_at(self, place: str, text: str) -> None:
        """Look for secrets in a text, however its lines are broken."""
        text = text.replace("\\n", "").replace("\n", "")
        self.shown += [f"{name} in {place}" for name, secret in self._texts.items() if secret in text]


def objects(certificate: dict[str, str], client_key: str = CLIENT_KEY, **rule: object) -> list[str]:
    https = server(HOST, protocol="HTTPS", number=443, tls={"mode": "SIMPLE", "credentialName": "a"})
    return [
        provider(f"{ROOT}/llm", DASHSCOPE, KEYS[DASHSCOPE]),
        secret(f"{ROOT}/a", certificate),
        secret(f"{ROOT}/clients", {"alice": client_key}),
        gateway(f"{ROOT}/gw", https),
        route("a", HOST, {"backendRefs": backends(DASHSCOPE)}, gateways=[f"{ROOT}/gw"]),
        api_key_authentication("clients"),
        request_authentication({**TOKENS, **rule}),
        NEEDS_TOKEN,
        ACCESS_LOG,
    ]


@pytest.fixture
def lab() -> Iterator[Lab]:
    with running_lab() as lab:
        lab.start_gateway()
        yield lab


def test_no_credential_shows_anywhere(lab: Lab, tmp_path: Path) -> None:
    secrets = Secrets(lab)
    lab.apply(*objects(secrets.certificate))
    secrets.look_at("what the user wrote", (lab.mesh.config / "objects.yaml").read_text(encoding="utf-8"))
    assert len(secrets.shown) == 3, "what shows is found"
    secrets.shown.clear()
    use(lab, secrets)
    look_around(lab, secrets)
    end(lab.mesh.control_plane)
    lab.mesh.start_control_plane()
    lab.mesh.settle()
    look_around(lab, secrets)
    # Each of them at a place where it cannot be used.
    broken = objects({**secrets.certificate, "tls.crt": "?"}, f"{CLIENT_KEY} \u00e9", jwksUri=TOKEN)
    broken[0] = provider(f"{ROOT}/llm", DASHSCOPE, f"{KEYS[DASHSCOPE]} \u00e9")
    lab.mesh.apply("objects.yaml", "\n---\n".join(broken))
    look_around(lab, secrets)
    look_at_commands(lab, secrets, tmp_path, objects(secrets.certificate), broken)
    assert secrets.shown == []


def use(lab: Lab, secrets: Secrets) -> None:
    """Send requests that are answered, and some that are not."""
    client = GatewayClient(lab.mesh.gateways[0].bind_address, 443, lab.authority.client_context())
    for status, key, header, path in (
        (200, CLIENT_KEY, TOKEN, "/"),
        (200, CLIENT_KEY, None, f"/v1/chat/completions?token={TOKEN}"),
        (401, CLIENT_KEY, f"{TOKEN}x", "/"),
        (401, f"{CLIENT_KEY}x", TOKEN, "/"),
        (404, CLIENT_KEY, TOKEN, "/nowhere"),
    ):
        headers = {"x-api-key": key, **({"x-token": header} if header else {})}
        answer = client.request(HOST, headers=headers, path=path)
        assert answer.status == status, answer
        secrets.look_at(f"an answer {status}", f"{answer.headers} {answer.body!r}")
    for seen in lab.all_seen():
        assert seen.key_fingerprint
        secrets.look_at("what the provider gets", f"{seen.path} {seen.headers}")


def look_around(lab: Lab, secrets: Secrets) -> None:
    for path in ("/config_dump?include_eds", "/clusters", "/listeners", "/certs", "/stats", "/init_dump"):
        secrets.look_at(f"Envoy's {path}", lab.envoy_admin(path, GATEWAY))
    for path in ("/debug/status", "/debug/syncz", "/debug/objects", "/metrics"):
        secrets.look_at(path, fetch(lab.mesh.admin, path)[1])
    for proxy in json.loads(fetch(lab.mesh.admin, "/debug/syncz")[1])["proxies"]:
        status, dump, *_ = fetch(lab.mesh.admin, "/debug/config_dump", proxy=proxy["node_id"])
        assert status == 200, dump
        secrets.look_at("/debug/config_dump", dump)
    for file in lab.mesh.directory.rglob("*"):
        if file.is_file() and file.stat().st_size and file != lab.mesh.config / "objects.yaml":
            secrets.look_at(str(file), file.read_bytes().decode("latin-1"))


def look_at_commands(lab: Lab, secrets: Secrets, folder: Path, good: list[str], broken: list[str]) -> None:
    """Run the commands that show configuration or complain of it."""
    files = {name: folder / f"{name}.yaml" for name in ("good", "broken")}
    for name, documents in (("good", good), ("broken", broken)):
        files[name].write_text("\n---\n".join(documents), encoding="utf-8")
    to_gateway = ["--proxy", "gateway", "--namespace", ROOT, "--label", "istio=ingressgateway"]
    for command in (
        ["translate", *to_gateway, str(files["good"])],
        ["translate", *to_gateway, str(files["broken"])],
        ["validate", str(files["good"])],
        ["validate", str(files["broken"])],
        ["status", "--admin-address", str(lab.mesh.admin)],
        ["status", "--json", "--admin-address", str(lab.mesh.admin)],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "llmplane", *command], capture_output=True, text=True, check=False
        )
        secrets.look_at(f"llmplane {command[0]}", done.stdout + done.stderr)
