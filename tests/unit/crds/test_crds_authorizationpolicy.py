"""AuthorizationPolicy: what Istio's webhook takes is taken, what it refuses is refused, in its words."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from crds.authorizationpolicy import Action, AuthorizationPolicy, address_range, without_port
from crds.externalauthorization import STATUS_CODES
from crds.loader import load, load_object
from xds import protos

Problems = Callable[[str], list[str]]

PREFIX = "AuthorizationPolicy ns/p: "
NEVER_TRIGGERED = (
    "action without `rules` is meaningless as it will never be triggered, "
    "add an empty rule `{}` if you want it be triggered for every request"
)


def document(spec: Any, annotations: dict[str, str] | None = None, version: str = "v1") -> str:
    metadata = {"name": "p", "namespace": "ns", "annotations": annotations or {}}
    of = {"apiVersion": f"security.istio.io/{version}", "kind": "AuthorizationPolicy", "metadata": metadata}
    return json.dumps({**of, "spec": spec})


def rules(*rules: Any, **spec: Any) -> str:
    return document({"rules": list(rules), **spec})


def source(**source: Any) -> dict[str, Any]:
    return {"from": [{"source": source}]}


def operation(**operation: Any) -> dict[str, Any]:
    return {"to": [{"operation": operation}]}


def when(key: str, *values: str, **rest: Any) -> dict[str, Any]:
    return {"when": [{"key": key, "values": list(values), **rest}]}


def policy(text: str) -> AuthorizationPolicy:
    loaded = load(text, "f.yaml", {})
    (found,) = loaded.objects
    assert isinstance(found.object, AuthorizationPolicy)
    return found.object


def test_what_a_policy_says() -> None:
    spec = policy(
        rules({**source(ipBlocks=["10.0.0.0/8"]), **operation(hosts=["test.com"])}, action="DENY")
    ).spec
    (rule,) = spec.rules
    assert spec.action is Action.DENY
    assert rule.from_[0].source.ip_blocks == ("10.0.0.0/8",)
    assert rule.to[0].operation.hosts == ("test.com",)
    assert rule.when == ()


@pytest.mark.parametrize("spec", [{}, {"selector": {"matchLabels": {"app": "a"}}}])
def test_without_rules_a_policy_allows_nothing(spec: dict[str, Any]) -> None:
    """A spec may be empty, as in Istio's example 'allow-nothing'."""
    assert policy(document(spec)).spec.action is Action.ALLOW
    assert policy(document(spec)).spec.rules == ()


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_versions_of_istio(problems: Problems, version: str) -> None:
    assert problems(document({"rules": [{}]}, version=version)) == []


def test_a_version_that_istio_does_not_serve(problems: Problems) -> None:
    (problem,) = problems(document({"rules": [{}]}, version="v1alpha1"))
    assert "must be security.istio.io/v1 or security.istio.io/v1beta1" in problem


FULL_SOURCE = {
    "principals": ["principal", "principal-prefix-*", "*-suffix-principal", "*"],
    "requestPrincipals": ["requestPrincipals", "prefix-*", "*-suffix", "*", "https://example.com/*"],
    "namespaces": ["ns", "ns-prefix-*", "*-ns-suffix", "*"],
    "ipBlocks": ["1.2.3.4", "5.6.0.0/16", "::1", "2001:db8::/32"],
    "remoteIpBlocks": ["1.2.3.4", "5.6.7.8/16"],
    "trustDomains": ["cluster.local", "cluster-prefix-*", "*-suffix-cluster", "*"],
    "notPrincipals": ["a"],
    "notRequestPrincipals": ["a"],
    "notNamespaces": ["a"],
    "notIpBlocks": ["9.0.0.1"],
    "notRemoteIpBlocks": ["9.2.0.0/16"],
    "notTrustDomains": ["a"],
}
FULL_OPERATION = {
    "methods": ["method", "method-prefix-*", "*-suffix-method", "*"],
    "hosts": ["exact.com", "*.suffix.com", "prefix.*", "*"],
    "ports": ["80", "0", "65535"],
    "paths": ["/exact", "/prefix/*", "*/suffix", "*", "/path/template/{*}", "/{**}/path/template", "/a/{*}/"],
    "notMethods": ["a"],
    "notHosts": ["a"],
    "notPorts": ["8000"],
    "notPaths": ["/not-path/template/{*}", "/{**}/not-path/template", "/a/{*}/b/{**}"],
}


