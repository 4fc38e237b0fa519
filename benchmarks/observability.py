"""What tokens, metrics and a JSON access log cost in Envoy, over a bare Envoy and over llmplane without them.

The upstream speaks TLS with all of them, as providers do. All Envoys are up at once and take turns, as in
`request`.
"""

import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import yaml

from benchmarks.paced import CHUNKS
from benchmarks.processes import as_static, provider, resident_bytes, run_seconds, translated
from benchmarks.report import Table, median_and_min
from benchmarks.request import (
    HOST,
    Way,
    bare,
    chat_script,
    median,
    require,
    running,
    running_nginx,
    steps,
    take_turns,
)
from llmplane.address import Address
from llmplane.bootstrap import ProxySettings, bootstrap
from llmplane.certificates import CertificateAuthority, write_pair
from llmplane.local import end
from llmplane.mesh import mesh_settings
from tests.support.envoy import Envoy, running_envoy
from translator.metrics import SCOPE
from translator.proxy import ProxyType
from translator.world import MeshSettings

_FIELDS = {
    "start_time": "%START_TIME%",
    "method": "%REQ(:METHOD)%",
    "path": "%REQ(:PATH)%",
    "response_code": "%RESPONSE_CODE%",
    "response_flags": "%RESPONSE_FLAGS%",
    "bytes_sent": "%BYTES_SENT%",
    "duration": "%DURATION%",
    "upstream_cluster": "%UPSTREAM_CLUSTER_RAW%",
    "authority_for": "%REQ(:AUTHORITY)%",
    "request_model": "FILTER_STATE(wasm.asm.llmproxy.request_model:PLAIN)",
    "request_prompt_tokens": "FILTER_STATE(wasm.asm.llmproxy.request_prompt_tokens:PLAIN)",
    "request_completion_tokens": "FILTER_STATE(wasm.asm.llmproxy.request_completion_tokens:PLAIN)",
}
_NO_METRICS = {"defaultProviders": {"metrics": []}}
_ALL = "+ metrics: all"


def measure(*, quick: bool) -> list[Table]:
    """Measure JSON answers of 2 KB, paced streams, and memory. Raises click.ClickException as `request`."""
    require("nginx", "wrk")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as stack:
        directory = Path(folder)
        certificates = _Certificates(directory)
        tables = [_json(stack, certificates, quick=quick), _streams(stack, certificates, quick=quick)]
        tables.append(_memory(stack, certificates, 200 if quick else 1000))
        return tables


class _Certificates:
    """A directory with a CA and the provider's certificate."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        authority = CertificateAuthority.create()
        self.ca_file = authority.write(directory / "ca")
        write_pair(directory / "cert.pem", directory / "key.pem", authority.issue(HOST))


def _ways(stack: ExitStack, certificates: _Certificates, port: int) -> list[Way]:
    """Start an Envoy for each step from the bare one to the one with everything."""
    log = {
        "accessLogFile": str(certificates.directory / "access.log"),
        "accessLogEncoding": "JSON",
        "accessLogFormat": json.dumps(_FIELDS),
    }
    nothing = _without_tokens(_static(certificates, port, _NO_METRICS))
    return [
        running(stack, "bare router", bare(port, certificates.ca_file)),
        running(stack, "llmplane without observability", nothing),
        running(stack, "+ tokens", _static(certificates, port, _NO_METRICS)),
        running(stack, "+ JSON log", _static(certificates, port, {**_NO_METRICS, **log})),
        running(stack, _ALL, _static(certificates, port, log), stats_config=_buckets()),
    ]


def _static(
    certificates: _Certificates, port: int, mesh: Mapping[str, Any], *, forced: bool = True
) -> dict[str, Any]:
    """Return the translator's configuration; the provider's model is `forced`, or chosen by clients."""
    text = provider(*HOST.split(".", 1)).replace("        stream: false\n", "")  # clients say
    if not forced:
        text = text.replace("        model: qwen-1.8b-chat\n", "")
    return as_static(translated([text], _settings(certificates, port, mesh)))


def _settings(certificates: _Certificates, port: int, mesh: Mapping[str, Any]) -> MeshSettings:
    file = certificates.directory / "mesh.yaml"
    file.write_text(yaml.safe_dump(dict(mesh)), encoding="utf-8")
    return mesh_settings(file, [(Address(HOST, 443), Address("127.0.0.1", port))], certificates.ca_file)


def _without_tokens(static: dict[str, Any]) -> dict[str, Any]:
    """Leave out the response part of the script."""
    text = json.dumps(static)
    end_of_script = json.dumps("for _, f in ipairs(interpreted) do jit.off(f, true) end\n")[1:-1]
    assert end_of_script in text
    changed: dict[str, Any] = json.loads(
        text.replace(end_of_script, end_of_script + "envoy_on_response = nil")
    )
    return changed


def _buckets() -> dict[str, Any]:
    settings = ProxySettings(ProxyType.SIDECAR, "127.0.0.1", 1, "default", "sleep", Path("/nowhere.sock"))
    found: dict[str, Any] = bootstrap(settings)["stats_config"]
    return found


# ---------------------------------------------------------------------------------------------------
# A JSON answer


def _json(stack: ExitStack, certificates: _Certificates, *, quick: bool) -> Table:
    usage = {"prompt_tokens": 31, "completion_tokens": 412, "total_tokens": 443}
    message = {"role": "assistant", "content": "word " * 360}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    answer = {"object": "chat.completion", "model": "qwen-1.8b-chat", "choices": [choice], "usage": usage}
    port = stack.enter_context(running_nginx(certificates.directory, json.dumps(answer)))
    ways = _ways(stack, certificates, port)
    rounds, seconds = (3, 1) if quick else (11, 1)
    script = chat_script(certificates.directory, 2_000)
    samples = take_turns(ways, script, rounds, seconds, latency=False)
    table = steps("2 KB JSON", ways, samples, "observability")
    over = [full.cpu / alone.cpu for alone, full in zip(samples[1], samples[-1], strict=True)]
    note = f"All over llmplane without observability: x {median(over):.2f}. Aim: all <= 2.2 over bare."
    return Table(table.title, table.headers, table.rows, note)


# ---------------------------------------------------------------------------------------------------
# A paced stream


@dataclass(frozen=True)
class _Streamed:
    """Streams of one round: Envoy's CPU time for one, its first byte and its end, all in ms (medians)."""

    cpu: float
    first: float
    all: float


