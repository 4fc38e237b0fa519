"""docker-compose.yaml works: its commands and health checks run here as processes, without Docker."""

import json
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmplane.envoy import find_envoy
from llmplane.fakellm import fingerprint
from tests.support.compose import ROOT, NativeCompose
from tests.support.wait import eventually

DASHSCOPE = "dashscope.aliyuncs.com"
MOONSHOT = "api.moonshot.cn"


def may_bind_low_ports() -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 1))
        except PermissionError:
            return False
        except OSError:
            pass  # somebody has it
        return True


needs_https_port = pytest.mark.skipif(not may_bind_low_ports(), reason="the fake LLM listens on port 443")
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("wget")),
    reason="no prometheus and wget: sudo apt-get install prometheus wget",
)
needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="the client's commands are curl's")


@dataclass(frozen=True)
class Demo:
    compose: NativeCompose
    output: str
    """What the client printed."""


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    with NativeCompose() as compose:
        yield Demo(compose, compose.run("client"))


def values(address: str, query: str) -> dict[tuple[str, ...], float]:
    """Ask Prometheus: the values of its series, by their labels' values."""
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=60) as answer:
        series = json.load(answer)["data"]["result"]
    return {tuple(each["metric"].values()): float(each["value"][1]) for each in series}


@needs_https_port
@needs_curl
class TestComposeFile:
    """One run of the service `client`, with all that it depends on."""

    def test_the_client_gets_the_answers_of_the_documents(self, demo: Demo) -> None:
        default, subscriber, gateway = (json.loads(line) for line in demo.output.splitlines()[:3])
        assert default["model"] == "qwen-1.8b-chat"
        assert subscriber["model"] == "qwen-turbo"
        assert gateway["model"] == "qwen-1.8b-chat"

    def test_the_gateway_denies_its_own_address(self, demo: Demo) -> None:
        assert demo.compose.run("denied-client") == "RBAC: access denied"

    def test_a_shared_host_is_answered_by_both_providers(self, demo: Demo) -> None:
        lines = [line.split() for line in demo.output.splitlines()[4:]]  # as of `uniq -c`
        assert {what for _, what in lines} == {'"model":"qwen-1.8b-chat"', '"model":"moonshot-v1-8k"'}
        assert sum(int(count) for count, _ in lines) == 20

    def test_each_provider_sees_its_path_and_its_key(self, demo: Demo) -> None:
        seen = {line for line in demo.compose.log("fake-llm").splitlines() if " model=" in line}
        keys = demo.compose.services["control-plane"]["environment"]
        dashscope, moonshot = (fingerprint(keys[f"API_KEY_OF_{name}"]) for name in ("DASHSCOPE", "MOONSHOT"))
        path = "/compatible-mode/v1/chat/completions"
        assert seen == {
            f"{DASHSCOPE} model=qwen-1.8b-chat POST {path} key={dashscope}",
            f"{DASHSCOPE} model=qwen-turbo POST {path} key={dashscope}",
            f"{MOONSHOT} model=moonshot-v1-8k POST /v1/chat/completions key={moonshot}",
        }

    def test_envoy_finds_control_plane_and_providers_by_their_names(self, demo: Demo) -> None:
        assert demo.compose.queries == {"control-plane", DASHSCOPE, MOONSHOT}

    @pytest.mark.parametrize("envoy", ["envoy", "gateway"])
    def test_the_lua_script_is_the_mounted_file(self, demo: Demo, envoy: str) -> None:
        """Its text does not travel with each provider (design decision 1)."""
        socket_path = demo.compose.host_text(envoy, "/tmp/llmplane-admin.sock")  # noqa: S108
        command = ["curl", "--silent", "--unix-socket", socket_path, "http://envoy/config_dump"]
        dump = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        assert demo.compose.host_text(envoy, "/etc/envoy/llm_provider.lua") in dump
        assert "ffi.typeof" not in dump
        assert "sk-demo" not in dump

    @needs_prometheus
    def test_prometheus_reads_all_three(self, demo: Demo) -> None:
        """Its targets are up, its rules are loaded, and it knows what the client's requests used."""
        demo.compose.start("prometheus")
        address = demo.compose.host_text("prometheus", "http://127.0.0.1:9090")
        eventually(lambda: values(address, "sum by (job) (up)") == {("envoy",): 2, ("llmplane",): 1})
        eventually(
            lambda: (
                values(address, "sum by (llmproxy_model) (asm_llm_proxy_prompt_tokens)").keys()
                >= {("qwen-1.8b-chat",), ("qwen-turbo",), ("moonshot-v1-8k",)}
            )
        )
        assert values(address, "llmplane_price_per_token")
        assert demo.compose.log("prometheus") == ""

    def test_nobody_complains(self, demo: Demo) -> None:
        assert "error" not in demo.compose.log("control-plane").lower()
        assert "sk-demo" not in demo.compose.log("control-plane") + demo.compose.log("fake-llm")


@pytest.mark.parametrize("name", ["sidecar.json", "gateway.json"])
def test_envoy_accepts_the_bootstrap(name: str, tmp_path: Path) -> None:
    file = ROOT / "envoy-bootstrap" / name
    command = [str(find_envoy()), "--mode", "validate", "--config-path", str(file), "--log-level", "error"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