@pytest.mark.parametrize(
    "spec",
    [
        {"rules": [{**source(**FULL_SOURCE), **operation(**FULL_OPERATION)}]},
        {"rules": [{}]},
        {"rules": [source(serviceAccounts=["baz/sa", "sa"])]},
        {"rules": [source(serviceAccounts=[f"sa{n}" for n in range(16)], notServiceAccounts=["ns/other"])]},
        {"rules": [{"from": [{"source": {"serviceAccounts": ["a"]}}, {"source": {"namespaces": ["b"]}}]}]},
        {"action": "DENY", "rules": [{}]},
        {"action": "AUDIT", "rules": [{}]},
        {"action": "AUDIT"},
        {"action": "CUSTOM", "provider": {"name": "my-custom-authz"}, "rules": [{}]},
        {"action": "CUSTOM", "provider": {"name": "a"}, "rules": [source(ipBlocks=["1.1.1.1"])]},
        {"action": "CUSTOM", "provider": {"name": "a"}, "rules": [source(remoteIpBlocks=["1.1.1.1"])]},
        {"action": "CUSTOM", "provider": {"name": "a"}, "rules": [when("source.ip", "1.1.1.1")]},
        {"selector": {"matchLabels": {"app": "httpbin", "version": ""}}, "rules": [{}]},
        {"targetRefs": [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "g"}]},
    ],
)
def test_what_istio_takes(problems: Problems, spec: Any) -> None:
    assert problems(document(spec)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("request.headers[X-header]", "header-prefix-*"),
        ("request.headers[:method]", "GET"),
        ("source.ip", "192.168.10.0/24"),
        ("remote.ip", "10.10.10.10"),
        ("source.namespace", "*-ns-suffix"),
        ("source.principal", "principal"),
        ("source.serviceAccount", "ns/sa"),
        ("source.trustDomain", "*bar"),
        ("request.auth.principal", "https://example.com/*"),
        ("request.auth.audiences", "audiences"),
        ("request.auth.presenter", "presenter"),
        ("request.auth.claims[iss]", "*-suffix-iss"),
        ("request.auth.claims[nested1][nested2]", "nested"),
        ("destination.ip", "10.10.10.10"),
        ("destination.port", "91"),
        ("connection.sni", "*.suffix.com"),
        ("experimental.envoy.filters.a.b[c]", "[exact]"),
    ],
)
def test_attributes_of_conditions(problems: Problems, key: str, value: str) -> None:
    assert problems(rules(when(key, value))) == []
    assert problems(rules({"when": [{"key": key, "notValues": [value]}]})) == []


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (
            {"action": "DENY"},
            f"spec.rules: DENY {NEVER_TRIGGERED}",
        ),
        (
            {"action": "CUSTOM", "provider": {"name": "a"}},
            f"spec.rules: CUSTOM {NEVER_TRIGGERED}",
        ),
        ({"action": "CUSTOM", "rules": [{}]}, "spec.provider.name: `provider.name` must not be empty"),
        (
            {"action": "CUSTOM", "provider": {}, "rules": [{}]},
            "spec.provider.name: `provider.name` must not be empty",
        ),
        (
            {"provider": {"name": "a"}, "rules": [{}]},
            "spec.provider: `provider` must not be with non CUSTOM action, found ALLOW",
        ),
        ({"action": "BLOCK"}, "spec.action: must be 'ALLOW', 'DENY', 'AUDIT' or 'CUSTOM'"),
        ({"rules": [{"from": []}]}, "spec.rules[0].from: must not be empty"),
        ({"rules": [{"to": []}]}, "spec.rules[0].to: must not be empty"),
        ({"rules": [{"from": [{}]}]}, "spec.rules[0].from[0].source: is missing"),
        ({"rules": [{"to": [{}]}]}, "spec.rules[0].to[0].operation: is missing"),
        ({"rules": [source()]}, "spec.rules[0].from[0].source: `from.source` must not be empty"),
        ({"rules": [source(ipBlocks=[])]}, "spec.rules[0].from[0].source: `from.source` must not be empty"),
        ({"rules": [operation()]}, "spec.rules[0].to[0].operation: `to.operation` must not be empty"),
        (
            {"rules": [source(serviceAccounts=["bar/sa"], namespaces=["bar"])]},
            "spec.rules[0].from[0].source: cannot set serviceAccounts with namespaces or principals",
        ),
        (
            {"rules": [source(notServiceAccounts=["bar/sa"], notPrincipals=["bar"])]},
            "spec.rules[0].from[0].source: cannot set serviceAccounts with namespaces or principals",
        ),
        (
            {"rules": [source(serviceAccounts=[f"sa{n}" for n in range(17)])]},
            "spec.rules[0].from[0].source.serviceAccounts: may not have more than 16 values",
        ),
        ({"rules": [source(ipBlock=["1.1.1.1"])]}, "unknown field, did you mean 'ipBlocks'?"),
        ({"rules": [operation(ports=[80])]}, "must be a string, but is a number: write it in quotes"),
        ({"rules": [{"when": [{"values": ["a"]}]}]}, "spec.rules[0].when[0].key: is missing"),
        ({"rules": [when("", "a")]}, "spec.rules[0].when[0].key: `key` must not be empty"),
        (
            {"rules": [{"when": [{"key": "source.ip"}]}]},
            "spec.rules[0].when[0]: at least one of `values` or `notValues` must be set for key source.ip",
        ),
        (
            {"rules": [when("source.ip", "1.1.1.1", "a.b.c.d")]},
            "spec.rules[0].when[0].values[1]: bad IP address (a.b.c.d)",
        ),
        (
            {"rules": [{"when": [{"key": "source.ip", "notValues": ["1.1.1.1/99"]}]}]},
            "spec.rules[0].when[0].notValues[0]: bad CIDR range (1.1.1.1/99)",
        ),
        (
            {"rules": [when("source.serviceAccount", *(f"sa{n}" for n in range(17)))]},
            "spec.rules[0].when[0].values: may not have more than 16 values",
        ),
        (
            {"selector": {"matchLabels": {"app": "*"}}},
            'spec.selector.matchLabels.app: wildcard is not supported in selector: "app=*"',
        ),
        (
            {"selector": {}, "targetRefs": [{"kind": "Service", "name": "a"}]},
            "spec: only one of targetRefs or workloadSelector can be set",
        ),
        ({"rules": [{"from": None}]}, "spec.rules[0].from: must not be null: give it a value or remove it"),
        ({"rules": [None]}, "spec.rules[0]: must not be null: give it a value or remove it"),
    ],
)
def test_what_istio_refuses(problems: Problems, spec: Any, problem: str) -> None:
    (found,) = problems(document(spec))
    assert found.startswith(PREFIX)
    assert problem in found


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("request.headers[]", "a", "bad key (request.headers[]): should have format a[b]"),
        ("request.headers", "a", "bad key (request.headers): should have format a[b]"),
        ("request.headers[a][b]", "a", "bad key (request.headers[a][b]): should have format a[b]"),
        ("request.headers[not a header]", "a", "is not the name of a header"),
        ("request.auth.claims[]", "a", "bad key (request.auth.claims[]): should have format a[b]"),
        ("request.auth.claims[a][]", "a", "bad key (request.auth.claims[a][]): should have format a[b]"),
        ("experimental.envoy.filters.a.b.x", "a", "should have format a[b]"),
        ("source.user", "a", "unknown attribute: source.user"),
        ("request.auth", "a", "unknown attribute: request.auth"),
        (
            "destination.labels[app]",
            "a",
            "attribute destination.labels[app] is replaced by the workload selector",
        ),
        (
            "destination.namespace",
            "a",
            "attribute destination.namespace is replaced by the metadata.namespace",
        ),
        ("destination.user", "a", "deprecated attribute destination.user: only supported in v1alpha1"),
        ("destination.name", "a", "deprecated attribute destination.name: only supported in v1alpha1"),
        ("destination.port", "x", "bad port (x)"),
        ("destination.ip", "a", "bad IP address (a)"),
        ("request.headers[a]", "", "empty value not allowed"),
        ("source.trustDomain", "fo*-bar", 'wildcard is only allowed at the start or end, found "fo*-bar"'),
        ("source.trustDomain", "*fo*", 'at most one wildcard is allowed, found "*fo*"'),
        (
            "source.serviceAccount",
            "too/many/slashes",
            "expected format 'serviceAccount' or 'namespace/serviceAccount', found \"too/many/slashes\"",
        ),
    ],
)
def test_conditions_that_istio_refuses(problems: Problems, key: str, value: str, problem: str) -> None:
    (found,) = problems(rules(when(key, value)))
    assert problem in found


