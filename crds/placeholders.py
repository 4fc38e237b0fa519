"""Placeholders of files: `apiKey: ${ API_KEY of dashscope}` stands for the variable API_KEY_OF_DASHSCOPE.

They are read in the values of `apiKey` and `ipBlocks` only, as the seeds write them there. Objects from
Kubernetes are never expanded: the environment of the control plane is not theirs to read.
"""

import re
import string
from collections.abc import Mapping
from typing import Any

from crds.problems import Finding, Path

FIELDS = frozenset({"apiKey", "ipBlocks"})
"""The members whose values may hold placeholders."""

_FREE_JSON = frozenset({"defaults", "overrides"})  # a member `apiKey` of a request body is no key of ours
_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")
_UPPER_CASE = str.maketrans(string.ascii_lowercase, string.ascii_uppercase)


def normalise(name: str) -> str:
    """Return the variable's name: trimmed, runs of non-word characters made `_`, ASCII in upper case."""
    return re.sub(r"\W+", "_", name.strip()).translate(_UPPER_CASE)


def variables(environment: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    """Return what placeholders stand for, by normalised name.

    `settings` (`--set`) win over the environment; a variable that has the very name wins over one whose name
    becomes it.
    """
    exact = {name: value for name, value in environment.items() if normalise(name) == name}
    return (
        {normalise(name): value for name, value in environment.items()}
        | exact
        | {normalise(name): value for name, value in settings.items()}
    )


def expand(document: Any, values: Mapping[str, str]) -> tuple[Any, list[Finding]]:
    """Return the document with its placeholders expanded, and which ones cannot be.

    `values` are by normalised name. A placeholder without a value stays. Expanded text is not expanded again.
    """
    findings: list[Finding] = []
    return _expand(document, values, (), findings, within=False), findings


def _expand(
    value: Any, values: Mapping[str, str], path: Path, findings: list[Finding], *, within: bool
) -> Any:
    if isinstance(value, dict):
        return {
            name: member
            if name in _FREE_JSON
            else _expand(member, values, (*path, name), findings, within=name in FIELDS)
            for name, member in value.items()
        }
    if isinstance(value, list):
        return [
            _expand(item, values, (*path, index), findings, within=within) for index, item in enumerate(value)
        ]
    if not within or not isinstance(value, str):
        return value

    def substitute(found: re.Match[str]) -> str:
        name = normalise(found[1])
        if not name:
            findings.append(Finding(path, f"the placeholder '{found[0]}' names no variable"))
        elif name not in values:
            findings.append(
                Finding(path, f"the variable {name} is not set: export it, or give --set '{name}=...'")
            )
        elif not values[name].strip():
            findings.append(Finding(path, f"the variable {name} is empty"))
        else:
            return values[name]
        return found[0]

    return _PLACEHOLDER.sub(substitute, value)
