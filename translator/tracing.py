"""Traces: spans of requests for an OpenTelemetry collector, with OpenTelemetry's attributes of generative AI.

A trace context that a client sends (W3C `traceparent`) is continued, and goes on to the provider as in Istio.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf.message import Message

from crds.extensionprovider import OpenTelemetryTracing
from crds.telemetry import CustomTag
from translator import telemetry
from translator.clusters import HOST_METADATA
from translator.collectors import grpc_service, http_service
from translator.proxy import Proxy, ProxyType
from translator.services import ServiceDestination
from translator.world import World
from xds import protos

_GEN_AI = {
    "gen_ai.operation.name": "%FILTER_STATE(llm.operation:PLAIN)%",
    "gen_ai.provider.name": "openai",  # the API that is spoken
    "gen_ai.request.model": "%FILTER_STATE(wasm.asm.llmproxy.request_model:PLAIN)%",
    "gen_ai.response.model": "%FILTER_STATE(llm.response_model:PLAIN)%",
    "server.address": f"%METADATA(CLUSTER:{':'.join(HOST_METADATA)})%",
}
"""Attributes by their names in OpenTelemetry's semantic conventions."""
_GEN_AI_NUMBERS = {
    "gen_ai.usage.input_tokens": "%FILTER_STATE(wasm.asm.llmproxy.request_prompt_tokens:PLAIN)%",
    "gen_ai.usage.output_tokens": "%FILTER_STATE(wasm.asm.llmproxy.request_completion_tokens:PLAIN)%",
}

_INTEGER = b"\x38\x02"
"""`value_type: INT` (field 7) of CustomTag in Envoy 1.40, which the schema does not have yet."""


def tracing(world: World, proxy: Proxy) -> Message | None:
    """Make the tracing of a connection manager; None for no traces."""
    found = telemetry.tracing(world, proxy)
    if found is None or found.provider is None or found.provider.opentelemetry is None:
        return None
    provider = found.provider.opentelemetry
    collector = _collector(provider)
    config = protos.OpenTelemetryConfig(
        service_name=f"{proxy.workload}.{proxy.namespace}", sampler=_sampler(found.sampling)
    )
    if provider.http is not None:
        config.http_service.CopyFrom(http_service(collector, provider.http))
    else:
        config.grpc_service.CopyFrom(grpc_service(collector))
    longest = provider.max_tag_length or world.mesh.config.default_config.tracing.max_path_tag_length
    tags = _istio_tags(proxy) if found.has_istio_tags else []
    return protos.Tracing(
        client_sampling={"value": 100},
        random_sampling={"value": 100},
        overall_sampling={"value": 100},
        max_path_tag_length={"value": longest} if longest else None,
        custom_tags=[*_gen_ai_tags(), *tags, *_custom_tags(found.custom_tags)],
        spawn_upstream_span={"value": proxy.type is ProxyType.ROUTER},
        no_context_propagation=not found.propagates_context,
        provider={"name": "envoy.tracers.opentelemetry", "typed_config": protos.pack(config)},
    )


def _sampler(percentage: float) -> dict[str, Any]:
    """Make the sampler of new traces; one that a client began is followed where the client says so.

    `random_sampling` of the connection manager would cut the client's traces as well (seen with Envoy 1.40).
    """
    millionths = {"numerator": round(percentage * 10_000), "denominator": "MILLION"}
    ratio = protos.TraceIdRatioBasedSamplerConfig(sampling_percentage=millionths)
    wrapped = {
        "name": "envoy.tracers.opentelemetry.samplers.trace_id_ratio_based",
        "typed_config": protos.pack(ratio),
    }
    return {
        "name": "envoy.tracers.opentelemetry.samplers.parent_based",
        "typed_config": protos.pack(protos.ParentBasedSamplerConfig(wrapped_sampler=wrapped)),
    }


def services(world: World, proxy: Proxy) -> Iterator[ServiceDestination]:
    """Name the collector that a proxy's spans go to."""
    found = telemetry.tracing(world, proxy)
    if found is not None and found.provider is not None and found.provider.opentelemetry is not None:
        yield _collector(found.provider.opentelemetry)


def _collector(provider: OpenTelemetryTracing) -> ServiceDestination:
    return ServiceDestination.of(provider.service, provider.port, http2=provider.http is None)


def _gen_ai_tags() -> Iterator[Message]:
    for name, value in _GEN_AI.items():
        yield protos.CustomTag(tag=name, value=value)
    for name, value in _GEN_AI_NUMBERS.items():
        made = protos.CustomTag(tag=name, value=value)
        made.MergeFromString(_INTEGER)
        yield made


def _istio_tags(proxy: Proxy) -> list[Message]:
    """Istio's attributes (buildServiceTags): who sends the request."""
    labels = dict(proxy.labels)
    name = labels.get("service.istio.io/canonical-name") or labels.get("app") or proxy.workload
    revision = labels.get("service.istio.io/canonical-revision") or labels.get("version") or "latest"
    tags = {
        "istio.canonical_revision": revision,
        "istio.canonical_service": name,
        "istio.namespace": proxy.namespace,
    }
    return [protos.CustomTag(tag=tag, literal={"value": value or "unknown"}) for tag, value in tags.items()]


def _custom_tags(tags: Mapping[str, CustomTag]) -> Iterator[Message]:
    for name, tag in sorted(tags.items()):
        made = protos.CustomTag(tag=name)
        if tag.literal is not None:
            made.literal.value = tag.literal.value
        elif tag.environment is not None:
            made.environment.name = tag.environment.name
            made.environment.default_value = tag.environment.default_value
        elif tag.header is not None:
            made.request_header.name = tag.header.name
            made.request_header.default_value = tag.header.default_value
        elif tag.formatter is not None:
            made.value = tag.formatter.value
        yield made
