"""Envoy's format strings (access logs, tags of traces): `%COMMAND(argument):length%` between plain text.

A format that Envoy would refuse makes it refuse the whole listener, so each is checked here for what Envoy
1.40 takes (docs/root/configuration/advanced/substitution_formatter.rst; the grammar is that of its own
regular expression), and for what could print a credential (`crds.credentials`).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from crds.cel import cel
from crds.credentials import check_environment, check_name

JsonFormat = Mapping[str, "JsonValue"]
"""A format in JSON: the strings in it are format strings."""
JsonValue = str | float | bool | list["JsonValue"] | dict[str, "JsonValue"] | None

_OPERATOR = re.compile(r"%([A-Z0-9_]+)(?:\((.*?)\))?(?::([0-9]{1,9}))?%")
_BARE = re.compile(r"([A-Z][A-Z0-9_]*)\(([^()%\s]*)\)(:[0-9]{1,9})?")
_BARE_STATE = re.compile(r"(?<!\S)FILTER_STATE\([^()%\s]+\)(?::[0-9]{1,9})?(?!\S)")
_HEADER = re.compile(r":?[!#$&'*+.^_`|~0-9A-Za-z-]+")
_JWT = "envoy.filters.http.jwt_authn"
_MAX_JSON_DEPTH = 16


@dataclass(frozen=True, slots=True)
class Operator:
    """One `%COMMAND(argument):length%`. Envoy takes `()` for no argument."""

    command: str
    argument: str = ""
    length: int | None = None


def operators(text: str) -> Iterator[Operator]:
    """Yield the operators of a format string, as Envoy finds them; `%%` is a percent sign.

    Raises ValueError at a percent sign that begins none.
    """
    position = text.find("%")
    while position >= 0:
        if text.startswith("%%", position):
            end = position + 2
        else:
            found = _OPERATOR.match(text, position)
            if found is None:
                raise ValueError(
                    f"has a '%' at character {position + 1} that begins no operator such as %DURATION% "
                    "(write %% for a percent sign)"
                )
            yield Operator(found[1], found[2] or "", int(found[3]) if found[3] else None)
            end = found.end()
        position = text.find("%", end)


def check_format(text: str) -> None:
    """Raise ValueError for a format string that Envoy 1.40 refuses, or that could print a credential."""
    if "\0" in text:
        raise ValueError("must not hold NUL characters")
    for operator in operators(text):
        try:
            _check(operator)
        except ValueError as error:
            raise ValueError(f"%{operator.command}%: {error}") from None


def text_format(text: str) -> str:
    """Read a text format, with Istio's newline at its end.

    A word that is one bare `FILTER_STATE(...)` is read as if it was written with percent signs: so the text
    of the document on observing LLM traffic (seed 002) can be pasted as it is.

    Raises ValueError as `check_format`.
    """
    text = _BARE_STATE.sub(lambda found: f"%{found[0]}%", text)
    check_format(text)
    return text if text.endswith("\n") else text + "\n"


def json_format(members: Mapping[str, object], depth: int = 0) -> dict[str, JsonValue]:
    """Read a format in JSON.

    A value that is exactly one bare operator with its parentheses is read as if it was written with percent
    signs (seed 002). Raises ValueError that names the member.
    """
    made: dict[str, JsonValue] = {}
    for name, value in members.items():
        try:
            made[str(name)] = _json_value(value, depth)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return made


def _json_value(value: object, depth: int) -> JsonValue:
    if depth > _MAX_JSON_DEPTH:
        raise ValueError(f"is nested deeper than {_MAX_JSON_DEPTH} levels")
    if isinstance(value, str):
        if (bare := _BARE.fullmatch(value)) and bare[1] in _CHECKS:
            value = f"%{value}%"
        check_format(value)
        return value
    if isinstance(value, Mapping):
        return json_format(value, depth + 1)
    if isinstance(value, list | tuple):
        return [_json_value(item, depth + 1) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ValueError("is no value that JSON has: write it in quotes")


def commands(value: JsonValue | JsonFormat) -> set[str]:
    """Return the commands of a valid format, for those that Envoy needs an extension for."""
    if isinstance(value, str):
        return {operator.command for operator in operators(value)}
    if isinstance(value, Mapping):
        return {name for item in value.values() for name in commands(item)}
    if isinstance(value, list):
        return {name for item in value for name in commands(item)}
    return set()


def _check(operator: Operator) -> None:
    if operator.command in _PLAIN:
        if operator.argument or operator.length is not None:
            raise ValueError("takes neither an argument nor a length")
        return
    if operator.command not in _CHECKS:
        raise ValueError(_FORBIDDEN.get(operator.command, "is no operator of Envoy 1.40"))
    check, takes_length = _CHECKS[operator.command]
    if operator.length is not None and not takes_length:
        raise ValueError("takes no length")
    check(operator.argument)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _any(_argument: str) -> None:
    """Accept anything: Envoy does."""


def _header(argument: str) -> None:
    """`NAME` or `NAME?ALTERNATIVE`."""
    names = argument.split("?")
    if len(names) > 2 or not names[0]:  # noqa: PLR2004 - Envoy takes one alternative
        raise ValueError("takes the name of a header, and at most one alternative after a '?'")
    for name in filter(None, names):
        if not _HEADER.fullmatch(name):
            raise ValueError(f"'{name}' is not the name of a header")
        check_name("the header", name)


def _one_of(*choices: str) -> Callable[[str], None]:
    def check(argument: str) -> None:
        if argument and argument not in choices:
            raise ValueError(f"takes {' or '.join(choices)} only")

    return check


def _path(argument: str) -> None:
    query, _, source = argument.partition(":")
    _one_of("WQ", "NQ")(query)
    _one_of("ORIG", "PATH", "ORIG_OR_PATH")(source)


def _server_name(argument: str) -> None:
    first, _, host = argument.partition(":")
    _one_of("SNI_ONLY", "SNI_FIRST", "HOST_FIRST")(first)
    _one_of("ORIG", "HOST", "ORIG_OR_HOST")(host)


def _parameter(argument: str) -> None:
    if not argument:
        raise ValueError("takes the name of a parameter of the query")
    check_name("the parameter", argument)


def _time(argument: str) -> None:
    if not argument.isprintable():
        raise ValueError("takes a format of printable characters")


def _duration(argument: str) -> None:
    """`START:END[:PRECISION]`; points that Envoy does not know print '-'."""
    parts = argument.split(":")
    if len(parts) not in {2, 3} or not all(parts):
        raise ValueError("takes START:END or START:END:PRECISION")
    if len(parts) > 2 and parts[2] not in {"ms", "us", "ns"}:  # noqa: PLR2004
        raise ValueError("takes the precision ms, us or ns")


def _dynamic(argument: str) -> None:
    """`NAMESPACE:KEY...`; a whole namespace may hold anything, and so may the payload of a token."""
    namespace, *keys = argument.split(":")
    if not namespace or not all(keys) or len(keys) < (2 if namespace == _JWT else 1):
        raise ValueError(
            f"must name one value, as NAMESPACE:KEY (of a token's payload one claim, as {_JWT}:payload:sub)"
        )
    for key in keys:
        check_name("the metadata", key)


def _configured(argument: str) -> None:
    """Metadata of the configuration, which holds no secret."""
    if not argument:
        raise ValueError("takes NAMESPACE:KEY")


def _metadata(argument: str) -> None:
    """`TYPE:NAMESPACE:KEY...` (envoy.formatter.metadata)."""
    kind, _, rest = argument.partition(":")
    if kind == "DYNAMIC":
        _dynamic(rest)
    elif kind not in _METADATA_TYPES:
        raise ValueError(f"takes metadata of {', '.join(_METADATA_TYPES)} or DYNAMIC only")


def _state(argument: str) -> None:
    """`KEY`, `KEY:PLAIN`, `KEY:TYPED` or `KEY:FIELD:name`."""
    key, *form = argument.split(":")
    if not key:
        raise ValueError("takes the name of a filter state")
    check_name("the filter state", key)
    is_field = len(form) == 2 and form[0] == "FIELD" and form[1]  # noqa: PLR2004
    if form and not is_field and (len(form) > 1 or form[0] not in {"", "PLAIN", "TYPED"}):
        raise ValueError("takes KEY, KEY:PLAIN, KEY:TYPED or KEY:FIELD:NAME")


def _cel(argument: str) -> None:
    cel(argument)


_METADATA_TYPES = ("CLUSTER", "LISTENER", "LISTENER_FILTER_CHAIN", "ROUTE", "UPSTREAM_HOST", "VIRTUAL_HOST")

_CHECKS: dict[str, tuple[Callable[[str], None], bool]] = {
    "CEL": (_cel, True),
    "CLUSTER_METADATA": (_configured, False),
    "COMMON_DURATION": (_duration, False),
    "DOWNSTREAM_PEER_CERT_V_END": (_time, False),
    "DOWNSTREAM_PEER_CERT_V_START": (_time, False),
    "DYNAMIC_METADATA": (_dynamic, True),
    "EMIT_TIME": (_time, False),
    "EMIT_TIME_LOCAL": (_time, False),
    "ENVIRONMENT": (check_environment, True),
    "FILTER_STATE": (_state, True),
    "GRPC_STATUS": (_one_of("CAMEL_STRING", "SNAKE_STRING", "NUMBER"), False),
    "METADATA": (_metadata, True),
    "PATH": (_path, True),
    "QUERY_PARAM": (_parameter, True),
    "QUERY_PARAMS": (_one_of("ORIG", "DECODED"), True),
    "REQ": (_header, True),
    "REQUESTED_SERVER_NAME": (_server_name, False),
    "REQUEST_HEADER": (_header, True),
    "REQ_WITHOUT_QUERY": (_header, True),
    "RESP": (_header, True),
    "RESPONSE_CODE_DETAILS": (_any, False),
    "RESPONSE_HEADER": (_header, True),
    "RESPONSE_TRAILER": (_header, True),
    "START_TIME": (_time, False),
    "START_TIME_LOCAL": (_time, False),
    "TRAILER": (_header, True),
    "UPSTREAM_FILTER_STATE": (_state, True),
    "UPSTREAM_METADATA": (_configured, False),
    "UPSTREAM_PEER_CERT_V_END": (_time, False),
    "UPSTREAM_PEER_CERT_V_START": (_time, False),
}
"""Operators with an argument: what checks it, and whether they take a length."""

_FORBIDDEN = {
    "COALESCE": "is not supported: write one operator",
    "FILE_CONTENT": "is not supported: a file may hold a key",
    "SECRET": "is not supported: it prints a secret",
}

_PLAIN = _words(
    """
    ACCESS_LOG_TYPE BYTES_RECEIVED BYTES_RETRANSMITTED BYTES_SENT CONNECTION_ID
    CONNECTION_TERMINATION_DETAILS CUSTOM_FLAGS DOWNSTREAM_CX_RTT
    DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_SENT
    DOWNSTREAM_DETECTED_CLOSE_TYPE DOWNSTREAM_DIRECT_LOCAL_ADDRESS
    DOWNSTREAM_DIRECT_LOCAL_ADDRESS_ENDPOINT_ID DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT
    DOWNSTREAM_DIRECT_LOCAL_PORT DOWNSTREAM_DIRECT_REMOTE_ADDRESS
    DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT DOWNSTREAM_DIRECT_REMOTE_PORT
    DOWNSTREAM_HANDSHAKE_DURATION DOWNSTREAM_HEADER_BYTES_RECEIVED DOWNSTREAM_HEADER_BYTES_SENT
    DOWNSTREAM_LOCAL_ADDRESS DOWNSTREAM_LOCAL_ADDRESS_ENDPOINT_ID DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT
    DOWNSTREAM_LOCAL_CLOSE_REASON DOWNSTREAM_LOCAL_DNS_SAN DOWNSTREAM_LOCAL_EMAIL_SAN
    DOWNSTREAM_LOCAL_IP_SAN DOWNSTREAM_LOCAL_OTHERNAME_SAN DOWNSTREAM_LOCAL_PORT
    DOWNSTREAM_LOCAL_SUBJECT DOWNSTREAM_LOCAL_URI_SAN DOWNSTREAM_PEER_CERT
    DOWNSTREAM_PEER_CHAIN_FINGERPRINTS_1 DOWNSTREAM_PEER_CHAIN_FINGERPRINTS_256
    DOWNSTREAM_PEER_CHAIN_SERIALS DOWNSTREAM_PEER_DNS_SAN DOWNSTREAM_PEER_EMAIL_SAN
    DOWNSTREAM_PEER_FINGERPRINT_1 DOWNSTREAM_PEER_FINGERPRINT_256 DOWNSTREAM_PEER_IP_SAN
    DOWNSTREAM_PEER_ISSUER DOWNSTREAM_PEER_ISSUER_FINGERPRINT_256 DOWNSTREAM_PEER_ISSUER_SERIAL
    DOWNSTREAM_PEER_OTHERNAME_SAN DOWNSTREAM_PEER_SERIAL DOWNSTREAM_PEER_SUBJECT DOWNSTREAM_PEER_URI_SAN
    DOWNSTREAM_REMOTE_ADDRESS DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT DOWNSTREAM_REMOTE_PORT
    DOWNSTREAM_TLS_CIPHER DOWNSTREAM_TLS_GROUP DOWNSTREAM_TLS_SESSION_ID DOWNSTREAM_TLS_VERSION
    DOWNSTREAM_TRANSPORT_FAILURE_REASON DOWNSTREAM_WIRE_BYTES_RECEIVED DOWNSTREAM_WIRE_BYTES_SENT
    DURATION FILTER_CHAIN_NAME GRPC_STATUS_NUMBER HOSTNAME LISTENER_NAME LOCAL_REPLY_BODY
    PACKETS_RETRANSMITTED PROTOCOL REQUEST_DURATION REQUEST_HEADERS_BYTES REQUEST_TX_DURATION
    RESPONSE_CODE RESPONSE_DURATION RESPONSE_FLAGS RESPONSE_FLAGS_LONG RESPONSE_HEADERS_BYTES
    RESPONSE_TRAILERS_BYTES RESPONSE_TX_DURATION ROUNDTRIP_DURATION ROUTE_NAME ROUTE_RESOLUTION_COUNT
    ROUTE_RESOLUTION_TIME_US SPAN_ID STREAM_ID TLS_JA3_FINGERPRINT TLS_JA4_FINGERPRINT TRACE_ID
    UNIQUE_ID UPSTREAM_CLUSTER UPSTREAM_CLUSTER_RAW UPSTREAM_CONNECTION_ID
    UPSTREAM_CONNECTION_IDS_ATTEMPTED UPSTREAM_CONNECTION_POOL_READY_DURATION
    UPSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED UPSTREAM_DECOMPRESSED_HEADER_BYTES_SENT
    UPSTREAM_DETECTED_CLOSE_TYPE UPSTREAM_HEADER_BYTES_RECEIVED UPSTREAM_HEADER_BYTES_SENT UPSTREAM_HOST
    UPSTREAM_HOSTS_ATTEMPTED UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT UPSTREAM_HOST_NAME
    UPSTREAM_HOST_NAMES_ATTEMPTED UPSTREAM_HOST_NAMES_ATTEMPTED_WITHOUT_PORT
    UPSTREAM_HOST_NAME_WITHOUT_PORT UPSTREAM_LOCAL_ADDRESS UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT
    UPSTREAM_LOCAL_CLOSE_REASON UPSTREAM_LOCAL_DNS_SAN UPSTREAM_LOCAL_IP_SAN UPSTREAM_LOCAL_PORT
    UPSTREAM_LOCAL_URI_SAN UPSTREAM_PEER_CERT UPSTREAM_PEER_DNS_SAN UPSTREAM_PEER_IP_SAN
    UPSTREAM_PEER_ISSUER UPSTREAM_PEER_SUBJECT UPSTREAM_PEER_URI_SAN UPSTREAM_PROTOCOL
    UPSTREAM_REMOTE_ADDRESS UPSTREAM_REMOTE_ADDRESS_ENDPOINT_ID UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT
    UPSTREAM_REMOTE_PORT UPSTREAM_REQUEST_ATTEMPT_COUNT UPSTREAM_SERVER_NAME UPSTREAM_TLS_CIPHER
    UPSTREAM_TLS_GROUP UPSTREAM_TLS_SESSION_ID UPSTREAM_TLS_VERSION UPSTREAM_TRANSPORT_FAILURE_REASON
    UPSTREAM_WIRE_BYTES_RECEIVED UPSTREAM_WIRE_BYTES_SENT VIRTUAL_CLUSTER_NAME
    """
)
"""Operators that stand alone."""
