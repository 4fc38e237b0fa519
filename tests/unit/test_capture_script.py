"""deploy/image/capture.sh: the rules that it prints. What they do is in tests/envoy/test_capture.py."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "image" / "capture.sh"


def printed(**settings: str) -> list[str]:
    """Return the rules for IPv4."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **settings}
    done = subprocess.run(
        ["sh", SCRIPT, "--print"], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    text = done.stdout.partition("# ip6tables")[0]
    return [line for line in text.splitlines() if line.startswith("-A ")]


def test_by_default_all_tcp_but_envoys_own_and_loopback_is_captured() -> None:
    assert printed() == [
        "-A LLMPLANE_OUTPUT -m owner --uid-owner 1337 -j RETURN",
        "-A LLMPLANE_OUTPUT -m owner --gid-owner 1337 -j RETURN",
        "-A LLMPLANE_OUTPUT -j LLMPLANE_CAPTURE",
        "-A LLMPLANE_CAPTURE -o lo -j RETURN",
        "-A LLMPLANE_CAPTURE -p tcp -j DNAT --to-destination 127.0.0.1:15001",
    ]


def test_exclusions_stand_before_inclusions_and_each_family_gets_its_ranges() -> None:
    rules = printed(
        EXCLUDE_OUTBOUND_PORTS="22,3306",
        EXCLUDE_OUTBOUND_IP_RANGES="fd00::/8,10.0.0.0/8",
        INCLUDE_OUTBOUND_PORTS="80",
        INCLUDE_OUTBOUND_IP_RANGES="192.168.0.0/16",
        INCLUDE_OUTBOUND_UIDS="1000",
        PROXY_ADDRESS="127.0.0.2",
    )
    to = "-j DNAT --to-destination 127.0.0.2:15001"
    assert rules[2:] == [
        "-A LLMPLANE_OUTPUT -m owner --uid-owner 1000 -j LLMPLANE_CAPTURE",
        "-A LLMPLANE_CAPTURE -o lo -j RETURN",
        "-A LLMPLANE_CAPTURE -p tcp --dport 22 -j RETURN",
        "-A LLMPLANE_CAPTURE -p tcp --dport 3306 -j RETURN",
        "-A LLMPLANE_CAPTURE -d 10.0.0.0/8 -j RETURN",
        f"-A LLMPLANE_CAPTURE -p tcp --dport 80 {to}",
        f"-A LLMPLANE_CAPTURE -p tcp -d 192.168.0.0/16 {to}",
    ]


@pytest.mark.parametrize("arguments", [["--prnt"], ["--print", "--remove"]])
def test_an_unknown_argument_is_refused(arguments: list[str]) -> None:
    done = subprocess.run(["sh", SCRIPT, *arguments], capture_output=True, check=False, timeout=60)
    assert done.returncode == 2
