"""The action CUSTOM: an external authorization service decides (Istio: authz/builder/extauthz.go)."""

import re
from collections.abc import Collection
from typing import Any

from google.protobuf.message import Message

from crds.externalauthorization import EnvoyExtAuthzGrpc, EnvoyExtAuthzHttp
from crds.kinds import did_you_mean
from crds.meshconfig import MeshConfig
from translator.services import ServiceDestination, http_uri
from xds import protos

SHADOW_PREFIX = "istio_ext_authz_"
"""Prefix of the metadata in which the RBAC filter in front notes the policy that matched."""

Service = EnvoyExtAuthzHttp | EnvoyExtAuthzGrpc

_RBAC_FILTER = "envoy.filters.http.rbac"
_PROVIDER_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # it is part of policies' names


class UnknownProviderError(LookupError):
    """The mesh configuration has no such authorization service; the text says which it has."""


def find_service(config: MeshConfig, name: str) -> Service:
    """Look an authorization service up by the name of its extensionProvider.

    Raises UnknownProviderError where there is none.
    """
    services = {
        provider.name: provider.envoy_ext_authz_http or provider.envoy_ext_authz_grpc
        for provider in config.extension_providers
    }
    found = services.get(name)
    if found is None:
        known = [of for of, service in services.items() if service is not None]
        text = f"the mesh configuration has no extensionProvider '{name}' for authorization"
        raise UnknownProviderError(f"{text}{did_you_mean(name, known)}")
    if not _PROVIDER_NAME.fullmatch(name):
        raise UnknownProviderError(
            f"the extensionProvider '{name}' cannot be used: only lowercase letters, digits, and hyphens"
            " allowed, 63 at most"
        )
    return found


def destination(service: Service) -> ServiceDestination:
    """Return where an authorization service is, and how it is spoken to."""
    return ServiceDestination.of(service.service, service.port, http2=isinstance(service, EnvoyExtAuthzGrpc))


def policy_prefix(provider: str) -> str:
    """Return what names of policies begin with that ask this provider, and of no others."""
    return f"istio-ext-authz-{provider}"


def ext_authz(provider: str, service: Service) -> Message:
    """Make the filter that asks a service about the requests that its policies match."""
    body = service.include_request_body_in_check
    matched = {
        "filter": _RBAC_FILTER,
        "path": [{"key": f"{SHADOW_PREFIX}shadow_effective_policy_id"}],
        "value": {"string_match": {"prefix": policy_prefix(provider)}},
    }
    return protos.ExtAuthz(
        transport_api_version="V3",
        filter_enabled_metadata=matched,
        failure_mode_allow=service.fail_open,
        status_on_error={"code": int(service.status_on_error)} if service.status_on_error else None,
        clear_route_cache=service.clear_route_cache,
        with_request_body=body.model_dump() if body else None,
        **(_grpc(service) if isinstance(service, EnvoyExtAuthzGrpc) else _http(service)),
    )


def _grpc(service: EnvoyExtAuthzGrpc) -> dict[str, Any]:
    to = destination(service)
    called = {"cluster_name": to.cluster_name, "authority": to.host}
    return {"grpc_service": {"envoy_grpc": called, "timeout": service.timeout}}


def _http(service: EnvoyExtAuthzHttp) -> dict[str, Any]:
    asked = service.include_request_headers_in_check or service.include_headers_in_check
    added = sorted(service.include_additional_headers_in_check.items())
    answered = {
        "allowed_upstream_headers": _headers(service.headers_to_upstream_on_allow),
        "allowed_client_headers": _headers(service.headers_to_downstream_on_deny),
        "allowed_client_headers_on_success": _headers(service.headers_to_downstream_on_allow),
    }
    called: dict[str, Any] = {
        "server_uri": http_uri(destination(service), "", service.timeout),
        "path_prefix": service.path_prefix,
    }
    if added:
        headers = [{"key": name, "value": value} for name, value in added]
        called["authorization_request"] = {"headers_to_add": headers}
    if any(answered.values()):
        called["authorization_response"] = answered
    return {"http_service": called, "allowed_headers": _headers(asked)}


def _headers(names: Collection[str]) -> dict[str, Any] | None:
    """Make a ListStringMatcher of names of headers, with a wildcard at their beginning or end."""
    return {"patterns": [{**_name(name), "ignore_case": True} for name in names]} if names else None


def _name(name: str) -> dict[str, str]:
    if name.startswith("*"):
        return {"suffix": name[1:]}
    return {"prefix": name[:-1]} if name.endswith("*") else {"exact": name}
