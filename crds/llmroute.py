"""LLMRoute: which provider gets which requests of a host.

The fields of ASM's reference page and Go types; `timeout` and `retries` are those of Istio's VirtualService,
`priority` is an extension.
"""

from collections.abc import Mapping
from functools import cached_property
from itertools import groupby
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from crds.meta import BaseObject, Model, StringMatch, cel
from crds.problems import Finding
from crds.values import (
    NOT_EMPTY,
    Count,
    Duration,
    GatewayName,
    Host,
    KubernetesName,
    Namespace,
    Port,
    PositiveDuration,
    RouteHost,
    RuleName,
    header_name,
    invalid,
)

MESH = "mesh"
"""The gateway that stands for all sidecars."""

RETRY_POLICIES = frozenset(
    {
        # x-envoy-retry-on
        "5xx",
        "gateway-error",
        "reset",
        "reset-before-request",
        "connect-failure",
        "envoy-ratelimited",
        "retriable-4xx",
        "refused-stream",
        "retriable-status-codes",
        "retriable-headers",
        "http3-post-connect-failure",
        # x-envoy-retry-grpc-on
        "cancelled",
        "deadline-exceeded",
        "internal",
        "resource-exhausted",
        "unavailable",
    }
)
"""Envoy's words for `retryOn` (its docs: HTTP filters, router)."""

MAX_TOTAL_WEIGHT = 2**32 - 1  # Envoy: WeightedCluster


def resolve_gateway(name: str, namespace: str) -> str:
    """Return `mesh` or `namespace/name` for a gateway as an object of this namespace writes it."""
    if name == MESH:
        return MESH
    other, slash, own = name.rpartition("/")
    return f"{other if slash and other != '.' else namespace}/{own}"


def _null_matches(headers: Any) -> Any:
    # `user-type:` with nothing behind it asks for the header's presence, as in Istio.
    if isinstance(headers, Mapping):
        return {name: {} if match is None else match for name, match in headers.items()}
    return headers


def _header_names(headers: Mapping[str, StringMatch]) -> Mapping[str, StringMatch]:
    result: dict[str, StringMatch] = {}
    for name, match in headers.items():
        try:
            lower = header_name(name)
        except ValueError as error:
            raise invalid(Finding((name,), str(error))) from None
        if lower in result:
            raise invalid(Finding((name,), f"is the header '{lower}' again: names of headers have no case"))
        result[lower] = match
    return result


class LLMRequestMatch(Model):
    """Conditions of which a request must meet all. No condition = every request."""

    headers: Annotated[
        Mapping[str, StringMatch], BeforeValidator(_null_matches), AfterValidator(_header_names)
    ] = {}
    """Headers of the request, by name."""
    source_labels: Mapping[str, str] = {}
    """Labels of the calling workload."""
    gateways: tuple[GatewayName, ...] = ()
    """Gateways that the request came in by (default: those of the route)."""

    @property
    def is_empty(self) -> bool:
        """Whether every request matches."""
        return not (self.headers or self.source_labels or self.gateways)


class BackendObjectReference(Model):
    """A backend in the cluster, as in the Gateway API."""

    group: str = ""
    """API group; empty = core."""
    kind: str = "Service"
    """Kind of the backend, such as Service or InferencePool."""
    name: KubernetesName
    """Name of the backend."""
    namespace: Namespace | None = None
    """Namespace of the backend (default: that of the route)."""
    port: Port | None = None
    """Port of the backend."""


class LLMBackendRef(Model):
    """A destination: an LLMProvider, or a backend in the cluster."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            {"must have one of providerHost and backendRef": "has(self.providerHost) != has(self.backendRef)"}
        )
    )

    provider_host: Host | None = None
    """spec.host of an LLMProvider; where that is a Service, any of its names."""
    backend_ref: BackendObjectReference | None = None
    """A backend in the cluster, instead of providerHost."""
    weight: Count | None = None
    """Share of the requests among destinations of the same priority. No weight at all = equal shares."""
    host_rewrite: Host | None = None
    """Host that the destination is asked for (default: its own)."""
    priority: Count = 0
    """0 comes first; a higher one is used only when the lower ones fail."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.provider_host is None and self.backend_ref is None:
            raise ValueError("must have providerHost or backendRef")
        if self.provider_host is not None and self.backend_ref is not None:
            raise ValueError("must have only one of providerHost and backendRef")
        return self


