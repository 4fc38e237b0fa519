"""Proxies prove by the token of their Pod's ServiceAccount who they are (Kubernetes' TokenReview).

The kubelet makes the token, for the audience `llmplane`, and renews it (a projected volume). The API server
says whose it is: namespace, ServiceAccount and Pod. What the workload is called and which labels it has is
read from the Pod; what the node message says of that does not count.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from llmplane.auth import ClientCA, Grant, Identity, TokenFile, bearer_token, certificate_proof
from llmplane.kubeapi import Api, ApiError
from llmplane.pods import PodName, Pods, PodUnknownError
from translator.proxy import Proxy
from xds.server import AuthenticationUnavailable, Node, NodeRejected, Peer, Unauthenticated

AUDIENCE = "llmplane"
"""Of the tokens; one for the API server itself is refused."""
_PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
_USER = "system:serviceaccount:"
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"
_GOOD_FOR = 60.0
"""Seconds for which an answer of the API server holds for further streams."""
_BAD_FOR = 5.0
"""The same for a refusal: an Envoy that is refused asks again and again."""
_MOST = 10_000
"""Answers that are remembered."""
_AT_ONCE = 20
"""Reviews that the API server is asked for at the same time."""
_LONGEST = 16_384
"""Characters of a token."""


class _Account(NamedTuple):
    """Whose token it is."""

    namespace: str
    name: str
    pod: PodName | None


@dataclass(frozen=True, slots=True)
class AccountIdentity(Identity):
    """A ServiceAccount; a proxy only if its token is bound to a Pod, and then just that Pod's."""

    account: _Account
    pods: Pods

    def admit(self, proxy: Proxy) -> Proxy:
        """Return the proxy with name and labels of its Pod. Raises NodeRejected."""
        pod = self.account.pod
        if pod is None:
            raise NodeRejected(
                f"the token of ServiceAccount {self.account.namespace}/{self.account.name} is not bound to a "
                "Pod: a proxy needs one of a projected volume",
                forbidden=True,
            )
        workload = self.pods.workload(pod)
        if workload is None:
            raise NodeRejected(f"{pod} ({pod.uid}) of the token is gone", forbidden=True)
        own = replace(proxy, workload=workload.name, labels=workload.labels)
        return Identity.admit(self, own)


class AccountAuthenticator:
    """Authenticates peers by the token of a ServiceAccount, or of a file (an xds.server.Authenticator).

    With a `client_ca` they need a certificate besides.
    """

    def __init__(self, api: Api, tokens: TokenFile | None, client_ca: ClientCA | None) -> None:
        self._pods = Pods(api)
        self._reviews = _Reviews(api)
        self._tokens = tokens
        self._client_ca = client_ca

    def revision(self) -> tuple[int, ...]:
        """Return how often files and Pods changed."""
        return (*(of.revision() for of in (self._tokens, self._client_ca) if of), self._pods.revision)

    async def authenticate(
        self, peer: Peer, metadata: Mapping[str, str | bytes], _: Node, known: object = None
    ) -> Identity:
        """Return who the peer proves to be.

        A stream that was let in stays the one of its token, whatever the API server says of that later: a
        token is for the beginning, and the Pod is watched. Raises Unauthenticated, and
        AuthenticationUnavailable where the API server cannot be asked.
        """
        proofs = (certificate_proof(peer, self._client_ca, known),) if self._client_ca else ()
        authorization = metadata.get("authorization", "")
        grant = self._tokens.grant(authorization) if self._tokens else None
        if grant is not None:
            return Identity((*proofs, (grant,)))
        if isinstance(known, AccountIdentity):
            account = known.account
        elif known is not None:
            raise Unauthenticated("the bearer token is not known any more")
        else:
            account = await self._reviews.account(bearer_token(authorization))
            if account.pod:
                try:
                    await self._pods.hold(account.pod)
                except PodUnknownError as error:
                    raise AuthenticationUnavailable(f"{account.pod} cannot be read: {error}") from None
        workload = ""
        if account.pod:  # one that is gone is no proxy, and nothing more than one
            found = self._pods.workload(account.pod)
            workload = found.name if found else account.pod.name
        grant = Grant(account.namespace, workload)
        return AccountIdentity((*proofs, (grant,)), account, self._pods)

    def left(self, identity: object) -> None:
        """Let go of the Pod of a stream."""
        if isinstance(identity, AccountIdentity) and identity.account.pod:
            self._pods.release(identity.account.pod)

    async def close(self) -> None:
        """End all watches."""
        await self._pods.close()


class _Reviews:
    """The API server's answers, remembered for a while by the digests of their tokens."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._known: OrderedDict[bytes, tuple[float, _Account | str]] = OrderedDict()
        """When it is too old, and the answer: an account, or why it is refused."""
        self._asking = asyncio.Semaphore(_AT_ONCE)

    async def account(self, token: str) -> _Account:
        """Return whose token it is. Raises Unauthenticated and AuthenticationUnavailable."""
        if token.count(".") != 2 or len(token) > _LONGEST:  # noqa: PLR2004 - a JWT has three parts
            raise Unauthenticated(
                f"a bearer token is required: that of a ServiceAccount, for the audience {AUDIENCE}"
            )
        digest = hashlib.sha256(token.encode()).digest()
        until, answer = self._known.get(digest, (0.0, ""))
        if time.monotonic() >= until:
            async with self._asking:
                answer = await self._review(token)
            self._known[digest] = (
                time.monotonic() + (_BAD_FOR if isinstance(answer, str) else _GOOD_FOR),
                answer,
            )
            self._known.move_to_end(digest)
            if len(self._known) > _MOST:
                self._known.popitem(last=False)
        if isinstance(answer, str):
            raise Unauthenticated(f"the bearer token is refused: {answer}")
        return answer

    async def _review(self, token: str) -> _Account | str:
        review = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [AUDIENCE]},
        }
        try:
            status: Mapping[str, Any] = (await self._api.post(_PATH, review))["status"]
        except ApiError as error:
            raise AuthenticationUnavailable(f"tokens cannot be checked at the API server: {error}") from None
        if not status.get("authenticated"):
            return str(status.get("error") or "the API server does not know it")
        if AUDIENCE not in (status.get("audiences") or ()):
            return f"it is not for the audience {AUDIENCE}"
        user = status["user"]
        namespace, _, name = user["username"].removeprefix(_USER).partition(":")
        if not user["username"].startswith(_USER) or not name:
            return "it is not of a ServiceAccount"
        extra = user.get("extra") or {}
        pod, uid = (next(iter(extra.get(key) or ()), "") for key in (_POD_NAME, _POD_UID))
        return _Account(namespace, name, PodName(namespace, pod, uid) if pod and uid else None)
