"""The command line: what each command takes, and where it is done."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import structlog

from crds.placeholders import variables
from crds.problems import Severity
from llmplane import __version__, fakellm, offline
from llmplane.address import Address, AddressType, ConnectToType
from llmplane.bootstrap import ProxySettings, bootstrap
from llmplane.controlplane import ControlPlane
from llmplane.demo import run_demo
from llmplane.envoy import EnvoyNotFoundError, find_envoy, lay_down, runtime_directory
from llmplane.mesh import mesh_settings
from llmplane.sources.files import FileSource
from llmplane.sources.lastgood import LastGood, state_file
from llmplane.status import StatusUnavailableError, fetch_status, format_status
from translator.proxy import Proxy, ProxyType

_F = TypeVar("_F", bound=Callable[..., Any])

_EXISTING = click.Path(exists=True, path_type=Path)
_PROXY_TYPES = {"sidecar": ProxyType.SIDECAR, "gateway": ProxyType.ROUTER}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Run stock Envoy as a gateway and sidecar for LLM traffic.

    LLMProvider and LLMRoute objects become Envoy's configuration. Start with `llmplane demo`.
    """
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _options(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    def apply(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


_SET = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Fill the placeholder ${NAME} of apiKey and ipBlocks. Without it, the environment variable of that "
    "name counts: ${ API_KEY of dashscope} is API_KEY_OF_DASHSCOPE.",
)
_MESH_CONFIG = click.option(
    "--mesh-config",
    type=_EXISTING,
    help="Istio's mesh configuration (MeshConfig YAML): rootNamespace, proxyHttpPort, connectTimeout.",
)
_MESH = _options(
    _MESH_CONFIG,
    click.option(
        "--connect-to",
        type=ConnectToType(),
        multiple=True,
        help="Reach the provider HOST:PORT at ADDR:PORT (as curl's option); its TLS name stays HOST.",
    ),
    click.option("--ca-file", type=_EXISTING, help="PEM file of a CA to trust besides the system's."),
)
_IDENTITY = _options(
    click.argument("kind", metavar="(sidecar|gateway)", type=click.Choice(list(_PROXY_TYPES))),
    click.option(
        "--xds-address", type=AddressType(), default="127.0.0.1:18000", show_default=True, help="llmplane serve."
    ),
    click.option("--namespace", default="default", show_default=True, help="Namespace of the workload."),
    click.option("--workload", required=True, help="Name of the workload, e.g. of its Deployment."),
    click.option("--label", "labels", multiple=True, metavar="K=V", help="A label of the workload."),
    click.option(
        "--bind-address",
        default="127.0.0.1",
        show_default=True,
        help="Where this Envoy opens its own listeners; with 127.0.0.2, .3 ... several run on one machine.",
    ),
    click.option(
        "--admin-port", type=int, default=0, help="Envoy's admin interface on TCP too; else a Unix socket only."
    ),
)


@main.command("serve")
@click.option(
    "--config",
    "paths",
    multiple=True,
    required=True,
    type=_EXISTING,
    help="Folder (or file) with YAML objects; read again when it changes.",
)
@click.option("--xds-address", type=AddressType(), default="127.0.0.1:18000", show_default=True)
@click.option("--admin-address", type=AddressType(), default="127.0.0.1:18080", show_default=True)
@click.option(
    "--insecure", is_flag=True, help="Serve xDS, which carries keys, off loopback without authentication."
)
@_MESH
@_SET
def serve_command(
    paths: tuple[Path, ...],
    xds_address: Address,
    admin_address: Address,
    mesh_config: Path | None,
    connect_to: Sequence[tuple[Address, Address]],
    ca_file: Path | None,
    settings: tuple[str, ...],
    *,
    insecure: bool,
) -> None:
    """Serve the objects below --config to Envoys, and keep them up to date."""
    if not xds_address.is_loopback and not insecure:
        raise click.UsageError(
            f"--xds-address {xds_address}: xDS carries API keys and has no authentication yet; "
            "--insecure serves it off loopback all the same"
        )
    mesh = mesh_settings(mesh_config, connect_to, ca_file)
    source = FileSource(paths, _variables(settings), LastGood(state_file(paths)))
    try:
        asyncio.run(_serve(ControlPlane(source, mesh), xds_address, admin_address))
    except (OSError, RuntimeError) as error:  # an address is taken, a folder is not there
        raise click.ClickException(str(error)) from None


async def _serve(control_plane: ControlPlane, xds_address: Address, admin_address: Address) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await control_plane.run(xds_address, admin_address, stop)


@main.command("proxy", context_settings={"ignore_unknown_options": True})
@_IDENTITY
@click.argument("envoy_args", nargs=-1, type=click.UNPROCESSED)
def proxy_command(kind: str, envoy_args: tuple[str, ...], **identity: Any) -> None:  # noqa: ANN401
    """Run an Envoy as sidecar or gateway, configured by `llmplane serve`.

    What follows `--` is given to Envoy. Its listeners: 15080 HTTP proxy (sidecar), 15090 Prometheus
    metrics, 15021 health.
    """
    try:
        envoy = find_envoy()
    except EnvoyNotFoundError as error:
        raise click.ClickException(str(error)) from None
    directory = runtime_directory(f"{identity['workload']}.{identity['namespace']}-{identity['bind_address']}")
    file = lay_down(_proxy_settings(kind, directory / "admin.sock", identity), directory)
    arguments = [str(envoy), "-c", str(file), "--use-dynamic-base-id", *envoy_args]
    sys.stderr.flush()
    os.execv(envoy, arguments)  # noqa: S606 - becomes Envoy: signals and the exit code are its own


@main.command("bootstrap")
@_IDENTITY
def bootstrap_command(kind: str, **identity: Any) -> None:  # noqa: ANN401
    """Print the bootstrap that `llmplane proxy` would start Envoy with."""
    socket = Path("/tmp/llmplane-admin.sock")  # noqa: S108 - on the machine where Envoy will run
    click.echo(json.dumps(bootstrap(_proxy_settings(kind, socket, identity)), indent=2))


@main.command("translate")
@click.argument("files", nargs=-1, required=True, type=_EXISTING)
@click.option("--proxy", "kind", type=click.Choice(list(_PROXY_TYPES)), default="sidecar", show_default=True)
@click.option("--namespace", default="default", show_default=True)
@click.option("--workload", default="", help="Name of the workload.")
@click.option("--label", "labels", multiple=True, metavar="K=V", help="A label of the workload.")
@_MESH
@_SET
def translate_command(
    files: tuple[Path, ...],
    kind: str,
    namespace: str,
    workload: str,
    labels: tuple[str, ...],
    mesh_config: Path | None,
    connect_to: Sequence[tuple[Address, Address]],
    ca_file: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Print the Envoy configuration that a proxy would get from FILES, without any server.

    Keys are redacted.
    """
    proxy = Proxy(_PROXY_TYPES[kind], namespace, workload, frozenset(_pairs("--label", labels).items()))
    mesh = mesh_settings(mesh_config, connect_to, ca_file)
    text, problems = offline.translate(files, proxy, mesh, _variables(settings))
    for problem in problems:
        click.echo(str(problem), err=True)
    click.echo(text, nl=False)
    if any(problem.severity is Severity.ERROR for problem in problems):
        sys.exit(1)


@main.command("validate")
@click.argument("files", nargs=-1, required=True, type=_EXISTING)
@_MESH_CONFIG
@_SET
def validate_command(files: tuple[Path, ...], mesh_config: Path | None, settings: tuple[str, ...]) -> None:
    """Check FILES (or folders), and name every problem with file, line, object and field.

    Exits with 1 if there is an error; warnings alone are exit 0.
    """
    count, problems = offline.validate(files, _variables(settings), mesh_settings(mesh_config, (), None))
    for problem in problems:
        click.echo(str(problem))
    errors = sum(problem.severity is Severity.ERROR for problem in problems)
    click.echo(f"{count} objects, {errors} errors, {len(problems) - errors} warnings", err=True)
    sys.exit(1 if errors else 0)


@main.command("status")
@click.option("--admin-address", type=AddressType(), default="127.0.0.1:18080", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
def status_command(admin_address: Address, *, as_json: bool) -> None:
    """Show objects and what is wrong with them, proxies, and who acknowledged what."""
    try:
        status = fetch_status(admin_address)
    except StatusUnavailableError as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(status, indent=2) if as_json else format_status(status))


@main.command("demo")
@click.option("--keep", is_flag=True, help="Leave everything running for your own curl, until Ctrl-C.")
def demo_command(*, keep: bool) -> None:
    """Show the documents' scenarios on this machine: control plane, sidecar Envoy and fake LLM."""
    sys.exit(run_demo(keep=keep))


main.add_command(fakellm.command, "fake-llm")


def _proxy_settings(kind: str, socket: Path, identity: Mapping[str, Any]) -> ProxySettings:
    xds: Address = identity["xds_address"]
    return ProxySettings(
        type=_PROXY_TYPES[kind],
        xds_host=xds.host,
        xds_port=xds.port,
        namespace=identity["namespace"],
        workload=identity["workload"],
        labels=_pairs("--label", identity["labels"]),
        bind_address=identity["bind_address"],
        admin_socket=socket,
        admin_port=identity["admin_port"],
    )


def _pairs(option: str, items: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{option} takes NAME=VALUE")
        pairs[name] = value
    return pairs


def _variables(settings: Sequence[str]) -> dict[str, str]:
    return variables(os.environ, _pairs("--set", settings))
