"""Istio's mesh configuration (istio.mesh.v1alpha1 MeshConfig), as far as it is honoured.

The file may be Istio's own: fields of Istio that mean nothing here are warnings, fields that nobody knows are
errors. Where a field is Istio's, so is its default; `llmMetrics` is ours.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from crds import document as documents
from crds import validation
from crds.document import Flaw
from crds.extensionprovider import EnvoyFileAccessLog, ExtensionProvider, Prometheus
from crds.externalauthorization import Flag
from crds.formats import JsonFormat, json_format, text_format
from crds.meta import Model
from crds.problems import Finding, Path, Problem, Severity, field_name
from crds.values import Duration, FilePath, Line, Namespace, describe, refuse


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OF_ISTIO: Mapping[Path, frozenset[str]] = {
    (): _names(
        """
        ca caCertificates certificates configSources defaultDestinationRuleExportTo defaultHttpRetryPolicy
        defaultServiceExportTo defaultTrafficPolicy defaultVirtualServiceExportTo disableEnvoyListenerLog
        discoverySelectors dnsRefreshRate enableAutoMtls enableEnvoyAccessLogService enablePrometheusMerge
        h2UpgradePolicy hboneIdleTimeout inboundClusterStatName inboundTrafficPolicy ingressClass
        ingressControllerMode ingressSelector ingressService localityLbSetting meshMTLS
        outboundClusterStatName outboundTrafficPolicy protocolDetectionTimeout proxyInboundListenPort
        proxyListenPort serviceEntryVisibility serviceScopeConfigs serviceSettings tcpKeepalive tlsDefaults
        verifyCertificateAtClient zoneAwareLbSetting
        """
    ),
    ("defaultConfig",): _names(
        """
        availabilityZone binaryPath caCertificatesPem concurrency configPath connectionSettings
        controlPlaneAuthPolicy customConfigFile discoveryAddress discoveryRefreshDelay drainDuration
        envoyAccessLogService envoyMetricsService envoyMetricsServiceAddress extraStatTags fileFlushInterval
        fileFlushMinSizeKb holdApplicationUntilProxyStarts image interceptionMode meshId privateKeyProvider
        proxyAdminPort proxyBootstrapTemplatePath proxyHeaders proxyMetadata proxyStatsMatcher readinessProbe
        runtimeValues sds serviceCluster statNameLength statsCompression statsdUdpAddress statusPort
        terminationDrainDuration tracingServiceName zipkinAddress
        """
    ),
    ("defaultConfig", "gatewayTopology"): _names("forwardClientCertDetails proxyProtocol"),
    ("defaultConfig", "tracing"): _names(
        "customTags datadog enableIstioTags lightstep openCensusAgent stackdriver tlsSettings zipkin"
    ),
}
"""Fields of Istio's API that have no effect here (istio/api mesh/v1alpha1/config.proto, proxy.proto)."""
_PROVIDERS_OF_ISTIO = _names(
    "datadog envoyHttpAls envoyTcpAls lightstep opencensus sds skywalking stackdriver zipkin"
)
_PROVIDER_FIELDS_OF_ISTIO = {
    "opentelemetry": frozenset(
        {"grpc", "resourceDetectors", "serviceAttributeEnrichment", "dynatraceSampler"}
    )
}


class GatewayTopology(Model):
    """What stands between clients and gateways (ProxyConfig.gatewayTopology)."""

    num_trusted_proxies: Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)] = 0
    """How many proxies in front of a gateway are trusted to add to X-Forwarded-For."""


class ProxyTracing(Model):
    """Defaults of traces (istio.mesh.v1alpha1 Tracing)."""

    sampling: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Per cent of the requests whose traces begin here."""
    max_path_tag_length: Annotated[int, Field(ge=1, le=2**32 - 1, strict=True)] | None = None
    """Longest value of the attribute http.url (default: 256)."""


class ProxyConfig(Model):
    """What holds for each proxy (istio.mesh.v1alpha1 ProxyConfig)."""

    gateway_topology: GatewayTopology = Field(default_factory=GatewayTopology)
    """What stands in front of gateways."""
    tracing: ProxyTracing = Field(default_factory=ProxyTracing)
    """What holds for traces where no Telemetry says otherwise."""


class PathNormalization(Model):
    """How gateways normalise paths before policies look at them."""

    normalization: Literal["DEFAULT", "NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES"] = "DEFAULT"
    """DEFAULT is BASE: RFC 3986, without // to / and without decoding %2F."""


