"""LLMProvider: an LLM service outside the mesh, with its host, key, model and body parameters.

Fields, as far as the seeds and ASM's Go types have them, are ASM's; the others are optional extensions, with
DestinationRule's names where it has one. An API key never appears in a repr or in an error.
"""

import re
from collections.abc import Mapping
from datetime import timedelta
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from crds.meta import BaseObject, Model, WorkloadSelector, cel
from crds.problems import Finding, ObjectKey
from crds.values import (
    Count,
    DnsName,
    ExportTo,
    FilePath,
    Host,
    JsonMembers,
    KubernetesName,
    Limit,
    Line,
    OperationPath,
    Port,
    PositiveDuration,
    RequestPath,
    RuleName,
    describe,
    invalid,
    refuse,
)

_PLACEHOLDER = re.compile(r"\$\{[^}]*\}")
_KEY = re.compile(r"[!-~]+")

MAX_REQUEST_BYTES = 32 * 1024 * 1024
"""Size of the largest request body where a provider says nothing of it."""


def check_api_key(key: str) -> str:
    """Return the key without the white space around it; a Secret's value often ends in a newline.

    Raises `ValueError`, with a text that does not hold the key, where it is empty or cannot be the value of a
    header: visible ASCII only, so that no key can end the header or begin another one.
    """
    key = key.strip()
    if not key:
        raise ValueError("is empty")
    if not _KEY.fullmatch(key):
        raise ValueError("must be visible ASCII characters, without spaces inside")
    return key


def _api_key(value: object) -> SecretStr:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if not isinstance(value, str):
        text = f"must be a string, but is {describe(value)}"
        raise ValueError(text)  # noqa: TRY004 - pydantic's convention
    # A placeholder is text for people, with spaces (`${ API_KEY of dashscope}`); `placeholder` tells of it.
    return SecretStr(value if _PLACEHOLDER.search(value) else check_api_key(value))


class SecretKeyRef(Model):
    """One value of a Secret in the namespace of the LLMProvider."""

    name: KubernetesName
    """The Secret's name."""
    key: Line
    """Which of its values."""


class OpenAIConfig(Model):
    """What is added to requests in OpenAI's format.

    A member of the request body is set in one place: `model` and `stream` by their fields, any member in
    `defaults` or in `overrides`.
    """

    model_config = ConfigDict(
        json_schema_extra=cel(
            {
                "must have only one of apiKey and apiKeySecretRef": "!has(self.apiKey)"
                " || !has(self.apiKeySecretRef)"
            }
        )
    )

    model: Line | None = None
    """The model, whatever the client asks for."""
    stream: Annotated[bool, Field(strict=True)] | None = None
    """The value of `stream` for requests that have none."""
    stream_usage: Annotated[bool, Field(strict=True)] | None = None
    """Ask for the usage of streams with `stream_options.include_usage`, where the client says nothing of it,
    and keep the chunk that answers it from the client. Default true; false for providers that reject it."""
    api_key: Annotated[SecretStr, BeforeValidator(_api_key)] | None = None
    """The key, sent as `Authorization: Bearer`. In files, ${NAME} stands for an environment variable."""
    api_key_secret_ref: SecretKeyRef | None = None
    """The key, held by a Secret of the same namespace. Instead of apiKey."""
    defaults: JsonMembers = Field(default_factory=dict)
    """Members of the request body for requests that do not have them: any JSON."""
    overrides: JsonMembers = Field(default_factory=dict)
    """Members of the request body that replace those of the client: any JSON."""

    @property
    def placeholder(self) -> str | None:
        """The `${...}` that was left in the key: objects from Kubernetes are not expanded."""
        found = _PLACEHOLDER.search(self.api_key.get_secret_value()) if self.api_key else None
        return found and found[0]

    @property
    def has_key(self) -> bool:
        """Whether a key is configured, in whichever way."""
        return self.api_key is not None or self.api_key_secret_ref is not None

    @property
    def _fields(self) -> dict[str, str | bool]:
        named = {"model": self.model, "stream": self.stream}
        return {name: value for name, value in named.items() if value is not None}

    @model_validator(mode="after")
    def _check(self) -> Self:
        findings = [
            Finding(("overrides", name), f"'{name}' is in defaults too: set it in one of them")
            for name in self.overrides
            if name in self.defaults
        ]
        findings += [
            Finding((place, name), f"'{name}' is a field of openAIConfig too: set it in one place")
            for place, members in (("defaults", self.defaults), ("overrides", self.overrides))
            for name in self._fields
            if name in members
        ]
        if self.api_key is not None and self.api_key_secret_ref is not None:
            findings.append(Finding((), "must have only one of apiKey and apiKeySecretRef"))
        refuse(findings)
        return self

    def merged_over(self, base: "OpenAIConfig") -> "OpenAIConfig":
        """Return `base` with what this config sets.

        What this config says of a member of the body replaces what `base` says of it, in whichever place;
        apiKey and apiKeySecretRef are one field.
        """
        mine = {*self._fields, *self.defaults, *self.overrides}

        def kept(members: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in members.items() if name not in mine}

        key = self if self.has_key else base
        return OpenAIConfig.model_construct(
            **(kept(base._fields) | self._fields),
            stream_usage=base.stream_usage if self.stream_usage is None else self.stream_usage,
            api_key=key.api_key,
            api_key_secret_ref=key.api_key_secret_ref,
            defaults=kept(base.defaults) | dict(self.defaults),
            overrides=kept(base.overrides) | dict(self.overrides),
        )


