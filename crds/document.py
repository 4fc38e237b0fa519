"""YAML documents with the line of every member, read so that no text can do harm.

libyaml splits the text into events; this module makes values of them. PyYAML's own composer and constructor
know no duplicate members, keep no lines, recurse, and expand aliases without bounds. Scalars are read as
Kubernetes' tools do (YAML 1.1 words for booleans, YAML 1.2 numbers such as `1e-3`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.reader import Reader
from yaml.resolver import BaseResolver

from crds.problems import Path
from crds.values import MAX_DEPTH, describe

_BREAK = r"\r\n|[\n\r\x85\u2028\u2029]"  # what ends a line in libyaml
_BREAKS = re.compile(_BREAK)
_SEPARATOR = re.compile(rf"(?:\A|(?<=[\n\r\x85\u2028\u2029]))---(?=[ \t]|{_BREAK}|\Z)")
_SURROGATES = re.compile(r"(?<!\\)((?:\\\\)*)\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})", re.IGNORECASE)
_INT_LIMIT = 2**64
_EXPANSION = 10  # aliases may make a document this many times as large ...
_FREE_EXPANSION = 10_000  # ... and this many values larger


class _Resolver(BaseResolver):
    """What a plain scalar is."""


_YES_NO = r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"
_INT = r"[-+]?(0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_TIMESTAMP = (
    r"\d{4}-\d\d-\d\d|\d{4}-\d\d?-\d\d?([Tt]|[ \t]+)\d\d?:\d\d:\d\d(\.\d*)?([ \t]*(Z|[-+]\d\d?(:\d\d)?))?"
)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", _YES_NO, list("yYnNtTfFoO")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
    ("timestamp", _TIMESTAMP, list("0123456789")),
    ("merge", "<<", ["<"]),
):
    _Resolver.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z", re.ASCII), _first
    )

_resolver = _Resolver()
_constructor = SafeConstructor()
_STRING = "tag:yaml.org,2002:str"
_CONSTRUCT = {
    "tag:yaml.org,2002:null": _constructor.construct_yaml_null,
    "tag:yaml.org,2002:bool": _constructor.construct_yaml_bool,
    "tag:yaml.org,2002:int": _constructor.construct_yaml_int,
    "tag:yaml.org,2002:float": _constructor.construct_yaml_float,
    "tag:yaml.org,2002:timestamp": _constructor.construct_yaml_timestamp,
    _STRING: _constructor.construct_yaml_str,
}
_MERGE = "tag:yaml.org,2002:merge"
_COLLECTION_TAGS = {None, "!", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}


@dataclass(frozen=True, slots=True)
class Chunk:
    """The text of one document, and the line of the file before its first one."""

    text: str
    lines_before: int


@dataclass(slots=True, eq=False)
class Node:
    """A value and where it stands. Aliases share their node."""

    line: int
    scalar: Any = None
    members: dict[str, "Member"] | None = None
    """The members of a mapping."""
    items: list["Node"] | None = None
    """The items of a list."""
    complete: bool = True
    """Whether the end of the mapping or list was read."""
    size: int = 1
    """How many values it holds, aliases expanded."""
    depth: int = 1

    def plain(self) -> Any:
        """Return the value alone: None, bool, int, float, str, date, dict, list."""
        if self.members is not None:
            return {name: member.node.plain() for name, member in self.members.items()}
        if self.items is not None:
            return [item.plain() for item in self.items]
        return self.scalar

    def get(self, name: str) -> "Node | None":
        """Return a member of a mapping."""
        member = (self.members or {}).get(name)
        return member.node if member else None

    def line_of(self, path: Path) -> int:
        """Return the line of the place, or of the nearest place around it that exists."""
        node, line = self, self.line
        for part in path:
            if isinstance(part, str) and node.members is not None and part in node.members:
                line, node = node.members[part].line, node.members[part].node
            elif isinstance(part, int) and node.items is not None and part < len(node.items):
                node = node.items[part]
                line = node.line
            else:
                break
        return line


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a mapping, and the line of its name."""

    line: int
    node: Node


@dataclass(frozen=True, slots=True)
class Flaw:
    """What is wrong with a text. `path` is the place in the document, `column` is set where it is no YAML."""

    line: int
    message: str
    path: Path = ()
    column: int = 0


@dataclass(slots=True)
class Document:
    """What could be read of a text."""

    root: Node | None = None
    flaws: list[Flaw] = field(default_factory=list)
    readable: bool = True
    """Whether the text is YAML to its end, within bounds."""


