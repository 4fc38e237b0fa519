"""Telemetry of Istio (telemetry.istio.io): access logs, metrics and traces of workloads.

Fields and schema: istio/api telemetry/v1alpha1/telemetry.proto and Istio's crd-all.gen.yaml. Checks: Istio's
pkg/config/validation (ValidateTelemetry); besides, no expression may read a credential (design decision 15).
"""

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from crds.cel import cel
from crds.credentials import check_environment, check_name
from crds.externalauthorization import Flag
from crds.formats import Operator, check_format, operators
from crds.meta import BaseObject, Model
from crds.problems import Finding
from crds.selection import SelectingSpec
from crds.values import Duration, header_name, invalid

Mode = Literal["CLIENT_AND_SERVER", "CLIENT", "SERVER"]
"""Requests that workloads send (sidecars outbound, gateways), receive, or both."""

STANDARD_METRICS = ("REQUEST_COUNT", "REQUEST_DURATION", "REQUEST_SIZE", "RESPONSE_SIZE")
"""Istio's metrics of HTTP requests."""

_LABEL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _label(name: str) -> str:
    if not _LABEL.fullmatch(name) or name.startswith("__") or name == "le":
        raise ValueError("must be the name of a label of Prometheus: letters, digits and '_'")
    return name


def _tag_name(name: str) -> str:
    if not name:
        raise ValueError("tag name may not be empty")
    return name


def _expression(text: str) -> str:
    cel(text)
    if list(operators(f"%CEL({text})%")) != [Operator("CEL", text)]:
        raise ValueError(
            "must not hold ')%' or line breaks: Envoy would take it for the end of the expression"
        )
    return text


def _format(text: str) -> str:
    check_format(text)
    return text


def _environment(name: str) -> str:
    check_environment(name)
    return name


def _readable_header(name: str) -> str:
    lower = header_name(name.removeprefix(":"))
    check_name("the header", lower)
    return f":{lower}" if name.startswith(":") else lower


class ProviderRef(Model):
    """An extension provider of the mesh configuration."""

    name: Annotated[str, Field(min_length=1)]
    """Its name."""


class ModeSelector(Model):
    """Which of the workload's requests are meant."""

    mode: Mode = "CLIENT_AND_SERVER"
    """Requests that it sends, receives, or both."""

    @property
    def is_client(self) -> bool:
        """Whether requests that a proxy sends are meant; sidecars outbound and gateways are all there is."""
        return self.mode != "SERVER"


class LogFilter(Model):
    """Which requests are logged."""

    expression: Annotated[str, AfterValidator(cel)]
    """A CEL expression, such as `response.code >= 400`."""


class AccessLogging(Model):
    """Access logs of the selected workloads."""

    match: ModeSelector | None = None
    """Which of their requests are meant (default: all)."""
    providers: tuple[ProviderRef, ...] = ()
    """Where to log to (default: what a more general Telemetry or defaultProviders says)."""
    disabled: Flag | None = None
    """Log nothing."""
    filter: LogFilter | None = None
    """Which requests are logged (default: all)."""


class MetricSelector(Model):
    """Which metrics an override is for."""

    metric: (
        Literal[
            "ALL_METRICS",
            "REQUEST_COUNT",
            "REQUEST_DURATION",
            "REQUEST_SIZE",
            "RESPONSE_SIZE",
            "TCP_OPENED_CONNECTIONS",
            "TCP_CLOSED_CONNECTIONS",
            "TCP_SENT_BYTES",
            "TCP_RECEIVED_BYTES",
            "GRPC_REQUEST_MESSAGES",
            "GRPC_RESPONSE_MESSAGES",
        ]
        | None
    ) = None
    """A metric of Istio, or all of them."""
    custom_metric: Annotated[str, Field(min_length=1)] | None = None
    """Another metric by its name, such as `llmplane_requests_total`."""
    mode: Mode = "CLIENT_AND_SERVER"
    """Requests that workloads send, receive, or both."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.metric is not None and self.custom_metric is not None:
            raise ValueError("must have only one of metric and customMetric")
        return self

    @property
    def names_all(self) -> bool:
        """Whether all metrics are meant."""
        return self.custom_metric is None and self.metric in {None, "ALL_METRICS"}

    @property
    def is_client(self) -> bool:
        """Whether requests that a proxy sends are meant."""
        return self.mode != "SERVER"

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics that are meant, by Istio's names, or a custom one by its own."""
        if self.custom_metric is not None:
            return (self.custom_metric,)
        return STANDARD_METRICS if self.names_all else (str(self.metric),)


