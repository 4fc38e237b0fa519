"""envoyRateLimit: a rate limit service among the extensionProviders of the mesh configuration."""

from datetime import timedelta
from typing import Any

import pytest

from crds.meshconfig import load_mesh_config


def read(service: str) -> tuple[Any, list[str]]:
    """Return the service and the problems of a mesh configuration that has just that."""
    text = f"extensionProviders: [{{name: limits, envoyRateLimit: {service}}}]"
    config, problems = load_mesh_config(text, "mesh.yaml")
    return config and config.extension_providers[0].envoy_rate_limit, [str(each) for each in problems]


def test_a_host_and_a_port_are_enough() -> None:
    service, problems = read("{service: infra/limits.example.com, port: 18081}")
    assert problems == []
    assert (service.service, service.port) == ("infra/limits.example.com", 18081)
    assert (service.timeout, service.refunds, service.tls.mode) == (
        timedelta(milliseconds=250),
        False,
        "DISABLE",
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", "0"),
        ("timeout", "0s"),
        ("timeout", "soon"),
        ("refunds", "'yes'"),
        ("tls.mode", "ISTIO_MUTUAL"),
        ("domain", "llmplane"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(field: str, value: str) -> None:
    name, _, member = field.partition(".")
    text = f"{{{member}: {value}}}" if member else value
    given = {"service": "limits.example.com", "port": "18081", name: text}
    service, problems = read(f"{{{', '.join(f'{key}: {of}' for key, of in given.items())}}}")
    assert service is None
    assert f"extensionProviders[0].envoyRateLimit.{field}" in problems[0]
