"""LLMTokenRateLimits of mode Global: Envoy's ratelimit filter asks a service that counts for all Envoys.

The script in front (`rate_limits.lua`) writes what to count into dynamic metadata: what a request may use
before it goes on, and when its answer has ended, what it used more or less than that. Each limit that a
policy can have is three descriptors here; one whose metadata are not there is not sent.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from crds.extensionprovider import EnvoyRateLimit
from crds.kinds import did_you_mean
from crds.llmtokenratelimit import LLMTokenRateLimit, Mode
from crds.meshconfig import MeshConfig
from crds.problems import Finding, ObjectKey
from translator.features import Feature
from translator.proxy import Proxy
from translator.services import ServiceDestination
from translator.world import World
from xds import protos

DOMAIN: Final = "llmplane"
RESERVE, SETTLE, RELEASE = "llm.rate_limit", "llm.rate_limit.settle", "llm.rate_limit.release"
"""Namespaces of the metadata: at the request, and at the end of its answer."""

_NOWHERE: Final = EnvoyRateLimit(service="127.0.0.1", port=1)
"""Nothing listens here: a service that is not configured is one that cannot be asked."""


class _Group(NamedTuple):
    """What the policies of one filter have in common; what refuses comes first."""

    shadow: bool
    fail_open: bool
    provider: str


class UnknownProviderError(LookupError):
    """The mesh configuration has no such rate limit service; the text says which it has."""


def find_service(config: MeshConfig, name: str) -> EnvoyRateLimit:
    """Look a rate limit service up by the name of its extensionProvider. Raises UnknownProviderError."""
    services = {provider.name: provider.envoy_rate_limit for provider in config.extension_providers}
    found = services.get(name)
    if found is None:
        known = [of for of, service in services.items() if service is not None]
        text = f"the mesh configuration has no extensionProvider '{name}' for rate limits (envoyRateLimit)"
        raise UnknownProviderError(f"{text}{did_you_mean(name, known)}")
    return found


def filters(world: World, proxy: Proxy, policies: Sequence[LLMTokenRateLimit]) -> list[dict[str, Any]]:
    """Make the filters that ask services; they stand behind the script."""
    return [
        {
            "name": "envoy.filters.http.ratelimit",
            "typed_config": protos.pack(_filter(world, proxy, group, members)),
        }
        for group, members in _groups(policies)
    ]


def services(world: World, policies: Iterable[LLMTokenRateLimit]) -> Iterator[ServiceDestination]:
    """Return the services that these policies ask."""
    for group, _ in _groups(policies):
        yield _destination(_service(world, group.provider))


def mutual(world: World, policies: Iterable[LLMTokenRateLimit]) -> Iterator[ObjectKey]:
    """Return the policies whose service asks for the certificate of the proxy's workload."""
    for group, members in _groups(policies):
        if _service(world, group.provider).tls.mode == "MUTUAL":
            yield from (policy.key for policy in members)


def unresolved(world: World, policy: LLMTokenRateLimit) -> list[Finding]:
    """Say which service a policy names that is not there."""
    if policy.spec.provider is None:
        return []
    try:
        find_service(world.mesh.config, policy.spec.provider.name)
    except UnknownProviderError as error:
        what = "pass without a limit" if policy.spec.fail_open or policy.spec.shadow else "are answered 503"
        return [Finding(("spec", "provider", "name"), f"{error}; requests that it limits {what}")]
    return []


def notes(world: World, policy: LLMTokenRateLimit) -> list[Finding]:
    """Tell of what the service of a policy cannot do."""
    if policy.spec.provider is None:
        return []
    service = _service(world, policy.spec.provider.name)
    if service.refunds or service is _NOWHERE:
        return []
    text = (
        "its service gives nothing back: what a request reserved and did not use stays counted, and what was "
        "refused too (with `llmplane ratelimit`, set refunds: true)"
    )
    return [Finding(("spec", "provider", "name"), text)]


