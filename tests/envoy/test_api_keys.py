"""APIKeyAuthentication on a real gateway: clients with keys of their own, which nobody else ever sees."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from llmplane.fakellm import fingerprint
from tests.envoy.conftest import DASHSCOPE, KEYS, Lab
from tests.envoy.gateway import GATEWAY, Gateway
from tests.support.client import Answer
from tests.support.objects import backends, provider, route, secret
from tests.support.policies import (
    HOST,
    ROOT,
    api_key_authentication,
    authorization_policy,
    gateway,
    request_authentication,
)
from tests.support.tokens import Issuer
from translator.features import Feature

ALICE, BOB = "sk-of-alice-0123456789", "sk-of-bob-0123456789"
CLIENTS = secret(f"{ROOT}/clients", {"alice": ALICE, "bob": BOB})
POLICY = api_key_authentication("clients")
ISSUER = Issuer("https://issuer.example.com")
TOKENS = request_authentication({"issuer": ISSUER.name, "jwks": ISSUER.jwks})


@pytest.fixture
def gw(gateway_lab: Lab) -> Gateway:
    return Gateway(gateway_lab)


def sdk(gw: Gateway, key: str) -> openai.OpenAI:
    """Return OpenAI's client as an application makes it, which resolves HOST to the gateway."""
    return openai.OpenAI(
        api_key=key, base_url=f"http://{gw.address}/v1", max_retries=0, default_headers={"host": HOST}
    )