class DefaultProviders(Model):
    """Providers that are used where no Telemetry names one."""

    access_logging: tuple[Line, ...] = ()
    """Of access logs. None: accessLogFile decides."""
    metrics: tuple[Line, ...] = ("prometheus",)
    """Of metrics. An empty list switches all metrics of requests off."""
    tracing: tuple[Line, ...] = ()
    """Of traces; the first one counts."""


class LLMMetrics(Model):
    """Metrics of LLM traffic, beside Istio's. Not a field of Istio."""

    max_client_models: Annotated[int, Field(ge=0, le=100_000, strict=True)] = 100
    """How many models that clients choose are shown by name, for each worker thread of a proxy; more are
    shown as `other`. Models that the configuration names are always shown."""
    max_series: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] = 10_000
    """How many time series each group of metrics may have in a proxy; what is beyond is not counted. It
    bounds what dimensions of one's own (tagOverrides) can do."""
    gen_ai: Annotated[Flag, Field(alias="genAI")] = False
    """Add OpenTelemetry's GenAI metrics (gen_ai_client_token_usage ...)."""


class MeshConfig(Model):
    """What holds for the whole mesh."""

    root_namespace: Namespace = "istio-system"
    """Namespace whose objects reach all workloads."""
    trust_domain: Line = "cluster.local"
    """Trust domain of the identities in workloads' certificates."""
    trust_domain_aliases: tuple[Line, ...] = ()
    """Further trust domains, whose identities count as those of trustDomain."""
    proxy_http_port: Annotated[int, Field(ge=0, le=65535, strict=True)] = 15080
    """Port of the sidecars' HTTP proxy listener; 0 for none."""
    connect_timeout: Duration = timedelta(seconds=10)
    """How long a connection to a provider may take, its TLS handshake included."""
    path_normalization: PathNormalization = Field(default_factory=PathNormalization)
    """How gateways normalise paths."""
    default_config: ProxyConfig = Field(default_factory=ProxyConfig)
    """What holds for each proxy."""
    access_log_file: FilePath | Literal[""] = ""
    """File on the proxy's machine for access logs, where neither a Telemetry nor defaultProviders say
    otherwise; empty for none. `/dev/stdout` is the proxy's standard output."""
    access_log_format: str = ""
    """Format of accessLogFile, and of the provider `envoy`; empty = Istio's default."""
    access_log_encoding: Literal["TEXT", "JSON"] = "TEXT"
    """Whether accessLogFormat is a format string or a JSON object of format strings."""
    enable_tracing: Flag = True
    """Istio's switch of traces without a provider. Here they always need one (defaultProviders.tracing)."""
    extension_providers: tuple[ExtensionProvider, ...] = ()
    """What Telemetry and AuthorizationPolicy objects refer to by name."""
    default_providers: DefaultProviders = Field(default_factory=DefaultProviders)
    """Providers that are used where no object says otherwise."""
    llm_metrics: LLMMetrics = Field(default_factory=LLMMetrics)
    """Metrics of LLM traffic."""

    def provider(self, name: str) -> ExtensionProvider | None:
        """Return a provider; Istio compares their names without case."""
        for provider in (*self.extension_providers, *_BUILT_IN):
            if provider.name.lower() == name.lower():
                return provider
        return None

    @property
    def text_format(self) -> str:
        """`accessLogFormat` as a format string; empty = Istio's default."""
        return text_format(self.access_log_format) if self.access_log_format else ""

    @property
    def json_format(self) -> JsonFormat:
        """`accessLogFormat` as a JSON object; empty = Istio's default.

        Raises ValueError if it is none.
        """
        if not self.access_log_format:
            return {}
        try:
            members = json.loads(self.access_log_format)
        except ValueError:
            members = None
        if isinstance(members, dict):
            return json_format(members)
        raise ValueError("must be a JSON object in a string, for accessLogEncoding is JSON")

    @model_validator(mode="after")
    def _check(self) -> Self:
        findings = []
        try:
            _ = self.json_format if self.access_log_encoding == "JSON" else self.text_format
        except ValueError as error:
            findings.append(Finding(("accessLogFormat",), str(error)))
        names: set[str] = set()
        for index, provider in enumerate(self.extension_providers):
            if provider.name.lower() in names:
                findings.append(Finding(("extensionProviders", index, "name"), "is used twice"))
            names.add(provider.name.lower())
        refuse(findings)
        return self

    def warnings(self) -> list[Finding]:
        """Tell of what is valid, but probably not what was meant."""
        used = self.default_providers
        wanted = {
            "accessLogging": (used.access_logging, ("envoy_file_access_log", "envoy_otel_als")),
            "metrics": (used.metrics, ("prometheus",)),
            "tracing": (used.tracing, ("opentelemetry",)),
        }
        found = []
        for member, (names, kinds) in wanted.items():
            for index, name in enumerate(names):
                provider = self.provider(name)
                if provider is None or all(getattr(provider, kind) is None for kind in kinds):
                    text = f"no provider '{name}' that can do this: it has no effect"
                    found.append(Finding(("defaultProviders", member, index), text))
        return found


