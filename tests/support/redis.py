"""A real Redis (Debian package redis-server) on a free port of this machine; nothing is kept on disk."""

import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from llmplane.local import free_port
from tests.support.wait import eventually

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None,
    reason="needs redis-server in PATH (apt-get install redis-server)",
)


class RedisServer:
    """A Redis that can be stopped, started and frozen."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start with no data, unless it runs, and wait until it answers."""
        if self._process is not None:
            return
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        eventually(self._answers)

    def stop(self) -> None:
        """Kill it, with all it knows."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Have it accept connections and answer nothing."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def send(self, *words: str) -> bytes:
        """Send one command; return the beginning of the answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall((" ".join(words) + "\r\n").encode())
            return connection.recv(65536)

    def _answers(self) -> bool:
        with suppress(OSError):
            return self.send("PING") == b"+PONG\r\n"
        return False


@contextmanager
def running_redis() -> Iterator[RedisServer]:
    """Run a Redis."""
    server = RedisServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()
