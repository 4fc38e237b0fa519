"""The command line: what each command takes, and where it is done."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

import click
import structlog
import yaml

from crds.placeholders import variables
from crds.problems import Severity
from crds.values import KubernetesName, Namespace
from llmplane import __version__, fakellm, offline, ratelimit
from llmplane.acknowledged import AcknowledgedFile
from llmplane.address import Address, AddressInUseError
from llmplane.admin import Access
from llmplane.auth import (
    ClientCA,
    CredentialsError,
    FileAuthenticator,
    ServerCertificate,
    TokenFile,
    check_files,
)
from llmplane.bootstrap import STATS_PORT, ProxySettings, XdsCredentials, bootstrap
from llmplane.controlplane import ControlPlane
from llmplane.counters import MemoryCounters, RedisCounters
from llmplane.demo import run_demo
from llmplane.envoy import EnvoyNotFoundError, find_envoy, lay_down, runtime_directory
from llmplane.mesh import MeshConfigFile, mesh_settings
from llmplane.options import AddressType, ConnectToType, IPAddressType, NameType, PairType
from llmplane.prices import PricesError, prometheus_rules, read_prices
from llmplane.sources.files import FileSource
from llmplane.sources.lastgood import LastGood, NoStateDirectoryError, state_file
from llmplane.status import StatusUnavailableError, fetch_status, format_status
from llmplane.top import watch
from translator.proxy import Proxy, ProxyType, WorkloadCertificate
from translator.world import MeshSettings
from xds.server import Authenticator

_F = TypeVar("_F", bound=Callable[..., Any])
_Pairs = tuple[tuple[str, str], ...]
_ConnectTo = tuple[tuple[Address, Address], ...]

_EXISTING = click.Path(exists=True, path_type=Path)
_EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)
_LOG_FLUSH = "--file-flush-interval-msec"
_SOME_CERTIFICATE = WorkloadCertificate(
    *(f"/etc/certs/{name}.pem" for name in ("cert-chain", "key", "root-cert"))
)
"""Where Istio has it; `translate` knows of no real one."""
_PROXY_TYPES = {"sidecar": ProxyType.SIDECAR, "gateway": ProxyType.ROUTER}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Run stock Envoy as a sidecar and gateway for LLM traffic.

    Objects that say which LLM providers there are (LLMProvider) and which requests go to which one (LLMRoute)
    become Envoy's configuration, and stay it while they change. `llmplane demo` shows it on this machine.

    On your own: write objects into a folder, check them with `llmplane validate`, start `llmplane serve` and
    beside it `llmplane proxy sidecar`, and look at `llmplane status`.
    """


