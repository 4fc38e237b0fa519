"""The CRDs on a real API server: each rule of the schemas with what it takes and what it refuses."""

import json
from typing import Any

import pytest

from crds.loader import load_object
from tests.support.kube import ROOT, ApiServer, KubectlError

LLM = "istio.alibabacloud.com/v1beta1"
PROVIDER = {"host": "a.example.com", "path": "/v1/chat/completions"}
REF = {"providerHost": "a.b"}
KEYS = {"credentialRefs": [{"name": "clients"}]}
MINUTE = {"tokens": 1000, "unit": "Minute"}
LIMITS = {"rules": [{"limits": [MINUTE]}]}
PORT = {"number": 80, "name": "http", "protocol": "HTTP"}


def config(**members: object) -> dict[str, Any]:
    return {**PROVIDER, "configs": {"defaultConfig": {"openAIConfig": members}}}


def specific(**configs: object) -> dict[str, Any]:
    return {**PROVIDER, "configs": {"routeSpecificConfigs": configs}}


def tls(**members: object) -> dict[str, Any]:
    return {**PROVIDER, "tls": members}


def endpoint(**members: object) -> dict[str, Any]:
    return {**PROVIDER, "endpoints": [members]}


def operation(**members: object) -> dict[str, Any]:
    return {**PROVIDER, "operations": [members]}


def outliers(**members: object) -> dict[str, Any]:
    return {**PROVIDER, "trafficPolicy": {"outlierDetection": members}}


def pool(**members: object) -> dict[str, Any]:
    return {**PROVIDER, "trafficPolicy": {"connectionPool": members}}


def refs(*members: dict[str, object]) -> dict[str, Any]:
    return {"host": "test.com", "rules": [{"backendRefs": list(members)}]}


def rule(**members: object) -> dict[str, Any]:
    return {"host": "*", "rules": [{"backendRefs": [REF], **members}]}


def match(**members: object) -> dict[str, Any]:
    return rule(matches=[members])


def retries(**members: object) -> dict[str, Any]:
    return rule(retries=members)


def server(**members: object) -> dict[str, Any]:
    return {"servers": [{"port": PORT, "hosts": ["*"], **members}]}


def source(**members: object) -> dict[str, Any]:
    return {"rules": [{"from": [{"source": members}]}]}


def limits(**members: object) -> dict[str, Any]:
    return {"rules": [{"limits": [{**MINUTE, **members}]}]}


def limited_by(*keys: object) -> dict[str, Any]:
    return {**LIMITS, "keys": list(keys)}


def limited_for(**target: object) -> dict[str, Any]:
    return {**LIMITS, "targetRefs": [{"name": "a", **target}]}


def jwt(**members: object) -> dict[str, Any]:
    return {"jwtRules": [{"issuer": "a", **members}]}


