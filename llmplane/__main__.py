"""``python -m llmplane``: the command line."""

from llmplane.cli import main

main()
