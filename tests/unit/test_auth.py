"""Who may get configuration: every way in, over raw gRPC (tests/envoy/test_auth_envoy.py: with Envoys)."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
import structlog
from grpc.experimental.session_cache import ssl_session_cache_lru
from structlog.testing import capture_logs

import xds.server
from crds.loader import load
from llmplane import auth
from llmplane.address import Address
from llmplane.auth import (
    ClientCA,
    CredentialsError,
    FileAuthenticator,
    Grant,
    Identity,
    ServerCertificate,
    TokenFile,
    certificate_grants,
    check_files,
)
from llmplane.bootstrap import XdsCredentials
from llmplane.certificates import CertificateAuthority
from llmplane.controlplane import ControlPlane
from llmplane.local import free_port
from llmplane.sources.state import SourceState
from tests.support.identities import MeshCA, Pair
from tests.support.objects import provider
from tests.xds.client import how_it_ended, write
from translator.proxy import Proxy, ProxyType
from translator.world import MeshSettings
from xds import protos
from xds.resources import SDS
from xds.server import AGGREGATED, SERVICES, Node, NodeRejected, Peer, Unauthenticated

KEY = "sk-of-team-a-0123456789"
TOKEN_A = "token-of-team-a-0001"  # noqa: S105 - made up, here and below
TOKEN_B = "token-of-team-b-0001"  # noqa: S105
DENIED = grpc.StatusCode.PERMISSION_DENIED
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
NOBODY = Node(id="", cluster="", metadata={}, version="")


class Objects:
    """A source that never changes: a provider with a key in team-a."""

    async def states(self, stop: asyncio.Event) -> AsyncIterator[SourceState]:
        loaded = load(provider("team-a/p", "a.example.com", KEY), "objects.yaml", {})
        yield SourceState(loaded.objects)
        await stop.wait()


@dataclass
class Outcome:
    """What a peer got: the names of its secrets and whether the key was there, or why it got nothing."""

    secrets: int = 0
    has_key: bool = False
    status: grpc.StatusCode | None = None
    details: str = ""


class Server:
    """A control plane that listens, and its files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = CertificateAuthority.create()
        self.mesh = MeshCA()
        self.port = free_port()

    def install_certificate(self) -> tuple[Path, Path]:
        """Write a certificate of its CA for `localhost`, a new one each time."""
        return Pair(*self.authority.issue("localhost")).write(self.directory, "server")

    @asynccontextmanager
    async def running(
        self, *, tls: bool = False, mutual: bool = False, tokens: str = ""
    ) -> AsyncIterator[None]:
        credentials = None
        if tls or mutual:
            client_ca = self.directory / "mesh.pem"
            client_ca.write_bytes(self.mesh.pem)
            files = ServerCertificate(*self.install_certificate(), client_ca if mutual else None)
            credentials = files.credentials()
        token_file = self.directory / "tokens"
        token_file.write_text(tokens)
        authenticator = FileAuthenticator(
            TokenFile(token_file) if tokens else None,
            ClientCA(self.directory / "mesh.pem") if mutual else None,
        )
        control_plane = ControlPlane(Objects(), MeshSettings(), authenticator=authenticator)
        async with self.serving(control_plane, credentials):
            yield

    @asynccontextmanager
    async def serving(
        self, control_plane: ControlPlane, credentials: grpc.ServerCredentials | None = None
    ) -> AsyncIterator[None]:
        stop = asyncio.Event()
        addresses = Address("127.0.0.1", self.port), Address("127.0.0.1", 0)
        task = asyncio.create_task(control_plane.run(*addresses, stop, credentials))
        try:
            while not control_plane.status()["revision"]:  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0.01)
            yield
        finally:
            stop.set()
            await task

    async def ask(
        self,
        namespace: str = "team-a",
        *,
        tls: bool = True,
        pair: Pair | None = None,
        token: str | None = None,
        labels: dict[str, str] | None = None,
        workload: str = "sleep",
    ) -> Outcome:
        """Open a stream as a proxy of a namespace, and ask for the provider's key."""
        async with self.channel(tls=tls, pair=pair) as channel:
            outcome, call = await self.ask_on(channel, namespace, token, labels, workload)
            if call:
                call.cancel()
            return outcome

    def channel(
        self, *, tls: bool = True, pair: Pair | None = None, more: Sequence[tuple[str, Any]] = ()
    ) -> grpc.aio.Channel:
        """Make a connection of one's own, with more of gRPC's options."""
        local = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0), *more]
        target = f"localhost:{self.port}"
        if not tls:
            return grpc.aio.insecure_channel(target, local)
        names = (pair.key, pair.certificate) if pair else (None, None)
        return grpc.aio.secure_channel(
            target, grpc.ssl_channel_credentials(self.authority.pem, *names), local
        )

    async def ask_on(
        self,
        channel: grpc.aio.Channel,
        namespace: str = "team-a",
        token: str | None = None,
        labels: dict[str, str] | None = None,
        workload: str = "sleep",
    ) -> tuple[Outcome, Any]:
        """Do the same on a connection; return the stream, too, if it is open."""
        metadata = [("authorization", token)] if token is not None else []
        node = {"id": f"sidecar~127.0.0.1~{workload}.{namespace}~x", "metadata": {}}
        request = protos.DeltaDiscoveryRequest(
            node={"id": node["id"]}, type_url=SDS, resource_names_subscribe=["api-key/team-a/p"]
        )
        request.node.metadata.update(
            {"NAMESPACE": namespace, "WORKLOAD_NAME": workload, "LABELS": labels or {}}
        )
        async with asyncio.timeout(60):
            call = channel.stream_stream(f"/{AGGREGATED}/DeltaAggregatedResources")(metadata=metadata)
            await write(call, request.SerializeToString())
            try:
                data = await call.read()
            except grpc.aio.AioRpcError:
                data = grpc.aio.EOF
            if not isinstance(data, bytes):
                status, details = await how_it_ended(call)
                return Outcome(status=status, details=details), None
            response = protos.DeltaDiscoveryResponse.FromString(data)
            return Outcome(len(response.resources), KEY.encode() in data), call


