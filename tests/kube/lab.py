"""A control plane on a real API server, a real Envoy that it configures, and a fake LLM."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmplane.certificates import CertificateAuthority
from llmplane.fakellm import FakeLLM, Host, running_in_thread
from llmplane.local import LocalMesh
from tests.envoy.conftest import KEYS, own_address
from tests.support.client import Answer, ProxyClient
from tests.support.kube import ApiServer
from tests.support.wait import eventually

_T = TypeVar("_T")


@dataclass(frozen=True)
class KubeLab:
    """What a test works with."""

    cluster: ApiServer
    namespace: str
    mesh: LocalMesh
    fake: FakeLLM
    client: ProxyClient

    def credentials(self, namespace: str, pod: str, **labels: str) -> list[str]:
        """Make a Pod; return the options by which a proxy proves to be its."""
        file = self.mesh.directory / f"token-of-{pod}"
        file.write_text(self.cluster.run_pod(namespace, pod, **labels))
        return ["--xds-token-file", str(file)]

    def kubectl(self, *arguments: str, text: str | None = None) -> str:
        """Run kubectl in the namespace of the sidecar."""
        return self.cluster.kubectl("-n", self.namespace, *arguments, text=text)

    def apply(self, text: str) -> None:
        """`kubectl apply` of some YAML, which may name other namespaces."""
        self.kubectl("apply", "-f", "-", text=text)

    def answer_when(self, host: str, condition: Callable[[Answer], object], **options: Any) -> Answer:
        """Ask until the answer is as it should be, and return it."""
        return self.when(lambda: self.client.request(host, **options), condition)

    def condition_when(
        self, kind: str, name: str, of: str, condition: Callable[[dict[str, Any]], object]
    ) -> dict[str, Any]:
        """Look until a condition of an object's status is as it should be, and return it."""

        def look() -> dict[str, Any]:
            status = self.cluster.get(kind, name, "-n", self.namespace).get("status", {})
            return next((each for each in status.get("conditions", ()) if each["type"] == of), {})

        return self.when(look, condition)

    def when(self, look: Callable[[], _T], condition: Callable[[_T], object]) -> _T:
        """Look until something is as it should be, and return it. Raises AssertionError with the last one."""
        last: list[_T] = []

        def holds() -> object:
            last[:] = [look()]
            return condition(last[0])

        try:
            eventually(holds)
        except AssertionError:
            text = f"the last one was {last}\n{self.mesh.log('control-plane')[-3000:]}"
            raise AssertionError(text) from None
        return last[0]


@contextmanager
def running_kube_lab(
    cluster: ApiServer,
    namespace: str,
    *,
    pod: str = "sleep",
    kubeconfig: Path | None = None,
    serve_options: Sequence[str] = (),
) -> Iterator[KubeLab]:
    """Run `llmplane serve --kubernetes` and a sidecar, that of a Pod with the label `app`."""
    authority = CertificateAuthority.create()
    fake = FakeLLM({host: Host(key) for host, key in KEYS.items()}, ca=authority)
    directory = Path(tempfile.mkdtemp(prefix="lab-"))
    serve = ["--ca-file", str(authority.write(directory / "ca")), *serve_options]
    try:
        with running_in_thread(fake):
            for host in fake.hosts:
                serve += ["--connect-to", f"{host}:443:{fake.address}"]
            token = directory / "token"
            token.write_text(cluster.run_pod(namespace, pod, app=pod))
            mesh = LocalMesh(
                directory,
                source=["--kubernetes"],
                serve_options=serve,
                environment={"KUBECONFIG": str(kubeconfig or cluster.kubeconfig)},
                namespace=namespace,
                proxy_options=["--xds-token-file", str(token)],
                bind_address=own_address(),
            )
            with mesh:
                yield KubeLab(cluster, namespace, mesh, fake, ProxyClient(mesh.bind_address))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
