"""The commands: what each takes, and where it is done. `llmplane.cli` loads the one that is used."""
