"""What the provider script costs: Envoy's CPU time for a request, against the same Envoy without the script.

Run `python -m benchmarks.bench_splice` in the root of the repository, on an otherwise idle Linux machine. The
CPU time is that of the Envoy process only, so the client and the upstream here may be slow. The two ways take
turns; each ratio is between neighbours in time, and the median over the rounds is printed.

The aims: at most 1.5 times the CPU of the bare Envoy with 1 KB, and 2.5 times with 100 KB.
"""

import asyncio
import json
import multiprocessing
import socket
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.envoy import running_envoy
from translator.lua import SCRIPT, Member, Operation, filter_context

ROUNDS = 7
CONNECTIONS = 8
EXTENSIONS = "type.googleapis.com/envoy.extensions."
TEXT = "The quick brown fox jumps over the lazy dog, and nobody cares at all.\n"
MEMBERS = (
    Member(("model",), '"qwen-turbo"', "force"),
    Member(("stream",), "false", "fill"),
    Member(("stream_options", "include_usage"), "true", "fill"),
)


class Sink(asyncio.Protocol):
    """The upstream: reads a request with a content-length, answers 200."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with nothing read."""
        self.transport = transport
        self.head = b""
        self.missing = -1  # bytes of the body that are still to come; -1: in the head

    def data_received(self, data: bytes) -> None:
        """Count the bytes of the body, and answer when all are there."""
        if self.missing < 0:
            self.head, end, rest = (self.head + data).partition(b"\r\n\r\n")
            if not end:
                return
            length = self.head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            self.missing, data = int(length), rest
        self.missing -= len(data)
        if self.missing == 0:
            assert isinstance(self.transport, asyncio.Transport)
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            self.head, self.missing = b"", -1


def serve(listening: socket.socket) -> None:
    """Run the upstream until the process is ended."""

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Sink, sock=listening)
        await server.serve_forever()

    asyncio.run(run())


def bootstrap(port: int) -> dict[str, Any]:
    """Return an Envoy with the listeners `bare` and `script`, each before a cluster of its own."""
    operation = Operation("POST", "/chat/completions", "/v1/chat/completions", MEMBERS)
    lua = {
        "@type": f"{EXTENSIONS}filters.http.lua.v3.Lua",
        "shared_vm_id": "llm",
        "default_source_code": {"inline_string": SCRIPT},
        "filter_context": filter_context("provider.example", [operation]),
    }
    codec = {"@type": f"{EXTENSIONS}filters.http.upstream_codec.v3.UpstreamCodec"}
    chains = {
        "bare": [{"name": "codec", "typed_config": codec}],
        "script": [{"name": "llm.provider", "typed_config": lua}, {"name": "codec", "typed_config": codec}],
    }
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    clusters = [
        {
            "name": name,
            "type": "STATIC",
            "load_assignment": {
                "cluster_name": name,
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
            },
            "typed_extension_protocol_options": {
                options: {
                    "@type": f"type.googleapis.com/{options}",
                    "explicit_http_config": {"http_protocol_options": {}},
                    "http_filters": chain,
                }
            },
        }
        for name, chain in chains.items()
    ]
    return {"static_resources": {"listeners": [listener(name) for name in chains], "clusters": clusters}}


def listener(cluster: str) -> dict[str, Any]:
    """Return a listener of the cluster's name whose every request goes to the cluster."""
    manager = {
        "@type": f"{EXTENSIONS}filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": cluster,
        "http_filters": [
            {"name": "router", "typed_config": {"@type": f"{EXTENSIONS}filters.http.router.v3.Router"}}
        ],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": cluster,
                    "domains": ["*"],
                    "request_body_buffer_limit": 33554432,
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s"}}],
                }
            ]
        },
    }
    return {
        "name": cluster,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
        "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}],
    }


def cpu_seconds(pid: int) -> float:
    """Return the CPU time (user and system) that the threads of a process have used so far."""
    return (
        sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9
    )


def send(connections: Sequence[socket.socket], request: bytes, count: int) -> None:
    """Send at least `count` requests, one at a time on each connection."""
    for _ in range(-(-count // len(connections))):
        for connection in connections:
            connection.sendall(request)
        for connection in connections:
            answer = b""
            while not answer.endswith(b"{}"):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200"), answer


def microseconds(pid: int, connections: Sequence[socket.socket], data: bytes, count: int) -> float:
    """Return Envoy's CPU time for one of `count` requests."""
    send(connections, data, count // 10)
    start = cpu_seconds(pid)
    send(connections, data, count)
    return (cpu_seconds(pid) - start) / count * 1e6


def request(size: int) -> bytes:
    """Return a chat request with a body of about `size` bytes, in which every line feed is an escape."""
    messages = [{"role": "user", "content": TEXT * (size // len(TEXT))}]
    body = json.dumps({"model": "gpt-4o", "messages": messages, "temperature": 0.7}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: provider.example\r\ncontent-length: {len(body)}\r\n"
    return f"{head}content-type: application/json\r\nuser-agent: bench\r\naccept: */*\r\n\r\n".encode() + body


def main() -> None:
    """Measure and print."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    upstream = multiprocessing.get_context("fork").Process(target=serve, args=(listening,), daemon=True)
    upstream.start()
    try:
        with running_envoy(bootstrap(listening.getsockname()[1])) as envoy:
            loads = {
                way: [socket.create_connection(("127.0.0.1", envoy.port(way))) for _ in range(CONNECTIONS)]
                for way in ("bare", "script")
            }
            for size, count in ((1_000, 8_000), (100_000, 2_000), (1_000_000, 200)):
                data = request(size)
                rounds = [
                    {way: microseconds(envoy.pid, sockets, data, count) for way, sockets in loads.items()}
                    for _ in range(ROUNDS)
                ]
                bare, script = (min(one[way] for one in rounds) for way in loads)
                ratio = statistics.median(one["script"] / one["bare"] for one in rounds)
                sys.stdout.write(
                    f"{size:9,} bytes: bare {bare:7.1f} us, script {script:7.1f} us, ratio {ratio:.2f}\n"
                )
            for sockets in loads.values():
                for connection in sockets:
                    connection.close()
    finally:
        upstream.terminate()
        upstream.join()
        listening.close()


if __name__ == "__main__":
    main()
