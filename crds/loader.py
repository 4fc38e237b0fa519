"""Objects out of the text of files, with every problem's file, line, object and field.

Pure: text in, objects and problems out. No text makes it raise. A broken document spoils no other one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pydantic import ValidationError

from crds import document as documents
from crds import kinds, placeholders, validation
from crds.document import Chunk, Document, Flaw, Node
from crds.meta import DEFAULT_NAMESPACE, BaseObject, ObjectMeta
from crds.problems import Finding, ObjectKey, Path, Problem, Severity, field_name
from crds.unreadable import SECURITY_KINDS, UnreadablePolicy, meant_kind, selected_labels
from crds.values import describe


@dataclass(frozen=True, slots=True)
class LoadedObject:
    """An object of a file."""

    object: BaseObject
    file: str
    line: int
    text: str = field(repr=False)
    """The document as it was written: its placeholders are not expanded, but it may hold a key in clear."""
    digest: str = field(repr=False)
    """SHA-256 of the content, placeholders expanded: equal as long as the object means the same."""
    lines_before: int = field(default=0, repr=False)
    """Lines of the file before the document."""

    @property
    def key(self) -> ObjectKey:
        """What names the object."""
        return self.object.key

    @property
    def kind(self) -> str:
        """The object's kind."""
        return self.object.kind

    @property
    def namespace(self) -> str:
        """The object's namespace."""
        return self.object.namespace

    @property
    def name(self) -> str:
        """The object's name."""
        return self.object.name

    def moved(self, lines_before: int) -> "LoadedObject":
        """Return the same object of the same document, which stands elsewhere in its file now."""
        if lines_before == self.lines_before:
            return self
        line = self.line - self.lines_before + lines_before
        return replace(self, line=line, lines_before=lines_before)


class Location(NamedTuple):
    """A place in a file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a file holds."""

    objects: tuple[LoadedObject, ...]
    problems: tuple[Problem, ...]
    invalid: Mapping[ObjectKey, Location]
    """Objects that the file has, but broken, with their place: keep their last good version."""
    broken: bool
    """Whether it is not known of some document which object it is: remove nothing because of this file."""
    unreadable: tuple[tuple[UnreadablePolicy, Location], ...] = ()
    """Security policies that the file has, but broken: they deny where no good version of them is known."""


def load(text: str, file: str, variables: Mapping[str, str], before: Loaded | None = None) -> Loaded:
    """Read a file of YAML documents (JSON is YAML).

    `file` is the name that problems show. `variables` are what placeholders stand for, by their normalised
    names (`placeholders.variables`). `before` is what the file held when it was read last, with the same
    variables: a document that was good and did not change is not read again, and its object stays the same.
    """
    reader = _Reader(file, variables)
    known = _flawless(before) if before else {}
    for chunk in documents.split(text):
        if chunk.text in known:
            reader.objects.append(known[chunk.text].moved(chunk.lines_before))
        else:
            reader.read(documents.compose(chunk), chunk)
    parts = tuple(reader.objects), tuple(reader.problems), reader.invalid, reader.broken
    return combine([Loaded(*parts, tuple(reader.unreadable))])


def _flawless(loaded: Loaded) -> dict[str, LoadedObject]:
    """Return the objects that there is nothing to be said of, by the text of their documents."""
    flawed = {(problem.kind, problem.namespace, problem.name) for problem in loaded.problems}
    return {item.text: item for item in loaded.objects if item.key not in flawed}


def load_object(document: Mapping[str, Any]) -> tuple[BaseObject | None, tuple[Problem, ...]]:
    """Read one object of an API server: no placeholders, no file, no line.

    An object of a kind that is ignored is None without problems.
    """
    metadata = document.get("metadata")
    names = metadata if isinstance(metadata, Mapping) else {}
    kind = str(document.get("kind", ""))
    key = ObjectKey(kind, str(names.get("namespace", DEFAULT_NAMESPACE)), str(names.get("name", "")))

    def problems(findings: Iterable[Finding], severity: Severity) -> tuple[Problem, ...]:
        return tuple(
            Problem(severity, "", 0, *key, field_name(finding.path), finding.message) for finding in findings
        )

    try:
        model = kinds.lookup(str(document.get("apiVersion", "")), kind)
    except ValueError as error:
        return None, problems([Finding((), str(error))], Severity.ERROR)
    if model is None:
        return None, ()
    result, findings = _checked(model, document)
    if result is None:
        return None, problems(findings, Severity.ERROR)
    return result, problems(result.warnings(), Severity.WARNING)


