"""Envoy resources as YAML for people, without what is secret."""

from collections.abc import Iterable

import yaml

from xds import protos
from xds.resources import Resource


def to_yaml(resources: Iterable[Resource]) -> str:
    """Return resources as YAML documents, keys redacted; those whose content is not known are left out."""
    documents = [
        _redacted(protos.to_dict(protos.Any.FromString(resource.body)))
        for resource in resources
        if resource.body
    ]
    # Sorted, because protobuf's maps have no order.
    return yaml.safe_dump_all(documents, sort_keys=True, allow_unicode=True)


def _redacted(resource: dict[str, object]) -> dict[str, object]:
    """Hide what is secret of a Secret (SDS): only the trust roots are public."""
    return {
        name: "[redacted]" if name in {"generic_secret", "tls_certificate", "session_ticket_keys"} else value
        for name, value in resource.items()
    }
