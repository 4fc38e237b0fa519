"""Envoy resources as YAML for people, without what is secret."""

from collections.abc import Iterable
from typing import Any

import yaml

from xds import protos
from xds.resources import Resource

_REDACTED = "[redacted]"
_API_KEYS = protos.type_url(protos.ApiKeyAuth)


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
    """Hide clients' API keys, and what is secret of a Secret (SDS): all but trust roots and files' names."""
    secret = {"generic_secret", "tls_certificate", "session_ticket_keys"}
    return {
        name: _REDACTED if name in secret and not _names_files(value) else _without_api_keys(value)
        for name, value in resource.items()
    }


def _without_api_keys(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_api_keys(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("@type") == _API_KEYS:
        credentials = [{**each, "key": _REDACTED} for each in value.get("credentials", ())]
        return {**value, "credentials": credentials}
    return {name: _without_api_keys(item) for name, item in value.items()}


def _names_files(certificate: object) -> bool:
    return isinstance(certificate, dict) and "filename" in certificate.get("private_key", {})
