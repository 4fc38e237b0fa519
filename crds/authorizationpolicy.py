"""AuthorizationPolicy: who may do what at a workload (security.istio.io).

Rules and wording are those of Istio's webhook and of its CRD (istio/istio pkg/config/validation
ValidateAuthorizationPolicy, pkg/config/security; istio/api security/v1beta1). Stricter than Istio:
path templates that crash Envoy.
"""

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from ipaddress import ip_interface
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from crds.meta import BaseObject, Model
from crds.problems import Finding, Path
from crds.selection import SelectingSpec
from crds.values import header_name, invalid, refuse

VERSIONS = ("v1", "v1beta1")
"""The versions that Istio serves, with one schema."""

DRY_RUN = "istio.io/dry-run"
"""The annotation of a policy that is only tried: its result shows in metrics and logs."""

ONE_SEGMENT, ANY_SEGMENTS = "{*}", "{**}"
"""The operators of a path template."""

REQUEST_HEADERS = "request.headers"
REQUEST_CLAIMS = "request.auth.claims"
ENVOY_FILTERS = "experimental.envoy.filters."

_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})  # Go's strconv.ParseBool
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})
_CIDR = re.compile(r"[^/]+(/(0|[1-9][0-9]*))?")
_PATH_LITERAL = re.compile(r"[a-zA-Z0-9\-._~%!$&'()+,;:@=]+")  # RFC 3986 pchar, without '*'
_MAX_PATH_TEMPLATE = 256  # Envoy's UriTemplateMatchConfig
_MAX_SERVICE_ACCOUNTS = 16
_BRACKETS = re.compile(r"\[([^\[\]]+)\]")


class Action(StrEnum):
    """What is done with a request that a rule matches."""

    ALLOW = "ALLOW"
    """Let it pass; where there is such a policy, all others are denied."""
    DENY = "DENY"
    """Deny it, whatever ALLOW says."""
    AUDIT = "AUDIT"
    """Mark it for the access log."""
    CUSTOM = "CUSTOM"
    """Ask an external authorization service."""


def address_range(text: str) -> tuple[str, int]:
    """Read an address, or a range of addresses in CIDR form, as address and prefix length.

    Raises `ValueError` in Istio's words.
    """
    try:
        if _CIDR.fullmatch(text) and "%" not in text:
            interface = ip_interface(text)
            return str(interface.ip), interface.network.prefixlen
    except ValueError:
        pass
    kind = "CIDR range" if "/" in text else "IP address"
    raise ValueError(f"bad {kind} ({text})")


def _value(text: str) -> str:
    if not text:
        raise ValueError("empty value not allowed")
    return _unicode(text)


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeError:  # JSON can write half a character, which no text of an error may hold
        raise ValueError("is no Unicode text") from None
    return text


def _ip_block(text: str) -> str:
    address_range(_value(text))
    return text


def _port(text: str) -> str:
    if not (_value(text).isascii() and text.isdecimal() and int(text) <= 65535):  # noqa: PLR2004 - 16 bits
        raise ValueError(f"bad port ({text})")
    return text


def _path(text: str) -> str:
    """Check a path; Envoy 1.40 aborts at a template that it cannot read."""
    _value(text)
    is_template = ONE_SEGMENT in text or ANY_SEGMENTS in text
    wrong = f"invalid or unsupported path {text}. "
    ended = False
    for segment in text.removeprefix("/").removesuffix("/").split("/"):
        if segment in {ONE_SEGMENT, ANY_SEGMENTS}:
            if ended:
                raise ValueError(wrong + "{**} is not the last operator")
            ended = segment == ANY_SEGMENTS
        elif "{" in segment or "}" in segment:
            raise ValueError(wrong + "Contains '{' or '}' beyond a supported path template")
        elif is_template and not _PATH_LITERAL.fullmatch(segment):
            raise ValueError(wrong + f"Contains segment {segment} with invalid string literal")
    if is_template and not text.startswith("/"):
        raise ValueError(wrong + "A path template must start with '/'")
    if is_template and len(text) > _MAX_PATH_TEMPLATE:
        raise ValueError(f"a path template must not be longer than {_MAX_PATH_TEMPLATE} characters")
    return text


def _service_account(text: str) -> str:
    _value(text)
    if "*" in text:
        raise ValueError("wildcard not allowed")
    if not re.fullmatch(r"[^/]+(/[^/]+)?", text):
        raise ValueError(f"expected format 'serviceAccount' or 'namespace/serviceAccount', found \"{text}\"")
    if len(text) > 320:  # noqa: PLR2004 - Istio's limit
        raise ValueError(f'value cannot exceed 320 characters, found "{text}"')
    return text