def _streams(stack: ExitStack, certificates: _Certificates, *, quick: bool) -> Table:
    port = stack.enter_context(_running_paced_server(certificates.directory))
    ways = _ways(stack, certificates, port)
    samples: list[list[_Streamed]] = [[] for _ in ways]
    for number in range((2 if quick else 25) + 1):
        for step in range(len(ways)):
            index = (number + step) % len(ways)
            sample = asyncio.run(_round(ways[index], 10))
            if number:
                samples[index].append(sample)
    rows: list[list[Any]] = []
    for way, of in zip(ways, samples, strict=True):
        row: list[Any] = [way.name, median([sample.cpu for sample in of])]
        row += median_and_min([sample.cpu / bare.cpu for sample, bare in zip(of, samples[0], strict=True)])
        row.append(median([sample.cpu / alone.cpu for sample, alone in zip(of, samples[1], strict=True)]))
        for what in ("first", "all"):
            row.append(median([getattr(sample, what) for sample in of]))
        rows.append(row)
    return Table(
        f"observability: a stream of {CHUNKS} chunks, one each 5 ms",
        ["Envoy with", "CPU ms", "x bare (median)", "(min)", "x llmplane alone", "first byte ms", "all ms"],
        rows,
        "10 streams at a time. Aim: all <= 1.3 over bare, first byte as with bare.",
    )


async def _round(way: Way, streams: int) -> _Streamed:
    before = run_seconds(way.pid)
    times = await asyncio.gather(*(_stream(way.address) for _ in range(streams)))
    cpu = (run_seconds(way.pid) - before) / streams * 1e3
    return _Streamed(cpu, median([first for first, _ in times]), median([whole for _, whole in times]))


async def _stream(address: str) -> tuple[float, float]:
    """Ask for a stream; return when its first byte and its end came, in ms."""
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"stream": True, "messages": [{"role": "user", "content": "Hi"}]})
    head = f"POST / HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    loop = asyncio.get_running_loop()
    start = loop.time()
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
    status = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in status:
        raise RuntimeError(f"{address}: {status!r}")
    await reader.readexactly(1)
    first = loop.time()
    rest = await reader.read(-1)
    if rest.count(b"data:") < CHUNKS:
        raise RuntimeError(f"{address}: a stream broke off")
    writer.close()
    return (first - start) * 1e3, (loop.time() - start) * 1e3


@contextmanager
def _running_paced_server(directory: Path) -> Iterator[int]:
    command = [sys.executable, "-m", "benchmarks.paced", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            end(process)


# ---------------------------------------------------------------------------------------------------
# Memory


def _memory(stack: ExitStack, certificates: _Certificates, models: int) -> Table:
    """Let clients choose many models, and look how Envoy grows."""
    usage = {"prompt_tokens": 3, "completion_tokens": 72}
    port = stack.enter_context(running_nginx(certificates.directory, json.dumps({"usage": usage})))
    rows: list[list[Any]] = []
    for name, mesh in (
        ("no metrics", _NO_METRICS),
        ("metrics", {"llmMetrics": {"maxClientModels": 100_000, "maxSeries": 100_000}}),
    ):
        static = {"static_resources": _static(certificates, port, mesh, forced=False)}
        listener = static["static_resources"]["listeners"][0]["name"]
        node = {"id": "bench", "cluster": "bench"}
        envoy = stack.enter_context(running_envoy({"node": node, "stats_config": _buckets(), **static}))
        _ask(envoy, listener, ["warm"] * 100)
        before = resident_bytes(envoy.pid), _series(envoy)
        _ask(envoy, listener, [f"model-{number:05}" for number in range(models)])
        more = resident_bytes(envoy.pid) - before[0]
        series = _series(envoy) - before[1]
        rows.append([name, models, series, more / 1e6, more / series / 1e3 if series else None])
    return Table(
        "observability: memory",
        ["Envoy with", "models", "more series", "more MB", "MB a thousand series"],
        rows,
        "A series is a counter or a histogram with its labels. Each model answers one request, no stream.",
    )


def _ask(envoy: Envoy, listener: str, models: Sequence[str]) -> None:
    connection = HTTPConnection("127.0.0.1", envoy.port(listener))
    for model in models:
        body = json.dumps({"model": model, "messages": []})
        connection.request("POST", "/", body, {"host": HOST, "content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != HTTPStatus.OK:
            raise RuntimeError(f"{model}: {answer.status}")
    connection.close()
    time.sleep(6)  # Envoy makes its histograms every 5 s


def _series(envoy: Envoy) -> int:
    page = envoy.admin("/stats/prometheus").decode()
    return len(re.findall(rf"^envoy_{SCOPE}_\w+(?<!_bucket)(?<!_sum){{", page, re.MULTILINE))
