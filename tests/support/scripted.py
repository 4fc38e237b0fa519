"""A plaintext HTTP server whose answers are scripted byte for byte and piece by piece.

A client that begins with HTTP/2's preface gets HTTP/2, where each piece is a DATA frame: Envoy's filters see
frame after frame, however the bytes travel. With HTTP/1.1 a piece is a chunk, and pieces that arrive together
are one to the filters; `pause` keeps them apart.
"""

import socket
import socketserver
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from tests.support.serving import serving_tcp

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@dataclass
class Script:
    """An answer."""

    pieces: Iterable[bytes] = ()
    """They may be made as they are sent."""
    status: int = 200
    headers: Sequence[tuple[str, str]] = (("content-type", "application/json"),)
    pause: float = 0
    """Seconds before each piece but the first."""
    end: Literal["end", "reset", "wait"] = "end"
    """How it ends: well; with the connection or the stream reset; not before the client goes away."""
    trailers: Sequence[tuple[str, str]] = ()
    """HTTP/2 only."""


@dataclass
class ScriptedServer:
    """A server on a free port of 127.0.0.1."""

    port: int = 0
    scripts: list[Script] = field(default_factory=list)
    """The answers to come; the last one stays."""
    bodies: list[bytes] = field(default_factory=list)
    """What arrived, HTTP/1.1 only."""

    def answer(self, *scripts: Script) -> None:
        """Answer with these from now on."""
        self.scripts[:] = scripts
        self.bodies.clear()

    def next_script(self) -> Script:
        """Return the answer to a request."""
        return self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]


def cut(body: bytes, size: int) -> list[bytes]:
    """Cut a body into pieces of a size; 0: leave it in one."""
    return [body[i : i + size] for i in range(0, len(body), size)] if size else [body]


@contextmanager
def running_scripted_server() -> Iterator[ScriptedServer]:
    """Run a server until the end of the block."""
    state = ScriptedServer()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            connection: socket.socket = self.request
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(ConnectionError, h2.exceptions.ProtocolError):
                if connection.recv(len(PREFACE), socket.MSG_PEEK | socket.MSG_WAITALL) == PREFACE:
                    _serve_http2(connection, state)
                else:
                    _serve_http1(connection, state)

    with serving_tcp(Handler) as state.port:
        yield state


def _serve_http1(connection: socket.socket, state: ScriptedServer) -> None:
    stream = connection.makefile("rb")
    while stream.readline():
        length = 0
        while line := stream.readline().strip().lower():
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        state.bodies.append(stream.read(length))
        script = state.next_script()
        chunked = "content-length" not in dict(script.headers)
        headers = [*script.headers, *([("transfer-encoding", "chunked")] if chunked else [])]
        head = [f"HTTP/1.1 {script.status} -", *(f"{name}: {value}" for name, value in headers), "", ""]
        connection.sendall("\r\n".join(head).encode())
        for number, piece in enumerate(script.pieces):
            time.sleep(script.pause if number else 0)
            connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        if script.end == "wait":
            stream.read()
        elif script.end == "reset":
            time.sleep(0.5)  # a reset takes with it what was not read yet
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        if chunked:
            connection.sendall(b"0\r\n\r\n")


def _serve_http2(connection: socket.socket, state: ScriptedServer) -> None:
    protocol = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    protocol.initiate_connection()
    connection.sendall(protocol.data_to_send())
    while data := connection.recv(65536):
        for event in protocol.receive_data(data):
            if isinstance(event, h2.events.DataReceived):
                protocol.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                _answer_http2(protocol, event.stream_id, state.next_script())
        connection.sendall(protocol.data_to_send())


def _answer_http2(protocol: h2.connection.H2Connection, stream: int, script: Script) -> None:
    protocol.send_headers(stream, [(":status", str(script.status)), *script.headers])
    frames = [frame for piece in script.pieces for frame in cut(piece, protocol.max_outbound_frame_size)]
    for number, frame in enumerate(frames, 1):
        last = number == len(frames) and script.end == "end" and not script.trailers
        protocol.send_data(stream, frame, end_stream=last)
    if script.end == "reset":
        protocol.reset_stream(stream)
    elif script.trailers:
        protocol.send_headers(stream, script.trailers, end_stream=True)
