"""Make before break: a route moves to a new provider, and the old one goes with the same edit, under load.

The load is as much as the machine gives: `wrk` where it is installed (Debian has it), else Python's clients.
"""

import json
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmplane.bootstrap import ProxySettings, bootstrap
from llmplane.local import HTTP_PROXY_PORT, LocalMesh
from tests.envoy.conftest import own_address
from tests.support.client import ProxyClient
from tests.support.dns import asking, running_dns_server
from tests.support.envoy import Envoy, running_envoy
from tests.support.load import running_load
from tests.support.objects import backends, provider, route
from tests.support.wait import eventually
from translator.proxy import ProxyType

HOST = "chat.example.com"
SWAPS = 20

both_variants = pytest.mark.parametrize("api_type", ["DELTA_GRPC", "GRPC"], ids=["delta", "sotw"])


@contextmanager
def running_provider() -> Iterator[int]:
    """Run a provider that answers at once (an Envoy, faster than anything in Python); yield its port."""
    types = "type.googleapis.com/envoy.extensions.filters"
    answer = {"status": 200, "body": {"inline_string": '{"model": "m"}'}}
    hosts = [
        {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "direct_response": answer}]}
    ]
    manager = {
        "@type": f"{types}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "provider",
        "route_config": {"virtual_hosts": hosts},
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{types}.http.router.v3.Router"}}],
    }
    listener = {
        "name": "provider",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    with running_envoy({"static_resources": {"listeners": [listener]}}) as envoy:
        yield envoy.port("provider")


@pytest.fixture(scope="module")
def upstream() -> Iterator[int]:
    with running_provider() as port:
        yield port


@pytest.fixture
def mute_dns() -> Iterator[int]:
    """Give the port of a name server that takes questions and never answers."""
    with socket.socket(type=socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        yield server.getsockname()[1]


@pytest.fixture
def mesh() -> Iterator[LocalMesh]:
    """Give a control plane without a sidecar."""
    directory = Path(tempfile.mkdtemp(prefix="lab-"))
    mesh = LocalMesh(directory, bind_address=own_address())
    mesh.config.mkdir()
    try:
        mesh.start_control_plane()
        yield mesh
    finally:
        mesh.stop()
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def running_sidecar(mesh: LocalMesh, dns_port: int, api_type: str) -> Iterator[Envoy]:
    """Run a sidecar on our bootstrap, with this variant of the protocol and this name server."""
    settings = ProxySettings(
        ProxyType.SIDECAR,
        xds_host=mesh.xds.host,
        xds_port=mesh.xds.port,
        namespace="default",
        workload="sleep",
        admin_socket=mesh.directory / "admin",
        bind_address=mesh.bind_address,
    )
    made: dict[str, Any] = bootstrap(settings)
    made["dynamic_resources"]["ads_config"]["api_type"] = api_type
    made |= asking(dns_port)
    with running_envoy(made) as envoy:
        mesh.settle()
        yield envoy


@contextmanager
def running_requests(mesh: LocalMesh) -> Iterator[None]:
    """Send requests to HOST as fast as it goes, to the end of the block; none may fail."""
    if shutil.which("wrk") is None:
        with running_load(mesh.http_proxy, HOST, ["m"], streams=0):
            yield
        return
    script = mesh.directory / "post.lua"
    headers = f'{{["content-type"] = "application/json", Host = "{HOST}"}}'
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
    script.write_text(f"wrk.method = 'POST'\nwrk.headers = {headers}\nwrk.body = [[{body}]]\n")
    command = ["wrk", "-t1", "-c16", "-d600", "-s", str(script)]
    command.append(f"http://{mesh.bind_address}:{HTTP_PROXY_PORT}/")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as wrk:
        try:
            yield
        finally:
            wrk.send_signal(2)
            report = wrk.communicate(timeout=30)[0]
    requests = re.search(r"(\d+) requests in", report)
    assert requests, report
    assert "Non-2xx" not in report, report
    assert "Socket errors" not in report, report


def answered(envoy: Envoy) -> int:
    """Return how many requests a sidecar has answered."""
    (count,) = envoy.stats(r"^http\.http_proxy\.downstream_rq_completed$").values()
    return count


def chat(number: int, port: int, address: str = "127.0.0.1", host: str = HOST) -> str:
    """Return a provider that is new with each number, and the route that leads to it."""
    name = f"p{number}.example.com"
    endpoints = [{"address": address, "port": port}]
    made = provider(f"p{number}", name, "sk-some-key", "m", tls={"mode": "DISABLE"}, endpoints=endpoints)
    return f"{made}\n---\n{route(f'chat-{host}', host, {'backendRefs': backends(name)})}"


@both_variants
def test_swapping_providers_under_load_loses_no_request(
    mesh: LocalMesh, mute_dns: int, upstream: int, api_type: str
) -> None:
    """Their addresses are known: Envoy 1.40 does not wait for a name that was never resolved."""
    mesh.apply("objects.yaml", chat(0, upstream), settle=False)
    with running_sidecar(mesh, mute_dns, api_type) as envoy:
        with running_requests(mesh):
            for number in range(1, SWAPS + 1):
                mesh.apply("objects.yaml", chat(number, upstream))
                enough = answered(envoy) + 100
                eventually(lambda enough=enough: answered(envoy) >= enough)
        late = envoy.stats("init_fetch_timeout$")
        clusters = set(re.findall(r"^outbound\S+?(?=::)", envoy.admin("/clusters").decode(), re.MULTILINE))
    assert clusters == {f"outbound|443||p{SWAPS}.example.com"}
    assert any(name.startswith("sds.") for name in late)
    assert set(late.values()) == {0}, "nothing was ever waited for until Envoy gave up (15 s)"


@both_variants
def test_swapping_providers_whose_names_are_new_loses_no_request(
    mesh: LocalMesh, upstream: int, api_type: str
) -> None:
    """Until a name is resolved, requests are tried again; no swap comes while one is on its way."""
    with running_dns_server() as dns:
        dns.records = {f"p{number}.local.test": ["127.0.0.1"] for number in range(SWAPS)}
        dns.delay = 0.1
        mesh.apply("objects.yaml", chat(0, upstream, "p0.local.test"), settle=False)
        with running_sidecar(mesh, dns.port, api_type):
            eventually(lambda: ProxyClient(mesh.bind_address).request(HOST).status == 200)
            with running_load(mesh.http_proxy, HOST, ["m"], streams=0) as load:
                for number in range(1, SWAPS // 2):
                    mesh.apply("objects.yaml", chat(number, upstream, f"p{number}.local.test"))
                    load.wait_for_all()


@both_variants
def test_a_name_that_is_never_answered_delays_no_other_change(
    mesh: LocalMesh, mute_dns: int, upstream: int, api_type: str
) -> None:
    """So many new providers become live one after the other while Envoy is still asking for the first one."""
    mesh.apply("objects.yaml", chat(0, upstream), settle=False)
    with running_sidecar(mesh, mute_dns, api_type) as envoy:
        mesh.apply("dead.yaml", chat(1000, upstream, "dead.local.test", "dead.example.com"))
        for number in range(1, SWAPS + 1):
            mesh.apply("objects.yaml", chat(number, upstream))
            assert ProxyClient(mesh.bind_address).request(HOST).status == 200
        asked = envoy.stats(r"p1000_example_com\.update_(attempt|success|failure|empty)$")
        counts = {name.rpartition("_")[2]: value for name, value in asked.items()}
        # One answer is that of the guard's address, which is no question for a name server.
        assert counts == {"attempt": 2, "success": 1, "failure": 0, "empty": 0}
