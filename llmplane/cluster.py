"""The control plane of a Kubernetes cluster: its objects in, their status back."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from llmplane.acknowledged import AcknowledgedFile
from llmplane.controlplane import ControlPlane
from llmplane.kubeapi import Api, NoClusterError
from llmplane.kubestatus import StatusWriter
from llmplane.leader import Leader
from llmplane.sources.kubernetes import KubernetesSource
from llmplane.sources.lastgood import LastGood, state_file
from translator.world import MeshSettings

__all__ = ["NoClusterError", "connected"]

_STATE = Path("/kubernetes")
"""What the state on this machine is called by, as a folder's is by its path."""
_LEASE = "llmplane"


@asynccontextmanager
async def connected(
    context: str | None, mesh: MeshSettings, make: Callable[..., ControlPlane]
) -> AsyncIterator[ControlPlane]:
    """Make a control plane of a cluster's objects, and write their status while it runs.

    `make` is ControlPlane with what does not come from the cluster. Raises NoClusterError.
    """
    api = await Api.connect(context)
    try:
        source = KubernetesSource(api, mesh, LastGood(state_file("last-good", [_STATE])))
        acknowledged = AcknowledgedFile(state_file("acknowledged", [_STATE]))
        control_plane = make(source, mesh, acknowledged=acknowledged, mesh_file=source.mesh)
        leader = Leader(api, api.namespace, _LEASE)
        writer = StatusWriter(api, leader, source.entries, control_plane.objects)
        task = asyncio.create_task(writer.run())
        try:
            yield control_plane
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    finally:
        await api.close()
