"""The wiring: source -> world -> translator -> snapshot -> management server, and status back."""

import asyncio
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, cast

import structlog

from crds.loader import LoadedObject
from crds.problems import ObjectKey
from crds.problems import Severity
from llmplane.address import Address
from llmplane.admin import AdminServer
from llmplane.sources.files import FileSource
from llmplane.sources.state import SourceState, world_of
from translator.conditions import Condition, conditions
from translator.proxy import Proxy
from translator.translate import Translation, Translator
from translator.world import MeshSettings, World
from xds.server import ManagementServer, Node, NodeRejected
from xds.snapshot import Snapshot
from xds.status import ProxyStatus, State, TypeStatus

_LOG = structlog.get_logger(__name__)


class ControlPlane:
    """Keeps the snapshots of all connected proxies true to the source (an xds.server.SnapshotSource)."""

    def __init__(self, source: FileSource, mesh: MeshSettings) -> None:
        self.server = ManagementServer(self, identifier="llmplane")
        self._source = source
        self._mesh = mesh
        self._state = SourceState()
        self._world = World.of((), mesh)
        self._is_ready = False
        self._revision = 0
        self._translator = Translator()
        self._translations: dict[Proxy, Translation] = {}
        self._conditions: Mapping[ObjectKey, tuple[Condition, ...]] = {}

    async def run(
        self,
        xds_address: Address,
        admin_address: Address,
        stop: asyncio.Event,
        started: Callable[[Address, Address], None] = lambda xds, admin: None,
    ) -> None:
        """Serve until ``stop`` is set. Nothing is served before the source was read once.

        ``started`` gets the addresses, with their real ports, once proxies are served. Raises OSError where
        an address is taken, FileNotFoundError where a source does not exist.
        """
        admin = AdminServer(self.status, lambda: self._is_ready)
        admin_address = await admin.start(admin_address)
        xds_address = xds_address._replace(port=await self.server.start(str(xds_address)))
        try:
            async for state in self._source.states(stop):
                self._take(state)
                if not self._is_ready:
                    self._is_ready = True
                    self.server.ready()
                    _LOG.info("serving", xds=str(xds_address), admin=str(admin_address))
                    started(xds_address, admin_address)
        finally:
            await self.server.stop()
            await admin.stop()

    def _take(self, state: SourceState) -> None:
        """Make a new world of a new state, and publish what it means for each connected proxy."""
        self._revision += 1
        if state == self._state and self._is_ready:
            return
        begin = time.perf_counter()
        for problem in set(state.problems) - set(self._state.problems):
            log = _LOG.error if problem.severity is Severity.ERROR else _LOG.warning
            log("problem", problem=str(problem))
        for key in state.kept - self._state.kept:
            _LOG.error("last good version stays in use", object=str(key))
        self._state = state
        self._world = world_of(state, self._mesh)
        self._conditions = conditions(self._world)
        groups = [group for group in self.server.groups() if isinstance(group, Proxy)]
        self._translations = {}
        snapshots: dict[Hashable, Snapshot] = {proxy: self.snapshot(proxy) for proxy in groups}
        self.server.publish(snapshots)
        milliseconds = round((time.perf_counter() - begin) * 1000, 1)
        _LOG.info("published", objects=len(state.objects), proxies=len(groups), milliseconds=milliseconds)

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
        return Snapshot(translation.resources)

    def status(self) -> dict[str, Any]:
        """Return objects, proxies and problems as JSON-ready data; holds no secret."""
        proxies = self.server.proxies()
        problems = [str(problem) for problem in self._state.problems]
        problems += [f"{key}: its last good version is in use" for key in sorted(self._state.kept)]
        return {
            "revision": self._revision,
            "objects": [self._object(item, proxies) for item in self._state.objects if item.kind in _OWN_KINDS],
            "proxies": [_proxy(proxy) for proxy in proxies],
            "problems": problems,
        }

    def _object(self, item: LoadedObject, proxies: Sequence[ProxyStatus]) -> dict[str, Any]:
        """Say of an object whether it counts, what it lacks, and how many proxies acknowledged it."""
        found = [asdict(condition) for condition in self._conditions.get(item.key, ())]
        reached, acknowledged = 0, 0
        refusals = []
        for proxy in proxies:
            translation = self._translations.get(cast("Proxy", proxy.group))
            names = translation.origins.get(item.key) if translation else None
            if not names:
                continue
            reached += 1
            acknowledged += all(_acknowledged(proxy.types.get(type_url), name) for type_url, name in names)
        for refusal in self.server.refusals():
            translation = self._translations.get(cast("Proxy", refusal.group))
            if translation and (refusal.type_url, refusal.name) in translation.origins.get(item.key, ()):
                refusals.append(f"{refusal.node_id} refused it: {refusal.detail}")
        if refusals:
            message = "; ".join(refusals)
            found.append(asdict(Condition("Programmed", status=False, reason="Refused", message=message)))
        failed = [condition["type"] for condition in found if not condition["status"]]
        return {
            "kind": item.kind,
            "namespace": item.namespace,
            "name": item.name,
            "host": item.object.spec.host,
            "source": f"{item.file}:{item.line}",
            "state": "OK" if not failed else f"not {', not '.join(failed)}",
            "programmed": f"{acknowledged}/{reached}",
            "conditions": found,
        }


_OWN_KINDS = frozenset({"LLMProvider", "LLMRoute"})


def _acknowledged(status: TypeStatus | None, name: str) -> bool:
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
