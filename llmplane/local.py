"""A control plane and a sidecar as processes on this machine: what the demo shows and the tests drive."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmplane.address import Address
from llmplane.bootstrap import HEALTH_PORT, STATS_PORT
from llmplane.status import StatusUnavailableError, fetch_status

HTTP_PROXY_PORT = 15080
_OWN_PORTS = (HTTP_PROXY_PORT, STATS_PORT, HEALTH_PORT)
_PATIENCE = 60.0
"""Seconds: the machine may be busy with other things."""
_random = random.SystemRandom()  # processes that were seeded alike must not choose alike
_claims: deque[int] = deque()
"""File descriptors that keep others from being given what was given here and is not listened on yet."""
_MOST_CLAIMS = 64


class LocalMeshError(RuntimeError):
    """A process did not start or ended, or a configuration did not become live; the text says why."""


@dataclass(frozen=True, slots=True)
class LocalGateway:
    """A gateway's Envoy, and where it listens."""

    name: str
    bind_address: str
    process: subprocess.Popen[bytes]


class LocalMesh(AbstractContextManager["LocalMesh"]):
    """``llmplane serve`` and ``llmplane proxy sidecar``, started as a user would, ended by the context.

    ``directory`` gets the configuration (``config/``), the processes' logs and their state. ``source`` is
    what says where the objects are (default: ``--config`` with that folder). ``serve_options``
    and ``environment`` are added to the control plane's, ``proxy_options`` to the sidecar's; ``bind_address``
    is where the sidecar opens its listeners (default: the first free address of 127.0.0.0/24),
    ``concurrency`` how many threads an Envoy works with.
    """

    def __init__(
        self,
        directory: Path,
        *,
        source: Sequence[str] | None = None,
        serve_options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        namespace: str = "default",
        workload: str = "sleep",
        proxy_options: Sequence[str] = (),
        envoy_options: Sequence[str] = (),
        bind_address: str | None = None,
        concurrency: int = 1,
    ) -> None:
        self.directory = directory
        self.config = directory / "config"
        self.bind_address = bind_address or free_bind_address()
        self.xds = Address("127.0.0.1", free_port())
        self.admin = Address("127.0.0.1", free_port())
        self.control_plane: subprocess.Popen[bytes] | None = None
        self.proxy: subprocess.Popen[bytes] | None = None
        self.gateways: list[LocalGateway] = []
        self._source = ["--config", str(self.config)] if source is None else source
        self._serve_options = serve_options
        self._environment = {
            **os.environ,
            "XDG_STATE_HOME": str(directory / "state"),
            "XDG_RUNTIME_DIR": str(directory),
            **(environment or {}),
        }
        self._identity = [
            "--namespace",
            namespace,
            "--workload",
            workload,
            "--bind-address",
            self.bind_address,
        ]
        for name, value in (labels or {"app": "sleep"}).items():
            self._identity += ["--label", f"{name}={value}"]
        self._concurrency = str(concurrency)
        self._proxy_options = proxy_options
        self._envoy_options = envoy_options

    @property
    def http_proxy(self) -> str:
        """What a client puts into ``http_proxy``."""
        return f"http://{self.bind_address}:{HTTP_PROXY_PORT}"

    def __enter__(self) -> Self:
        self.config.mkdir(parents=True, exist_ok=True)
        try:
            self.start_control_plane()
            self.start_proxy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start_control_plane(self) -> None:
        """Start ``llmplane serve`` and wait until it is ready."""
        options = [*self._source, "--xds-address", str(self.xds)]
        options += ["--admin-address", str(self.admin), *self._serve_options]
        self.control_plane = self.run("control-plane", ["serve", *options])
        self._wait("the control plane answers", self._answers)

    def start_proxy(self) -> None:
        """Start ``llmplane proxy sidecar`` and wait until it is configured."""
        options = ["--xds-address", str(self.xds), *self._identity, *self._proxy_options]
        envoy = ["--", "--concurrency", self._concurrency, "-l", "warning", *self._envoy_options]
        self.proxy = self.run("sidecar", ["proxy", "sidecar", *options, *envoy])
        self._wait("the sidecar listens", lambda: _listens(self.bind_address, HTTP_PROXY_PORT))
        self.settle()

    def start_gateway(
        self,
        workload: str = "istio-ingressgateway",
        *,
        namespace: str = "istio-system",
        labels: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        bind_address: str | None = None,
    ) -> LocalGateway:
        """Start ``llmplane proxy gateway`` and wait until it is configured.

        ``labels`` are by default those of Istio's ingress gateway. Ports come with the Gateways that are
        applied; they are opened on ``bind_address`` (default: a free address of 127.0.0.0/24).
        """
        address = bind_address or free_bind_address()
        arguments = ["--xds-address", str(self.xds), "--namespace", namespace, "--workload", workload]
        arguments += ["--bind-address", address, *options]
        for name, value in (labels or {"istio": "ingressgateway"}).items():
            arguments += ["--label", f"{name}={value}"]
        envoy = ["--", "--concurrency", self._concurrency, "-l", "warning"]
        process = self.run(workload, ["proxy", "gateway", *arguments, *envoy])
        gateway = LocalGateway(workload, address, process)
        self.gateways.append(gateway)
        self._wait(f"{workload} listens", lambda: _listens(address, HEALTH_PORT))
        self.settle()
        return gateway

    def stop(self) -> None:
        """End all processes; the proxies first, so that they need not reconnect."""
        for _, process in reversed(self._processes()):
            end(process)
        self.proxy = self.control_plane = None
        self.gateways = []

    def apply(self, name: str, text: str, *, settle: bool = True) -> None:
        """Write a configuration file as a whole, and wait until every proxy acknowledged what it means."""
        self.replace(self.config / name, text)
        if settle:
            # Which revision has the text cannot be told: an older change may still be under way. But whatever
            # is read from now on has it, and a second change makes sure that it is read.
            revision = self.status()["revision"]
            self.replace(self.config / name, text)
            self.settle(after=revision)

    @staticmethod
    def replace(file: Path, text: str) -> None:
        """Replace a file at once."""
        temporary = file.with_name(f".{file.name}.new")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)

    def settle(self, after: int = 0) -> None:
        """Wait until a revision later than ``after`` is published and acknowledged by the proxy."""

        def settled() -> bool:
            status = self.status()
            states = [proxy["state"] for proxy in status["proxies"]]
            running = len(self._processes()) - 1  # without the control plane
            return status["revision"] > after and len(states) >= running and set(states) == {"SYNCED"}

        self._wait("every proxy acknowledged the configuration", settled)

    def status(self) -> dict[str, Any]:
        """Return what ``llmplane status --json`` prints."""
        return fetch_status(self.admin, timeout=_PATIENCE)

    def log(self, name: str) -> str:
        """Return the log of ``control-plane``, ``sidecar`` or a gateway's workload."""
        return (self.directory / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def _processes(self) -> list[tuple[str, subprocess.Popen[bytes]]]:
        """Return the names and processes that were started and not stopped, the control plane first."""
        own = (("control-plane", self.control_plane), ("sidecar", self.proxy))
        started = [(name, process) for name, process in own if process is not None]
        return [*started, *((gateway.name, gateway.process) for gateway in self.gateways)]

    def _answers(self) -> bool:
        with suppress(StatusUnavailableError):
            return bool(self.status()["revision"])
        return False

    def run(self, name: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start `llmplane` with arguments; its output goes to the log of that name. The caller ends it."""
        with (self.directory / f"{name}.log").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-m", "llmplane", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                process_group=0,  # Ctrl-C in the terminal reaches us, and we end them in order
            )

    def _wait(self, what: str, condition: Any, seconds: float = _PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            for name, process in self._processes():
                if process.poll() is not None:
                    raise LocalMeshError(f"{name} ended with {process.returncode}:\n{self.log(name)[-2000:]}")
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"--- {log.stem}\n{self.log(log.stem)[-2000:]}" for log in self.directory.glob("*.log")
                )
                raise LocalMeshError(f"waited {seconds:.0f} s until {what}\n{logs}")
            time.sleep(0.02)


def end(process: subprocess.Popen[bytes], seconds: float = 5) -> None:
    """End a process: politely, then for good."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port that nobody listens on, for a server that is yet to start.

    No other call, of any process, gets it meanwhile. It is none of those that the system gives to outgoing
    connections (Linux: from 32768 on), else one of them could have it by the time that the server wants it.
    Raises LocalMeshError if a hundred are taken.
    """
    for _ in range(100):
        port = _random.randrange(20_000, 32_768)
        if _is_free(host, port) and _claim(host, port):
            return port
    raise LocalMeshError(f"{host} has no free port")


def free_bind_address() -> str:
    """Return a loopback address on which a proxy can open its own ports.

    No other call, of any process, gets it meanwhile: two Envoys would share the ports without a word. Raises
    LocalMeshError if there is none.
    """
    for last in range(1, 255):
        address = f"127.0.0.{last}"
        if all(_is_free(address, port) for port in _OWN_PORTS) and _claim(address, HTTP_PROXY_PORT):
            return address
    raise LocalMeshError(f"no address in 127.0.0.0/24 has the ports {_OWN_PORTS} free")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _claim(host: str, port: int) -> bool:
    """Take a TCP port that is free, until it is listened on; return whether nobody else did.

    The claim is the UDP port of its number, which no server here wants. It ends with the process or, as by
    then the port is long listened on, with so many later ones.
    """
    with socket.socket(type=socket.SOCK_DGRAM) as claim:
        try:
            claim.bind((host, port))
        except OSError:
            return False
        _claims.append(claim.detach())
    if len(_claims) > _MOST_CLAIMS:
        os.close(_claims.popleft())
    return True


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0
