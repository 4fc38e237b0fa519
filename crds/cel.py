"""CEL expressions, as far as Envoy evaluates them and none of them can read a credential.

The grammar (`cel.lark`) is a part of CEL: Envoy 1.40 has comprehensions, conversions to strings and the
extensions for strings, maths and lists switched off, and refuses the whole listener for one such expression.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedInput

from crds.credentials import check_name
from crds.values import regex

MAX_LENGTH = 2048
"""Characters of an expression."""
_MAX_DEPTH = 24

_Tree = Tree[Token]

_REQUEST = {
    "duration", "headers", "host", "id", "method", "path", "protocol", "query", "referer", "scheme", "size",
    "time", "total_size", "url_path", "useragent",
}  # fmt: skip
_RESPONSE = {
    "backend_latency", "code", "code_details", "flags", "grpc_status", "headers", "size", "total_size",
    "trailers",
}  # fmt: skip
_CONNECTION = {
    "dns_san_local_certificate", "dns_san_peer_certificate", "id", "mtls", "requested_server_name",
    "sha256_peer_certificate_digest", "subject_local_certificate", "subject_peer_certificate",
    "termination_details", "tls_version", "transport_failure_reason", "uri_san_local_certificate",
    "uri_san_peer_certificate",
}  # fmt: skip
_UPSTREAM = {
    "address", "cx_pool_ready_duration", "dns_san_local_certificate", "dns_san_peer_certificate",
    "local_address", "locality", "port", "request_attempt_count", "sha256_peer_certificate_digest",
    "subject_local_certificate", "subject_peer_certificate", "tls_version", "transport_failure_reason",
    "uri_san_local_certificate", "uri_san_peer_certificate",
}  # fmt: skip
_XDS = {
    "cluster_metadata", "cluster_name", "filter_chain_name", "listener_direction", "listener_metadata",
    "node", "route_metadata", "route_name", "upstream_host_metadata", "virtual_host_metadata",
    "virtual_host_name",
}  # fmt: skip
_ATTRIBUTES = {
    "connection": _CONNECTION,
    "destination": {"address", "port"},
    "metadata": {"filter_metadata", "typed_filter_metadata"},
    "request": _REQUEST,
    "response": _RESPONSE,
    "source": {"address", "port"},
    "upstream": _UPSTREAM,
    "xds": _XDS,
}
"""Envoy's attributes (docs/root/intro/arch_overview/advanced/attributes.rst)."""
_STATES = {"filter_state", "upstream_filter_state"}
_HEADERS = {"headers", "trailers"}
_CONSTANTS = {"true", "false", "null"}
_RESERVED = {
    "as", "break", "const", "continue", "else", "for", "function", "if", "import", "in", "let", "loop",
    "namespace", "package", "return", "var", "void", "while",
}  # fmt: skip
_FUNCTIONS = {"bool": 1, "bytes": 1, "double": 1, "duration": 1, "dyn": 1, "has": 1, "int": 1, "matches": 2,
              "size": 1, "timestamp": 1, "type": 1, "uint": 1}  # fmt: skip
_METHODS = {
    "contains": 1, "endsWith": 1, "matches": 1, "size": 0, "startsWith": 1,
    **dict.fromkeys(
        ("getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getFullYear", "getHours",
         "getMilliseconds", "getMinutes", "getMonth", "getSeconds"), 0
    ),
}  # fmt: skip
_JWT = "envoy.filters.http.jwt_authn"


