"""Tokens and API keys in a gateway's configuration: which policies count, what is removed, in which order."""

from typing import Any

import pytest

from crds.core import Secret
from crds.problems import ObjectKey
from tests.support.objects import backends, provider, route, secret, world
from tests.support.policies import (
    ROOT,
    api_key_authentication,
    gateway,
    request_authentication,
)
from translator import api_keys, authentication, policies
from translator.proxy import Proxy, ProxyType
from translator.translate import Translator
from translator.world import World
from xds import protos
from xds.resources import ECDS, LDS, RDS, Resource

GATEWAY = Proxy(ProxyType.ROUTER, ROOT, "gateway", frozenset({("istio", "ingressgateway")}))
SIDECAR = Proxy(ProxyType.SIDECAR, ROOT, "sleep", frozenset({("istio", "ingressgateway")}))
OLD = Proxy(ProxyType.ROUTER, ROOT, "gateway", frozenset({("istio", "ingressgateway")}), version=(1, 38))
LIMITS = [policies.RATE_LIMITS, policies.COUNTS, policies.SERVICES]
KEYS = secret(f"{ROOT}/clients", {"alice": "sk-alice", "bob": "Bearer sk-bob"})
POLICY = api_key_authentication("clients")


def rule(issuer: str, **members: Any) -> dict[str, Any]:
    return {"issuer": issuer, "jwksUri": f"https://{issuer}/keys", **members}


def jwt(of: World, proxy: Proxy = GATEWAY) -> Any:
    (made,) = authentication.filters(of, proxy)
    return protos.JwtAuthentication.FromString(made["typed_config"].value)


def test_rules_of_all_policies_that_select_a_gateway_are_sorted_by_issuer() -> None:
    found = world(
        request_authentication(rule("c.com"), rule("a.com")),
        request_authentication(rule("b.com"), name=f"{ROOT}/all", selector={"matchLabels": {}}),
        request_authentication(rule("d.com"), name="default/elsewhere"),
        request_authentication(rule("e.com"), name=f"{ROOT}/e", selector={"matchLabels": {"a": "b"}}),
    )
    providers = jwt(found).providers
    assert {name: providers[name].issuer for name in providers} == {
        "origins-0": "a.com",
        "origins-1": "b.com",
        "origins-2": "c.com",
    }
    assert [str(key) for key in authentication.objects(found, GATEWAY)] == [
        "RequestAuthentication istio-system/all",
        "RequestAuthentication istio-system/tokens",
    ]
    assert {service.host for service in authentication.services(found, GATEWAY)} == {
        "a.com",
        "b.com",
        "c.com",
    }


def test_a_sidecar_has_no_policies() -> None:
    """They are for requests that come in, and a sidecar here only sends some out."""
    found = world(request_authentication(rule("a.com")), KEYS, POLICY)
    assert [place["name"] for place in policies.filters(found, SIDECAR)] == LIMITS
    assert [resource.name for resource, _ in policies.resources(found, SIDECAR)] == LIMITS
    assert list(policies.services(found, SIDECAR)) == []


@pytest.mark.parametrize(
    ("rules", "headers", "params"),
    [
        ([rule("a")], (), ("access_token",)),
        ([rule("a", fromHeaders=[{"name": "X-A"}])], ("x-a",), ()),
        ([rule("a", fromParams=["t"]), rule("b")], (), ("t", "access_token")),
        ([rule("a", fromCookies=["c"])], (), ()),
    ],
)
def test_where_tokens_may_be_is_removed(
    rules: list[dict[str, Any]], headers: tuple[str, ...], params: tuple[str, ...]
) -> None:
    assert authentication.removals(world(request_authentication(*rules)), GATEWAY) == (headers, params)


def test_the_keys_of_secrets_by_client() -> None:
    found = world(KEYS, POLICY)
    (policy,) = found.api_key_authentications[ROOT]
    assert api_keys.credentials(found, [policy]).clients == {"sk-alice": "alice", "sk-bob": "bob"}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "is empty"),
        ("a b", "must be visible ASCII characters, without spaces inside"),
        ("a\r\nx-llm-client: root", "must be visible ASCII characters, without spaces inside"),
    ],
)
def test_a_key_that_no_header_can_hold_is_left_out_and_not_shown(value: str, problem: str) -> None:
    found = world(secret(f"{ROOT}/clients", {"alice": value}), POLICY)
    (policy,) = found.api_key_authentications[ROOT]
    assert api_keys.credentials(found, [policy]).clients == {}
    (finding,) = api_keys.findings(found)[policy.key]
    assert finding.message == (
        f"the key of client 'alice' of Secret istio-system/clients {problem}; the client is answered 401"
    )


