"""Istio's merge of Telemetry objects: what of them, and of the mesh configuration, counts for one proxy.

The order is Istio's (pilot/pkg/model/telemetry.go): the root namespace's Telemetry without a selector, that
of the proxy's namespace, then those of that namespace that select the workload; of several without a
selector in one namespace the oldest counts. What comes later wins. All requests here are those that a proxy
sends, so entries for `mode: SERVER` have no effect.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from crds.extensionprovider import ExtensionProvider
from crds.telemetry import AccessLogging, CustomTag, ProviderRef, TagOverride, Telemetry
from translator.proxy import Proxy
from translator.world import World


@dataclass(frozen=True, slots=True)
class Logging:
    """An access log: its provider, and the CEL expression that says which requests it gets (None: all)."""

    provider: ExtensionProvider
    expression: str | None


@dataclass(slots=True)
class Override:
    """What users changed of one metric."""

    disabled: bool = False
    tags: dict[str, TagOverride] = field(default_factory=dict)


@dataclass(slots=True)
class Tracing:
    """How requests are traced; percentages are of 100."""

    provider: ExtensionProvider | None
    sampling: float
    is_disabled: bool = False
    custom_tags: Mapping[str, CustomTag] = field(default_factory=dict)
    has_istio_tags: bool = True
    propagates_context: bool = True


def applicable(world: World, proxy: Proxy) -> list[Telemetry]:
    """Return the Telemetry objects that are for a proxy, the most general one first."""
    found = []
    for namespace in dict.fromkeys((world.mesh.config.root_namespace, proxy.namespace)):
        general = (item for item in world.telemetries.get(namespace, ()) if is_general(item))
        found += [item for _, item in zip(range(1), general, strict=False)]
    labels = dict(proxy.labels)
    return found + [
        item
        for item in world.telemetries.get(proxy.namespace, ())
        if not is_general(item) and item.spec.selects(labels, same_namespace=True)
    ]


def is_general(item: Telemetry) -> bool:
    """Whether a Telemetry is for all workloads of its namespace (root namespace: of all)."""
    return not item.spec.labels and not item.spec.targets


def logging(world: World, proxy: Proxy) -> list[Logging] | None:
    """Return the access logs of a proxy by their providers' names; None: what `accessLogFile` says counts.

    It does where no Telemetry and no default provider logs anything, and none switches it off (Istio's
    setHTTPAccessLog).
    """
    levels = [item.spec.access_logging for item in applicable(world, proxy) if item.spec.access_logging]
    default = world.mesh.config.default_providers.access_logging
    if not levels and not default:
        return None
    found = []
    for name, entry in sorted(_merged_logs(levels, default).items()):
        provider = world.mesh.config.provider(name)
        if provider is not None and (provider.envoy_file_access_log or provider.envoy_otel_als):
            found.append((entry, Logging(provider, entry.filter.expression if entry.filter else None)))
    if not found:
        return None
    return [log for entry, log in found if not entry.disabled]


def _merged_logs(
    levels: Iterable[tuple[AccessLogging, ...]], default: tuple[str, ...]
) -> dict[str, AccessLogging]:
    """Return the entry that counts for each provider (mergeLogs)."""
    if not levels:
        return dict.fromkeys(default, AccessLogging())
    in_scope = set(default)
    for level in levels:
        named = {name for entry in level if _is_client(entry) for name in _names(entry.providers)}
        in_scope = named or in_scope
    merged: dict[str, AccessLogging] = {}
    inherited = default
    for level in levels:
        for entry in level:
            inherited = _names(entry.providers) or inherited
            if _is_client(entry):
                merged.update((name, entry) for name in inherited if name in in_scope)
    return merged


def _is_client(entry: AccessLogging) -> bool:
    return entry.match is None or entry.match.is_client


def _names(providers: Iterable[ProviderRef]) -> tuple[str, ...]:
    return tuple(provider.name for provider in providers)


def metrics(world: World, proxy: Proxy) -> Mapping[str, Override] | None:
    """Return the changes of metrics by their names (Istio's, or a custom one); None where all are off.

    Metrics of Istio are `REQUEST_COUNT` and so on (mergeMetrics).
    """
    config = world.mesh.config
    entries = [entry for item in applicable(world, proxy) for entry in item.spec.metrics]
    named = [names for entry in entries if (names := _names(entry.providers))]
    default = config.default_providers.metrics
    in_scope = named[-1] if named else default
    merged: dict[str, dict[str, Override]] = {} if entries else {name: {} for name in default}
    is_off: set[str] = set()
    inherited = default
    for entry in entries:
        inherited = _names(entry.providers) or inherited
        for name in (name for name in inherited if name in in_scope):
            changes = merged.setdefault(name, {})
            for override in (override for override in entry.overrides if override.match.is_client):
                if override.match.names_all and override.disabled:
                    is_off.add(name)
                    continue
                is_off.discard(name)  # a more special Telemetry switches on what a more general one has off
                for metric in override.match.names:
                    change = changes.setdefault(metric, Override())
                    change.tags.update(override.tag_overrides)
                    if override.disabled is not None:
                        change.disabled = override.disabled
    for name in sorted(merged):
        provider = config.provider(name)
        if provider is not None and provider.prometheus is not None and name not in is_off:
            return merged[name]
    return None


def tracing(world: World, proxy: Proxy) -> Tracing | None:
    """Return how the requests of a proxy are traced; None: not at all (Telemetries.Tracing)."""
    config = world.mesh.config
    default = config.default_providers.tracing
    entries = [
        entry
        for item in applicable(world, proxy)
        for entry in item.spec.tracing
        if entry.match is None or entry.match.is_client
    ]
    found = Tracing(config.provider(default[0]) if default else None, config.default_config.tracing.sampling)
    for entry in entries:
        if entry.providers:
            found.provider = config.provider(entry.providers[0].name)
        if entry.disable_span_reporting is not None:
            found.is_disabled = entry.disable_span_reporting
        if entry.custom_tags is not None:
            found.custom_tags = entry.custom_tags
        if entry.random_sampling_percentage is not None:
            found.sampling = entry.random_sampling_percentage
        if entry.enable_istio_tags is not None:
            found.has_istio_tags = entry.enable_istio_tags
        if entry.disable_context_propagation is not None:
            found.propagates_context = not entry.disable_context_propagation
    if found.is_disabled or found.provider is None or found.provider.opentelemetry is None:
        return None
    return found