def split(text: str) -> Iterator[Chunk]:
    """Split a file at the lines `---`, so that one broken document does not spoil the others."""
    text = text.removeprefix("\ufeff")
    starts = [0, *(found.start() for found in _SEPARATOR.finditer(text)), len(text)]
    lines = 0
    for start, end in pairwise(starts):
        chunk = text[start:end]
        if not _is_blank(chunk.removeprefix("---")):
            yield Chunk(chunk, lines)
        lines += len(_BREAKS.findall(chunk))


def _is_blank(text: str) -> bool:
    """Whether there are only comments, directives and ends of documents."""
    lines = (line.strip() for line in text.splitlines())
    return all(not line or line == "..." or line.startswith(("#", "%")) for line in lines)


def _character(escaped: re.Match[str]) -> str:
    # JSON writes characters beyond U+FFFF as two escapes, which libyaml refuses.
    pair = bytes.fromhex(escaped[2] + escaped[3])
    return escaped[1] + pair.decode("utf-16-be")


def compose(chunk: Chunk) -> Document:
    """Read one document. Never raises: what is wrong is in the document's flaws."""
    composer = _Composer(chunk)
    try:
        composer.run()
    except _FlawError as error:
        composer.document.flaws.append(error.flaw)
        composer.document.readable = False
    except yaml.MarkedYAMLError as error:
        composer.document.flaws.append(_yaml_flaw(error, chunk))
        composer.document.readable = False
    return composer.document


class _FlawError(Exception):
    """The text cannot be read any further."""

    def __init__(self, flaw: Flaw) -> None:
        super().__init__(flaw.message)
        self.flaw = flaw


def _yaml_flaw(error: yaml.MarkedYAMLError, chunk: Chunk) -> Flaw:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line, mark.column) if mark else (0, 0)
    lines = chunk.text.splitlines()
    text = lines[line] if line < len(lines) else ""
    indentation = text[: len(text) - len(text.lstrip())]
    if "\t" in indentation:
        message, column = "indented with a tab: YAML takes spaces only", indentation.index("\t")
    else:
        message = f"is not valid YAML: {error.problem}"
    return Flaw(chunk.lines_before + line + 1, message, column=column + 1)


class _Name(Enum):
    """Instead of the name of a member."""

    MERGE = "<<"
    """The value's members become members of this mapping."""
    NONE = ""
    """What stands there cannot be a name; the value is dropped."""


@dataclass(slots=True)
class _Frame:
    """A mapping or list whose end was not read yet."""

    node: Node
    path: Path
    anchor: str | None
    name: str | _Name | None = None
    """The member whose value comes next; None: a name comes next."""
    line: int = 0
    """Where that name stands."""
    merged: list[Node] = field(default_factory=list)


def _line(event: yaml.Event) -> int:
    """Return the line of the chunk where an event begins, from 0."""
    return event.start_mark.line if event.start_mark else 0


