"""`llmplane proxy`: a process that becomes Envoy, and the doors that Envoy has besides what is served."""

import http.client
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmplane.envoy import find_envoy
from llmplane.local import end, free_bind_address, free_port
from tests.envoy.conftest import DASHSCOPE, KEYS, Lab
from tests.support.objects import provider
from tests.support.wait import eventually


def llmplane(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "llmplane", *arguments]


def ask(address: str, port: int, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, port, timeout=60)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_the_process_becomes_envoy(lab: Lab) -> None:
    """So that signals and the exit code are Envoy's own, in a container and under a supervisor."""
    assert lab.mesh.proxy
    assert Path(f"/proc/{lab.mesh.proxy.pid}/exe").resolve() == find_envoy().resolve()


def test_the_admin_interface_is_a_socket_for_this_user_only(lab: Lab) -> None:
    (socket,) = lab.mesh.directory.glob("llmplane-*/*/admin.sock")
    assert stat.S_ISSOCK(socket.stat().st_mode)
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert "1.40" in json.loads(lab.envoy_admin("/server_info"))["version"]


def test_no_key_is_in_envoys_configuration_dump(lab: Lab) -> None:
    lab.apply(provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE]))
    dump = lab.envoy_admin("/config_dump?include_eds")
    assert f"outbound|443||{DASHSCOPE}" in dump
    assert KEYS[DASHSCOPE] not in dump


def test_prometheus_gets_metrics_and_nothing_else(lab: Lab) -> None:
    address = lab.mesh.bind_address
    status, text = ask(address, 15090, "/stats/prometheus")
    assert status == 200
    assert "envoy_cluster_upstream_rq_total" in text
    others = [
        "/",
        "/stats",
        "/config_dump",
        "/stats/prometheus/",
        "/stats/prometheus/../../config_dump",
        "/quitquitquit",
    ]
    assert {path: ask(address, 15090, path)[0] for path in others} == dict.fromkeys(others, 404)
    for method in ("POST", "PUT", "HEAD", "DELETE"):
        assert ask(address, 15090, "/stats/prometheus", method)[0] == 404


def test_the_health_port_says_ready_and_nothing_else(lab: Lab) -> None:
    address = lab.mesh.bind_address
    assert ask(address, 15021, "/healthz/ready") == (200, "LIVE\n")
    others = ["/", "/ready", "/healthz", "/healthcheck/fail", "/stats/prometheus"]
    assert {path: ask(address, 15021, path)[0] for path in others} == dict.fromkeys(others, 404)
    assert ask(address, 15021, "/healthz/ready", "POST")[0] == 404


@contextmanager
def running_proxy(lab: Lab, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """Run another sidecar; yield it, its address and the directory of its files."""
    address = free_bind_address()
    command = llmplane("proxy", "sidecar", "--workload", "other", "--bind-address", address, *options)
    command += ["--xds-address", str(lab.mesh.xds), "--", "--concurrency", "1", "-l", "off"]
    with tempfile.TemporaryDirectory(prefix="proxy-") as directory:
        process = subprocess.Popen(command, env={**os.environ, "XDG_RUNTIME_DIR": directory})
        try:
            yield process, address, Path(directory)
        finally:
            end(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_sidecar_beside_the_first_has_its_own_address_and_ends_by_a_signal(
    lab: Lab, number: signal.Signals
) -> None:
    with running_proxy(lab) as (process, address, _):
        eventually(lambda: len(lab.mesh.status()["proxies"]) == 2)
        eventually(lambda: ask_quietly(address, 15021, "/healthz/ready") == 200)
        process.send_signal(number)
        assert process.wait(60) == 0
    eventually(lambda: len(lab.mesh.status()["proxies"]) == 1)


def ask_quietly(address: str, port: int, path: str) -> int | None:
    try:
        return ask(address, port, path)[0]
    except OSError:
        return None


def test_the_admin_interface_can_be_a_port(lab: Lab) -> None:
    port = free_port()
    with running_proxy(lab, "--admin-port", str(port)) as (_, address, directory):
        eventually(lambda: ask_quietly("127.0.0.1", port, "/ready") == 200)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=60) as answer:
            options = json.load(answer)["command_line_options"]
        assert options["concurrency"] == 1, "what follows -- is Envoy's"
        eventually(lambda: ask_quietly(address, 15090, "/stats/prometheus") == 200)
        assert list(directory.rglob("bootstrap.json"))
        assert not list(directory.rglob("admin.sock"))


@pytest.mark.parametrize("kind", ["sidecar", "gateway"])
def test_envoy_accepts_the_printed_bootstrap(tmp_path: Path, kind: str) -> None:
    options = [
        "--workload",
        "sleep",
        "--label",
        "app=sleep",
        "--label",
        "n=y",
        "--xds-address",
        "llmplane:18000",
    ]
    printed = subprocess.run(
        llmplane("bootstrap", kind, *options), capture_output=True, check=True, timeout=60
    )
    file = tmp_path / "bootstrap.json"
    file.write_bytes(printed.stdout)
    command = [find_envoy(), "--mode", "validate", "-c", file, "-l", "error"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
