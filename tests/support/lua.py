"""The provider script in a bootstrap of the test, for whatever Envoy the tests run."""

from collections.abc import Mapping
from typing import Any

from tests.support.envoy import has
from translator import older_envoy
from translator.features import Feature
from translator.lua import SCRIPT


def provider_filter(context: Mapping[str, Any], script: str = SCRIPT) -> dict[str, Any]:
    """Return the configuration of the Lua filter, with the data of a provider."""
    config = {"@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua"}
    if has(Feature.LUA_CONTEXT):
        source = {"inline_string": script}
        return {**config, "shared_vm_id": "llm", "default_source_code": source, "filter_context": context}
    text = older_envoy.source(context, None, has_filter_state=has(Feature.LUA_FILTER_STATE))
    return {**config, "default_source_code": {"inline_string": text.replace(SCRIPT, script)}}


def filter_state(key: str) -> str:
    """Return the format that prints what the script keeps under a key."""
    if has(Feature.LUA_FILTER_STATE):
        return f"%FILTER_STATE({key}:PLAIN)%"
    return f"%DYNAMIC_METADATA({older_envoy.STATE_METADATA}:{key})%"