@pytest.fixture
def server(tmp_path: Path) -> Server:
    structlog.reset_defaults()
    return Server(tmp_path)


# Mutual TLS


async def test_a_proxy_is_served_as_the_namespace_that_its_certificate_names(server: Server) -> None:
    names = ["spiffe://cluster.local/ns/team-a/sa/sleep", "sleep.team-a", "sleep.team-a.svc.cluster.local"]
    async with server.running(mutual=True):
        for name in names:
            assert await server.ask(pair=server.mesh.issue(name)) == Outcome(1, has_key=True), name


async def test_a_certificate_of_another_namespace_gets_no_key(server: Server) -> None:
    async with server.running(mutual=True):
        for name in ("spiffe://cluster.local/ns/team-b/sa/sleep", "sleep.team-b", "sleep.team-b.svc"):
            pair = server.mesh.issue(name)
            outcome = await server.ask("team-a", pair=pair)
            assert (outcome.status, outcome.secrets) == (DENIED, 0), name
            assert "team-b" in outcome.details
            assert not (await server.ask("team-b", pair=pair)).has_key, "what is its own, it may ask for"


async def test_the_workload_of_a_dns_name_counts(server: Server) -> None:
    async with server.running(mutual=True):
        assert (await server.ask(workload="other", pair=server.mesh.issue("sleep.team-a"))).status is DENIED


async def test_a_certificate_without_a_name_of_a_proxy_is_not_enough(server: Server) -> None:
    async with server.running(mutual=True):
        for names in ([], ["sleep"], ["https://team-a"]):
            assert (await server.ask(pair=server.mesh.issue(*names))).status is UNAUTHENTICATED


async def test_a_name_is_not_cut_where_the_certificate_does_not_end_it(server: Server) -> None:
    """A CA might give `*.example.com` to anybody; C code, as in gRPC, ends a text at a NUL."""
    names = ["sleep.team-a\0.example.com", "sleep.team-a.svc\0", "spiffe://d/ns/team-a\0/sa/sleep"]
    async with server.running(mutual=True):
        for name in names:
            outcome = await server.ask(pair=server.mesh.issue(name))
            assert (outcome.status, outcome.secrets) == (UNAUTHENTICATED, 0), name