@pytest.mark.parametrize("member", [*FULL_SOURCE, "serviceAccounts", "notServiceAccounts"])
def test_an_empty_value_of_a_source(problems: Problems, member: str) -> None:
    (found,) = problems(rules(source(**{member: [""]})))
    assert found == f"{PREFIX}spec.rules[0].from[0].source.{member}[0]: empty value not allowed"


@pytest.mark.parametrize("member", FULL_OPERATION)
def test_an_empty_value_of_an_operation(problems: Problems, member: str) -> None:
    (found,) = problems(rules(operation(**{member: [""]})))
    assert found == f"{PREFIX}spec.rules[0].to[0].operation.{member}[0]: empty value not allowed"


@pytest.mark.parametrize(
    "text",
    ["1.2.3", "1.2.3.4/33", "1.2.3.4/", "1.2.3.4/08", "1.2.3.4/255.0.0.0", "::1%eth0", "1.2.3.4/-1", "a/8"],
)
def test_what_is_no_address_range(problems: Problems, text: str) -> None:
    (found,) = problems(rules(source(ipBlocks=[text])))
    assert f"({text})" in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.1.2.3", ("10.1.2.3", 32)),
        ("10.1.2.3/16", ("10.1.2.3", 16)),
        ("0.0.0.0/0", ("0.0.0.0", 0)),  # noqa: S104 - a range, no address to listen on
        ("2001:DB8::1", ("2001:db8::1", 128)),
        ("2001:db8::/32", ("2001:db8::", 32)),
    ],
)
def test_an_address_is_a_range_of_one(text: str, expected: tuple[str, int]) -> None:
    assert address_range(text) == expected


