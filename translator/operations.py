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

    others: dict[tuple[str, str], Operation] = {
        ("POST", suffix): Operation("POST", suffix, upstream(suffix), ()) for suffix in OPENAI_OPERATIONS
    }
    others["GET", MODELS] = Operation("GET", MODELS, upstream(MODELS))
    for listed in spec.operations:
        key = (listed.method, listed.path)
        if listed.model is not None:
            others[key] = Operation(*key, upstream(listed.path), tuple(_model(listed.model)))
        else:
            # What OpenAI does not define may have any body, also multipart.
            others.setdefault(key, Operation(*key, upstream(listed.path)))
    others.pop(("POST", own), None)
    return [Operation("POST", own, spec.path, tuple(members(config))), *others.values()]


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
