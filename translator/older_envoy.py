"""The provider script for an Envoy whose Lua is older than what the script uses (translator.features).

There the data of a provider are in the text of its filter, and what the script calls is made from what there
is: see `older_envoy.lua`. The script itself stays one text, in its file if the bootstrap laid that down.
"""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from translator import lua

STATE_METADATA = "llm.state"
"""Dynamic metadata that stand in for filter state: the keys are those of the filter state."""

_SHIM = files("translator").joinpath("older_envoy.lua").read_text(encoding="utf-8")


def source(context: Mapping[str, Any], file: str | None, *, has_filter_state: bool) -> str:
    """Return the text for `Lua.default_source_code.inline_string`.

    ``context`` is the provider's `lua.filter_context`, ``file`` where the script lies on Envoy's machine;
    ``has_filter_state`` says that its Lua can set filter state.
    """
    script = lua.SCRIPT if file is None else f"dofile({lua.literal(file)})\n"
    state = "nil" if has_filter_state else lua.literal(STATE_METADATA)
    return f"{script}local CONTEXT, FILTER_STATE = {lua.literal(context)}, {state}\n{_SHIM}"
