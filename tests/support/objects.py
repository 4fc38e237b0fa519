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