class ProviderConfig(Model):
    """What is added to requests, in the one format that there is."""

    open_ai_config: OpenAIConfig = Field(default_factory=OpenAIConfig, alias="openAIConfig")
    """For providers that speak OpenAI's format."""


class ProviderConfigs(Model):
    """What is added to requests."""

    default_config: ProviderConfig = Field(default_factory=lambda: ProviderConfig.model_validate({}))
    """For all requests."""
    route_specific_configs: Mapping[RuleName, ProviderConfig] = {}
    """For requests that a rule of an LLMRoute sent, by the rule's name. Merged over defaultConfig."""


class Endpoint(Model):
    """A place to connect to."""

    address: Host
    """IP address or DNS name."""
    port: Port | None = None
    """TCP port; spec.port where it is not set."""


class ClientTLSSettings(Model):
    """TLS to the provider, with the names of Istio's DestinationRule."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            {
                "mode MUTUAL needs credentialName": (
                    "!has(self.mode) || self.mode != 'MUTUAL' || has(self.credentialName)"
                ),
                "credentialName has no effect without mode MUTUAL": (
                    "!has(self.credentialName) || (has(self.mode) && self.mode == 'MUTUAL')"
                ),
                "caCertificates, sni and insecureSkipVerify have no effect with mode DISABLE": (
                    "!has(self.mode) || self.mode != 'DISABLE' || !(has(self.caCertificates) || has(self.sni)"
                    " || (has(self.insecureSkipVerify) && self.insecureSkipVerify))"
                ),
                "caCertificates has no effect with insecureSkipVerify": (
                    "!has(self.caCertificates) || !has(self.insecureSkipVerify) || !self.insecureSkipVerify"
                ),
            }
        )
    )

    mode: Literal["SIMPLE", "MUTUAL", "DISABLE"] = "SIMPLE"
    """SIMPLE: TLS. MUTUAL: with a certificate of ours, too. DISABLE: no TLS."""
    ca_certificates: FilePath | None = None
    """File on the proxy's machine with the CA certificates that the provider is verified by."""
    credential_name: KubernetesName | None = None
    """Secret in the namespace of the LLMProvider with our certificate and key, for MUTUAL."""
    sni: DnsName | None = None
    """Server name that is asked for and verified (default: spec.host)."""
    insecure_skip_verify: Annotated[bool, Field(strict=True)] = False
    """Do not verify the provider's certificate."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        findings = []
        if self.mode == "DISABLE":
            findings += [
                Finding((field,), "has no effect with mode DISABLE")
                for field, value in (
                    ("caCertificates", self.ca_certificates),
                    ("sni", self.sni),
                    ("insecureSkipVerify", self.insecure_skip_verify),
                )
                if value
            ]
        if self.mode == "MUTUAL" and not self.credential_name:
            findings.append(Finding(("credentialName",), "is missing: mode MUTUAL needs it"))
        if self.mode != "MUTUAL" and self.credential_name:
            findings.append(Finding(("credentialName",), "has no effect without mode MUTUAL"))
        if self.insecure_skip_verify and self.ca_certificates:
            findings.append(Finding(("caCertificates",), "has no effect with insecureSkipVerify"))
        refuse(findings)
        return self


class Operation(Model):
    """A further operation that the provider serves, besides that of spec.path."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            {
                "model has no effect with method GET or DELETE": (
                    "!has(self.model) || !has(self.method) || !(self.method in ['GET', 'DELETE'])"
                )
            }
        )
    )

    path: OperationPath
    """Path below the prefix that it shares with spec.path, such as /images/generations."""
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] = "POST"
    """HTTP method."""
    model: Line | None = None
    """The model of these requests (default: the client's)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "?" in self.path:
            raise invalid(Finding(("path",), "must not hold a query"))
        if self.path.endswith("/"):
            raise invalid(Finding(("path",), "must not end in '/'"))
        if self.model and self.method in {"GET", "DELETE"}:
            raise invalid(Finding(("model",), f"has no effect with method {self.method}"))
        return self


class OutlierDetection(Model):
    """When a provider's address is left out for a while; names and defaults of Istio's DestinationRule."""

    consecutive_5xx_errors: Count = Field(5, alias="consecutive5xxErrors")
    """5xx answers in a row, failed connections and timeouts among them; 0 = off. Default 5."""
    consecutive_gateway_errors: Count = 0
    """502, 503 and 504 answers in a row; 0 = off. Default 0."""
    count_429: Annotated[bool, Field(alias="count429", strict=True)] = True
    """429 answers count in consecutive5xxErrors: who is over its quota is left out, too. Default true. Not a
    field of Istio."""
    interval: PositiveDuration = timedelta(seconds=10)
    """Time between checks of who may come back. Default 10s."""
    base_ejection_time: PositiveDuration = timedelta(seconds=30)
    """Shortest time that an address is left out; the n-th time in a row it is n times as long, up to 300s or
    to this time where it is longer. Default 30s."""
    max_ejection_percent: Annotated[Count, Field(le=100)] = 100
    """Greatest share of the addresses that is left out. Default 100, unlike Istio's 10: a provider mostly has
    one address, and is left out as a whole so that the next one answers."""


class ConnectionPoolTCP(Model):
    """Limits of connections; names of Istio's DestinationRule."""

    max_connections: Limit | None = None
    """How many connections each proxy opens (default: no limit). A request takes one while it is answered;
    what is more waits for a free one, as many as http1MaxPendingRequests lets."""
    connect_timeout: PositiveDuration | None = None
    """How long connecting may take, the TLS handshake included (default: the mesh's connectTimeout, 10s)."""


