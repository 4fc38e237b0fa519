"""On Kubernetes: from `kubectl apply` to the first request that is served with it, on a real API server.

kubectl is a program that starts, asks the API server what it knows, and then sends the object; so the time is
told from the start of kubectl, and from the moment at which the API server has the object.
"""

import http.client
import json
import random
import ssl
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from benchmarks.processes import cpu_seconds, resident_bytes, running_fake_llm
from benchmarks.report import Table, percentile
from llmplane.local import HTTP_PROXY_PORT, LocalMesh
from tests.support.kube import ROOT, ApiServer, running_api_server

_ONE, _TWO = "one.localhost", "two.localhost"
_KEY, _BAD_KEY = "sk-0123456789abcdef", "sk-fedcba9876543210"
_ROUTED = "chat-00000.example.com"
_LONGEST = 30.0
_AT_ONCE = 8
"""Connections by which objects are made."""
_MEGABYTE = 1 << 20


def measure(*, quick: bool) -> list[Table]:
    """Measure with 1, 100 and 2,000 LLMRoutes, and the start with 10,000 objects."""
    counts = (1, 20) if quick else (1, 100, 2000)
    changes: list[list[Any]] = []
    memory: list[list[Any]] = []
    secrets: list[list[Any]] = []
    for count in counts:
        with _running(count) as bench:
            changes.append([count, *_figures(bench.route_changes(5 if quick else 100))])
            secrets.append([count, *_figures(bench.secret_changes(5 if quick else 50))])
            memory.append([count, *(each / _MEGABYTE for each in bench.memory())])
    return [
        Table(
            "kube: kubectl apply of an LLMRoute to the first request served with it",
            ["LLMRoutes", *_HEADERS],
            changes,
            "Aim: p99 300 ms. One rule changes to another provider.",
        ),
        Table("kube: a changed Secret to the first request with its key", ["LLMRoutes", *_HEADERS], secrets),
        Table("kube: memory (RssAnon, MiB)", ["LLMRoutes", "control plane", "Envoy"], memory),
        _start(200 if quick else 10_000),
    ]


_HEADERS = ("p50 ms", "p99 ms", "p50 ms from kubectl's start", "p99 ms from kubectl's start")


def _figures(pairs: Iterable[tuple[float, float]]) -> list[float]:
    since_stored, since_start = ([second * 1000 for second in of] for of in zip(*pairs, strict=True))
    return [percentile(of, share) for of in (since_stored, since_start) for share in (50, 99)]


def _start(count: int) -> Table:
    with _prepared(count - 4) as (_, mesh):
        try:
            began = time.perf_counter()
            mesh.start_control_plane()
            ready = time.perf_counter() - began
            assert mesh.control_plane
            cpu = cpu_seconds(mesh.control_plane.pid)
            mesh.start_proxy()
            client = _Client(mesh.bind_address)
            while client.ask()[0] != HTTPStatus.OK:
                time.sleep(0.01)
            answered = time.perf_counter() - began
            memory = resident_bytes(mesh.control_plane.pid) / _MEGABYTE
        finally:
            mesh.stop()
    headers = ["objects", "ready s", "of that CPU s", "first answer of a new Envoy s", "memory MiB"]
    return Table("kube: start of the control plane", headers, [[count, ready, cpu, answered, memory]])


class _Client:
    """Sends requests for the route's host, on one kept connection."""

    def __init__(self, host: str) -> None:
        self._connection = http.client.HTTPConnection(host, HTTP_PROXY_PORT, timeout=_LONGEST)

    def ask(self) -> tuple[int, str]:
        """Return the status of an answer, and the model in it."""
        body = b'{"messages": [{"role": "user", "content": "Hi"}]}'
        self._connection.request("POST", "/", body, {"Host": _ROUTED})
        response = self._connection.getresponse()
        return response.status, str(json.loads(response.read()).get("model", ""))


