"""The wiring: source -> world -> translator -> snapshot -> management server, and status back."""

import asyncio
import gc
import os
import socket
import time
from collections.abc import AsyncIterator, Hashable, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from crds.llmprovider import LLMProvider
from crds.llmroute import LLMRoute
from crds.loader import LoadedObject
from crds.meta import BaseObject
from crds.problems import ObjectKey, Severity
from llmplane.address import Address
from llmplane.admin import AdminServer
from llmplane.checking import ResourceChecker
from llmplane.problems import problems
from llmplane.sources.state import SourceState, world_of
from translator.conditions import Condition, conditions
from translator.proxy import Proxy
from translator.translate import ResourceName, Translation, Translator
from translator.world import MeshSettings
from xds.resources import Resource
from xds.server import ManagementServer, Node, NodeRejected
from xds.snapshot import Snapshot
from xds.status import ProxyStatus, State, TypeStatus

_LOG = structlog.get_logger(__name__)


class Source(Protocol):
    """Where objects come from."""

    def states(self, stop: asyncio.Event) -> AsyncIterator[SourceState]:
        """Yield the whole state, and again after each change, until ``stop`` is set."""


class AddressInUseError(RuntimeError):
    """An address cannot be listened on; the text names the option and says why."""


class ControlPlane:
    """Keeps the snapshots of all connected proxies true to the source (an xds.server.SnapshotSource)."""

    def __init__(self, source: Source, mesh: MeshSettings, *, validate_resources: bool = True) -> None:
        self.server = ManagementServer(self, identifier="llmplane")
        self._source = source
        self._mesh = mesh
        self._state = SourceState()
        self._revision = 0
        """How often the source was read."""
        self._world = world_of(self._state, mesh)
        self._conditions: Mapping[ObjectKey, tuple[Condition, ...]] = {}
        self._problems: dict[str, Severity] = {}
        """What is wrong now, in the order of the files."""
        self._translator = Translator()
        self._translations: dict[Hashable, Translation] = {}
        self._checker = ResourceChecker(enabled=validate_resources)
        self._served: dict[Hashable, dict[ResourceName, Resource]] = {}
        self._violations: dict[Hashable, dict[ResourceName, str]] = {}

    async def run(self, xds_address: Address, admin_address: Address, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set. Nothing is served before the source was read once.

        Raises AddressInUseError.
        """
        async with AsyncExitStack() as stack:
            admin = AdminServer(self.status, lambda: self._revision > 0)
            stack.push_async_callback(admin.stop)
            try:
                admin_address = await admin.start(admin_address)
            except OSError as error:
                raise AddressInUseError(_cannot_listen("--admin-address", admin_address, error)) from None
            try:
                _bind(xds_address)  # gRPC's own error says nothing
                port = await self.server.start(str(xds_address))
            except (OSError, RuntimeError) as error:
                raise AddressInUseError(_cannot_listen("--xds-address", xds_address, error)) from None
            stack.push_async_callback(self.server.stop)
            async for state in self._source.states(stop):
                self._take(state)
                if self._revision == 1:
                    # The objects stay: going through thousands of them at each collection would delay changes.
                    gc.collect()
                    gc.freeze()
                    self.server.ready()
                    xds_address = xds_address._replace(port=port)
                    _LOG.info("serving", xds=str(xds_address), admin=str(admin_address))
        _LOG.info("stopped")

    def _take(self, state: SourceState) -> None:
        """Make a new world of a new state, and publish what it means for each connected proxy."""
        begin = time.perf_counter()
        self._revision += 1
        if state == self._state and self._revision > 1:
            return
        before, self._state = self._state, state
        self._world = world_of(state, self._mesh)
        proxies = self.server.groups()
        for gone in self._translations.keys() - set(proxies):
            for of in (self._translations, self._served, self._violations):
                of.pop(gone, None)
            self.server.forget(gone)
        self.server.publish({proxy: self.snapshot(proxy) for proxy in proxies})
        milliseconds = round((time.perf_counter() - begin) * 1000, 1)
        _LOG.info("published", objects=len(state.objects), groups=len(proxies), milliseconds=milliseconds)
        self._conditions = conditions(self._world)
        self._log_problems(before)

    def _log_problems(self, before: SourceState) -> None:
        """Log what is new among the problems, and what is gone."""
        found = {str(problem): problem.severity for problem in problems(self._state, self._conditions)}
        for text, severity in found.items():
            if text not in self._problems:
                (_LOG.error if severity is Severity.ERROR else _LOG.warning)("problem", problem=text)
        for key in sorted(self._state.kept - before.kept):
            _LOG.warning("last good version stays in use", object=str(key))
        for text in self._problems:
            if text not in found:
                _LOG.info("problem solved", problem=text)
        self._problems = found

    def group(self, node: Node) -> Hashable:
        """Return which proxies share a snapshot: those that configuration cannot tell apart."""
        try:
            return Proxy.from_node(node.id, node.metadata)
        except ValueError as error:
            raise NodeRejected(str(error)) from None

    def snapshot(self, group: Hashable) -> Snapshot:
        """Translate the world for a proxy."""
        if not isinstance(group, Proxy):
            raise TypeError(f"{group!r} is no Proxy")
        translation = self._translator.translate(self._world, group)
        self._translations[group] = translation
        served, violations = self._checker.check(translation.resources, self._served.get(group, {}))
        for name, text in violations.items() - self._violations.get(group, {}).items():
            _LOG.error("resource is not valid and is held back", type=name[0], name=name[1], problem=text)
        self._served[group], self._violations[group] = served, violations
        return Snapshot(served.values())

    def status(self) -> dict[str, Any]:
        """Return objects, proxies and problems as JSON-ready data; holds no secret."""
        proxies = self.server.proxies()
        refusals: dict[ObjectKey, list[str]] = {}
        for refusal in self.server.refusals():
            text = f"{refusal.node_id} refused {refusal.name}: {refusal.detail}"
            for key in self._origins(refusal.group, (refusal.type_url, refusal.name)):
                refusals.setdefault(key, []).append(text)
        for group, violations in self._violations.items():
            for name, violation in violations.items():
                for key in self._origins(group, name):
                    refusals.setdefault(key, []).append(f"{name[1]} is held back: {violation}")
        return {
            "revision": self._revision,
            "objects": [
                self._object(item, proxies, refusals.get(item.key, []))
                for item in self._state.objects
                if item.key in self._conditions
            ],
            "proxies": [_proxy(proxy) for proxy in proxies],
            "problems": [
                *self._problems,
                *(f"{key}: its last good version is in use" for key in sorted(self._state.kept)),
                *(f"{key}: {text}" for key, texts in refusals.items() for text in texts),
            ],
        }

    def _origins(self, group: Hashable, resource: ResourceName) -> list[ObjectKey]:
        translation = self._translations.get(group)
        origins = translation.origins if translation else {}
        return [key for key, resources in origins.items() if resource in resources]

    def _object(self, item: LoadedObject, proxies: list[ProxyStatus], refusals: list[str]) -> dict[str, Any]:
        """Say of an object whether it counts, what it lacks, and how many proxies acknowledged it."""
        found = [
            {"type": each.type, "status": each.status, "reason": each.reason, "message": each.message}
            for each in self._conditions.get(item.key, ())
        ]
        if refusals:
            message = "; ".join(refusals)
            found.append({"type": "Programmed", "status": False, "reason": "Refused", "message": message})
        states = ["last good version"] if item.key in self._state.kept else []
        states += [str(each["reason"]) for each in found if not each["status"]]
        reached, acknowledged = 0, 0
        for proxy in proxies:
            translation = self._translations.get(proxy.group)
            resources = translation.origins.get(item.key) if translation else None
            if resources:
                reached += 1
                acknowledged += all(_has_accepted(proxy.types.get(url), name) for url, name in resources)
        return {
            "kind": item.kind,
            "namespace": item.namespace,
            "name": item.name,
            "host": _host(item.object),
            "source": f"{item.file}:{item.line}",
            "state": ", ".join(states) or "OK",
            "programmed": f"{acknowledged}/{reached}",
            "conditions": found,
        }


def _host(item: BaseObject) -> str:
    return item.spec.host if isinstance(item, LLMProvider | LLMRoute) else ""


def _bind(address: Address) -> None:
    """Raise OSError if an address cannot be listened on."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(tuple(address))


def _cannot_listen(option: str, address: Address, error: Exception) -> str:
    why = str(error)
    if isinstance(error, OSError) and error.errno:  # asyncio puts words around the system's own
        why = str(error.strerror) if isinstance(error, socket.gaierror) else os.strerror(error.errno)
    return f"{option} {address}: {why}"


def _has_accepted(status: TypeStatus | None, name: str) -> bool:
    """Whether a proxy has accepted the current version of one resource."""
    if status is None:
        return False
    return status.state is State.SYNCED or (status.state is State.NACK and name not in status.refused)


def _proxy(proxy: ProxyStatus) -> dict[str, Any]:
    return {
        "node_id": proxy.node_id,
        "version": proxy.envoy_version,
        "state": proxy.state,
        "connected_since": datetime.fromtimestamp(proxy.connected_since, UTC).isoformat(timespec="seconds"),
        "types": {
            type_url.rpartition(".")[2]: {
                "state": status.state,
                "version": status.version,
                "sent": status.sent,
                "refused": status.refused,
                "error": status.error.detail if status.error else None,
            }
            for type_url, status in proxy.types.items()
        },
    }
