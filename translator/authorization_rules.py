"""A rule of an AuthorizationPolicy as a policy of Envoy's RBAC (envoy.config.rbac.v3.Policy).

The order and form of everything is that of Istio (pilot/pkg/security/authz/model model.go and generator.go,
authz/matcher, pilot/pkg/security/trustdomain), so that a policy means here what it means there.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from crds.authorizationpolicy import (
    ANY_SEGMENTS,
    ENVOY_FILTERS,
    ONE_SEGMENT,
    REQUEST_CLAIMS,
    REQUEST_HEADERS,
    Condition,
    Operation,
    Rule,
    Source,
    address_range,
    without_port,
)
from xds import protos

Matcher = dict[str, Any]
"""A Permission or a Principal, or a part of one."""

Values = tuple[str, ...]

_JWT_FILTER = "envoy.filters.http.jwt_authn"
_JWT_PAYLOAD = "payload"
_CLUSTER_LOCAL = "cluster.local"
_SPIFFE = "spiffe://"
_IDENTITY_PARTS = 5  # trust domain, ns, NAMESPACE, sa, ACCOUNT
_ANY_VALUE = {"safe_regex": {"regex": ".+"}}


@dataclass(frozen=True, slots=True)
class RuleContext:
    """What a rule is read with."""

    namespace: str
    """Namespace of the policy."""
    denies: bool
    """Whether its action takes away: then a doubtful value is read wider, and narrower for ALLOW."""
    trust_domains: tuple[str, ...]
    """The mesh's trust domain, then its aliases."""


def rbac_policy(rule: Rule, context: RuleContext) -> Matcher:
    """Make the policy of a rule: one permission an operation, one principal a source; conditions in each."""
    permissions = [_and(_operation(to.operation, context), rule, context, "and_rules") for to in rule.to]
    principals = [_and(_source(from_.source, context), rule, context, "and_ids") for from_ in rule.from_]
    return {
        "permissions": permissions or [_and([], rule, context, "and_rules")],
        "principals": principals or [_and([], rule, context, "and_ids")],
    }


def never() -> Matcher:
    """Make the policy that no request matches."""
    return {"permissions": [{"not_rule": {"any": True}}], "principals": [{"not_id": {"any": True}}]}


def always() -> Matcher:
    """Make the policy that every request matches."""
    return {"permissions": [{"any": True}], "principals": [{"any": True}]}


def _and(first: list[Matcher], rule: Rule, context: RuleContext, kind: str) -> Matcher:
    """Join the parts of a permission (``and_rules``) or principal (``and_ids``) with its conditions."""
    is_permission = kind == "and_rules"
    for condition in rule.when:
        if _is_permission(condition.key) == is_permission:
            first = [*first, *_condition(condition, context)]
    return {kind: {"rules" if is_permission else "ids": first or [{"any": True}]}}


def _operation(operation: Operation, context: RuleContext) -> list[Matcher]:
    def hosts(*, wider: bool) -> Callable[[str], Matcher]:
        return lambda value: {"header": _host(value, wider=wider)}

    return [
        *_permissions(operation.hosts, (), hosts(wider=context.denies)),
        *_permissions((), operation.not_hosts, hosts(wider=not context.denies)),
        *_permissions(operation.methods, operation.not_methods, lambda v: {"header": _header(":method", v)}),
        *_permissions(operation.paths, operation.not_paths, _path),
        *_permissions(operation.ports, operation.not_ports, _port),
    ]


def _source(source: Source, context: RuleContext) -> list[Matcher]:
    def service_account(value: str) -> Matcher:
        return _service_account(value, context.namespace)

    def with_aliases(values: Values) -> Values:
        return _with_aliases(values, context)

    def expanded(values: Values) -> Values:
        return _expanded(values, context)

    domains, not_domains = expanded(source.trust_domains), expanded(source.not_trust_domains)
    return [
        *_principals(with_aliases(source.principals), with_aliases(source.not_principals), _principal),
        *_all_at_once(source.request_principals, source.not_request_principals, _request_principal, "not_id"),
        *_principals(source.service_accounts, source.not_service_accounts, service_account),
        *_principals(domains, not_domains, _trust_domain),
        *_principals(source.namespaces, source.not_namespaces, _namespace),
        *_principals(source.remote_ip_blocks, source.not_remote_ip_blocks, _remote_ip),
        *_principals(source.ip_blocks, source.not_ip_blocks, _source_ip),
    ]


def _is_permission(key: str) -> bool:
    return key.startswith(("destination.", "connection.", ENVOY_FILTERS))


