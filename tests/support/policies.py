"""A gateway with one host and one provider, and policies for it, as YAML (JSON)."""

import json
from typing import Any

from tests.support.objects import backends, provider, route

HOST = "test.com"
ROOT = "istio-system"
SELECTOR = {"matchLabels": {"istio": "ingressgateway"}}


def gateway(name: str = "istio-system/ingress-gw", *hosts: str) -> str:
    """Return a Gateway that opens port 80 of Istio's ingress gateway."""
    server = {"hosts": list(hosts) or ["*"], "port": {"name": "http", "number": 80, "protocol": "HTTP"}}
    spec = {"selector": {"istio": "ingressgateway"}, "servers": [server]}
    return istio_object("networking.istio.io/v1", "Gateway", name, spec)


def opened(host: str, key: str) -> list[str]:
    """Return the objects by which HOST is served on the gateway by a provider."""
    rule = {"backendRefs": backends(host)}
    return [
        gateway(),
        provider(f"{ROOT}/provider", host, key),
        route("test", HOST, rule, gateways=[f"{ROOT}/ingress-gw"]),
    ]


def request_authentication(*rules: dict[str, Any], name: str = f"{ROOT}/tokens", **spec: Any) -> str:
    """Return a RequestAuthentication for the ingress gateway."""
    whole = {"selector": SELECTOR, "jwtRules": list(rules), **spec}
    return istio_object("security.istio.io/v1", "RequestAuthentication", name, whole)


def authorization_policy(*rules: dict[str, Any], name: str = f"{ROOT}/rules", **spec: Any) -> str:
    """Return an AuthorizationPolicy for the ingress gateway, with the action ALLOW unless `spec` has one."""
    whole = {"selector": SELECTOR, "rules": list(rules), **spec}
    return istio_object("security.istio.io/v1", "AuthorizationPolicy", name, whole)


def api_key_authentication(*secrets: str, name: str = f"{ROOT}/clients", **spec: Any) -> str:
    """Return an APIKeyAuthentication for the ingress gateway."""
    whole = {"selector": SELECTOR, "credentialRefs": [{"name": secret} for secret in secrets], **spec}
    return istio_object("istio.alibabacloud.com/v1beta1", "APIKeyAuthentication", name, whole)


def istio_object(api_version: str, kind: str, name: str, spec: Any) -> str:
    """Return an object; its name may be NAMESPACE/NAME."""
    namespace, _, own = name.rpartition("/")
    metadata = {"name": own, "namespace": namespace or "default"}
    return json.dumps({"apiVersion": api_version, "kind": kind, "metadata": metadata, "spec": spec})
