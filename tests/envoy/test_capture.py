"""Captured traffic: applications that know of no proxy, in network namespaces with iptables.

Two namespaces that are joined by a cable and lead nowhere else. In `pod` are an application and its Envoy,
behind the rules of deploy/image/capture.sh, as in a pod; in `world` is everything else: control plane, fake
LLM, name server, and servers that no LLMRoute names and that note every byte that they get.
"""

import json
import re
import shutil
import socket
import socketserver
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llmplane.address import Address
from llmplane.bootstrap import ProxySettings
from llmplane.certificates import CertificateAuthority
from llmplane.envoy import find_envoy, lay_down
from llmplane.fakellm import FakeLLM, Host, running_in_thread
from llmplane.local import LocalMesh
from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, OPENAI
from tests.support.client import MESSAGES
from tests.support.dns import DnsServer, running_dns_server
from tests.support.envoy import ask_admin
from tests.support.netns import Namespace, join, namespaces, why_not
from tests.support.objects import backends, provider, rate_limit, route
from tests.support.serving import serving_tcp
from tests.support.wait import eventually
from translator.capture import PORT
from translator.features import Feature
from translator.proxy import ProxyType
from translator.scopes import MARGIN, THRESHOLD

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

ROOT = Path(__file__).parents[2]
SEED = ROOT / "examples" / "000-traffic-routing"
SCRIPT = ROOT / "deploy" / "image" / "capture.sh"

WORLD, POD = "10.99.0.1", "10.99.0.100"
WORLD6, POD6 = "fd99::1", "fd99::100"
LLM = "10.99.0.10"
"""Where the providers are, at port 443."""
ORIGIN = "10.99.0.20"
NAME_SERVER = "10.99.0.53"
OTHER = "other.example"
SERVICE = "llm.default.svc.cluster.local"
"""A host that no object names."""
ENVOY, APPLICATION, EXCLUDED = 1337, 1000, 2000
"""Users."""

# As a pod's.
RESOLV_CONF = f"""\
nameserver {NAME_SERVER}
search default.svc.cluster.local svc.cluster.local cluster.local
options ndots:5 timeout:2
"""


@dataclass
class Origin:
    """A server that keeps the bytes that it gets, and answers when they end with an empty line."""

    answer: bytes = b""
    greeting: bytes = b""
    got: list[bytes] = field(default_factory=list)
    """What came, a connection each."""

    def serve(self, connection: socket.socket) -> None:
        connection.sendall(self.greeting)
        number = len(self.got)
        self.got.append(b"")
        with suppress(OSError):
            while chunk := connection.recv(65536):
                self.got[number] += chunk
                if self.got[number].startswith(b"PRI * HTTP/2.0"):
                    return  # it speaks none
                if self.got[number].endswith(b"\r\n\r\n"):
                    connection.sendall(self.answer)


@contextmanager
def running_origin(*addresses: tuple[str, int]) -> Iterator[Origin]:
    origin = Origin()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            origin.serve(self.request)

    with ExitStack() as stack:
        for address in addresses:
            stack.enter_context(serving_tcp(Handler, address))
        yield origin


class Exchange(NamedTuple):
    request: bytes
    """What the server got."""
    answer: bytes
    """What the client got."""