class ConnectionPoolHTTP(Model):
    """Limits of requests; names of Istio's DestinationRule."""

    http1_max_pending_requests: Annotated[Limit | None, Field(alias="http1MaxPendingRequests")] = None
    """How many requests of each proxy may wait for a connection, also while theirs is made (default: no
    limit). What is more is answered 503 at once."""
    http2_max_requests: Annotated[Limit | None, Field(alias="http2MaxRequests")] = None
    """How many requests of each proxy may be under way, of HTTP/1.1 too, as in Istio (default: no limit).
    What is more is answered 503 at once."""
    max_retries: Limit | None = None
    """How many retries of each proxy may be under way (default: no limit). Beyond, the failure is the
    client's answer."""
    idle_timeout: PositiveDuration = timedelta(seconds=50)
    """How long a connection without a request is kept. Default 50s: below what providers keep theirs."""


class ConnectionPool(Model):
    """Limits that keep one provider from using up what is there."""

    tcp: ConnectionPoolTCP = ConnectionPoolTCP()
    """Of connections."""
    http: ConnectionPoolHTTP = ConnectionPoolHTTP()
    """Of requests."""


class TrafficPolicy(Model):
    """What bounds the traffic to a provider; names of Istio's DestinationRule.

    Each proxy counts alone, and a rule with an entry in routeSpecificConfigs counts apart.
    """

    connection_pool: ConnectionPool = ConnectionPool()
    """Limits of connections and requests."""
    outlier_detection: OutlierDetection | None = None
    """When an address of the provider is left out for a while (default: never)."""


def _default_port(validated: dict[str, Any]) -> int:
    return 80 if validated["tls"].mode == "DISABLE" else 443