@pytest.mark.parametrize("text", ["http", "-1", "+80", "65536", "8 0"])
def test_what_is_no_port(problems: Problems, text: str) -> None:
    (found,) = problems(rules(operation(notPorts=[text])))
    assert f"bad port ({text})" in found


@pytest.mark.parametrize(
    "rule",
    [
        *(source(**{member: ["a\ud800/"]}) for member in (*FULL_SOURCE, "serviceAccounts")),
        *(operation(**{member: ["/a\ud800"]}) for member in FULL_OPERATION),
        when("request.headers[a]", "\ud800"),
        when("source.user\ud800", "a"),
    ],
)
def test_half_a_character_is_no_text(rule: dict[str, Any]) -> None:
    """JSON can write it; there is no way to send it to an Envoy."""
    found, problems = load_object(json.loads(rules(rule)))
    assert found is None
    assert [problem.message for problem in problems] == ["is no Unicode text"]


@pytest.mark.parametrize("text", ["spiffe://cluster.local", "cluster.local/ns/foo"])
def test_a_trust_domain_is_no_identity(problems: Problems, text: str) -> None:
    (found,) = problems(rules(source(notTrustDomains=[text])))
    assert f"trust domain must not contain '/', found \"{text}\"" in found


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/foo/{**}buzz/bar", "Contains '{' or '}' beyond a supported path template"),
        ("/{*}/foo/{}/bar", "Contains '{' or '}' beyond a supported path template"),
        ("/foo/{buzz}/bar", "Contains '{' or '}' beyond a supported path template"),
        ("/foo/{buzz=*}/bar/{**}", "Contains '{' or '}' beyond a supported path template"),
        ("/{*}/foo/{*}.txt", "Contains '{' or '}' beyond a supported path template"),
        ("/foo/{*}/bar/*", "Contains segment * with invalid string literal"),
        ("/foo/{*}/bar/**/buzz", "Contains segment ** with invalid string literal"),
        ("/foo/{**}/bar/{*}", "{**} is not the last operator"),
        ("/{**}/{**}", "{**} is not the last operator"),
        # Stricter than Istio: Envoy 1.40 aborts.
        ("{*}/foo", "A path template must start with '/'"),
        ("{**}", "A path template must start with '/'"),
        ("//{*}", "with invalid string literal"),
        ("/a//{*}", "with invalid string literal"),
        ("/{*}//", "with invalid string literal"),
        (f"/{{*}}/{'a' * 256}", "must not be longer than 256 characters"),
    ],
)
def test_path_templates_that_are_refused(problems: Problems, path: str, problem: str) -> None:
    (found,) = problems(rules(operation(paths=[path])))
    assert found.startswith(f"{PREFIX}spec.rules[0].to[0].operation.paths[0]: ")
    assert problem in found


