"""Fetch, build and run the independent conformance harness; tests/xds/README.md says what it is.

    python -m tests.xds.harness [SOURCE]

SOURCE is a repository that git can clone, by default that on GitHub; if that cannot be reached, Go's module
proxy is asked. Everything is kept below $XDG_CACHE_HOME/llmplane (~/.cache/llmplane). The variants run beside
one another, for some minutes, since the harness waits with clocks; so what does not pass is run once more.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

from llmplane.local import free_port

REPOSITORY: Final = "https://github.com/ii/xds-test-harness"
COMMIT: Final = "f1a479f419c8d684408375973cbb4b9dc79520a8"
VARIANTS: Final = (
    "sotw aggregated",
    "sotw non-aggregated",
    "incremental aggregated",
    "incremental non-aggregated",
)
PLUGINS: Final = (
    "google.golang.org/protobuf/cmd/protoc-gen-go@v1.28.0",
    "google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.2.0",
)
ATTEMPTS: Final = 2


class HarnessError(Exception):
    """The harness cannot be had; the text says why."""


def main(repository: str = REPOSITORY) -> int:
    """Run all variants; return how many failed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmplane"
    source = cache / f"xds-test-harness-{COMMIT[:12]}"
    try:
        if not (source / "harness").exists():
            print(f"building the harness in {source} ...", flush=True)  # noqa: T201
            _build(source, repository)
    except HarnessError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    with ThreadPoolExecutor(len(VARIANTS)) as pool:
        return list(pool.map(partial(_passes, source), VARIANTS)).count(False)


def _passes(source: Path, variant: str) -> bool:
    """Run one variant, again if need be; say what came of it."""
    for _ in range(ATTEMPTS):
        results = _run(source, variant)
        print(f"{variant}: {results['Passed']} of {results['Total']} scenarios pass", flush=True)  # noqa: T201
        if results["Passed"] == results["Total"] > 0:
            return True
        for of in results["ResultsByVariant"]:
            for failed in of["failedScenarios"] or ():
                print(f"{variant}: {failed['name']}: {failed['failedStep']}: {failed['error']}")  # noqa: T201
    return False


def _build(source: Path, repository: str) -> None:
    """Make `source/harness`. Raises HarnessError."""
    go = shutil.which("go", path=f"{os.environ.get('PATH', '')}:/usr/local/go/bin")
    if go is None:
        raise HarnessError("the harness is a Go program: install Go (https://go.dev/dl)")
    source.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=source.parent, prefix="build-") as folder:
        work, tools = Path(folder, "source"), Path(folder, "tools")
        _fetch(work, repository, go)
        environment = {
            **os.environ,
            "GOBIN": str(tools),
            "PYTHONPATH": str(tools),
            "GOFLAGS": "-buildvcs=false",
        }
        environment["PATH"] = f"{tools}:{os.environ.get('PATH', '')}"
        for plugin in PLUGINS:
            _do([go, "install", plugin], work, environment)
        _do([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tools), "grpcio-tools"], work)
        options = [
            f"--{kind}_{what}"
            for kind in ("go", "go-grpc")
            for what in ("out=.", "opt=paths=source_relative")
        ]
        protoc = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *options]
        _do([*protoc, "api/adapter/adapter.proto"], work, environment)
        _do([go, "build", "-o", "harness", "."], work, environment)
        work.rename(source)


def _fetch(work: Path, repository: str, go: str) -> None:
    """Get the harness's source, from git or from the module proxy. Raises HarnessError."""
    try:
        _do(["git", "clone", "--quiet", repository, str(work)], work.parent)
        _do(["git", "checkout", "--quiet", COMMIT], work)
    except HarnessError as error:
        module = f"{REPOSITORY.removeprefix('https://')}@{COMMIT}"
        done = subprocess.run(
            [go, "mod", "download", "-json", module],
            cwd=work.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        found = json.loads(done.stdout or "{}")
        if "Dir" not in found:
            raise HarnessError(
                f"{error}\n{found.get('Error') or done.stderr}\n"
                "give the path of a clone: make test-xds-harness HARNESS=/path/to/xds-test-harness"
            ) from None
        shutil.copytree(found["Dir"], work, copy_function=shutil.copyfile)  # the module cache is read-only
        for path in [work, *work.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)


def _do(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run a command. Raises HarnessError with what it says, if it fails."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HarnessError(f"{' '.join(command)}: {done.stderr.strip()}")


def _run(source: Path, variant: str) -> dict[str, Any]:
    """Run one variant against a server of its own; return the results in the harness's own words."""
    xds, adapter = free_port(), free_port()
    command = [sys.executable, "-m", "tests.xds.harness_adapter", str(xds), str(adapter)]
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w") as log:
        shutil.copytree(source / "features", Path(folder, "features"))
        with subprocess.Popen(command, stdout=log, stderr=log) as server:
            try:
                _wait(adapter)
                harness = [str(source / "harness"), "-T", f":{xds}", "-A", f":{adapter}", "-V", variant]
                subprocess.run(harness, cwd=folder, stdout=log, stderr=log, check=False)
            finally:
                server.send_signal(signal.SIGKILL)
        found: dict[str, Any] = json.loads(Path(folder, "results.json").read_text())
        return found


def _wait(port: int) -> None:
    """Wait until something listens; the adapter's own port is its last. Raises TimeoutError."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError("the adapter does not listen")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
