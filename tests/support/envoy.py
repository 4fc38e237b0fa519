"""A real Envoy on a bootstrap configuration of the test."""

import http.client
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llmplane.envoy import find_envoy
from translator.features import Feature, read_version

_START_SECONDS = 60


@cache
def envoy_version() -> str:
    """Return the version of the Envoy that the tests run, `1.40.0`. Raises EnvoyNotFoundError."""
    answer = subprocess.run([find_envoy(), "--version"], capture_output=True, text=True, check=True).stdout
    # envoy  version: <hash of the commit>/1.40.0/Clean/RELEASE/BoringSSL
    return answer.split("/")[-4]


def has(feature: Feature) -> bool:
    """Whether the Envoy that the tests run has a feature."""
    version = read_version(envoy_version())
    return version is None or version >= feature.since


def ask_admin(address: Path, path: str, *, method: str = "GET") -> str:
    """Ask the admin interface of an Envoy, a Unix socket. Raises OSError if it does not answer."""
    connection = http.client.HTTPConnection("envoy-admin")
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(str(address))
        connection.request(method, path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


@dataclass(frozen=True)
class Envoy:
    """A running Envoy."""

    pid: int
    admin_port: int
    log: Path

    def admin(self, path: str, method: str = "GET") -> bytes:
        """Return the body of an admin page. Raises OSError if Envoy does not answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.admin_port, timeout=60)
        try:
            connection.request(method, path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def port(self, listener: str) -> int:
        """Return the port that a listener is bound to. Raises LookupError if none has this name."""
        for status in json.loads(self.admin("/listeners?format=json"))["listener_statuses"]:
            if status["name"] == listener:
                return int(status["local_address"]["socket_address"]["port_value"])
        raise LookupError(f"Envoy has no listener {listener!r}")

    def stats(self, pattern: str) -> dict[str, int]:
        """Return the counters and gauges whose names match a regular expression."""
        page = json.loads(self.admin(f"/stats?format=json&filter={pattern}"))
        return {stat["name"]: stat["value"] for stat in page["stats"] if "name" in stat}


@contextmanager
def running_envoy(bootstrap: Mapping[str, Any], *arguments: str) -> Iterator[Envoy]:
    """Run Envoy with one worker on a bootstrap configuration, from ready to the end of the block.

    The admin address of the bootstrap is replaced by a free port of 127.0.0.1; listeners may ask for port 0.
    Raises RuntimeError with the end of Envoy's log if it does not become ready.
    """
    admin = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}}
    with tempfile.TemporaryDirectory(prefix="envoy-test-") as folder:
        config, address, log = (Path(folder) / name for name in ("bootstrap.json", "admin-address", "log"))
        config.write_text(json.dumps({**bootstrap, "admin": admin}))
        command = [str(find_envoy()), "--config-path", str(config), "--admin-address-path", str(address)]
        command += ["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning", *arguments]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            yield _ready(process, address, log)
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(process: subprocess.Popen[bytes], address: Path, log: Path) -> Envoy:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        text = address.read_text() if address.exists() else ""
        if not text:
            continue
        envoy = Envoy(process.pid, int(text.rpartition(":")[2]), log)
        with suppress(OSError):  # the address is written before it is listened on, and Envoy may end any time
            if envoy.admin("/ready").strip() == b"LIVE":
                return envoy
    raise RuntimeError(f"Envoy is not ready: {log.read_text(errors='replace')[-4000:]}")