def _service_accounts(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(values) > _MAX_SERVICE_ACCOUNTS:
        raise ValueError(f"may not have more than {_MAX_SERVICE_ACCOUNTS} values")
    return values


def _wildcard(text: str) -> str:
    _value(text)
    if text.count("*") > 1:
        raise ValueError(f'at most one wildcard is allowed, found "{text}"')
    if "*" in text and not (text.startswith("*") or text.endswith("*")):
        raise ValueError(f'wildcard is only allowed at the start or end, found "{text}"')
    return text


def _trust_domain(text: str) -> str:
    if "/" in _value(text):
        raise ValueError(f"trust domain must not contain '/', found \"{text}\"")
    return _wildcard(text)


Values = tuple[Annotated[str, AfterValidator(_value)], ...]
"""Of these one must match: exact, or with `*` at the beginning or end, or `*` for any that is there."""
IpBlocks = tuple[Annotated[str, AfterValidator(_ip_block)], ...]
"""IP addresses and ranges in CIDR form."""
Ports = tuple[Annotated[str, AfterValidator(_port)], ...]
Paths = tuple[Annotated[str, AfterValidator(_path)], ...]
TrustDomains = tuple[Annotated[str, AfterValidator(_trust_domain)], ...]
ServiceAccounts = Annotated[
    tuple[Annotated[str, AfterValidator(_service_account)], ...], AfterValidator(_service_accounts)
]


class _Part(Model):
    """A part of a rule whose lists must not all be empty."""

    @model_validator(mode="after")
    def _check_not_empty(self) -> Self:
        if not any(getattr(self, name) for name in self.__class__.model_fields):
            what = "from.source" if isinstance(self, Source) else "to.operation"
            raise ValueError(f"`{what}` must not be empty")
        return self

    def empty_lists(self) -> list[str]:
        """Return the lists that are written, but empty."""
        fields = self.__class__.model_fields
        return [
            str(fields[name].alias)
            for name in fields
            if name in self.model_fields_set and not getattr(self, name)
        ]


class Source(_Part):
    """Where requests come from: all lists that are set must match."""

    principals: Values = ()
    """Identities of the peer's certificate, without spiffe://: TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT."""
    not_principals: Values = ()
    """None of these principals."""
    request_principals: Values = ()
    """ISSUER/SUBJECT of the request's JWT."""
    not_request_principals: Values = ()
    """None of these request principals."""
    namespaces: Values = ()
    """Namespaces of the peer's certificate."""
    not_namespaces: Values = ()
    """None of these namespaces."""
    service_accounts: ServiceAccounts = ()
    """[NAMESPACE/]ACCOUNT of the peer's certificate, exact (default namespace: the policy's)."""
    not_service_accounts: ServiceAccounts = ()
    """None of these service accounts."""
    trust_domains: TrustDomains = ()
    """Trust domains of the peer's certificate."""
    not_trust_domains: TrustDomains = ()
    """None of these trust domains."""
    ip_blocks: IpBlocks = ()
    """Addresses of the TCP peer. In files, ${NAME} stands for an environment variable."""
    not_ip_blocks: IpBlocks = ()
    """None of these addresses."""
    remote_ip_blocks: IpBlocks = ()
    """Addresses of the client, by X-Forwarded-For as far as the proxies in front are trusted."""
    not_remote_ip_blocks: IpBlocks = ()
    """None of these remote addresses."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        accounts = self.service_accounts or self.not_service_accounts
        others = self.principals or self.not_principals or self.namespaces or self.not_namespaces
        if accounts and others:
            raise ValueError("cannot set serviceAccounts with namespaces or principals")
        return self


class Operation(_Part):
    """What is asked for: all lists that are set must match."""

    hosts: Values = ()
    """The request's host, in any case, without its port."""
    not_hosts: Values = ()
    """None of these hosts."""
    ports: Ports = ()
    """Ports that the proxy listens on."""
    not_ports: Ports = ()
    """None of these ports."""
    methods: Values = ()
    """The request's method."""
    not_methods: Values = ()
    """None of these methods."""
    paths: Paths = ()
    """The request's path without its query; `{*}` is one segment of it, `{**}` any number of them."""
    not_paths: Paths = ()
    """None of these paths."""


class From(Model):
    """A source."""

    source: Source


class To(Model):
    """An operation."""

    operation: Operation


_REPLACED = {
    "destination.namespace": "attribute {} is replaced by the metadata.namespace",
    "destination.name": "deprecated attribute {}: only supported in v1alpha1",
    "destination.user": "deprecated attribute {}: only supported in v1alpha1",
}
_ATTRIBUTES: Mapping[str, Any] = {
    "source.ip": _ip_block,
    "remote.ip": _ip_block,
    "source.namespace": _value,
    "source.serviceAccount": _service_account,
    "source.principal": _value,
    "source.trustDomain": _wildcard,
    "request.auth.principal": _value,
    "request.auth.audiences": _value,
    "request.auth.presenter": _value,
    "destination.ip": _ip_block,
    "destination.port": _port,
    "connection.sni": _value,
}
"""The attributes of a condition without brackets, and what checks their values."""


def _check_key(key: str) -> None:
    if not _unicode(key):
        raise ValueError("`key` must not be empty")
    if key in _ATTRIBUTES:
        return
    for prefix in (REQUEST_HEADERS, REQUEST_CLAIMS, ENVOY_FILTERS):
        if key.startswith(prefix):
            _check_bracketed(key, prefix)
            return
    if key.startswith("destination.labels"):
        raise ValueError(f"attribute {key} is replaced by the workload selector")
    raise ValueError(_REPLACED.get(key, "unknown attribute: {}").format(key))


def _check_bracketed(key: str, prefix: str) -> None:
    """Check an attribute of the form a[b]; Envoy refuses empty names, and headers that are none."""
    rest = key.removeprefix(prefix)
    shape = r"[^\[\]]*\[[^\[\]]+\]" if prefix == ENVOY_FILTERS else rf"({_BRACKETS.pattern})+"
    if not re.fullmatch(shape, rest) or (prefix == REQUEST_HEADERS and rest.count("[") > 1):
        raise ValueError(f"bad key ({key}): should have format a[b]")
    if prefix == REQUEST_HEADERS:
        header_name(rest[1:-1].removeprefix(":"))


class Condition(Model):
    """What else must be true of a request."""

    key: str
    """The name of an attribute (istio.io/latest/docs/reference/config/security/conditions)."""
    values: tuple[str, ...] = ()
    """One of these must match."""
    not_values: tuple[str, ...] = ()
    """None of these may match."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parts in brackets, from the outside to the inside."""
        return tuple(_BRACKETS.findall(self.key))

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            _check_key(self.key)
        except ValueError as error:
            raise invalid(Finding(("key",), str(error))) from None
        if not self.values and not self.not_values:
            raise ValueError(f"at least one of `values` or `notValues` must be set for key {self.key}")
        findings = [*self._findings("values", self.values), *self._findings("notValues", self.not_values)]
        refuse(findings)
        return self

    def _findings(self, member: str, values: tuple[str, ...]) -> Iterator[Finding]:
        check = _ATTRIBUTES.get(self.key, _value)
        for index, value in enumerate(values):
            try:
                check(value)
            except ValueError as error:
                yield Finding((member, index), str(error))
        if self.key == "source.serviceAccount" and len(values) > _MAX_SERVICE_ACCOUNTS:
            yield Finding((member,), f"may not have more than {_MAX_SERVICE_ACCOUNTS} values")


def _not_empty(items: tuple[Any, ...]) -> tuple[Any, ...]:
    if not items:
        raise ValueError("must not be empty")
    return items


class Rule(Model):
    """Requests from one of the sources, to one of the operations, that meet all conditions. {} = all."""

    from_: Annotated[tuple[From, ...], Field(alias="from", max_length=512), AfterValidator(_not_empty)] = ()
    """Sources (default: all)."""
    to: Annotated[tuple[To, ...], AfterValidator(_not_empty)] = ()
    """Operations (default: all)."""
    when: tuple[Condition, ...] = ()
    """Conditions."""


class Provider(Model):
    """The extensionProvider that is asked."""

    name: str = ""
    """Its name in the mesh configuration."""


class AuthorizationPolicySpec(SelectingSpec):
    """Rules, and what is done with the requests that they match."""

    action: Action = Action.ALLOW
    """What is done."""
    provider: Provider | None = None
    """Whom CUSTOM asks."""
    rules: Annotated[tuple[Rule, ...], Field(max_length=512)] = ()
    """Which requests: those that one of these matches. None at all = no request; ALLOW then denies all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        findings = []
        if self.action in {Action.CUSTOM, Action.DENY} and not self.rules:
            text = (
                f"{self.action} action without `rules` is meaningless as it will never be triggered, "
                "add an empty rule `{}` if you want it be triggered for every request"
            )
            findings.append(Finding(("rules",), text))
        if self.action is Action.CUSTOM:
            if self.rules and not (self.provider and self.provider.name):
                findings.append(Finding(("provider", "name"), "`provider.name` must not be empty"))
            findings += self._not_for_custom()
        elif self.provider is not None:
            text = f"`provider` must not be with non CUSTOM action, found {self.action}"
            findings.append(Finding(("provider",), text))
        refuse(findings)
        return self

    def _not_for_custom(self) -> Iterator[Finding]:
        """Find what comes from certificates and tokens: CUSTOM stands in front of their filters."""
        text = "{} is currently not supported with CUSTOM action"
        for i, rule in enumerate(self.rules):
            for j, from_ in enumerate(rule.from_):
                for name, field in Source.model_fields.items():
                    if "ip_blocks" not in name and getattr(from_.source, name):
                        alias = str(field.alias)
                        title = f"From.{alias[0].upper()}{alias[1:]}"
                        yield Finding(("rules", i, "from", j, "source", alias), text.format(title))
            for j, condition in enumerate(rule.when):
                key = condition.key
                if key.startswith("request.auth.") or (key.startswith("source.") and key != "source.ip"):
                    yield Finding(("rules", i, "when", j, "key"), text.format(key))


class AuthorizationPolicy(BaseObject):
    """Says who may do what at the workloads that it selects."""

    kind: Literal["AuthorizationPolicy"]
    spec: AuthorizationPolicySpec = Field(default_factory=lambda: AuthorizationPolicySpec.model_validate({}))

    @property
    def dry_run(self) -> bool:
        """Whether the policy is only tried."""
        return self.metadata.annotations.get(DRY_RUN) in _TRUE

    @model_validator(mode="after")
    def _check_dry_run(self) -> Self:
        value = self.metadata.annotations.get(DRY_RUN)
        if value is None:
            return self
        path = ("metadata", "annotations", DRY_RUN)
        if self.spec.action not in {Action.ALLOW, Action.DENY}:
            text = "the annotation {} currently only supports action ALLOW/DENY, found {}"
            raise invalid(Finding(path, text.format(DRY_RUN, self.spec.action)))
        if value not in _TRUE | _FALSE:
            raise invalid(Finding(path, f"invalid value ({value}), must be 'true' or 'false'"))
        return self

    def warnings(self) -> list[Finding]:
        """Tell of what has no effect, and of comparisons that are easy to get around."""
        findings = self.spec.selection_warnings()
        for i, rule in enumerate(self.spec.rules):
            place: Path = ("spec", "rules", i)
            for j, from_ in enumerate(rule.from_):
                findings += _empty_lists(from_.source, (*place, "from", j, "source"))
            for j, to in enumerate(rule.to):
                findings += _empty_lists(to.operation, (*place, "to", j, "operation"))
                if to.operation.paths and self.spec.action in {Action.DENY, Action.CUSTOM}:
                    path = (*place, "to", j, "operation", "paths")
                    findings.append(Finding(path, _PATH_IN_DENY.format(self.spec.action)))
                if to.operation.not_paths and not to.operation.paths and self.spec.action is Action.ALLOW:
                    path = (*place, "to", j, "operation", "notPaths")
                    findings.append(Finding(path, _PATH_IN_DENY.format("notPaths")))
                for name, hosts in (("hosts", to.operation.hosts), ("notHosts", to.operation.not_hosts)):
                    findings += [
                        Finding((*place, "to", j, "operation", name, k), _PORT_IN_HOST)
                        for k, host in enumerate(hosts)
                        if without_port(host) != host
                    ]
            for j, condition in enumerate(rule.when):
                if condition.key.lower() in {"request.headers[:authority]", "request.headers[host]"}:
                    text = "compares letter by letter, 'hosts' of an operation does not: use that"
                    findings.append(Finding((*place, "when", j, "key"), text))
        return findings


_PATH_IN_DENY = (
    "an LLM is served at '/' and at every path that ends in '/chat/completions': requests get around the"
    " paths that {} names; let ALLOW name those that may be used"
)
_PORT_IN_HOST = (
    "hosts are compared without port and without a dot at the end; with them, a value is taken so that less"
    " is allowed and more denied"
)


def without_port(host: str) -> str:
    """Return a host of an operation without port and trailing dot, which requests do not have there."""
    return re.sub(r":([0-9]*\*?)$", "", host).removesuffix(".")


def _empty_lists(part: Source | Operation, path: Path) -> list[Finding]:
    return [Finding((*path, name), "is an empty list and has no effect") for name in part.empty_lists()]
