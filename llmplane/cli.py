"""The command line: its commands by name. Only the one that is used is loaded: all take a second."""

from importlib import import_module

import click

from llmplane import __version__

_COMMANDS = {
    "bootstrap": "llmplane.commands.proxy:bootstrap_command",
    "demo": "llmplane.commands.demo:demo_command",
    "fake-llm": "llmplane.fakellm:command",
    "inject": "llmplane.commands.inject:inject_command",
    "prices": "llmplane.commands.top:prices_command",
    "proxy": "llmplane.commands.proxy:proxy_command",
    "ratelimit": "llmplane.commands.ratelimit:ratelimit_command",
    "serve": "llmplane.commands.serve:serve_command",
    "status": "llmplane.commands.status:status_command",
    "top": "llmplane.commands.top:top_command",
    "translate": "llmplane.commands.check:translate_command",
    "validate": "llmplane.commands.check:validate_command",
}


class _Commands(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names of all commands."""
        return [*_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Return a command by its name."""
        if cmd_name not in _COMMANDS:
            return None
        module, _, function = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), function)
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__)
def main() -> None:
    """Run stock Envoy as a sidecar and gateway for LLM traffic.

    Objects that say which LLM providers there are (LLMProvider) and which requests go to which one (LLMRoute)
    become Envoy's configuration, and stay it while they change. `llmplane demo` shows it on this machine.

    On your own: write objects into a folder, check them with `llmplane validate`, start `llmplane serve` and
    beside it `llmplane proxy sidecar`, and look at `llmplane status`.
    """
