"""What a connection manager tells of its requests: access logs, metrics, traces."""

from collections.abc import Iterator
from typing import Any

from crds.problems import ObjectKey
from translator import access_logs, metrics, tracing
from translator.proxy import Proxy
from translator.services import ServiceDestination
from translator.telemetry import applicable
from translator.world import World


def of_connection_manager(world: World, proxy: Proxy) -> dict[str, Any]:
    """Return the members of HttpConnectionManager."""
    return {
        "access_log": [*access_logs.access_logs(world, proxy), *metrics.loggers(world, proxy)],
        "tracing": tracing.tracing(world, proxy),
    }


def services(world: World, proxy: Proxy) -> Iterator[ServiceDestination]:
    """Name the collectors that a proxy sends to."""
    yield from access_logs.services(world, proxy)
    yield from tracing.services(world, proxy)


def objects(world: World, proxy: Proxy) -> list[ObjectKey]:
    """Name the objects that went into the listeners of a proxy."""
    return [item.key for item in applicable(world, proxy)]
