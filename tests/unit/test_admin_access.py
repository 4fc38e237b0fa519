"""Who may see what is below /debug on an address that other machines reach: every way in."""

import asyncio
import http.client
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import structlog
from click.testing import CliRunner

from llmplane.address import Address
from llmplane.admin import Access, AdminServer
from llmplane.auth import ClientCA, FileAuthenticator, Grant, Identity, ServerCertificate, TokenFile
from llmplane.bootstrap import XdsCredentials
from llmplane.certificates import CertificateAuthority
from llmplane.cli import main
from llmplane.status import StatusUnavailableError, fetch_status
from tests.support.identities import MeshCA, Pair
from tests.unit.test_admin import ENDPOINTS, STATUS, Nothing
from xds.server import AuthenticationUnavailable, Authenticator, NodeRejected

ALL = "token-for-all-000001"
ROOT = "token-for-root-00001"
TEAM = "token-of-team-a-0001"
ONE = "token-of-one-workload-1"
TOKENS = f"* {ALL}\nistio-system {ROOT}\nteam-a {TEAM}\n*/chat {ONE}\n"
DEBUG = [path for path in ENDPOINTS if path.startswith("/debug")] + ["/debug", "/debug/"]
OPEN = [path for path in ENDPOINTS if not path.startswith("/debug")]
SYSTEM = "spiffe://cluster.local/ns/istio-system/sa/operator"


