"""Envoys with all kinds of credentials: one kind gets configuration (tests/unit/test_auth.py: the rules)."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llmplane.certificates import CertificateAuthority
from llmplane.envoy import find_envoy
from llmplane.fakellm import FakeLLM, Host, running_in_thread
from llmplane.local import LocalMesh, end, free_port
from tests.envoy.conftest import DASHSCOPE, KEYS, own_address
from tests.support.client import ProxyClient
from tests.support.envoy import ask_admin
from tests.support.identities import MeshCA, Pair
from tests.support.objects import provider
from tests.support.wait import eventually

TOKEN = "token-of-team-a-0001"  # noqa: S105 - made up, here and below
TOKEN_B = "token-of-team-b-0001"  # noqa: S105
NEW_TOKEN = "token-of-team-a-0002"  # noqa: S105
NAME = "spiffe://cluster.local/ns/team-a/sa/sleep"


@dataclass
class SecureLab:
    """A control plane that asks for certificate and token, a sidecar that has both, and a fake LLM."""

    directory: Path
    mesh_ca: MeshCA = field(default_factory=MeshCA)
    mesh: LocalMesh = field(init=False)

    def file(self, name: str, content: bytes | str) -> Path:
        """Write a file at once, as tools that rotate do."""
        path = self.directory / name
        new = path.with_name(f"{path.name}.new")
        new.write_bytes(content.encode() if isinstance(content, str) else content)
        new.replace(path)
        return path

    def options(self, *, ca: Path | None, pair: tuple[Path, Path] | None, token: Path | None) -> list[str]:
        """Return the options of a proxy."""
        options = ["--xds-ca-file", str(ca)] if ca else []
        if pair:
            options += ["--xds-client-cert-file", str(pair[0]), "--xds-client-key-file", str(pair[1])]
        return options + (["--xds-token-file", str(token)] if token else [])

    def answer(self) -> int:
        """Send a request through the sidecar; return the status."""
        return ProxyClient(self.mesh.bind_address).request(DASHSCOPE).status

    @property
    def states(self) -> list[str]:
        """The states of all proxies that are connected."""
        return [proxy["state"] for proxy in self.mesh.status()["proxies"]]


@contextmanager
def running_secure_lab() -> Iterator[SecureLab]:
    lab = SecureLab(Path(tempfile.mkdtemp(prefix="auth-")))
    authority = CertificateAuthority.create()
    ca = lab.file("ca.pem", authority.pem)
    certificate, key = Pair(*authority.issue("127.0.0.1")).write(lab.directory, "server")
    tokens = f"team-a/sleep app=sleep {TOKEN}\nteam-b {TOKEN_B}\n"
    serve = ["--ca-file", str(ca), "--xds-cert-file", str(certificate), "--xds-key-file", str(key)]
    serve += ["--xds-client-ca-file", str(lab.file("mesh-ca.pem", lab.mesh_ca.pem))]
    serve += ["--xds-token-file", str(lab.file("tokens", tokens))]
    pair = lab.mesh_ca.issue(NAME).write(lab.directory, "client")
    fake = FakeLLM({DASHSCOPE: Host(KEYS[DASHSCOPE])}, ca=authority)
    try:
        with running_in_thread(fake):
            lab.mesh = LocalMesh(
                lab.directory,
                serve_options=[*serve, "--connect-to", f"{DASHSCOPE}:443:{fake.address}"],
                namespace="team-a",
                proxy_options=lab.options(ca=ca, pair=pair, token=lab.file("token", f"{TOKEN}\n")),
                bind_address=own_address(),
            )
            (lab.directory / "config").mkdir()
            lab.file("config/objects.yaml", provider("team-a/dashscope", DASHSCOPE, KEYS[DASHSCOPE]))
            with lab.mesh:
                yield lab
    finally:
        shutil.rmtree(lab.directory, ignore_errors=True)


@pytest.fixture(scope="module")
def secure_lab() -> Iterator[SecureLab]:
    with running_secure_lab() as lab:
        yield lab


def admin(directory: Path, path: str) -> str:
    """Ask the admin interface of the one Envoy that has its files below a directory."""
    (address,) = directory.glob("llmplane-*/*/admin.sock")
    return ask_admin(address, path)


def test_a_proxy_with_certificate_and_token_is_configured_and_serves(secure_lab: SecureLab) -> None:
    assert secure_lab.states == ["SYNCED"]
    assert secure_lab.answer() == 200


def test_neither_token_nor_key_is_in_envoys_configuration_dump_or_in_a_log(secure_lab: SecureLab) -> None:
    mesh = secure_lab.mesh
    texts = [admin(secure_lab.directory, "/config_dump?include_eds"), mesh.log("control-plane")]
    texts.append(mesh.log("sidecar"))
    assert "xds-token" in texts[0]
    private = (secure_lab.directory / "client-key.pem").read_text().splitlines()[1]
    for text in texts:
        assert not any(secret in text for secret in (TOKEN, TOKEN_B, private, KEYS[DASHSCOPE]))


WRONG = {
    "no certificate": {"pair": None},
    "a certificate of another CA": {"pair": "stranger"},
    "an expired certificate": {"pair": "expired"},
    "a certificate of another namespace": {"pair": "other"},
    "no token": {"token": None},
    "a wrong token": {"token": "wrong-token-0123456789"},
    "a token of another namespace": {"token": TOKEN_B},
    "plaintext": {"ca": None, "pair": None},
    "a control plane of another CA": {"ca": "stranger"},
    "a control plane of another name": {"host": "localhost"},
}
"""What is wrong with a proxy, or with what it connects to; the rest is right."""

REASONS = {
    "a certificate of another namespace": "is not what the credentials are for: team-b",
    "no token": "a bearer token is required",
    "a wrong token": "the bearer token is not known",
    "a token of another namespace": "is not what the credentials are for: team-b",
}
"""What the control plane says of it. The others do not even get through the TLS handshake."""


@pytest.mark.parametrize("wrong", WRONG)
def test_every_other_proxy_gets_nothing(secure_lab: SecureLab, wrong: str) -> None:
    lab = secure_lab
    authorities = {"right": lab.directory / "ca.pem", "stranger": lab.file("stranger.pem", MeshCA().pem)}
    pairs = {
        "right": lab.mesh_ca.issue(NAME),
        "stranger": MeshCA().issue(NAME),
        "expired": lab.mesh_ca.issue(NAME, days=-1),
        "other": lab.mesh_ca.issue("spiffe://cluster.local/ns/team-b/sa/sleep"),
    }
    given = {"ca": "right", "pair": "right", "token": TOKEN, "host": "127.0.0.1", **WRONG[wrong]}
    options = lab.options(
        ca=authorities[given["ca"]] if given["ca"] else None,
        pair=pairs[given["pair"]].write(lab.directory, "wrong") if given["pair"] else None,
        token=lab.file("wrong-token", given["token"]) if given["token"] else None,
    )
    options += ["--namespace", "team-a", "--label", "app=sleep", "--bind-address", own_address()]
    options += ["--xds-address", f"{given['host']}:{lab.mesh.xds.port}"]
    command = [sys.executable, "-m", "llmplane", "proxy", "sidecar", "--workload", "sleep", *options]
    with tempfile.TemporaryDirectory(prefix="wrong-") as directory:
        process = subprocess.Popen(
            [*command, "--", "--concurrency", "1", "-l", "off"],
            env={**os.environ, "XDG_RUNTIME_DIR": directory},
        )
        try:

            def is_up() -> bool:  # it is bound before it is listened on
                with suppress(OSError, ValueError):
                    return bool(admin(Path(directory), "/stats?filter=xds-grpc"))
                return False

            eventually(is_up)

            def stats() -> dict[str, int]:
                lines = admin(Path(directory), "/stats?filter=update_success|xds-grpc.upstream_cx_total")
                return {
                    name: int(value) for name, _, value in (x.partition(": ") for x in lines.splitlines())
                }

            # A refused stream does not cost the connection.
            attempts = "/stats?filter=cds.update_(attempt|failure)"
            eventually(lambda: stats().get("cluster.xds-grpc.upstream_cx_total", 0) >= 1)
            eventually(lambda: "update_failure: 0" not in admin(Path(directory), attempts))
            assert stats()["cluster_manager.cds.update_success"] == 0
            assert stats()["listener_manager.lds.update_success"] == 0
            assert DASHSCOPE not in admin(Path(directory), "/config_dump")
            assert lab.states == ["SYNCED"], "the right one only"
            assert REASONS.get(wrong, "") in lab.mesh.log("control-plane")
        finally:
            end(process)
    assert lab.answer() == 200


def test_new_credentials_are_taken_up_and_until_then_the_proxy_keeps_what_it_has() -> None:
    with running_secure_lab() as lab:
        lab.mesh_ca = MeshCA()
        lab.file("mesh-ca.pem", lab.mesh_ca.pem)
        lab.file("tokens", f"team-a {NEW_TOKEN}\n")
        assert lab.mesh.control_plane
        end(lab.mesh.control_plane)
        lab.mesh.start_control_plane()
        failures = "/stats?filter=cluster.xds-grpc.upstream_cx_connect_fail|xds-grpc.ssl.connection_error"
        before = admin(lab.directory, failures)
        eventually(lambda: admin(lab.directory, failures) != before)
        assert lab.states == []
        assert lab.answer() == 200

        lab.mesh_ca.issue(NAME).write(lab.directory, "client")
        lab.file("token", NEW_TOKEN)
        eventually(lambda: lab.states == ["SYNCED"])
        assert lab.answer() == 200


def test_a_printed_bootstrap_has_its_credentials_too(secure_lab: SecureLab, tmp_path: Path) -> None:
    lab = secure_lab
    pair = (lab.directory / "client.pem", lab.directory / "client-key.pem")
    options = lab.options(ca=lab.directory / "ca.pem", pair=pair, token=lab.directory / "token")
    options += ["--workload", "sleep", "--namespace", "team-a", "--bind-address", own_address()]
    options += ["--xds-address", str(lab.mesh.xds), "--admin-port", str(free_port())]
    command = [sys.executable, "-m", "llmplane", "bootstrap", "sidecar", *options]
    printed = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert TOKEN.encode() not in printed
    file = tmp_path / "bootstrap.json"
    file.write_bytes(printed)
    envoy = [find_envoy(), "-c", file, "--use-dynamic-base-id", "--concurrency", "1", "-l", "off"]
    process = subprocess.Popen(envoy)
    try:
        eventually(lambda: lab.states == ["SYNCED", "SYNCED"])
    finally:
        end(process)
    eventually(lambda: lab.states == ["SYNCED"])


COMBINATIONS = [
    ("localhost", ca, pair, token)
    for ca, pair, token in itertools.product((False, True), repeat=3)
    if ca or not pair
]


@pytest.mark.parametrize(("host", "ca", "pair", "token"), [*COMBINATIONS, ("[::1]", True, True, True)])
def test_envoy_accepts_each_bootstrap(
    tmp_path: Path, host: str, *, ca: bool, pair: bool, token: bool
) -> None:
    lab = SecureLab(tmp_path)
    options = lab.options(
        ca=lab.file("ca.pem", lab.mesh_ca.pem) if ca else None,
        pair=lab.mesh_ca.issue(NAME).write(tmp_path, "client") if pair else None,
        token=lab.file("token", TOKEN) if token else None,
    )
    options += ["--workload", "sleep", "--xds-address", f"{host}:18000"]
    printed = subprocess.run(
        [sys.executable, "-m", "llmplane", "bootstrap", "gateway", *options],
        capture_output=True,
        check=True,
        timeout=60,
    )
    (tmp_path / "bootstrap.json").write_bytes(printed.stdout)
    assert len(json.loads(printed.stdout)["static_resources"].get("secrets", [])) == ca + pair + token
    laid_down = [sys.executable, "-m", "llmplane", "proxy", "gateway", *options, "--", "--mode", "validate"]
    runtime = tempfile.mkdtemp(prefix="auth-")  # short: Envoy's admin socket must fit into 108 bytes
    for command in (
        [find_envoy(), "--mode", "validate", "-c", tmp_path / "bootstrap.json", "-l", "error"],
        [*laid_down, "-l", "error"],
    ):
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**os.environ, "XDG_RUNTIME_DIR": runtime},
        )
        assert done.returncode == 0, done.stderr
    shutil.rmtree(runtime)
