"""Envoy resources as YAML for people, without what is secret."""

import re
from collections.abc import Iterable
from typing import Any

import yaml

from xds import protos
from xds.resources import Resource

_REDACTED = "[redacted]"
_API_KEYS = protos.type_url(protos.ApiKeyAuth)
_SIGNING_KEY = re.compile(r'"[kd]"\s*:')
"""What a JSON Web Key has that can sign, not only verify (RFC 7518: `k` of oct, `d` of RSA and EC)."""


def to_yaml(resources: Iterable[Resource]) -> str:
    """Return resources as YAML documents, keys redacted; those whose content is not known are left out."""
    documents = [
        _redacted(protos.to_dict(protos.Any.FromString(resource.body)))
        for resource in resources
        if resource.body
    ]
    # Sorted, because protobuf's maps have no order.
    return yaml.safe_dump_all(documents, sort_keys=True, allow_unicode=True)


def _redacted(resource: dict[str, Any]) -> dict[str, Any]:
    """Hide what is secret; of a Secret (SDS) that is all but trust roots and names of files."""
    secret = {"generic_secret", "tls_certificate", "session_ticket_keys"}
    return {
        name: _REDACTED if name in secret and not _names_files(value) else _hidden(value)
        for name, value in resource.items()
    }


def _hidden(value: Any, *, in_call: bool = False) -> Any:
    """Hide clients' API keys, key sets that can sign, and the values of headers of Envoy's own calls.

    Such a header (of an HttpService) may be what a collector or an authorization service knows Envoy by.
    """
    if isinstance(value, list):
        return [_hidden(item, in_call=in_call) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("@type") == _API_KEYS:
        credentials = [{**each, "key": _REDACTED} for each in value.get("credentials", ())]
        return {**value, "credentials": credentials}
    if in_call and value.keys() == {"key", "value"}:
        return {**value, "value": _REDACTED}
    if "local_jwks" in value and _SIGNING_KEY.search(str(value["local_jwks"])):
        return {**value, "local_jwks": _REDACTED}
    return {name: _hidden(item, in_call=in_call or name == "http_service") for name, item in value.items()}


def _names_files(certificate: object) -> bool:
    return isinstance(certificate, dict) and "filename" in certificate.get("private_key", {})
