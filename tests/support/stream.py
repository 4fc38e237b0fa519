"""A plaintext HTTP server whose answer comes in pieces, each when the test says so."""

import queue
import socketserver
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.support.serving import serving_tcp


@dataclass
class PiecewiseServer:
    """A server on a free port of 127.0.0.1; what `send` gets goes out as a chunk of the answer at once."""

    port: int = 0
    _pieces: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)

    def send(self, piece: bytes) -> None:
        """Send one more piece of the answer."""
        self._pieces.put(piece)

    def end(self) -> None:
        """End the answer."""
        self._pieces.put(None)


@contextmanager
def running_piecewise_server() -> Iterator[PiecewiseServer]:
    """Run a server until the end of the block. The answers are of the type text/event-stream."""
    state = PiecewiseServer()

    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            length = 0
            while line := self.rfile.readline().strip().lower():
                if line.startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            self.rfile.read(length)
            self.wfile.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            while (piece := state._pieces.get()) is not None:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")

    with serving_tcp(Handler) as state.port:
        try:
            yield state
        finally:
            state.end()