def test_a_client_whose_name_no_header_can_hold_is_left_out() -> None:
    bad = Secret.model_validate(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "clients", "namespace": ROOT},
            "stringData": {"a\nb": "sk-a"},
        }
    )
    found = World.of([bad, *world(POLICY).api_key_authentications[ROOT]])
    (policy,) = found.api_key_authentications[ROOT]
    assert api_keys.credentials(found, [policy]).clients == {}
    (finding,) = api_keys.findings(found)[policy.key]
    assert "cannot be the name of a client" in finding.message


def test_the_secret_is_that_of_the_policys_namespace() -> None:
    found = world(secret("default/clients", {"alice": "sk-alice"}), POLICY)
    (policy,) = found.api_key_authentications[ROOT]
    assert api_keys.credentials(found, [policy]).clients == {}


def test_an_envoy_keeps_its_keys_while_the_secret_may_be_in_what_cannot_be_read() -> None:
    parts = [*world(POLICY).api_key_authentications[ROOT]]
    assert not api_keys.is_held(World.of(parts), GATEWAY)
    assert api_keys.is_held(World.of(parts, incomplete=True), GATEWAY)
    held = {
        resource.name: resource.held
        for resource, _ in policies.resources(World.of(parts, incomplete=True), GATEWAY)
    }
    assert held == {"api_keys": True, "policies": False, **dict.fromkeys(LIMITS, False)}


def test_the_listener_is_the_same_with_and_without_policies() -> None:
    def listeners(*documents: str) -> list[Resource]:
        found = Translator().translate(world(gateway(), *documents), GATEWAY)
        return [resource for resource in found.resources if resource.type_url == LDS]

    assert listeners() == listeners(KEYS, POLICY, request_authentication(rule("a.com"))) != []


def test_the_policies_are_the_origins_of_their_resources_alone() -> None:
    found = Translator().translate(world(gateway(), KEYS, POLICY, request_authentication(rule("a"))), GATEWAY)
    assert found.origins[ObjectKey("APIKeyAuthentication", ROOT, "clients")] == {(ECDS, "api_keys")}
    assert found.origins[ObjectKey("RequestAuthentication", ROOT, "tokens")] == {(ECDS, "policies")}


def test_an_envoy_without_chains_gets_each_filter_by_itself() -> None:
    found = world(KEYS, POLICY, request_authentication(rule("a.com")))
    names = [resource.name for resource, _ in policies.resources(found, OLD)]
    assert names == [
        "api_keys/0/api_key_auth",
        "api_keys/1/lua",
        "api_keys/2/set_filter_state",
        "policies/0/jwt_authn",
        "policies/1/header_mutation",
    ]
    assert [each["name"] for each in policies.filters(found, OLD)] == names


def routes_and_policies(*hosts: str, policy: str = "a", paths: str = "/") -> dict[tuple[str, str], Resource]:
    made = [
        protos.RouteConfiguration(
            name="r",
            virtual_hosts=[
                {"name": host, "domains": [host], "routes": [{"match": {"prefix": paths}, "redirect": {}}]}
                for host in hosts
            ],
        ),
        protos.TypedExtensionConfig(name=policy),
    ]
    resources = [Resource.of(made[0]), Resource.of(made[1], name="policies")]
    return {(resource.type_url, resource.name): resource for resource in resources}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (routes_and_policies("a", "b"), routes_and_policies("a", policy="b"), True),
        (routes_and_policies("a"), routes_and_policies(policy="b"), True),
        (routes_and_policies("a"), routes_and_policies("a", policy="b"), True),
        (routes_and_policies("a"), routes_and_policies("a", "b", policy="b"), False),
        (routes_and_policies("a", "b"), routes_and_policies("b", "c", policy="b"), False),
        (routes_and_policies("a"), routes_and_policies("a", policy="b", paths="/x"), False),
        (routes_and_policies("a", "b"), routes_and_policies("a"), False),  # the order does not matter
        ({}, routes_and_policies("a"), False),
    ],
)
def test_routes_that_only_vanish_go_before_their_policies(
    before: dict[tuple[str, str], Resource], after: dict[tuple[str, str], Resource], expected: bool
) -> None:
    assert policies.only_takes_routes_away(before, after) is expected


def test_the_routes_of_a_gateway_can_be_compared() -> None:
    objects = [gateway(), provider(f"{ROOT}/a", "a.com", "sk-a")]
    ways = {"gateways": [f"{ROOT}/ingress-gw"]}
    both = [route(name, f"{name}.com", {"backendRefs": backends("a.com")}, **ways) for name in ("one", "two")]

    def resources(*documents: str) -> dict[tuple[str, str], Resource]:
        found = Translator().translate(world(*objects, *documents), GATEWAY).resources
        return {(resource.type_url, resource.name): resource for resource in found}

    assert (RDS, "http.80") in resources(*both)
    tokens = request_authentication(rule("a.com"))
    assert policies.only_takes_routes_away(resources(*both, tokens), resources(both[0]))
    assert not policies.only_takes_routes_away(resources(both[0]), resources(*both, tokens))
