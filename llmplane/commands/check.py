"""``llmplane translate`` and ``llmplane validate``: what files mean and what is wrong with them, offline."""

import os
import sys
from pathlib import Path

import click

from crds.placeholders import variables
from crds.problems import Severity
from llmplane import offline
from llmplane.mesh import MeshConfigFile, mesh_settings
from llmplane.options import EXISTING, MESH, MESH_CONFIG, PROXY_TYPES, SET, WORKLOAD, ConnectTo, Pairs
from translator.proxy import Proxy, WorkloadCertificate

_SOME_CERTIFICATE = WorkloadCertificate(
    *(f"/etc/certs/{name}.pem" for name in ("cert-chain", "key", "root-cert"))
)
"""Where Istio has it; `translate` knows of no real one."""


@click.command("translate", short_help="Print the Envoy configuration that files mean.")
@click.argument("files", nargs=-1, required=True, type=EXISTING)
@click.option(
    "--proxy",
    "kind",
    type=click.Choice(list(PROXY_TYPES)),
    default="sidecar",
    show_default=True,
    help="For which kind of Envoy.",
)
@WORKLOAD
@MESH
@SET
def translate_command(
    *,
    files: tuple[Path, ...],
    kind: str,
    namespace: str,
    labels: Pairs,
    mesh_config: Path | None,
    connect_to: ConnectTo,
    ca_file: Path | None,
    settings: Pairs,
) -> None:
    """Print the Envoy configuration that a proxy would get from FILES (or folders), without any server.

    Keys are not shown. Problems go to standard error; exits with 1 if one of them is an error.
    """
    found = frozenset(dict(labels).items())
    proxy = Proxy(PROXY_TYPES[kind], namespace, "", found, certificate=_SOME_CERTIFICATE)
    mesh = mesh_settings(mesh_config, connect_to, ca_file)
    text, problems = offline.translate(files, proxy, mesh, variables(os.environ, dict(settings)))
    for problem in problems:
        click.echo(str(problem), err=True)
    click.echo(text, nl=False)
    if any(problem.severity is Severity.ERROR for problem in problems):
        sys.exit(1)


@click.command("validate", short_help="Check files, and name every problem with its place.")
@click.argument("files", nargs=-1, required=True, type=EXISTING)
@MESH_CONFIG
@SET
def validate_command(*, files: tuple[Path, ...], mesh_config: Path | None, settings: Pairs) -> None:
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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
