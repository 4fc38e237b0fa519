"""pydantic's errors as findings, in words for people who write YAML. No value is ever repeated."""

import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from crds.kinds import did_you_mean
from crds.problems import Finding, Path
from crds.values import describe

_WANTED = {
    "string_type": "a string",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "tuple_type": "a list",
    "datetime_type": "a time",
}
_TEXTS = {
    "missing": "is missing",
    "llmplane": "{text}",
    "value_error": "{error}",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have {min_length} or more entries",
    "too_long": "must have {max_length} entries at most, but has {actual_length}",
}


def findings(model: type[BaseModel], error: ValidationError) -> list[Finding]:
    """Return what is wrong with a document that `model` refused."""
    # pydantic hides no input here; `_message` says of it only what type it has.
    details = error.errors(include_url=False)
    # A default that depends on a broken field is no finding of its own, nor is a list that is too short
    # without its broken items.
    places = [detail["loc"] for detail in details]
    return [
        _finding(model, detail)
        for detail in details
        if detail["type"] != "default_factory_not_called"
        and not (detail["type"] == "too_short" and any(_is_below(place, detail["loc"]) for place in places))
    ]


def _is_below(place: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    return len(place) > len(other) and place[: len(other)] == other


def _finding(model: type[BaseModel], detail: ErrorDetails) -> Finding:
    # pydantic marks the name of a member as ("name", "[key]").
    path: Path = tuple(part for part in detail["loc"] if part != "[key]")
    return Finding(path, _message(model, path, detail))


def _message(model: type[BaseModel], path: Path, detail: ErrorDetails) -> str:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return f"unknown field{did_you_mean(str(path[-1]), _members(model, path[:-1]))}"
    if kind in _WANTED:
        return _wrong_type(_WANTED[kind], detail["input"])
    if kind in _TEXTS:
        return _TEXTS[kind].format_map(detail.get("ctx", {}))
    return detail["msg"]


def _wrong_type(wanted: str, value: object) -> str:
    text = f"must be {wanted}, but is {describe(value)}"
    quotes = wanted == "a string" and value is not None and not isinstance(value, dict | list)
    return f"{text}: write it in quotes" if quotes else text


def _members(model: type[BaseModel], path: Path) -> list[str]:
    """Return the names that the members at this path may have."""
    place: Any = model
    for part in path:
        place = _below(place, part)
    place = _without_none(place)
    if not (isinstance(place, type) and issubclass(place, BaseModel)):
        return []
    return [field.alias or name for name, field in place.model_fields.items()]


def _below(place: Any, part: str | int) -> Any:
    """Return the type of a member or item of the type `place`."""
    place = _without_none(place)
    if isinstance(place, type) and issubclass(place, BaseModel):
        fields = {field.alias: field.annotation for field in place.model_fields.values()}
        return fields.get(str(part))
    arguments = typing.get_args(place)
    return arguments[1] if typing.get_origin(place) is Mapping else arguments[0]


def _without_none(place: Any) -> Any:
    """Return X for `X | None`."""
    if typing.get_origin(place) in {types.UnionType, typing.Union}:
        return typing.get_args(place)[0]
    return place