class _Composer:
    """Makes nodes of the events of one document; keeps its own stack, for no text may overflow Python's."""

    def __init__(self, chunk: Chunk) -> None:
        self.document = Document()
        self._chunk = chunk
        self._stack: list[_Frame] = []
        self._anchors: dict[str, Node] = {}
        self._count = 0

    def run(self) -> None:
        text = self._chunk.text
        if bad := Reader.NON_PRINTABLE.search(text):
            line, column = text.count("\n", 0, bad.start()), bad.start() - text.rfind("\n", 0, bad.start())
            # Bytes that are no UTF-8 come as lone surrogates (Python's "surrogateescape").
            is_byte = "\udc80" <= bad[0] <= "\udcff"
            why = "is not UTF-8" if is_byte else f"is not valid YAML: it holds U+{ord(bad[0]):04X}"
            raise self._fatal(line, why, column)
        if text.lstrip().startswith(("{", "[")):
            text = _SURROGATES.sub(_character, text)
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):
            if isinstance(event, yaml.ScalarEvent):
                self._scalar(event)
            elif isinstance(event, yaml.CollectionStartEvent):
                self._start(event)
            elif isinstance(event, yaml.CollectionEndEvent):
                self._end()
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor not in self._anchors:
                    raise self._fatal(_line(event), f"'*{event.anchor}' refers to nothing before it")
                self._attach(self._anchors[event.anchor])

    def _fatal(self, line: int, message: str, column: int = 0) -> _FlawError:
        return _FlawError(Flaw(self._chunk.lines_before + line + 1, message, column=column))

    def _flaw(self, line: int, message: str, path: Path) -> None:
        self.document.flaws.append(Flaw(line, message, path))

    def _node(self, event: yaml.NodeEvent) -> Node:
        self._count += 1
        return Node(self._chunk.lines_before + _line(event) + 1)

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        node = self._node(event)
        if event.tag is None and event.implicit[0]:
            tag = _resolver.resolve(yaml.ScalarNode, event.value, (True, False))  # type: ignore[no-untyped-call]
        else:
            tag = _STRING if event.tag in {None, "!"} else event.tag
        frame = self._stack[-1] if self._stack else None
        if tag == _MERGE and frame and frame.node.members is not None and frame.name is None:
            frame.name = _Name.MERGE
            return
        problem = ""
        if tag in _CONSTRUCT:
            try:
                node.scalar = _CONSTRUCT[tag](yaml.ScalarNode(tag, event.value))
            except (ValueError, LookupError, AttributeError, yaml.YAMLError):
                problem = f"is no {tag.rpartition(':')[2]}: write it in quotes"
            if isinstance(node.scalar, int) and abs(node.scalar) >= _INT_LIMIT:
                node.scalar, problem = None, "is too large for a whole number: write it in quotes"
        else:
            problem = f"has the tag '{tag}', which is not supported"
        path = self._attach(node)
        if problem:
            self._flaw(node.line, problem, path)
        if event.anchor:
            self._anchors[event.anchor] = node

    def _start(self, event: yaml.CollectionStartEvent) -> None:
        node = self._node(event)
        node.complete = False
        if isinstance(event, yaml.MappingStartEvent):
            node.members = {}
        else:
            node.items = []
        if len(self._stack) >= MAX_DEPTH:
            raise self._fatal(_line(event), f"is nested deeper than {MAX_DEPTH} levels")
        path = self._attach(node)
        if event.tag not in _COLLECTION_TAGS:
            self._flaw(node.line, f"has the tag '{event.tag}', which is not supported", path)
        self._stack.append(_Frame(node, path, event.anchor))

    def _end(self) -> None:
        frame = self._stack.pop()
        node = frame.node
        if node.members is not None:
            self._merge(frame, node.members)
        children = [member.node for member in (node.members or {}).values()] + (node.items or [])
        node.complete = True
        node.size = 1 + sum(child.size for child in children)
        node.depth = 1 + max((child.depth for child in children), default=0)
        if frame.anchor:
            self._anchors[frame.anchor] = node
        if node.depth > MAX_DEPTH:
            raise _FlawError(Flaw(node.line, f"is nested deeper than {MAX_DEPTH} levels"))
        if node.size > self._count * _EXPANSION + _FREE_EXPANSION:
            raise _FlawError(Flaw(node.line, "grows out of bounds by its aliases"))

    def _merge(self, frame: _Frame, members: dict[str, Member]) -> None:
        for value in frame.merged:
            for source in value.items if value.items is not None else [value]:
                if source.members is None:
                    self._flaw(source.line, "'<<' takes a mapping, or a list of mappings", frame.path)
                for name, member in (source.members or {}).items():
                    members.setdefault(name, member)

    def _attach(self, node: Node) -> Path:
        """Put a node where it belongs, as the root, an item, the name or the value of a member; say where."""
        if not self._stack:
            self.document.root = node
            return ()
        frame = self._stack[-1]
        if frame.node.items is not None:
            frame.node.items.append(node)
            return (*frame.path, len(frame.node.items) - 1)
        if frame.name is None:
            self._name(frame, node)
            return frame.path
        name, frame.name = frame.name, None
        if name is _Name.MERGE:
            frame.merged.append(node)
        if isinstance(name, _Name) or frame.node.members is None:
            return frame.path
        path = (*frame.path, name)
        if name in frame.node.members:
            first = frame.node.members[name].line
            self._flaw(frame.line, f"is set twice, first on line {first}", path)
        else:
            frame.node.members[name] = Member(frame.line, node)
        return path

    def _name(self, frame: _Frame, node: Node) -> None:
        frame.line = node.line
        if isinstance(node.scalar, str):
            frame.name = node.scalar
            return
        frame.name = _Name.NONE
        if node.members is None and node.items is None:
            text = f"has a member whose name is {describe(node.scalar)}: write it in quotes"
        else:
            text = "has a member whose name is not a string"
        self._flaw(node.line, text, frame.path)
