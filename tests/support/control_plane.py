"""A control plane in this process, and proxies that are a few lines of gRPC."""

import asyncio
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from llmplane.address import Address
from llmplane.controlplane import ControlPlane
from llmplane.local import free_port
from llmplane.sources.files import FileSource
from llmplane.status import StatusUnavailableError, fetch_status
from tests.xds.client import Delta
from translator.world import MeshSettings
from xds.group import Archive
from xds.server import AGGREGATED

NODE = "sidecar~127.0.0.1~sleep.default~x"


class RunningControlPlane:
    """What a test works with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.admin = Address("127.0.0.1", free_port())
        self.xds = Address("127.0.0.1", free_port())

    async def get(self, path: str) -> str:
        """Return what an admin endpoint answers."""
        return (await asyncio.to_thread(fetch, self.admin, path))[1]

    async def status(self) -> dict[str, Any]:
        """Return what `llmplane status` shows."""
        return await asyncio.to_thread(fetch_status, self.admin)

    async def status_when(self, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Return the status as soon as a condition holds."""
        async with asyncio.timeout(60):
            while not condition(status := await self.status()):  # noqa: ASYNC110 - asked over the network
                await asyncio.sleep(0.01)
        return status

    async def apply(self, *documents: str) -> dict[str, Any]:
        """Write the objects, and return the status with them."""
        before = (await self.status())["revision"]
        new = self.folder / ".new"
        new.write_text("\n---\n".join(documents) or "# none\n")
        new.replace(self.folder / "a.yaml")
        return await self.status_when(lambda status: status["revision"] != before)

    @asynccontextmanager
    async def proxy(self, version: tuple[int, int] = (1, 40)) -> AsyncIterator[Delta]:
        """Connect a proxy that is an Envoy of this version."""
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(str(self.xds), options=options) as channel:
            call = channel.stream_stream(f"/{AGGREGATED}/DeltaAggregatedResources")()
            proxy = Delta(call, NODE, "")
            proxy._node.metadata.update({"NAMESPACE": "default"})
            proxy._node.user_agent_build_version.version.CopyFrom(
                type(proxy._node.user_agent_build_version.version)(
                    major_number=version[0], minor_number=version[1]
                )
            )
            yield proxy
            call.cancel()


@asynccontextmanager
async def running_control_plane(
    folder: Path, archive: Archive | None = None
) -> AsyncIterator[RunningControlPlane]:
    """Run a control plane on the files of a folder."""
    running, stop = RunningControlPlane(folder), asyncio.Event()
    control_plane = ControlPlane(FileSource([folder], {}), MeshSettings(), acknowledged=archive)
    task = asyncio.create_task(control_plane.run(running.xds, running.admin, stop))
    async with asyncio.timeout(60):
        while True:
            try:
                if (await running.status())["revision"]:
                    break
            except StatusUnavailableError:
                await asyncio.sleep(0.01)
    try:
        yield running
    finally:
        stop.set()
        await task


def fetch(address: Address, path: str, **query: str) -> tuple[int, str, str]:
    """Return status, body and content type of an answer."""
    url = f"http://{address}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=60) as answer:
            return answer.status, answer.read().decode(), answer.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers["Content-Type"]
