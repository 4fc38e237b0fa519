"""The wiring: source -> world -> translator -> snapshot -> management server, and status back."""

import asyncio
import gc
import time
from collections import Counter
from collections.abc import AsyncIterator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

import grpc
import structlog

from crds.gateway import Gateway
from crds.llmprovider import LLMProvider
from crds.llmroute import LLMRoute
from crds.loader import LoadedObject
from crds.meta import BaseObject
from crds.problems import ObjectKey, Problem, Severity
from llmplane.address import Address, AddressInUseError, check_free
from llmplane.admin import Access, AdminServer
from llmplane.auth import Identity
from llmplane.background import running
from llmplane.checking import ResourceChecker
from llmplane.metrics import Figures, Metrics
from llmplane.problems import problems
from llmplane.refusals import COUNTS
from llmplane.sources.state import SourceState, world_of
from llmplane.status import short_name
from translator import policies
from translator.conditions import Condition, conditions
from translator.features import OLDEST, version_text
from translator.memory import Memory
from translator.parts import ResourceName
from translator.proxy import Proxy
from translator.translate import NOTHING, Translation, Translator
from translator.world import MeshSettings
from xds.group import Archive
from xds.resources import Resource
from xds.server import Authenticator, ManagementServer, Node, NodeRejected
from xds.snapshot import Snapshot
from xds.status import ProxyStatus, State, TypeStatus

_LOG = structlog.get_logger(__name__)

_UNKNOWN = (
    "some objects cannot be read, and no good version of them is known here: proxies that were configured "
    "before the restart keep their routes, and nothing is removed, until they can be read"
)


_RENEWAL = COUNTS / 4
"""Seconds between two looks at what the archive should not forget, or has forgotten."""


class _Objection(NamedTuple):
    """Why an object does not do all of its work at some proxies."""

    reason: str
    text: str


_Objections = dict[ObjectKey | None, list[_Objection]]
"""By object; None: it is about no object in particular."""

_UNCERTIFIED = "a proxy has no workload certificate for mutual TLS (llmplane proxy --workload-cert)"

_SEVERITIES = {
    "Refused": Severity.ERROR,
    "EnvoyTooOld": Severity.WARNING,
    "NoWorkloadCertificate": Severity.ERROR,
}
"""By the reason of an objection."""


class Source(Protocol):
    """Where objects come from."""

    def states(self, stop: asyncio.Event) -> AsyncIterator[SourceState]:
        """Yield the whole state, and again after each change, until ``stop`` is set."""


class MeshSource(Protocol):
    """Where the mesh configuration comes from, if it can change."""

    @property
    def settings(self) -> MeshSettings:
        """What holds now."""

    @property
    def problems(self) -> Sequence[Problem]:
        """What is wrong with the newest version of it."""

    def states(self, stop: asyncio.Event) -> AsyncIterator[MeshSettings]:
        """Yield the settings after each change of them, or of what is wrong, until ``stop`` is set."""


