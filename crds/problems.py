"""What is wrong with an object, in words that name the place."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

Path = tuple[str | int, ...]
"""A place in a document: member names and list positions from the top."""

_PLAIN_MEMBER = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)


class ObjectKey(NamedTuple):
    """What names an object: kind, namespace and name."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


class Severity(StrEnum):
    """Whether the object can be used in spite of the problem."""

    ERROR = "error"
    """The object cannot be used."""
    WARNING = "warning"
    """The object is used; something about it is probably not what its author meant."""


class Finding(NamedTuple):
    """A problem inside one document, before it is known which file and object that is."""

    path: Path
    message: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with its place: file and line, object, field.

    `file` is empty and `line` 0 for an object that comes from an API server. `kind`, `namespace` and `name`
    are empty where they could not be read. `column` is set only where the text is no YAML.
    """

    severity: Severity
    file: str
    line: int
    kind: str
    namespace: str
    name: str
    field: str
    message: str
    column: int = 0

    def __str__(self) -> str:
        place = self.file and ":".join([self.file, *(str(n) for n in (self.line, self.column) if n)])
        warning = "warning" if self.severity is Severity.WARNING else ""
        parts = [place, warning, self._object(), self.field, self.message]
        return ": ".join(part for part in parts if part)

    def _object(self) -> str:
        if not self.name:
            return self.kind
        return str(ObjectKey(self.kind, self.namespace, self.name))


def field_name(path: Sequence[str | int]) -> str:
    """Write a path as people do: `spec.rules[0].backendRefs[1].weight`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _PLAIN_MEMBER.fullmatch(part):
            text += f".{part}" if text else part
        else:
            text += f'["{part}"]'
    return text
