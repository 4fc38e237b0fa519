"""A lab: control plane, sidecar Envoy and fake LLM on this machine, started as a user would start them.

A module's tests share one lab (starting one takes a second); each test applies its own objects.
"""

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmplane.certificates import CertificateAuthority
from llmplane.fakellm import FakeLLM, Host, SeenRequest, running_in_thread
from llmplane.local import LocalGateway, LocalMesh
from tests.support.client import ProxyClient
from tests.support.envoy import ask_admin, has

DASHSCOPE = "dashscope.aliyuncs.com"
MOONSHOT = "api.moonshot.cn"
OPENAI = "api.openai.com"
KEYLESS = "ollama.example.com"
KEYS = {
    DASHSCOPE: "sk-dashscope-0123456789",
    MOONSHOT: "sk-moonshot-0123456789",
    OPENAI: "sk-openai-0123456789",
}
"""The keys that the fake LLM accepts; KEYLESS takes requests without one."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(feature): what an Envoy that lacks it does is in test_versions")


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Everything in this folder needs a real Envoy, and some of it one that is not too old."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.envoy)
            for marker in item.iter_markers("needs"):
                (feature,) = marker.args
                if not has(feature):
                    item.add_marker(pytest.mark.xfail(reason=f"needs {feature.what}", strict=False))


@dataclass(frozen=True)
class Lab:
    """What a test works with."""

    mesh: LocalMesh
    fake: FakeLLM
    client: ProxyClient
    authority: CertificateAuthority

    def apply(self, *documents: str) -> None:
        """Make these YAML documents the whole configuration, and wait until the sidecar acknowledged it."""
        # A file without a byte would be taken for one that is being written.
        self.mesh.apply("objects.yaml", "\n---\n".join(documents) or "# no objects\n")

    def seen(self) -> SeenRequest:
        """Return the one request that the fake LLM saw since the last look."""
        (request,) = self.all_seen()
        return request

    def all_seen(self) -> tuple[SeenRequest, ...]:
        """Return the requests that the fake LLM saw since the last look."""
        requests = self.fake.seen
        self.fake.forget()
        return requests

    def condition(self, name: str, kind: str = "ResolvedRefs") -> tuple[bool, str, str]:
        """Return a condition as `llmplane status` shows it: whether it is met, reason, message."""
        (found,) = (
            condition
            for item in self.mesh.status()["objects"]
            for condition in item["conditions"]
            if item["name"] == name and condition["type"] == kind
        )
        return found["status"], found["reason"], found["message"]

    def start_gateway(self, workload: str = "istio-ingressgateway", **options: Any) -> LocalGateway:
        """Start a gateway, by default on an address of its own."""
        options.setdefault("bind_address", own_address())
        return self.mesh.start_gateway(workload, **options)

    def envoy_admin(self, path: str, workload: str = "sleep", *, method: str = "GET") -> str:
        """Ask an Envoy's admin interface, which is a Unix socket."""
        (address,) = self.mesh.directory.glob(f"llmplane-*/{workload}.*/admin.sock")
        return ask_admin(address, path, method=method)


_numbers = itertools.cycle(range(1, 255))


def own_address() -> str:
    """Return a loopback address of this process: two Envoys that open one port share it without an error."""
    return f"127.{os.getpid() // 256 % 254 + 1}.{os.getpid() % 256}.{next(_numbers)}"


@contextmanager
def running_lab(
    *,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    proxy_options: Sequence[str] = (),
    envoy_options: Sequence[str] = (),
    concurrency: int = 1,
) -> Iterator[Lab]:
    """Run a lab of one's own; `options` and `environment` are the control plane's."""
    authority = CertificateAuthority.create()
    fake = FakeLLM({host: Host(KEYS.get(host)) for host in (*KEYS, KEYLESS)}, ca=authority)
    directory = Path(tempfile.mkdtemp(prefix="lab-"))  # short: Envoy's admin socket must fit into 108 bytes
    serve = ["--ca-file", str(authority.write(directory / "ca")), *options]
    try:
        with running_in_thread(fake):
            for host in fake.hosts:
                serve += ["--connect-to", f"{host}:443:{fake.address}"]
            mesh = LocalMesh(
                directory,
                serve_options=serve,
                environment={"API_KEY_OF_DASHSCOPE": KEYS[DASHSCOPE], **(environment or {})},
                labels=labels,
                proxy_options=proxy_options,
                envoy_options=envoy_options,
                bind_address=own_address(),
                concurrency=concurrency,
            )
            with mesh:
                yield Lab(mesh, fake, ProxyClient(mesh.bind_address), authority)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    with running_lab() as lab:
        yield lab


@pytest.fixture(scope="module")
def gateway_lab() -> Iterator[Lab]:
    """Run a lab with an ingress gateway beside the sidecar, for all tests of a module."""
    with running_lab() as started:
        started.start_gateway()
        yield started


@pytest.fixture
def lab(shared_lab: Lab) -> Lab:
    """Give the module's lab with nothing configured and nothing seen."""
    for host in shared_lab.fake.hosts:
        shared_lab.fake.set_fault(host, None)
    shared_lab.apply("")
    shared_lab.fake.forget()
    return shared_lab