_BUILT_IN = (
    ExtensionProvider(name="prometheus", prometheus=Prometheus()),
    ExtensionProvider.model_validate({"name": "envoy", "envoyFileAccessLog": EnvoyFileAccessLog()}),
)
"""Providers that need not be configured (Istio's mesh.DefaultMeshConfig)."""


def load_mesh_config(text: str, file: str) -> tuple[MeshConfig | None, list[Problem]]:
    """Read a mesh configuration file (YAML). None where it cannot be used; problems may be warnings alone."""
    flaws: list[Flaw] = []
    root = None
    for chunk in documents.split(text):
        document = documents.compose(chunk)
        flaws += document.flaws
        if root is not None:
            flaws.append(Flaw(chunk.lines_before + 1, "is a second document: there must be one"))
        root = root or document.root

    def problem(line: int, finding: Finding, severity: Severity) -> Problem:
        return Problem(severity, file, line, "", "", "", field_name(finding.path), finding.message)

    if flaws:
        return None, [problem(flaw.line, Finding(flaw.path, flaw.message), Severity.ERROR) for flaw in flaws]
    content = root.plain() if root is not None else None
    if root is None or content is None:
        return MeshConfig(), []
    if not isinstance(content, dict):
        finding = Finding((), f"must be a mapping, but is {describe(content)}")
        return None, [problem(root.line, finding, Severity.ERROR)]
    kept, ignored = without_fields_of_istio(content)
    try:
        config = MeshConfig.model_validate(kept)
    except ValidationError as error:
        found = validation.findings(MeshConfig, error)
        return None, [problem(root.line_of(finding.path), finding, Severity.ERROR) for finding in found]
    warnings = [*ignored, *config.warnings()]
    return config, [problem(root.line_of(finding.path), finding, Severity.WARNING) for finding in warnings]


def without_fields_of_istio(document: Mapping[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """Leave out what is Istio's and has no effect here; return the rest, and what was left out."""
    kept, findings = _without(document, ()), list(_ignored(document, ()))
    providers = kept.get("extensionProviders")
    if isinstance(providers, list):
        path: Path = ("extensionProviders",)
        kept["extensionProviders"] = []
        for index, provider in enumerate(providers):
            if isinstance(provider, Mapping) and (kinds := sorted(provider.keys() & _PROVIDERS_OF_ISTIO)):
                findings.append(Finding((*path, index, kinds[0]), _NO_EFFECT))
                continue
            made = provider
            for kind, ignored in _PROVIDER_FIELDS_OF_ISTIO.items():
                if isinstance(provider, Mapping) and isinstance(provider.get(kind), Mapping):
                    findings += [
                        Finding((*path, index, kind, name), _NO_EFFECT)
                        for name in provider[kind]
                        if name in ignored
                    ]
                    members = {name: value for name, value in provider[kind].items() if name not in ignored}
                    made = {**provider, kind: members}
            kept["extensionProviders"].append(made)
    return kept, findings


_NO_EFFECT = "is a field of Istio that has no effect here"


def _without(members: Mapping[str, Any], path: Path) -> dict[str, Any]:
    ignored = _OF_ISTIO.get(path, frozenset())
    return {
        name: _without(value, (*path, name))
        if isinstance(value, Mapping) and (*path, name) in _OF_ISTIO
        else value
        for name, value in members.items()
        if name not in ignored
    }


def _ignored(members: Mapping[str, Any], path: Path) -> Iterator[Finding]:
    for name, value in members.items():
        if name in _OF_ISTIO.get(path, frozenset()):
            yield Finding((*path, name), _NO_EFFECT)
        elif isinstance(value, Mapping) and (*path, name) in _OF_ISTIO:
            yield from _ignored(value, (*path, name))
