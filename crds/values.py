"""Types of single values: host names, ports, durations, header names, regular expressions, any JSON.

Each type checks a value when a model is made, and carries the JSON schema that its field has in the CRD
manifests. The checks raise `ValueError` with a text for people; for a place below the field they raise the
error that `invalid` makes. No text holds the value of a secret.
"""

import ipaddress
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, timedelta
from decimal import Decimal
from typing import Annotated, Any

import re2  # type: ignore[import-untyped]
from pydantic import AfterValidator, BeforeValidator, Field, StrictInt, ValidationError, WithJsonSchema
from pydantic_core import InitErrorDetails, PydanticCustomError

from crds.problems import Finding, Path

MAX_DEPTH = 64
"""How deep lists and mappings may be nested."""

MAX_REGEX_PROGRAM = 100
"""The greatest RE2 program that Envoy takes.

It is the default of Envoy's runtime key `re2.max_program_size.error_level`; a greater one makes Envoy refuse
the whole route configuration.
"""

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DNS_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_KUBERNETES_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_KUBERNETES_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VISIBLE = re.compile(r"[!-~]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_DURATION_SCHEMA = r"^(([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h))+$"
_NANOSECONDS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "μs": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_MAX_NANOSECONDS = 2**63 - 1  # Go's time.Duration, in which Kubernetes and Istio hold it: 292 years


def invalid(*findings: Finding) -> ValidationError:
    """Make the error that a validator raises for places below its own field."""
    return ValidationError.from_exception_data(
        "",
        [
            # The input stays out: it may be a key.
            InitErrorDetails(
                type=PydanticCustomError("llmplane", "{text}", {"text": finding.message}),
                loc=finding.path,
                input=None,
            )
            for finding in findings
        ],
    )


def refuse(findings: Iterable[Finding]) -> None:
    """Raise what a validator found, if it found anything."""
    if found := list(findings):
        raise invalid(*found)


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def _dns_name(text: str) -> str:
    """Check a DNS name and return it in lower case."""
    name, _, port = text.partition(":")
    checks = (
        (not text, "is empty"),
        ("://" in text, f"must be a host name alone: remove '{name}://'"),
        ("*" in text, "must not hold a wildcard"),
        ("/" in text, "must be a host name alone, without a path"),
        (port.isdecimal(), f"must be a host name alone, without the port: '{name}'"),
        (text.endswith("."), "must not end in a dot"),
        (not text.isascii(), "must be ASCII: write an international name in its 'xn--' form"),
        (len(text) > 253, "is longer than 253 characters"),  # noqa: PLR2004 - RFC 1035
        (not _DNS_NAME.fullmatch(text), "is not a DNS name (labels of letters, digits and '-', by dots)"),
        (text.rpartition(".")[2].isdecimal(), "looks like an IP address, but is none"),
    )
    for bad, message in checks:
        if bad:
            raise ValueError(message)
    return text.lower()


def _host(text: str) -> str:
    """Check a DNS name or IP address and return it in lower case, IP addresses in their short form."""
    if text.startswith("[") or (text.count(":") > 1 and "/" not in text):
        if not _is_ip(text):
            raise ValueError("is not an IPv6 address (write it without brackets and zone)")
        return str(ipaddress.ip_address(text))
    return text if _is_ip(text) else _dns_name(text)


def route_host(text: str) -> str:
    """Check a host that clients call, and return it in lower case.

    Raises `ValueError` where it is neither a DNS name, nor an IP address, nor one of `*` and `*.suffix`.
    """
    if text == "*":
        return text
    if text.startswith("*."):
        return f"*.{_dns_name(text[2:])}"
    if text.startswith("*"):
        raise ValueError("may hold a wildcard only as '*' or as its first label ('*.example.com')")
    return _host(text)


def _path(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("must start with '/'")
    if not _VISIBLE.fullmatch(text):
        raise ValueError("must hold visible ASCII characters only: percent-encode the others")
    if "#" in text:
        raise ValueError("must not hold a fragment ('#')")
    return text


def _file_path(text: str) -> str:
    if not text.startswith("/") or _CONTROL.search(text):
        raise ValueError("must be the absolute path of a file on the proxy's machine")
    return text


def _line(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    if _CONTROL.search(text) or not _is_unicode(text):
        raise ValueError("must not hold control characters")
    return text


def _rule_name(text: str) -> str:
    # It is the subset part of a cluster's name: outbound|443|vip-route|dashscope.aliyuncs.com
    if "|" in text:
        raise ValueError("must not hold '|'")
    return _line(text)


def _kubernetes_name(text: str) -> str:
    if len(text) > 253 or not _KUBERNETES_NAME.fullmatch(text):  # noqa: PLR2004 - RFC 1123
        raise ValueError("must be a Kubernetes name (lower-case letters, digits, '-' and '.')")
    return text


def _namespace(text: str) -> str:
    if not _KUBERNETES_LABEL.fullmatch(text):
        raise ValueError("must be a namespace's name (lower-case letters, digits and '-')")
    return text


def _gateway(text: str) -> str:
    namespace, slash, name = text.rpartition("/")
    if slash and namespace != ".":
        _check_gateway_part(_namespace, namespace)
    _check_gateway_part(_kubernetes_name, name)
    return text


def _check_gateway_part(check: Any, text: str) -> None:
    try:
        check(text)
    except ValueError:
        raise ValueError("must be 'mesh', 'name', 'namespace/name' or './name'") from None


def _service(text: str) -> str:
    namespace, slash, name = text.rpartition("/")
    return f"{_namespace(namespace)}/{_host(name)}" if slash else _host(name)


def _export_to(text: str) -> str:
    if text not in {".", "*"} and not _KUBERNETES_LABEL.fullmatch(text):
        raise ValueError("must be '.', '*' or a namespace's name")
    return text


def header_name(text: str) -> str:
    """Check the name of a header and return it in lower case.

    Raises `ValueError` where it is no token of RFC 9110.
    """
    if not _TOKEN.fullmatch(text):
        raise ValueError("is not the name of a header")
    return text.lower()


def regex(text: str) -> str:
    """Check a regular expression against RE2, Envoy's engine, and Envoy's limit of its size.

    Raises `ValueError` with RE2's own words.
    """
    if not text:
        raise ValueError("is empty")
    options = re2.Options()
    options.log_errors = False
    try:
        program = re2.compile(text, options).programsize
    except re2.error as error:
        reason = error.args[0]
        if isinstance(reason, bytes):
            reason = reason.decode(errors="replace")
        raise ValueError(f"is no regular expression of RE2: {reason}") from None
    except UnicodeError:
        raise ValueError("is no Unicode text") from None
    if program > MAX_REGEX_PROGRAM:
        raise ValueError(
            f"is too large for Envoy: an RE2 program of {program} instructions, at most {MAX_REGEX_PROGRAM}"
        )
    return text


def duration(value: object) -> timedelta:
    """Read a duration in Go's grammar (`10s`, `1h30m`, `250ms`, `0`), as Istio does, in whole milliseconds.

    Raises `ValueError` for anything else, and for negative ones.
    """
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str):
        raise ValueError("must be a duration with its unit, such as 10s")  # noqa: TRY004 - pydantic's convention
    if value == "0":
        return timedelta(0)
    if value.startswith("-"):
        raise ValueError("must not be negative")
    total, position = Decimal(0), 0
    for part in _DURATION_PART.finditer(value):
        if part.start() != position:
            break
        total += Decimal(part[1]) * _NANOSECONDS[part[2]]
        position = part.end()
    if not value or position != len(value):
        raise ValueError("must be a duration such as 10s, 1h30m or 250ms")
    if total > _MAX_NANOSECONDS:
        raise ValueError("is longer than 292 years")
    if total % 10**6:
        raise ValueError("must be a whole number of milliseconds")
    return timedelta(milliseconds=int(total) // 10**6)


def _positive(value: timedelta) -> timedelta:
    if not value:
        raise ValueError("must be at least 1ms")
    return value


def _not_empty(items: tuple[Any, ...]) -> tuple[Any, ...]:
    if not items:
        raise ValueError("is empty")
    return items


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeError:  # a lone surrogate: JSON can write it, UTF-8 cannot
        return False
    return True


def _json_findings(value: object, path: Path) -> Iterator[Finding]:
    """Say what in a value is not JSON."""
    if len(path) > MAX_DEPTH:
        yield Finding(path[:1], f"is nested deeper than {MAX_DEPTH} levels")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _json_findings(item, (*path, index))
    elif isinstance(value, Mapping):
        for name, member in value.items():
            if isinstance(name, str) and _is_unicode(name):
                yield from _json_findings(member, (*path, name))
            else:
                yield Finding(path, "has a member whose name is not a string: write it in quotes")
    elif isinstance(value, float) and not math.isfinite(value):
        yield Finding(path, "is not a number that JSON can write")
    elif isinstance(value, str) and not _is_unicode(value):
        yield Finding(path, "is no Unicode text")
    elif not isinstance(value, bool | int | float | str | None):
        yield Finding(path, f"is {describe(value)}, which JSON does not have: write it in quotes")


def _json_members(members: Mapping[str, Any]) -> Mapping[str, Any]:
    refuse(_json_findings(members, ()))
    return members


def describe(value: object) -> str:
    """Say what a value is, never what it holds: it may be a key."""
    names: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (type(None), "empty"),
        (bool, "true or false"),
        ((int, float), "a number"),
        (str, "a string"),
        (Mapping, "a mapping"),
        ((list, tuple), "a list"),
        (date, "a date"),
    )
    return next((name for types, name in names if isinstance(value, types)), "something else")


_HOST_SCHEMA = {
    "type": "string",
    "minLength": 1,
    "maxLength": 253,
    "pattern": r"^([0-9A-Za-z.-]+|[0-9A-Fa-f.]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)$",
}

Host = Annotated[str, AfterValidator(_host), WithJsonSchema(_HOST_SCHEMA)]
"""A DNS name or an IP address, in lower case."""

DnsName = Annotated[
    str, AfterValidator(_dns_name), WithJsonSchema({**_HOST_SCHEMA, "pattern": "^[0-9A-Za-z.-]+$"})
]
"""A DNS name, in lower case."""

RouteHost = Annotated[
    str,
    AfterValidator(route_host),
    WithJsonSchema(
        {
            **_HOST_SCHEMA,
            "pattern": r"^(\*|(\*\.)?[0-9A-Za-z.-]+|[0-9A-Fa-f.]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)$",
        }
    ),
]
"""A host that clients call: a DNS name, an IP address, `*`, or a name whose first label is `*`."""

Port = Annotated[StrictInt, Field(ge=1, le=65535)]
"""A TCP port."""

Count = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
"""A whole number, not negative (Kubernetes' int32)."""

Limit = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]
"""A number of things that may be there at once; there is no limit of 0."""

RequestPath = Annotated[
    str, AfterValidator(_path), WithJsonSchema({"type": "string", "pattern": r'^/[!"$-~]*$'})
]
"""The path of a request, with its query."""

OperationPath = Annotated[
    RequestPath,
    WithJsonSchema({"type": "string", "pattern": r'^/[!"$->@-~]*[!"$-.0->@-~]$'}),
]
"""The path of an operation below another one: no query, and no `/` at its end (what it is in checks that)."""

FilePath = Annotated[str, AfterValidator(_file_path), WithJsonSchema({"type": "string", "pattern": "^/"})]
"""The absolute path of a file on the machine of the proxy."""

Line = Annotated[str, AfterValidator(_line), WithJsonSchema({"type": "string", "minLength": 1})]
"""Text that is not empty and has no control characters."""

RuleName = Annotated[
    str, AfterValidator(_rule_name), WithJsonSchema({"type": "string", "minLength": 1, "pattern": "^[^|]+$"})
]
"""The name of a rule of an LLMRoute."""

KubernetesName = Annotated[
    str,
    AfterValidator(_kubernetes_name),
    WithJsonSchema({"type": "string", "maxLength": 253, "pattern": f"^{_KUBERNETES_NAME.pattern}$"}),
]
"""The name of a Kubernetes object (RFC 1123 subdomain)."""

Namespace = Annotated[
    str,
    AfterValidator(_namespace),
    WithJsonSchema({"type": "string", "maxLength": 63, "pattern": f"^{_KUBERNETES_LABEL.pattern}$"}),
]
"""The name of a namespace (RFC 1123 label)."""

GatewayName = Annotated[
    str,
    AfterValidator(_gateway),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": rf"^((\.|{_KUBERNETES_LABEL.pattern})/)?{_KUBERNETES_NAME.pattern}$",
        }
    ),
]
"""`mesh`, `name`, `namespace/name` or `./name`, as in a VirtualService."""