@pytest.mark.parametrize(
    ("rule", "place", "what"),
    [
        (source(principals=["a"]), "from[0].source.principals", "From.Principals"),
        (source(notPrincipals=["a"]), "from[0].source.notPrincipals", "From.NotPrincipals"),
        (source(requestPrincipals=["a"]), "from[0].source.requestPrincipals", "From.RequestPrincipals"),
        (source(namespaces=["a"]), "from[0].source.namespaces", "From.Namespaces"),
        (source(serviceAccounts=["a"]), "from[0].source.serviceAccounts", "From.ServiceAccounts"),
        (source(notTrustDomains=["a"]), "from[0].source.notTrustDomains", "From.NotTrustDomains"),
        (when("source.namespace", "a"), "when[0].key", "source.namespace"),
        (when("source.serviceAccount", "a"), "when[0].key", "source.serviceAccount"),
        (when("source.trustDomain", "a"), "when[0].key", "source.trustDomain"),
        (when("source.principal", "a"), "when[0].key", "source.principal"),
        (when("request.auth.principal", "a"), "when[0].key", "request.auth.principal"),
        (when("request.auth.claims[a]", "a"), "when[0].key", "request.auth.claims[a]"),
    ],
)
def test_custom_knows_no_identities(problems: Problems, rule: Any, place: str, what: str) -> None:
    """It is asked before certificates and tokens are looked at."""
    (found,) = problems(rules(rule, action="CUSTOM", provider={"name": "a"}))
    assert found == f"{PREFIX}spec.rules[0].{place}: {what} is currently not supported with CUSTOM action"


@pytest.mark.parametrize(
    ("value", "expected"), [("true", True), ("T", True), ("1", True), ("false", False), ("0", False)]
)
@pytest.mark.parametrize("action", ["ALLOW", "DENY"])
def test_dry_run(value: str, expected: bool, action: str) -> None:
    text = document({"action": action, "rules": [{}]}, {"istio.io/dry-run": value})
    assert policy(text).dry_run is expected


def test_dry_run_is_true_or_false(problems: Problems) -> None:
    (found,) = problems(document({"rules": [{}]}, {"istio.io/dry-run": "yes"}))
    assert "istio.io/dry-run" in found
    assert "invalid value (yes), must be 'true' or 'false'" in found


@pytest.mark.parametrize("action", ["AUDIT", "CUSTOM"])
def test_dry_run_is_for_allow_and_deny(problems: Problems, action: str) -> None:
    provider = {"provider": {"name": "a"}} if action == "CUSTOM" else {}
    text = document({"action": action, "rules": [{}], **provider}, {"istio.io/dry-run": "true"})
    (found,) = problems(text)
    assert f"currently only supports action ALLOW/DENY, found {action}" in found


@pytest.mark.parametrize(
    ("spec", "warning"),
    [
        ({"selector": {}}, "spec.selector: workload selector specified without labels"),
        (
            {"rules": [source(ipBlocks=["1.1.1.1"], namespaces=[])]},
            "spec.rules[0].from[0].source.namespaces: is an empty list and has no effect",
        ),
        (
            {"action": "DENY", "rules": [operation(paths=["/v1/chat/completions"])]},
            "spec.rules[0].to[0].operation.paths: an LLM is served at '/' and at every path that ends in",
        ),
        (
            {"rules": [operation(notPaths=["/v1/chat/completions"])]},
            "spec.rules[0].to[0].operation.notPaths: an LLM is served at '/' and at every path that ends in",
        ),
        (
            {"rules": [operation(hosts=["a.com", "a.com:*"])]},
            "spec.rules[0].to[0].operation.hosts[1]: hosts are compared without port",
        ),
        (
            {"rules": [when("request.headers[:authority]", "a.com")]},
            "spec.rules[0].when[0].key: compares letter by letter, 'hosts' of an operation does not",
        ),
    ],
)
def test_what_is_warned_of(problems: Problems, spec: Any, warning: str) -> None:
    (found,) = problems(document(spec))
    assert found.startswith(f"warning: {PREFIX}{warning}")


def test_the_ip_blocks_of_a_file_may_be_placeholders() -> None:
    """Seed 004 writes `ipBlocks: [${本机IP}]`."""
    text = rules(source(ipBlocks=["${本机IP}"]), action="DENY")
    (found,) = load(text, "f.yaml", {"本机IP": "127.0.0.1"}).objects
    assert isinstance(found.object, AuthorizationPolicy)
    assert found.object.spec.rules[0].from_[0].source.ip_blocks == ("127.0.0.1",)
    assert not load(text, "f.yaml", {}).objects


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("test.com", "test.com"),
        ("test.com:80", "test.com"),
        ("test.com:*", "test.com"),
        ("test.com.", "test.com"),
        ("test.com.:80", "test.com"),
        ("*.com:8080", "*.com"),
        ("*:8080", "*"),
        ("[::1]:80", "[::1]"),
        ("[::1]", "[::1]"),
    ],
)
def test_a_host_without_its_port(host: str, expected: str) -> None:
    assert without_port(host) == expected


def test_the_status_codes_are_envoys() -> None:
    values = protos.POOL.FindEnumTypeByName("envoy.type.v3.StatusCode").values
    assert {value.number for value in values} - {0} == STATUS_CODES
