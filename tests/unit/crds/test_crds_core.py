"""The kinds of Kubernetes itself that are read: Secret and Service."""

from collections.abc import Callable

import pytest

from crds.core import Secret, Service
from crds.loader import load

Problems = Callable[[str], list[str]]

KEYS = """\
apiVersion: v1
kind: Secret
metadata: {name: keys}
type: Opaque
immutable: true
data:
  dashscope: c2stMQ==
  both: b2xk
  wrapped: |
    c2st
    Mg==
stringData:
  both: new
"""


def secret() -> Secret:
    (found,) = load(KEYS, "f.yaml", {}).objects
    assert isinstance(found.object, Secret)
    return found.object


def test_the_values_of_a_secret() -> None:
    found = secret()
    assert found.keys == ("dashscope", "both", "wrapped")
    assert found.value("dashscope") == b"sk-1"
    assert found.value("both") == b"new"  # stringData wins, as in Kubernetes
    assert found.value("wrapped") == b"sk-2"
    assert found.value("other") is None


def test_the_values_of_a_secret_show_in_no_repr() -> None:
    assert "sk-1" not in repr(secret())
    assert "new" not in repr(secret())


@pytest.mark.parametrize("value", ["'%%'", "c2stM", "12", "[a]"])
def test_a_value_that_is_not_base64(problems: Problems, value: str) -> None:
    text = f"{{apiVersion: v1, kind: Secret, metadata: {{name: s}}, data: {{key: {value}}}}}"
    assert problems(text) == ["Secret default/s: data.key: must be base64"]


def test_the_ports_of_a_service() -> None:
    text = """\
apiVersion: v1
kind: Service
metadata: {name: demo-llm-server, annotations: {a: b}}
spec:
  type: ClusterIP
  clusterIP: None
  selector: {app: none}
  sessionAffinity: None
  ports:
  - {name: http, port: 80, protocol: TCP, targetPort: 80}
"""
    (found,) = load(text, "f.yaml", {}).objects
    assert isinstance(found.object, Service)
    assert [(port.name, port.port) for port in found.object.spec.ports] == [("http", 80)]
    assert found.object.spec.cluster_ip == "None"
