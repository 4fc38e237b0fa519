"""``llmplane serve``: the control plane."""

import asyncio
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import structlog

from crds.placeholders import variables
from llmplane.acknowledged import AcknowledgedFile
from llmplane.address import Address, AddressInUseError
from llmplane.admin import Access
from llmplane.auth import ClientCA, CredentialsError, FileAuthenticator, ServerCertificate, TokenFile
from llmplane.controlplane import ControlPlane
from llmplane.mesh import MeshConfigFile, mesh_settings
from llmplane.options import EXISTING, EXISTING_FILE, MESH, PROXY_IMAGE, SET, AddressType, ConnectTo, Pairs
from llmplane.process import allow_many_files, log_to_stderr, stopped_by_signal
from llmplane.sources.files import FileSource
from llmplane.sources.lastgood import LastGood, NoStateDirectoryError, state_file
from translator.world import MeshSettings
from xds.server import Authenticator

_LOG = structlog.get_logger(__name__)


@click.command("serve", short_help="Serve objects from files or from Kubernetes to Envoys, live.")
@click.option(
    "--config",
    "paths",
    multiple=True,
    type=EXISTING,
    metavar="PATH",
    help="Folder with objects in YAML or JSON files (or one such file); read again when it changes. May be "
    "given several times.",
)
@click.option(
    "--kubernetes",
    is_flag=True,
    help="Serve the objects of a cluster instead: of the one that this pod runs in, or that kubectl uses. "
    "The mesh configuration is then the ConfigMap istio of istio-system, and Envoys show the token of their "
    "Pod's ServiceAccount (audience llmplane).",
)
@click.option("--context", metavar="NAME", help="The context of kubectl's configuration, for --kubernetes.")
@click.option(
    "--xds-address",
    type=AddressType(),
    default="127.0.0.1:18000",
    show_default=True,
    help="Where Envoys connect to.",
)
@click.option(
    "--admin-address",
    type=AddressType(),
    default="127.0.0.1:18080",
    show_default=True,
    help="Where `llmplane status` asks, and /healthz, /readyz and /metrics answer. If other machines reach "
    "it, that is over TLS, and `llmplane status` needs credentials.",
)
@click.option(
    "--xds-cert-file",
    type=EXISTING_FILE,
    metavar="FILE",
    help="Serve Envoys over TLS, with this certificate chain (PEM). This file and those below are read again "
    "when they change.",
)
@click.option("--xds-key-file", type=EXISTING_FILE, metavar="FILE", help="Key of --xds-cert-file (PEM).")
@click.option(
    "--xds-client-ca-file",
    type=EXISTING_FILE,
    metavar="FILE",
    help="Mutual TLS: only Envoys with a certificate of this CA (PEM) are served, and each only as the "
    "namespace that is in it, as spiffe://DOMAIN/ns/NAMESPACE/sa/NAME or as the DNS name WORKLOAD.NAMESPACE.",
)
@click.option(
    "--xds-token-file",
    type=EXISTING_FILE,
    metavar="FILE",
    help="Only Envoys with a token of this file are served. It holds one token for all, or lines "
    "NAMESPACE[/WORKLOAD] [LABEL=VALUE ...] TOKEN. Needs TLS, or loopback. With --kubernetes they are served "
    "besides those with the token of their Pod's ServiceAccount.",
)
@click.option(
    "--webhook-address",
    type=AddressType(),
    help="With --kubernetes: where the API server asks whether objects are valid, and what to put into pods. "
    "The certificate of this and of --xds-address is then one of llmplane's own CA (Secret llmplane-ca).",
)
@PROXY_IMAGE
@click.option(
    "--insecure",
    is_flag=True,
    help="Allow addresses that other machines reach without authentication, and with --kubernetes ask for no "
    "token: whoever connects to --xds-address gets the API keys.",
)
@click.option(
    "--validate-resources/--no-validate-resources",
    default=True,
    show_default=True,
    help="Hold back what Envoy 1.40's API rules forbid, since one such resource makes Envoy refuse all that "
    "come with it. Only an Envoy with other rules needs it off.",
)
@MESH
@SET
def serve_command(
    *,
    paths: tuple[Path, ...],
    kubernetes: bool,
    context: str | None,
    xds_address: Address,
    admin_address: Address,
    xds_cert_file: Path | None,
    xds_key_file: Path | None,
    xds_client_ca_file: Path | None,
    xds_token_file: Path | None,
    webhook_address: Address | None,
    proxy_image: str,
    insecure: bool,
    validate_resources: bool,
    mesh_config: Path | None,
    connect_to: ConnectTo,
    ca_file: Path | None,
    settings: Pairs,
) -> None:
    """Serve the objects below --config, or those of a cluster, to Envoys, and keep them up to date.

    A file that cannot be read, or an object with a mistake, changes nothing: its last good version stays in
    use, also over a restart (without keys, it is kept below $XDG_STATE_HOME or ~/.local/state), and the log
    and `llmplane status` say so.
    """
    for_cluster = {"--context": context, "--webhook-address": webhook_address}
    _check_source(paths, kubernetes=kubernetes, for_cluster=for_cluster, for_files=mesh_config or settings)
    by_account = kubernetes and not insecure
    _check_access(
        xds_address,
        xds_cert_file=xds_cert_file,
        xds_key_file=xds_key_file,
        xds_client_ca_file=xds_client_ca_file,
        xds_token_file=xds_token_file,
        webhook_address=webhook_address,
        by_account=by_account,
        insecure=insecure,
    )
    guarded = not (admin_address.is_loopback or insecure)
    has_certificate = xds_cert_file or webhook_address
    if guarded and not (has_certificate and (xds_client_ca_file or xds_token_file or by_account)):
        raise click.UsageError(
            f"--admin-address {admin_address}: other machines reach it, and it tells objects and proxies; "
            "give --xds-cert-file with --xds-client-ca-file or --xds-token-file, or --insecure if only "
            "trusted ones can"
        )
    log_to_stderr()
    allow_many_files()
    if insecure:
        asks_for_nothing = [admin_address, *([] if xds_client_ca_file or xds_token_file else [xds_address])]
        if found := [str(address) for address in asks_for_nothing if not address.is_loopback]:
            _LOG.warning("insecure: whoever reaches an address is asked for nothing", addresses=found)
    mesh = mesh_settings(None, connect_to, ca_file)
    mesh_file = MeshConfigFile(mesh_config, mesh) if mesh_config else None
    mesh = mesh_file.settings if mesh_file else mesh
    try:
        certificate = None
        if xds_cert_file and xds_key_file:
            certificate = ServerCertificate(xds_cert_file, xds_key_file, xds_client_ca_file)
        tokens = TokenFile(xds_token_file) if xds_token_file else None
        client_ca = ClientCA(xds_client_ca_file) if xds_client_ca_file else None
        files = FileAuthenticator(tokens, client_ca) if tokens or client_ca else None
        where = _Where(xds_address, admin_address, certificate, mesh.config.root_namespace if guarded else "")
        make = partial(ControlPlane, validate_resources=validate_resources)
        if kubernetes:
            accounts = (tokens, client_ca) if by_account else None
            asyncio.run(
                _serve_cluster(
                    context,
                    mesh,
                    make,
                    files=files,
                    accounts=accounts,
                    where=where,
                    webhook=webhook_address,
                    proxy_image=proxy_image,
                    client_ca_file=xds_client_ca_file,
                )
            )
            return
        source = FileSource(
            paths, variables(os.environ, dict(settings)), LastGood(state_file("last-good", paths))
        )
        acknowledged = AcknowledgedFile(state_file("acknowledged", paths))
        control_plane = make(
            source, mesh, authenticator=files, acknowledged=acknowledged, mesh_file=mesh_file
        )
        asyncio.run(_serve(control_plane, files, where))
    except (
        AddressInUseError,
        CredentialsError,
        NoStateDirectoryError,
        OSError,
    ) as error:  # OSError: no more files can be watched
        raise click.ClickException(str(error)) from None


