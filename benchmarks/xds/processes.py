"""The processes of one cell: a server of each kind, each with Envoys of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from benchmarks.processes import resident_bytes
from benchmarks.xds.worlds import Files
from llmplane.local import end

LLMPLANE: Final = "llmplane"
WHOLE: Final = "llmplane with translation"
SNAPSHOT: Final = "go-control-plane Snapshot"
LINEAR: Final = "go-control-plane Linear"

_SOURCES: Final = Path(__file__).parent / "go"


class TooSlowError(Exception):
    """Not all have acknowledged in time."""


class Process:
    """A process that answers lines of commands with lines of JSON."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._process = process

    def send(self, command: str) -> None:
        """Give it a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Return its next answer. Raises TooSlowError."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended")
        fields: dict[str, Any] = json.loads(line)
        if "missing" in fields:
            raise TooSlowError
        return fields

    def ask(self, command: str) -> dict[str, Any]:
        """Give it a command and return its answer. Raises TooSlowError."""
        self.send(command)
        return self.receive()

    @property
    def memory(self) -> int:
        """Bytes (RssAnon)."""
        return resident_bytes(self.pid)


@contextmanager
def running_server(kind: str, files: Files, providers: int) -> Iterator[tuple[Process, str]]:
    """Run a management server; yields it with its address."""
    world = ["--world", str(files.world), "--changed", str(files.changed)]
    python = [sys.executable, "-m", "benchmarks.xds.server"]
    command = {
        LLMPLANE: [*python, *world],
        WHOLE: [*python, "--providers", str(providers)],
        SNAPSHOT: [str(go_program()), "serve", "--cache", "snapshot", *world],
        LINEAR: [str(go_program()), "serve", "--cache", "linear", *world],
    }[kind]
    with _running(command) as process:
        yield process, f"127.0.0.1:{process.receive()['port']}"


@contextmanager
def running_envoys(
    address: str, files: Files, streams: int, *, delta: bool, resume: bool
) -> Iterator[Process]:
    """Run what plays Envoys; they connect when they are told to.

    `resume`: they have everything from an earlier stream, and ask for clusters only.
    """
    command = [str(go_program()), "load", "--address", address, "--streams", str(streams)]
    subscriptions = files.clusters_only if resume else files.subscriptions
    command += ["--subscriptions", str(subscriptions), "--node", str(files.node)]
    command += ["--learn", str(files.clusters)] if resume else ["--resources", str(files.resources)]
    with _running([*command, f"--delta={json.dumps(delta)}"]) as process:
        process.receive()
        yield process


def go_program() -> Path:
    """Return the Go half, where it is built: beside Go's own cache, out of the tree."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "llmplane" / "xds-bench"


def build() -> None:
    """Build the Go half."""
    if shutil.which("go") is None:
        raise click.ClickException(
            "this benchmark needs Go (https://go.dev/dl): its load is made by a Go program"
        )
    subprocess.run(["go", "build", "-o", str(go_program()), "."], cwd=_SOURCES, check=True)  # noqa: S607


@contextmanager
def _running(command: Sequence[str]) -> Iterator[Process]:
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield Process(process)
        finally:
            end(process)