def _condition(condition: Condition, context: RuleContext) -> list[Matcher]:
    key, values, not_values = condition.key, condition.values, condition.not_values
    permissions: dict[str, Callable[[str], Matcher]] = {
        "destination.ip": lambda value: {"destination_ip": _range(value)},
        "destination.port": _port,
        "connection.sni": lambda value: {"requested_server_name": _string(value)},
    }
    if key in permissions:
        return _permissions(values, not_values, permissions[key])
    if key.startswith(ENVOY_FILTERS):
        filter_name, _, member = key.removeprefix("experimental.").removesuffix("]").partition("[")
        return _all_at_once(
            values, not_values, lambda of: _metadata(filter_name, [member], _strings_or_lists(of)), "not_rule"
        )
    if key == "source.principal":
        values, not_values = _with_aliases(values, context), _with_aliases(not_values, context)
    if key == "source.trustDomain":
        values, not_values = _expanded(values, context), _expanded(not_values, context)
    principals: dict[str, Callable[[str], Matcher]] = {
        "source.ip": _source_ip,
        "remote.ip": _remote_ip,
        "source.namespace": _namespace,
        "source.serviceAccount": lambda value: _service_account(value, context.namespace),
        "source.principal": _principal,
        "source.trustDomain": _trust_domain,
    }
    if key in principals:
        return _principals(values, not_values, principals[key])
    if key.startswith(REQUEST_HEADERS):
        name = condition.names[0]
        return _principals(values, not_values, lambda value: {"header": _header(name, value)})
    if key == "request.auth.principal":
        return _all_at_once(values, not_values, _request_principal, "not_id")
    return _all_at_once(values, not_values, lambda of: _claim(_claim_names(condition), of), "not_id")


def _claim_names(condition: Condition) -> Sequence[str]:
    if condition.key.startswith(REQUEST_CLAIMS):
        return condition.names
    return {"request.auth.audiences": ["aud"], "request.auth.presenter": ["azp"]}[condition.key]


# Lists of values: one of them must match, none of the others may.


def _permissions(values: Values, not_values: Values, make: Callable[[str], Matcher]) -> list[Matcher]:
    def any_of(of: Values) -> Matcher:
        return {"or_rules": {"rules": [make(value) for value in of]}}

    return _all_at_once(values, not_values, any_of, "not_rule")


def _principals(values: Values, not_values: Values, make: Callable[[str], Matcher]) -> list[Matcher]:
    def any_of(of: Values) -> Matcher:
        return {"or_ids": {"ids": [make(value) for value in of]}}

    return _all_at_once(values, not_values, any_of, "not_id")


def _all_at_once(
    values: Values, not_values: Values, make: Callable[[Values], Matcher], negation: str
) -> list[Matcher]:
    """Make at most two matchers: for the values, and for those that must not match."""
    return [
        *([make(values)] if values else []),
        *([{negation: make(not_values)}] if not_values else []),
    ]


# Single values


def _host(value: str, *, wider: bool) -> Matcher:
    # Requests come here without port and trailing dot: a value with them matches nothing, or without them.
    return _header(":authority", without_port(value) if wider else value, ignore_case=True)


def _header(name: str, value: str, *, ignore_case: bool = False) -> Matcher:
    if value == "*":
        return {"name": name, "present_match": True}
    case: Matcher = {"ignore_case": True} if ignore_case else {}
    return {"name": name, "string_match": {**_string(value), **case}}


def _string(value: str, prefix: str = "") -> Matcher:
    """Make a StringMatcher of a value with a wildcard at its beginning or end, behind ``prefix``."""
    if value == "*":
        return _ANY_VALUE
    if value.startswith("*"):
        if prefix:
            return {"safe_regex": {"regex": f"{prefix}.*{_quote(value[1:])}"}}
        return {"suffix": value[1:]}
    if value.endswith("*"):
        return {"prefix": prefix + value[:-1]}
    return {"exact": prefix + value}


def _path(value: str) -> Matcher:
    if ONE_SEGMENT in value or ANY_SEGMENTS in value:
        template = value.replace(ANY_SEGMENTS, "**").replace(ONE_SEGMENT, "*")
        config = protos.UriTemplateMatchConfig(path_template=template)
        return {"uri_template": {"name": "uri-template", "typed_config": protos.pack(config)}}
    return {"url_path": {"path": _string(value)}}


def _port(value: str) -> Matcher:
    return {"destination_port": int(value)}


def _range(value: str) -> Matcher:
    address, length = address_range(value)
    return {"address_prefix": address, "prefix_len": {"value": length}}


def _source_ip(value: str) -> Matcher:
    return {"direct_remote_ip": _range(value)}


def _remote_ip(value: str) -> Matcher:
    return {"remote_ip": _range(value)}


def _authenticated(name: Matcher) -> Matcher:
    return {"authenticated": {"principal_name": name}}


def _principal(value: str) -> Matcher:
    return _authenticated(_string(value, _SPIFFE))


def _namespace(value: str) -> Matcher:
    name = ".*".join(_quote(part) for part in value.split("*"))
    return _authenticated({"safe_regex": {"regex": f".*/ns/{name}/.*"}})