async def test_who_has_no_good_certificate_does_not_even_connect(server: Server) -> None:
    name = "spiffe://cluster.local/ns/team-a/sa/sleep"
    wrong = {
        "none": None,
        "of another CA": MeshCA().issue(name),
        "expired": server.mesh.issue(name, days=-1),
        "of a server": Pair(*server.authority.issue("sleep.team-a")),
    }
    async with server.running(mutual=True):
        for what, pair in wrong.items():
            assert (await server.ask(pair=pair)).status is UNAVAILABLE, what
        assert (await server.ask(tls=False)).status is UNAVAILABLE, "plaintext"
        assert (await server.ask(pair=server.mesh.issue(name))).has_key, "and the right one still does"


async def test_a_session_of_tls_that_is_resumed_does_not_outlive_the_certificate(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server.running(mutual=True):
        sessions = ("grpc.ssl_session_cache", ssl_session_cache_lru(1))
        pair = server.mesh.issue("sleep.team-a")
        for _ in range(2):
            async with server.channel(pair=pair, more=[sessions]) as channel:
                assert (await server.ask_on(channel))[0].has_key
        monkeypatch.setattr(auth, "datetime", InTwoDays)
        async with server.channel(pair=pair, more=[sessions]) as channel:
            outcome, _ = await server.ask_on(channel)
        assert (outcome.status, outcome.details) == (UNAUTHENTICATED, "the client certificate has expired")


class InTwoDays(datetime):
    """A clock."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return super().now(tz) + timedelta(days=2)


async def test_a_certificate_that_expires_ends_no_stream(tmp_path: Path) -> None:
    """When something else changes, all are looked at again."""
    mesh = MeshCA()
    (tmp_path / "ca.pem").write_bytes(mesh.pem)
    authenticator = FileAuthenticator(None, ClientCA(tmp_path / "ca.pem"))
    peer = Peer("", chain=mesh.issue("sleep.team-a", days=-1).certificate)
    with pytest.raises(Unauthenticated, match="has expired"):
        await authenticator.authenticate(peer, {}, NOBODY)
    identity = Identity(((Grant("team-a", "sleep"),),))
    assert await authenticator.authenticate(peer, {}, NOBODY, identity) == identity


async def test_grpc_gets_another_certificate_only_when_a_file_changed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it takes one, connections that begin at that moment end the process (grpcio 1.85.1)."""
    made: list[object] = []
    make = grpc.ssl_server_certificate_configuration
    monkeypatch.setattr(grpc, "ssl_server_certificate_configuration", lambda *a: made.append(a) or make(*a))
    async with server.running(tls=True, tokens=TOKEN_A):
        for expected in (1, 2):
            for _ in range(3):
                assert (await server.ask(token=f"Bearer {TOKEN_A}")).has_key
            assert len(made) == expected
            server.install_certificate()


@pytest.mark.parametrize(
    ("peer", "grants"),
    [
        (Peer("", ("spiffe://d/ns/a/sa/b",)), (Grant("a"),)),
        (Peer("", ("spiffe://d/ns/a/sa/b",), ("w.other",)), (Grant("a"),)),
        (Peer("", ("spiffe://d/ns/a/sa/b", "spiffe://d/ns/c/sa/b")), ()),
        (Peer("", ("spiffe://d/ns/a/sa/b", "https://e")), ()),
        (Peer("", ("SPIFFE://d/ns/a/sa/b",), ("w.other",)), ()),
        (Peer("", ("spiffe://d/workload",), ("w.other",)), ()),
        (Peer("", ("spiffe://d/ns/a/sa/b/c",)), ()),
        (Peer("", ("spiffe://d/ns/*/sa/b",)), ()),
        (Peer("", (), ("W.A", "v.b")), (Grant("a", "w"), Grant("b", "v"))),
        (Peer("", (), ("s.a.svc", "s.b.svc.cluster.local")), (Grant("a"), Grant("b"))),
        (Peer("", (), ("*.a", "w.*", "a", "", "api.example.com", "*.a.svc")), ()),
    ],
)
def test_what_the_names_of_a_certificate_allow(peer: Peer, grants: tuple[Grant, ...]) -> None:
    assert certificate_grants(peer) == grants


# Tokens


async def test_a_proxy_is_served_as_the_namespace_of_its_token(server: Server) -> None:
    async with server.running(tls=True, tokens=f"team-a {TOKEN_A}\nteam-b {TOKEN_B}\n"):
        assert await server.ask(token=f"Bearer {TOKEN_A}") == Outcome(1, has_key=True)
        assert (await server.ask(token=f"Bearer {TOKEN_B}")).status is DENIED
        assert not (await server.ask("team-b", token=f"Bearer {TOKEN_B}")).has_key


async def test_without_a_known_token_there_is_nothing(server: Server) -> None:
    wrong = [None, "", "Bearer", f"Bearer {TOKEN_A}x", f"Bearer {TOKEN_A[:-1]}", f"Basic {TOKEN_A}", TOKEN_A]
    async with server.running(tokens=TOKEN_A):
        for token in wrong:
            outcome = await server.ask(tls=False, token=token)
            assert (outcome.status, outcome.secrets) == (UNAUTHENTICATED, 0), token
            assert TOKEN_A[:-1] not in outcome.details
        assert (await server.ask(tls=False, token=f"bearer {TOKEN_A}")).has_key, "schemes have no case"


async def test_every_service_asks_for_the_token(server: Server) -> None:
    node = {"id": "sidecar~127.0.0.1~sleep.team-a~x"}
    requests = {
        "Stream": protos.DiscoveryRequest(node=node),
        "Delta": protos.DeltaDiscoveryRequest(node=node),
    }
    async with (
        server.running(tokens=TOKEN_A),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        asyncio.timeout(60),
    ):
        for (service, (name, _)), (variant, request) in itertools.product(SERVICES.items(), requests.items()):
            call = channel.stream_stream(f"/{service}/{variant}{name}")()
            await write(call, request.SerializeToString())
            assert (await how_it_ended(call))[0] is UNAUTHENTICATED, (service, variant)


async def test_a_stream_stays_who_it_was_whatever_later_requests_claim(server: Server) -> None:
    async with (
        server.running(tokens=f"team-a {TOKEN_A}\nteam-b {TOKEN_B}"),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        asyncio.timeout(60),
    ):
        method = channel.stream_stream(f"/{AGGREGATED}/DeltaAggregatedResources")
        call = method(metadata=[("authorization", f"Bearer {TOKEN_B}")])
        for namespace in ("team-b", "team-a"):
            request = protos.DeltaDiscoveryRequest(
                node={"id": "sidecar~a~b~c"}, type_url=SDS, resource_names_subscribe=["api-key/team-a/p"]
            )
            request.node.metadata.update({"NAMESPACE": namespace})
            await call.write(request.SerializeToString())
            response = protos.DeltaDiscoveryResponse.FromString(await call.read())
            assert not response.resources
        call.cancel()


async def test_a_plain_token_is_for_all_namespaces(server: Server) -> None:
    async with server.running(tokens=f"# for all\n\n{TOKEN_A}\n"):
        for namespace in ("team-a", "team-b"):
            assert (await server.ask(namespace, tls=False, token=f"Bearer {TOKEN_A}")).status is None


async def test_certificate_and_token_have_to_agree_when_both_are_asked_for(server: Server) -> None:
    of_a = server.mesh.issue("spiffe://cluster.local/ns/team-a/sa/sleep")
    of_b = server.mesh.issue("spiffe://cluster.local/ns/team-b/sa/sleep")
    token_a, token_b = f"Bearer {TOKEN_A}", f"Bearer {TOKEN_B}"
    async with server.running(mutual=True, tokens=f"team-a {TOKEN_A}\nteam-b {TOKEN_B}"):
        assert (await server.ask(pair=of_a, token=token_a)).has_key
        assert (await server.ask(pair=of_a)).status is UNAUTHENTICATED
        assert (await server.ask(token=token_a)).status is UNAVAILABLE
        for pair, token in ((of_a, token_b), (of_b, token_a)):
            for namespace in ("team-a", "team-b"):
                assert (await server.ask(namespace, pair=pair, token=token)).status is DENIED


async def test_no_token_is_logged(server: Server) -> None:
    with capture_logs() as logs:
        async with server.running(tokens=f"team-b {TOKEN_B}\nteam-a {TOKEN_A}"):
            for token in (TOKEN_A, TOKEN_B, "another-token-that-is-wrong"):
                await server.ask(tls=False, token=f"Bearer {token}")
    assert {"proxy connected", "proxy rejected"} <= {entry["event"] for entry in logs}
    assert not any(token in str(logs) for token in (TOKEN_A, TOKEN_B, "another-token"))


def proxy(namespace: str = "team-a", workload: str = "sleep", **labels: str) -> Proxy:
    return Proxy(ProxyType.SIDECAR, namespace, workload, frozenset(labels.items()))


def test_labels_of_a_token_are_the_workloads_whatever_it_claims(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"team-a/sleep app=sleep tier=gold {TOKEN_A}")
    grant = TokenFile(tmp_path / "tokens").grant(f"Bearer {TOKEN_A}")
    assert grant
    identity = Identity(((grant,),))
    whole = proxy(app="sleep", tier="gold")
    for claim in (proxy(), proxy(app="sleep"), whole):
        assert identity.admit(claim) == whole, "one with fewer could evade a policy that selects by label"
    for claim in (proxy(app="other"), proxy(app="sleep", role="admin"), proxy("team-b"), proxy(workload="x")):
        with pytest.raises(NodeRejected, match=r"for: team-a/sleep app=sleep tier=gold$"):
            identity.admit(claim)


def test_without_labels_the_claim_of_the_proxy_counts() -> None:
    assert Identity(((Grant("team-a"),),)).admit(proxy(app="any")) == proxy(app="any")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no token"),
        ("# only a comment", "has no token"),
        ("short", "1: a token is 16 or more of the signs A-Z a-z 0-9 . _ ~ + / - (and = at its end)"),
        (f'"{TOKEN_A}"', "1: a token is 16 or more of the signs A-Z a-z 0-9 . _ ~ + / - (and = at its end)"),
        (f"team-a {TOKEN_A}\n{TOKEN_B}", "2: is not NAMESPACE[/WORKLOAD] [LABEL=VALUE ...] TOKEN"),
        (f"Team_A {TOKEN_A}", "1: does not begin with NAMESPACE[/WORKLOAD]"),
        (f"team-a/ {TOKEN_A}", "1: does not begin with NAMESPACE[/WORKLOAD]"),
        (
            f"team-a sleep {TOKEN_A}",
            "1: has a word that is not LABEL=VALUE between the namespace and the token",
        ),
        (f"team-a {TOKEN_A}\nteam-b {TOKEN_A}", "2: has the token of an earlier line"),
        ("tokén", "is not ASCII"),
    ],
)
def test_a_mistake_in_a_token_file_is_told_without_its_token(
    tmp_path: Path, text: str, expected: str
) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(CredentialsError) as raised:
        TokenFile(file)
    assert str(raised.value).removeprefix(str(file)).lstrip(": ") == expected