ServiceName = Annotated[
    str,
    AfterValidator(_service),
    WithJsonSchema({"type": "string", "minLength": 1, "pattern": "^([a-z0-9-]+/)?[0-9A-Za-z.:-]+$"}),
]
"""`[<namespace>/]<host>`, as in Istio's MeshConfig.ExtensionProvider."""

ExportTo = Annotated[
    str,
    AfterValidator(_export_to),
    WithJsonSchema({"type": "string", "maxLength": 63, "pattern": rf"^(\.|\*|{_KUBERNETES_LABEL.pattern})$"}),
]
"""`.` (own namespace), `*` (all) or the name of a namespace, as in Istio."""

Regex = Annotated[str, AfterValidator(lambda text: text if text == "*" else regex(text))]
"""A regular expression that Envoy takes, or `*`."""

Duration = Annotated[
    timedelta,
    BeforeValidator(duration),
    WithJsonSchema({"type": "string", "pattern": f"^0$|{_DURATION_SCHEMA}"}),
]
"""A duration in Go's grammar."""

PositiveDuration = Annotated[
    timedelta,
    BeforeValidator(duration),
    AfterValidator(_positive),
    WithJsonSchema({"type": "string", "pattern": _DURATION_SCHEMA}),
]
"""A duration in Go's grammar, at least 1ms."""

JsonMembers = Annotated[
    Mapping[str, Any],
    AfterValidator(_json_members),
    WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
]
"""Members of a JSON object: any JSON."""

NOT_EMPTY = (AfterValidator(_not_empty), Field(json_schema_extra={"minItems": 1}))
"""Added to the type of a list that must not be empty; pydantic's own minimum counts valid items only."""
