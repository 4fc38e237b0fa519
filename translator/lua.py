"""The Lua script of the provider clusters, and the data that tell it what to do for one provider.

The script (`llm_provider.lua`) is one text for all providers. It runs as an *upstream* HTTP filter, once for
each attempt, in front of the credential injector: it prepares the request, and reads the tokens that the
response reports. What differs between providers travels in the filter's own
configuration, `envoy.extensions.filters.http.lua.v3.Lua.filter_context`, which `filter_context` makes.

JSON values travel as JSON *text* and not as numbers of a protobuf Struct, which are doubles: `0.30` and
`12345678901234567890` leave as they were written.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

SCRIPT = files("translator").joinpath("llm_provider.lua").read_text(encoding="utf-8")
"""Text of the Lua script, for `Lua.default_source_code`."""

SCRIPT_SHA256 = hashlib.sha256(SCRIPT.encode()).hexdigest()
"""Hexadecimal SHA-256 of the script's UTF-8 bytes, to name a file that holds it."""

DEFAULT_MODELS = 100
"""How many models that clients choose metrics show, where a filter context does not say."""

CREDENTIAL_HEADER = "authorization"
"""The only header that a credential may be injected in.

The script removes it before each attempt. A credential in another header would be carried from a failed
attempt on to the next provider, because all attempts share one header map.
"""

_HEADER_VALUE = re.compile(r"[!-~]+")
_RECORD, _UNIT = "\x1e", "\x1f"
"""What separates operations, and their parts: control characters for this use, which no JSON text has."""
_PLAIN = frozenset(map(chr, range(0x20, 0x7F))) - {'"', "\\"}
_BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})


@dataclass(frozen=True, slots=True)
class Member:
    """A member that the provider wants in the JSON object of a request body.

    `path` is one key, or two for a member of an inner object
    (`("stream_options", "include_usage")`). `value`
    is JSON text, sent as it is. With the mode `force` it replaces what the client sent; with `fill` it is
    inserted only when the client sent nothing (an explicit `null` is something). `fill_stream` is `fill` for
    requests whose `stream`, as it is sent, is true: who inserts it asks for a chunk with the usage, and takes
    that chunk out of the answer again.

    Raises ValueError if `path` has neither one nor two keys, or `value` is not JSON (NaN is not).
    """

    path: tuple[str, ...]
    value: str
    mode: Literal["force", "fill", "fill_stream"]

    def __post_init__(self) -> None:
        if len(self.path) not in (1, 2):
            raise ValueError(f"member {'.'.join(self.path)!r}: a path has one or two keys")
        try:
            json.loads(self.value, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"member {'.'.join(self.path)!r}: the value is not JSON: {error}") from error


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of the provider's API.

    `suffix` is the end of the client's path that selects it (`/chat/completions`); `path` is what is sent and
    may have a query string. `members` are spliced into the body, which must be a JSON object then;
    with None the body and its headers pass as they are, and the client's query is kept.

    Raises ValueError if a path does not begin with `/` or has a character that a header cannot hold, or if
    two members contradict each other: the same path twice, a key and a member of the same key, two members
    with the mode `fill_stream`, or one whose outer key another member has, too.
    """

    method: str
    suffix: str
    path: str
    members: tuple[Member, ...] | None = None

    def __post_init__(self) -> None:
        for name, value in (("suffix", self.suffix), ("path", self.path)):
            if not value.startswith("/") or not _HEADER_VALUE.fullmatch(value):
                raise ValueError(
                    f"{name} {value!r}: must begin with / and hold visible ASCII characters only"
                )
        if self.suffix.endswith("/") or "?" in self.suffix:
            raise ValueError(f"suffix {self.suffix!r}: must not end with / or hold a query string")
        if self.members is None:
            return
        if self.method not in _BODY_METHODS:
            raise ValueError(f"{self.method} {self.suffix}: has no body to put members in")
        _check_members(f"{self.method} {self.suffix}", self.members)


def _check_members(operation: str, members: Sequence[Member]) -> None:
    paths = [member.path for member in members]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{operation}: member {'.'.join(path)!r} is given twice")
        if len(path) > 1 and path[:1] in paths:
            raise ValueError(f"{operation}: members {path[0]!r} and {'.'.join(path)!r} contradict each other")
    for_streams = [member.path[0] for member in members if member.mode == "fill_stream"]
    if len(for_streams) > 1:
        raise ValueError(f"{operation}: more than one fill_stream member")
    for key in for_streams:
        if [path[0] for path in paths].count(key) > 1:
            raise ValueError(f"{operation}: {key!r} has a fill_stream member, and another")


def filter_context(
    host: str,
    operations: Sequence[Operation],
    models: int = DEFAULT_MODELS,
    max_bytes: int | None = None,
) -> dict[str, Any]:
    """Return the `Lua.filter_context` of a provider, as the dict form of a protobuf Struct.

    `host` is the `:authority` that is sent. The first of `operations` is the provider's own one, which also
    answers POST to `/`. Of models that clients choose, metrics show the first `models`. A client's body of
    more than `max_bytes` is refused (None: only what Envoy does not buffer). The `id` in the result is a hash
    of all the rest: under it the script keeps what it made of a context.

    Envoy (1.40) copies the context for each request, which costs more the more fields there are. So nearly
    all is one text, whose grammar stands in the script.

    Raises ValueError if `host` is not a header value, the first operation is not a POST, or one comes twice.
    """
    if not _HEADER_VALUE.fullmatch(host):
        raise ValueError(f"host {host!r}: must hold visible ASCII characters only")
    if not operations or operations[0].method != "POST":
        raise ValueError("the first operation must be a POST: it is the provider's own")
    keys = [(operation.method, operation.suffix) for operation in operations]
    if len(set(keys)) < len(keys):
        raise ValueError("an operation (method and suffix) is given twice")
    own = operations[0]
    prefix = own.path.removesuffix(own.suffix) if own.path.endswith(own.suffix) else ""
    limit = "" if max_bytes is None else str(max_bytes)
    listed = (_RECORD + _operation(operation, prefix) for operation in operations)
    context = {"host": host, "data": _UNIT.join((prefix, str(models), limit)) + "".join(listed)}
    canonical = json.dumps(context, sort_keys=True, separators=(",", ":"))
    return {"id": hashlib.sha256(canonical.encode()).hexdigest()[:16], **context}


def _operation(operation: Operation, prefix: str) -> str:
    """Write an operation short, since each provider has half a dozen: `METHOD suffix [path]`, then members.

    The path is left out where it is prefix and suffix. Without anything behind it, the body passes unseen.
    """
    text = f"{operation.method} {operation.suffix}"
    if operation.path != prefix + operation.suffix:
        text += f" {operation.path}"
    if operation.members is None:
        return text
    return text + _UNIT + "".join(map(_member, operation.members))


def _member(member: Member) -> str:
    keys = [*map(json.dumps, member.path), ""]
    return "".join(field + _UNIT for field in (member.mode, member.value, *keys[:2]))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def literal(value: object) -> str:
    """Write texts, numbers, lists and mappings of them in Lua."""
    match value:
        case str():
            return '"' + "".join(c if c in _PLAIN else _escaped(c) for c in value) + '"'
        case int():
            return str(value)
        case Mapping():
            return "{" + ",".join(f"[{literal(key)}]={literal(item)}" for key, item in value.items()) + "}"
        case Sequence():
            return "{" + ",".join(map(literal, value)) + "}"
    raise TypeError(f"{type(value).__name__} is nothing that a filter context holds")


def _escaped(character: str) -> str:
    return "".join(f"\\{byte:03}" for byte in character.encode())