# Kind, place of the rule, a spec that is taken, one that is refused for this rule alone.
RULES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("LLMProvider", "host is required", PROVIDER, {"path": "/a"}),
    ("LLMProvider", "path is required", PROVIDER, {"host": "a.b"}),
    ("LLMProvider", "host: a name", PROVIDER | {"host": "2001:db8::1"}, PROVIDER | {"host": "https://a.b"}),
    ("LLMProvider", "host: not empty", PROVIDER, PROVIDER | {"host": ""}),
    ("LLMProvider", "host: length", PROVIDER, PROVIDER | {"host": "a" * 254}),
    ("LLMProvider", "path: absolute", PROVIDER | {"path": "/a?b=c"}, PROVIDER | {"path": "a"}),
    ("LLMProvider", "path: no fragment", PROVIDER, PROVIDER | {"path": "/a#b"}),
    ("LLMProvider", "port: from 1", PROVIDER | {"port": 1}, PROVIDER | {"port": 0}),
    ("LLMProvider", "port: to 65535", PROVIDER | {"port": 65535}, PROVIDER | {"port": 65536}),
    ("LLMProvider", "port: a number", PROVIDER | {"port": 443}, PROVIDER | {"port": "443"}),
    (
        "LLMProvider",
        "workloadSelector.labels: strings",
        PROVIDER | {"workloadSelector": {"labels": {"app": "sleep"}}},
        PROVIDER | {"workloadSelector": {"labels": {"app": 1}}},
    ),
    ("LLMProvider", "apiKey: a string", config(apiKey="${ API_KEY of a}"), config(apiKey=1)),
    (
        "LLMProvider",
        "only one of apiKey and apiKeySecretRef",
        config(apiKeySecretRef={"name": "a", "key": "b"}),
        config(apiKey="a", apiKeySecretRef={"name": "a", "key": "b"}),
    ),
    (
        "LLMProvider",
        "apiKeySecretRef.name: a name",
        config(apiKeySecretRef={"name": "a.b", "key": "b"}),
        config(apiKeySecretRef={"name": "A", "key": "b"}),
    ),
    (
        "LLMProvider",
        "apiKeySecretRef.key is required",
        config(apiKeySecretRef={"name": "a", "key": "b"}),
        config(apiKeySecretRef={"name": "a"}),
    ),
    ("LLMProvider", "model: not empty", config(model="m"), config(model="")),
    ("LLMProvider", "stream: a boolean", config(stream=False), config(stream="false")),
    ("LLMProvider", "streamUsage: a boolean", config(streamUsage=False), config(streamUsage=0)),
    ("LLMProvider", "defaults: an object", config(defaults={"a": [{"b": 1}]}), config(defaults=[])),
    ("LLMProvider", "overrides: an object", config(overrides={"a": 1.5}), config(overrides="a")),
    ("LLMProvider", "routeSpecificConfigs", specific(vip={"openAIConfig": {}}), specific(vip="a")),
    ("LLMProvider", "tls.mode", tls(mode="SIMPLE"), tls(mode="simple")),
    ("LLMProvider", "tls.sni", tls(sni="a.b"), tls(sni="a b")),
    ("LLMProvider", "tls.caCertificates", tls(caCertificates="/a.pem"), tls(caCertificates="a.pem")),
    (
        "LLMProvider",
        "tls: MUTUAL needs a certificate",
        tls(mode="MUTUAL", credentialName="a"),
        tls(mode="MUTUAL"),
    ),
    (
        "LLMProvider",
        "tls: a certificate needs MUTUAL",
        tls(mode="MUTUAL", credentialName="a"),
        tls(credentialName="a"),
    ),
    (
        "LLMProvider",
        "tls: nothing else with DISABLE",
        tls(mode="DISABLE", insecureSkipVerify=False),
        tls(mode="DISABLE", sni="a.b"),
    ),
    (
        "LLMProvider",
        "tls: no CA without verification",
        tls(insecureSkipVerify=True),
        tls(insecureSkipVerify=True, caCertificates="/a.pem"),
    ),
    ("LLMProvider", "endpoints.address is required", endpoint(address="192.0.2.1"), endpoint(port=1)),
    ("LLMProvider", "endpoints.port", endpoint(address="a", port=1), endpoint(address="a", port=0)),
    ("LLMProvider", "exportTo", PROVIDER | {"exportTo": [".", "a"]}, PROVIDER | {"exportTo": ["a.b"]}),
    ("LLMProvider", "exportTo: * alone", PROVIDER | {"exportTo": ["*"]}, PROVIDER | {"exportTo": ["*", "a"]}),
    ("LLMProvider", "operations.method", operation(path="/a"), operation(path="/a", method="get")),
    ("LLMProvider", "operations.path: no query", operation(path="/a/b"), operation(path="/a?b")),
    ("LLMProvider", "operations.path: its end", operation(path="/a"), operation(path="/a/")),
    (
        "LLMProvider",
        "operations.model",
        operation(path="/a", model="m"),
        operation(path="/a", model="m", method="GET"),
    ),
    ("LLMProvider", "outlierDetection.interval", outliers(interval="1m30s"), outliers(interval="10")),
    (
        "LLMProvider",
        "outlierDetection.maxEjectionPercent",
        outliers(maxEjectionPercent=100),
        outliers(maxEjectionPercent=101),
    ),
    (
        "LLMProvider",
        "outlierDetection.consecutive5xxErrors",
        outliers(consecutive5xxErrors=0),
        outliers(consecutive5xxErrors=-1),
    ),
    ("LLMProvider", "outlierDetection.count429", outliers(count429=False), outliers(count429="false")),
    (
        "LLMProvider",
        "connectionPool.tcp.maxConnections",
        pool(tcp={"maxConnections": 1}),
        pool(tcp={"maxConnections": 0}),
    ),
    (
        "LLMProvider",
        "connectionPool.tcp.connectTimeout",
        pool(tcp={"connectTimeout": "3s"}),
        pool(tcp={"connectTimeout": 3}),
    ),
    (
        "LLMProvider",
        "connectionPool.http.http1MaxPendingRequests",
        pool(http={"http1MaxPendingRequests": 1}),
        pool(http={"http1MaxPendingRequests": 0}),
    ),
    (
        "LLMProvider",
        "connectionPool.http.http2MaxRequests",
        pool(http={"http2MaxRequests": 2**31 - 1}),
        pool(http={"http2MaxRequests": 2**31}),
    ),
    (
        "LLMProvider",
        "connectionPool.http.maxRetries",
        pool(http={"maxRetries": 1}),
        pool(http={"maxRetries": -1}),
    ),
    (
        "LLMProvider",
        "connectionPool.http.idleTimeout",
        pool(http={"idleTimeout": "1m"}),
        pool(http={"idleTimeout": "never"}),
    ),
    (
        "LLMProvider",
        "maxRequestBytes",
        PROVIDER | {"maxRequestBytes": 1},
        PROVIDER | {"maxRequestBytes": 0},
    ),
    ("LLMRoute", "host is required", refs(REF), {"rules": [{"backendRefs": [REF]}]}),
    ("LLMRoute", "host: wildcards", refs(REF) | {"host": "*.a"}, refs(REF) | {"host": "a*"}),
    ("LLMRoute", "rules are required", refs(REF), {"host": "a.b"}),
    ("LLMRoute", "rules: one at least", refs(REF), {"host": "a.b", "rules": []}),
    ("LLMRoute", "backendRefs: one at least", refs(REF), refs()),
    ("LLMRoute", "backendRefs: 64 at most", refs(*[REF] * 64), refs(*[REF] * 65)),
    ("LLMRoute", "backendRefs: a destination", refs({"backendRef": {"name": "a"}}), refs({"weight": 1})),
    (
        "LLMRoute",
        "backendRefs: one destination",
        refs(REF),
        refs({"providerHost": "a.b", "backendRef": {"name": "a"}}),
    ),
    ("LLMRoute", "weight: not negative", refs(REF | {"weight": 0}), refs(REF | {"weight": -1})),
    (
        "LLMRoute",
        "weights: some",
        refs(REF | {"weight": 0}, REF | {"weight": 1}),
        refs(REF | {"weight": 0}, REF | {"weight": 0}),
    ),
    ("LLMRoute", "priority: not negative", refs(REF | {"priority": 1}), refs(REF | {"priority": -1})),
    ("LLMRoute", "name: no bar", rule(name="vip route"), rule(name="a|b")),
    ("LLMRoute", "timeout", rule(timeout="0s"), rule(timeout="10d")),
    ("LLMRoute", "retries.attempts is required", retries(attempts=0), retries(retryOn="5xx")),
    ("LLMRoute", "retries: off", retries(attempts=1, retryOn="5xx"), retries(attempts=0, retryOn="5xx")),
    (
        "LLMRoute",
        "retries.perTryTimeout",
        retries(attempts=1, perTryTimeout="250ms"),
        retries(attempts=1, perTryTimeout="a"),
    ),
    ("LLMRoute", "firstTokenTimeout", rule(firstTokenTimeout="20s"), rule(firstTokenTimeout="soon")),
    (
        "LLMRoute",
        "firstTokenTimeout or retries.perTryTimeout",
        rule(firstTokenTimeout="20s", retries={"attempts": 1}),
        rule(firstTokenTimeout="20s", retries={"attempts": 1, "perTryTimeout": "20s"}),
    ),
    ("LLMRoute", "streamIdleTimeout", rule(streamIdleTimeout="1m"), rule(streamIdleTimeout="1 minute")),
    ("LLMRoute", "gateways", rule() | {"gateways": ["./a", "b/c"]}, rule() | {"gateways": ["a/b/c"]}),
    ("LLMRoute", "headers", match(headers={"a": {}}), match(headers={"a": "b"})),
    (
        "LLMRoute",
        "headers: one way",
        match(headers={"a": {"exact": "b"}}),
        match(headers={"a": {"exact": "b", "prefix": "c"}}),
    ),
    ("LLMRoute", "sourceLabels", match(sourceLabels={"app": "a"}), match(sourceLabels={"app": 1})),
    ("LLMTokenRateLimit", "rules are required", LIMITS, {}),
    ("LLMTokenRateLimit", "rules: one at least", LIMITS, {"rules": []}),
    ("LLMTokenRateLimit", "limits: one at least", LIMITS, {"rules": [{"limits": []}]}),
    ("LLMTokenRateLimit", "tokens: from 1", limits(tokens=1), limits(tokens=0)),
    ("LLMTokenRateLimit", "tokens: 32 bits", limits(tokens=2**32 - 2), limits(tokens=2**32 - 1)),
    ("LLMTokenRateLimit", "unit", limits(unit="Hour"), limits(unit="hour")),
    ("LLMTokenRateLimit", "type", limits(type="Prompt"), limits(type="All")),
    ("LLMTokenRateLimit", "keys: what", limited_by({"header": "x-user"}), limited_by({})),
    (
        "LLMTokenRateLimit",
        "keys: one thing",
        limited_by({"claim": "sub"}),
        limited_by({"claim": "sub", "header": "x-user"}),
    ),
    (
        "LLMTokenRateLimit",
        "keys: attribute",
        limited_by({"attribute": "Client"}),
        limited_by({"attribute": "Colour"}),
    ),
    (
        "LLMTokenRateLimit",
        "match: one for each key",
        limited_by({"header": "a"}) | {"rules": [{"match": [{}], "limits": [MINUTE]}, {"limits": [MINUTE]}]},
        limited_by({"header": "a"})
        | {"rules": [{"match": [{}, {}], "limits": [MINUTE]}, {"limits": [MINUTE]}]},
    ),
    (
        "LLMTokenRateLimit",
        "the last rule has no match",
        limited_by({"header": "a"}),
        limited_by({"header": "a"}) | {"rules": [{"match": [{"exact": "b"}], "limits": [MINUTE]}]},
    ),
    (
        "LLMTokenRateLimit",
        "only the last rule has no match",
        LIMITS,
        {"rules": [{"limits": [MINUTE]}, {"limits": [MINUTE]}]},
    ),
    (
        "LLMTokenRateLimit",
        "local.longWindows",
        limits(unit="Day") | {"local": {"longWindows": True}},
        limits(unit="Day") | {"local": {"longWindows": False}},
    ),
    (
        "LLMTokenRateLimit",
        "provider for mode Global",
        limits(unit="Month") | {"mode": "Global", "provider": {"name": "a"}},
        limits(unit="Month") | {"mode": "Global"},
    ),
    ("LLMTokenRateLimit", "mode", LIMITS | {"mode": "Local"}, LIMITS | {"mode": "Regional"}),
    ("LLMTokenRateLimit", "targetRefs.kind", limited_for(kind="LLMRoute"), limited_for(kind="Service")),
    (
        "LLMTokenRateLimit",
        "targetRefs.sectionName",
        limited_for(kind="LLMRoute", sectionName="vip"),
        limited_for(kind="LLMProvider", sectionName="vip"),
    ),
    (
        "LLMTokenRateLimit",
        "selector or targetRefs",
        LIMITS | {"selector": {"matchLabels": {"a": "b"}}},
        limited_for(kind="LLMRoute") | {"selector": {"matchLabels": {"a": "b"}}},
    ),
    (
        "LLMTokenRateLimit",
        "maxKeys",
        LIMITS | {"local": {"maxKeys": 1}},
        LIMITS | {"local": {"maxKeys": 0}},
    ),
    (
        "LLMTokenRateLimit",
        "reservation.bytesPerToken",
        LIMITS | {"reservation": {"bytesPerToken": 1}},
        LIMITS | {"reservation": {"bytesPerToken": 0}},
    ),
    ("APIKeyAuthentication", "credentialRefs are required", KEYS, {}),
    ("APIKeyAuthentication", "credentialRefs: one at least", KEYS, {"credentialRefs": []}),
    ("APIKeyAuthentication", "credentialRefs.name", KEYS, {"credentialRefs": [{"name": "A"}]}),
    (
        "APIKeyAuthentication",
        "fromHeaders: one at least",
        KEYS | {"fromHeaders": [{"name": "x-goog-api-key"}]},
        KEYS | {"fromHeaders": []},
    ),
    (
        "APIKeyAuthentication",
        "fromHeaders.name",
        KEYS | {"fromHeaders": [{"name": "X-Key"}]},
        KEYS | {"fromHeaders": [{"name": "a b"}]},
    ),
    ("Gateway", "port.number", server(), server(port=PORT | {"number": 65536})),
    ("Gateway", "port.name is required", server(), server(port={"number": 80, "protocol": "HTTP"})),
    ("Gateway", "hosts", server(hosts=["./*.a.b"]), server(hosts=[""])),
    (
        "Gateway",
        "tls.mode",
        server(port=PORT | {"protocol": "HTTPS"}, tls={"mode": "SIMPLE", "credentialName": "a"}),
        server(port=PORT | {"protocol": "HTTPS"}, tls={"mode": "NONE", "credentialName": "a"}),
    ),
    ("AuthorizationPolicy", "action", {"action": "ALLOW"}, {"action": "PERMIT"}),
    ("AuthorizationPolicy", "principals", source(principals=["*"]), source(principals="*")),
    ("RequestAuthentication", "timeout", jwt(timeout="5s"), jwt(timeout="5")),
    ("RequestAuthentication", "presence", jwt(presence="REQUIRED"), jwt(presence="YES")),
    (
        "Telemetry",
        "mode",
        {"accessLogging": [{"match": {"mode": "CLIENT"}}]},
        {"accessLogging": [{"match": {"mode": "BOTH"}}]},
    ),
    (
        "Telemetry",
        "randomSamplingPercentage",
        {"tracing": [{"randomSamplingPercentage": 100}]},
        {"tracing": [{"randomSamplingPercentage": 100.5}]},
    ),
]  # fmt: skip
VERSIONS = {
    "Gateway": "networking.istio.io/v1",
    "AuthorizationPolicy": "security.istio.io/v1",
    "RequestAuthentication": "security.istio.io/v1",
    "Telemetry": "telemetry.istio.io/v1",
}


