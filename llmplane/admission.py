"""What a control plane needs to be asked by the API server: a certificate, the webhooks, and its trust."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from llmplane.address import Address
from llmplane.auth import ServerCertificate
from llmplane.background import running
from llmplane.injection import InjectionSettings
from llmplane.kubeapi import Api
from llmplane.leader import Leader
from llmplane.meshca import MeshCA
from llmplane.webhook import WebhookServer, keep_trusted


class Admission(NamedTuple):
    """Where the API server asks, and what injected proxies are."""

    address: Address
    image: str
    xds_port: int


@asynccontextmanager
async def admitting(api: Api, leader: Leader, admission: Admission) -> AsyncIterator[MeshCA]:
    """Serve the webhooks; the certificate of what is yielded is for the xDS port too.

    Both are the Service `llmplane` of the control plane's own namespace. Raises AddressInUseError.
    """
    service = f"llmplane.{api.namespace}.svc"
    names = (service, f"{service}.cluster.local", "localhost", "127.0.0.1")
    with TemporaryDirectory(prefix="llmplane-") as directory:
        ca = MeshCA(api, Path(directory), names)
        await ca.start()
        xds = Address(service, admission.xds_port)
        server = WebhookServer(
            ServerCertificate(ca.certificate, ca.key, None),
            lambda: InjectionSettings(admission.image, xds, ca.bundle),
        )
        try:
            await server.start(admission.address)
            async with running(ca.run(), keep_trusted(api, leader, lambda: ca.bundle)):
                yield ca
        finally:
            await server.stop()
