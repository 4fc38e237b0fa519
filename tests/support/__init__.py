"""Helpers of the tests: a real Envoy, and servers to put behind it."""