@dataclass(frozen=True, slots=True)
class _Bench:
    """What is measured on."""

    server: ApiServer
    mesh: LocalMesh
    client: _Client

    def route_changes(self, edits: int) -> list[tuple[float, float]]:
        """Return how long changes took, since the API server has them and since kubectl's start (seconds)."""
        hosts = [(_TWO, _ONE)[number % 2] for number in range(edits)]
        return [self._change(_route(0, host), (200, host.partition(".")[0])) for host in hosts]

    def secret_changes(self, edits: int) -> list[tuple[float, float]]:
        """Do the same with the key of the route's provider, a bad one and the good one in turn."""
        self._change(_route(0, _ONE), (200, "one"))
        ways = [((_BAD_KEY, (401, "")), (_KEY, (200, "one")))[number % 2] for number in range(edits)]
        return [self._change(_secret(key), wanted) for key, wanted in ways]

    def memory(self) -> tuple[int, int]:
        """Return the bytes of the control plane and of Envoy."""
        assert self.mesh.control_plane
        assert self.mesh.proxy
        return resident_bytes(self.mesh.control_plane.pid), resident_bytes(self.mesh.proxy.pid)

    def _change(self, document: Mapping[str, Any], wanted: tuple[int, str]) -> tuple[float, float]:
        began = time.perf_counter()
        self.server.kubectl("apply", "-f", "-", text=json.dumps(document))
        stored = time.perf_counter()
        while self.client.ask() != wanted:
            if time.perf_counter() - stored > _LONGEST:
                raise TimeoutError(f"no request was served with it within {_LONGEST} s")
            time.sleep(0.001)
        served = time.perf_counter()
        time.sleep(random.uniform(0.05, 0.15))  # noqa: S311 - not in step with any timer
        return served - stored, served - began


@contextmanager
def _running(count: int) -> Iterator[_Bench]:
    """Run everything, with that many LLMRoutes."""
    with _prepared(count) as (server, mesh), mesh:
        client = _Client(mesh.bind_address)
        while client.ask() != (HTTPStatus.OK, "one"):
            time.sleep(0.01)
        yield _Bench(server, mesh, client)


@contextmanager
def _prepared(routes: int) -> Iterator[tuple[ApiServer, LocalMesh]]:
    """Run an API server that has the objects, and a fake LLM; control plane and sidecar are not started."""
    with running_api_server() as server, tempfile.TemporaryDirectory(prefix="bench-") as folder:
        directory = Path(folder)
        _fill(server, routes)
        token = directory / "token"
        token.write_text(server.run_pod("default", "sleep", app="sleep"), encoding="utf-8")
        options = ["--host", _TWO, "--key", f"{_ONE}={_KEY}", "--key", f"{_TWO}={_KEY}"]
        with running_fake_llm(_ONE, directory / "ca", *options) as upstream:
            serve = [f"--connect-to={host}:443:{upstream}" for host in (_ONE, _TWO)]
            (directory / "mesh" / "config").mkdir(parents=True)
            mesh = LocalMesh(
                directory / "mesh",
                source=["--kubernetes"],
                serve_options=[*serve, "--ca-file", str(directory / "ca" / "ca.pem")],
                environment={"KUBECONFIG": str(server.kubeconfig)},
                proxy_options=["--xds-token-file", str(token)],
            )
            yield server, mesh


def _fill(server: ApiServer, routes: int) -> None:
    server.apply_files(ROOT / "crds", ROOT / "crds" / "istio")
    server.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")
    objects = [_secret(_KEY), *map(_provider, (_ONE, _TWO)), *map(_route, range(routes))]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda part: _create(server, part), (objects[n::_AT_ONCE] for n in range(_AT_ONCE))))


def _create(server: ApiServer, documents: Iterable[Mapping[str, Any]]) -> None:
    """Make objects: kubectl would take its time for thousands."""
    context = ssl.create_default_context(cafile=str(server.ca))
    connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=context)
    headers = {"Authorization": "Bearer admin-token", "Content-Type": "application/json"}
    for document in documents:
        group = "/api/v1" if document["kind"] == "Secret" else "/apis/istio.alibabacloud.com/v1beta1"
        path = f"{group}/namespaces/default/{document['kind'].lower()}s"
        connection.request("POST", path, json.dumps(document), headers)
        response = connection.getresponse()
        text = response.read()
        if response.status != HTTPStatus.CREATED:
            raise RuntimeError(f"{response.status} {text!r}")


def _object(kind: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default"}
    return {"apiVersion": "istio.alibabacloud.com/v1beta1", "kind": kind, "metadata": metadata, "spec": spec}


def _secret(key: str) -> dict[str, Any]:
    metadata = {"name": "keys", "namespace": "default"}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"key": key}}


def _provider(host: str) -> dict[str, Any]:
    model = host.partition(".")[0]
    config = {"model": model, "stream": False, "apiKeySecretRef": {"name": "keys", "key": "key"}}
    spec = {"host": host, "path": "/v1/chat/completions"}
    return _object("LLMProvider", model, {**spec, "configs": {"defaultConfig": {"openAIConfig": config}}})


def _route(number: int, host: str = _ONE) -> dict[str, Any]:
    rules = [{"name": "all", "backendRefs": [{"providerHost": host}]}]
    return _object("LLMRoute", f"chat-{number:05}", {"host": f"chat-{number:05}.example.com", "rules": rules})
