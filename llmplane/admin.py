"""The admin endpoints of ``llmplane serve``; nothing here shows a key.

On an address that other machines reach, they speak TLS, and what is below /debug is only for those who may
see what concerns all (`Access`). Health and metrics are for everybody: probes have no credentials.
"""

import asyncio
import inspect
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from aiohttp import web

from llmplane import metrics
from llmplane.address import Address
from llmplane.auth import Identity, ServerCertificate
from llmplane.dump import to_yaml
from llmplane.httpserver import runner_of
from xds.resources import Resource
from xds.server import AuthenticationUnavailable, Authenticator, Node, NodeRejected, Peer, Unauthenticated

_Handler = Callable[[web.Request], Awaitable[web.Response]]
_NOBODY = Node(id="", cluster="", metadata={}, version="")


class Insight(Protocol):
    """What the endpoints show (see there)."""

    def is_ready(self) -> bool:
        """Whether the sources were read."""

    def status(self) -> dict[str, Any]:
        """For /debug/status."""

    def syncz(self) -> dict[str, Any]:
        """For /debug/syncz."""

    def objects(self) -> list[dict[str, Any]]:
        """For /debug/objects."""

    def resources_of(self, node_id: str, /) -> list[Resource] | None:
        """For /debug/config_dump; None if that proxy is not connected."""

    def metrics(self) -> bytes:
        """For /metrics."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may see what is below /debug, by the credentials of the xDS port."""

    certificate: ServerCertificate
    authenticator: Authenticator
    root_namespace: str

    async def check(self, request: web.Request) -> None:
        """Raise HTTPUnauthorized or HTTPForbidden if the sender of a request may not see everything."""
        connection: ssl.SSLObject = request.get_extra_info("ssl_object")
        if connection.context is not self.certificate.context():
            raise web.HTTPUnauthorized(text="this connection is older than the credentials; make a new one\n")
        certificate: dict[str, Any] = connection.getpeercert() or {}
        names = certificate.get("subjectAltName", ())
        peer = Peer(
            request.remote or "",
            tuple(name for kind, name in names if kind == "URI"),
            tuple(name for kind, name in names if kind == "DNS"),
        )
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            identity = await self.authenticator.authenticate(peer, headers, _NOBODY)
        except Unauthenticated as error:
            raise web.HTTPUnauthorized(text=f"{error}\n", headers={"WWW-Authenticate": "Bearer"}) from None
        except AuthenticationUnavailable as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from None
        except NodeRejected as error:
            raise web.HTTPForbidden(text=f"{error}\n") from None
        self.authenticator.left(identity)
        if not (isinstance(identity, Identity) and identity.oversees(self.root_namespace)):
            text = f"these credentials are not for every namespace, nor for {self.root_namespace}\n"
            raise web.HTTPForbidden(text=text)

    def guarded(self, handler: _Handler) -> _Handler:
        """Return a handler that does the same for those who may."""

        async def handle(request: web.Request) -> web.Response:
            await self.check(request)
            return await handler(request)

        return handle


class AdminServer:
    """Serves GET requests; the methods that begin with ``_get`` say what each answers.

    Without `access` everybody may see everything, without TLS.
    """

    def __init__(self, insight: Insight, access: Access | None = None) -> None:
        self._insight = insight
        self._access = access
        self._dumping = asyncio.Lock()
        endpoints: dict[str, _Handler] = {
            "/healthz": self._get_healthz,
            "/readyz": self._get_readyz,
            "/metrics": self._get_metrics,
            "/debug/status": self._get_status,
            "/debug/syncz": self._get_syncz,
            "/debug/config_dump": self._get_config_dump,
            "/debug/objects": self._get_objects,
        }
        self._index = "".join(f"{path}\n{_indented(handler)}\n" for path, handler in endpoints.items())
        app = web.Application()
        for path, handler in {**endpoints, "/debug/": self._get_index, "/debug": self._get_index}.items():
            if access and path.startswith("/debug"):
                handler = access.guarded(handler)  # noqa: PLW2901
            app.router.add_get(path, handler)
        self._runner = runner_of(app)

    async def start(self, address: Address) -> Address:
        """Listen; return the address with the real port. Raises OSError."""
        await self._runner.setup()
        context = self._access.certificate.context() if self._access else None
        site = web.TCPSite(self._runner, address.host, address.port, ssl_context=context)
        await site.start()
        return Address(address.host, self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Close all connections."""
        await self._runner.cleanup()

    # These docstrings are what /debug/ shows.

    async def _get_healthz(self, _: web.Request) -> web.Response:
        """Answer 200: the process runs."""
        return web.Response(text="ok\n")

    async def _get_readyz(self, _: web.Request) -> web.Response:
        """Answer 200 if xDS is served, 503 until the sources were read once."""
        if self._insight.is_ready():
            return web.Response(text="ok\n")
        return web.Response(status=503, text="the sources were not read yet\n")

    async def _get_metrics(self, _: web.Request) -> web.Response:
        """Give metrics to Prometheus: proxies, pushes, refusals, objects, problems."""
        return web.Response(body=self._insight.metrics(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _get_status(self, _: web.Request) -> web.Response:
        """Show what `llmplane status` shows, in JSON.

        time (of this answer; all times are UTC), revision (how often the sources were read), objects as in
        /debug/objects, proxies as in /debug/syncz, problems as texts.
        """
        return web.json_response(self._insight.status())

    async def _get_syncz(self, _: web.Request) -> web.Response:
        """Show what each connected proxy was sent, acknowledged and refused, in JSON.

        node_id, version (of Envoy), peer, variant (delta or sotw), connected_since, state, and types: for
        each resource type state and since when; version (that it should have), sent and acknowledged
        version; nonce_sent and nonce_acknowledged; unanswered (how many responses); subscribed (to how many
        names, null: all); refused (names of what it refuses now); error (its last refusal, perhaps settled
        since: detail in Envoy's words, names in the refused response, since). The states are SYNCED, STALE
        (an answer is awaited, or something waits to be sent) and NACK (it keeps what it had).
        """
        return web.json_response(self._insight.syncz())

    async def _get_config_dump(self, request: web.Request) -> web.Response:
        """Show the resources of one proxy (?proxy=<node_id>) as YAML, keys redacted.

        They are what it should have; in place of what is in quarantine, the version that was accepted last.
        The name that `llmplane status` shows is enough.
        """
        node_id = request.query.get("proxy", "")
        resources = self._insight.resources_of(node_id)
        if resources is None:
            why = "this proxy is not connected" if node_id else "say which proxy: ?proxy=<node_id>"
            return web.Response(status=404 if node_id else 400, text=f"{why} (/debug/syncz has them)\n")
        async with self._dumping:  # thousands of resources take a while
            text = await asyncio.to_thread(to_yaml, resources)
        return web.Response(text=text, content_type="application/yaml")

    async def _get_objects(self, _: web.Request) -> web.Response:
        """Show the objects with their conditions, in JSON.

        kind, namespace, name, host, source (file and line), state, programmed (how many of the proxies that
        it is for have acknowledged it), and conditions: type, status, reason and message as in Kubernetes.
        """
        return web.json_response(self._insight.objects())

    async def _get_index(self, _: web.Request) -> web.Response:
        return web.Response(text=self._index)


def _indented(handler: Callable[..., Any]) -> str:
    return "".join(f"    {line}\n" for line in (inspect.getdoc(handler) or "").splitlines() if line)