@dataclass(frozen=True)
class CaptureLab:
    """What a test works with."""

    world: Namespace
    pod: Namespace
    mesh: LocalMesh
    fake: FakeLLM
    dns: DnsServer
    origin: Origin

    def apply(self, *documents: str) -> None:
        """Make these YAML documents the whole configuration, and wait until Envoy acknowledged it."""
        self.mesh.apply("objects.yaml", "\n---\n".join(documents) or "# no objects\n")

    def apply_seed(self, step: int) -> None:
        files = sorted((SEED / f"step-{step}").glob("*.yaml"))
        self.apply(*(file.read_text(encoding="utf-8") for file in files))

    def rules(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run capture.sh as a pod's init container does, with DNS and one user left out."""
        environment = {"DNS_CAPTURE": "true", "EXCLUDE_OUTBOUND_UIDS": str(EXCLUDED), **settings}
        return self.pod.run(str(SCRIPT), *arguments, environment=environment)

    def curl(self, *arguments: str, uid: int = APPLICATION) -> subprocess.CompletedProcess[str]:
        """Run curl as an application, which knows of no proxy."""
        return self.pod.run("curl", "--silent", "--show-error", "--max-time", "20", *arguments, uid=uid)

    def ask(self, url: str, *options: str) -> str:
        """Ask the LLM as the documents do, and return the model that answers, or what went wrong."""
        done = self.curl(
            *("--location", url, "--header", "Content-Type: application/json", "--data", MESSAGES.decode()),
            *options,
        )
        try:
            return str(json.loads(done.stdout)["model"])
        except (ValueError, KeyError):
            return f"{done.returncode}: {done.stdout}{done.stderr}"

    def exchange(self, request: bytes, answer: bytes, *, direct: bool = False, port: int = 80) -> Exchange:
        """Send bytes to the origin, from the pod or past all capture, and see what each side gets.

        The answer ends with "end".
        """
        self.origin.answer, before = answer, len(self.origin.got)
        with (self.world if direct else self.pod).inside():
            connection = socket.create_connection((ORIGIN, port), timeout=20)
        with connection:
            connection.sendall(request)
            got = b""
            while not got.endswith(b"end") and (chunk := connection.recv(65536)):
                got += chunk
        return Exchange(b"".join(self.origin.got[before:]), got)

    def is_answered(self, host: str) -> bool:
        """Say whether a host is served, and does not pass through to where nobody listens."""
        done = self.curl("--include", f"http://{host}/")
        return "content-type: text/plain" not in done.stdout

    def reloads(self) -> dict[str, int]:
        """Return how often Envoy took each route configuration of captured traffic over."""
        text = ask_admin(self.mesh.directory / "admin.sock", r"/stats?filter=\.rds\.captured.*config_reload$")
        found = {name: int(number) for name, number in re.findall(r"(\S+): (\d+)", text)}
        assert found, text
        return found

    def query(self, name: str, *types: int) -> dict[int, tuple[int, int]]:
        """Ask the pod's name server, all types from one port; return code and number of answers of each."""
        with self.pod.inside():
            connection = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
        with connection:
            connection.settimeout(20)
            connection.connect((NAME_SERVER, 53))
            for kind in types:
                connection.send(
                    struct.pack(">6H", kind, 0x0100, 1, 0, 0, 0) + labels + struct.pack(">xHH", kind, 1)
                )
            answers = [struct.unpack(">4H", connection.recv(4096)[:8]) for _ in types]
        return {kind: (flags & 0xF, count) for kind, flags, _, count in answers}


@pytest.fixture(scope="module")
def shared_capture_lab() -> Iterator[CaptureLab]:
    with ExitStack() as stack:
        world, pod = stack.enter_context(namespaces("world", "pod", resolv_conf=RESOLV_CONF))
        hosts = [f"{address}/24" for address in (WORLD, LLM, ORIGIN, NAME_SERVER)]
        join(world, [*hosts, f"{WORLD6}/64"], pod, [f"{POD}/24", f"{POD6}/64"])
        # From here on, what this test starts is in that namespace.
        stack.enter_context(world.inside())
        directory = Path(tempfile.mkdtemp(prefix="capture-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        dns = stack.enter_context(running_dns_server((NAME_SERVER, 53)))
        dns.records = {DASHSCOPE: [LLM], MOONSHOT: [LLM], OTHER: [ORIGIN]}
        authority = CertificateAuthority.create()
        hosts_of_llms = {SERVICE: Host(), **{host: Host(key) for host, key in KEYS.items()}}
        fake = FakeLLM(hosts_of_llms, ca=authority, listen=[(LLM, 443)])
        stack.enter_context(running_in_thread(fake))
        origin = stack.enter_context(running_origin((ORIGIN, 80), (ORIGIN, 7000)))
        mesh = LocalMesh(
            directory,
            serve_options=["--ca-file", str(authority.write(directory / "ca")), "--insecure"],
            environment={
                "API_KEY_OF_DASHSCOPE": KEYS[DASHSCOPE],
                "API_KEY_OF_MOONSHOT": KEYS[MOONSHOT],
            },
        )
        mesh.xds = Address(WORLD, 18000)
        mesh.config.mkdir()
        stack.callback(mesh.stop)
        mesh.start_control_plane()
        mesh.proxy = start_envoy(pod, mesh)
        lab = CaptureLab(world, pod, mesh, fake, dns, origin)
        lab.apply_seed(4)
        done = lab.rules()
        assert done.returncode == 0, done.stderr
        yield lab


def start_envoy(pod: Namespace, mesh: LocalMesh) -> subprocess.Popen[bytes]:
    """Start Envoy as in a sidecar: with the bootstrap that `llmplane proxy` makes, as user 1337."""
    directory = mesh.directory
    settings = ProxySettings(
        type=ProxyType.SIDECAR,
        xds_host=mesh.xds.host,
        xds_port=mesh.xds.port,
        namespace="default",
        workload="sleep",
        labels={"app": "sleep"},
        admin_socket=directory / "admin.sock",
        capture=True,
        capture_dns=True,
    )
    with pod.inside():
        bootstrap = lay_down(settings, directory)
    directory.chmod(0o777)  # for the socket
    options = ["--use-dynamic-base-id", "--concurrency", "1", "-l", "warning", "-c", str(bootstrap)]
    # Envoy may lie where only root can read.
    command = pod.command(str(find_envoy()), *options, uid=ENVOY, capability="dac_read_search")
    with (directory / "sidecar.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


@pytest.fixture
def lab(shared_capture_lab: CaptureLab) -> CaptureLab:
    """Give the lab with the objects of the document's last step, and with everything captured."""
    lab = shared_capture_lab
    lab.origin.greeting = b""
    lab.fake.forget()
    return lab


@pytest.fixture
def changing_lab(lab: CaptureLab) -> Iterator[CaptureLab]:
    """Give the lab to a test that applies objects of its own."""
    yield lab
    lab.apply_seed(4)


@pytest.fixture
def ruling_lab(lab: CaptureLab) -> Iterator[CaptureLab]:
    """Give the lab to a test that changes the rules."""
    yield lab
    lab.rules()


# The documents' commands, in a pod and without any proxy setting


def test_the_documents_commands_as_they_are_written(changing_lab: CaptureLab) -> None:
    lab = changing_lab
    lab.apply_seed(2)
    assert lab.ask(f"http://{DASHSCOPE}") == "qwen-1.8b-chat"
    lab.apply_seed(3)
    assert lab.ask(f"http://{DASHSCOPE}") == "qwen-1.8b-chat"
    assert lab.ask(f"http://{DASHSCOPE}", "--header", "user-type: subscriber") == "qwen-turbo"
    lab.apply_seed(4)
    # In files, the Service has no address: its name is resolved by Envoy alone.
    models = Counter(lab.ask("http://demo-llm-server") for _ in range(20))
    assert set(models) == {"qwen-1.8b-chat", "moonshot-v1-8k"}
    assert {seen.sni for seen in lab.fake.seen} == {DASHSCOPE, MOONSHOT}


@pytest.mark.parametrize(
    "how",
    [
        ["--header", f"Host: {DASHSCOPE}:80"],
        ["--header", "Host: DashScope.aliyuncs.com."],
        ["--http1.0"],
        ["--http2-prior-knowledge"],
        ["--connect-to", "::10.99.0.99:80"],  # nobody is there: only the name counts
        ["--connect-to", "::[fd99::99]:80"],
    ],
)
def test_an_llm_host_is_known_by_its_name_alone(lab: CaptureLab, how: list[str]) -> None:
    assert lab.ask(f"http://{DASHSCOPE}/", *how) == "qwen-1.8b-chat"
    (seen,) = lab.fake.seen
    assert (seen.host, seen.path) == (DASHSCOPE, "/compatible-mode/v1/chat/completions")


def test_a_provider_gets_nothing_that_tells_of_the_client(lab: CaptureLab) -> None:
    private = ("X-Forwarded-For: 1.2.3.4", "X-Envoy-Max-Retries: 9", "Cookie: a", "X-Request-Id: b", "Via: c")
    assert lab.ask(f"http://{DASHSCOPE}", *(f"-H{header}" for header in private)) == "qwen-1.8b-chat"
    (seen,) = lab.fake.seen
    names = {name.lower() for name, _ in seen.headers}
    assert names == {"host", "user-agent", "accept", "content-length", "content-type", "authorization"}


# What no object names


ANSWER = b"HTTP/1.1 200 Fine\r\nServer: x\r\nDate: now\r\nX-CasE: 1\r\nContent-Length: 3\r\n\r\nend"
HEADERS = b"""\
Host: Other.Example:80
X-Forwarded-For: 1.2.3.4
Authorization: Bearer x
Cookie: a=b; c=d
Via: 1.1 another
TE: trailers
accept-Encoding: gzip
X-Twice: 1
X-Twice: 2
""".replace(b"\n", b"\r\n")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /a//b/../c?x=%2F HTTP/1.1\r\n" + HEADERS + b"\r\n",
        b"DELETE / HTTP/1.1\r\nHost: 10.99.0.20\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: other.example.\r\nContent-Length: 4\r\n\r\n\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello\r\n\r\n",
        b"not HTTP at all\r\n\r\n",
    ],
)
def test_a_request_and_its_answer_pass_byte_for_byte(lab: CaptureLab, request_bytes: bytes) -> None:
    direct = lab.exchange(request_bytes, ANSWER, direct=True)
    assert direct == (request_bytes, ANSWER)
    assert lab.exchange(request_bytes, ANSWER) == direct


def test_headers_that_envoy_would_make_are_those_of_the_client_or_none(lab: CaptureLab) -> None:
    given = b"GET / HTTP/1.1\r\nHost: other.example\r\nX-Forwarded-Proto: https\r\nX-Request-Id: a\r\n\r\n"
    assert lab.exchange(given, ANSWER).request == given


def test_websockets_and_tunnels_pass(lab: CaptureLab) -> None:
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
    switching = b"HTTP/1.1 101 Switching Protocols\r\n" + upgrade + b"Date: now\r\n\r\nend"
    request = b"GET /chat HTTP/1.1\r\nHost: other.example\r\n" + upgrade + b"\r\n"
    assert lab.exchange(request, switching) == (request, switching)
    # A forward proxy on port 80, also for a host that is known.
    connect = f"CONNECT {DASHSCOPE}:443 HTTP/1.1\r\nHost: {DASHSCOPE}:443\r\n\r\n".encode()
    established = b"HTTP/1.1 200 Connection established\r\nDate: now\r\n\r\nend"
    assert lab.exchange(connect, established) == (connect, established)


def test_a_protocol_in_which_the_server_speaks_first_passes_on_other_ports(lab: CaptureLab) -> None:
    lab.origin.greeting = b"220 hello\r\n"
    assert lab.exchange(b"QUIT\r\n\r\n", b"end", port=7000) == (b"QUIT\r\n\r\n", b"220 hello\r\nend")


def test_http2_without_tls_passes(lab: CaptureLab) -> None:
    before = len(lab.origin.got)
    lab.curl("--http2-prior-knowledge", f"http://{OTHER}/")
    assert lab.origin.got[before].startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")


def test_where_nobody_listens_the_answer_is_not_that_of_an_llm(lab: CaptureLab) -> None:
    done = lab.curl("--include", "--header", f"Host: {OTHER}", f"http://{LLM}/")
    assert done.stdout.startswith("HTTP/1.1 503")
    assert "content-type: text/plain" in done.stdout
    assert "openai" not in done.stdout


def test_who_connects_to_the_capture_port_itself_is_sent_away(lab: CaptureLab) -> None:
    for address in ("127.0.0.1", "::1"):
        with lab.pod.inside(), socket.create_connection((address, PORT), timeout=20) as connection:
            assert connection.recv(1) == b""


# Providers that no LLMRoute names


MANY = [
    route(f"host-{number}", f"host-{number}.example", {"backendRefs": backends(DASHSCOPE)})
    for number in range(THRESHOLD + MARGIN + 1)
]
both_forms = pytest.mark.parametrize("others", [[], MANY], ids=["few", "many"])


ELSEWHERE = {"port": 8443, "endpoints": [{"address": LLM, "port": 443}]}


@pytest.mark.needs(Feature.ROUTE_CACHE)
@both_forms
@pytest.mark.parametrize("like", [{}, ELSEWHERE | {"maxRequestBytes": 50_000_000}], ids=["usual", "odd"])
def test_a_provider_comes_and_goes_and_no_route_changes(
    changing_lab: CaptureLab, others: list[str], like: dict[str, Any]
) -> None:
    lab, ask = changing_lab, (f"http://{MOONSHOT}/", "--header", "Connection: close")
    qwen = provider("dashscope", DASHSCOPE, key=KEYS[DASHSCOPE])
    lab.apply(qwen, *others)
    before = lab.reloads()
    assert not lab.is_answered(MOONSHOT)
    lab.apply(qwen, provider("moonshot", MOONSHOT, key=KEYS[MOONSHOT], model="kimi", **like), *others)
    eventually(lambda: lab.ask(*ask) == "kimi")
    lab.apply(qwen, *others)
    eventually(lambda: not lab.is_answered(MOONSHOT))
    assert lab.reloads() == before


@both_forms
def test_what_no_llmroute_names_is_a_provider_or_passes(changing_lab: CaptureLab, others: list[str]) -> None:
    lab = changing_lab
    hidden = provider("istio-system/moonshot", MOONSHOT, key=KEYS[MOONSHOT], exportTo=["."])
    lab.apply(
        provider("dashscope", DASHSCOPE, key=KEYS[DASHSCOPE], model="qwen"),
        hidden,
        route("istio-system/kimi", "kimi.example", {"backendRefs": backends(MOONSHOT)}),
        *others,
    )
    names = (DASHSCOPE, f"{DASHSCOPE}:80", f"{DASHSCOPE}.", f"{DASHSCOPE.title()}.:80", DASHSCOPE.upper())
    for host in names:
        assert lab.ask("http://10.99.0.99/", "--header", f"Host: {host}") == "qwen", host
    assert {seen.host for seen in lab.fake.seen} == {DASHSCOPE}
    assert not [name for seen in lab.fake.seen for name, _ in seen.headers if name.startswith("x-envoy")]
    lab.fake.forget()
    # No LLMRoute of this namespace, a cluster all the same.
    for host in (MOONSHOT, MOONSHOT.title(), f"{MOONSHOT}.:80", "nobody.example", "[::1]:80"):
        request = b"GET / HTTP/1.1\r\nHost: " + host.encode() + b"\r\nX-Envoy-LLMPlane-Routes: a\r\n\r\n"
        passed = request.replace(b"X-Envoy-LLMPlane-Routes: a\r\n", b"")
        assert lab.exchange(request, ANSWER) == (passed, ANSWER), host
    assert not lab.fake.seen
    body = lab.mesh.directory / "body.json"
    body.write_bytes(MESSAGES.replace(b"Hi", b"x" * 3_000_000))  # more than what Envoy buffers by default
    done = lab.curl(
        f"http://{DASHSCOPE}/", "--header", "Content-Type: application/json", "--data", f"@{body}"
    )
    assert json.loads(done.stdout)["model"] == "qwen"


@both_forms
def test_a_service_is_a_provider_by_all_its_names(changing_lab: CaptureLab, others: list[str]) -> None:
    lab = changing_lab
    lab.apply(
        provider("dashscope", DASHSCOPE, key=KEYS[DASHSCOPE]),
        provider("llm", SERVICE, model="small", **ELSEWHERE),
        *others,
    )
    for host in ("llm", "LLM.", "llm:80", "llm.default", "llm.default.svc", "llm.default.svc.:80", SERVICE):
        assert lab.ask("http://10.99.0.99/", "--header", f"Host: {host}") == "small", host
    for host in ("llm.other", "other", "other.default.svc.cluster.local", "a.llm.default.svc"):
        request = b"GET / HTTP/1.1\r\nHost: " + host.encode() + b"\r\n\r\n"
        assert lab.exchange(request, ANSWER) == (request, ANSWER), host


@both_forms
def test_an_upgrade_passes_and_no_provider_gets_one(changing_lab: CaptureLab, others: list[str]) -> None:
    lab = changing_lab
    lab.apply(provider("dashscope", DASHSCOPE, key=KEYS[DASHSCOPE]), *others)
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
    switching = b"HTTP/1.1 101 Switching Protocols\r\n" + upgrade + b"Date: now\r\n\r\nend"
    request = b"GET /chat HTTP/1.1\r\nHost: other.example\r\n" + upgrade + b"\r\n"
    assert lab.exchange(request, switching) == (request, switching)
    refused = lab.curl("-i", f"http://{DASHSCOPE}/", "-H", "Upgrade: websocket", "-H", "Connection: Upgrade")
    assert refused.stdout.startswith("HTTP/1.1 405")
    assert "unsupported_request" in refused.stdout
    assert not lab.fake.seen


def test_what_is_sent_to_a_provider_that_envoy_refuses_does_not_pass(changing_lab: CaptureLab) -> None:
    """In clear, past the provider that somebody meant it for."""
    lab = changing_lab
    refused = provider("openai", OPENAI, key=KEYS[OPENAI], tls={"caCertificates": "/no/such/file"})
    lab.mesh.apply("objects.yaml", refused, settle=False)
    eventually(lambda: {proxy["state"] for proxy in lab.mesh.status()["proxies"]} == {"NACK"})
    how = ("--include", "--connect-to", f"::{ORIGIN}:80", f"http://{OPENAI}/")
    eventually(lambda: lab.curl(*how).stdout.startswith("HTTP/1.1 503"))
    assert "provider_unreachable" in lab.curl(*how).stdout


@pytest.mark.needs(Feature.METRICS)
def test_metrics_tell_what_was_captured_and_what_passed_through(lab: CaptureLab) -> None:
    assert lab.ask(f"http://{DASHSCOPE}/") == "qwen-1.8b-chat"
    lab.exchange(b"GET / HTTP/1.1\r\n" + HEADERS + b"\r\n", ANSWER)

    def hosts() -> set[str]:
        text = lab.curl("http://127.0.0.1:15090/stats/prometheus").stdout
        return set(re.findall(r'^istio_requests_total{.*,destination_service="([^"]*)"', text, re.MULTILINE))

    eventually(lambda: {DASHSCOPE, "PassthroughCluster"} <= hosts())


def test_more_than_a_thousand_hosts(changing_lab: CaptureLab) -> None:
    """Routes are scoped then; what is unknown must be known as such all the same."""
    lab = changing_lab
    names = [f"host-{number}.example" for number in range(THRESHOLD + MARGIN + 1)]
    rule = {"backendRefs": backends(DASHSCOPE)}
    lab.apply(
        provider("dashscope", DASHSCOPE, key=KEYS[DASHSCOPE]),
        *(route(name.partition(".")[0], name, rule) for name in names),
        route("chat", "chat", rule),
    )
    of_a_service = ("chat", "CHAT:80", "chat.default", "chat.default.svc.", "chat.default.svc.cluster.local")
    for host in (DASHSCOPE, f"{DASHSCOPE}:80", "DashScope.aliyuncs.com.", names[0], names[-1], *of_a_service):
        assert lab.ask("http://10.99.0.99/", "--header", f"Host: {host}") == "some-model"
    request = b"GET / HTTP/1.1\r\n" + HEADERS + b"\r\n"
    assert lab.exchange(request, ANSWER) == (request, ANSWER)
    connect = f"CONNECT {DASHSCOPE}:443 HTTP/1.1\r\nHost: {DASHSCOPE}:443\r\n\r\n".encode()
    established = b"HTTP/1.1 200 Connection established\r\nDate: now\r\n\r\nend"
    assert lab.exchange(connect, established) == (connect, established)


@pytest.mark.needs(Feature.TOKEN_LIMITS)
@pytest.mark.parametrize("count", [0, THRESHOLD + MARGIN + 1], ids=["few", "many"])
def test_limits_are_for_llm_hosts(changing_lab: CaptureLab, count: int) -> None:
    limit = {"keys": [{"attribute": "Workload"}], "rules": [{"limits": [{"tokens": 100, "unit": "Hour"}]}]}
    changing_lab.apply(
        provider("dashscope", DASHSCOPE, key=KEYS[DASHSCOPE]),
        *(
            route(f"r{number}", f"{number}.example", {"backendRefs": backends(DASHSCOPE)})
            for number in range(count)
        ),
        rate_limit(f"limit-{count}", **limit),
    )
    assert changing_lab.ask(f"http://{DASHSCOPE}/") == "some-model"
    assert "rate_limit_exceeded" in changing_lab.ask(f"http://{DASHSCOPE}/")
    request = b"POST / HTTP/1.1\r\nHost: other.example\r\nContent-Length: 4\r\n\r\n\r\n\r\n"
    assert changing_lab.exchange(request, ANSWER) == (request, ANSWER)


# Names


def test_only_a_name_without_an_address_gets_one(lab: CaptureLab) -> None:
    found = lab.pod.run("getent", "ahostsv4", "demo-llm-server.default.svc").stdout
    assert found.startswith("240.240.")
    assert lab.pod.run("getent", "ahostsv4", DASHSCOPE).stdout.startswith(LLM)
    assert lab.pod.run("getent", "hosts", "nowhere.example").returncode == 2


def test_queries_of_one_socket_go_to_envoy_and_to_the_name_server_by_their_type(lab: CaptureLab) -> None:
    """Envoy would say of a name that it does not exist if it has no IPv6 address, and knows few types."""
    a, txt, aaaa = 1, 16, 28
    lab.dns.asked.clear()
    assert lab.query(OTHER, aaaa, a, txt) == {a: (0, 1), txt: (0, 0), aaaa: (0, 0)}
    assert lab.query("demo-llm-server", aaaa, a) == {a: (0, 1), aaaa: (3, 0)}


# What is left out


def is_captured(lab: CaptureLab, *options: str, uid: int = APPLICATION) -> bool:
    """Whether a request reaches the LLM: where its name leads to, nobody listens on port 80."""
    done = lab.curl(
        f"http://{DASHSCOPE}/", "-o/dev/null", "-w%{http_code}", f"-d{MESSAGES.decode()}", *options, uid=uid
    )
    return done.stdout == "200"


def test_a_user_is_left_out(ruling_lab: CaptureLab) -> None:
    assert is_captured(ruling_lab)
    assert not is_captured(ruling_lab, uid=EXCLUDED)
    ruling_lab.rules(EXCLUDE_OUTBOUND_UIDS="", INCLUDE_OUTBOUND_UIDS=f"{EXCLUDED},3000")
    assert not is_captured(ruling_lab)
    assert is_captured(ruling_lab, uid=EXCLUDED)


@pytest.mark.parametrize(
    ("settings", "captured"),
    [
        ({"EXCLUDE_OUTBOUND_PORTS": "8080,80"}, False),
        ({"EXCLUDE_OUTBOUND_PORTS": "8080"}, True),
        ({"EXCLUDE_OUTBOUND_IP_RANGES": "10.99.0.0/24,fd00::/8"}, False),
        ({"EXCLUDE_OUTBOUND_IP_RANGES": "10.98.0.0/24"}, True),
        ({"INCLUDE_OUTBOUND_IP_RANGES": "10.98.0.0/24"}, False),
        ({"INCLUDE_OUTBOUND_IP_RANGES": "10.98.0.0/24,10.99.0.10/32"}, True),
        ({"INCLUDE_OUTBOUND_IP_RANGES": ""}, False),
        ({"INCLUDE_OUTBOUND_IP_RANGES": "", "INCLUDE_OUTBOUND_PORTS": "80"}, True),
    ],
)
def test_ports_and_addresses_are_left_out(
    ruling_lab: CaptureLab, settings: dict[str, str], captured: bool
) -> None:
    assert ruling_lab.rules(**settings).returncode == 0
    assert is_captured(ruling_lab) is captured


def test_the_rules_are_put_in_place_once_and_taken_away(ruling_lab: CaptureLab) -> None:
    def rules() -> list[str]:
        return [
            ruling_lab.pod.run(program, "-t", table, "-S").stdout
            for program in ("iptables", "ip6tables")
            for table in ("nat", "raw")
        ]

    before = rules()
    assert ruling_lab.rules().returncode == 0
    assert rules() == before
    assert ruling_lab.rules("--remove").returncode == 0
    assert "LLMPLANE" not in "".join(rules())
    assert not is_captured(ruling_lab)


@pytest.mark.parametrize(
    "settings",
    [
        {"EXCLUDE_OUTBOUND_PORTS": "80;reboot"},
        {"EXCLUDE_OUTBOUND_IP_RANGES": "example.com"},
        {"PROXY_UID": "envoy"},
        {"DNS_CAPTURE": "yes"},
    ],
)
def test_a_setting_that_is_not_understood_changes_nothing(
    ruling_lab: CaptureLab, settings: dict[str, str]
) -> None:
    done = ruling_lab.rules(**settings)
    assert (done.returncode, done.stderr.split(":")[1].strip()) == (2, next(iter(settings)))
    assert is_captured(ruling_lab)
