"""Objects as YAML, with as little text as a test needs."""

import json
from typing import Any

from crds.loader import load
from crds.problems import Severity
from translator.world import MeshSettings, World

API_VERSION = "istio.alibabacloud.com/v1beta1"


def provider(
    name: str, host: str, key: str | None = None, model: str | None = "some-model", **spec: Any
) -> str:
    """Return an LLMProvider (as JSON, which is YAML); `spec` adds fields or replaces them.

    The name may be NAMESPACE/NAME, here and below.
    """
    config: dict[str, Any] = {}
    if model is not None:
        config["model"] = model
    if key is not None:
        config["apiKey"] = key
    default = {
        "host": host,
        "path": "/v1/chat/completions",
        "configs": {"defaultConfig": {"openAIConfig": config}},
    }
    return _object("LLMProvider", name, {**default, **spec})


def route(name: str, host: str, *rules: dict[str, Any], **spec: Any) -> str:
    """Return an LLMRoute."""
    return _object("LLMRoute", name, {"host": host, "rules": list(rules), **spec})


def backends(*hosts: str) -> list[dict[str, Any]]:
    """Return backendRefs to providers, without weights."""
    return [{"providerHost": host} for host in hosts]


def rate_limit(name: str, **spec: Any) -> str:
    """Return an LLMTokenRateLimit."""
    return _object("LLMTokenRateLimit", name, spec)


def gateway(name: str, *servers: dict[str, Any], **spec: Any) -> str:
    """Return a Gateway, by default for the workloads with the label ``istio: ingressgateway``."""
    text = _object(
        "Gateway", name, {"selector": {"istio": "ingressgateway"}, "servers": list(servers), **spec}
    )
    return text.replace(API_VERSION, "networking.istio.io/v1")


def server(*hosts: str, protocol: str = "HTTP", number: int = 80, **more: Any) -> dict[str, Any]:
    """Return a server of a Gateway; its port is named by protocol and number."""
    port = {"name": f"{protocol.lower()}-{number}", "number": number, "protocol": protocol}
    return {"hosts": list(hosts or ("*",)), "port": port, **more}


def service(name: str, selector: dict[str, str], *ports: tuple[int, int | str]) -> str:
    """Return a Service with these ports and the target ports of each."""
    spec = {"selector": selector, "ports": [{"port": port, "targetPort": target} for port, target in ports]}
    return _object("Service", name, spec).replace(API_VERSION, "v1")


def secret(name: str, values: dict[str, str]) -> str:
    """Return a Secret with these values in clear."""
    return json.dumps(
        {"apiVersion": "v1", "kind": "Secret", "metadata": _metadata(name), "stringData": values}
    )


def world(*documents: str, mesh: MeshSettings | None = None) -> World:
    """Return the world of these objects, as the translator gets it. They must be valid."""
    loaded = load("\n---\n".join(documents), "objects.yaml", {})
    assert not [problem for problem in loaded.problems if problem.severity is Severity.ERROR], loaded.problems
    return World.of((item.object for item in loaded.objects), mesh)


def _object(kind: str, name: str, spec: dict[str, Any]) -> str:
    return json.dumps({"apiVersion": API_VERSION, "kind": kind, "metadata": _metadata(name), "spec": spec})


def _metadata(name: str) -> dict[str, str]:
    namespace, _, own = name.rpartition("/")
    return {"name": own, "namespace": namespace or "default"}
