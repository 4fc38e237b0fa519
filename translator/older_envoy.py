"""The provider script for an Envoy whose Lua is older than what the script uses (translator.features).

There the data of a provider are in the text of its filter, and what the script calls is made from what there
is: see `older_envoy.lua`. The script itself stays one text, in its file if the bootstrap laid that down.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from translator import lua

STATE_METADATA = "llm.state"
"""Dynamic metadata that stand in for filter state: the keys are those of the filter state."""

_SHIM = files("translator").joinpath("older_envoy.lua").read_text(encoding="utf-8")
_PLAIN = frozenset(map(chr, range(0x20, 0x7F))) - {'"', "\\"}


def source(context: Mapping[str, Any], file: str | None, *, has_filter_state: bool) -> str:
    """Return the text for `Lua.default_source_code.inline_string`.

    ``context`` is the provider's `lua.filter_context`, ``file`` where the script lies on Envoy's machine;
    ``has_filter_state`` says that its Lua can set filter state.
    """
    script = lua.SCRIPT if file is None else f"dofile({literal(file)})\n"
    state = "nil" if has_filter_state else literal(STATE_METADATA)
    return f"{script}local CONTEXT, FILTER_STATE = {literal(context)}, {state}\n{_SHIM}"


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
