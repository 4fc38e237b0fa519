"""The admin endpoints of ``llmplane serve``; nothing here shows a key."""

from collections.abc import Callable
from typing import Any

from aiohttp import web

from llmplane.address import Address


class AdminServer:
    """GET /healthz (the process runs), /readyz (xDS is served), /debug/status (``llmplane status``)."""

    def __init__(self, status: Callable[[], dict[str, Any]], is_ready: Callable[[], bool]) -> None:
        self._status = status
        self._is_ready = is_ready
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/debug/status", self._debug_status)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)

    async def start(self, address: Address) -> Address:
        """Listen; return the address with the real port. Raises OSError."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, address.host, address.port)
        await site.start()
        return Address(address.host, self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Close all connections."""
        await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        if self._is_ready():
            return web.Response(text="ok\n")
        return web.Response(status=503, text="the sources were not read yet\n")

    async def _debug_status(self, _: web.Request) -> web.Response:
        return web.json_response(self._status())
