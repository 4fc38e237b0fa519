"""Network namespaces of a test's own, with iproute2: machines on this machine, whose packets stay in them."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_CONFIGURATION = Path("/etc/netns")
"""Below it, `ip netns exec` finds files that take the place of those of /etc."""


@dataclass(frozen=True)
class Namespace:
    """A network namespace."""

    name: str

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Be in it, this thread and what it starts. A socket stays where it was made."""
        with Path("/proc/thread-self/ns/net").open() as before:
            _enter(f"/run/netns/{self.name}")
            try:
                yield
            finally:
                _set(before.fileno())

    def command(self, *command: str, uid: int, gid: int | None = None, capability: str = "") -> list[str]:
        """Return a command that runs there, as a user, with the resolv.conf of there."""
        user = ["setpriv", f"--reuid={uid}", f"--regid={uid if gid is None else gid}", "--clear-groups"]
        if capability:
            user += [f"--inh-caps=+{capability}", f"--ambient-caps=+{capability}"]
        return ["ip", "netns", "exec", self.name, *user, "--", *command]

    def run(
        self, *command: str, uid: int = 0, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end."""
        environment = {"PATH": os.environ["PATH"], **(environment or {})}
        arguments = self.command(*command, uid=uid)
        return subprocess.run(
            arguments, capture_output=True, text=True, env=environment, check=False, timeout=60
        )


@contextmanager
def namespaces(*names: str, resolv_conf: str) -> Iterator[list[Namespace]]:
    """Make namespaces, with loopback up, and take them away at the end; no process may be left in them."""
    made = [Namespace(f"llmplane-{name}-{os.getpid()}") for name in names]
    with ExitStack() as stack:
        for namespace in made:
            _ip("netns", "add", namespace.name)
            stack.callback(_ip, "netns", "delete", namespace.name)
            folder = _CONFIGURATION / namespace.name
            folder.mkdir(parents=True)
            stack.callback(shutil.rmtree, folder)
            (folder / "resolv.conf").write_text(resolv_conf)
            _ip("-n", namespace.name, "link", "set", "lo", "up")
        yield made
    with suppress(OSError):  # others may have theirs in it
        _CONFIGURATION.rmdir()


def join(one: Namespace, addresses: Sequence[str], other: Namespace, others: Sequence[str]) -> None:
    """Lay a cable between two, with addresses (ADDRESS/LENGTH) at its ends; the first one is the gateway."""
    _ip("-n", one.name, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", other.name)
    for namespace, mine, gateways in ((one, addresses, ()), (other, others, addresses)):
        _ip("-n", namespace.name, "link", "set", "cable", "up")
        for address in mine:
            extra = ["nodad"] if ":" in address else []
            _ip("-n", namespace.name, "address", "add", address, "dev", "cable", *extra)
        for version in ("4", "6"):
            of = [address for address in gateways if (":" in address) == (version == "6")]
            if of:
                _ip(
                    f"-{version}", "-n", namespace.name, "route", "add", "default", "via", of[0].split("/")[0]
                )


@cache
def why_not() -> str:
    """Say why there can be no namespaces here, or nothing."""
    tools = ("ip", "iptables", "ip6tables", "setpriv", "curl", "getent")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found"
    if os.getuid() != 0:
        return "only root may make network namespaces"
    probe = ["unshare", "--net", "iptables", "-t", "nat", "-S"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"no network namespaces with iptables: {done.stderr.strip()}" if done.returncode else ""


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _enter(path: str) -> None:
    with Path(path).open() as file:
        _set(file.fileno())


def _set(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
