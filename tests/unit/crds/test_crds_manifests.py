"""The CRD manifests: they are those of the models, and an API server can use them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import crds
from crds.loader import load_object
from crds.manifests import manifests

HERE = Path(crds.__file__).parent
EXAMPLES = Path(__file__).parents[3] / "examples"

# What a structural schema may hold (apiextensions.k8s.io/v1 JSONSchemaProps), as far as we use it.
KEYWORDS = {
    "additionalProperties", "description", "enum", "format", "items", "maxItems", "maxLength",
    "maxProperties", "maximum", "minItems", "minLength", "minimum", "pattern", "properties", "required",
    "type", "x-kubernetes-list-map-keys", "x-kubernetes-list-type",
    "x-kubernetes-preserve-unknown-fields", "x-kubernetes-validations",
}  # fmt: skip


def manifest(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((HERE / f"{kind.lower()}s.yaml").read_text("utf-8"))
    return found


def schema_of(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = manifest(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a schema and all schemas of values within."""
    yield node
    for member in node.get("properties", {}).values():
        yield from nodes(member)
    for keyword in ("items", "additionalProperties"):
        if keyword in node:
            yield from nodes(node[keyword])


def test_the_committed_manifests_are_those_of_the_models() -> None:
    """Otherwise: `python -m crds.manifests`."""
    assert {
        path.relative_to(HERE).as_posix(): path.read_text("utf-8") for path in HERE.rglob("*.yaml")
    } == manifests()


COLUMNS = {
    "LLMProvider": ["Host", "Path"],
    "LLMRoute": ["Host", "Gateways"],
    "APIKeyAuthentication": ["Secrets"],
    "LLMTokenRateLimit": ["Mode", "Shadow"],
}


@pytest.mark.parametrize(
    ("kind", "short"),
    [
        ("LLMProvider", "llmp"),
        ("LLMRoute", "llmr"),
        ("APIKeyAuthentication", "apikeyauth"),
        ("LLMTokenRateLimit", "llmtrl"),
    ],
)
def test_what_kubectl_knows_of_a_kind(kind: str, short: str) -> None:
    spec = manifest(kind)["spec"]
    assert (spec["group"], spec["scope"]) == ("istio.alibabacloud.com", "Namespaced")
    assert spec["names"]["kind"] == kind
    assert spec["names"]["shortNames"] == [short]
    assert spec["names"]["categories"] == ["llmplane"]
    assert [(one["name"], one["served"], one["storage"]) for one in spec["versions"]] == [
        ("v1beta1", True, True),
        ("v1", True, False),
    ]
    first, second = spec["versions"]
    assert first["schema"] == second["schema"]
    assert first["subresources"] == {"status": {}}
    columns = [column["name"] for column in first["additionalPrinterColumns"]]
    assert columns == [*COLUMNS[kind], "Status", "Programmed", "Age"]


@pytest.mark.parametrize("kind", COLUMNS)
def test_schemas_are_structural(kind: str) -> None:
    """The rules of Kubernetes' documentation: Specifying a structural schema."""
    for node in nodes(schema_of(kind)):
        assert node.keys() <= KEYWORDS
        assert "type" in node
        assert not ("properties" in node and "additionalProperties" in node)
        if "pattern" in node:
            re.compile(node["pattern"])
    jsonschema.Draft7Validator.check_schema(schema_of(kind))


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_field_of_the_spec_is_described(kind: str) -> None:
    for node in nodes(schema_of(kind)["properties"]["spec"]):
        for name, member in node.get("properties", {}).items():
            assert member.get("description"), name


PROVIDER = {"host": "a.example.com", "path": "/v1/chat/completions"}
REF = {"providerHost": "a.b"}
KEYS = {"credentialRefs": [{"name": "clients"}]}


def with_config(**config: object) -> dict[str, object]:
    return {**PROVIDER, "configs": {"defaultConfig": {"openAIConfig": config}}}


def with_outliers(**members: object) -> dict[str, object]:
    return PROVIDER | {"trafficPolicy": {"outlierDetection": members}}


def with_pool(**members: object) -> dict[str, object]:
    return PROVIDER | {"trafficPolicy": {"connectionPool": members}}


def with_rule(**rule: object) -> dict[str, object]:
    return {"host": "*", "rules": [{"backendRefs": [REF], **rule}]}


def with_headers(**headers: object) -> dict[str, object]:
    return with_rule(matches=[{"headers": headers}])