class ControlPlane:
    """Keeps the snapshots of all connected proxies true to the source (an xds.server.SnapshotSource)."""

    def __init__(
        self,
        source: Source,
        mesh: MeshSettings,
        *,
        validate_resources: bool = True,
        authenticator: Authenticator | None = None,
        acknowledged: Archive | None = None,
        mesh_file: MeshSource | None = None,
    ) -> None:
        self._metrics = Metrics(self._figures)
        self.server = ManagementServer(
            self,
            identifier="llmplane",
            authenticator=authenticator,
            archive=acknowledged,
            observer=self._metrics,
        )
        self._archive = acknowledged
        self._authenticated = authenticator is not None
        self._source = source
        self._mesh = mesh
        self._mesh_file = mesh_file
        """Where `mesh` comes from, if it can change."""
        self._state = SourceState()
        self._revision = 0
        """How often the source was read."""
        self._last_change = 0.0
        """When what was read was different, seconds since the epoch."""
        self._world = world_of(self._state, mesh)
        self._conditions: Mapping[ObjectKey, tuple[Condition, ...]] = {}
        self._judged = self._state
        """Of what the conditions are."""
        self._problems: dict[str, Severity] = {}
        """What is wrong now, in the order of the files."""
        self._remembered = Memory()
        """Conditions."""
        self._translator = Translator()
        self._translations: dict[Hashable, Translation] = {}
        self._checker = ResourceChecker(acknowledged, enabled=validate_resources)
        self._snapshots: dict[Hashable, Snapshot] = {}
        self._violations: dict[Hashable, dict[ResourceName, str]] = {}

    async def run(
        self,
        xds_address: Address,
        admin_address: Address,
        stop: asyncio.Event,
        credentials: grpc.ServerCredentials | None = None,
        access: Access | None = None,
    ) -> None:
        """Serve until ``stop`` is set; xDS with TLS if there are credentials, /debug to those with access.

        Nothing is served before the source was read once.

        Raises AddressInUseError.
        """
        async with AsyncExitStack() as stack:
            admin = AdminServer(self, access)
            stack.push_async_callback(admin.stop)
            try:
                admin_address = await admin.start(admin_address)
            except OSError as error:
                raise AddressInUseError.of("--admin-address", admin_address, error) from None
            try:
                check_free(xds_address)
                port = await self.server.start(str(xds_address), credentials)
            except (OSError, RuntimeError) as error:
                raise AddressInUseError.of("--xds-address", xds_address, error) from None
            stack.push_async_callback(self.server.stop)
            watch = [self._watch_mesh(self._mesh_file, stop)] if self._mesh_file is not None else []
            renewal = [self._renew(self._archive)] if self._archive is not None else []
            await stack.enter_async_context(running(*watch, *renewal))
            serving = False
            async for state in self._source.states(stop):
                try:
                    await self._take(state)
                except Exception:  # noqa: BLE001 - a mistake of ours, whatever it is
                    # What already works goes on, and the next state is tried again.
                    _LOG.exception("a state could not be taken over; proxies keep what they have")
                    continue
                if not serving:
                    serving = True
                    # The objects stay: going through thousands of them each time would delay changes.
                    gc.collect()
                    gc.freeze()
                    self.server.ready()
                    xds_address = xds_address._replace(port=port)
                    _LOG.info("serving", xds=str(xds_address), admin=str(admin_address))
        _LOG.info("stopped")

    async def _renew(self, archive: Archive) -> None:
        """Keep what proxies that are here refused in the archive, for newcomers elsewhere.

        What was refused elsewhere, or before, is tried again when the archive says that it counts no more.
        """
        while True:
            await asyncio.sleep(_RENEWAL)
            try:
                self._renew_once(archive)
            except Exception:  # noqa: BLE001 - a mistake of ours, whatever it is
                _LOG.exception("refusals could not be renewed; proxies keep what they have")

    def _renew_once(self, archive: Archive) -> None:
        here = set(self.server.groups())
        refusals = [refusal for refusal in self.server.refusals() if refusal.group in here]
        for refusal in refusals:
            if not refusal.archived:
                archive.add(replace(refusal, since=time.time()))
        again = {refusal.group for refusal in refusals if refusal.archived} & self._snapshots.keys()
        self.server.publish({group: self._snapshots[group] for group in again})

    async def _watch_mesh(self, file: MeshSource, stop: asyncio.Event) -> None:
        """Take over changes of the mesh configuration."""
        async for _ in file.states(stop):
            try:
                if self._last_change:  # else the first state of the source brings it into use
                    await self._publish(self._state)
            except Exception:  # noqa: BLE001 - a mistake of ours, whatever it is
                _LOG.exception("a mesh configuration could not be taken over; proxies keep what they have")

    async def _take(self, state: SourceState) -> None:
        """Take over a new state of the source."""
        try:
            if state != self._state or self._revision == 0:
                await self._publish(state)
        finally:
            self._revision += 1

    async def _publish(self, state: SourceState) -> None:
        """Make a new world of a state and the mesh's settings, and publish what it means for each proxy."""
        began = time.monotonic()
        self._last_change = time.time()
        before, self._state = self._state, state
        if self._mesh_file is not None:
            self._mesh = self._mesh_file.settings
        self._world = world_of(state, self._mesh)
        proxies = self.server.groups()
        for gone in self._translations.keys() - set(proxies):
            for of in (self._translations, self._snapshots, self._violations):
                of.pop(gone, None)
            self.server.forget(gone)
        self.server.publish({proxy: self.snapshot(proxy) for proxy in proxies}, began=began)
        milliseconds = round((time.monotonic() - began) * 1000, 1)
        _LOG.info("published", objects=len(state.objects), groups=len(proxies), milliseconds=milliseconds)
        await asyncio.sleep(0)  # it is sent first: what follows is for those who look
        self._remembered.begin()
        self._conditions = conditions(self._world, self._remembered)
        self._judged = self._state
        self._log_problems(before)

    def _log_problems(self, before: SourceState) -> None:
        """Log what is new among the problems, and what is gone."""
        of_mesh = self._mesh_file.problems if self._mesh_file is not None else ()
        found = {
            str(problem): problem.severity for problem in (*of_mesh, *problems(self._state, self._conditions))
        }
        for text, severity in found.items():
            if text not in self._problems:
                (_LOG.error if severity is Severity.ERROR else _LOG.warning)("problem", problem=text)
        for key in sorted(self._state.kept - before.kept):
            _LOG.warning("last good version stays in use", object=str(key))
        for text in self._problems:
            if text not in found:
                _LOG.info("problem solved", problem=text)
        self._problems = found

    def group(self, node: Node, identity: object) -> Hashable:
        """Return which proxies share a snapshot: those that configuration cannot tell apart."""
        try:
            proxy = Proxy.from_node(node.id, node.metadata, node.version)
        except ValueError as error:
            raise NodeRejected(str(error)) from None
        if not self._authenticated:
            return proxy
        if not isinstance(identity, Identity):
            raise TypeError("the authenticator made no Identity")
        return identity.admit(proxy)

    def snapshot(self, group: Hashable) -> Snapshot:
        """Translate the world for a proxy."""
        if not isinstance(group, Proxy):
            raise TypeError(f"{group!r} is no Proxy")
        translation = self._translator.translate(self._world, group)
        changed = translation.changed(self._translations.get(group, NOTHING))
        snapshot, violations = self._snapshots.get(group, Snapshot()), self._violations.get(group, {})
        before = {name: resource for name in changed if (resource := snapshot[name[0]].get(name[1]))}
        new = [resource for resource in changed.values() if resource is not None]
        served, wrong = self._checker.check(new, before)
        for name, text in wrong.items():
            if violations.get(name) != text:
                _LOG.error("resource is not valid and is held back", type=name[0], name=name[1], problem=text)
        snapshot = snapshot.replace(
            served.values(),
            [name for name, resource in changed.items() if resource is None],
            incomplete=self._state.unknown,
            routes_first=policies.only_takes_routes_away(before, served),
        )
        still_wrong = {name: text for name, text in violations.items() if name not in changed}
        self._translations[group] = translation
        self._snapshots[group], self._violations[group] = snapshot, still_wrong | wrong
        return snapshot

    # What the admin endpoints show (llmplane.admin.Insight); no secret is in it

    def is_ready(self) -> bool:
        """Whether the source was read."""
        return self._revision > 0

    def status(self) -> dict[str, Any]:
        """Return objects, proxies and problems."""
        proxies = self.server.proxies()
        refusals = self._refusals()
        return {
            "time": _iso(time.time()),
            "revision": self._revision,
            "objects": self._objects(proxies, refusals),
            "proxies": [self._view(proxy) for proxy in proxies],
            "problems": list(
                dict.fromkeys(
                    (
                        *self._problems,
                        *([_UNKNOWN] if self._state.unknown else ()),
                        *(f"{key}: its last good version is in use" for key in sorted(self._state.kept)),
                        *(
                            f"{key}: {each.text}" if key else each.text
                            for key, objections in refusals.items()
                            for each in objections
                        ),
                    )
                )
            ),
        }

    def syncz(self) -> dict[str, Any]:
        """Return what each proxy was sent, acknowledged and refused."""
        return {"time": _iso(time.time()), "proxies": [self._view(proxy) for proxy in self.server.proxies()]}

    def objects(self) -> list[dict[str, Any]]:
        """Return the objects with their conditions."""
        return self._objects(self.server.proxies(), self._refusals())

    def resources_of(self, node_id: str) -> list[Resource] | None:
        """Return the resources that a proxy should have; None if it is not connected."""
        for proxy in self.server.proxies():
            if node_id in {proxy.node_id, short_name(proxy.node_id)}:
                return self.server.resources(proxy.group)
        return None

    def metrics(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return self._metrics.exposition()

    def _figures(self) -> Figures:
        proxies = self.server.proxies()
        refusals = self._refusals()
        severities: Counter[str] = Counter(dict.fromkeys(Severity, 0))
        severities.update(self._problems.values())
        for objections in refusals.values():
            severities.update(_SEVERITIES[each.reason] for each in objections)
        objects: Counter[tuple[str, str]] = Counter()
        for item in self._counted():
            states = _states(self._found(item, refusals))
            state = "LastGoodVersion" if item.key in self._state.kept else (*states, "OK")[0]
            objects[item.kind, state] += 1
        return Figures(
            versions=Counter(proxy.envoy_version for proxy in proxies),
            proxies={state: sum(proxy.state is state for proxy in proxies) for state in State},
            objects=objects,
            problems=severities,
            last_good=len(self._state.kept),
            last_change=self._last_change,
        )

    def _refusals(self) -> _Objections:
        """Return what proxies refuse or cannot do, or what is held back from them, by object."""
        refusals: _Objections = {}
        for refusal in self.server.refusals():
            text = f"{refusal.node_id} refused {refusal.name}: {refusal.detail}"
            for key in self._origins(refusal.group, (refusal.type_url, refusal.name)):
                refusals.setdefault(key, []).append(_Objection("Refused", text))
        for group, violations in self._violations.items():
            for name, violation in violations.items():
                for key in self._origins(group, name):
                    text = f"{name[1]} is held back: {violation}"
                    refusals.setdefault(key, []).append(_Objection("Refused", text))
        for group in self.server.groups():
            for item, texts in self._missing(group).items():
                if item is None:
                    continue
                known = refusals.setdefault(item, [])
                known += (each for text in texts if (each := _Objection("EnvoyTooOld", text)) not in known)
            translation = self._translations.get(group)
            for key in translation.uncertified if translation else ():
                refusals.setdefault(key, []).append(_Objection("NoWorkloadCertificate", _UNCERTIFIED))
        return refusals

    def _view(self, proxy: ProxyStatus) -> dict[str, Any]:
        """Return the state of a proxy, and what its Envoy is too old for."""
        version = proxy.group.version if isinstance(proxy.group, Proxy) else None
        missing = [
            text if key is None else f"{text} ({key})"
            for key, texts in self._missing(proxy.group).items()
            for text in texts
        ]
        if version is not None and version < OLDEST:
            missing.insert(0, f"anything: {version_text(OLDEST)} is the oldest Envoy that is tested")
        return _proxy(proxy, missing)

    def _missing(self, group: Hashable) -> dict[ObjectKey | None, list[str]]:
        """Return what the Envoys of a group are too old for, by object (None: none in particular)."""
        translation = self._translations.get(group)
        if translation is None or not isinstance(group, Proxy) or group.version is None:
            return {}
        return {
            key: [feature.lack_of(group.version) for feature in features]
            for key, features in translation.missing.items()
        }

    def _origins(self, group: Hashable, resource: ResourceName) -> Sequence[ObjectKey | None]:
        """Return the objects that a resource comes from; None: there are proxies with it, and no object."""
        if (translation := self._translations.get(group)) is None:
            return []
        return [key for key, resources in translation.origins.items() if resource in resources] or [None]

    def _counted(self) -> Iterator[LoadedObject]:
        """Yield the objects that have conditions."""
        return (item for item in self._judged.objects if item.key in self._conditions)

    def _found(self, item: LoadedObject, refusals: _Objections) -> list[dict[str, Any]]:
        """Return the conditions of an object."""
        found = [
            {"type": each.type, "status": each.status, "reason": each.reason, "message": each.message}
            for each in self._conditions.get(item.key, ())
        ]
        if objections := refusals.get(item.key):
            reason, message = objections[0].reason, "; ".join(each.text for each in objections)
            found.append({"type": "Programmed", "status": False, "reason": reason, "message": message})
        return found

    def _objects(self, proxies: Iterable[ProxyStatus], refusals: _Objections) -> list[dict[str, Any]]:
        """Say of each object whether it counts, what it lacks, and how many proxies acknowledged it."""
        # Most proxies are in the same state, and there may be thousands.
        alike = Counter(
            (proxy.group, frozenset((url, of.state, of.refused) for url, of in proxy.types.items()))
            for proxy in proxies
        )
        # What is in quarantine or held back is at no proxy of a group, but for what stands in for it.
        absent = {(each.group, (each.type_url, each.name)) for each in self.server.refusals()}
        absent |= {(group, name) for group, violations in self._violations.items() for name in violations}
        views = [
            (group, {url: (state, names) for url, state, names in types}, number)
            for (group, types), number in alike.items()
            if group in self._translations
        ]
        objects = []
        for item in self._counted():
            found = self._found(item, refusals)
            kept = ["last good version"] if item.key in self._state.kept else []
            reached = acknowledged = 0
            for group, types, number in views:
                if resources := self._translations[group].origins.get(item.key):
                    reached += number
                    if all(
                        (group, each) not in absent and _has_accepted(types.get(each[0]), each[1])
                        for each in resources
                    ):
                        acknowledged += number
            objects.append(
                {
                    "kind": item.kind,
                    "namespace": item.namespace,
                    "name": item.name,
                    "uid": item.object.metadata.uid,
                    "generation": item.object.metadata.generation,
                    "host": _host(item.object),
                    "source": f"{item.file}:{item.line}" if item.file else "",
                    "state": ", ".join([*kept, *_states(found)]) or "OK",
                    "programmed": f"{acknowledged}/{reached}",
                    "conditions": found,
                }
            )
        return objects


def _host(item: BaseObject) -> str:
    if isinstance(item, Gateway):
        return ", ".join(dict.fromkeys(host for server in item.spec.servers for host in server.hosts))
    return item.spec.host if isinstance(item, LLMProvider | LLMRoute) else ""


def _states(conditions: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the reasons of the conditions that are not met."""
    return [each["reason"] for each in conditions if not each["status"]]


def _has_accepted(status: tuple[State, tuple[str, ...]] | None, name: str) -> bool:
    """Whether a proxy has accepted the current version of one resource; by its state and what it refuses."""
    if status is None:
        return False
    state, refused = status
    return state is State.SYNCED or (state is State.NACK and name not in refused)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _proxy(proxy: ProxyStatus, missing: list[str]) -> dict[str, Any]:
    return {
        "node_id": proxy.node_id,
        "version": proxy.envoy_version,
        "peer": proxy.peer,
        "variant": "delta" if proxy.delta else "sotw",
        "state": proxy.state,
        "missing": missing,
        "connected_since": _iso(proxy.connected_since),
        "types": {url.rpartition(".")[2]: _type(status) for url, status in proxy.types.items()},
    }


def _type(status: TypeStatus) -> dict[str, Any]:
    error = status.error
    return {
        "state": status.state,
        "since": _iso(status.since),
        "version": status.version,
        "sent": status.sent,
        "acknowledged": status.acknowledged,
        "nonce_sent": status.nonce_sent,
        "nonce_acknowledged": status.nonce_acknowledged,
        "unanswered": status.unanswered,
        "subscribed": status.subscribed,
        "refused": status.refused,
        "error": error and {"detail": error.detail, "names": error.names, "since": _iso(error.time)},
    }
