"""The control plane's own metrics, as Prometheus reads them.

Those that mean the same as one of Istio's (`pilot/pkg/xds/monitoring.go`) have its name, so that Istio's
dashboards and alerts work; the others begin with `llmplane_`. Istio's counters have no suffix `_total`, which
Prometheus wants of what is declared a counter: they are declared untyped, which queries do not notice.
No label depends on what a proxy says of itself, except for Envoy's version, in the form of one.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric, UntypedMetricFamily
from prometheus_client.registry import Collector

from xds.observer import Observer
from xds.resources import CDS, ECDS, EDS, LDS, RDS, SDS, SRDS

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4

TYPES: Final = {CDS: "cds", EDS: "eds", LDS: "lds", SRDS: "srds", RDS: "rds", SDS: "sds", ECDS: "ecds"}
"""The label `type` by type URL, as in Istio."""
_OTHER: Final = "other"

_REJECTS: Final = {"cds": "CDS", "eds": "EDS", "lds": "LDS", "rds": "RDS"}
_VERSION: Final = re.compile(r"1\.\d{1,2}\.\d{1,2}", re.ASCII)

_SECONDS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 1, 3, 5, 10, 20, 30)
"""Istio's buckets, and finer ones below."""
_BYTES: Final = (1, 10_000, 1_000_000, 4_000_000, 10_000_000, 40_000_000)
"""Istio's buckets."""

disable_created_metrics()  # type: ignore[no-untyped-call] # no time series beside each histogram for when it began


@dataclass(frozen=True, slots=True)
class Figures:
    """What is counted when somebody asks."""

    versions: Mapping[str, int] = field(default_factory=dict)
    """Connected proxies by Envoy's version, as they say."""
    proxies: Mapping[str, int] = field(default_factory=dict)
    """Connected proxies by state."""
    objects: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Objects by kind and state."""
    problems: Mapping[str, int] = field(default_factory=dict)
    """Problems by severity."""
    last_good: int = 0
    """Objects that are served in their last good version."""
    last_change: float = 0.0
    """Seconds since the epoch; 0 before the first one."""


class Metrics(Observer, Collector):
    """Counts what the management server tells, and asks for `figures` when Prometheus comes."""

    def __init__(self, figures: Callable[[], Figures]) -> None:
        self._figures = figures
        self._pushes = Counter(dict.fromkeys(TYPES.values(), 0))
        self._rejects = Counter(dict.fromkeys(TYPES.values(), 0))
        self._expired_nonces = Counter(dict.fromkeys(TYPES.values(), 0))
        self._registry = CollectorRegistry()
        self._push_time = Histogram(
            "pilot_xds_push_time",
            "Seconds to make a response and to hand it to the transport.",
            ["type"],
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._config_size = Histogram(
            "pilot_xds_config_size_bytes",
            "Sizes of the responses, as encoded.",
            ["type"],
            registry=self._registry,
            buckets=_BYTES,
        )
        self._convergence_time = Histogram(
            "pilot_proxy_convergence_time",
            "Seconds from when a change of the objects is noticed until a proxy has acknowledged all of it; "
            "what a proxy refuses does not count.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._rejected_streams = Counter(
            {"UNAUTHENTICATED": 0, "PERMISSION_DENIED": 0, "INVALID_ARGUMENT": 0}
        )
        self._registry.register(self)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format (CONTENT_TYPE)."""
        return generate_latest(self._registry)

    # What the management server tells

    def pushed(self, type_url: str, size: int, seconds: float) -> None:
        """Count a response that was sent."""
        label = TYPES.get(type_url, _OTHER)
        self._pushes[label] += 1
        self._push_time.labels(label).observe(seconds)
        self._config_size.labels(label).observe(size)

    def rejected(self, type_url: str) -> None:
        """Count a NACK."""
        self._rejects[TYPES.get(type_url, _OTHER)] += 1

    def nonce_expired(self, type_url: str) -> None:
        """Count a request with an old nonce."""
        self._expired_nonces[TYPES.get(type_url, _OTHER)] += 1

    def node_rejected(self, status: str) -> None:
        """Count a stream that is not served."""
        self._rejected_streams[status] += 1

    def converged(self, seconds: float) -> None:
        """Note how long a change took to get to a proxy."""
        self._convergence_time.observe(seconds)

    # What Prometheus asks

    def describe(self) -> list[Metric]:
        """Say nothing in advance."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield what is not a histogram."""
        yield _counted(
            "pilot_xds_pushes", "Responses sent to proxies, by resource type (a counter).", self._pushes
        )
        yield _counted(
            "pilot_total_xds_rejects",
            "Responses that proxies refused (NACK), by resource type (a counter).",
            self._rejects,
        )
        yield _counted(
            "llmplane_rejected_streams",
            "Streams of proxies that are not served, or not any longer, by gRPC status (a counter).",
            self._rejected_streams,
            "status",
        )
        for label, name in _REJECTS.items():
            text = f"{name} responses that proxies refused (a counter)."
            yield UntypedMetricFamily(f"pilot_xds_{label}_reject", text, value=self._rejects[label])
        yield _counted(
            "pilot_xds_expired_nonce",
            "Requests with the nonce of a response that was answered before or that is not known, by "
            "resource type (a counter).",
            self._expired_nonces,
        )
        figures = self._figures()
        versions: Counter[str] = Counter()
        for version, number in figures.versions.items():
            versions[version if _VERSION.fullmatch(version) else "unknown"] += number
        yield _gauge("pilot_xds", "Connected proxies, by Envoy's version.", ("version",), versions)
        yield _gauge(
            "llmplane_proxies",
            "Connected proxies by state: SYNCED, STALE (their answer is awaited) or NACK (they refuse).",
            ("state",),
            figures.proxies,
        )
        yield _gauge(
            "llmplane_objects",
            "Objects by kind and state: OK, LastGoodVersion, or the reason why one does not do its work.",
            ("kind", "state"),
            figures.objects,
        )
        yield _gauge(
            "llmplane_problems",
            "Problems by severity, also what proxies refuse and what is held back from them.",
            ("severity",),
            figures.problems,
        )
        yield GaugeMetricFamily(
            "llmplane_last_good_versions",
            "Objects that are served in their last good version, because the newest one cannot be read.",
            value=figures.last_good,
        )
        yield GaugeMetricFamily(
            "llmplane_last_change_timestamp_seconds",
            "When a change of the objects was published last, in seconds since the epoch.",
            value=figures.last_change,
        )


def _counted(name: str, text: str, numbers: Mapping[str, int], by: str = "type") -> Metric:
    family = UntypedMetricFamily(name, text, labels=[by])
    for label, number in numbers.items():
        family.add_metric([label], number)
    return family


def _gauge(
    name: str, text: str, labels: tuple[str, ...], numbers: Mapping[str, int] | Mapping[tuple[str, str], int]
) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, number in numbers.items():
        family.add_metric([values] if isinstance(values, str) else list(values), number)
    return family