def _groups(policies: Iterable[LLMTokenRateLimit]) -> list[tuple[_Group, list[LLMTokenRateLimit]]]:
    found: dict[_Group, list[LLMTokenRateLimit]] = {}
    for policy in policies:
        spec = policy.spec
        if spec.mode is Mode.GLOBAL and spec.provider is not None:
            group = _Group(spec.shadow, spec.fail_open, spec.provider.name)
            found.setdefault(group, []).append(policy)
    return sorted(found.items())


def _service(world: World, name: str) -> EnvoyRateLimit:
    try:
        return find_service(world.mesh.config, name)
    except UnknownProviderError:
        return _NOWHERE


def _destination(service: EnvoyRateLimit) -> ServiceDestination:
    mode = service.tls.mode
    return ServiceDestination.of(
        service.service, service.port, http2=True, tls=mode != "DISABLE", mutual=mode == "MUTUAL"
    )


def _filter(world: World, proxy: Proxy, group: _Group, policies: Iterable[LLMTokenRateLimit]) -> Any:
    service = _service(world, group.provider)
    to = _destination(service)
    # Envoys that do not know is_negative_hits would charge what they should give back.
    phases = [RESERVE, SETTLE]
    if service.refunds and proxy.supports(Feature.NEGATIVE_HITS):
        phases.append(RELEASE)
    made = protos.RateLimitFilter(
        domain=DOMAIN,
        timeout=service.timeout,
        failure_mode_deny=not (group.fail_open or group.shadow),
        status_on_error={"code": 503},
        # From these the script makes headers with OpenAI's names.
        enable_x_ratelimit_headers="OFF" if group.shadow else "DRAFT_VERSION_03",
        enable_retry_after_header=True,
        rate_limit_service={
            "transport_api_version": "V3",
            "grpc_service": {
                "envoy_grpc": {"cluster_name": to.cluster_name, "authority": to.host},
                "timeout": service.timeout,
            },
        },
        rate_limits=[
            _descriptor(policy, limit, phase)
            for policy in policies
            for limit in _limits(policy)
            for phase in phases
        ],
    )
    if group.shadow:
        made.filter_enforced.CopyFrom(
            protos.RuntimeFractionalPercent(default_value={"numerator": 0, "denominator": "HUNDRED"})
        )
    return made


def _limits(policy: LLMTokenRateLimit) -> list[tuple[str, str]]:
    """Return the types and units of all limits that a request can have by a policy."""
    limits = (limit for rule in policy.spec.rules for limit in rule.limits)
    return sorted({(limit.type.lower(), limit.unit.lower()) for limit in limits})


def _descriptor(policy: LLMTokenRateLimit, limit: tuple[str, str], phase: str) -> dict[str, Any]:
    """Make what is sent if the metadata of a phase have this limit.

    The unit is among the entries because other services keep one counter for each list of entries and
    moment: at midnight that of a minute would be that of the day.
    """
    name = f"{policy.namespace}/{policy.name}"
    tokens, unit = limit
    entry = f"{name}/{tokens}/{unit}"
    hits: dict[str, Any] = {"format": f"%DYNAMIC_METADATA({phase}:{entry}:hits)%"}
    if phase == RELEASE:
        hits["is_negative_hits"] = True
    return {
        "actions": [
            _constant("policy", name),
            *(_metadata(part, phase, entry) for part in ("rule", "key")),
            _constant("tokens", tokens),
            _constant("unit", unit),
            # `llmplane ratelimit` counts it also where there is no room.
            *([_constant("shadow", "true")] if policy.spec.shadow else []),
        ],
        "limit": {"dynamic_metadata": {"metadata_key": _path(phase, entry, "limit")}},
        "hits_addend": hits,
        "apply_on_stream_done": phase != RESERVE,
    }


def _constant(key: str, value: str) -> dict[str, Any]:
    return {"generic_key": {"descriptor_key": key, "descriptor_value": value}}


def _metadata(part: str, phase: str, entry: str) -> dict[str, Any]:
    path = _path(phase, entry, part)
    return {"metadata": {"descriptor_key": part, "metadata_key": path, "source": "DYNAMIC"}}


def _path(phase: str, entry: str, part: str) -> dict[str, Any]:
    return {"key": phase, "path": [{"key": entry}, {"key": part}]}
