"""RequestAuthentications as Envoy's JWT filter (Istio: pilot/pkg/security/authn/policy_applier.go).

A token that is there must be good, whichever policies ask for one; that one must be there is said by
`presence` or an AuthorizationPolicy. Envoy fetches key sets itself: nothing here waits for the network.
"""

import ipaddress
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

from google.protobuf.message import Message

from crds.problems import Finding, ObjectKey
from crds.requestauthentication import (
    JWTRule,
    Presence,
    RequestAuthentication,
    public_jwks,
    split_jwks_uri,
)
from translator.proxy import Proxy
from translator.services import ServiceDestination
from translator.world import World
from xds import protos

FILTER = "envoy.filters.http.jwt_authn"
PAYLOAD = "payload"
"""Where the filter's dynamic metadata hold the content of the token; AuthorizationPolicies look there."""

_FETCH_TIMEOUT = timedelta(seconds=5)
_CACHE_DURATION = timedelta(minutes=5)
_RETRY_AFTER_FAILURE = timedelta(seconds=5)
_DEFAULT_PARAM = "access_token"
"""Where Envoy looks, besides Authorization, for tokens of a rule that names no place."""
_SPACE_DELIMITED = ("permission", "scope")
_NO_KEYS = ""
"""A key set without a key: Envoy refuses every token, as Istio has it where it finds no key set."""


def filters(world: World, proxy: Proxy) -> list[dict[str, Any]]:
    """Make the filter that checks tokens, or none."""
    rules = _rules(world, proxy)
    if not rules:
        return []
    return [{"name": FILTER, "typed_config": protos.pack(jwt_authentication(rules))}]


def jwt_authentication(rules: Iterable[JWTRule]) -> Message:
    """Make the filter's configuration of rules; their order does not matter, but for equal issuers."""
    providers, singly, together = {}, [], []
    for index, rule in enumerate(sorted(rules, key=lambda rule: rule.issuer)):
        name = f"origins-{index}"
        providers[name] = _provider(rule)
        this: dict[str, Any] = {"provider_name": name}
        singly.append(this)
        if rule.presence is Presence.REQUIRED:
            together.append(this)
        else:
            together.append({"requires_any": {"requirements": [this, {"allow_missing": {}}]}})
    # One place may be that of tokens of several issuers: then a token is good if one rule takes it.
    requires = (
        together[0]
        if len(together) == 1
        else {"requires_any": {"requirements": [*singly, {"requires_all": {"requirements": together}}]}}
    )
    return protos.JwtAuthentication(
        providers=providers,
        rules=[{"match": {"prefix": "/"}, "requires": requires}],
        bypass_cors_preflight=True,
    )


def services(world: World, proxy: Proxy) -> Iterator[ServiceDestination]:
    """Return the servers that key sets are fetched from."""
    for rule in _rules(world, proxy):
        if rule.jwks_uri:
            yield _server(rule.jwks_uri)


def objects(world: World, proxy: Proxy) -> Iterator[ObjectKey]:
    """Return the policies that went into the filter."""
    for policy in _policies(world, proxy):
        yield policy.key


def removals(world: World, proxy: Proxy) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the headers and the query parameters that hold tokens, checked or not: no provider gets them.

    The filter itself removes only what it checked. Cookies and Authorization never leave anyway.
    """
    headers: dict[str, None] = {}
    params: dict[str, None] = {}
    for rule in _rules(world, proxy):
        headers.update(dict.fromkeys(header.name.lower() for header in rule.from_headers))
        params.update(dict.fromkeys(rule.from_params))
        if not (rule.from_headers or rule.from_params or rule.from_cookies):
            params[_DEFAULT_PARAM] = None
    return tuple(headers), tuple(params)


def unresolved(policy: RequestAuthentication) -> list[Finding]:
    """Say which rules have no key set. Nothing here looks one up by OpenID Connect Discovery."""
    return [
        Finding(
            ("spec", "jwtRules", index),
            "has neither jwksUri nor jwks, and the issuer is not asked for them (OpenID Connect Discovery): "
            "all its tokens are refused; set jwksUri to what "
            f"{rule.issuer.removesuffix('/')}/.well-known/openid-configuration names",
        )
        for index, rule in enumerate(policy.spec.jwt_rules)
        if not rule.jwks_uri and not rule.jwks
    ]


def _policies(world: World, proxy: Proxy) -> list[RequestAuthentication]:
    return world.policies_for(proxy, world.request_authentications)


def _rules(world: World, proxy: Proxy) -> list[JWTRule]:
    return [rule for policy in _policies(world, proxy) for rule in policy.spec.jwt_rules]


def _provider(rule: JWTRule) -> dict[str, Any]:
    claims = sorted({*rule.space_delimited_claims, *_SPACE_DELIMITED})
    return {
        "issuer": rule.issuer,
        "audiences": rule.audiences,
        "forward": rule.forward_original_token,
        "forward_payload_header": rule.output_payload_to_header,
        "payload_in_metadata": PAYLOAD,
        "normalize_payload_in_metadata": {"space_delimited_claims": claims},
        # Routes may look at headers that were made of claims.
        "clear_route_cache": True,
        "claim_to_headers": [
            {"header_name": output.header, "claim_name": output.claim}
            for output in rule.output_claim_to_headers
        ],
        "from_headers": [
            {"name": header.name, "value_prefix": header.prefix} for header in rule.from_headers
        ],
        "from_params": rule.from_params,
        "from_cookies": rule.from_cookies,
        **_key_set(rule),
    }


def _key_set(rule: JWTRule) -> dict[str, Any]:
    if not rule.jwks_uri:
        return {"local_jwks": {"inline_string": public_jwks(rule.jwks) if rule.jwks else _NO_KEYS}}
    return {
        "remote_jwks": {
            "http_uri": {
                "uri": rule.jwks_uri,
                "cluster": _server(rule.jwks_uri).cluster_name,
                "timeout": rule.timeout or _FETCH_TIMEOUT,
            },
            "cache_duration": _CACHE_DURATION,
            # In the background, before the first token comes and before the cache expires; keys that cannot
            # be fetched anew stay. A token that comes before the first fetch is done fetches, too.
            "async_fetch": {"fast_listener": True, "failed_refetch_duration": _RETRY_AFTER_FAILURE},
        }
    }


def _server(jwks_uri: str) -> ServiceDestination:
    uri = split_jwks_uri(jwks_uri)
    return ServiceDestination(_canonical(uri.host), uri.port, tls=uri.tls)


def _canonical(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower()