# Files that change


async def test_a_changed_token_file_counts_at_once_and_a_broken_one_changes_nothing(server: Server) -> None:
    file = server.directory / "tokens"
    async with server.running(tokens=TOKEN_A):
        file.write_text(TOKEN_B)
        assert (await server.ask(tls=False, token=f"Bearer {TOKEN_A}")).status is UNAUTHENTICATED
        assert (await server.ask(tls=False, token=f"Bearer {TOKEN_B}")).has_key
        with capture_logs() as logs:
            for broken in ("no", None):
                if broken is None:
                    file.unlink()
                else:
                    file.write_text(broken)
                for _ in range(2):
                    assert (await server.ask(tls=False, token=f"Bearer {TOKEN_B}")).has_key
        problems = [entry["problem"] for entry in logs if entry["log_level"] == "error"]
        assert len(problems) == 2, "each is told once"
        assert problems[1] == f"{file}: cannot be read: No such file or directory"


def test_a_file_that_was_good_again_meanwhile_is_told_again(tmp_path: Path) -> None:
    structlog.reset_defaults()
    file = tmp_path / "tokens"
    file.write_text(TOKEN_A)
    tokens = TokenFile(file)
    with capture_logs() as logs:
        for text in ("no", TOKEN_A, "no"):
            file.write_text(text)
            assert tokens.grant(f"Bearer {TOKEN_A}") == Grant("*")
    assert [entry["log_level"] for entry in logs] == ["error", "error"]