def _checked(
    model: type[BaseObject], content: Mapping[str, Any]
) -> tuple[BaseObject | None, tuple[Finding, ...]]:
    """Make an object, or say what is wrong: one way for files, an API server's objects, and its webhook."""
    try:
        return model.model_validate(content), ()
    except ValidationError as error:
        return None, tuple(validation.findings(model, error))


def combine(parts: Iterable[Loaded]) -> Loaded:
    """Join what several files hold.

    Of objects with the same key the first one counts, the others are errors.
    """
    objects: list[LoadedObject] = []
    problems: list[Problem] = []
    invalid: dict[ObjectKey, Location] = {}
    first: dict[ObjectKey, Location] = {}
    unreadable: list[tuple[UnreadablePolicy, Location]] = []
    broken = False
    for part in parts:
        problems += part.problems
        unreadable += part.unreadable
        broken |= part.broken
        found: list[tuple[Location, ObjectKey, LoadedObject | None]] = [
            (Location(loaded.file, loaded.line), loaded.key, loaded) for loaded in part.objects
        ]
        found += [(location, key, None) for key, location in part.invalid.items()]
        for location, key, loaded in sorted(found, key=lambda entry: entry[0]):
            if key in first:
                message = f"is the same object as in {first[key]}, which counts"
                problems.append(Problem(Severity.ERROR, *location, *key, "", message))
                continue
            first[key] = location
            if loaded:
                objects.append(loaded)
            else:
                invalid[key] = location
    return Loaded(tuple(objects), tuple(problems), invalid, broken, tuple(unreadable))


class _Reader:
    """Collects what the documents of one file hold."""

    def __init__(self, file: str, variables: Mapping[str, str]) -> None:
        self.objects: list[LoadedObject] = []
        self.problems: list[Problem] = []
        self.invalid: dict[ObjectKey, Location] = {}
        self.broken = False
        self.unreadable: list[tuple[UnreadablePolicy, Location]] = []
        self._file = file
        self._variables = variables

    def read(self, document: Document, chunk: Chunk) -> None:
        root = document.root
        if not document.readable:
            self._unreadable(document, chunk)
        elif root and (root.members is not None or root.items is not None or root.scalar is not None):
            items = root.get("items")
            if items and items.items is not None and _text(root.get("kind")) == "List":
                self._list(items.items, document.flaws, chunk)
            else:
                self._object(root, chunk, document.flaws)

    def _unreadable(self, document: Document, chunk: Chunk) -> None:
        metadata = document.root and document.root.get("metadata")
        # An incomplete metadata may be that of another namespace than it seems.
        key = _key(document.root) if document.root and metadata and metadata.complete else None
        for flaw in document.flaws:
            self._problem(flaw.line, key, Finding(flaw.path, flaw.message), column=flaw.column)
        self._set_invalid(document.root, key)
        # What kind it is may stand behind the place up to which it can be read.
        kind = _text(document.root.get("kind")) if document.root else ""
        for name in (kind,) if kind else sorted(SECURITY_KINDS):
            if name in chunk.text:
                self._set_unreadable(name, key, None, chunk.lines_before + 1)

    def _list(self, items: list[Node], flaws: list[Flaw], chunk: Chunk) -> None:
        """Read the items of a `kind: List`, which is what `kubectl get -o yaml` prints."""
        rest = [flaw for flaw in flaws if flaw.path[:1] != ("items",) or len(flaw.path) == 1]
        for flaw in rest:
            self._problem(flaw.line, None, Finding(flaw.path, flaw.message))
            self.broken = True
        for index, item in enumerate(items):
            own = [replace(flaw, path=flaw.path[2:]) for flaw in flaws if flaw.path[:2] == ("items", index)]
            text = json.dumps(item.plain(), default=str, ensure_ascii=False)
            self._object(item, Chunk(text, chunk.lines_before), own)

    def _object(self, node: Node, chunk: Chunk, flaws: list[Flaw]) -> None:
        key = _key(node)
        try:
            model = _model(node)
        except _NoObjectError as error:
            self._problem(node.line_of(error.finding.path), key, error.finding)
            self.broken |= error.unknown
            kind = meant_kind(_text(node.get("apiVersion")), _text(node.get("kind")))
            known = key or _nameless(node)
            if known:
                known = known._replace(kind=kind)
            if kind in SECURITY_KINDS:
                self._set_invalid(node, known if known and known.name else None)
            self._set_unreadable(kind, known, selected_labels(node.plain()), node.line)
            return
        if model is None:
            return
        content, unset = placeholders.expand(node.plain(), self._variables)
        result, invalid = _checked(model, content)
        findings = [*unset, *invalid]
        errors = [(flaw.line, Finding(flaw.path, flaw.message)) for flaw in flaws]
        errors += [(node.line_of(finding.path), finding) for finding in findings]
        for line, finding in sorted(errors, key=lambda error: error[0]):
            self._problem(line, key, finding)
        if result is None or errors:
            # Which of two names is meant is not known.
            unsure = any(flaw.path[:1] == ("metadata",) for flaw in flaws)
            self._set_invalid(node, None if unsure else key)
            ambiguous = any(flaw.path[:2] in {(), ("spec",), ("spec", "selector")} for flaw in flaws)
            labels = None if ambiguous else selected_labels(content)
            known = None if unsure else key or _nameless(node)
            self._set_unreadable(_text(node.get("kind")), known, labels, node.line)
            return
        for finding in result.warnings():
            self._problem(node.line_of(finding.path), key, finding, Severity.WARNING)
        content.pop("status", None)
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
        item = LoadedObject(result, self._file, node.line, chunk.text, digest, chunk.lines_before)
        self.objects.append(item)

    def _set_invalid(self, node: Node | None, key: ObjectKey | None) -> None:
        if node and key:
            self.invalid.setdefault(key, Location(self._file, node.line))
        else:
            self.broken = True

    def _set_unreadable(
        self, kind: str, key: ObjectKey | None, labels: Mapping[str, str] | None, line: int
    ) -> None:
        if kind in SECURITY_KINDS:
            policy = UnreadablePolicy(key or ObjectKey(kind, "", ""), labels if key else None)
            self.unreadable.append((policy, Location(self._file, line)))

    def _problem(
        self,
        line: int,
        key: ObjectKey | None,
        finding: Finding,
        severity: Severity = Severity.ERROR,
        column: int = 0,
    ) -> None:
        names = key or ("", "", "")
        field = field_name(finding.path)
        self.problems.append(Problem(severity, self._file, line, *names, field, finding.message, column))


