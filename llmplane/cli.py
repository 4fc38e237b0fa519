"""The command line: what each command takes, and where it is done."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
import grpc
import structlog

from crds.placeholders import variables
from crds.problems import Severity
from crds.values import KubernetesName, Namespace
from llmplane import __version__, fakellm, offline
from llmplane.acknowledged import AcknowledgedFile
from llmplane.address import Address
from llmplane.auth import CredentialsError, FileAuthenticator, ServerCertificate, TokenFile, check_files
from llmplane.bootstrap import ProxySettings, XdsCredentials, bootstrap
from llmplane.controlplane import AddressInUseError, ControlPlane
from llmplane.demo import run_demo
from llmplane.envoy import EnvoyNotFoundError, find_envoy, lay_down, runtime_directory
from llmplane.mesh import mesh_settings
from llmplane.options import AddressType, ConnectToType, IPAddressType, NameType, PairType
from llmplane.sources.files import FileSource
from llmplane.sources.lastgood import LastGood, NoStateDirectoryError, state_file
from llmplane.status import StatusUnavailableError, fetch_status, format_status
from translator.proxy import Proxy, ProxyType

_F = TypeVar("_F", bound=Callable[..., Any])
_Pairs = tuple[tuple[str, str], ...]
_ConnectTo = tuple[tuple[Address, Address], ...]

_EXISTING = click.Path(exists=True, path_type=Path)
_EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)
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
    help="Istio's mesh configuration (MeshConfig in YAML): rootNamespace, proxyHttpPort, connectTimeout.",
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
_PROXY = _options(
    click.argument("kind", metavar="(sidecar|gateway)", type=click.Choice(list(_PROXY_TYPES))),
    click.option(
        "--xds-address",
        type=AddressType(),
        default="127.0.0.1:18000",
        show_default=True,
        help="Where `llmplane serve` is.",
    ),
    click.option(
        "--xds-ca-file",
        type=_FILE,
        metavar="FILE",
        help="Speak TLS with `llmplane serve`; its certificate must be of this CA (PEM) and for the host of "
        "--xds-address.",
    ),
    click.option(
        "--xds-client-cert-file",
        type=_FILE,
        metavar="FILE",
        help="Mutual TLS: this Envoy's own certificate chain (PEM).",
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
        "--admin-port",
        type=click.IntRange(1, 65535),
        help="Open Envoy's admin interface on this port of 127.0.0.1. Without it, it is a Unix socket that "
        "only this user can open.",
    ),
)


@main.command("serve", short_help="Serve objects from files to Envoys, live.")
@click.option(
    "--config",
    "paths",
    multiple=True,
    required=True,
    type=_EXISTING,
    metavar="PATH",
    help="Folder with objects in YAML or JSON files (or one such file); read again when it changes. May be "
    "given several times.",
)
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
    help="Where `llmplane status` asks, and /healthz and /readyz answer.",
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
    "NAMESPACE[/WORKLOAD] [LABEL=VALUE ...] TOKEN. Needs TLS, or loopback.",
)
@click.option(
    "--insecure",
    is_flag=True,
    help="Allow addresses that other machines reach without authentication: whoever connects to "
    "--xds-address gets the API keys.",
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
    xds_address: Address,
    admin_address: Address,
    xds_cert_file: Path | None,
    xds_key_file: Path | None,
    xds_client_ca_file: Path | None,
    xds_token_file: Path | None,
    insecure: bool,
    validate_resources: bool,
    mesh_config: Path | None,
    connect_to: _ConnectTo,
    ca_file: Path | None,
    settings: _Pairs,
) -> None:
    """Serve the objects below --config to Envoys, and keep them up to date.

    A file that cannot be read, or an object with a mistake, changes nothing: its last good version stays in
    use, also over a restart (without keys, it is kept below $XDG_STATE_HOME or ~/.local/state), and the log
    and `llmplane status` say so.
    """
    if (xds_cert_file is None) != (xds_key_file is None):
        raise click.UsageError("--xds-cert-file and --xds-key-file belong together")
    if xds_client_ca_file and not xds_cert_file:
        raise click.UsageError("--xds-client-ca-file needs --xds-cert-file: it is for mutual TLS")
    if xds_token_file and not xds_cert_file and not xds_address.is_loopback:
        raise click.UsageError("--xds-token-file needs --xds-cert-file: tokens travel in clear without TLS")
    if not (xds_address.is_loopback or xds_client_ca_file or xds_token_file or insecure):
        raise click.UsageError(
            f"--xds-address {xds_address}: other machines reach it, and xDS carries API keys without "
            "authentication; give --xds-client-ca-file or --xds-token-file, or --insecure if only trusted "
            "ones can"
        )
    if not (admin_address.is_loopback or insecure):
        raise click.UsageError(
            f"--admin-address {admin_address}: other machines reach it, and it tells objects and proxies; "
            "give --insecure if only trusted ones can"
        )
    _log_to_stderr()
    mesh = mesh_settings(mesh_config, connect_to, ca_file)
    try:
        source = FileSource(
            paths, variables(os.environ, dict(settings)), LastGood(state_file("last-good", paths))
        )
        credentials = None
        if xds_cert_file and xds_key_file:
            credentials = ServerCertificate(xds_cert_file, xds_key_file, xds_client_ca_file).credentials()
        authenticator = None
        if xds_client_ca_file or xds_token_file:
            tokens = TokenFile(xds_token_file) if xds_token_file else None
            authenticator = FileAuthenticator(tokens, certificates=xds_client_ca_file is not None)
        control_plane = ControlPlane(
            source,
            mesh,
            validate_resources=validate_resources,
            authenticator=authenticator,
            acknowledged=AcknowledgedFile(state_file("acknowledged", paths)),
        )
        asyncio.run(_serve(control_plane, xds_address, admin_address, credentials))
    except (
        AddressInUseError,
        CredentialsError,
        NoStateDirectoryError,
        OSError,
    ) as error:  # OSError: no more files can be watched
        raise click.ClickException(str(error)) from None


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


async def _serve(
    control_plane: ControlPlane,
    xds_address: Address,
    admin_address: Address,
    credentials: grpc.ServerCredentials | None,
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await control_plane.run(xds_address, admin_address, stop, credentials)


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
        check_files(proxy.credentials)
        file = lay_down(proxy, directory)
    except (EnvoyNotFoundError, CredentialsError, OSError) as error:
        raise click.ClickException(str(error)) from None
    arguments = [str(envoy), "-c", str(file), "--use-dynamic-base-id", *envoy_args]
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
    proxy = Proxy(_PROXY_TYPES[kind], namespace, "", frozenset(dict(labels).items()))
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
    mesh = mesh_settings(mesh_config, (), None)
    count, problems = offline.validate(files, variables(os.environ, dict(settings)), mesh)
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
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def status_command(admin_address: Address, *, as_json: bool) -> None:
    """Show the objects of a running `llmplane serve`, its proxies, and all problems.

    STATE says whether an object does its work; PROXIES how many of those that it is for have acknowledged it.
    CDS, LDS, RDS and SDS are Envoy's discovery services: SYNCED (the proxy has the newest), STALE (its answer
    is awaited) or NACK (it refused something, and keeps what it had).
    """
    try:
        status = fetch_status(admin_address)
    except StatusUnavailableError as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(status, indent=2) if as_json else format_status(status))


@main.command("demo", short_help="Show it all on this machine, with a made-up LLM.")
@click.option("--keep", is_flag=True, help="Leave everything running for your own curl, until Ctrl-C.")
def demo_command(*, keep: bool) -> None:
    """Run the documents' scenarios on this machine: control plane, sidecar Envoy and a made-up LLM."""
    sys.exit(run_demo(keep=keep))


main.add_command(fakellm.command, "fake-llm")


def _proxy_settings(kind: str, socket: Path, settings: Mapping[str, Any]) -> ProxySettings:
    xds: Address = settings["xds_address"]
    given = {name: settings[f"xds_{name}"] for name in XdsCredentials.__slots__}
    credentials = XdsCredentials(**{name: file and file.absolute() for name, file in given.items()})
    if (credentials.client_cert_file is None) != (credentials.client_key_file is None):
        raise click.UsageError("--xds-client-cert-file and --xds-client-key-file belong together")
    if credentials.client_cert_file and not credentials.ca_file:
        raise click.UsageError("--xds-client-cert-file needs --xds-ca-file: it is for mutual TLS")
    if credentials.token_file and not credentials.ca_file and not xds.is_loopback:
        raise click.UsageError("--xds-token-file needs --xds-ca-file: tokens travel in clear without TLS")
    return ProxySettings(
        type=_PROXY_TYPES[kind],
        xds_host=xds.host,
        xds_port=xds.port,
        namespace=settings["namespace"],
        workload=settings["workload"],
        labels=dict(settings["labels"]),
        bind_address=settings["bind_address"],
        admin_socket=socket,
        admin_port=settings["admin_port"] or 0,
        credentials=credentials,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
