"""``llmplane status``: what a running control plane has."""

import json
from pathlib import Path

import click

from llmplane.address import Address
from llmplane.auth import CredentialsError, check_files
from llmplane.options import CREDENTIALS, AddressType, credentials_of
from llmplane.status import StatusUnavailableError, fetch_status, format_status


@click.command("status", short_help="Show what a running `llmplane serve` has, and who got it.")
@click.option(
    "--admin-address",
    type=AddressType(),
    default="127.0.0.1:18080",
    show_default=True,
    help="The --admin-address of `llmplane serve`.",
)
@CREDENTIALS
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def status_command(admin_address: Address, *, as_json: bool, **files: Path | None) -> None:
    """Show the objects of a running `llmplane serve`, its proxies, and all problems.

    STATE says whether an object does its work; PROXIES how many of those that it is for have acknowledged it.
    CDS, LDS, RDS and SDS are Envoy's discovery services: SYNCED (the proxy has the newest), STALE (its answer
    is awaited) or NACK (it refused something, and keeps what it had).

    On an address that other machines reach, `llmplane serve` tells this only over TLS, and to those with
    credentials for every namespace or for the root namespace.
    """
    credentials = credentials_of(admin_address, files)
    try:
        check_files(credentials)
        status = fetch_status(admin_address, credentials)
    except (StatusUnavailableError, CredentialsError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(status, indent=2) if as_json else format_status(status))
