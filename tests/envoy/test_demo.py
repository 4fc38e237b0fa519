"""`make demo`: what it shows, that it ends whole, and that it fails when something is not as documented."""

import dataclasses
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmplane import demo
from tests.support.client import ProxyClient

COMMAND = [sys.executable, "-m", "llmplane", "demo"]


def test_it_shows_every_scenario_of_the_documents() -> None:
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "curl --location http://dashscope.aliyuncs.com --header 'Content-Type: application/json'"
        in done.stdout
    )
    assert "--header 'user-type: subscriber'" in done.stdout
    key = r"key [0-9a-f]{8}"
    for model in ("qwen-1.8b-chat", "qwen-turbo"):
        seen = rf"dashscope.aliyuncs.com, POST /compatible-mode/v1/chat/completions, model {model}, {key}"
        assert re.search(f"the provider saw: {seen}", done.stdout)
    shares = re.findall(r"(\d+) of 20 went to (\S+), model (\S+)", done.stdout)
    assert sum(int(count) for count, _, _ in shares) == 20
    assert {host for _, host, _ in shares} == {"dashscope.aliyuncs.com", "api.moonshot.cn"}
    gateway, denied = done.stdout.split("== Step 4: ")[1].split("== Step 5: ")
    assert re.search(r"curl --location http://127[\d.]+:\d+ .* --header 'host: test.com'", gateway)
    assert "the provider saw: dashscope.aliyuncs.com" in gateway
    assert "\nRBAC: access denied\n" in denied
    assert "the provider saw" not in denied


def test_keep_leaves_it_running_until_ctrl_c_which_ends_everything(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with output.open("wb") as stream:
        # A shell without job control has what it runs in the background ignore Ctrl-C.
        command = ["env", "--default-signal=INT", *COMMAND, "--keep"]
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        text = _wait_for(output, "Ctrl-C ends it")
        address = re.search(r"http_proxy=http://([\d.]+):15080", text)
        assert address
        client = ProxyClient(address[1])
        assert client.request("dashscope.aliyuncs.com").json()["model"] == "qwen-1.8b-chat"
        children = _descendants(process.pid)
        assert len(children) >= 3, "control plane and two Envoys"
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    assert code == 130
    assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []


def test_a_step_that_shows_something_else_fails_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = demo.STEPS[0]
    call = dataclasses.replace(first.calls[0], expected=frozenset({(demo.DASHSCOPE, "another-model")}))
    monkeypatch.setattr(demo, "STEPS", (dataclasses.replace(first, calls=(call,)),))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert demo.run_demo(keep=False) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "another-model" in capsys.readouterr().err


def _wait_for(output: Path, text: str) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        written = output.read_text(encoding="utf-8", errors="replace")  # cut off where it was flushed
        if text in written:
            return written
        time.sleep(0.05)
    raise AssertionError(output.read_text(encoding="utf-8"))


def _descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that these have started."""
    of: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        of.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found = of.get(pid, [])
    return [*found, *(each for child in found for each in _descendants(child))]


def test_it_works_without_curl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.shutil, "which", lambda _: None)
    monkeypatch.setattr(demo, "STEPS", (demo.STEPS[0], *demo.STEPS[3:]))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert demo.run_demo(keep=False) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
