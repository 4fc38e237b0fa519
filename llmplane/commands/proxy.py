"""``llmplane proxy`` and ``llmplane bootstrap``: an Envoy, and what it is started with."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from llmplane.address import Address
from llmplane.auth import CredentialsError, check_files
from llmplane.bootstrap import ProxySettings, bootstrap
from llmplane.envoy import EnvoyNotFoundError, find_envoy, lay_down, runtime_directory
from llmplane.options import PROXY, PROXY_TYPES, credentials_of
from translator.proxy import ProxyType, WorkloadCertificate

_LOG_FLUSH = "--file-flush-interval-msec"


@click.command("proxy", short_help="Run an Envoy that `llmplane serve` configures.")
@PROXY
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
        file = lay_down(proxy, directory, directory.parent)
    except (EnvoyNotFoundError, CredentialsError, OSError) as error:
        raise click.ClickException(str(error)) from None
    arguments = [str(envoy), "-c", str(file), "--use-dynamic-base-id", *envoy_args]
    if not any(argument.startswith(_LOG_FLUSH) for argument in envoy_args):
        arguments += [_LOG_FLUSH, "1000"]  # as Istio; Envoy keeps lines of access logs for ten seconds
    sys.stderr.flush()
    os.execv(envoy, arguments)  # noqa: S606 - becomes Envoy: signals and the exit code are its own


@click.command("bootstrap", short_help="Print the configuration that `proxy` starts Envoy with.")
@PROXY
def bootstrap_command(kind: str, **settings: Any) -> None:
    """Print the configuration that `llmplane proxy` starts Envoy with, as JSON.

    For an Envoy that runs elsewhere, e.g. in a container: envoy -c bootstrap.json
    """
    socket = Path("/tmp/llmplane-admin.sock")  # noqa: S108 - on the machine where Envoy will run
    click.echo(json.dumps(bootstrap(_proxy_settings(kind, socket, settings)), indent=2))


def _proxy_settings(kind: str, socket: Path, settings: Mapping[str, Any]) -> ProxySettings:
    xds: Address = settings["xds_address"]
    credentials = credentials_of(xds, settings)
    if settings["capture"] and PROXY_TYPES[kind] is not ProxyType.SIDECAR:
        raise click.UsageError("--capture is for a sidecar: a gateway takes what is sent to it")
    if settings["capture_dns"] and not settings["capture"]:
        raise click.UsageError("--capture-dns needs --capture")
    return ProxySettings(
        type=PROXY_TYPES[kind],
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