def _check_source(
    paths: tuple[Path, ...], *, kubernetes: bool, for_cluster: Mapping[str, object], for_files: object
) -> None:
    if kubernetes == bool(paths):
        raise click.UsageError("give --config PATH, for objects in files, or --kubernetes")
    for option, value in for_cluster.items():
        if value and not kubernetes:
            raise click.UsageError(f"{option} needs --kubernetes")
    if kubernetes and for_files:
        raise click.UsageError(
            "--mesh-config and --set are for files: with --kubernetes, the mesh configuration is a "
            "ConfigMap, and keys are in Secrets"
        )


def _check_access(
    xds_address: Address,
    *,
    xds_cert_file: Path | None,
    xds_key_file: Path | None,
    xds_client_ca_file: Path | None,
    xds_token_file: Path | None,
    webhook_address: Address | None,
    by_account: bool,
    insecure: bool,
) -> None:
    if (xds_cert_file is None) != (xds_key_file is None):
        raise click.UsageError("--xds-cert-file and --xds-key-file belong together")
    if webhook_address and xds_cert_file:
        raise click.UsageError("--webhook-address has a certificate made: give no --xds-cert-file")
    has_certificate = xds_cert_file or webhook_address
    if xds_client_ca_file and not has_certificate:
        raise click.UsageError("--xds-client-ca-file needs --xds-cert-file: it is for mutual TLS")
    if xds_token_file and not has_certificate and not xds_address.is_loopback:
        raise click.UsageError("--xds-token-file needs --xds-cert-file: tokens travel in clear without TLS")
    if by_account and not has_certificate and not xds_address.is_loopback:
        raise click.UsageError("--kubernetes needs --xds-cert-file: tokens travel in clear without TLS")
    if not (xds_address.is_loopback or xds_client_ca_file or xds_token_file or by_account or insecure):
        raise click.UsageError(
            f"--xds-address {xds_address}: other machines reach it, and xDS carries API keys without "
            "authentication; give --xds-client-ca-file or --xds-token-file, or --insecure if only trusted "
            "ones can"
        )