def _words(retry_on: str) -> tuple[str, ...]:
    return tuple(word for word in (word.strip() for word in retry_on.split(",")) if word)


def _is_status_code(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) == 3 and word[0] in "12345"  # noqa: PLR2004


def _retry_on(text: str) -> str:
    words = _words(text)
    if not words:
        raise ValueError("is empty")
    for word in words:
        if word not in RETRY_POLICIES and not _is_status_code(word):
            raise ValueError(
                f"'{word}' is neither a status code nor one of Envoy's retry policies"
                f" ({', '.join(sorted(RETRY_POLICIES))})"
            )
    return text


class Retries(Model):
    """When and how often a request is sent again, as in a VirtualService."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            {
                "attempts 0 turns retries off, but other fields of them are set": (
                    "self.attempts > 0 || !(has(self.perTryTimeout) || has(self.retryOn))"
                )
            }
        )
    )

    attempts: Count
    """How often at most; 0 = never."""
    per_try_timeout: PositiveDuration | None = None
    """Time until an attempt's answer begins, as firstTokenTimeout (default: the rule's timeout)."""
    retry_on: Annotated[str, AfterValidator(_retry_on)] | None = None
    """When: Envoy's retry policies and status codes, by commas (default: the connection failed or broke, 429,
    500, 502, 503, 504)."""

    @property
    def status_codes(self) -> tuple[int, ...]:
        """The status codes of retryOn."""
        return tuple(int(word) for word in _words(self.retry_on or "") if _is_status_code(word))

    @property
    def policies(self) -> tuple[str, ...]:
        """Envoy's words of retryOn; with status codes `retriable-status-codes` is among them, as in Istio."""
        policies = [word for word in _words(self.retry_on or "") if not _is_status_code(word)]
        if self.status_codes and "retriable-status-codes" not in policies:
            policies.append("retriable-status-codes")
        return tuple(policies)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.attempts == 0 and (self.per_try_timeout is not None or self.retry_on is not None):
            raise invalid(Finding(("attempts",), "0 turns retries off, but other fields of them are set"))
        return self