class LLMProviderSpec(Model):
    """An LLM provider: where it is and what is added to requests."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            {
                "exportTo has no effect on other namespaces beside '*'": (
                    "!has(self.exportTo) || size(self.exportTo) < 2 || !('*' in self.exportTo)"
                )
            }
        )
    )

    workload_selector: WorkloadSelector | None = None
    """The workloads that may call the provider (default: those of the namespace; istio-system: all)."""
    host: Host
    """Name or IP address by which clients call the provider; of a Service they may use each of its names."""
    path: RequestPath
    """Path of the provider's chat operation. Clients may call / instead."""
    tls: ClientTLSSettings = ClientTLSSettings()
    """TLS to the provider."""
    port: Port = Field(default_factory=_default_port)
    """TCP port of the provider. Default 443; 80 with tls.mode DISABLE."""
    endpoints: tuple[Endpoint, ...] = ()
    """Where to connect (default: what spec.host resolves to). The TLS name stays."""
    export_to: Annotated[tuple[ExportTo, ...], Field(max_length=1024)] = ()
    """Namespaces whose LLMRoutes may refer to the provider (default: all)."""
    operations: tuple[Operation, ...] = ()
    """Further operations that the provider serves."""
    traffic_policy: TrafficPolicy = TrafficPolicy()
    """What bounds the traffic to the provider."""
    max_request_bytes: Annotated[int, Field(ge=1, le=2**32 - 1, strict=True)] = MAX_REQUEST_BYTES
    """Size of the largest request body as the client sends it, in bytes; a larger one is answered 413.
    Default 33554432 (32 MiB). A proxy holds each body in memory until its answer begins."""
    configs: ProviderConfigs = ProviderConfigs()
    """What is added to requests."""

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Where to connect: (IP address or DNS name, port)."""
        if not self.endpoints:
            return ((self.host, self.port),)
        return tuple((endpoint.address, endpoint.port or self.port) for endpoint in self.endpoints)

    @property
    def route_names(self) -> tuple[str, ...]:
        """The rules of LLMRoutes that have a config of their own."""
        return tuple(self.configs.route_specific_configs)

    def config_for(self, rule_name: str | None) -> OpenAIConfig:
        """Return what is added to requests that this rule sent (None: a rule without a name)."""
        default = self.configs.default_config.open_ai_config
        specific = self.configs.route_specific_configs.get(rule_name or "")
        return specific.open_ai_config.merged_over(default) if specific else default

    @model_validator(mode="after")
    def _check(self) -> Self:
        findings = []
        seen = set()
        for index, operation in enumerate(self.operations):
            if (operation.method, operation.path) in seen:
                text = f"{operation.method} {operation.path} is listed twice"
                findings.append(Finding(("operations", index), text))
            seen.add((operation.method, operation.path))
        if "*" in self.export_to and len(self.export_to) > 1:
            findings.append(Finding(("exportTo",), "has no effect on other namespaces beside '*'"))
        refuse(findings)
        return self


class LLMProvider(BaseObject):
    """An LLM service such as dashscope.aliyuncs.com, which workloads call by plain HTTP under its host."""

    kind: Literal["LLMProvider"]
    spec: LLMProviderSpec

    @cached_property
    def secrets(self) -> tuple[ObjectKey, ...]:
        """The Secrets that hold its keys and its certificate."""
        configs = (
            self.spec.configs.default_config,
            *self.spec.configs.route_specific_configs.values(),
        )
        refs = (config.open_ai_config.api_key_secret_ref for config in configs)
        names = [*(ref.name for ref in refs if ref), self.spec.tls.credential_name]
        return tuple(ObjectKey("Secret", self.namespace, name) for name in dict.fromkeys(names) if name)

    @property
    def is_exported_to_all(self) -> bool:
        """Whether LLMRoutes of every namespace may refer to the provider."""
        return not self.spec.export_to or "*" in self.spec.export_to

    def exported_to(self, namespace: str) -> bool:
        """Whether spec.exportTo lets LLMRoutes of this namespace refer to the provider."""
        if self.is_exported_to_all:
            return True
        return namespace in self.spec.export_to or (
            "." in self.spec.export_to and namespace == self.namespace
        )

    def warnings(self) -> list[Finding]:
        """Tell of a key that others can read, of placeholders that nothing expands, of what has no effect."""
        findings = []
        configs = self.spec.configs
        places = {("defaultConfig",): configs.default_config} | {
            ("routeSpecificConfigs", name): config for name, config in configs.route_specific_configs.items()
        }
        if any(config.open_ai_config.has_key for config in places.values()):
            if self.spec.tls.mode == "DISABLE":
                text = "with mode DISABLE the key is sent in clear text"
                findings.append(Finding(("spec", "tls", "mode"), text))
            if self.spec.tls.insecure_skip_verify:
                text = "the key is sent to whoever answers for the host"
                findings.append(Finding(("spec", "tls", "insecureSkipVerify"), text))
        outliers = self.spec.traffic_policy.outlier_detection
        if outliers and not (outliers.consecutive_5xx_errors or outliers.consecutive_gateway_errors):
            text = "has no effect: consecutive5xxErrors and consecutiveGatewayErrors are 0"
            findings.append(Finding(("spec", "trafficPolicy", "outlierDetection"), text))
        for place, config in places.items():
            if _PLACEHOLDER.search(config.open_ai_config.model or ""):
                text = "is sent as it stands: only apiKey may hold a placeholder"
                findings.append(Finding(("spec", "configs", *place, "openAIConfig", "model"), text))
        return findings