class _NoObjectError(Exception):
    """A document is not an object of a kind that we read."""

    def __init__(self, path: Path, message: str, *, unknown: bool = True) -> None:
        super().__init__(message)
        self.finding = Finding(path, message)
        self.unknown = unknown
        """Whether it is not known which object was meant."""


def _model(node: Node) -> type[BaseObject] | None:
    """Return the model for a document, or None where its kind is ignored; raise `_NoObjectError`."""
    if node.members is None:
        text = f"must be an object (with apiVersion, kind, metadata, spec), but is {describe(node.plain())}"
        raise _NoObjectError((), text)
    for name in ("apiVersion", "kind"):
        if not _text(node.get(name)):
            text = "must be a string" if name in node.members else "is missing"
            raise _NoObjectError((name,), text)
    try:
        model = kinds.lookup(_text(node.get("apiVersion")), _text(node.get("kind")))
    except kinds.UnsupportedKindError as error:
        raise _NoObjectError((), str(error), unknown=False) from None
    except kinds.UnknownKindError as error:
        raise _NoObjectError(("kind",), str(error)) from None
    metadata = node.get("metadata")
    if model and metadata and metadata.members is None and metadata.items is None and metadata.scalar is None:
        # As pages show YAML whose indentation was lost in copying.
        raise _NoObjectError(("metadata",), "is empty: is the indentation of this document lost?")
    return model


def _text(node: Node | None) -> str:
    return node.scalar if node and isinstance(node.scalar, str) else ""


def _nameless(node: Node) -> ObjectKey | None:
    """Return kind and namespace of an object whose name cannot be read, as far as these can."""
    metadata = node.get("metadata")
    if not metadata or metadata.members is None:
        return None
    names = {"name": "unknown"}
    if "namespace" in metadata.members:
        names["namespace"] = metadata.members["namespace"].node.plain()
    try:
        namespace = ObjectMeta.model_validate(names).namespace
    except ValidationError:
        return None
    return ObjectKey(_text(node.get("kind")), namespace, "")


def _key(node: Node) -> ObjectKey | None:
    """Return what names the object, as far as that can be read."""
    metadata = node.get("metadata")
    if not metadata or metadata.members is None or not _text(node.get("kind")):
        return None
    names = {
        name: metadata.members[name].node.plain()
        for name in ("name", "namespace")
        if name in metadata.members
    }
    try:
        valid = ObjectMeta.model_validate(names)
    except ValidationError:
        return None
    return ObjectKey(_text(node.get("kind")), valid.namespace, valid.name)
