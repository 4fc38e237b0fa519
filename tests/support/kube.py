"""A real API server with its etcd, on free ports of 127.0.0.1, and kubectl for it."""

import contextlib
import json
import os
import shutil
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from llmplane.local import free_port
from tools import kube_assets

ROOT = Path(__file__).parents[2]


class KubectlError(AssertionError):
    """kubectl ended with an error; the text is what it said."""


class ApiServer:
    """kube-apiserver and etcd; etcd's data stay over a restart of the API server."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self.kubeconfig = directory / "kubeconfig"
        self._etcd_ports = (free_port(), free_port())
        self._etcd: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._key = directory / "service-account.pem"
        self._key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )
        (directory / "tokens.csv").write_text('admin-token,admin,admin,"system:masters"\n')

    def start(self) -> None:
        """Start what does not run, and wait until it is ready."""
        if self._etcd is None:
            client, peer = (f"http://127.0.0.1:{port}" for port in self._etcd_ports)
            self._etcd = self._run(
                "etcd",
                *("--data-dir", str(self.directory / "etcd"), "--unsafe-no-fsync"),
                *("--listen-client-urls", client, "--advertise-client-urls", client),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                *("--initial-cluster", f"default={peer}", "--log-level", "error"),
            )
        self._process = self._run(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._etcd_ports[0]}",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--cert-dir={self.directory / 'certificates'}",
            f"--token-auth-file={self.directory / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self._key}",
            f"--service-account-signing-key-file={self._key}",
            "--disable-admission-plugins=ServiceAccount",
            "--allow-privileged=true",
            "--endpoint-reconciler-type=none",
        )
        deadline = time.monotonic() + 120
        while not self._is_ready():
            assert self._process.poll() is None, self.log("kube-apiserver")[-2000:]
            assert time.monotonic() < deadline, self.log("kube-apiserver")[-2000:]
            time.sleep(0.1)
        self.write_kubeconfig(self.kubeconfig, "admin-token")

    def kill(self) -> None:
        """Have the API server die; etcd stays."""
        assert self._process
        self._process.kill()  # asked politely, it would wait a minute for open watches
        self._process.wait()

    def stop(self) -> None:
        """End both."""
        for process in (self._process, self._etcd):
            if process is not None:
                process.kill()
                process.wait()

    def log(self, name: str) -> str:
        """Return what a program wrote."""
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def write_kubeconfig(self, file: Path, token: str, namespace: str = "default") -> Path:
        """Write a configuration for kubectl, for the one whom a token is of."""
        cluster = {"server": self.url, "certificate-authority": str(self.ca)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [
                {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}
            ],
        }
        file.write_text(yaml.safe_dump(config))
        return file

    def kubectl(self, *arguments: str, text: str | None = None, check: bool = True) -> str:
        """Run kubectl and return what it prints. Raises KubectlError."""
        program = shutil.which("kubectl", path=f"{kube_assets.folder()}{os.pathsep}{os.environ['PATH']}")
        run = subprocess.run(
            [str(program), "--kubeconfig", str(self.kubeconfig), *arguments],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HOME": str(self.directory)},
        )
        if check and run.returncode:
            raise KubectlError(run.stderr.strip())
        return run.stdout

    def apply(self, *texts: str) -> None:
        """`kubectl apply` of YAML documents."""
        self.kubectl("apply", "-f", "-", text="\n---\n".join(texts))

    def apply_files(self, *paths: Path, options: Sequence[str] = ()) -> str:
        """`kubectl apply` of files or folders."""
        return self.kubectl("apply", *options, *(part for path in paths for part in ("-f", str(path))))

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get` as JSON."""
        found: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found

    def run_pod(self, namespace: str, name: str, **labels: str) -> str:
        """Make a Pod and its ServiceAccount; return the token that a kubelet would mount into it.

        There is no kubelet: what it would run, the test runs.
        """
        self.apply(
            f"apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: {namespace}}}",
            f"apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, "
            f"labels: {json.dumps(labels)}}}\n"
            f"spec: {{serviceAccountName: {name}, containers: [{{name: main, image: none}}]}}\n",
        )
        return self.pod_token(namespace, name)

    def pod_token(self, namespace: str, name: str, audience: str = "llmplane") -> str:
        """Return a token of a Pod."""
        uid = self.get("pod", name, "-n", namespace)["metadata"]["uid"]
        bound = ("--bound-object-kind=Pod", f"--bound-object-name={name}", f"--bound-object-uid={uid}")
        return self.kubectl(
            "-n", namespace, "create", "token", name, f"--audience={audience}", *bound
        ).strip()

    @property
    def ca(self) -> Path:
        """The certificate of the API server."""
        return self.directory / "certificates" / "apiserver.crt"

    def _is_ready(self) -> bool:
        try:
            context = ssl.create_default_context(cafile=str(self.ca))
            headers = {"Authorization": "Bearer admin-token"}
            request = urllib.request.Request(f"{self.url}/readyz", headers=headers)  # noqa: S310 - https
            handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
            with urllib.request.build_opener(*handlers).open(request, timeout=30) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def _run(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.directory / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [str(kube_assets.folder() / name), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
            )


@contextmanager
def running_api_server() -> Iterator[ApiServer]:
    """Run an API server of one's own."""
    directory = Path(tempfile.mkdtemp(prefix="kube-"))
    server = ApiServer(directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        with contextlib.suppress(OSError):
            shutil.rmtree(directory)
