"""Metrics of requests, which Envoy shows at its port 15090: stats access loggers.

Each is written when a request ends. The names get a mark in front (`SCOPE`), by which the bootstrap's port
15090 knows them and shows them without Envoy's own prefix. Values are always there where a logger writes: a
missing one would be an error line in Envoy's log, so a filter stands in front.

What a request costs grows with the number of tags, and with the CEL expressions. So Envoy counts neighbouring
labels as one tag (`_packed`), durations in milliseconds (`MILLISECONDS`), and the port's script
(llmplane/prometheus_door.lua) shows what they are.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from google.protobuf.message import Message

from crds.telemetry import TagOverride
from translator.access_logs import when
from translator.api_keys import CLIENT_STATE
from translator.clusters import HOST_METADATA
from translator.errors import LUA_METADATA
from translator.features import Feature
from translator.proxy import Proxy, ProxyType
from translator.telemetry import Override, metrics
from translator.world import World
from xds import protos

SCOPE = "llmx"
"""Stands in front of the names of these metrics inside Envoy, and nowhere else."""
MODEL_LABEL = "llm.model_label"
"""Filter state: the model as metrics show it; of models that clients choose, only so many are shown."""

_MODEL = "wasm.asm.llmproxy.request_model"
_USER_MODEL = re.compile(rf"""(?<![\w.])filter_state\[\s*(["']){re.escape(_MODEL)}\1\s*\]""")
_PROMPT = "wasm.asm.llmproxy.request_prompt_tokens"
_COMPLETION = "wasm.asm.llmproxy.request_completion_tokens"

Labels = Mapping[str, str]
"""Labels in their order: name and format string."""

MILLISECONDS = "__ms"
"""Stands behind the names of histograms in seconds that are counted in milliseconds."""

_UNKNOWN = "unknown"
_SEPARATOR = "\x1f"
"""Stands behind each label that is packed: the control character for this use, which no label holds."""
_HOST = f"%METADATA(CLUSTER:{':'.join(HOST_METADATA)})%"
_SHOWN_MODEL = f"%FILTER_STATE({MODEL_LABEL}:PLAIN)%"
_IS_RETRIED = "upstream.request_attempt_count > 1u"
_OPERATION = "%FILTER_STATE(llm.operation:PLAIN)%"
_CLIENT = f"%FILTER_STATE({CLIENT_STATE}:PLAIN)%"
"""Only clients with a key have a name, so the configuration bounds their number."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric. Without a value, it counts requests."""

    name: str
    labels: Labels
    value: str = ""
    """A format string that is exactly one operator."""
    unit: Literal["", "Unspecified", "Percent"] = ""
    """Of a histogram; `Percent` is the one that takes decimal numbers, and changes nothing else."""
    suffix: str = ""
    """What Envoy's name has behind this one."""
    istio: str = ""
    """Istio's name of the metric in a Telemetry, if it is one of Istio's."""


@dataclass(frozen=True, slots=True)
class Group:
    """Metrics that are written together, where the filter (AccessLogFilter) holds."""

    name: str
    metrics: Sequence[Metric]
    filter: Mapping[str, Any] | None = None


def loggers(world: World, proxy: Proxy) -> list[Message]:
    """Make the access loggers that count the requests of a proxy."""
    overrides = metrics(world, proxy)
    if overrides is None or not proxy.supports(Feature.METRICS):
        return []
    config = world.mesh.config.llm_metrics
    made = []
    for group in _groups(proxy, gen_ai=config.gen_ai):
        kept = [changed for metric in group.metrics if (changed := _changed(metric, overrides))]
        if kept:
            made.append(_logger(replace(group, metrics=kept), config.max_series))
    return made


def _groups(proxy: Proxy, *, gen_ai: bool) -> Iterator[Group]:
    istio, llm = _istio_labels(proxy), _llm_labels(proxy)
    gen = {
        "gen_ai_operation_name": _OPERATION,
        "gen_ai_provider_name": "openai",
        "gen_ai_request_model": _SHOWN_MODEL,
        "server_address": _HOST,
    }
    yield Group(
        "istio",
        [
            Metric("istio_requests_total", istio, istio="REQUEST_COUNT"),
            Metric(
                "istio_request_duration_milliseconds",
                istio,
                "%DURATION%",
                "Unspecified",
                istio="REQUEST_DURATION",
            ),
            Metric("istio_request_bytes", istio, "%BYTES_RECEIVED%", "Unspecified", istio="REQUEST_SIZE"),
            Metric("istio_response_bytes", istio, "%BYTES_SENT%", "Unspecified", istio="RESPONSE_SIZE"),
        ],
    )
    status = {
        "operation": _OPERATION,
        "response_code": "%RESPONSE_CODE%",
        "response_flags": "%RESPONSE_FLAGS%",
    }
    answer = {"http_response_status_code": "%RESPONSE_CODE%"}
    yield Group(
        "requests",
        [
            Metric("llmplane_requests_total", {**llm, **status}),
            _duration("llmplane_request_duration_seconds", llm),
            Metric("llmplane_request_bytes", llm, "%BYTES_RECEIVED%", "Unspecified"),
            Metric("llmplane_response_bytes", llm, "%BYTES_SENT%", "Unspecified"),
            *([_duration("gen_ai_client_operation_duration_seconds", {**gen, **answer})] if gen_ai else ()),
        ],
    )
    yield Group(
        "usage", list(_usage(proxy, gen if gen_ai else None)), when("'llm.total_tokens' in filter_state")
    )
    for key in ("time_to_first_token", "time_per_output_token"):
        value = f"%FILTER_STATE(llm.{key}:PLAIN)%"
        timed = [Metric(f"llmplane_{key}_seconds", llm, value, "Percent")]
        if gen_ai:
            timed.append(Metric(f"gen_ai_server_{key}_seconds", gen, value, "Percent"))
        yield Group(key, timed, _is_noted(key))
    is_special = {"or_filter": {"filters": [_is_noted("special"), when(_IS_RETRIED)]}}
    yield Group("special", list(_special(llm)), is_special)


def _duration(name: str, labels: Labels) -> Metric:
    return Metric(name, labels, "%DURATION%", "Unspecified", MILLISECONDS)


def _is_noted(key: str) -> dict[str, Any]:
    """Make the filter for what the provider script notes of few requests; it costs the others nothing."""
    matcher = {"filter": LUA_METADATA, "path": [{"key": key}], "value": {"bool_match": True}}
    return {"metadata_filter": {"matcher": matcher, "match_if_key_not_found": {"value": False}}}


def _usage(proxy: Proxy, gen: Labels | None) -> Iterator[Metric]:
    """Metrics of requests whose token usage is known, or estimated."""
    asm = {
        "llmproxy_source_workload": _text(proxy.workload),
        "llmproxy_source_workload_namespace": _text(proxy.namespace),
        "llmproxy_destination_service": _HOST,
        "llmproxy_model": _SHOWN_MODEL,
    }
    kinds = {"prompt": _PROMPT, "completion": _COMPLETION}
    for kind, key in kinds.items():
        yield Metric(f"asm_llm_proxy_{kind}_tokens", asm, f"%FILTER_STATE({key}:PLAIN)%")
    if gen is not None:
        for kind, key in (("input", _PROMPT), ("output", _COMPLETION)):
            labels = {**gen, "gen_ai_token_type": kind}
            yield Metric("gen_ai_client_token_usage", labels, f"%FILTER_STATE({key}:PLAIN)%", "Unspecified")


def _special(llm: Labels) -> Iterator[Metric]:
    """Metrics of what most requests do not have; each is 0 where another one is the reason to write them."""
    more = f"%CEL({_IS_RETRIED} ? upstream.request_attempt_count - 1u : 0u)%"
    yield Metric("llmplane_retries_total", llm, more)
    yield Metric("llmplane_fallbacks_total", llm, f"%CEL({_IS_RETRIED} ? 1u : 0u)%")
    for kind in ("cached", "reasoning", "retried_prompt"):
        key = f"llm.{kind}_tokens"
        value = f"%CEL('{key}' in filter_state ? filter_state['{key}'] : '0')%"
        yield Metric(f"llmplane_{kind}_tokens_total", llm, value)
    for kind, key in (("prompt", _PROMPT), ("completion", _COMPLETION)):
        value = f"%CEL({_usage_is('estimated')} ? filter_state['{key}'] : '0')%"
        yield Metric(f"llmplane_estimated_{kind}_tokens_total", llm, value)
    yield Metric("llmplane_unknown_usage_total", llm, f"%CEL({_usage_is('unknown')} ? 1u : 0u)%")


def _usage_is(value: str) -> str:
    """Make an expression; filter state is bytes in CEL, which equal no text."""
    return f"'llm.usage' in filter_state && filter_state['llm.usage'] == b'{value}'"


def _llm_labels(proxy: Proxy) -> Labels:
    return {
        "source_workload": _text(proxy.workload),
        "source_workload_namespace": _text(proxy.namespace),
        "destination_service": _HOST,
        "model": _SHOWN_MODEL,
        **({"client": _CLIENT} if proxy.type is ProxyType.ROUTER else {}),
    }


def _istio_labels(proxy: Proxy) -> Labels:
    """Istio's labels in the order of its metrics; what a proxy cannot know of a provider is `unknown`."""
    labels = dict(proxy.labels)
    name = next(
        (
            labels[key]
            for key in ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
            if labels.get(key)
        ),
        proxy.workload,
    )
    revision = next(
        (
            labels[key]
            for key in ("service.istio.io/canonical-revision", "app.kubernetes.io/version", "version")
            if labels.get(key)
        ),
        "latest",
    )
    return {
        "reporter": "source",
        "source_workload": _text(proxy.workload),
        "source_canonical_service": _text(name),
        "source_canonical_revision": _text(revision),
        "source_workload_namespace": _text(proxy.namespace),
        "source_principal": _UNKNOWN,
        "source_app": _text(labels.get("app", ""), ""),
        "source_version": _text(labels.get("version", ""), ""),
        "source_cluster": _UNKNOWN,
        "destination_workload": _UNKNOWN,
        "destination_workload_namespace": _UNKNOWN,
        "destination_principal": _UNKNOWN,
        "destination_app": _UNKNOWN,
        "destination_version": _UNKNOWN,
        "destination_service": _HOST,
        "destination_canonical_service": _UNKNOWN,
        "destination_canonical_revision": "latest",
        "destination_service_name": _HOST,
        "destination_service_namespace": _UNKNOWN,
        "destination_cluster": _UNKNOWN,
        "request_protocol": "http",
        "response_code": "%RESPONSE_CODE%",
        "grpc_response_status": "",
        "response_flags": "%RESPONSE_FLAGS%",
        "connection_security_policy": _UNKNOWN,
    }


def _text(value: str, default: str = _UNKNOWN) -> str:
    """Write a fixed text as a part of a format string."""
    return value.replace("%", "%%").replace(_SEPARATOR, "") or default


def _changed(metric: Metric, overrides: Mapping[str, Override]) -> Metric | None:
    """Apply what users changed; None if they want none of it."""
    override = overrides.get(metric.istio or metric.name)
    if override is None:
        return metric
    if override.disabled:
        return None
    labels = dict(metric.labels)
    for name, change in sorted(override.tags.items()):
        if change.operation == "REMOVE":
            labels.pop(name, None)
        else:
            labels[name] = _expression(change)
    return replace(metric, labels=labels)


def _expression(change: TagOverride) -> str:
    """Read a user's expression. A model is taken from where its number is bounded."""
    bounded = _USER_MODEL.sub(f"filter_state['{MODEL_LABEL}']", change.value)
    return f"%CEL({bounded})%"


def _logger(group: Group, max_series: int) -> Message:
    config = protos.StatsAccessLog(
        stats_scope={
            "prefix": SCOPE,
            "max_counters": {"value": max_series},
            "max_histograms": {"value": max_series},
        },
        counters=[_counter(metric) for metric in group.metrics if not metric.unit],
        histograms=[
            {"stat": _stat(metric), "unit": metric.unit, "value_format": metric.value}
            for metric in group.metrics
            if metric.unit
        ],
    )
    return protos.AccessLog(
        name=f"llmplane.metrics.{group.name}",
        filter=group.filter,
        typed_config=protos.pack(config),
    )


def _counter(metric: Metric) -> dict[str, Any]:
    value = {"value_format": metric.value} if metric.value else {"value_fixed": {"value": 1}}
    return {"stat": _stat(metric), **value}


def _stat(metric: Metric) -> dict[str, Any]:
    return {"name": metric.name + metric.suffix, "tags": list(_tags(metric.labels))}


def _tags(labels: Labels) -> Iterator[dict[str, Any]]:
    """Make the tags, in the labels' order. What users wrote may have any value, so it is not packed."""
    for is_own, group in groupby(labels.items(), key=lambda label: not label[1].startswith("%CEL(")):
        if is_own:
            own = dict(group)
            yield {"name": f"{SCOPE}_{next(iter(own))}", "value_format": _packed(own)}
        else:
            for name, value in group:
                yield {"name": name, "value_format": value, "rules": _MISSING_IS_UNKNOWN}


def _packed(labels: Labels) -> str:
    """Write labels as one tag.

    Behind `?=` stands what is shown as `unknown` where it is nothing; behind `@=` the label that has the same
    value, since each operator costs time.
    """
    parts, names = [], dict[str, str]()
    for name, value in labels.items():
        if value not in _MAY_BE_MISSING:
            part = f"{name}={value}"
        elif value in names:
            part = f"{name}@={names[value]}"
        else:
            part, names[value] = f"{name}?={value}", name
        parts.append(part + _SEPARATOR)
    return "".join(parts)


_MAY_BE_MISSING = {_HOST, _SHOWN_MODEL, _CLIENT}
_MISSING_IS_UNKNOWN = {
    "matcher_tree": {
        "input": {"name": "value", "typed_config": protos.pack(protos.StatTagValueInput())},
        "exact_match_map": {
            "map": {
                "": {
                    "action": {
                        "name": "unknown",
                        "typed_config": protos.pack(
                            protos.TransformStat(update_tag={"new_tag_value": _UNKNOWN})
                        ),
                    }
                }
            }
        },
    }
}
"""Shows `unknown` instead of nothing, as Istio does: where no provider was chosen, or there is no model."""
