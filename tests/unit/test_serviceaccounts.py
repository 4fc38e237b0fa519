"""Proxies with the tokens of their Pods' ServiceAccounts: whose they are, and when that is found out."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from llmplane import serviceaccounts
from llmplane.auth import TokenFile
from llmplane.kubeapi import Api
from llmplane.pods import workload_name
from llmplane.serviceaccounts import AccountAuthenticator
from tests.support.kubeapi import FakeApi, running_api
from translator.proxy import Proxy, ProxyType
from xds.server import AuthenticationUnavailable, Node, NodeRejected, Peer, Unauthenticated

PEER = Peer("127.0.0.1:1")
NODE = Node("sidecar~127.0.0.1~x.team-a~x", "", {}, "")
CLAIM = Proxy(ProxyType.SIDECAR, "team-a", "admin", frozenset({("role", "admin")}))
"""What the proxy says of itself."""
POD = """
apiVersion: v1
kind: Pod
metadata:
  name: sleep-5d8f-x2x4
  namespace: team-a
  labels: {app: sleep, pod-template-hash: 5d8f}
  ownerReferences: [{kind: ReplicaSet, name: sleep-5d8f, controller: true}]
spec: {}
"""
LABELS = frozenset({("app", "sleep"), ("pod-template-hash", "5d8f")})
TOKEN = "aaaa.bbbb.cccc"  # noqa: S105 - made up, here and below
FILE_TOKEN = "token-of-a-machine-outside"  # noqa: S105
UNBOUND = "aaaa.unbound.cccc"


@pytest.fixture
async def fake() -> AsyncIterator[FakeApi]:
    async with running_api(FakeApi()) as fake:
        await fake.put(POD)
        uid = fake.get("pods", "sleep-5d8f-x2x4", "team-a")["metadata"]["uid"]
        fake.tokens[TOKEN] = ("team-a:sleep", "sleep-5d8f-x2x4", uid)
        fake.tokens[UNBOUND] = ("team-a:sleep", "", "")
        yield fake


@pytest.fixture
async def accounts(api: Api) -> AsyncIterator[AccountAuthenticator]:
    authenticator = AccountAuthenticator(api, None, None)
    yield authenticator
    await authenticator.close()


def bearer(token: str) -> Mapping[str, str]:
    return {"authorization": f"Bearer {token}"}


def refusing(path: str, status: int = 503) -> Callable[[web.Request], web.Response | None]:
    return lambda request: web.json_response({}, status=status) if path in request.path else None


async def changed(accounts: AccountAuthenticator, before: Any) -> None:
    async with asyncio.timeout(60):
        while accounts.revision() == before:  # noqa: ASYNC110 - as the server does
            await asyncio.sleep(0.01)


class TestWho:
    async def test_name_and_labels_are_those_of_the_pod(self, accounts: AccountAuthenticator) -> None:
        """What the node message says of them does not count."""
        identity = await accounts.authenticate(PEER, bearer(TOKEN), NODE)
        proxy = identity.admit(CLAIM)
        assert (proxy.workload, proxy.labels) == ("sleep", LABELS)

    async def test_another_namespace_is_refused(self, accounts: AccountAuthenticator) -> None:
        identity = await accounts.authenticate(PEER, bearer(TOKEN), NODE)
        with pytest.raises(NodeRejected, match="a proxy of team-b/sleep with its labels is not"):
            identity.admit(Proxy(ProxyType.SIDECAR, "team-b", "sleep"))

    @pytest.mark.parametrize("metadata", [{}, bearer(FILE_TOKEN), {"authorization": f"Basic {TOKEN}"}])
    async def test_what_is_no_such_token_does_not_reach_the_api_server(
        self, accounts: AccountAuthenticator, fake: FakeApi, metadata: Mapping[str, str]
    ) -> None:
        with pytest.raises(Unauthenticated, match="that of a ServiceAccount, for the audience llmplane"):
            await accounts.authenticate(PEER, metadata, NODE)
        assert not fake.requests["POST tokenreviews"]

    async def test_an_unknown_token(self, accounts: AccountAuthenticator) -> None:
        with pytest.raises(Unauthenticated, match="refused: invalid bearer token"):
            await accounts.authenticate(PEER, bearer("aaaa.bbbb.dddd"), NODE)

    async def test_a_token_that_is_bound_to_no_pod_is_for_no_proxy(
        self, accounts: AccountAuthenticator
    ) -> None:
        """But whoever runs llmplane may show one of the root namespace at the admin address."""
        identity = await accounts.authenticate(PEER, bearer(UNBOUND), NODE)
        assert identity.oversees("team-a")
        with pytest.raises(NodeRejected, match="is not bound to a Pod"):
            identity.admit(CLAIM)

    async def test_a_pod_of_the_root_namespace_does_not_oversee(self, accounts: AccountAuthenticator) -> None:
        identity = await accounts.authenticate(PEER, bearer(TOKEN), NODE)
        assert not identity.oversees("team-a")

    async def test_a_pod_that_is_gone_does_not_oversee_either(
        self, accounts: AccountAuthenticator, fake: FakeApi
    ) -> None:
        await fake.delete("pods", "sleep-5d8f-x2x4", "team-a")
        identity = await accounts.authenticate(PEER, bearer(TOKEN), NODE)
        assert not identity.oversees("team-a")

    async def test_tokens_of_a_file_are_good_too(self, api: Api, tmp_path: Path, fake: FakeApi) -> None:
        file = tmp_path / "tokens"
        file.write_text(f"team-a/admin {FILE_TOKEN}\n")
        accounts = AccountAuthenticator(api, TokenFile(file), None)
        identity = await accounts.authenticate(PEER, bearer(FILE_TOKEN), NODE)
        assert identity.admit(CLAIM) == CLAIM
        file.write_text("team-a/other another-token-of-a-machine\n")
        with pytest.raises(Unauthenticated, match="not known any more"):
            await accounts.authenticate(PEER, bearer(FILE_TOKEN), NODE, identity)
        assert not fake.requests["POST tokenreviews"]


class TestReviews:
    async def test_an_answer_holds_for_a_while(
        self, accounts: AccountAuthenticator, fake: FakeApi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for _ in range(3):
            await accounts.authenticate(PEER, bearer(TOKEN), NODE)
        assert fake.requests["POST tokenreviews"] == 1
        now = serviceaccounts.time.monotonic()
        monkeypatch.setattr(serviceaccounts.time, "monotonic", lambda: now + 61)
        await accounts.authenticate(PEER, bearer(TOKEN), NODE)
        assert fake.requests["POST tokenreviews"] == 2

    @pytest.mark.parametrize("what", ["tokenreviews", "pods"])
    async def test_without_the_api_server_new_streams_are_refused(
        self, accounts: AccountAuthenticator, fake: FakeApi, what: str
    ) -> None:
        fake.refuse = refusing(what)
        with pytest.raises(AuthenticationUnavailable, match=r"cannot be (checked at the API server|read)"):
            await accounts.authenticate(PEER, bearer(TOKEN), NODE)

    async def test_without_the_api_server_streams_go_on(
        self, accounts: AccountAuthenticator, fake: FakeApi
    ) -> None:
        identity = await accounts.authenticate(PEER, bearer(TOKEN), NODE)
        fake.refuse = refusing("/")
        await fake.cut()
        fake.tokens.clear()
        again = await accounts.authenticate(PEER, bearer(TOKEN), NODE, identity)
        assert again.admit(CLAIM).workload == "sleep"


class TestPods:
    async def test_a_changed_label_is_noticed(self, accounts: AccountAuthenticator, fake: FakeApi) -> None:
        identity = await accounts.authenticate(PEER, bearer(TOKEN), NODE)
        before = accounts.revision()
        await fake.put(POD.replace("app: sleep", "app: awake"))
        await changed(accounts, before)
        again = await accounts.authenticate(PEER, bearer(TOKEN), NODE, identity)
        assert ("app", "awake") in again.admit(CLAIM).labels

    async def test_another_pod_of_the_name_is_not_it(
        self, accounts: AccountAuthenticator, fake: FakeApi
    ) -> None:
        identity = await accounts.authenticate(PEER, bearer(TOKEN), NODE)
        before = accounts.revision()
        await fake.delete("pods", "sleep-5d8f-x2x4", "team-a")
        await fake.put(POD)
        await changed(accounts, before)
        again = await accounts.authenticate(PEER, bearer(TOKEN), NODE, identity)
        with pytest.raises(NodeRejected, match="of the token is gone"):
            again.admit(CLAIM)

    async def test_it_is_watched_while_a_stream_needs_it(
        self, accounts: AccountAuthenticator, fake: FakeApi
    ) -> None:
        one, two = [await accounts.authenticate(PEER, bearer(TOKEN), NODE) for _ in range(2)]
        assert fake.requests["LIST pods"] == 1
        accounts.left(one)
        assert two.admit(CLAIM).workload == "sleep"
        accounts.left(two)
        await accounts.authenticate(PEER, bearer(TOKEN), NODE)
        assert fake.requests["LIST pods"] == 2


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"name": "alone"}, "alone"),
        (
            {
                "name": "sleep-5d8f-x2x4",
                "labels": {"pod-template-hash": "5d8f"},
                "ownerReferences": [{"kind": "ReplicaSet", "name": "sleep-5d8f", "controller": True}],
            },
            "sleep",
        ),
        (
            {
                "name": "nightly-29000000-abcde",
                "ownerReferences": [{"kind": "Job", "name": "nightly-29000000", "controller": True}],
            },
            "nightly",
        ),
        (
            {
                "name": "db-0",
                "ownerReferences": [{"kind": "StatefulSet", "name": "db", "controller": True}],
            },
            "db",
        ),
    ],
)
def test_a_workload_is_called_by_what_made_the_pod(metadata: Mapping[str, Any], name: str) -> None:
    assert workload_name(metadata) == name