class _Where(NamedTuple):
    """Where is listened, and with what."""

    xds: Address
    admin: Address
    certificate: ServerCertificate | None
    root_namespace: str
    """Whose credentials see all at the admin address; empty if everybody's do."""


async def _serve_cluster(
    context: str | None,
    mesh: MeshSettings,
    make: Callable[..., ControlPlane],
    *,
    files: FileAuthenticator | None,
    accounts: tuple[TokenFile | None, ClientCA | None] | None,
    where: _Where,
    webhook: Address | None,
    proxy_image: str,
    client_ca_file: Path | None,
) -> None:
    # Kubernetes' client takes half a second to import.
    from llmplane.admission import Admission  # noqa: PLC0415
    from llmplane.cluster import NoClusterError, connected  # noqa: PLC0415
    from llmplane.serviceaccounts import AccountAuthenticator  # noqa: PLC0415

    admission = Admission(webhook, proxy_image, where.xds.port) if webhook else None
    try:
        async with connected(
            context,
            mesh,
            make,
            lambda api: AccountAuthenticator(api, *accounts) if accounts else files,
            admission,
        ) as (control_plane, authenticator, ca):
            if ca is not None:
                certificate = ServerCertificate(ca.certificate, ca.key, client_ca_file)
                where = where._replace(certificate=certificate)
            await _serve(control_plane, authenticator, where)
    except NoClusterError as error:
        raise click.ClickException(str(error)) from None


async def _serve(control_plane: ControlPlane, authenticator: Authenticator | None, where: _Where) -> None:
    access = None
    if where.certificate and authenticator and where.root_namespace:
        access = Access(where.certificate, authenticator, where.root_namespace)
    credentials = where.certificate.credentials() if where.certificate else None
    await control_plane.run(where.xds, where.admin, stopped_by_signal(), credentials, access)
