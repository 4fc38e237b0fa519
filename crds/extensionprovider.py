"""Extension providers of Istio's mesh configuration: what objects refer to by name.

Fields: istio/api mesh/v1alpha1/config.proto. Kinds of providers that we do not have (Zipkin, Datadog ...) are
left out with a warning before these models see them (crds.meshconfig).
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from crds.credentials import check_name
from crds.externalauthorization import EnvoyExtAuthzGrpc, EnvoyExtAuthzHttp, Flag
from crds.formats import json_format, text_format
from crds.meta import Model
from crds.values import FilePath, Line, Port, PositiveDuration, RequestPath, ServiceName, header_name

TextFormat = Annotated[str, AfterValidator(text_format)]
"""A format string; Istio's newline is added at its end."""

JsonLabels = Annotated[
    Mapping[str, Any],
    AfterValidator(json_format),
    WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
]
"""A format in JSON: the strings in it are format strings."""


class LogFormat(Model):
    """How a line looks. Nothing set: Istio's default text."""

    text: TextFormat = ""
    """A format string; empty = Istio's default."""
    labels: JsonLabels | None = None
    """The members of a JSON object; none = Istio's default ones."""


class EnvoyFileAccessLog(Model):
    """An access log that Envoy writes to a file."""

    path: FilePath = "/dev/stdout"
    """A file on the proxy's machine."""
    log_format: LogFormat | None = None
    """How a line looks."""
    omit_empty_values: Flag = False
    """Leave out members without a value, instead of null; print nothing instead of '-'."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.log_format and self.log_format.text and self.log_format.labels is not None:
            raise ValueError("must have only one of logFormat.text and logFormat.labels")
        return self


class HttpHeader(Model):
    """A fixed header of requests to a collector."""

    name: Annotated[str, AfterValidator(header_name)]
    """Name of the header."""
    value: Line
    """Its value; it can be seen by all who may look at the configuration."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            check_name("as", self.name)
        except ValueError:
            raise ValueError(
                f"must not set '{self.name}': it would show in the configuration; let a collector beside the "
                "proxy add it"
            ) from None
        return self


class HttpService(Model):
    """OTLP over HTTP instead of gRPC."""

    path: RequestPath
    """Path at the collector, such as `/v1/traces` or `/v1/logs`."""
    timeout: PositiveDuration = timedelta(seconds=3)
    """How long an export may take."""
    headers: tuple[HttpHeader, ...] = ()
    """Headers to add."""


class EnvoyOtelAls(Model):
    """An OpenTelemetry collector that gets access logs (OTLP)."""

    service: ServiceName
    """Host of the collector."""
    port: Port
    """Port of the collector."""
    log_name: Line = "otel_envoy_accesslog"
    """Name of the log."""
    log_format: LogFormat | None = None
    """Body (text) and attributes (labels) of a record."""
    http: HttpService | None = None
    """Use HTTP instead of gRPC. Not a field of Istio."""


class OpenTelemetryTracing(Model):
    """An OpenTelemetry collector that gets spans (OTLP)."""

    service: ServiceName
    """Host of the collector."""
    port: Port
    """Port of the collector."""
    max_tag_length: Annotated[int, Field(ge=1, le=2**32 - 1, strict=True)] | None = None
    """Longest value of the attribute http.url."""
    http: HttpService | None = None
    """Use HTTP; default is gRPC."""


class Prometheus(Model):
    """The metrics at the proxy's port 15090."""


class RateLimitTLS(Model):
    """TLS to a rate limit service. Its certificate must be of the mesh's trust roots, and for its host."""

    mode: Literal["DISABLE", "SIMPLE", "MUTUAL"] = "DISABLE"
    """DISABLE: no TLS. SIMPLE: TLS. MUTUAL: with the certificate of the proxy's workload, too."""


class EnvoyRateLimit(Model):
    """A service that implements envoy.service.ratelimit.v3.RateLimitService. Not a provider of Istio.

    Limits are sent with each request, so that the service needs no configuration but the domain `llmplane`.
    """

    service: ServiceName
    """Host of the service: `[<namespace>/]<host>`."""
    port: Port
    """Port of the service."""
    timeout: PositiveDuration = timedelta(milliseconds=250)
    """How long its answer may take; after that it counts as failed."""
    refunds: Flag = False
    """Whether the service gives back by is_negative_hits, as `llmplane ratelimit` does. To others, such as
    github.com/envoyproxy/ratelimit, nothing is given back: they would add it."""
    tls: RateLimitTLS = Field(default_factory=RateLimitTLS)
    """How it is spoken to."""


class ExtensionProvider(Model):
    """A provider by its name; it is of exactly one kind."""

    name: Line
    """What objects refer to it by."""
    envoy_ext_authz_http: EnvoyExtAuthzHttp | None = None
    """External authorization over HTTP."""
    envoy_ext_authz_grpc: EnvoyExtAuthzGrpc | None = None
    """External authorization over gRPC."""
    envoy_file_access_log: EnvoyFileAccessLog | None = None
    """An access log in a file."""
    envoy_otel_als: EnvoyOtelAls | None = None
    """Access logs for an OpenTelemetry collector."""
    opentelemetry: OpenTelemetryTracing | None = None
    """Traces for an OpenTelemetry collector."""
    prometheus: Prometheus | None = None
    """Metrics at the proxy's port 15090."""
    envoy_rate_limit: EnvoyRateLimit | None = None
    """A rate limit service, for LLMTokenRateLimits of mode Global. Not a kind of Istio's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        kinds = [
            name for name in type(self).model_fields if name != "name" and getattr(self, name) is not None
        ]
        if len(kinds) != 1:
            aliases = [field.alias for name, field in type(self).model_fields.items() if name != "name"]
            raise ValueError(f"must have exactly one of {', '.join(map(str, aliases))}")
        return self
