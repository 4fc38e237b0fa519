"""What a request costs in Envoy, over a bare Envoy that proxies to the same TLS upstream.

Each way is an Envoy of its own with one worker; all are up at once and take turns, so that what disturbs one
round disturbs all ways of it. wrk drives, nginx answers: both are faster than Envoy.
"""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.processes import as_static, cpu_seconds, provider, translated
from benchmarks.report import Table, median_and_min
from llmplane.address import Address
from llmplane.certificates import CertificateAuthority, write_pair
from llmplane.local import HTTP_PROXY_PORT, LocalMesh, end, free_port
from llmplane.mesh import mesh_settings
from tests.support.envoy import running_envoy

HOST = "provider-0000.example.com"
_SIZES = {"1 KB": 1_000, "100 KB": 100_000, "1 MB": 1_000_000}
_TEXT = "The quick brown fox jumps over the lazy dog, and nobody cares at all.\n"
_EXTENSIONS = "type.googleapis.com/envoy.extensions"
_PROVIDER_FILTERS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

_NGINX = """\
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/nginx.log;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_buffer_size 2m;
  client_max_body_size 2m;
  client_body_temp_path {directory}/temp;
  proxy_temp_path {directory}/temp;
  fastcgi_temp_path {directory}/temp;
  uwsgi_temp_path {directory}/temp;
  scgi_temp_path {directory}/temp;
  keepalive_requests 100000000;
  upstream answer {{ server 127.0.0.1:{answer_port}; keepalive 64; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {directory}/cert.pem;
    ssl_certificate_key {directory}/key.pem;
    location / {{
      # `return` alone would answer before the body was read, and Envoy would close the connection.
      proxy_pass http://answer;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Content-Length "";
      proxy_pass_request_body off;
    }}
  }}
  server {{
    listen 127.0.0.1:{answer_port};
    default_type application/json;
    location / {{ return 200 '{answer}'; }}
  }}
}}
"""
ANSWER = '{"object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"Hi"}}]}'

_LIMIT = """\
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMTokenRateLimit
metadata:
  name: per-user
spec:
  keys:
    - header: x-user
  rules:
    - limits:
        - {tokens: 4294967294, unit: Hour}
"""

_WRK = """\
local file = io.open("{body}")
wrk.method, wrk.body = "POST", file:read("*a")
wrk.headers["Host"], wrk.headers["Content-Type"] = "{host}", "application/json"
wrk.headers["x-user"] = "alice"
function done(summary, latency)
  local e = summary.errors
  io.stderr:write(string.format('{{"requests": %d, "errors": %d, "p50": %d, "p99": %d}}', summary.requests,
    e.connect + e.read + e.write + e.status + e.timeout, latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass(frozen=True)
class Way:
    """An Envoy that is measured, and the address that it serves."""

    name: str
    address: str
    pid: int


@dataclass(frozen=True)
class Sample:
    """One round of one way: Envoy's CPU time a request, and latencies with one connection; all in µs."""

    cpu: float
    p50: float
    p99: float


def measure(*, quick: bool) -> list[Table]:
    """Send bodies of 1 KB, 100 KB and 1 MB. Raises click.ClickException where nginx or wrk is missing."""
    require("nginx", "wrk")
    rounds, seconds = (2, 1) if quick else (9, 2)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as stack:
        directory = Path(folder)
        ways = _start(stack, directory)
        tables = []
        ours, bare = ways[-1], ways[0]
        rows: list[list[Any]] = []
        for size, length in _SIZES.items():
            samples = take_turns([bare, ours], chat_script(directory, length), rounds, seconds)
            rows.append(_compare(size, samples))
        tables.append(
            Table(
                "request: over a bare Envoy",
                [
                    "body",
                    "CPU bare µs",
                    "CPU llmplane µs",
                    "x (median)",
                    "(min)",
                    "p50 bare ms",
                    "p50 llmplane ms",
                    "x p50",
                    "p99 bare ms",
                    "p99 llmplane ms",
                    "x p99",
                ],
                rows,
                "CPU: of the Envoy process for a request, 8 connections. Latency: one connection. "
                "Aims: CPU x <= 1.5 at 1 KB, <= 2.5 at 100 KB.",
            )
        )
        for size in ("1 KB", "100 KB"):
            samples = take_turns(ways, chat_script(directory, _SIZES[size]), rounds, seconds, latency=False)
            tables.append(steps(size, ways, samples))
        return tables