def _options(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    def apply(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


_SET = click.option(
    "--set",
    "settings",
    type=PairType(),
    multiple=True,
    help="Fill the placeholder ${NAME} of an apiKey. What is not set here comes from the environment: "
    "${ API_KEY of dashscope} from the variable API_KEY_OF_DASHSCOPE. May be given several times.",
)
_MESH_CONFIG = click.option(
    "--mesh-config",
    type=_EXISTING_FILE,
    metavar="FILE",
    help="Istio's mesh configuration (MeshConfig in YAML): access logs, extensionProviders, rootNamespace, "
    "trustDomain ... Read again by `llmplane serve` when it changes.",
)
_MESH = _options(
    _MESH_CONFIG,
    click.option(
        "--connect-to",
        type=ConnectToType(),
        multiple=True,
        help="Have Envoy reach the provider HOST:PORT at ADDR:PORT, as with curl's option of this name; the "
        "certificate must still be HOST's. May be given several times.",
    ),
    click.option(
        "--ca-file",
        type=_EXISTING_FILE,
        metavar="FILE",
        help="Trust the CA certificates of this PEM file too, for providers that no public CA knows.",
    ),
)
_WORKLOAD = _options(
    click.option(
        "--namespace",
        type=NameType(Namespace),
        default="default",
        show_default=True,
        help="The workload's namespace: it gets the objects of this one, and of the root namespace.",
    ),
    click.option(
        "--label",
        "labels",
        type=PairType(),
        multiple=True,
        help="A label of the workload, for workloadSelector and sourceLabels. May be given several times.",
    ),
)
_CREDENTIALS = _options(
    click.option(
        "--xds-ca-file",
        type=_FILE,
        metavar="FILE",
        help="Speak TLS with `llmplane serve`; its certificate must be of this CA (PEM) and for the host of "
        "its address.",
    ),
    click.option(
        "--xds-client-cert-file",
        type=_FILE,
        metavar="FILE",
        help="Mutual TLS: one's own certificate chain (PEM).",
    ),
    click.option(
        "--xds-client-key-file", type=_FILE, metavar="FILE", help="Key of --xds-client-cert-file (PEM)."
    ),
    click.option(
        "--xds-token-file",
        type=_FILE,
        metavar="FILE",
        help="Show `llmplane serve` the token that this file holds. Needs --xds-ca-file, or loopback.",
    ),
)
_PROXY_IMAGE = click.option(
    "--proxy-image",
    default=f"llmplane-proxy:{__version__}",
    show_default=True,
    metavar="IMAGE",
    help="The image of injected proxies (deploy/image).",
)
_PROXY = _options(
    click.argument("kind", metavar="(sidecar|gateway)", type=click.Choice(list(_PROXY_TYPES))),
    click.option(
        "--xds-address",
        type=AddressType(),
        default="127.0.0.1:18000",
        show_default=True,
        help="Where `llmplane serve` is.",
    ),
    _CREDENTIALS,
    click.option(
        "--workload-cert",
        type=_FILE,
        metavar="FILE",
        help="The workload's certificate chain (PEM), for mutual TLS between sidecars and gateways; it names "
        "the workload as spiffe://DOMAIN/ns/NAMESPACE/sa/NAME. Envoy alone reads this file and those below, "
        "and again when they change.",
    ),
    click.option("--workload-key", type=_FILE, metavar="FILE", help="Key of --workload-cert (PEM)."),
    click.option(
        "--workload-ca", type=_FILE, metavar="FILE", help="The CAs of the mesh's workload certificates (PEM)."
    ),
    click.option(
        "--workload",
        type=NameType(KubernetesName),
        required=True,
        help="Name of the workload that this Envoy is for, e.g. its Deployment's.",
    ),
    _WORKLOAD,
    click.option(
        "--bind-address",
        type=IPAddressType(),
        default="127.0.0.1",
        show_default=True,
        help="Where this Envoy listens; with 127.0.0.2, 127.0.0.3 ... several run on one machine.",
    ),
    click.option(
        "--status-address",
        type=IPAddressType(),
        help="Where its metrics (port 15090) and its health (15021) are asked for, if not at --bind-address; "
        "0.0.0.0 for a Prometheus elsewhere.",
    ),
    click.option(
        "--capture",
        is_flag=True,
        help="Take what iptables redirects to port 15001 (a sidecar's deploy/image/capture.sh): applications "
        "need no proxy setting then.",
    ),
    click.option(
        "--capture-dns",
        is_flag=True,
        help="Take DNS queries too, on port 15053 (DNS_CAPTURE=true of capture.sh), for names that have no "
        "address. With --capture.",
    ),
    click.option(
        "--admin-port",
        type=click.IntRange(1, 65535),
        help="Open Envoy's admin interface on this port of 127.0.0.1. Without it, it is a Unix socket that "
        "only this user can open.",
    ),
)


@main.command("serve", short_help="Serve objects from files or from Kubernetes to Envoys, live.")
@click.option(
    "--config",
    "paths",
    multiple=True,
    type=_EXISTING,
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
    type=_EXISTING_FILE,
    metavar="FILE",
    help="Serve Envoys over TLS, with this certificate chain (PEM). This file and those below are read again "
    "when they change.",
)
@click.option("--xds-key-file", type=_EXISTING_FILE, metavar="FILE", help="Key of --xds-cert-file (PEM).")
@click.option(
    "--xds-client-ca-file",
    type=_EXISTING_FILE,
    metavar="FILE",
    help="Mutual TLS: only Envoys with a certificate of this CA (PEM) are served, and each only as the "
    "namespace that is in it, as spiffe://DOMAIN/ns/NAMESPACE/sa/NAME or as the DNS name WORKLOAD.NAMESPACE.",
)
@click.option(
    "--xds-token-file",
    type=_EXISTING_FILE,
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
@_PROXY_IMAGE
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
@_MESH
@_SET
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
    connect_to: _ConnectTo,
    ca_file: Path | None,
    settings: _Pairs,
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
    _log_to_stderr()
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


def _log_to_stderr() -> None:
    """Log for people at a terminal, else as JSON, one line an event."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
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
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    access = None
    if where.certificate and authenticator and where.root_namespace:
        access = Access(where.certificate, authenticator, where.root_namespace)
    credentials = where.certificate.credentials() if where.certificate else None
    await control_plane.run(where.xds, where.admin, stop, credentials, access)


@main.command("proxy", short_help="Run an Envoy that `llmplane serve` configures.")
@_PROXY
@click.argument("envoy_args", metavar="[-- ENVOY_ARGS...]", nargs=-1, type=click.UNPROCESSED)
def proxy_command(kind: str, envoy_args: tuple[str, ...], **settings: Any) -> None:
    """Run an Envoy as sidecar or gateway, configured by `llmplane serve`.

    This process becomes Envoy, and what follows `--` are options of Envoy's own. Besides what `serve`
    configures (a sidecar's HTTP proxy on port 15080), it answers GET /stats/prometheus on port 15090 and
    GET /healthz/ready on port 15021.
    """
    name = f"{settings['workload']}.{settings['namespace']}-{settings['bind_address']}"
    try:
        envoy = find_envoy()
        directory = runtime_directory(name)
        proxy = _proxy_settings(kind, directory / "admin.sock", settings)
        check_files(proxy.credentials, proxy.certificate)
        file = lay_down(proxy, directory)
    except (EnvoyNotFoundError, CredentialsError, OSError) as error:
        raise click.ClickException(str(error)) from None
    arguments = [str(envoy), "-c", str(file), "--use-dynamic-base-id", *envoy_args]
    if not any(argument.startswith(_LOG_FLUSH) for argument in envoy_args):
        arguments += [_LOG_FLUSH, "1000"]  # as Istio; Envoy keeps lines of access logs for ten seconds
    sys.stderr.flush()
    os.execv(envoy, arguments)  # noqa: S606 - becomes Envoy: signals and the exit code are its own


@main.command("bootstrap", short_help="Print the configuration that `proxy` starts Envoy with.")
@_PROXY
def bootstrap_command(kind: str, **settings: Any) -> None:
    """Print the configuration that `llmplane proxy` starts Envoy with, as JSON.

    For an Envoy that runs elsewhere, e.g. in a container: envoy -c bootstrap.json
    """
    socket = Path("/tmp/llmplane-admin.sock")  # noqa: S108 - on the machine where Envoy will run
    click.echo(json.dumps(bootstrap(_proxy_settings(kind, socket, settings)), indent=2))


@main.command("inject", short_help="Put sidecars into the pods of Kubernetes files.")
@click.option(
    "-f",
    "--filename",
    type=click.File(encoding="utf-8"),
    required=True,
    metavar="FILE",
    help="YAML with Deployments, StatefulSets, Jobs, Pods ...; `-` is standard input.",
)
@click.option(
    "--xds-address",
    type=AddressType(),
    default="llmplane.llmplane-system.svc:18000",
    show_default=True,
    help="Where the control plane is, as seen from the pods.",
)
@click.option(
    "--xds-ca-file",
    type=_EXISTING_FILE,
    required=True,
    metavar="FILE",
    help="The CAs that its certificate is of (PEM). Those of a cluster: kubectl get "
    "mutatingwebhookconfiguration llmplane -o jsonpath='{.webhooks[0].clientConfig.caBundle}' | base64 -d",
)
@_PROXY_IMAGE
def inject_command(filename: TextIO, xds_address: Address, xds_ca_file: Path, proxy_image: str) -> None:
    """Print FILE with a sidecar in each of its pods, as the webhook would make it.

    What is no pod, has a sidecar already, or says `sidecar.istio.io/inject: "false"` stays as it is.
    """
    # It imports Kubernetes' client, which takes half a second.
    from llmplane.injection import InjectionError, InjectionSettings, inject_documents  # noqa: PLC0415

    try:
        settings = InjectionSettings(proxy_image, xds_address, xds_ca_file.read_text(encoding="utf-8"))
        click.echo(inject_documents(filename.read(), settings), nl=False)
    except (InjectionError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise click.ClickException(f"{filename.name}: {error}") from None


@main.command("translate", short_help="Print the Envoy configuration that files mean.")
@click.argument("files", nargs=-1, required=True, type=_EXISTING)
@click.option(
    "--proxy",
    "kind",
    type=click.Choice(list(_PROXY_TYPES)),
    default="sidecar",
    show_default=True,
    help="For which kind of Envoy.",
)
@_WORKLOAD
@_MESH
@_SET
def translate_command(
    *,
    files: tuple[Path, ...],
    kind: str,
    namespace: str,
    labels: _Pairs,
    mesh_config: Path | None,
    connect_to: _ConnectTo,
    ca_file: Path | None,
    settings: _Pairs,
) -> None:
    """Print the Envoy configuration that a proxy would get from FILES (or folders), without any server.

    Keys are not shown. Problems go to standard error; exits with 1 if one of them is an error.
    """
    found = frozenset(dict(labels).items())
    proxy = Proxy(_PROXY_TYPES[kind], namespace, "", found, certificate=_SOME_CERTIFICATE)
    mesh = mesh_settings(mesh_config, connect_to, ca_file)
    text, problems = offline.translate(files, proxy, mesh, variables(os.environ, dict(settings)))
    for problem in problems:
        click.echo(str(problem), err=True)
    click.echo(text, nl=False)
    if any(problem.severity is Severity.ERROR for problem in problems):
        sys.exit(1)


@main.command("validate", short_help="Check files, and name every problem with its place.")
@click.argument("files", nargs=-1, required=True, type=_EXISTING)
@_MESH_CONFIG
@_SET
def validate_command(*, files: tuple[Path, ...], mesh_config: Path | None, settings: _Pairs) -> None:
    """Check FILES (or folders), and name every problem with file, line, object and field.

    Exits with 1 if there is an error; warnings alone are exit 0.
    """
    mesh = mesh_settings(None, (), None)
    mesh_file = MeshConfigFile(mesh_config, mesh) if mesh_config else None
    mesh = mesh_file.settings if mesh_file else mesh
    count, found = offline.validate(files, variables(os.environ, dict(settings)), mesh)
    problems = [*(mesh_file.problems if mesh_file else ()), *found]
    for problem in problems:
        click.echo(str(problem))
    errors = sum(problem.severity is Severity.ERROR for problem in problems)
    numbers = (
        _count(count, "valid object"),
        _count(errors, "error"),
        _count(len(problems) - errors, "warning"),
    )
    click.echo(", ".join(numbers), err=True)
    sys.exit(1 if errors else 0)


@main.command("status", short_help="Show what a running `llmplane serve` has, and who got it.")
@click.option(
    "--admin-address",
    type=AddressType(),
    default="127.0.0.1:18080",
    show_default=True,
    help="The --admin-address of `llmplane serve`.",
)
@_CREDENTIALS
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def status_command(admin_address: Address, *, as_json: bool, **files: Path | None) -> None:
    """Show the objects of a running `llmplane serve`, its proxies, and all problems.

    STATE says whether an object does its work; PROXIES how many of those that it is for have acknowledged it.
    CDS, LDS, RDS and SDS are Envoy's discovery services: SYNCED (the proxy has the newest), STALE (its answer
    is awaited) or NACK (it refused something, and keeps what it had).

    On an address that other machines reach, `llmplane serve` tells this only over TLS, and to those with
    credentials for every namespace or for the root namespace.
    """
    credentials = _credentials(admin_address, files)
    try:
        check_files(credentials)
        status = fetch_status(admin_address, credentials)
    except (StatusUnavailableError, CredentialsError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(status, indent=2) if as_json else format_status(status))


@main.command("ratelimit", short_help="Count for limits that several Envoys share.")
@click.option(
    "--address",
    type=AddressType(),
    default="127.0.0.1:18081",
    show_default=True,
    help="Where Envoys ask (gRPC); envoyRateLimit in the mesh configuration's extensionProviders names it.",
)
@click.option(
    "--admin-address",
    type=AddressType(),
    default="127.0.0.1:18082",
    show_default=True,
    help="Where /healthz, /readyz and /metrics answer.",
)
@click.option(
    "--redis-url",
    envvar="LLMPLANE_REDIS_URL",
    show_envvar=True,
    metavar="URL",
    help="Keep the counters in this Redis (redis://HOST:PORT, rediss:// with TLS, unix:///PATH), which "
    "several of these servers may share; a password in it is better given by the variable. Without it they "
    "are in memory, and gone when this process ends. Needs the package redis: pip install "
    "'llmplane[ratelimit]'.",
)
@click.option(
    "--cert-file",
    type=_EXISTING_FILE,
    metavar="FILE",
    help="Serve TLS, with this certificate chain (PEM). This file and those below are read again when they "
    "change.",
)
@click.option("--key-file", type=_EXISTING_FILE, metavar="FILE", help="Key of --cert-file (PEM).")
@click.option(
    "--client-ca-file",
    type=_EXISTING_FILE,
    metavar="FILE",
    help="Mutual TLS: only Envoys with a certificate of this CA (PEM) may ask; it names a workload, as with "
    "`llmplane serve --xds-client-ca-file`.",
)
@click.option(
    "--token-file",
    type=_EXISTING_FILE,
    metavar="FILE",
    help="Only those with a token of this file may ask. It has the form of `llmplane serve "
    "--xds-token-file`. Needs TLS, or loopback.",
)
@click.option(
    "--insecure",
    is_flag=True,
    help="Allow an --address that other machines reach without authentication: whoever connects can use up "
    "limits and give them back.",
)
def ratelimit_command(
    *,
    address: Address,
    admin_address: Address,
    redis_url: str | None,
    cert_file: Path | None,
    key_file: Path | None,
    client_ca_file: Path | None,
    token_file: Path | None,
    insecure: bool,
) -> None:
    """Count tokens for policies of mode Global: a rate limit service that Envoys ask.

    It has no configuration: each request brings its limit. Where counters cannot be used, the policy's
    failOpen decides; when Redis works again, so does this.
    """
    if (cert_file is None) != (key_file is None):
        raise click.UsageError("--cert-file and --key-file belong together")
    if client_ca_file and not cert_file:
        raise click.UsageError("--client-ca-file needs --cert-file: it is for mutual TLS")
    if token_file and not cert_file and not address.is_loopback:
        raise click.UsageError("--token-file needs --cert-file: tokens travel in clear without TLS")
    if not (address.is_loopback or client_ca_file or token_file or insecure):
        raise click.UsageError(
            f"--address {address}: other machines reach it; give --client-ca-file or --token-file, or "
            "--insecure if only trusted ones can"
        )
    _log_to_stderr()
    try:
        certificate = None
        if cert_file and key_file:
            certificate = ServerCertificate(cert_file, key_file, client_ca_file)
        authenticator = None
        if client_ca_file or token_file:
            tokens = TokenFile(token_file) if token_file else None
            client_ca = ClientCA(client_ca_file) if client_ca_file else None
            authenticator = FileAuthenticator(tokens, client_ca)
        asyncio.run(_ratelimit(redis_url, address, admin_address, certificate, authenticator))
    except (AddressInUseError, CredentialsError) as error:
        raise click.ClickException(str(error)) from None


async def _ratelimit(
    redis_url: str | None,
    address: Address,
    admin_address: Address,
    certificate: ServerCertificate | None,
    authenticator: Authenticator | None,
) -> None:
    try:
        counters = RedisCounters(redis_url) if redis_url else MemoryCounters()
    except ImportError:
        text = "--redis-url needs the package redis: pip install 'llmplane[ratelimit]'"
        raise click.ClickException(text) from None
    except ValueError:  # its text has the URL, which may hold a password
        text = "--redis-url cannot be used: it is redis://HOST:PORT, rediss://HOST:PORT or unix:///PATH"
        raise click.ClickException(text) from None
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    credentials = certificate.credentials() if certificate else None
    await ratelimit.run(
        counters, address, admin_address, stop, credentials=credentials, authenticator=authenticator
    )


@main.command("top", short_help="Show the LLM traffic of Envoys, live.")
@click.argument("addresses", metavar="[HOST:PORT]...", nargs=-1, type=AddressType())
@click.option(
    "--interval",
    type=click.FloatRange(min=0.5),
    default=2.0,
    show_default=True,
    help="Seconds between two readings.",
)
@click.option("--once", is_flag=True, help="Print one interval as a table, and end.")
@click.option("--prices", "price_file", type=_FILE, help="A price table (YAML): shows what the tokens cost.")
def top_command(
    addresses: tuple[Address, ...], *, interval: float, once: bool, price_file: Path | None
) -> None:
    """Show what workloads send to which provider and model: requests, errors, tokens, latency, cost.

    HOST:PORT are the Prometheus ports of one or more Envoys (default: 127.0.0.1:15090, that of `llmplane
    proxy`). Rates and latencies are those of the last interval, TOKENS and COST since the Envoys started.
    """
    try:
        prices = read_prices(price_file) if price_file else None
    except PricesError as error:
        raise click.ClickException(str(error)) from None
    with contextlib.suppress(KeyboardInterrupt):
        envoys = addresses or (Address("127.0.0.1", STATS_PORT),)
        sys.exit(asyncio.run(watch(envoys, interval, prices, once=once)))


@main.command("prices", short_help="Make Prometheus rules of a price table.")
@click.argument("file", type=_EXISTING_FILE)
def prices_command(file: Path) -> None:
    """Print the price table FILE (YAML) as a Prometheus rule file, for the dashboard's costs."""
    try:
        click.echo(prometheus_rules(read_prices(file)), nl=False)
    except PricesError as error:
        raise click.ClickException(str(error)) from None


@main.command("demo", short_help="Show it all on this machine, with a made-up LLM.")
@click.option("--keep", is_flag=True, help="Leave everything running for your own curl, until Ctrl-C.")
def demo_command(*, keep: bool) -> None:
    """Run the documents' scenarios on this machine: control plane, two Envoys and a made-up LLM."""
    sys.exit(run_demo(keep=keep))


main.add_command(fakellm.command, "fake-llm")


def _proxy_settings(kind: str, socket: Path, settings: Mapping[str, Any]) -> ProxySettings:
    xds: Address = settings["xds_address"]
    credentials = _credentials(xds, settings)
    if settings["capture"] and _PROXY_TYPES[kind] is not ProxyType.SIDECAR:
        raise click.UsageError("--capture is for a sidecar: a gateway takes what is sent to it")
    if settings["capture_dns"] and not settings["capture"]:
        raise click.UsageError("--capture-dns needs --capture")
    return ProxySettings(
        type=_PROXY_TYPES[kind],
        xds_host=xds.host,
        xds_port=xds.port,
        namespace=settings["namespace"],
        workload=settings["workload"],
        labels=dict(settings["labels"]),
        bind_address=settings["bind_address"],
        status_address=settings["status_address"],
        capture=settings["capture"],
        capture_dns=settings["capture_dns"],
        admin_socket=socket,
        admin_port=settings["admin_port"] or 0,
        credentials=credentials,
        certificate=_workload_certificate(settings),
    )


def _workload_certificate(settings: Mapping[str, Any]) -> WorkloadCertificate | None:
    files = [settings[f"workload_{name}"] for name in ("cert", "key", "ca")]
    if not any(files):
        return None
    if not all(files):
        raise click.UsageError("--workload-cert, --workload-key and --workload-ca belong together")
    return WorkloadCertificate(*(str(file.absolute()) for file in files))


def _credentials(server: Address, settings: Mapping[str, Any]) -> XdsCredentials:
    given = {name: settings[f"xds_{name}"] for name in XdsCredentials.__slots__}
    credentials = XdsCredentials(**{name: file and file.absolute() for name, file in given.items()})
    if (credentials.client_cert_file is None) != (credentials.client_key_file is None):
        raise click.UsageError("--xds-client-cert-file and --xds-client-key-file belong together")
    if credentials.client_cert_file and not credentials.ca_file:
        raise click.UsageError("--xds-client-cert-file needs --xds-ca-file: it is for mutual TLS")
    if credentials.token_file and not credentials.ca_file and not server.is_loopback:
        raise click.UsageError("--xds-token-file needs --xds-ca-file: tokens travel in clear without TLS")
    return credentials


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
