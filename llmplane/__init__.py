"""llmplane: an Envoy control plane for LLM traffic.

LLMProvider and LLMRoute objects become the configuration of stock Envoy, and every connected Envoy is kept on
the newest good version of it. This package is the program: command line, sources of objects, status, wiring.
"""

from importlib.metadata import version

__version__ = version("llmplane")
