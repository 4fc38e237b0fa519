"""What one changed host of many costs an Envoy: scoped routes beside one route configuration.

The reference is the form that llmplane gives to proxies with few hosts (translator.scopes), for as many.
"""

import asyncio
import http.client
import tempfile
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

from benchmarks.processes import cpu_seconds, resident_bytes
from benchmarks.report import Table, percentile
from crds.loader import load_object
from crds.meta import BaseObject
from llmplane.bootstrap import ProxySettings, bootstrap
from llmplane.local import HTTP_PROXY_PORT, free_bind_address
from tests.support.envoy import Envoy, running_envoy
from translator import scopes
from translator.proxy import Proxy, ProxyType
from translator.translate import Translator
from translator.world import MeshSettings, World
from xds.resources import Resource
from xds.server import ManagementServer, Node
from xds.snapshot import Snapshot

_LONGEST = 30.0


def measure(*, quick: bool) -> list[Table]:
    """Change one LLMRoute of many, again and again, in both forms."""
    rows: list[list[Any]] = []
    for count in (1000,) if quick else (1000, 10_000):
        for suffix, names in ((".example.com", "one name"), ("", "a Service: 4 names")):
            ours = _measure(count, suffix, 6 if quick else 20, scoped=True)
            reference = _measure(count, suffix, 6 if quick else 8, scoped=False)
            for name, of in (("scoped routes", ours), ("reference: one route configuration", reference)):
                live = percentile(of.live, 50)
                rows.append(
                    [
                        count,
                        names,
                        name,
                        live,
                        max(of.live),
                        of.cpu,
                        max(of.sent),
                        of.memory / 1e6,
                        percentile(of.translate, 50),
                        percentile(reference.live, 50) / live,
                    ]
                )
    return [
        Table(
            "routes: one changed LLMRoute among many hosts",
            [
                "hosts",
                "each",
                "form",
                "live ms (p50)",
                "(max)",
                "Envoy CPU ms",
                "bytes (max)",
                "Envoy MB",
                "translate ms",
                "reference / this",
            ],
            rows,
            "Live: from the snapshot's publication to the first request that is answered by it. Bytes: what "
            "Envoy received for the change, with gRPC and HTTP/2. Envoy MB: RssAnon more than without hosts.",
        )
    ]


@dataclass
class _Figures:
    live: list[float] = field(default_factory=list)
    """Milliseconds from `publish` to the first request that is answered the new way."""
    translate: list[float] = field(default_factory=list)
    """Milliseconds."""
    sent: list[int] = field(default_factory=list)
    """Bytes that Envoy received."""
    cpu: float = 0.0
    """Milliseconds of Envoy's CPU time a change, with the requests that looked for it."""
    memory: int = 0
    """Bytes more than without hosts."""


def _measure(count: int, suffix: str, changes: int, *, scoped: bool) -> _Figures:
    objects = [_route(number, suffix, is_open=True) for number in range(count)]
    found = _Figures()
    threshold = 0 if scoped else count
    with patch.object(scopes, "THRESHOLD", threshold), patch.object(scopes, "MARGIN", 0):
        with _Plane(objects[:1]) as plane, _envoy(plane) as (envoy, _):
            empty = resident_bytes(envoy.pid)
        with _Plane(objects) as plane, _envoy(plane) as (envoy, client):
            found.memory = resident_bytes(envoy.pid) - empty
            for change in range(changes):
                number = change * 7919 % count
                host = f"host-{number}{suffix}"
                assert client.status(host) == 503
                objects[number] = _route(number, suffix, is_open=False)
                received, cpu = _received(envoy), cpu_seconds(envoy.pid)
                found.translate.append(plane.translate(objects))
                begin = time.perf_counter()
                plane.publish()
                client.wait(host, 404)
                found.live.append((time.perf_counter() - begin) * 1000)
                time.sleep(0.3)  # what comes after: the ACK, the old routes' end
                found.cpu += (cpu_seconds(envoy.pid) - cpu) * 1000 / changes
                found.sent.append(_received(envoy) - received)
    return found