def require(*tools: str) -> None:
    """Raise click.ClickException if one of these programs is missing."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise click.ClickException(f"not in PATH: {', '.join(missing)}; apt-get install nginx-light wrk")


def _compare(size: str, samples: Sequence[Sequence[Sample]]) -> list[Any]:
    bare, ours = samples
    row: list[Any] = [size]
    ratios = [b.cpu / a.cpu for a, b in zip(bare, ours, strict=True)]
    row += [median([s.cpu for s in bare]), median([s.cpu for s in ours]), *median_and_min(ratios)]
    for of in ("p50", "p99"):
        a, b = ([getattr(sample, of) / 1000 for sample in way] for way in (bare, ours))
        row += [median(a), median(b), median([y / x for x, y in zip(a, b, strict=True)])]
    return row


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return median_and_min(values)[0]


def steps(
    size: str, ways: Sequence[Way], samples: Sequence[Sequence[Sample]], title: str = "request"
) -> Table:
    """Compare all ways with the first one."""
    rows: list[list[Any]] = []
    for way, of in zip(ways, samples, strict=True):
        ratios = [sample.cpu / bare.cpu for sample, bare in zip(of, samples[0], strict=True)]
        added = [sample.cpu - bare.cpu for sample, bare in zip(of, samples[0], strict=True)]
        cpu = median([sample.cpu for sample in of])
        rows.append([way.name, cpu, median(added), *median_and_min(ratios)])
    return Table(
        f"{title}: where the CPU goes, {size}",
        ["Envoy with", "CPU µs", "added µs", "x bare (median)", "(min)"],
        rows,
    )


def take_turns(
    ways: Sequence[Way], script: Path, rounds: int, seconds: int, *, latency: bool = True
) -> list[list[Sample]]:
    """Let the ways take turns, each round in another order; the first round warms up and does not count."""
    samples: list[list[Sample]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for step in range(len(ways)):
            index = (number + step) % len(ways)
            sample = _sample(ways[index], script, seconds if number else 1, latency=latency and number > 0)
            if number:
                samples[index].append(sample)
    return samples


def _sample(way: Way, script: Path, seconds: int, *, latency: bool) -> Sample:
    before = cpu_seconds(way.pid)
    loaded = _wrk(way, script, connections=8, seconds=seconds)
    cpu = (cpu_seconds(way.pid) - before) / loaded["requests"] * 1e6
    alone = _wrk(way, script, connections=1, seconds=1) if latency else loaded
    return Sample(cpu, alone["p50"], alone["p99"])


def _wrk(way: Way, script: Path, *, connections: int, seconds: int) -> dict[str, int]:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script), f"http://{way.address}/"]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, int] = json.loads(output.stderr)
    if result["errors"] or not result["requests"]:
        raise RuntimeError(f"{way.name}: {result}\n{output.stdout}")
    return result


def chat_script(directory: Path, length: int) -> Path:
    """Write the script that makes wrk send a chat of `length` bytes, content only, as applications do."""
    body, script = directory / f"{length}.json", directory / f"{length}.lua"
    chat = {"messages": [{"role": "user", "content": ""}], "temperature": 0.7}
    room = length - len(json.dumps(chat))
    escaped = len(json.dumps(_TEXT)) - 2
    chat["messages"] = [{"role": "user", "content": _TEXT * (room // escaped)}]
    body.write_text(json.dumps(chat), encoding="utf-8")
    script.write_text(_WRK.format(body=body, host=HOST), encoding="utf-8")
    return script


def _start(stack: ExitStack, directory: Path) -> list[Way]:
    """Start the upstream and an Envoy for each way: the bare one first, the real llmplane last."""
    authority = CertificateAuthority.create()
    ca_file = authority.write(directory / "ca")
    write_pair(directory / "cert.pem", directory / "key.pem", authority.issue(HOST))
    port = stack.enter_context(running_nginx(directory, ANSWER))
    options = ["--connect-to", f"{HOST}:443:127.0.0.1:{port}", "--ca-file", str(ca_file)]
    mesh = LocalMesh(directory / "mesh", serve_options=options)
    mesh.config.mkdir(parents=True)
    text = provider(*HOST.split(".", 1))
    (mesh.config / "provider.yaml").write_text(text, encoding="utf-8")
    stack.enter_context(mesh)
    assert mesh.proxy is not None
    settings = mesh_settings(None, [(Address(HOST, 443), Address("127.0.0.1", port))], ca_file)
    static = as_static(translated([text], settings))
    empty = with_filters(static, ["Lua", "CredentialInjector"], "")
    limited = as_static(translated([text, _LIMIT], settings))
    ways = [
        running(stack, "bare router", bare(port, ca_file)),
        running(stack, "+ our listener, routes and cluster", with_filters(static, [])),
        running(stack, "+ credential injector", with_filters(static, ["CredentialInjector"])),
        running(stack, "+ empty Lua filter", empty),
        running(stack, "+ the shipped script", static),
        running(stack, "+ an LLMTokenRateLimit by header", limited),
    ]
    return [*ways, Way("llmplane, all of it", f"{mesh.bind_address}:{HTTP_PROXY_PORT}", mesh.proxy.pid)]


def running(stack: ExitStack, name: str, resources: dict[str, Any], **more: Any) -> Way:
    """Start an Envoy with static resources; `more` are other members of its bootstrap."""
    node = {"id": "bench", "cluster": "bench"}
    envoy = stack.enter_context(running_envoy({"node": node, "static_resources": resources, **more}))
    return Way(name, f"127.0.0.1:{envoy.port(resources['listeners'][0]['name'])}", envoy.pid)


def with_filters(static: dict[str, Any], kept: Sequence[str], script: str | None = None) -> dict[str, Any]:
    """Return the translator's configuration with these upstream filters only, and another Lua text."""
    changed: dict[str, Any] = json.loads(json.dumps(static))
    for cluster in changed["clusters"]:
        options = cluster["typed_extension_protocol_options"][_PROVIDER_FILTERS]
        *filters, codec = options["http_filters"]
        filters = [each for each in filters if each["typed_config"]["@type"].rpartition(".")[2] in kept]
        for each in filters:
            if script is not None and "default_source_code" in each["typed_config"]:
                code = f"function envoy_on_request(h) {script} end"
                each["typed_config"]["default_source_code"] = {"inline_string": code}
        options["http_filters"] = [*filters, codec] if filters else []
        if not filters:
            del options["http_filters"]
    return changed


