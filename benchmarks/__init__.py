"""Measurements of llmplane, each beside its reference in the same run: `make bench`, docs/benchmarks.md."""