def with_refs(*refs: dict[str, object]) -> dict[str, object]:
    return {"host": "test.com", "rules": [{"backendRefs": list(refs)}]}


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("LLMProvider", PROVIDER),
        ("LLMProvider", PROVIDER | {"host": "2001:db8::1", "path": "/a?b=c"}),
        ("LLMProvider", PROVIDER | {"port": 8443, "endpoints": [{"address": "192.0.2.1", "port": 1}]}),
        ("LLMProvider", PROVIDER | {"tls": {"mode": "MUTUAL", "credentialName": "a"}}),
        ("LLMProvider", PROVIDER | {"exportTo": [".", "a"]}),
        ("LLMProvider", with_outliers(interval="1m30s", consecutive5xxErrors=0, count429=False)),
        ("LLMProvider", with_pool(http={"http2MaxRequests": 1, "idleTimeout": "1m"})),
        ("LLMProvider", PROVIDER | {"maxRequestBytes": 1}),
        ("LLMProvider", PROVIDER | {"configs": {"routeSpecificConfigs": {"vip": {"openAIConfig": {}}}}}),
        ("LLMProvider", with_config(apiKey="${ API_KEY of dashscope}", stream=False)),
        ("LLMProvider", with_config(defaults={"a": [{"b": None}]}, overrides={"c": 1})),
        ("LLMRoute", with_rule(timeout="0s", retries={"attempts": 2, "perTryTimeout": "250ms"})),
        ("LLMRoute", with_headers(a={}, b={"exact": "c"}, c={"regex": "*"})),
        ("LLMRoute", with_refs({"providerHost": "a.b", "weight": 1}, {"backendRef": {"name": "a"}})),
        ("LLMRoute", with_rule() | {"gateways": ["mesh", "./a", "istio-system/ingress-gw"]}),
        ("APIKeyAuthentication", KEYS),
        ("APIKeyAuthentication", KEYS | {"selector": {"matchLabels": {"istio": "ingressgateway"}}}),
        ("APIKeyAuthentication", KEYS | {"fromHeaders": [{"name": "X-Goog-Api-Key"}]}),
    ],
)
def test_what_the_api_server_takes_and_the_model_too(kind: str, spec: dict[str, object]) -> None:
    document = {
        "apiVersion": "istio.alibabacloud.com/v1",
        "kind": kind,
        "metadata": {"name": "a"},
        "spec": spec,
    }
    jsonschema.Draft7Validator(schema_of(kind)).validate(document)
    found, _ = load_object(document)
    assert found


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("LLMProvider", {"host": "a.b"}),
        ("LLMProvider", PROVIDER | {"host": "https://a.b"}),
        ("LLMProvider", PROVIDER | {"host": "a.b:443"}),
        ("LLMProvider", PROVIDER | {"host": ""}),
        ("LLMProvider", PROVIDER | {"path": "/a#b"}),
        ("LLMProvider", PROVIDER | {"path": "a"}),
        ("LLMProvider", PROVIDER | {"port": 0}),
        ("LLMProvider", PROVIDER | {"port": "443"}),
        ("LLMProvider", PROVIDER | {"tls": {"mode": "simple"}}),
        ("LLMProvider", PROVIDER | {"exportTo": ["a.b"]}),
        ("LLMProvider", with_outliers(maxEjectionPercent=101)),
        ("LLMProvider", with_outliers(interval="10")),
        ("LLMProvider", with_pool(tcp={"maxConnections": 0})),
        ("LLMProvider", PROVIDER | {"maxRequestBytes": 0}),
        ("LLMProvider", PROVIDER | {"operations": [{"path": "/a", "method": "get"}]}),
        ("LLMProvider", with_config(apiKeySecretRef={"name": "a"})),
        ("LLMProvider", with_config(stream="false")),
        ("LLMProvider", with_config(defaults=[])),
        ("LLMRoute", {"host": "a.b"}),
        ("LLMRoute", {"host": "a.b", "rules": []}),
        ("LLMRoute", {"host": "a*", "rules": [{"backendRefs": [REF]}]}),
        ("LLMRoute", with_refs()),
        ("LLMRoute", with_refs({"providerHost": "a.b", "weight": -1})),
        ("LLMRoute", with_rule(name="a|b")),
        ("LLMRoute", with_rule(timeout=10)),
        ("LLMRoute", with_rule(timeout="10d")),
        ("LLMRoute", with_rule(retries={})),
        ("LLMRoute", with_headers(a={"exact": "b", "prefix": "c"})),
        ("LLMRoute", with_headers(a="b")),
        ("LLMRoute", with_rule() | {"gateways": ["a/b/c"]}),
        ("APIKeyAuthentication", {}),
        ("APIKeyAuthentication", {"credentialRefs": []}),
        ("APIKeyAuthentication", {"credentialRefs": [{"name": "A"}]}),
        ("APIKeyAuthentication", KEYS | {"fromHeaders": []}),
        ("APIKeyAuthentication", KEYS | {"fromHeaders": [{"name": "a b"}]}),
    ],
)
def test_what_the_api_server_refuses_and_the_model_too(kind: str, spec: dict[str, object]) -> None:
    document = {
        "apiVersion": "istio.alibabacloud.com/v1",
        "kind": kind,
        "metadata": {"name": "a"},
        "spec": spec,
    }
    assert list(jsonschema.Draft7Validator(schema_of(kind)).iter_errors(document))
    found, problems = load_object(document)
    assert not found
    assert problems


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/step-*/*.yaml")), ids=lambda path: path.name)
def test_the_api_server_takes_the_examples(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text("utf-8")):
        if document and document["kind"] in COLUMNS:
            jsonschema.Draft7Validator(schema_of(document["kind"])).validate(document)
