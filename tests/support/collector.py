"""An OpenTelemetry collector that keeps what it gets: OTLP over gRPC and over HTTP."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc

_METHODS = tuple(
    f"/opentelemetry.proto.collector.{kind}.v1.{kind.title()}Service/Export" for kind in ("logs", "trace")
)


class Collector:
    """What exporters sent, as protobuf messages in bytes; texts in them stand as they are."""

    def __init__(self) -> None:
        self.exports: list[bytes] = []
        self.grpc_port = 0
        self.http_port = 0

    @property
    def data(self) -> bytes:
        """All that came."""
        return b"".join(self.exports)

    def _export(self, request: bytes, _context: Any) -> bytes:
        self.exports.append(request)
        return b""


@contextmanager
def running_collector() -> Iterator[Collector]:
    """Run a collector on free ports of 127.0.0.1."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = b""
            while size := int(self.rfile.readline(), 16):  # Envoy sends chunks
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            collector.exports.append(body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = grpc.server(ThreadPoolExecutor(2))
    handlers = {
        method.rpartition("/")[2]: grpc.unary_unary_rpc_method_handler(collector._export)
        for method in _METHODS
    }
    for method in _METHODS:
        service = method.split("/")[1]
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    collector.grpc_port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    collector.http_port = http.server_address[1]
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
        server.stop(None).wait()
