"""Everything that is wrong with the objects of a source, as one list with places."""

from collections.abc import Mapping

from crds import document
from crds.loader import LoadedObject
from crds.problems import ObjectKey, Path, Problem, Severity, field_name
from llmplane.sources.state import SourceState
from translator.conditions import Condition


def problems(state: SourceState, conditions: Mapping[ObjectKey, tuple[Condition, ...]]) -> list[Problem]:
    """Return what is wrong with each object alone, and with the objects together, in the order of the files.

    An object that does not count is an error; a reference that leads nowhere may yet lead somewhere.
    """
    found = list(state.problems)
    flawed = {key for key, of in conditions.items() if any(condition.findings for condition in of)}
    for item in (item for item in state.objects if flawed and item.key in flawed):
        for condition in conditions[item.key]:
            is_error = condition.type == "Accepted" and not condition.status
            severity = Severity.ERROR if is_error else Severity.WARNING
            for path, message in condition.findings:
                place = (item.file, _line(item, path))
                found.append(Problem(severity, *place, *item.key, field_name(path), message))
    return sorted(found, key=lambda problem: (problem.file, problem.line))


def _line(item: LoadedObject, path: Path) -> int:
    """Return the line of a field; of an item of a `kind: List`, its first one; 0 without a file."""
    if not item.file:
        return 0
    for chunk in document.split(item.text):
        root = document.compose(chunk).root
        if root is not None:
            return item.line + root.line_of(path) - root.line
    return item.line
