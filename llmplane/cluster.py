"""The control plane of a Kubernetes cluster: its objects in, their status back."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from llmplane.admission import Admission, admitting
from llmplane.auth import FileAuthenticator
from llmplane.background import running
from llmplane.controlplane import ControlPlane
from llmplane.kubeapi import Api, NoClusterError
from llmplane.kubestatus import StatusWriter
from llmplane.leader import Leader
from llmplane.meshca import MeshCA
from llmplane.serviceaccounts import AccountAuthenticator
from llmplane.sources.kubernetes import KubernetesSource
from llmplane.sources.lastgood import LastGood, state_file
from translator.world import MeshSettings
from xds.server import Authenticator

__all__ = ["NoClusterError", "connected"]

_STATE = Path("/kubernetes")
"""What the state on this machine is called by, as a folder's is by its path."""
_LEASE = "llmplane"


@asynccontextmanager
async def connected(
    context: str | None,
    mesh: MeshSettings,
    make: Callable[..., ControlPlane],
    authenticator_of: Callable[[Api], AccountAuthenticator | FileAuthenticator | None],
    admission: Admission | None,
) -> AsyncIterator[tuple[ControlPlane, Authenticator | None, MeshCA | None]]:
    """Make a control plane of a cluster's objects, and write their status while it runs.

    `make` is ControlPlane with what does not come from the cluster; the authenticator is yielded beside it,
    and with `admission` where its own certificate is. Raises NoClusterError and AddressInUseError.
    """
    api = await Api.connect(context)
    authenticator = authenticator_of(api)
    try:
        source = KubernetesSource(api, mesh, LastGood(state_file("last-good", [_STATE])))
        control_plane = make(
            source, mesh, authenticator=authenticator, acknowledged=source.acknowledged, mesh_file=source.mesh
        )
        source.acknowledged.on_change = control_plane.server.look_again
        leader = Leader(api, api.namespace, _LEASE)
        writer = StatusWriter(
            api, leader, source.entries, control_plane.objects, lambda: bool(control_plane.server.groups())
        )
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(running(writer.run(), source.acknowledged.write()))
            ca = None
            if admission:
                ca = await stack.enter_async_context(admitting(api, leader, admission))
            yield control_plane, authenticator, ca
    finally:
        if isinstance(authenticator, AccountAuthenticator):
            await authenticator.close()
        await api.close()
