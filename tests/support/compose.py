"""docker-compose.yaml and Dockerfile without Docker: what they say, and their commands as processes.

A service gets an address of its own in 127.0.0.0/8, a volume is a folder, and the DNS of the compose network
is a server that only the Envoys ask; curl and Prometheus get it as settings. Commands, environments, health
checks and the order of starting are those of the two files.
"""

import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from llmplane.envoy import find_envoy
from llmplane.local import end
from tests.support.dns import asking, running_dns_server

ROOT = Path(__file__).parents[2]
OWN_IMAGE = "llmplane"
_START_SECONDS = 60
_DENIED = "本机IP"
"""Whom the gateway denies: an address as the gateway's network has it."""


def compose_file() -> dict[str, Any]:
    """Return docker-compose.yaml, with `$$` read as `$`: it interpolates nothing."""
    text = (ROOT / "docker-compose.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text.replace("$$", "$"))
    return loaded


@dataclass(frozen=True)
class Instruction:
    """An instruction of a Dockerfile, its continued lines joined."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """The words of the shell form, or the items of the JSON form at the end."""
        bracket = self.text.find("[")
        return list(json.loads(self.text[bracket:])) if bracket >= 0 else shlex.split(self.text)


def dockerfile() -> list[list[Instruction]]:
    """Return the Dockerfile's stages."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    stages: list[list[Instruction]] = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stages.append([])
        if name:
            stages[-1].append(Instruction(name, rest))
    return stages


def image(name: str) -> list[str]:
    """Return the words of an instruction of the final image, e.g. ENTRYPOINT."""
    return next(instruction.words for instruction in dockerfile()[-1] if instruction.name == name)


class NativeCompose(AbstractContextManager["NativeCompose"]):
    """The services of docker-compose.yaml as processes of this machine, ended by the context."""

    def __init__(self) -> None:
        self.services: dict[str, dict[str, Any]] = compose_file()["services"]
        self.queries: AbstractSet[str] = set()
        """The names that Envoy's DNS was asked for."""
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._subnet = f"127.{64 + secrets.randbelow(128)}.{secrets.randbelow(256)}"
        hosts = [name for name, service in self.services.items() if "network_mode" not in service]
        self._addresses = {name: f"{self._subnet}.{number}" for number, name in enumerate(hosts, 1)}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # Short: Envoy's admin socket must fit into 108 bytes.
            self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compose-")))
            binaries = self._directory / "bin"
            binaries.mkdir()
            (binaries / "envoy").symlink_to(find_envoy())
            self._path = os.pathsep.join([str(binaries), str(Path(sys.executable).parent), os.defpath])
            dns = stack.enter_context(running_dns_server())
            dns.records = {name: [address] for name, address in self._names().items()}
            self.queries = dns.asked
            self._envoy_options = ["--use-dynamic-base-id", "--concurrency", "1"]
            self._envoy_options += ["--config-yaml", json.dumps(asking(dns.port))]
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes.values()):
            end(process)
        self._stack.close()

    def run(self, name: str, seconds: float = 120) -> str:
        """Run a service to its end, as `docker compose up NAME` does; return its standard output.

        Raises AssertionError if it fails, or if something that it depends on does not become healthy.
        """
        self._start_dependencies(name)
        done = subprocess.run(
            self._command(name),
            env=self._environment(name),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}{self._logs()}"
        return done.stdout

    def start(self, name: str) -> None:
        """Start a service and all that it depends on, and wait until it is healthy.

        Raises AssertionError if one does not become so.
        """
        self._start(name)
        self._wait_until_healthy(name)

    def log(self, name: str) -> str:
        """Return what a service has written so far."""
        return (self._folder(name) / "log").read_text(encoding="utf-8", errors="replace")

    def host_text(self, name: str, text: str) -> str:
        """Translate container paths and addresses of a service into those of this machine."""
        replace = {**self._mounts(name), "/tmp/": f"{self._folder(name)}/"}  # noqa: S108 - the container's
        replace |= dict.fromkeys(("127.0.0.1", "0.0.0.0"), self._address(name))  # noqa: S104 - in the file
        # Longest first and in one pass: what was put in is not looked at again.
        keys = sorted(replace, key=len, reverse=True)
        pattern = "|".join(rf"(?<!\w){re.escape(key)}" for key in keys)  # not `/prometheus` of another path
        return re.sub(pattern, lambda match: replace[match[0]], text)

    def _start(self, name: str) -> None:
        if name in self._processes:
            return
        self._start_dependencies(name)
        with (self._folder(name) / "log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                self._command(name), env=self._environment(name), stdout=log, stderr=log
            )

    def _start_dependencies(self, name: str) -> None:
        for dependency, needs in self.services[name].get("depends_on", {}).items():
            assert needs["condition"] == "service_healthy"
            self.start(dependency)

    def _wait_until_healthy(self, name: str) -> None:
        check = self.services[name].get("healthcheck", {}).get("test") or ["CMD", *image("HEALTHCHECK")]
        assert check[0] == "CMD"
        command = [self.host_text(name, word) for word in check[1:]]
        deadline = time.monotonic() + _START_SECONDS
        while not self._succeeds(name, command):
            assert self._processes[name].poll() is None, f"{name} has ended{self._logs()}"
            assert time.monotonic() < deadline, f"{name} does not become healthy{self._logs()}"
            time.sleep(0.1)

    def _succeeds(self, name: str, command: Sequence[str]) -> bool:
        done = subprocess.run(
            command,
            env=self._environment(name),
            capture_output=True,
            timeout=_START_SECONDS,
            check=False,
        )
        return not done.returncode

    def _command(self, name: str) -> list[str]:
        service = self.services[name]
        own = service["image"] == OWN_IMAGE
        entrypoint = service.get("entrypoint") or (image("ENTRYPOINT") if own else [])
        command = [self.host_text(name, word) for word in (*entrypoint, *service["command"])]
        return [*command, *self._envoy_options] if command[0] == "envoy" else command

    def _environment(self, name: str) -> dict[str, str]:
        service = self.services[name]
        environment: dict[str, str] = {}
        if service["image"] == OWN_IMAGE:
            given = [item.text for item in dockerfile()[-1] if item.name == "ENV"]
            environment |= dict(item.split("=", 1) for item in given)
        environment |= service.get("environment", {})
        translated = {key: self.host_text(name, value) for key, value in environment.items()}
        if _DENIED in environment:
            translated[_DENIED] = self.host_text("gateway", environment[_DENIED])
        folder = str(self._folder(name))
        return {"HOME": folder, "TMPDIR": folder, **translated, "PATH": self._path}

    def _mounts(self, name: str) -> dict[str, str]:
        """Container path -> path on this machine, of the volumes of a service."""
        mounts = {}
        for volume in self.services[name].get("volumes", ()):
            source, target = volume.split(":")[:2]
            mounts[target] = str(self._source(name, source, target))
        return mounts

    def _source(self, name: str, source: str, target: str) -> Path:
        if not source.startswith("."):
            folder = self._directory / "volumes" / source
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        path = ROOT / source
        if path.suffix not in {".json", ".yml"}:
            return path
        # A configuration file, which itself speaks of paths and addresses; made when it is first looked at.
        copy = self._folder(name) / Path(target).name
        if not copy.exists():
            copy.touch()
            text = self.host_text(name, path.read_text(encoding="utf-8"))
            if path.suffix == ".yml":  # Prometheus' targets; it asks the DNS of this machine
                names = "|".join(map(re.escape, self._names()))
                text = re.sub(rf"\b({names})(?=:\d)", lambda match: self._names()[match[1]], text)
            copy.write_text(text, encoding="utf-8")
        return copy

    def _address(self, name: str) -> str:
        mode = self.services[name].get("network_mode")
        return self._addresses[mode.removeprefix("service:") if mode else name]

    def _names(self) -> dict[str, str]:
        """Return what the DNS of the compose network knows: the services, and their aliases."""
        names = dict(self._addresses)
        for name, address in self._addresses.items():
            aliases = self.services[name].get("networks", {}).get("default", {}).get("aliases", ())
            names |= dict.fromkeys(aliases, address)
        return names

    def _folder(self, name: str) -> Path:
        folder = self._directory / name
        if not folder.exists():
            folder.mkdir()
            names = self._names().items()
            settings = [f'connect-to = "{host}::{address}:"\n' for host, address in names if "." not in host]
            (folder / ".curlrc").write_text("".join(settings), encoding="utf-8")
        return folder

    def _logs(self) -> str:
        return "".join(f"\n--- {name}\n{self.log(name)[-3000:]}" for name in self._processes)
