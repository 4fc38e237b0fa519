"""Metrics of requests, which Envoy shows at its port 15090: stats access loggers.

Each is written when a request ends. The names get a mark in front (`SCOPE`), by which the bootstrap's port
15090 knows them and shows them without Envoy's own prefix. Values are always there where a logger writes: a
missing one would be an error line in Envoy's log, so a filter on the filter state stands in front.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from google.protobuf.message import Message

from crds.telemetry import TagOverride
from translator.access_logs import when
from translator.api_keys import CLIENT_STATE
from translator.clusters import HOST_METADATA
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

_UNKNOWN = "unknown"
_EMPTY = "%FILTER_STATE(llm.nothing:PLAIN)%"
"""Envoy takes no empty format string; this is never set."""
_HOST = f"%METADATA(CLUSTER:{':'.join(HOST_METADATA)})%"
_SHOWN_MODEL = f"%FILTER_STATE({MODEL_LABEL}:PLAIN)%"
_SECONDS = (
    "%CEL(double(request.duration.getSeconds()) + double(request.duration.getMilliseconds()) / 1000.0)%"
)
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
    istio: str = ""
    """Istio's name of the metric in a Telemetry, if it is one of Istio's."""


@dataclass(frozen=True, slots=True)
class Group:
    """Metrics that are written together, where all CEL expressions hold."""

    name: str
    metrics: Sequence[Metric]
    filters: tuple[str, ...] = ()


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
            Metric("llmplane_request_duration_seconds", llm, _SECONDS, "Percent"),
            Metric("llmplane_request_bytes", llm, "%BYTES_RECEIVED%", "Unspecified"),
            Metric("llmplane_response_bytes", llm, "%BYTES_SENT%", "Unspecified"),
            *(
                [Metric("gen_ai_client_operation_duration_seconds", {**gen, **answer}, _SECONDS, "Percent")]
                if gen_ai
                else ()
            ),
        ],
    )
    yield Group(
        "usage", list(_usage(proxy, gen if gen_ai else None)), ("'llm.total_tokens' in filter_state",)
    )
    for key, name in (
        ("llm.time_to_first_token", "time_to_first_token_seconds"),
        ("llm.time_per_output_token", "time_per_output_token_seconds"),
    ):
        value = f"%FILTER_STATE({key}:PLAIN)%"
        timed = [Metric(f"llmplane_{name}", llm, value, "Percent")]
        if gen_ai:
            timed.append(Metric(f"gen_ai_server_{name}", gen, value, "Percent"))
        yield Group(key, timed, (f"'{key}' in filter_state",))
    yield Group("special", list(_special(llm)), (_IS_SPECIAL,))


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
    again = "upstream.request_attempt_count > 1u"
    yield Metric("llmplane_retries_total", llm, f"%CEL({again} ? upstream.request_attempt_count - 1u : 0u)%")
    yield Metric("llmplane_fallbacks_total", llm, f"%CEL({again} ? 1u : 0u)%")
    for kind in ("cached", "reasoning"):
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


_IS_SPECIAL = " || ".join(
    [
        "upstream.request_attempt_count > 1u",
        "'llm.usage' in filter_state && filter_state['llm.usage'] != b'reported'",
        *(
            f"'llm.{kind}_tokens' in filter_state && filter_state['llm.{kind}_tokens'] != b'0'"
            for kind in ("cached", "reasoning")
        ),
    ]
)
"""One expression for all of them: evaluating one costs a microsecond, as writing a counter does."""


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
        "source_app": _text(labels.get("app", ""), _EMPTY),
        "source_version": _text(labels.get("version", ""), _EMPTY),
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
        "grpc_response_status": _EMPTY,
        "response_flags": "%RESPONSE_FLAGS%",
        "connection_security_policy": _UNKNOWN,
    }


def _text(value: str, default: str = _UNKNOWN) -> str:
    """Write a fixed text as a format string."""
    return value.replace("%", "%%") or default


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
    filters: list[dict[str, Any]] = [{"log_type_filter": {"types": ["DownstreamEnd"]}}]
    if group.filters:
        filters.append(when(*group.filters))
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
        filter=filters[0] if len(filters) == 1 else {"and_filter": {"filters": filters}},
        typed_config=protos.pack(config),
    )


def _counter(metric: Metric) -> dict[str, Any]:
    value = {"value_format": metric.value} if metric.value else {"value_fixed": {"value": 1}}
    return {"stat": _stat(metric), **value}


def _stat(metric: Metric) -> dict[str, Any]:
    return {"name": metric.name, "tags": list(_tags(metric.labels))}


def _tags(labels: Labels) -> Iterable[dict[str, Any]]:
    for name, value in labels.items():
        if value in _MAY_BE_MISSING or value.startswith("%CEL("):
            yield {"name": name, "value_format": value, "rules": _MISSING_IS_UNKNOWN}
        else:
            yield {"name": name, "value_format": value}


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
