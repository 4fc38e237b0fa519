"""Servers of the standard library, in a thread until the end of a block."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _TcpServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False


@contextmanager
def serving_tcp(
    handler: type[socketserver.BaseRequestHandler], address: tuple[str, int] = ("127.0.0.1", 0)
) -> Iterator[int]:
    """Serve connections, by default on a free port of 127.0.0.1, each in a thread; give the port."""
    with _TcpServer(address, handler) as server, serving(server) as port:
        yield port


@contextmanager
def serving_udp(
    handler: type[socketserver.BaseRequestHandler], address: tuple[str, int] = ("127.0.0.1", 0)
) -> Iterator[int]:
    """Serve datagrams, by default on a free port of 127.0.0.1, each in a thread; give the port."""
    with socketserver.ThreadingUDPServer(address, handler) as server, serving(server) as port:
        yield port


@contextmanager
def serving(server: socketserver.TCPServer) -> Iterator[int]:
    """Run a server until the end of the block; give its port."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
