"""What the control plane computes for a provider: reading, translating, encoding; in this process.

The references are the encoding alone of the same Cluster messages, by protobuf's upb (which llmplane uses)
and by envoy-data-plane (where the schema comes from).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from envoy_data_plane.envoy.config.cluster.v3 import Cluster

from benchmarks.processes import message, provider, providers
from benchmarks.report import Table, median_and_min
from crds.loader import load
from crds.meta import BaseObject
from translator import lua
from translator.conditions import conditions
from translator.proxy import Proxy, ProxyType
from translator.translate import Translator
from translator.world import World
from xds.resources import CDS, Resource
from xds.snapshot import Snapshot

_DOMAIN = "example.com"
_SCRIPTS = frozenset({(lua.SCRIPT_SHA256, "/run/llmplane/llm_provider.lua")})
_PROXY = Proxy(ProxyType.SIDECAR, "default", "sleep", scripts=_SCRIPTS)
_SLOW = 20
"""How many clusters envoy-data-plane encodes."""


def measure(*, quick: bool) -> list[Table]:
    """Measure with 1000 providers; the ways take turns."""
    count, rounds = (100, 2) if quick else (1000, 7)
    texts = list(providers(count, _DOMAIN).values())
    document = "---\n".join(texts)
    objects = _objects(document)
    changed = [_objects(provider("provider-0000", _DOMAIN, "other"))[0], *objects[1:]]
    warm = Translator()
    resources = warm.translate(World.of(objects), _PROXY).resources
    before, after = Snapshot(resources), Snapshot(warm.translate(World.of(changed), _PROXY).resources)
    clusters = [message(resource) for resource in resources if resource.type_url == CDS]
    slow = [Cluster.parse(each.SerializeToString()) for each in clusters[:_SLOW]]
    worlds = [World.of(objects), World.of(changed)]

    def one_change() -> None:
        worlds.reverse()
        warm.translate(worlds[0], _PROXY)

    ways: dict[str, tuple[Callable[[], object], int]] = {
        "reference: encode a Cluster, upb": (
            lambda: [c.SerializeToString(deterministic=True) for c in clusters],
            count,
        ),
        "reference: encode a Cluster, envoy-data-plane": (lambda: [bytes(c) for c in slow], len(slow)),
        "read: parse and validate YAML": (lambda: load(document, "a.yaml", {}), count),
        "conditions": (lambda: conditions(World.of(objects)), count),
        "translate and encode, cold": (lambda: Translator().translate(World.of(objects), _PROXY), count),
        "translate and encode, one provider changed": (one_change, count),
        "make a resource of a Cluster: encode, hash, frame": (
            lambda: [Resource.of(c) for c in clusters],
            count,
        ),
        "snapshot": (lambda: Snapshot(resources), count),
        "difference of two snapshots": (lambda: after.diff(before), count),
    }
    times = _take_turns([(way, number) for way, number in ways.values()], rounds)
    rows: list[list[Any]] = []
    for name, of in zip(ways, times, strict=True):
        ratio, least = median_and_min([a / b for a, b in zip(of, times[0], strict=True)])
        slower, _ = median_and_min([a / b for a, b in zip(of, times[1], strict=True)])
        rows.append([name, median_and_min(of)[0], ratio, least, slower])
    return [
        Table(
            f"translate: µs a provider, {count} providers",
            ["step", "µs a provider", "x upb (median)", "(min)", "x envoy-data-plane"],
            rows,
            f"With one provider changed, the time of the whole step is divided by all {count}.",
        )
    ]


def _objects(document: str) -> list[BaseObject]:
    return [item.object for item in load(document, "benchmark.yaml", {}).objects]


def _take_turns(ways: Sequence[tuple[Callable[[], object], int]], rounds: int) -> list[list[float]]:
    """Return the µs a piece of each way and round."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for (way, number), of in zip(ways, times, strict=True):
            begin = time.perf_counter()
            way()
            of.append((time.perf_counter() - begin) / number * 1e6)
    return times
