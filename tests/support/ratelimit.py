"""Rate limit services as processes of their own: `llmplane ratelimit`, and that of the Envoy project."""

import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmplane.address import Address
from llmplane.local import end, free_port
from tests.support.wait import eventually

_DEPLOYED = Path(__file__).parents[2] / "deploy" / "ratelimit"


@dataclass(frozen=True)
class RateLimitServer:
    """Where it is."""

    address: Address
    admin: Address
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> tuple[int, str]:
        """Ask an admin endpoint."""
        try:
            with urllib.request.urlopen(f"http://{self.admin}{path}", timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, series: str) -> float:
        """Return the value of a time series, 0 if it is not there."""
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(f"{series} "):
                return float(line.rpartition(" ")[2])
        return 0.0


@contextmanager
def running_ratelimit(
    directory: Path, *options: str, redis_url: str = "", port: int = 0
) -> Iterator[RateLimitServer]:
    """Run a rate limit service; `options` are of its command line."""
    address, admin = Address("127.0.0.1", port or free_port()), Address("127.0.0.1", free_port())
    command: Sequence[str] = (
        *(sys.executable, "-m", "llmplane", "ratelimit", "--address", str(address)),
        *("--admin-address", str(admin), *options),
    )
    environment = {**os.environ, "LLMPLANE_REDIS_URL": redis_url}
    log = directory / f"ratelimit-{address.port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stderr=output)
    server = RateLimitServer(address, admin, process, log)
    try:
        eventually(lambda: server.get("/healthz")[0] == 200 or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield server
    finally:
        end(process)


ENVOYS_SERVICE = Path("~/.cache/llmplane/ratelimit/bin/service_cmd").expanduser()
"""Envoy's ratelimit service, if somebody built it there."""
needs_envoys_service = pytest.mark.skipif(
    not ENVOYS_SERVICE.exists(),
    reason=f"needs Envoy's ratelimit service: GOBIN={ENVOYS_SERVICE.parent} "
    "go install github.com/envoyproxy/ratelimit/src/service_cmd@latest",
)


@contextmanager
def running_envoys_service(directory: Path, redis_port: int) -> Iterator[tuple[int, int]]:
    """Run Envoy's ratelimit service as deploy/ratelimit configures it; yield its port and process id.

    Where it was not built, nothing listens on that port.
    """
    port = free_port()
    if not ENVOYS_SERVICE.exists():
        yield port, 0
        return
    lines = (_DEPLOYED / "ratelimit.env").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    shutil.copytree(_DEPLOYED / "config", directory / "data" / "config")
    settings |= {"RUNTIME_ROOT": str(directory / "data"), "REDIS_URL": f"127.0.0.1:{redis_port}"}
    for name, own in {"": free_port(), "DEBUG_": free_port(), "GRPC_": port}.items():
        settings |= {f"{name}HOST": "127.0.0.1", f"{name}PORT": str(own)}
    with (directory / "envoys-service.log").open("wb") as output:
        process = subprocess.Popen([ENVOYS_SERVICE], env=settings, stdout=output, stderr=output)
    try:
        eventually(lambda: _listens(port) or process.poll() is not None)
        assert process.poll() is None, (directory / "envoys-service.log").read_text()
        yield port, process.pid
    finally:
        end(process)


def _listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0
