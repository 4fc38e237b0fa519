"""``llmplane top`` and ``llmplane prices``: LLM traffic and what it costs."""

import asyncio
import contextlib
import sys
from pathlib import Path

import click

from llmplane.address import Address
from llmplane.bootstrap import STATS_PORT
from llmplane.options import EXISTING_FILE, FILE, AddressType
from llmplane.prices import PricesError, prometheus_rules, read_prices
from llmplane.top import watch


@click.command("top", short_help="Show the LLM traffic of Envoys, live.")
@click.argument("addresses", metavar="[HOST:PORT]...", nargs=-1, type=AddressType())
@click.option(
    "--interval",
    type=click.FloatRange(min=0.5),
    default=2.0,
    show_default=True,
    help="Seconds between two readings.",
)
@click.option("--once", is_flag=True, help="Print one interval as a table, and end.")
@click.option("--prices", "price_file", type=FILE, help="A price table (YAML): shows what the tokens cost.")
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


@click.command("prices", short_help="Make Prometheus rules of a price table.")
@click.argument("file", type=EXISTING_FILE)
def prices_command(file: Path) -> None:
    """Print the price table FILE (YAML) as a Prometheus rule file, for the dashboard's costs."""
    try:
        click.echo(prometheus_rules(read_prices(file)), nl=False)
    except PricesError as error:
        raise click.ClickException(str(error)) from None
