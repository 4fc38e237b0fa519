"""The object model: one typed model a kind, and how files and manifests hold it.

This package imports nothing else of llmplane. It does no I/O, except for `python -m crds.manifests`.
"""
