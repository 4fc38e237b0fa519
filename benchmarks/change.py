"""How long it takes from the edit of a file to the first request that is served with it.

The reference is the same Envoy configuration in files that Envoy reads itself (`path_config_source`), edited
the same way: what the least possible control plane would need. Both take turns.
"""

import http.client
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.processes import as_static, provider, providers, running_fake_llm, translated
from benchmarks.report import Table, median_and_min, percentile
from llmplane.address import Address
from llmplane.local import HTTP_PROXY_PORT, LocalMesh
from llmplane.mesh import mesh_settings
from tests.support.envoy import running_envoy
from translator import lua
from xds.resources import CDS

_DOMAIN = "localhost"
_EDITED = "provider-0000"
_HOST = f"{_EDITED}.{_DOMAIN}"
_LONGEST = 10.0


def measure(*, quick: bool) -> list[Table]:
    """Edit a provider's model again and again, with 1, 100 and 1000 providers in all."""
    rows: list[list[Any]] = []
    stages: list[list[Any]] = []
    for count, one_file in ((1, False), (100, False), (1000, False), (1000, True)):
        ways = _measure(count, 5 if quick else 30, one_file=one_file)
        ours, reference = ways
        layout = "one file in all" if one_file else "a file each"
        ratio, least = median_and_min([a / b for a, b in zip(ours.seconds, reference.seconds, strict=True)])
        for way in ways:
            milliseconds = [second * 1000 for second in way.seconds]
            figures = [percentile(milliseconds, 50), percentile(milliseconds, 99)]
            ratios = [ratio, least] if way is ours else [1.0, 1.0]
            rows.append([count, layout if way is ours else "", way.name, *figures, *ratios])
        stages.append([count, layout, *(percentile(of, 50) for of in zip(*ours.stages, strict=True))])
    return [
        Table(
            "change: file edit to first request served with it",
            ["providers", "layout", "way", "p50 ms", "p99 ms", "x reference (median)", "(min)"],
            rows,
            "Reference: Envoy reads all clusters from a JSON file by itself (path_config_source).",
        ),
        Table(
            "change: where the time goes (p50, ms)",
            ["providers", "layout", "watch and read", "translate and publish", "push, Envoy, next request"],
            stages,
        ),
    ]


@dataclass
class _Way:
    """One way of changing the model that `client` sees."""

    name: str
    client: "_Client"
    edit: Callable[[str], tuple[Path, str]]
    """Returns the file to replace, and with what, to get a model."""
    published: Callable[[], tuple[float, float] | None] = lambda: None
    """Time at which the control plane published the last change, and how long that took it (seconds)."""
    seconds: list[float] = field(default_factory=list)
    stages: list[tuple[float, ...]] = field(default_factory=list)

    def change(self, model: str) -> None:
        file, text = self.edit(model)
        begin, clock = time.perf_counter(), time.time()
        LocalMesh.replace(file, text)
        while self.client.model() != model:
            if time.perf_counter() - begin > _LONGEST:
                raise TimeoutError(f"{self.name}: no request was served with {model} within {_LONGEST} s")
            time.sleep(0.001)
        self.seconds.append(time.perf_counter() - begin)
        at = self.published()
        if at:
            published, took = at[0] - clock, at[1]
            stages = (published - took, took, self.seconds[-1] - published)
            self.stages.append(tuple(second * 1000 for second in stages))


class _Client:
    """Asks for the model that a request gets, on one kept connection."""

    def __init__(self, host: str, port: int) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=_LONGEST)

    def model(self) -> str:
        self._connection.request(
            "POST", "/", b'{"messages": [{"role": "user", "content": "Hi"}]}', {"Host": _HOST}
        )
        response = self._connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise RuntimeError(f"{response.status} {body!r}")
        return str(json.loads(body)["model"])


def _measure(count: int, edits: int, *, one_file: bool) -> tuple[_Way, _Way]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        directory = Path(folder)
        with (
            running_fake_llm(_HOST, directory / "ca") as upstream,
            _llmplane(directory, count, upstream, one_file=one_file) as ours,
            _envoy_alone(directory, count, upstream) as reference,
        ):
            for number in range(edits):
                for way in (ours, reference):
                    way.change(f"model-{number}")
                    time.sleep(random.uniform(0.05, 0.15))  # noqa: S311 - not in step with any timer
            return ours, reference


@contextmanager
def _llmplane(directory: Path, count: int, upstream: str, *, one_file: bool) -> Iterator[_Way]:
    config = directory / "mesh" / "config"
    config.mkdir(parents=True)
    files = providers(count, _DOMAIN)
    edited = f"{_EDITED}.yaml"

    def edit(model: str) -> tuple[Path, str]:
        files[edited] = provider(_EDITED, _DOMAIN, model)
        if one_file:
            return config / "all.yaml", "---\n".join(files.values())
        return config / edited, files[edited]

    for name, text in {"all.yaml": "---\n".join(files.values())}.items() if one_file else files.items():
        (config / name).write_text(text, encoding="utf-8")
    options = ["--connect-to", f"{_HOST}:443:{upstream}", "--ca-file", str(directory / "ca" / "ca.pem")]
    with LocalMesh(directory / "mesh", serve_options=options) as mesh:

        def published() -> tuple[float, float]:
            events = map(json.loads, mesh.log("control-plane").splitlines())
            *_, last = (event for event in events if event["event"] == "published")
            return datetime.fromisoformat(last["timestamp"]).timestamp(), last["milliseconds"] / 1000

        yield _Way("llmplane", _Client(mesh.bind_address, HTTP_PROXY_PORT), edit, published)


@contextmanager
def _envoy_alone(directory: Path, count: int, upstream: str) -> Iterator[_Way]:
    connect_to = [(Address(_HOST, 443), Address.parse(upstream))]
    mesh = mesh_settings(None, connect_to, directory / "ca" / "ca.pem")
    script = directory / "provider.lua"
    script.write_text(lua.SCRIPT, encoding="utf-8")
    static = as_static(translated(list(providers(count, _DOMAIN).values()), mesh, script))
    clusters = {made["name"]: made for made in static.pop("clusters")}
    file = directory / "clusters.json"

    def edit(model: str) -> tuple[Path, str]:
        (changed,) = as_static(translated([provider(_EDITED, _DOMAIN, model)], mesh, script))["clusters"]
        clusters[changed["name"]] = changed
        return file, _discovery_response(list(clusters.values()))

    LocalMesh.replace(*edit("model"))
    source = {"path_config_source": {"path": str(file)}, "resource_api_version": "V3"}
    node = {"id": "bench", "cluster": "bench"}
    bootstrap = {"node": node, "static_resources": static, "dynamic_resources": {"cds_config": source}}
    with running_envoy(bootstrap) as envoy:
        port = envoy.port(static["listeners"][0]["name"])
        yield _Way("Envoy's own files", _Client("127.0.0.1", port), edit)


def _discovery_response(clusters: list[Any]) -> str:
    return json.dumps({"resources": [{"@type": CDS, **made} for made in clusters]})