class TagOverride(Model):
    """What becomes of a label."""

    operation: Literal["UPSERT", "REMOVE"] = "UPSERT"
    """Set it (in a new label, if there is none), or leave it out."""
    value: str = ""
    """A CEL expression, such as `filter_state["wasm.asm.llmproxy.request_model"]`; for UPSERT."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.operation == "UPSERT" and not self.value:
            raise ValueError("tagOverrides.value must be set when operation is UPSERT")
        if self.operation == "REMOVE" and self.value:
            raise ValueError("tagOverrides.value may only be set when operation is UPSERT")
        if self.value:
            try:
                _expression(self.value)
            except ValueError as error:
                raise invalid(Finding(("value",), str(error))) from None
        return self


class MetricsOverride(Model):
    """A change of some metrics."""

    match: MetricSelector = Field(default_factory=MetricSelector)
    """Which metrics (default: all of Istio's)."""
    disabled: Flag | None = None
    """Do not count them."""
    tag_overrides: Mapping[Annotated[str, AfterValidator(_label)], TagOverride] = {}
    """Changes of labels by their names."""


class Metrics(Model):
    """Metrics of the selected workloads."""

    providers: tuple[ProviderRef, ...] = ()
    """Providers of the kind prometheus (default: what a more general Telemetry or defaultProviders says)."""
    overrides: tuple[MetricsOverride, ...] = ()
    """Changes, in this order."""
    reporting_interval: Duration | None = None
    """No effect: metrics of HTTP requests are written when a request ends, as in Istio."""


class FixedValue(Model):
    """A fixed value."""

    value: Annotated[str, Field(min_length=1)]
    """The value."""


class Environment(Model):
    """A variable of the proxy's environment."""

    name: Annotated[str, AfterValidator(_environment)]
    """Name of the variable; only those that hold no key are allowed."""
    default_value: str = ""
    """The value where it is not set."""


class RequestHeader(Model):
    """A header of the request."""

    name: Annotated[str, AfterValidator(_readable_header)]
    """Name of the header."""
    default_value: str = ""
    """The value where it is not there."""


class Formatter(Model):
    """A format string, as of access logs."""

    value: Annotated[str, Field(min_length=1), AfterValidator(_format)]
    """The format string."""


class CustomTag(Model):
    """Where the value of an attribute comes from; exactly one source."""

    literal: FixedValue | None = None
    """A fixed value."""
    environment: Environment | None = None
    """A variable of the proxy's environment."""
    header: RequestHeader | None = None
    """A header of the request."""
    formatter: Formatter | None = None
    """A format string."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (
            sum(
                source is not None for source in (self.literal, self.environment, self.header, self.formatter)
            )
            != 1
        ):
            raise ValueError("must have exactly one of literal, environment, header and formatter")
        return self


class Tracing(Model):
    """Traces of the selected workloads."""

    match: ModeSelector | None = None
    """Which of their requests are meant (default: all)."""
    providers: tuple[ProviderRef, ...] = ()
    """Where spans go; the first one counts."""
    random_sampling_percentage: Annotated[float, Field(ge=0, le=100)] | None = None
    """Per cent of the requests whose traces begin here."""
    disable_span_reporting: Flag | None = None
    """Make no spans."""
    custom_tags: Mapping[Annotated[str, AfterValidator(_tag_name)], CustomTag] | None = None
    """Attributes of one's own; those of a more special Telemetry replace all of a more general one."""
    use_request_id_for_trace_sampling: Flag | None = None
    """No effect: x-request-id is no part of the sampling here."""
    enable_istio_tags: Flag | None = None
    """Attributes with Istio's names (istio.namespace ...); default true."""
    disable_context_propagation: Flag | None = None
    """Do not send the trace context (traceparent) on to the provider."""


class TelemetrySpec(SelectingSpec):
    """What is observed of the selected workloads, and how."""

    access_logging: tuple[AccessLogging, ...] = ()
    """Access logs."""
    metrics: tuple[Metrics, ...] = ()
    """Metrics."""
    tracing: tuple[Tracing, ...] = ()
    """Traces."""


class Telemetry(BaseObject):
    """How requests are observed: for the mesh, a namespace or a workload."""

    spec: TelemetrySpec = Field(default_factory=TelemetrySpec)

    def warnings(self) -> list[Finding]:
        """Tell of what is valid, but has no effect here."""
        found = self.spec.selection_warnings()
        for index, metrics in enumerate(self.spec.metrics):
            path = ("spec", "metrics", index)
            if metrics.reporting_interval is not None:
                found.append(Finding((*path, "reportingInterval"), "has no effect: Envoy counts at once"))
            for number, override in enumerate(metrics.overrides):
                metric = override.match.metric
                if metric and metric.startswith(("TCP_", "GRPC_")):
                    text = f"{metric} has no effect: only HTTP requests are counted"
                    found.append(Finding((*path, "overrides", number, "match", "metric"), text))
        if len(self.spec.tracing) > 1:
            found.append(Finding(("spec", "tracing"), "multiple tracing is not currently supported"))
        for index, tracing in enumerate(self.spec.tracing):
            if len(tracing.providers) > 1:
                path = ("spec", "tracing", index)
                found.append(
                    Finding(
                        (*path, "providers"),
                        "multiple providers is not currently supported: the first counts",
                    )
                )
        return found