def bare(port: int, ca_file: Path) -> dict[str, Any]:
    """Return the least that proxies to the upstream: Envoy's defaults, TLS verified."""
    router = {"name": "router", "typed_config": {"@type": f"{_EXTENSIONS}.filters.http.router.v3.Router"}}
    route = {"match": {"prefix": "/"}, "route": {"cluster": "upstream"}}
    manager = {
        "@type": f"{_EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bare",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [router],
    }
    listener = {
        "name": "bare",
        "address": socket_address(0),
        "filter_chains": [{"filters": [{"name": "manager", "typed_config": manager}]}],
    }
    tls = {
        "@type": f"{_EXTENSIONS}.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": HOST,
        "auto_sni_san_validation": True,
        "common_tls_context": {"validation_context": {"trusted_ca": {"filename": str(ca_file)}}},
    }
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": socket_address(port)}}]}]
    cluster = {
        "name": "upstream",
        "load_assignment": {"cluster_name": "upstream", "endpoints": endpoints},
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls},
    }
    return {"listeners": [listener], "clusters": [cluster]}


def socket_address(port: int) -> dict[str, Any]:
    """Return a port of 127.0.0.1 as Envoy's core.v3.Address."""
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


@contextmanager
def running_nginx(directory: Path, answer: str) -> Iterator[int]:
    """Run nginx as the provider HOST: TLS, and the same JSON for each request. Yields its port."""
    port, answer_port = free_port(), free_port()
    config = directory / "nginx.conf"
    text = _NGINX.format(directory=directory, port=port, answer_port=answer_port, answer=answer)
    config.write_text(text, encoding="utf-8")
    command = ["nginx", "-c", str(config), "-g", "daemon off;"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 10
            while not (directory / "nginx.pid").exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"nginx does not run: {(directory / 'nginx.log').read_text()}")
                time.sleep(0.02)
            yield port
        finally:
            end(process)