def _route(number: int, suffix: str, *, is_open: bool) -> BaseObject:
    """Make an LLMRoute for VIPs and for all others; the providers are not there.

    `is_open`: the second rule takes all requests (503, for want of a provider), else hardly any (404).
    """
    vip = {
        "name": "vip",
        "matches": [{"headers": {"user-type": {"exact": "vip"}}}],
        "backendRefs": [_backend(1)],
    }
    shares: dict[str, Any] = {"name": "default", "backendRefs": [_backend(1), _backend(2)]}
    if not is_open:
        shares["matches"] = [{"headers": {"user-type": {"exact": "other"}}}]
    found, problems = load_object(
        {
            "apiVersion": "istio.alibabacloud.com/v1beta1",
            "kind": "LLMRoute",
            "metadata": {"name": f"host-{number}", "namespace": "default"},
            "spec": {"host": f"host-{number}{suffix}", "rules": [vip, shares]},
        }
    )
    assert found is not None, problems
    return found


def _backend(number: int) -> dict[str, Any]:
    return {"providerHost": f"provider-{number}.example.com", "weight": 50}


class _Plane:
    """The translator and the management server, without files; the server's loop is a thread's."""

    def __init__(self, objects: Sequence[BaseObject]) -> None:
        self.port = 0
        self._proxy = Proxy(ProxyType.SIDECAR, "default", "sleep", bind_address=free_bind_address())
        self._mesh = MeshSettings()
        self._translator = Translator()
        self._snapshot = Snapshot([])
        self._resources: dict[tuple[str, str], Resource] = {}
        self._loop = asyncio.new_event_loop()
        self._server = ManagementServer(self, identifier="benchmark")
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.translate(objects)

    def __enter__(self) -> Self:
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._server.start("127.0.0.1:0"), self._loop).result()
        self._loop.call_soon_threadsafe(self._server.ready)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def address(self) -> str:
        """Where the proxy opens its listeners."""
        return self._proxy.bind_address

    def group(self, node: Node, identity: object) -> Hashable:  # noqa: ARG002 - there is one proxy
        """Return the one group of proxies."""
        return self._proxy

    def snapshot(self, group: Hashable) -> Snapshot:  # noqa: ARG002
        """Return what was translated last."""
        return self._snapshot

    def translate(self, objects: Sequence[BaseObject]) -> float:
        """Translate these objects; return the milliseconds that it took."""
        begin = time.perf_counter()
        translation = self._translator.translate(World.of(objects, self._mesh), self._proxy)
        milliseconds = (time.perf_counter() - begin) * 1000
        resources = {(resource.type_url, resource.name): resource for resource in translation.resources}
        self._snapshot = self._snapshot.replace(
            [resource for name, resource in resources.items() if self._resources.get(name) is not resource],
            self._resources.keys() - resources.keys(),
        )
        self._resources = resources
        return milliseconds

    def publish(self) -> None:
        """Send what was translated last."""
        self._loop.call_soon_threadsafe(lambda: self._server.publish({self._proxy: self._snapshot}))


class _Client:
    """Asks Envoy again and again, on one connection."""

    def __init__(self, address: str) -> None:
        self._connection = http.client.HTTPConnection(address, HTTP_PROXY_PORT, timeout=_LONGEST)

    def status(self, host: str) -> int:
        """Return the status of the answer to one request."""
        self._connection.request("GET", "/", headers={"Host": host})
        with self._connection.getresponse() as response:
            response.read()
            return response.status

    def wait(self, host: str, status: int) -> None:
        """Ask until the answer has this status."""
        deadline = time.monotonic() + _LONGEST
        while self.status(host) != status:
            assert time.monotonic() < deadline

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


@contextmanager
def _envoy(plane: _Plane) -> Iterator[tuple[Envoy, _Client]]:
    """Run Envoy until its routes are live, and settled."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        settings = ProxySettings(
            type=ProxyType.SIDECAR,
            xds_host="127.0.0.1",
            xds_port=plane.port,
            namespace="default",
            workload="sleep",
            admin_socket=Path(folder) / "admin.sock",
            bind_address=plane.address,
        )
        with running_envoy(bootstrap(settings)) as envoy:
            time.sleep(1)
            client = _Client(plane.address)
            try:
                yield envoy, client
            finally:
                client.close()


def _received(envoy: Envoy) -> int:
    """Return the bytes that came from the management server."""
    return envoy.stats("^cluster.xds-grpc.upstream_cx_rx_bytes_total$").popitem()[1]