def _service_account(value: str, default_namespace: str) -> Matcher:
    namespace, slash, account = value.partition("/")
    if not slash:
        namespace, account = default_namespace, value
    regex = f"{_SPIFFE}.+/ns/{_quote(namespace)}/(.+/|)sa/{_quote(account)}(/.+)?"
    return _authenticated({"safe_regex": {"regex": regex}})


def _trust_domain(value: str) -> Matcher:
    if value == "*":
        return _authenticated({"prefix": _SPIFFE})
    if "*" not in value:
        return _authenticated({"prefix": f"{_SPIFFE}{value}/"})
    before, _, after = value.partition("*")
    return _authenticated({"safe_regex": {"regex": f"{_SPIFFE}{_quote(before)}[^/]*{_quote(after)}/.*"}})


def _request_principal(values: Values) -> Matcher:
    ids: list[Matcher] = []
    for value in values:
        issuer, subject = _issuer_and_subject(value)
        claims = (("iss", issuer), ("sub", subject))
        parts = [_metadata(_JWT_FILTER, [_JWT_PAYLOAD, claim], {"string_match": of}) for claim, of in claims]
        ids.append({"and_ids": {"ids": parts}})
    return ids[0] if len(ids) == 1 else {"or_ids": {"ids": ids}}


def _issuer_and_subject(value: str) -> tuple[Matcher, Matcher]:
    """Read ISSUER/SUBJECT; an issuer may be a URL, so the last slash counts."""
    issuer, slash, subject = value.rpartition("/")
    if value == "*":
        return _ANY_VALUE, _ANY_VALUE
    if value.startswith("*"):
        return (_string(issuer), {"exact": subject}) if slash else (_ANY_VALUE, {"suffix": value[1:]})
    if not value.endswith("*"):
        return ({"exact": issuer}, {"exact": subject}) if slash else ({"exact": value}, {"exact": ""})
    if not slash:
        return {"prefix": value[:-1]}, _ANY_VALUE
    return {"exact": issuer}, _ANY_VALUE if subject == "*" else {"prefix": subject[:-1]}


def _claim(names: Sequence[str], values: Values) -> Matcher:
    """Match a claim that is a string or a list of strings."""
    value = _or([{"string_match": _string(value)} for value in values])
    either = {"or_match": {"value_matchers": [{"list_match": {"one_of": value}}, value]}}
    return _metadata(_JWT_FILTER, [_JWT_PAYLOAD, *names], either)


def _metadata(filter_name: str, keys: Iterable[str], value: Matcher) -> Matcher:
    return {"metadata": {"filter": filter_name, "path": [{"key": key} for key in keys], "value": value}}


def _strings_or_lists(values: Values) -> Matcher:
    """Match metadata that is a string, or for `[value]` a list with that string."""
    return _or(
        [
            {"list_match": {"one_of": {"string_match": _string(value.strip("[]"))}}}
            if value.startswith("[") and value.endswith("]")
            else {"string_match": _string(value)}
            for value in values
        ]
    )


def _or(matchers: list[Matcher]) -> Matcher:
    return matchers[0] if len(matchers) == 1 else {"or_match": {"value_matchers": matchers}}


def _quote(text: str) -> str:
    """Quote a text in a regular expression, as Go's regexp.QuoteMeta does."""
    return re.sub(r"[\\.+*?()|\[\]{}^$]", r"\\\g<0>", text)


# Trust domains: an identity of the mesh's trust domain, or of cluster.local, is also one of its aliases.


def _with_aliases(principals: Values, context: RuleContext) -> Values:
    found: list[str] = []
    for principal in principals:
        parts = principal.split("/")
        domain = parts[0]
        if len(parts) != _IDENTITY_PARTS or domain == "*" or not _is_ours(domain, context.trust_domains):
            found.append(principal)
            continue
        rest = "/".join(parts[1:])
        # *-td matches old-td and new-td by itself.
        found += dict.fromkeys(
            principal if _ends_like(own, domain) else f"{own}/{rest}" for own in context.trust_domains
        )
    return tuple(found)


def _expanded(values: Values, context: RuleContext) -> Values:
    domains = context.trust_domains
    found = (name for value in values for name in (domains if value in domains else (value,)))
    return tuple(dict.fromkeys(found))


def _is_ours(domain: str, trust_domains: Sequence[str]) -> bool:
    return domain == _CLUSTER_LOCAL or any(
        own in (domain, "*")
        or any(_begins_like(*pair) or _ends_like(*pair) for pair in ((domain, own), (own, domain)))
        for own in trust_domains
    )


def _begins_like(text: str, pattern: str) -> bool:
    return pattern.endswith("*") and text.startswith(pattern[:-1])


def _ends_like(text: str, pattern: str) -> bool:
    return pattern.startswith("*") and text.endswith(pattern[1:])