class LLMRule(Model):
    """Destinations, and the requests that go there."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            {
                # Priority by priority, as below, it would cost more than an API server allows.
                "the weights are all 0: nothing gets requests": (
                    "size(self.backendRefs) < 2"
                    " || self.backendRefs.exists(r, !has(r.weight) || r.weight > 0 || has(r.priority))"
                ),
                "firstTokenTimeout sets the same limit as retries.perTryTimeout: set one of them": (
                    "!has(self.firstTokenTimeout) || !has(self.retries) || !has(self.retries.perTryTimeout)"
                ),
            }
        )
    )

    name: RuleName | None = None
    """Name that LLMProviders refer to in routeSpecificConfigs."""
    matches: tuple[LLMRequestMatch, ...] = ()
    """Which requests: those that meet any of these (default: all)."""
    backend_refs: Annotated[tuple[LLMBackendRef, ...], Field(max_length=64), *NOT_EMPTY]
    """Where they go."""
    timeout: Duration | None = None
    """Time for the whole request with its retries; 0s = no limit."""
    first_token_timeout: PositiveDuration | None = None
    """Time until a provider's answer begins with its headers (default: no limit). After it the next one of
    the rule's priorities or retries is asked, or the client gets 504. An answer that is not streamed begins
    when the model is done."""
    stream_idle_timeout: PositiveDuration | None = None
    """How long a provider may be silent, before its answer and between two pieces of it. Before the answer
    the next one is asked as with firstTokenTimeout; afterwards the answer is broken off. Default 1h."""
    retries: Retries | None = None
    """When and how often a request is sent again."""

    @property
    def is_default(self) -> bool:
        """Whether every request matches."""
        return not self.matches or any(match.is_empty for match in self.matches)

    def priority_groups(self) -> tuple[tuple[tuple[LLMBackendRef, int], ...], ...]:
        """Return the destinations with their weights, by priority, the first group first.

        Without any weight all are equal; with some, those that have none get nothing and are left out, as in
        Istio; the weight of a single destination does not matter.
        """
        return tuple(
            tuple((ref, weight) for _, ref, weight in group if weight) for group in self._weighted_groups()
        )

    def _weighted_groups(self) -> list[list[tuple[int, LLMBackendRef, int]]]:
        """Return (index, destination, weight) by priority."""
        numbered = sorted(enumerate(self.backend_refs), key=lambda pair: pair[1].priority)
        groups = [list(group) for _, group in groupby(numbered, key=lambda pair: pair[1].priority)]
        return [
            [
                (index, ref, 1 if len(group) == 1 or _has_no_weight(group) else ref.weight or 0)
                for index, ref in group
            ]
            for group in groups
        ]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for group in self._weighted_groups():
            total = sum(weight for *_, weight in group)
            if not total:
                places = " and ".join(f"backendRefs[{index}]" for index, *_ in group)
                raise invalid(
                    Finding(("backendRefs",), f"the weights of {places} are all 0: nothing gets requests")
                )
            if total > MAX_TOTAL_WEIGHT:
                raise invalid(
                    Finding(("backendRefs",), f"the weights add up to more than {MAX_TOTAL_WEIGHT}")
                )
        if self.first_token_timeout and self.retries and self.retries.per_try_timeout:
            text = "sets the same limit as retries.perTryTimeout: set one of them"
            raise invalid(Finding(("firstTokenTimeout",), text))
        return self

    def warnings(self) -> list[Finding]:
        """Tell of weights and timeouts that do not say what is done."""
        findings = []
        for group in self._weighted_groups():
            refs = [(index, ref) for index, ref, _ in group]
            if len(group) > 1 and _has_no_weight(refs):
                text = f"{len(group)} destinations without weights share equally"
                findings.append(Finding(("backendRefs",), text))
            for index, ref, weight in group:
                if not weight and ref.weight is None:
                    text = "has no weight and gets no requests, since others have one"
                    findings.append(Finding(("backendRefs", index), text))
                if weight and ref.weight == 0:
                    text = "is the only destination, and gets all requests in spite of weight 0"
                    findings.append(Finding(("backendRefs", index, "weight"), text))
        limits = {
            ("retries", "perTryTimeout"): self.retries and self.retries.per_try_timeout,
            ("firstTokenTimeout",): self.first_token_timeout,
            ("streamIdleTimeout",): self.stream_idle_timeout,
        }
        for place, limit in limits.items():
            if self.timeout and limit and limit > self.timeout:
                findings.append(Finding(place, "is longer than the rule's timeout and has no effect"))
        idle, first = self.stream_idle_timeout, self.first_token_timeout
        if idle and first and first > idle:
            text = "is longer than streamIdleTimeout and has no effect"
            findings.append(Finding(("firstTokenTimeout",), text))
        return findings


def _has_no_weight(refs: list[tuple[int, LLMBackendRef]]) -> bool:
    return all(ref.weight is None for _, ref in refs)


class LLMRouteSpec(Model):
    """A host, and where its requests go."""

    host: RouteHost
    """Host that clients call: a DNS name, the short name of a Service, *.suffix or *."""
    gateways: tuple[GatewayName, ...] = ()
    """Where the route applies: mesh (all sidecars), and gateways by name (default: mesh)."""
    rules: Annotated[tuple[LLMRule, ...], Field(max_length=256), *NOT_EMPTY]
    """The first rule that matches is used."""


class LLMRoute(BaseObject):
    """Routes requests to LLM providers."""

    kind: Literal["LLMRoute"]
    spec: LLMRouteSpec

    @cached_property
    def gateways(self) -> frozenset[str]:
        """Where the route applies: `mesh` and `namespace/name`."""
        return frozenset(resolve_gateway(name, self.namespace) for name in self.spec.gateways or (MESH,))

    @cached_property
    def has_backends(self) -> bool:
        """Whether some requests go to anything else than providers."""
        return any(ref.backend_ref is not None for rule in self.spec.rules for ref in rule.backend_refs)

    def warnings(self) -> list[Finding]:
        """Tell of rules and matches that nothing reaches, and of what the rules themselves warn of."""
        findings = []
        default: int | None = None
        for index, rule in enumerate(self.spec.rules):
            place = ("spec", "rules", index)
            if default is not None:
                text = f"is never reached: rules[{default}] takes all requests"
                findings.append(Finding(place, text))
            elif rule.is_default:
                default = index
            findings += [Finding((*place, *finding.path), finding.message) for finding in rule.warnings()]
            for number, match in enumerate(rule.matches):
                for position, name in enumerate(match.gateways):
                    if resolve_gateway(name, self.namespace) not in self.gateways:
                        path = (*place, "matches", number, "gateways", position)
                        findings.append(Finding(path, f"'{name}' is not among the gateways of the route"))
        return findings