class Door:
    """An admin server with TLS, and its files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = CertificateAuthority.create()
        self.mesh = MeshCA()
        self.address = Address("localhost", 0)
        self.ca_file = self.authority.write(directory / "ca")
        self.client_ca = directory / "mesh.pem"
        self.tokens = directory / "tokens"
        self.install(self.mesh.pem)
        Pair(*self.authority.issue("localhost")).write(directory, "server")

    def install(self, client_ca: bytes) -> None:
        self.client_ca.write_bytes(client_ca)

    @asynccontextmanager
    async def open(
        self, *, tokens: str = "", mutual: bool = False, authenticator: Authenticator | None = None
    ) -> AsyncIterator[None]:
        """Serve to those with a token, with a client certificate, or with both; or to whom one lets in."""
        self.tokens.write_text(tokens)
        client_ca = self.client_ca if mutual else None
        certificate = ServerCertificate(
            self.directory / "server.pem", self.directory / "server-key.pem", client_ca
        )
        files = FileAuthenticator(
            TokenFile(self.tokens) if tokens else None, ClientCA(client_ca) if client_ca else None
        )
        insight = Nothing()
        insight.ready = True
        server = AdminServer(insight, Access(certificate, authenticator or files, "istio-system"))
        address = await server.start(Address("127.0.0.1", 0))
        self.address = self.address._replace(port=address.port)
        try:
            yield
        finally:
            await server.stop()

    def connection(self, pair: Pair | None = None) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=str(self.ca_file))
        if pair:
            context.load_cert_chain(*pair.write(self.directory, "client"))
        return http.client.HTTPSConnection(*self.address, context=context, timeout=60)

    def session(self, context: ssl.SSLContext, before: ssl.SSLSession | None = None) -> ssl.SSLSession | None:
        """Ask on a new connection; return the session of TLS that a later one could resume.

        Raises AssertionError if the one before was resumed.
        """
        with (
            socket.create_connection(("127.0.0.1", self.address.port)) as raw,
            context.wrap_socket(raw, server_hostname="localhost", session=before) as connection,
        ):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")  # 1.3 hands out sessions before
            assert not connection.session_reused
            return connection.session

    async def get(self, path: str, token: str = "", pair: Pair | None = None) -> tuple[int, str]:
        """Return status and text of an answer."""
        with closing(self.connection(pair)) as connection:
            return await asyncio.to_thread(ask, connection, path, token)

    def credentials(self, token: str = "", pair: Pair | None = None) -> XdsCredentials:
        """Return files for `llmplane status`."""
        files = pair.write(self.directory, "client") if pair else (None, None)
        file = self.directory / "token"
        file.write_text(token)
        return XdsCredentials(self.ca_file, *files, file if token else None)


def ask(connection: http.client.HTTPSConnection, path: str, token: str = "") -> tuple[int, str]:
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.fixture
def door(tmp_path: Path) -> Door:
    structlog.reset_defaults()
    return Door(tmp_path)


@pytest.mark.parametrize("mutual", [False, True])
async def test_health_and_metrics_are_for_everybody(door: Door, *, mutual: bool) -> None:
    async with door.open(tokens=TOKENS, mutual=mutual):
        for path in OPEN:
            assert (await door.get(path))[0] == 200, path


async def test_without_a_known_token_there_is_nothing_to_see(door: Door) -> None:
    async with door.open(tokens=TOKENS):
        for path in DEBUG:
            assert await door.get(path) == (401, "a bearer token is required\n"), path
            assert await door.get(path, "a-token-that-is-wrong") == (401, "the bearer token is not known\n")
        for path in ("//debug/status", "/debug/../debug/status", "/x/../debug/status", "/debug//status"):
            assert (await door.get(path))[0] in {401, 404}, path


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Authorization : Bearer {ALL}", 400),
        (f"Authorization: Bearer {ALL}\0", 400),
        (f"Authorization: Bearer {ALL}{'x' * 9000}", 400),
        (f"Authorization: Bearer {ALL}\u00e9", 401),
    ],
    ids=["space before the colon", "NUL", "too long", "no ASCII"],
)
async def test_a_token_in_a_request_that_is_no_http_is_not_logged(
    door: Door, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], header: str, status: int
) -> None:
    request = f"GET /debug/status HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n".encode("latin-1")

    def send() -> bytes:
        with (
            socket.create_connection(("127.0.0.1", door.address.port)) as raw,
            door.authority.client_context().wrap_socket(raw, server_hostname="localhost") as connection,
        ):
            connection.sendall(request)
            return connection.recv(1000)

    async with door.open(tokens=TOKENS):
        assert f" {status} ".encode() in await asyncio.to_thread(send)
    assert not caplog.records
    assert ALL not in "".join(capsys.readouterr())


async def test_what_concerns_all_is_for_those_who_stand_for_all(door: Door) -> None:
    """Every namespace, or the root namespace, as in Istio; a workload or another namespace is not enough."""
    async with door.open(tokens=TOKENS):
        for token in (ALL, ROOT):
            assert {(await door.get(path, token))[0] for path in DEBUG} == {200, 400}, "400: which proxy?"
        for token in (TEAM, ONE):
            status, text = await door.get("/debug/status", token)
            assert (status, "not for every namespace" in text) == (403, True)


async def test_a_client_certificate_of_the_root_namespace_opens(door: Door) -> None:
    async with door.open(mutual=True):
        assert (await door.get("/debug/status", pair=door.mesh.issue(SYSTEM)))[0] == 200
        assert (await door.get("/debug/status"))[0] == 401
        assert (await door.get("/debug/status", pair=door.mesh.issue("nobody")))[0] == 401
        other = door.mesh.issue("spiffe://cluster.local/ns/team-a/sa/sleep")
        assert (await door.get("/debug/status", pair=other))[0] == 403
        for bad in (MeshCA().issue(SYSTEM), door.mesh.issue(SYSTEM, days=-1)):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await door.get("/healthz", pair=bad)


async def test_both_are_needed_where_both_are_asked_for(door: Door) -> None:
    system, team = (door.mesh.issue(f"spiffe://x/ns/{name}/sa/a") for name in ("istio-system", "team-a"))
    async with door.open(tokens=TOKENS, mutual=True):
        assert (await door.get("/debug/status", ALL, system))[0] == 200
        assert (await door.get("/debug/status", ALL))[0] == 401
        assert (await door.get("/debug/status", pair=system))[0] == 401
        assert (await door.get("/debug/status", ALL, team))[0] == 403
        assert (await door.get("/debug/status", TEAM, system))[0] == 403


async def test_nothing_is_told_without_tls(door: Door) -> None:
    async with door.open(tokens=TOKENS):
        plain = http.client.HTTPConnection(*door.address, timeout=60)
        with pytest.raises((http.client.HTTPException, OSError)):
            await asyncio.to_thread(ask, plain, "/debug/status", ALL)
        plain.close()


async def test_only_tls_1_3_is_spoken(door: Door) -> None:
    context = door.authority.client_context()
    async with door.open(tokens=TOKENS):
        await asyncio.to_thread(door.session, context)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.to_thread(door.session, context)


async def test_a_session_of_tls_is_not_resumed(door: Door) -> None:
    """It could outlive the certificate."""
    context = door.authority.client_context()
    async with door.open(tokens=TOKENS):
        session = await asyncio.to_thread(door.session, context)
        await asyncio.to_thread(door.session, context, session)


class Scripted:
    """An authenticator that answers as it was told, and knows whom it let in."""

    def __init__(self, answer: Identity | NodeRejected) -> None:
        self.answer = answer
        self.open: list[object] = []

    async def authenticate(self, *_: object) -> Identity:
        if isinstance(self.answer, NodeRejected):
            raise self.answer
        self.open.append(self.answer)
        return self.answer

    def left(self, identity: object) -> None:
        self.open.remove(identity)

    def revision(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (Identity(((Grant("*"),),)), 200),
        (Identity(((Grant("team-a"),),)), 403),
        (AuthenticationUnavailable("away"), 503),
        (NodeRejected("gone", forbidden=True), 403),
    ],
)
async def test_an_authenticator_learns_that_whom_it_let_in_is_done(
    door: Door, answer: Identity | NodeRejected, status: int
) -> None:
    """Or else one that watches Pods would do so for ever. While it cannot tell, that is nobody's fault."""
    authenticator = Scripted(answer)
    async with door.open(authenticator=authenticator):
        assert (await door.get("/debug/status"))[0] == status
    assert not authenticator.open