async def test_a_new_server_certificate_is_used_without_a_restart(server: Server) -> None:
    async with server.running(tls=True, tokens=TOKEN_A):
        assert (await server.ask(token=f"Bearer {TOKEN_A}")).has_key
        server.authority = CertificateAuthority.create()
        assert (await server.ask(token=f"Bearer {TOKEN_A}")).status is UNAVAILABLE, "not of the new CA"
        server.install_certificate()
        assert (await server.ask(token=f"Bearer {TOKEN_A}")).has_key


async def test_a_new_client_ca_is_used_without_a_restart(server: Server) -> None:
    name = "spiffe://cluster.local/ns/team-a/sa/sleep"
    async with server.running(mutual=True):
        old = server.mesh.issue(name)
        assert (await server.ask(pair=old)).has_key
        server.mesh = MeshCA()
        (server.directory / "mesh.pem").write_bytes(server.mesh.pem)
        assert (await server.ask(pair=old)).status is UNAVAILABLE
        assert (await server.ask(pair=server.mesh.issue(name))).has_key


# Credentials that are taken away while a stream is open


def check_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xds.server, "RECHECK", 0.02)


async def test_a_token_that_is_taken_away_ends_the_streams_of_it_and_no_other(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may also be moved to another namespace or workload, or to other labels."""
    check_often(monkeypatch)
    file = server.directory / "tokens"
    async with (
        server.running(tokens=f"team-a {TOKEN_A}\n* {TOKEN_B}"),
        server.channel(tls=False) as one,
        server.channel(tls=False) as other,
    ):
        _, stays = await server.ask_on(other, token=f"Bearer {TOKEN_B}")
        for taken, status, reason in (
            (f"* {TOKEN_B}", UNAUTHENTICATED, "the bearer token is not known"),
            (f"team-b {TOKEN_A}\n* {TOKEN_B}", DENIED, "is not what the credentials are for: team-b"),
            (f"team-a/chat {TOKEN_A}\n* {TOKEN_B}", DENIED, "the credentials are for: team-a/chat"),
            (f"team-a app=x {TOKEN_A}\n* {TOKEN_B}", UNAVAILABLE, "stand for another proxy now"),
        ):
            outcome, call = await server.ask_on(one, token=f"Bearer {TOKEN_A}")
            assert outcome.has_key
            file.write_text(taken)
            code, details = await how_it_ended(call)
            assert (code, reason in details) == (status, True), details
            file.write_text(f"team-a {TOKEN_A}\n* {TOKEN_B}")
        assert not stays.done()
        file.write_text("no tokens")
        await asyncio.sleep(0.1)
        assert not stays.done(), "a broken file takes nothing away"


async def test_a_ca_that_is_taken_away_ends_the_streams_of_its_certificates_and_no_other(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a new stream begin on a connection that was verified before."""
    check_often(monkeypatch)
    name = "spiffe://cluster.local/ns/team-a/sa/sleep"
    other_ca = MeshCA()
    file = server.directory / "mesh.pem"
    async with (
        server.running(mutual=True),
        server.channel(pair=server.mesh.issue(name)) as one,
        server.channel(pair=other_ca.intermediate().issue(name)) as other,
    ):
        file.write_bytes(server.mesh.pem + other_ca.pem)
        _, ends = await server.ask_on(one)
        _, stays = await server.ask_on(other)
        file.write_bytes(other_ca.pem)
        why = "the client certificate is of a CA that is not trusted any more"
        assert await how_it_ended(ends) == (UNAUTHENTICATED, why)
        assert (await server.ask_on(one))[0].status in (UNAUTHENTICATED, UNAVAILABLE)
        assert not stays.done()


def test_a_certificate_is_no_authority(tmp_path: Path) -> None:
    """What somebody signed with the key of a client certificate is of no CA."""
    mesh, file = MeshCA(), tmp_path / "ca.pem"
    file.write_bytes(mesh.pem)
    authority = ClientCA(file)
    good = mesh.intermediate()
    pair = good.issue("sleep.team-a")
    assert authority.issued(pair.certificate)
    assert not authority.issued(pair.certificate.partition(b"-----END CERTIFICATE-----\n")[0])
    fake = mesh.intermediate(is_ca=False).issue("sleep.team-a")
    for chain in (fake.certificate, MeshCA().issue("sleep.team-a").certificate, b"", b"no certificate"):
        assert not authority.issued(chain)


async def test_half_of_a_new_pair_is_not_used(server: Server) -> None:
    async with server.running(tls=True, tokens=TOKEN_A):
        certificate, key = server.authority.issue("localhost")
        (server.directory / "server.pem").write_bytes(certificate)
        with capture_logs() as logs:
            assert (await server.ask(token=f"Bearer {TOKEN_A}")).has_key, "with the old one"
        (entry,) = (entry for entry in logs if entry["log_level"] == "error")
        assert "server-key.pem: is not the key of" in entry["problem"]
        (server.directory / "server-key.pem").write_bytes(key)
        assert (await server.ask(token=f"Bearer {TOKEN_A}")).has_key


def test_files_that_are_no_certificates_are_told(tmp_path: Path) -> None:
    authority = CertificateAuthority.create()
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    certificate, key = Pair(*authority.issue("localhost")).write(tmp_path, "server")
    other = Pair(*authority.issue("localhost")).write(tmp_path, "other")[1]
    for files, text in {
        (bad, key, None): "bad.pem: has no certificate in PEM form",
        (certificate, bad, None): "bad.pem: has no unencrypted key in PEM form",
        (certificate, other, None): f"other-key.pem: is not the key of {certificate}",
        (certificate, key, bad): "bad.pem: has no CA certificate in PEM form",
        (certificate, key, tmp_path / "x"): "x: cannot be read: No such file or directory",
        (tmp_path, key, None): ": cannot be read: Is a directory",
    }.items():
        with pytest.raises(CredentialsError) as raised:
            ServerCertificate(*files)
        assert str(raised.value).endswith(text)


def test_a_proxy_is_told_what_is_wrong_with_its_files_before_envoy_starts(tmp_path: Path) -> None:
    file = tmp_path / "token"
    for text, is_good in ((TOKEN_A, True), (f"{TOKEN_A}\n", True), (f"team-a {TOKEN_A}", False), ("", False)):
        file.write_text(text)
        if is_good:
            check_files(XdsCredentials(token_file=file))
        else:
            with pytest.raises(CredentialsError, match="does not hold one token and nothing else"):
                check_files(XdsCredentials(token_file=file))
    with pytest.raises(CredentialsError, match="nowhere: cannot be read"):
        check_files(XdsCredentials(ca_file=tmp_path / "nowhere"))


# What an authenticator is told


class Counting(FileAuthenticator):
    """Counts the streams that are open."""

    def __init__(self) -> None:
        super().__init__(None, None)
        self.open = 0

    async def authenticate(self, *_: object) -> Identity:
        self.open += 1
        return Identity(((Grant("team-a"),),))

    def left(self, _: object) -> None:
        self.open -= 1


async def test_an_authenticator_learns_of_each_stream_that_it_let_in_that_it_ended(server: Server) -> None:
    """Also of one that was refused for what it claims to be."""
    authenticator = Counting()
    control_plane = ControlPlane(Objects(), MeshSettings(), authenticator=authenticator)
    async with server.serving(control_plane):
        assert (await server.ask("team-a", tls=False)).has_key
        assert (await server.ask("team-b", tls=False)).status is DENIED
        async with asyncio.timeout(60):
            while authenticator.open:  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0.01)
    assert authenticator.open == 0
