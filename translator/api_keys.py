"""APIKeyAuthentications as Envoy's API key filter.

A key is checked, and removed before anything else sees it; what remains is the client's name, in a header
that no client can set and that does not leave towards a provider.

The keys lie in a resource of their own (ECDS, translator.policies): a changed key drains no connection, and
nothing that is kept or shown holds a key.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from crds.apikeyauthentication import APIKeyAuthentication
from crds.llmprovider import check_api_key
from crds.problems import Finding, ObjectKey
from translator.features import Feature
from translator.proxy import Proxy
from translator.world import World
from xds import protos

CLIENT_HEADER = "x-llm-client"
"""Request header with the name of the client, for AuthorizationPolicies and routes."""
CLIENT_STATE = "llm.client"
"""Filter state with the same, for logs and limits (factory envoy.string)."""

_FILTER = "envoy.filters.http.api_key_auth"
_BEARER = "Bearer "
_CLIENT = re.compile(r"[-._A-Za-z0-9]{1,253}")
_BAD_NAME = "cannot be the name of a client (letters, digits, '-', '_' and '.'); the client is answered 401"

_REMOVE_KEY = """
local SOURCES = {{ {sources} }}
local function key_of(value)
  if value and value:sub(1, 7) == "Bearer " then value = value:sub(8) end
  return value ~= "" and value or nil
end
function envoy_on_request(handle)
  local headers = handle:headers()
  local key
  for _, name in ipairs(SOURCES) do
    local value = key_of(headers:get(name))
    key = key or value
    if value and value == key then headers:remove(name) end
  end
end
"""
"""Removes the key wherever it is, and leaves a token in another of the headers to the JWT filter."""

_CLEAR_ROUTE_CACHE = """
function envoy_on_request(handle)
  handle:clearRouteCache()
end
"""


@dataclass(frozen=True, slots=True)
class Credentials:
    """The keys that the Secrets of some policies hold."""

    clients: Mapping[str, str]
    """The client of each key."""
    problems: Mapping[ObjectKey, tuple[Finding, ...]]
    """What is wrong with the Secrets of a policy, without any key."""
    is_complete: bool
    """Whether every Secret was there."""


def filters(world: World, proxy: Proxy, *, with_tokens: bool) -> list[dict[str, Any]]:
    """Make the filters that check keys, or none; ``with_tokens``: a JWT filter comes behind them."""
    policies = _policies(world, proxy)
    if not policies:
        return []
    sources = _sources(policies)
    check = protos.ApiKeyAuth(
        credentials=[
            {"key": key, "client": client} for key, client in credentials(world, policies).clients.items()
        ],
        key_sources=[{"header": name} for name in sources],
        # It would remove all sources, and with them a token in another one.
        forwarding={"header": CLIENT_HEADER, "hide_credentials": not with_tokens},
    )
    client = protos.SetFilterState(
        on_request_headers=[
            {
                "object_key": CLIENT_STATE,
                "factory_key": "envoy.string",
                "format_string": {"text_format_source": {"inline_string": f"%REQ({CLIENT_HEADER})%"}},
            }
        ],
        # Routes may look at the header.
        clear_route_cache=proxy.supports(Feature.ROUTE_CACHE),
    )
    made = [{"name": _FILTER, "typed_config": protos.pack(check)}]
    if with_tokens:
        script = _REMOVE_KEY.format(sources=", ".join(f'"{name}"' for name in sources))
        lua = protos.Lua(default_source_code={"inline_string": script})
        made.append({"name": "envoy.filters.http.lua", "typed_config": protos.pack(lua)})
    made.append({"name": "envoy.filters.http.set_filter_state", "typed_config": protos.pack(client)})
    if not proxy.supports(Feature.ROUTE_CACHE):  # what an older Envoy does not know it skips without a word
        lua = protos.Lua(default_source_code={"inline_string": _CLEAR_ROUTE_CACHE})
        made.append({"name": "envoy.filters.http.lua", "typed_config": protos.pack(lua)})
    return made


def is_held(world: World, proxy: Proxy) -> bool:
    """Whether an Envoy that has keys keeps them: a Secret may be in what cannot be read now."""
    policies = _policies(world, proxy)
    return world.incomplete and bool(policies) and not credentials(world, policies).is_complete


def objects(world: World, proxy: Proxy) -> Iterator[ObjectKey]:
    """Return the policies that went into the filters."""
    for policy in _policies(world, proxy):
        yield policy.key


def findings(world: World) -> dict[ObjectKey, tuple[Finding, ...]]:
    """Say of each policy which Secrets and keys are missing or cannot be used."""
    found = {}
    for policies in world.api_key_authentications.values():
        for index, policy in enumerate(policies):
            rivals = [other for other in policies[:index] if _may_meet(other.spec.labels, policy.spec.labels)]
            found[policy.key] = credentials(world, [*rivals, policy]).problems[policy.key]
    return found


def removals(world: World, proxy: Proxy) -> tuple[str, ...]:
    """Return the headers that no provider gets: those of keys, whatever is in them, and the client's name."""
    policies = _policies(world, proxy)
    return (*_sources(policies), CLIENT_HEADER) if policies else ()


def credentials(world: World, policies: Iterable[APIKeyAuthentication]) -> Credentials:
    """Look the keys up. Of two clients with one key the first counts; what cannot be used is left out."""
    clients: dict[str, str] = {}
    origins: dict[str, str] = {}
    problems: dict[ObjectKey, tuple[Finding, ...]] = {}
    is_complete = True
    for policy in policies:
        findings = []
        for index, ref in enumerate(policy.spec.credential_refs):
            path = ("spec", "credentialRefs", index, "name")
            wanted = ObjectKey("Secret", policy.namespace, ref.name)
            secret = world.secrets.get(wanted)
            if secret is None:
                is_complete = False
                text = f"{world.lacks(wanted)}; its clients are answered 401"
                findings.append(Finding(path, text))
                continue
            if not secret.keys:
                findings.append(Finding(path, f"Secret {policy.namespace}/{ref.name} has no entry"))
            for client in secret.keys:
                if not _CLIENT.fullmatch(client):
                    text = f"{client!r} in Secret {policy.namespace}/{ref.name} {_BAD_NAME}"
                    findings.append(Finding(path, text))
                    continue
                where = f"client {client!r} of Secret {policy.namespace}/{ref.name}"
                try:
                    key = _key(secret.value(client) or b"")
                except ValueError as error:
                    findings.append(Finding(path, f"the key of {where} {error}; the client is answered 401"))
                    continue
                if clients.setdefault(key, client) != client:
                    text = f"{where} has the key of {origins[key]}, whose requests its requests are taken for"
                    findings.append(Finding(path, text))
                origins.setdefault(key, where)
        problems[policy.key] = tuple(findings)
    return Credentials(clients, problems, is_complete)


def _key(value: bytes) -> str:
    """Check a key. Raises ValueError, without the key in its text."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    return check_api_key(text.strip().removeprefix(_BEARER))


def _policies(world: World, proxy: Proxy) -> list[APIKeyAuthentication]:
    return world.policies_for(proxy, world.api_key_authentications)


def _may_meet(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether a gateway can carry the labels of both."""
    return all(other.get(name, value) == value for name, value in one.items())


def _sources(policies: Iterable[APIKeyAuthentication]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(header.name for policy in policies for header in policy.spec.from_headers))