def refused(answer: Answer) -> bool:
    """Whether the answer is that of a client that is not known."""
    if answer.status != 401:
        return False
    assert answer.error == {
        "message": "There is no API key in the request, or none that this gateway knows.",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert answer.headers["www-authenticate"] == "Bearer"
    return True


@pytest.mark.parametrize("header", ["x-api-key", "authorization"])
def test_a_client_is_known_by_its_key(gw: Gateway, header: str) -> None:
    gw.apply(CLIENTS, POLICY)
    bearer = "Bearer " if header == "authorization" else ""
    assert gw.ask({header: f"{bearer}{ALICE}"}).status == 200
    seen = gw.lab.seen()
    assert ALICE not in str(seen.headers)
    assert seen.key_fingerprint == fingerprint(KEYS[DASHSCOPE])
    assert refused(gw.ask({header: f"{bearer}sk-of-mallory"}))


def test_no_key_or_one_at_another_place_is_refused(gw: Gateway) -> None:
    gw.apply(CLIENTS, POLICY)
    assert refused(gw.ask())
    assert refused(gw.ask({"api-key": ALICE}))
    assert refused(gw.ask({"x-api-key": ""}))
    assert refused(gw.ask({"x-api-key": "alice"}))
    assert refused(gw.client.request(f"{HOST}", path=f"/?key={ALICE}"))


def test_the_providers_key_is_no_key_of_a_client(gw: Gateway) -> None:
    gw.apply(CLIENTS, POLICY)
    assert refused(gw.ask({"x-api-key": KEYS[DASHSCOPE]}))


def test_openais_sdk_works_unchanged(gw: Gateway) -> None:
    gw.apply(CLIENTS, POLICY)
    made = sdk(gw, ALICE).chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
    assert made.choices[0].message.content
    with pytest.raises(openai.AuthenticationError) as error:
        sdk(gw, "sk-wrong").chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
    assert (error.value.code, error.value.type) == ("invalid_api_key", "authentication_error")


def test_policies_see_the_client_and_clients_cannot_be_another(gw: Gateway) -> None:
    only_alice = {"when": [{"key": "request.headers[x-llm-client]", "values": ["alice"]}]}
    gw.apply(CLIENTS, POLICY, authorization_policy(only_alice))
    assert gw.ask({"x-api-key": ALICE}).status == 200
    assert gw.ask({"x-api-key": BOB}).status == 403
    assert gw.ask({"x-api-key": BOB, "x-llm-client": "alice"}).status == 403
    assert "x-llm-client" not in {name.lower() for name, _ in gw.lab.seen().headers}


def test_without_policy_nobody_is_a_client_by_saying_so(gw: Gateway) -> None:
    only_alice = {"when": [{"key": "request.headers[x-llm-client]", "values": ["alice"]}]}
    gw.apply(authorization_policy(only_alice))
    assert gw.ask({"x-llm-client": "alice"}).status == 403


def test_routes_may_look_at_the_client(gw: Gateway) -> None:
    rules = [
        {"matches": [{"headers": {"x-llm-client": {"exact": "alice"}}}], "backendRefs": backends(DASHSCOPE)},
        {"backendRefs": backends("api.moonshot.cn")},
    ]
    gw.lab.apply(
        gateway(),
        provider(f"{ROOT}/one", DASHSCOPE, KEYS[DASHSCOPE]),
        provider(f"{ROOT}/two", "api.moonshot.cn", KEYS["api.moonshot.cn"]),
        route("test", HOST, *rules, gateways=[f"{ROOT}/ingress-gw"]),
        CLIENTS,
        POLICY,
    )
    gw.lab.fake.forget()
    assert gw.ask({"x-api-key": ALICE}).status == 200
    assert gw.lab.seen().host == DASHSCOPE
    assert gw.ask({"x-api-key": BOB}).status == 200
    assert gw.lab.seen().host == "api.moonshot.cn"


def test_a_key_and_a_token_are_two_proofs(gw: Gateway) -> None:
    """A token in Authorization, the key in x-api-key; a key in Authorization is not taken for a token."""
    demands = authorization_policy({"from": [{"source": {"requestPrincipals": ["*"]}}]})
    gw.apply(CLIENTS, POLICY, TOKENS)
    token = f"Bearer {ISSUER.token()}"
    assert gw.ask({"x-api-key": ALICE, "authorization": token}).status == 200
    assert gw.ask({"authorization": f"Bearer {ALICE}"}).status == 200
    assert gw.ask({"x-api-key": ALICE, "authorization": f"Bearer {ALICE}"}).status == 200
    assert gw.ask({"x-api-key": ALICE, "authorization": "Bearer a.b.c"}).error["code"] == "invalid_token"
    assert refused(gw.ask({"authorization": token}))
    assert all(ALICE not in str(seen.headers) for seen in gw.lab.all_seen())
    gw.apply(CLIENTS, POLICY, TOKENS, demands)
    assert gw.ask({"x-api-key": ALICE, "authorization": token}).status == 200
    assert gw.ask({"authorization": f"Bearer {ALICE}"}).status == 403


def test_other_headers_can_hold_the_key(gw: Gateway) -> None:
    policy = api_key_authentication("clients", fromHeaders=[{"name": "X-Goog-Api-Key"}, {"name": "my-key"}])
    gw.apply(CLIENTS, policy)
    assert gw.ask({"x-goog-api-key": ALICE}).status == 200
    assert gw.ask({"my-key": ALICE, "x-other": BOB}).status == 200
    assert all(ALICE not in str(seen.headers) for seen in gw.lab.all_seen())
    assert refused(gw.ask({"x-api-key": ALICE}))


def test_a_missing_secret_denies_its_clients_and_is_said(gw: Gateway) -> None:
    gw.apply(api_key_authentication("missing"))
    assert refused(gw.ask({"x-api-key": ALICE}))
    assert refused(gw.ask())
    assert gw.lab.condition("clients") == (
        False,
        "KeysNotUsable",
        (
            "spec.credentialRefs[0].name: Secret istio-system/missing does not exist;"
            " its clients are answered 401"
        ),
    )
    gw.apply(CLIENTS, api_key_authentication("missing", "clients"))
    assert gw.ask({"x-api-key": ALICE}).status == 200


def test_a_key_of_two_clients_is_that_of_the_first_and_is_said(gw: Gateway) -> None:
    again = secret(f"{ROOT}/again", {"carol": ALICE})
    only_alice = {"when": [{"key": "request.headers[x-llm-client]", "values": ["alice"]}]}
    gw.apply(CLIENTS, again, api_key_authentication("clients", "again"), authorization_policy(only_alice))
    assert gw.ask({"x-api-key": ALICE}).status == 200
    _, reason, message = gw.lab.condition("clients")
    assert reason == "KeysNotUsable"
    assert message == (
        "spec.credentialRefs[1].name: client 'carol' of Secret istio-system/again"
        " has the key of client 'alice' of Secret istio-system/clients,"
        " whose requests its requests are taken for"
    )


@pytest.mark.needs(Feature.FILTER_CHAIN)
def test_keys_change_at_once_and_cut_no_stream(gw: Gateway) -> None:
    """A client with two keys: the old one goes on until it is taken away."""
    gw.lab.fake.set_fault(DASHSCOPE, None)
    gw.apply(CLIENTS, POLICY)
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": True}).encode()
    with gw.client.open(HOST, body, {"x-api-key": ALICE}) as response:
        assert response.status == 200
        first = response.read(1)
        new = secret(f"{ROOT}/new", {"alice": "sk-of-alice-new"})
        gw.apply(CLIENTS, new, api_key_authentication("clients", "new"))
        assert gw.ask({"x-api-key": "sk-of-alice-new"}).status == 200
        assert gw.ask({"x-api-key": ALICE}).status == 200
        gw.apply(new, api_key_authentication("new"))
        assert refused(gw.ask({"x-api-key": ALICE}))
        assert gw.ask({"x-api-key": "sk-of-alice-new"}).status == 200
        assert b"[DONE]" in first + response.read()
    stats = gw.admin("/stats?filter=total_filter_chains_draining")
    assert stats.split() == ["listener_manager.total_filter_chains_draining:", "0"]


def test_a_thousand_clients(gw: Gateway) -> None:
    keys = {f"client-{number}": f"sk-{number:04}-of-a-client" for number in range(1000)}
    gw.apply(secret(f"{ROOT}/clients", keys), POLICY)
    some = [key for number, key in enumerate(keys.values()) if number % 100 == 99]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda key: gw.ask({"x-api-key": key}), some))
    assert {answer.status for answer in answers} == {200}
    assert refused(gw.ask({"x-api-key": "sk-1000-of-a-client"}))


def test_no_key_shows_anywhere(gw: Gateway) -> None:
    gw.apply(CLIENTS, POLICY)
    assert gw.ask({"x-api-key": ALICE}).status == 200
    envoy = gw.admin("/config_dump?include_eds")
    assert '"key": "[redacted]"' in envoy
    assert ALICE not in envoy
    assert ALICE not in gw.lab.mesh.log(GATEWAY)
    assert ALICE not in gw.lab.mesh.log("control-plane")
    for path in gw.lab.mesh.directory.rglob("*.json"):
        assert ALICE not in path.read_text(encoding="utf-8"), path
    state = Path(gw.lab.mesh.directory)
    assert all(ALICE not in file.read_text(errors="replace") for file in state.rglob("*") if _is_state(file))


def _is_state(file: Path) -> bool:
    return file.is_file() and file.name != "objects.yaml" and not file.is_symlink()
