"""RequestAuthentication: what Istio's webhook and schema refuse is refused here, in Istio's words."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crds.loader import load, load_object
from crds.problems import Severity
from crds.requestauthentication import RequestAuthentication, public_jwks, split_jwks_uri

KEY = {"kty": "RSA", "n": "xAE7eB6qugXyCAG3yhh7pkDkT65pHymX", "e": "AQAB", "kid": "1"}
JWKS = json.dumps({"keys": [KEY]})
NEEDS_SCHEME = "url must have scheme http:// or https://"
NEEDS_VALUES = "outputClaimToHeaders header and claim value must be non-empty string"
PRIVATE = "contains private key material; only public keys are used for verification"
NOT_ELSEWHERE = "targetRef namespace must not be set; cross namespace referencing is not supported"
NO_KEYS = 'must be a JSON object with a list "keys" that is not empty'
GATEWAY = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "foo"}
ISSUER = {"issuer": "foo.com"}


def found(spec: Any, annotations: Any = None, version: str = "v1") -> tuple[list[str], list[str]]:
    """Return what is wrong with a policy of this spec, and what it is warned of."""
    metadata = {"name": "a", "namespace": "b", "annotations": annotations or {}}
    document = {"apiVersion": f"security.istio.io/{version}", "kind": "RequestAuthentication"}
    _, problems = load_object({**document, "metadata": metadata, "spec": spec})
    texts = [(problem.severity, f"{problem.field}: {problem.message}") for problem in problems]
    return (
        [text for severity, text in texts if severity is Severity.ERROR],
        [text for severity, text in texts if severity is Severity.WARNING],
    )


def rule(**members: Any) -> dict[str, Any]:
    return {"jwtRules": [{**ISSUER, **members}]}


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"selector": {"matchLabels": {"app": "httpbin", "version": ""}}},
        {"targetRef": GATEWAY},
        {"targetRefs": [GATEWAY]},
        {"jwtRules": [{"jwksUri": "https://foo.com/cert"}]},
        rule(),
        rule(jwks=JWKS),
        rule(jwksUri="https://foo.com"),
        rule(jwks_uri="https://foo.com"),
        rule(fromHeaders=[{"name": "x-foo", "prefix": "Bearer "}], fromCookies=["b"]),
        rule(outputClaimToHeaders=[{"header": "x-jwt_Claim", "claim": "a.b"}], presence="REQUIRED"),
        rule(timeout="5s", spaceDelimitedClaims=["custom"], audiences=["a"], outputPayloadToHeader="x-p"),
    ],
)
def test_valid(spec: Any, version: str) -> None:
    assert found(spec, version=version) == ([], [])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"jwtRules": [{}]}, "spec.jwtRules[0]: issuer or jwksUri must be non-empty string"),
        ({"jwtRules": [{"jwks": JWKS}]}, "spec.jwtRules[0]: issuer or jwksUri must be non-empty string"),
        ({"jwtRules": [None]}, "spec.jwtRules[0]: must not be null: give it a value or remove it"),
        (rule(audiences=None), "spec.jwtRules[0].audiences: must not be null: give it a value or remove it"),
        (rule(audiences=[""]), "spec.jwtRules[0].audiences[0]: audience must be non-empty string"),
        (
            rule(jwksUri="foo.com"),
            f'spec.jwtRules[0].jwksUri: URI scheme "" is not supported: {NEEDS_SCHEME}',
        ),
        (
            rule(jwksUri="ftp://foo.com"),
            f'spec.jwtRules[0].jwksUri: URI scheme "ftp" is not supported: {NEEDS_SCHEME}',
        ),
        (
            rule(jwksUri="https:///keys"),
            "spec.jwtRules[0].jwksUri: is no address of a key set: https://HOST/PATH",
        ),
        (rule(jwks="foo"), "spec.jwtRules[0].jwks: jwks parse error: is no JSON (Expecting value)"),
        (
            rule(jwks='{"keys": []}'),
            f"spec.jwtRules[0].jwks: jwks parse error: {NO_KEYS}",
        ),
        (
            rule(jwks='{"keys": [{"kty": "RSA", "e": "AQAB"}]}'),
            'spec.jwtRules[0].jwks: jwks parse error: key 0 must have a member "n" in base64url',
        ),
        (
            rule(jwks='{"keys": [{"kty": "XYZ"}]}'),
            'spec.jwtRules[0].jwks: jwks parse error: key 0 must have a "kty" of RSA, EC, OKP, oct',
        ),
        (
            rule(jwks=JWKS, jwksUri="https://a"),
            "spec.jwtRules[0].jwks: only one of jwks or jwksUri can be set",
        ),
        (
            rule(jwks_uri="https://a", jwksUri="https://b"),
            "spec.jwtRules[0].jwks_uri: only one of jwks or jwksUri can be set",
        ),
        (rule(fromHeaders=[{"prefix": "a"}]), "spec.jwtRules[0].fromHeaders[0].name: is missing"),
        (
            rule(fromHeaders=[{"name": ""}]),
            "spec.jwtRules[0].fromHeaders[0].name: location header name must be non-empty string",
        ),
        (rule(fromParams=[""]), "spec.jwtRules[0].fromParams[0]: location query must be non-empty string"),
        (
            rule(fromCookies=["", "a"]),
            "spec.jwtRules[0].fromCookies[0]: cookie name must be non-empty string",
        ),
        (
            rule(outputClaimToHeaders=[{"header": "", "claim": "sub"}]),
            f"spec.jwtRules[0].outputClaimToHeaders[0].header: {NEEDS_VALUES}",
        ),
        (
            rule(outputClaimToHeaders=[{"header": "abc%123", "claim": "sub"}]),
            "spec.jwtRules[0].outputClaimToHeaders[0].header: header name abc%123 is not a valid header name",
        ),
        (rule(timeout="apple"), "spec.jwtRules[0].timeout: must be a duration such as 10s, 1h30m or 250ms"),
        (rule(presence="MANDATORY"), "spec.jwtRules[0].presence: must be 'OPTIONAL' or 'REQUIRED'"),
        (
            rule(spaceDelimitedClaims=[""]),
            "spec.jwtRules[0].spaceDelimitedClaims[0]: must be non-empty string",
        ),
        (
            {"selector": {"matchLabels": {"a": "*"}}},
            'spec.selector.matchLabels.a: wildcard is not supported in selector: "a=*"',
        ),
        (
            {"selector": {"matchLabels": {"": "v1"}}},
            'spec.selector.matchLabels: empty key is not supported in selector: "=v1"',
        ),
        (
            {"selector": {}, "targetRef": GATEWAY},
            "spec: only one of targetRefs or workloadSelector can be set",
        ),
        (
            {"targetRef": {**GATEWAY, "namespace": "bar"}},
            f"spec.targetRef.namespace: {NOT_ELSEWHERE}",
        ),
    ],
)
def test_invalid(spec: Any, expected: str) -> None:
    assert found(spec)[0] == [expected]


@pytest.mark.parametrize("target", [{**GATEWAY, "group": "wrong"}, {**GATEWAY, "kind": "Wrong"}])
def test_a_target_of_another_kind_is_refused(target: Any) -> None:
    (text,) = found({"targetRef": target})[0]
    assert text.startswith("spec.targetRef: targetRef must be to one of ")


def test_a_policy_cannot_be_tried_only() -> None:
    assert found(rule(), {"istio.io/dry-run": "true"})[0] == [
        (
            'metadata.annotations["istio.io/dry-run"]: has unsupported annotation istio.io/dry-run, '
            "please remove the annotation"
        )
    ]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"selector": {}}, "spec.selector: workload selector specified without labels"),
        (
            rule(jwks=json.dumps({"keys": [{**KEY, "d": "AAAA"}]})),
            f"spec.jwtRules[0].jwks: jwks key at index 0 {PRIVATE}",
        ),
        (
            rule(jwks='{"keys": [{"kty": "oct", "k": "AAAA"}]}'),
            "spec.jwtRules[0].jwks: jwks key at index 0 is a secret: everyone who sees this object can sign",
        ),
        (
            rule(jwksUri="http://a"),
            "spec.jwtRules[0].jwksUri: is fetched without TLS: who can change it on the way can sign tokens",
        ),
        (
            rule(forwardOriginalToken=True),
            "spec.jwtRules[0].forwardOriginalToken: policies see the token, but it is not sent to a provider",
        ),
        (
            rule(fromParams=["token"]),
            "spec.jwtRules[0].fromParams: access logs show addresses, and so the tokens of refused requests",
        ),
    ],
)
def test_warnings(spec: Any, expected: str) -> None:
    assert found(spec) == ([], [expected])


def test_no_error_shows_a_part_of_a_key_set() -> None:
    secret = base64.urlsafe_b64encode(b"this-is-a-secret").decode()
    for jwks in (f'{{"k": "{secret}"', json.dumps({"keys": [{"kty": secret}]})):
        errors, _ = found(rule(jwks=jwks))
        assert errors
        assert secret not in str(errors)


def test_the_private_part_of_a_key_goes_to_no_proxy() -> None:
    assert public_jwks(JWKS) == JWKS
    private = {**KEY, "d": "A", "p": "B", "q": "C", "dp": "D", "dq": "E", "qi": "F"}
    assert json.loads(public_jwks(json.dumps({"keys": [private]}))) == {"keys": [KEY]}


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("https://foo.com", ("foo.com", 443, True, "/")),
        ("http://foo.com/a?b=c", ("foo.com", 80, False, "/a?b=c")),
        ("https://foo.com:8443/keys", ("foo.com", 8443, True, "/keys")),
        ("http://[::1]:8080/keys", ("::1", 8080, False, "/keys")),
    ],
)
def test_where_a_key_set_is(uri: str, expected: tuple[str, int, bool, str]) -> None:
    assert split_jwks_uri(uri) == expected


@given(st.text())
def test_any_address_is_one_or_refused(text: str) -> None:
    try:
        split_jwks_uri(text)
    except ValueError:
        return
    assert text.lower().startswith(("http://", "https://"))


def test_a_policy_selects_by_labels_or_by_the_gateway_that_a_workload_is_of() -> None:
    def policy(spec: str) -> RequestAuthentication:
        head = "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: a}\n"
        (item,) = load(f"{head}spec: {spec}", "x.yaml", {}).objects
        assert isinstance(item.object, RequestAuthentication)
        return item.object

    labels = {"istio": "ingressgateway", "gateway.networking.k8s.io/gateway-name": "foo"}
    assert policy("{}").spec.selects({}, same_namespace=False)
    selecting = policy("{selector: {matchLabels: {istio: ingressgateway}}}").spec
    assert selecting.selects(labels, same_namespace=False)
    assert not selecting.selects({}, same_namespace=True)
    targeting = policy(f"{{targetRefs: [{json.dumps(GATEWAY)}]}}").spec
    assert targeting.selects(labels, same_namespace=True)
    assert not targeting.selects(labels, same_namespace=False)
    assert not targeting.selects({"istio": "ingressgateway"}, same_namespace=True)
