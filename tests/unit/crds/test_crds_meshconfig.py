"""The mesh configuration: Istio's own file is taken, and every mistake has its place."""

import pytest

from crds.meshconfig import MeshConfig, load_mesh_config
from crds.problems import Severity

ISTIO = """
accessLogFile: /dev/stdout
defaultConfig:
  discoveryAddress: istiod.istio-system.svc:15012
  gatewayTopology:
    numTrustedProxies: 1
    forwardClientCertDetails: SANITIZE
  tracing:
    zipkin:
      address: zipkin:9411
defaultProviders:
  metrics:
  - prometheus
  tracing:
  - zipkin
enablePrometheusMerge: true
extensionProviders:
- name: zipkin
  zipkin: {service: zipkin.istio-system.svc.cluster.local, port: 9411}
- name: otel
  opentelemetry: {service: otel.default.svc.cluster.local, port: 4317, resourceDetectors: {environment: {}}}
rootNamespace: istio-system
trustDomain: cluster.local
"""


HTTP_COLLECTOR = (
    "{service: a.example, port: 1, http: {path: /v1/traces, headers: [{name: authorization, value: x}]}}"
)


def load(text: str) -> tuple[MeshConfig | None, list[str]]:
    config, problems = load_mesh_config(text, "mesh.yaml")
    assert (config is None) == any(problem.severity is Severity.ERROR for problem in problems)
    return config, [str(problem) for problem in problems]


def test_istios_own_file() -> None:
    """What has no effect here is told, with its line."""
    config, told = load(ISTIO)
    no_effect = "is a field of Istio that has no effect here"
    no_provider = "no provider 'zipkin' that can do this: it has no effect"
    assert sorted(told) == sorted(
        [
            f"mesh.yaml:4: warning: defaultConfig.discoveryAddress: {no_effect}",
            f"mesh.yaml:7: warning: defaultConfig.gatewayTopology.forwardClientCertDetails: {no_effect}",
            f"mesh.yaml:9: warning: defaultConfig.tracing.zipkin: {no_effect}",
            f"mesh.yaml:16: warning: enablePrometheusMerge: {no_effect}",
            f"mesh.yaml:19: warning: extensionProviders[0].zipkin: {no_effect}",
            f"mesh.yaml:21: warning: extensionProviders[1].opentelemetry.resourceDetectors: {no_effect}",
            f"mesh.yaml:15: warning: defaultProviders.tracing[0]: {no_provider}",
        ]
    )
    assert config is not None
    assert config.default_config.gateway_topology.num_trusted_proxies == 1
    assert [provider.name for provider in config.extension_providers] == ["otel"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "accessLogFle: /dev/stdout",
            "mesh.yaml:1: accessLogFle: unknown field, did you mean 'accessLogFile'?",
        ),
        (
            "\naccessLogFormat: '%REQ(Cookie)%'",
            "mesh.yaml:2: accessLogFormat: %REQ%: must not read the header",
        ),
        (
            "{accessLogEncoding: JSON, accessLogFormat: '[]'}",
            "mesh.yaml:1: accessLogFormat: must be a JSON object",
        ),
        (
            "extensionProviders:\n- name: x\n  envoyFileAccessLog: {logFormat: {labels: {k: '%SECRET(x)%'}}}",
            "mesh.yaml:3: extensionProviders[0].envoyFileAccessLog.logFormat.labels: k: %SECRET%",
        ),
        ("extensionProviders: [{name: a}]", "mesh.yaml:1: extensionProviders[0]: must have exactly one of"),
        (
            "extensionProviders:\n- {name: a, prometheus: {}}\n- {name: A, prometheus: {}}",
            "mesh.yaml:3: extensionProviders[1].name: is used twice",
        ),
        (
            f"extensionProviders: [{{name: a, opentelemetry: {HTTP_COLLECTOR}}}]",
            "mesh.yaml:1: extensionProviders[0].opentelemetry.http.headers[0]: must not set 'authorization'",
        ),
        ("[]", "mesh.yaml:1: must be a mapping, but is a list"),
        ("a: b: c", "mesh.yaml:1: is not valid YAML"),
    ],
)
def test_mistakes(text: str, expected: str) -> None:
    config, told = load(text)
    assert config is None
    assert told[0].startswith(expected), told


def test_an_empty_file_is_all_defaults() -> None:
    assert load("# nothing\n") == (MeshConfig(), [])
    assert load("") == (MeshConfig(), [])
