"""An HTTP/1.1 server that keeps the exact bytes of the requests that reach it."""

import socketserver
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedIOBase

from tests.support.serving import serving_tcp


@dataclass(frozen=True)
class Received:
    """A request as it arrived; header names are in lower case and in the order of arrival."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        """Return the value of a header or None. Raises ValueError if it was sent more than once."""
        values = [value for key, value in self.headers if key == name]
        if len(values) > 1:
            raise ValueError(f"{name} was sent {len(values)} times")
        return values[0] if values else None


@dataclass
class Upstream:
    """A server on a free port of 127.0.0.1; `status` is the status of its answers."""

    port: int = 0
    status: int = 200
    received: list[Received] = field(default_factory=list)

    def reset(self) -> None:
        """Forget the requests so far and answer 200."""
        self.status = 200
        self.received.clear()


@contextmanager
def running_upstream() -> Iterator[Upstream]:
    """Run a server until the end of the block."""
    upstream = Upstream()

    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            while (request := _read_request(self.rfile)) is not None:
                upstream.received.append(request)
                content = b'{"object":"chat.completion"}'
                head = f"HTTP/1.1 {upstream.status} -\r\ncontent-type: application/json\r\n"
                self.wfile.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)

    with serving_tcp(Handler) as upstream.port:
        yield upstream


def _read_request(stream: BufferedIOBase) -> Received | None:
    try:
        line = stream.readline()
    except ConnectionError:  # Envoy closes with a reset when it stops
        return None
    if not line:
        return None
    method, path, _ = line.decode("latin-1").split(" ")
    headers = []
    while (line := stream.readline().rstrip(b"\r\n")) != b"":
        name, _, value = line.decode("latin-1").partition(":")
        headers.append((name.lower(), value.strip()))
    fields = dict(headers)
    if fields.get("transfer-encoding") == "chunked":
        body = b"".join(_chunks(stream))
    else:
        body = stream.read(int(fields.get("content-length", "0")))
    return Received(method, path, tuple(headers), body)


def _chunks(stream: BufferedIOBase) -> Iterator[bytes]:
    while (size := int(stream.readline(), 16)) > 0:
        yield stream.read(size)
        stream.readline()
    stream.readline()
