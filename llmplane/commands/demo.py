"""``llmplane demo``: the documents' scenarios on this machine."""

import sys

import click

from llmplane.demo import run_demo


@click.command("demo", short_help="Show it all on this machine, with a made-up LLM.")
@click.option("--keep", is_flag=True, help="Leave everything running for your own curl, until Ctrl-C.")
def demo_command(*, keep: bool) -> None:
    """Run the documents' scenarios on this machine: control plane, two Envoys and a made-up LLM."""
    sys.exit(run_demo(keep=keep))
