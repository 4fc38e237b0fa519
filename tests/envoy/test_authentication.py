"""RequestAuthentication on a real gateway: which tokens pass, what the others hear, and what goes on."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

from llmplane.fakellm import fingerprint
from tests.envoy.conftest import DASHSCOPE, KEYS, Lab
from tests.envoy.gateway import Gateway
from tests.support.client import Answer
from tests.support.policies import authorization_policy, request_authentication
from tests.support.tokens import Issuer, KeyServer, running_key_server

ISSUER = Issuer("https://issuer.example.com")
OTHER = Issuer("https://other.example.com")
INLINE = {"issuer": ISSUER.name, "jwks": ISSUER.jwks}
NEEDS_TOKEN = authorization_policy({"from": [{"source": {"requestPrincipals": ["*"]}}]})


@pytest.fixture
def keys() -> Iterator[KeyServer]:
    with running_key_server() as server:
        yield server


@pytest.fixture
def gateway(gateway_lab: Lab) -> Gateway:
    return Gateway(gateway_lab)


def refused(answer: Answer) -> tuple[int, str]:
    """Return status and reason of an answer that refuses a token."""
    assert (answer.error["type"], answer.error["code"]) == ("authentication_error", "invalid_token")
    return answer.status, answer.error["message"]


def test_a_good_token_passes_and_does_not_reach_the_provider(gateway: Gateway) -> None:
    gateway.apply(request_authentication(INLINE))
    token = ISSUER.token()
    assert gateway.ask(token=token).status == 200
    seen = gateway.lab.seen()
    assert token not in str(seen.headers)
    assert seen.key_fingerprint == fingerprint(KEYS[DASHSCOPE])


@pytest.mark.parametrize(
    ("token", "status", "reason"),
    [
        (ISSUER.token(exp=1), 401, "Jwt is expired"),
        (ISSUER.token(nbf=4102444000), 401, "Jwt not yet valid"),
        (OTHER.token(), 401, "Jwt issuer is not configured"),
        (OTHER.token(iss=ISSUER.name), 401, "Jwt verification fails"),
        (
            "not-a-token",
            401,
            "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
        ),
    ],
)
def test_a_bad_token_is_refused_with_envoys_reason_in_openais_form(
    gateway: Gateway, token: str, status: int, reason: str
) -> None:
    gateway.apply(request_authentication(INLINE))
    answer = gateway.ask(token=token)
    assert refused(answer) == (status, reason)
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]


def test_a_token_for_somebody_else_is_refused(gateway: Gateway) -> None:
    gateway.apply(request_authentication({**INLINE, "audiences": ["llm"]}))
    assert gateway.ask(token=ISSUER.token(aud=["llm", "web"])).status == 200
    assert refused(gateway.ask(token=ISSUER.token(aud="web"))) == (403, "Audiences in Jwt are not allowed")
    assert refused(gateway.ask(token=ISSUER.token())) == (403, "Audiences in Jwt are not allowed")


def test_a_missing_token_passes_unless_a_policy_wants_one(gateway: Gateway) -> None:
    """As in Istio: checking tokens and demanding them are two policies."""
    gateway.apply(request_authentication(INLINE))
    assert gateway.ask().status == 200
    gateway.apply(request_authentication(INLINE), NEEDS_TOKEN)
    assert (gateway.ask().status, gateway.ask().body) == (403, b"RBAC: access denied")
    assert gateway.ask(token=ISSUER.token()).status == 200


def test_a_rule_can_demand_a_token_itself(gateway: Gateway) -> None:
    gateway.apply(request_authentication({**INLINE, "presence": "REQUIRED"}))
    assert refused(gateway.ask()) == (401, "Jwt is missing")
    assert gateway.ask(token=ISSUER.token()).status == 200


def test_of_two_issuers_one_must_have_made_the_token(gateway: Gateway) -> None:
    gateway.apply(
        request_authentication(INLINE),
        request_authentication({"issuer": OTHER.name, "jwks": OTHER.jwks}, name="istio-system/others"),
    )
    assert gateway.ask(token=ISSUER.token()).status == 200
    assert gateway.ask(token=OTHER.token()).status == 200
    assert gateway.ask().status == 200
    assert gateway.ask(token=Issuer("https://third.example.com").token()).status == 401
    assert gateway.ask(token=ISSUER.token(iss=OTHER.name)).status == 401


def test_claims_decide_in_an_authorization_policy(gateway: Gateway) -> None:
    wants = {"when": [{"key": "request.auth.claims[groups]", "values": ["llm-users"]}]}
    gateway.apply(request_authentication(INLINE), authorization_policy(wants))
    assert gateway.ask(token=ISSUER.token(groups=["web", "llm-users"])).status == 200
    assert gateway.ask(token=ISSUER.token(groups="llm-users")).status == 200
    assert gateway.ask(token=ISSUER.token(groups=["web"])).status == 403
    assert gateway.ask().status == 403
    nested = {"when": [{"key": "request.auth.claims[org][team]", "values": ["ml"]}]}
    gateway.apply(request_authentication(INLINE), authorization_policy(nested))
    assert gateway.ask(token=ISSUER.token(org={"team": "ml"})).status == 200
    assert gateway.ask(token=ISSUER.token(org={"team": "web"})).status == 403


def test_the_principal_is_issuer_and_subject(gateway: Gateway) -> None:
    wants = {"from": [{"source": {"requestPrincipals": [f"{ISSUER.name}/alice"]}}]}
    gateway.apply(request_authentication(INLINE), authorization_policy(wants))
    assert gateway.ask(token=ISSUER.token(sub="alice")).status == 200
    assert gateway.ask(token=ISSUER.token(sub="mallory")).status == 403


def test_words_of_a_scope_are_claims_each(gateway: Gateway) -> None:
    wants = {"when": [{"key": "request.auth.claims[scope]", "values": ["chat"]}]}
    gateway.apply(request_authentication(INLINE), authorization_policy(wants))
    assert gateway.ask(token=ISSUER.token(scope="profile chat")).status == 200
    assert gateway.ask(token=ISSUER.token(scope="profile")).status == 403


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize(
    ("place", "path", "headers"),
    [
        ({}, "/", {"authorization": "Bearer {}"}),
        ({}, "/?access_token={}&a=b", {}),
        ({"fromHeaders": [{"name": "X-Token", "prefix": "Token "}]}, "/", {"x-token": "Token {}"}),
        ({"fromHeaders": [{"name": "x-token"}]}, "/", {"x-token": "{}"}),
        ({"fromParams": ["token"]}, "/?a=b&token={}", {}),
        ({"fromCookies": ["token"]}, "/", {"cookie": "a=b; token={}"}),
    ],
)
def test_wherever_a_token_is_no_provider_gets_it(
    gateway: Gateway, place: dict[str, Any], path: str, headers: dict[str, str], forward: bool
) -> None:
    rule = {**INLINE, **place, "forwardOriginalToken": forward}
    gateway.apply(request_authentication(rule), NEEDS_TOKEN)
    token = ISSUER.token()
    filled = {name: value.format(token) for name, value in headers.items()}
    path = path.format(token)
    assert gateway.ask(filled, path=path).status == 200
    # A request that keeps its query: any operation whose body is not spliced.
    assert gateway.get(f"/models{path[1:]}", filled).status == 200
    for seen in gateway.lab.all_seen():
        assert token not in f"{seen.path}{seen.headers}"


def test_a_second_token_that_no_rule_needed_does_not_leave_either(gateway: Gateway) -> None:
    gateway.apply(
        request_authentication(
            {**INLINE, "fromHeaders": [{"name": "x-a"}]},
            {"issuer": OTHER.name, "jwks": OTHER.jwks, "fromHeaders": [{"name": "x-b"}]},
        )
    )
    assert gateway.ask({"x-a": ISSUER.token(), "x-b": "whatever"}).status == 200
    assert "whatever" not in str(gateway.lab.seen().headers)


def test_claims_become_headers_that_clients_cannot_set(gateway: Gateway) -> None:
    gateway.apply(
        request_authentication(
            {
                **INLINE,
                "outputClaimToHeaders": [{"header": "x-user", "claim": "sub"}],
                "outputPayloadToHeader": "x-claims",
            }
        )
    )
    assert gateway.ask({"x-user": "root", "x-claims": "e30"}, token=ISSUER.token(sub="alice")).status == 200
    headers = {name.lower(): value for name, value in gateway.lab.seen().headers}
    assert headers["x-user"] == "alice"
    payload = headers["x-claims"]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert claims["sub"] == "alice"
    assert gateway.ask({"x-user": "root", "x-claims": "e30"}).status == 200
    assert not {"x-user", "x-claims"} & {name.lower() for name, _ in gateway.lab.seen().headers}


def test_the_proxy_fetches_the_key_set_once(gateway: Gateway, keys: KeyServer) -> None:
    keys.texts["/keys?of=issuer"] = ISSUER.jwks
    uri = f"http://127.0.0.1:{keys.port}/keys?of=issuer"
    gateway.apply(request_authentication({"issuer": ISSUER.name, "jwksUri": uri}))
    for _ in range(3):
        assert gateway.ask(token=ISSUER.token()).status == 200
    assert gateway.ask(token=OTHER.token(iss=ISSUER.name)).status == 401
    assert keys.requests.count("/keys?of=issuer") <= 2  # in the background, and for a token that came before


def test_without_key_set_tokens_are_refused_until_it_is_there(gateway: Gateway, keys: KeyServer) -> None:
    uri = f"http://127.0.0.1:{keys.port}/keys"
    gateway.apply(request_authentication({"issuer": ISSUER.name, "jwksUri": uri}))
    assert refused(gateway.ask(token=ISSUER.token())) == (401, "Jwks remote fetch is failed")
    assert gateway.ask().status == 200
    keys.texts["/keys"] = ISSUER.jwks
    assert gateway.ask(token=ISSUER.token()).status == 200


def test_an_issuer_without_key_set_is_said_and_its_tokens_are_refused(gateway: Gateway) -> None:
    gateway.apply(request_authentication({"issuer": ISSUER.name}))
    assert gateway.ask(token=ISSUER.token()).status == 401
    assert gateway.ask().status == 200
    status, reason, message = gateway.lab.condition("tokens")
    assert (status, reason) == (False, "JwksNotFound")
    assert message.startswith("spec.jwtRules[0]: has neither jwksUri nor jwks")


def test_policies_of_other_workloads_and_namespaces_do_not_count(gateway: Gateway) -> None:
    strict = {**INLINE, "presence": "REQUIRED"}
    gateway.apply(
        request_authentication(strict, name="default/elsewhere"),
        request_authentication(strict, selector={"matchLabels": {"istio": "egressgateway"}}),
    )
    assert gateway.ask().status == 200
    gateway.apply(request_authentication(strict, name="istio-system/all", selector={"matchLabels": {}}))
    assert gateway.ask().status == 401