def cel(text: str) -> str:
    """Check an expression, and return it unchanged.

    Raises ValueError for what Envoy 1.40 would refuse, and for what could read a credential.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"is longer than {MAX_LENGTH} characters")
    try:
        tree = _parser().parse(text)
    except UnexpectedCharacters as error:
        raise ValueError(_syntax_error(text, error.column)) from None
    except UnexpectedInput as error:
        raise ValueError(_syntax_error(text, getattr(error, "column", -1))) from None
    _check(tree, 0)
    return text


@cache
def _parser() -> Lark:
    grammar = Path(__file__).with_suffix(".lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", start="expression", maybe_placeholders=False)


def _syntax_error(text: str, column: int) -> str:
    where = f"at character {column}" if 0 < column <= len(text) else "at its end"
    return f"is no CEL expression that Envoy takes ({where})"


def _check(tree: _Tree, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"is nested deeper than {_MAX_DEPTH} levels")
    if tree.data == "contains":
        item, container = (_member(child) for child in tree.children)
        if container is not None and _is_map(container) and item is not None and _is_string(item):
            return  # whether a header is there does not tell what it holds
    if tree.data == "member":
        _check_member(tree)
    elif tree.data == "function":
        _check_call(tree, "function", _FUNCTIONS)
    elif tree.data == "method":
        _check_call(tree, "method", _METHODS)
    for child in tree.children:
        if isinstance(child, Tree):
            _check(child, depth + 1)


def _check_call(tree: _Tree, what: str, known: dict[str, int]) -> None:
    name, arguments = tree.children
    if not isinstance(name, Token) or not isinstance(arguments, Tree):
        raise TypeError("not the tree of a call")
    if name not in known:
        raise ValueError(f"uses the {what} '{name}', which Envoy does not have")
    if len(arguments.children) != known[name]:
        raise ValueError(f"calls '{name}' with {len(arguments.children)} arguments instead of {known[name]}")
    if name == "has" and not _selects(arguments.children[0]):
        raise ValueError("calls has() with something else than a member, such as request.path")
    if name == "matches" and (pattern := _string(arguments.children[-1])) is not None:
        try:
            regex(pattern)
        except ValueError as error:
            raise ValueError(f"calls matches() with a pattern that {error}") from None


def _check_member(tree: _Tree) -> None:
    root, *accessors = tree.children
    if not isinstance(root, Tree) or root.data != "name":
        return
    name = str(root.children[0])
    if name in _CONSTANTS:
        return
    if name in _RESERVED:
        raise ValueError(f"uses the reserved word '{name}'")
    path = list(_path(accessors))
    if name in _STATES:
        _check_state(name, path)
    elif name not in _ATTRIBUTES:
        raise ValueError(f"uses '{name}', which is no attribute of Envoy")
    elif not path or path[0] not in _ATTRIBUTES[name] or not _is_select(accessors[0]):
        known = ", ".join(sorted(_ATTRIBUTES[name]))
        raise ValueError(f"must name one attribute of {name}, as {name}.NAME; they are {known}")
    elif path[0] in _HEADERS and name in {"request", "response"}:
        _check_header(f"{name}.{path[0]}", path[1:])
    elif name == "metadata":
        _check_metadata(path)


def _check_state(name: str, path: list[str | None]) -> None:
    if not path or path[0] is None:
        raise ValueError(f"must name one entry of {name}, as {name}['name']: the whole may hold a key")
    check_name("the filter state", path[0])


def _check_header(headers: str, path: list[str | None]) -> None:
    if not path or path[0] is None:
        raise ValueError(f"must name one header, as {headers}['name']: all headers together hold the key")
    check_name("the header", path[0])


def _check_metadata(path: list[str | None]) -> None:
    names = path[1:]
    if len(names) < (3 if names and names[0] == _JWT else 2) or None in names[:3]:
        raise ValueError(
            "must name one entry of the metadata, as metadata.filter_metadata['filter']['name'] (of the "
            f"payload of a token one claim, as ['{_JWT}']['payload']['sub'])"
        )
    for name in names[1:]:
        if name is not None:
            check_name("the metadata", name)


def _path(accessors: list[Token | _Tree]) -> Iterator[str | None]:
    """Yield the names that accessors name; None where one is computed, and nothing after a method."""
    for accessor in accessors:
        if not isinstance(accessor, Tree) or accessor.data == "method":
            return
        if accessor.data == "select":
            yield str(accessor.children[0])
        else:
            yield _string(accessor.children[0])


def _member(node: Token | _Tree) -> _Tree | None:
    return node if isinstance(node, Tree) and node.data == "member" else None


def _is_select(accessor: Token | _Tree) -> bool:
    return isinstance(accessor, Tree) and accessor.data == "select"


def _selects(node: Token | _Tree) -> bool:
    member = _member(node)
    return member is not None and len(member.children) > 1 and _is_select(member.children[-1])


def _is_map(member: _Tree) -> bool:
    """Whether this is a map of headers or of filter state, as a whole."""
    root, *accessors = member.children
    if not isinstance(root, Tree) or root.data != "name":
        return False
    name, path = str(root.children[0]), list(_path(accessors))
    if name in _STATES:
        return not accessors
    return name in {"request", "response"} and len(accessors) == 1 and path[0] in _HEADERS


def _is_string(member: _Tree) -> bool:
    return _string(member) is not None


def _string(node: Token | _Tree) -> str | None:
    """Return the content of a string that stands alone."""
    if isinstance(node, Tree) and node.data == "member" and len(node.children) == 1:
        node = node.children[0]
    if isinstance(node, Tree) and node.data == "string":
        return str(node.children[0])[1:-1]
    return None