def document(kind: str, spec: dict[str, Any], name: str, namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": VERSIONS.get(kind, LLM),
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def listed(documents: list[dict[str, Any]]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": documents})


def test_each_rule_takes_and_refuses(cluster: ApiServer) -> None:
    """All of them in two requests: kubectl goes on after an object that is refused."""
    good = [document(kind, spec, f"good-{i}", "default") for i, (kind, _, spec, _) in enumerate(RULES)]
    bad = [document(kind, spec, f"bad-{i}", "default") for i, (kind, _, _, spec) in enumerate(RULES)]
    for made in good:
        assert load_object(made)[0], f"the model takes it too: {load_object(made)[1]}"
    dry_run = ("create", "--dry-run=server", "-f", "-")
    cluster.kubectl(*dry_run, text=listed(good))
    with pytest.raises(KubectlError) as refusal:
        cluster.kubectl(*dry_run, "--validate=false", text=listed(bad))  # the server, not kubectl
    for i, (kind, what, _, _) in enumerate(RULES):
        assert f'"bad-{i}" is invalid' in str(refusal.value), f"{kind}: {what} is not refused"
        assert not load_object(bad[i])[0], f"{kind}: {what} is refused by the model too"


def test_a_rule_between_fields_is_refused_in_words_that_help(cluster: ApiServer) -> None:
    both = config(apiKey="a", apiKeySecretRef={"name": "a", "key": "b"})
    made = [
        document("LLMProvider", both, "a", "default"),
        document("LLMRoute", {"host": "chat", "rules": [{"backendRefs": [{"weight": 1}]}]}, "a", "default"),
    ]
    with pytest.raises(KubectlError) as refusal:
        cluster.kubectl("create", "--dry-run=server", "-f", "-", text=listed(made))
    for words in (
        "defaultConfig.openAIConfig: Invalid value: must have only one of apiKey and apiKeySecretRef",
        "spec.rules[0].backendRefs[0]: Invalid value: must have one of providerHost and backendRef",
    ):
        assert words in str(refusal.value)


def test_an_unknown_field_is_refused(cluster: ApiServer) -> None:
    made = document("LLMProvider", PROVIDER | {"hots": "a"}, "a", "default")
    with pytest.raises(KubectlError, match=r'unknown field "spec\.hots"'):
        cluster.kubectl("create", "--dry-run=server", "-f", "-", text=json.dumps(made))


def test_both_versions_are_the_same_object(cluster: ApiServer, namespace: str) -> None:
    cluster.apply(json.dumps(document("LLMProvider", PROVIDER, "a", namespace)))
    other = cluster.get("llmproviders.v1.istio.alibabacloud.com", "a", "-n", namespace)
    assert other["spec"] == PROVIDER


def test_what_kubectl_shows(cluster: ApiServer, namespace: str) -> None:
    cluster.apply(json.dumps(document("LLMProvider", PROVIDER, "a", namespace)))
    table = cluster.kubectl("get", "llmp", "-n", namespace)
    assert table.split()[:6] == ["NAME", "HOST", "PATH", "STATUS", "PROGRAMMED", "AGE"]
    assert "a.example.com" in cluster.kubectl("get", "llmplane", "-n", namespace), "by the category"
    text = cluster.kubectl("explain", "llmprovider.spec.configs.defaultConfig.openAIConfig")
    assert "The model, whatever the client asks for." in text


def test_a_status_is_not_part_of_the_object(cluster: ApiServer, namespace: str) -> None:
    """A status that is written with the object is left out, and writing it is no new generation."""
    made = document("LLMProvider", PROVIDER, "a", namespace)
    cluster.apply(json.dumps(made | {"status": {"status": "OK"}}))
    assert "status" not in cluster.get("llmp", "a", "-n", namespace)
    cluster.kubectl(
        "patch", "llmp", "a", "-n", namespace, "--subresource=status", "--type=merge",
        "-p", '{"status": {"status": "OK"}}',
    )  # fmt: skip
    found = cluster.get("llmp", "a", "-n", namespace)
    assert (found["status"], found["metadata"]["generation"]) == ({"status": "OK"}, 1)


@pytest.mark.parametrize(
    "folder",
    sorted((ROOT / "examples").glob("00*/step-*")),
    ids=lambda path: f"{path.parent.name}-{path.name}",
)
def test_the_documents_objects_are_taken_as_they_are(cluster: ApiServer, folder: Any) -> None:
    cluster.apply_files(folder, options=["--dry-run=server"])