async def test_changed_files_count_at_once_also_on_a_connection_that_is_open(door: Door) -> None:
    async with door.open(tokens=TOKENS, mutual=True):
        pair = door.mesh.issue(SYSTEM)
        connection = door.connection(pair)
        assert (await asyncio.to_thread(ask, connection, "/debug/status", ALL))[0] == 200
        door.tokens.write_text(f"* {ROOT}\n")
        assert (await asyncio.to_thread(ask, connection, "/debug/status", ALL))[0] == 401
        assert (await asyncio.to_thread(ask, connection, "/debug/status", ROOT))[0] == 200
        door.mesh = MeshCA()
        door.install(door.mesh.pem)
        assert (await asyncio.to_thread(ask, connection, "/debug/status", ROOT))[0] == 401
        connection.close()
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await door.get("/debug/status", ROOT, pair)
        assert (await door.get("/debug/status", ROOT, door.mesh.issue(SYSTEM)))[0] == 200


async def test_status_shows_its_credentials(door: Door) -> None:
    async with door.open(tokens=TOKENS, mutual=True):

        def fetch(token: str, pair: Pair | None) -> object:
            return fetch_status(door.address, door.credentials(token, pair))

        pair = door.mesh.issue(SYSTEM)
        assert await asyncio.to_thread(fetch, ALL, pair) == STATUS
        with pytest.raises(
            StatusUnavailableError, match=r"refuses to tell \(401\): the client certificate has"
        ):
            await asyncio.to_thread(fetch, ALL, None)
        with pytest.raises(StatusUnavailableError, match=r"\(403\): these credentials are not for every"):
            await asyncio.to_thread(fetch, TEAM, pair)
        with pytest.raises(StatusUnavailableError, match=r"does not speak HTTP: .* give --xds-ca-file"):
            await asyncio.to_thread(fetch_status, door.address)


async def test_the_command_takes_the_files_that_a_proxy_takes(door: Door) -> None:
    async with door.open(tokens=TOKENS):
        files = door.credentials(ALL)
        options = ["--xds-ca-file", str(files.ca_file), "--xds-token-file", str(files.token_file)]
        command = ["status", "--json", "--admin-address", str(door.address), *options]
        result = await asyncio.to_thread(CliRunner().invoke, main, command)
    assert (result.exit_code, '"revision": 1' in result.output) == (0, True)
