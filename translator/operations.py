"""Which requests are LLM requests, and what the provider's configuration puts into each (decisions 8, 9)."""

import json
from collections.abc import Iterator
from typing import Any

from crds.llmprovider import LLMProviderSpec, OpenAIConfig
from translator.lua import Member, Operation

CHAT_COMPLETIONS = "/chat/completions"
OPENAI_OPERATIONS = (CHAT_COMPLETIONS, "/completions", "/embeddings", "/responses")
"""OpenAI's JSON operations (POST) that every provider gets."""
MODELS = "/models"

STREAM_USAGE = Member(("stream_options", "include_usage"), "true", "fill_stream")
"""Makes a provider report the usage of a stream. These operations have it; for others it is an error.

https://platform.openai.com/docs/api-reference/chat/create#chat-create-stream_options
"""
_WITH_STREAM_USAGE = (CHAT_COMPLETIONS, "/completions")


def operations(spec: LLMProviderSpec, config: OpenAIConfig) -> list[Operation]:
    """List a provider's operations: its own (that of ``spec.path``) first, which POST ``/`` means too.

    Another operation gets the path's prefix and keeps the client's model, unless the provider names one.
    """
    path, _, query = spec.path.partition("?")
    stem = path.rstrip("/")
    own = _own_suffix(stem)
    prefix = stem.removesuffix(own)

    def upstream(suffix: str) -> str:
        return prefix + suffix + (f"?{query}" if query else "")

    def stream_usage(suffix: str) -> tuple[Member, ...]:
        return (STREAM_USAGE,) if suffix in _WITH_STREAM_USAGE and config.stream_usage is not False else ()

    others: dict[tuple[str, str], Operation] = {
        ("POST", suffix): Operation("POST", suffix, upstream(suffix), stream_usage(suffix))
        for suffix in OPENAI_OPERATIONS
    }
    others["GET", MODELS] = Operation("GET", MODELS, upstream(MODELS))
    for listed in spec.operations:
        key = (listed.method, listed.path)
        if listed.model is not None:
            members_of = (*_model(listed.model), *stream_usage(listed.path))
            others[key] = Operation(*key, upstream(listed.path), members_of)
        else:
            # What OpenAI does not define may have any body, also multipart.
            others.setdefault(key, Operation(*key, upstream(listed.path)))
    others.pop(("POST", own), None)
    configured = list(members(config))
    if "stream_options" not in {*config.defaults, *config.overrides}:  # else the configuration decides it
        configured += stream_usage(own)
    return [Operation("POST", own, spec.path, tuple(configured)), *others.values()]


def _own_suffix(stem: str) -> str:
    for suffix in OPENAI_OPERATIONS:
        if stem.endswith(suffix):
            return suffix
    last = stem.rpartition("/")[2]
    return f"/{last}" if last else CHAT_COMPLETIONS


def members(config: OpenAIConfig) -> Iterator[Member]:
    """List members: ``overrides``, ``model`` > the client's own > ``stream``, ``defaults`` (decision 8)."""
    yield from _model(config.model)
    for key, value in config.overrides.items():
        yield Member((key,), _json(value), "force")
    if config.stream is not None:
        yield Member(("stream",), _json(config.stream), "fill")
    for key, value in config.defaults.items():
        yield Member((key,), _json(value), "fill")


def _model(model: str | None) -> Iterator[Member]:
    if model is not None:
        yield Member(("model",), _json(model), "force")


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
