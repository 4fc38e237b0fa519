"""Objects from the API server of Kubernetes: all kinds that are honoured, and what they refer to.

Secrets are watched only in namespaces where objects refer to some, and only those are kept. No placeholder is
filled in: the environment of the control plane is not that of the objects' authors. What cannot be read stays
as it was; nothing is handed on before everything could be read once.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from crds import kinds
from crds.apikeyauthentication import APIKeyAuthentication
from crds.gateway import Gateway
from crds.llmprovider import LLMProvider
from crds.loader import Loaded, LoadedObject, Location, load_object
from crds.meshconfig import load_mesh_config
from crds.meta import DEFAULT_NAMESPACE, GROUP, VERSIONS, BaseObject
from crds.problems import ObjectKey, Problem, Severity
from crds.unreadable import SECURITY_KINDS, UnreadablePolicy, selected_labels
from llmplane.background import end
from llmplane.kubeacknowledged import AcknowledgedConfigMap
from llmplane.kubeapi import Api
from llmplane.sources.keeping import Keeper
from llmplane.sources.lastgood import LastGood
from llmplane.sources.reflector import Reflector
from llmplane.sources.state import SourceState, world_of
from translator.gateways import typical_proxies
from translator.secrets import CA_SUFFIX
from translator.world import MeshSettings

_LOG = structlog.get_logger(__name__)

_QUIET = 0.02
"""Seconds to wait for the next change: what is applied together should be published together."""
_MESH_CONFIG_MAP = ("istio", "mesh")
"""Istio's ConfigMap in the root namespace, and its key."""
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
"""kubectl's annotation repeats the whole object, with keys that were in it."""
_NOWHERE = Location("", 0)


@dataclass(slots=True)
class Entry:
    """An object of the API server."""

    key: ObjectKey
    api_version: str
    uid: str
    generation: int
    digest: str
    loaded: LoadedObject | None = field(repr=False)
    """None if it is invalid."""
    problems: tuple[Problem, ...]
    unreadable: UnreadablePolicy | None
    secrets: frozenset[ObjectKey]
    """The Secrets that it refers to, but for those of a Gateway."""
    status: Mapping[str, Any] = field(repr=False)
    """What the API server has under `status`."""


class KubernetesSource:
    """All objects of a cluster.

    ``last_good`` remembers good versions over a restart. ``mesh`` is what the command line says of the mesh;
    the rest comes from the cluster.
    """

    def __init__(self, api: Api, mesh: MeshSettings, last_good: LastGood | None = None) -> None:
        self._api = api
        self._keeper = Keeper(last_good, {})
        self._changed = asyncio.Event()
        self._tasks: dict[Reflector[Any], asyncio.Task[None]] = {}
        self._kinds = {kind: self._reflector(kind, paths) for kind, paths in _paths()}
        self._services = self._reflector("Service", ("/api/v1/services",))
        self._secrets: dict[str, Reflector[Entry]] = {}
        """By namespace."""
        self._wanted: frozenset[ObjectKey] = frozenset()
        """Secrets that some object refers to."""
        self.mesh = KubernetesMesh(api, mesh, self._changed.set)
        self.acknowledged = AcknowledgedConfigMap(api, self._changed.set)
        """What stands in for what Envoys refuse; who serves has to know it."""

    async def states(self, stop: asyncio.Event) -> AsyncIterator[SourceState]:
        """Yield the state as soon as all was read, and after each change, until ``stop`` is set."""
        stopped = asyncio.create_task(stop.wait())
        last = None
        try:
            for reflector in self._kinds.values():
                self._start(reflector)
            self._start(self._services)
            self._start(self.mesh.reflector)
            self._start(self.acknowledged.reflector)
            while True:
                changed = asyncio.create_task(self._changed.wait())
                await asyncio.wait(
                    {stopped, changed, *self._tasks.values()}, return_when=asyncio.FIRST_COMPLETED
                )
                changed.cancel()
                if stopped.done():
                    return
                for task in self._tasks.values():
                    if task.done():  # a mistake of ours: better none than one that is silently not up to date
                        task.result()
                await asyncio.sleep(_QUIET)
                self._changed.clear()
                if not self._is_read():
                    continue
                await self._follow_secrets()
                if not all(each.is_synced or each.failure for each in self._secrets.values()):
                    continue
                state = self._state()
                if state != last:
                    last = state
                    yield state
                    self._keeper.put_on_disk()
        finally:
            await end(stopped, *self._tasks.values())

    def entries(self) -> Iterator[Entry]:
        """Yield the objects of all kinds that have a status, valid or not, as the API server has them."""
        for reflector in self._kinds.values():
            yield from reflector.items.values()

    def _reflector(self, kind: str, paths: tuple[str, ...]) -> Reflector[Entry]:
        def read(document: Mapping[str, Any], known: Entry | None) -> Entry | None:
            return self._read(kind, document, known)

        return Reflector(self._api, paths, read, self._changed.set)

    def _start(self, reflector: Reflector[Any]) -> None:
        self._tasks[reflector] = asyncio.create_task(reflector.run())

    async def _follow_secrets(self) -> None:
        """Watch Secrets where objects refer to some."""
        wanted = self._referred()
        if wanted == self._wanted:
            return
        new = {key.namespace for key in wanted - self._wanted}
        self._wanted = wanted
        namespaces = {key.namespace for key in wanted}
        for namespace in self._secrets.keys() - namespaces:
            await end(self._tasks.pop(self._secrets.pop(namespace)))
        for namespace in new:
            if namespace in self._secrets:
                # What nobody referred to was not kept.
                reflector = self._secrets[namespace]
                await end(self._tasks[reflector])
                reflector.read_again()
            else:
                path = f"/api/v1/namespaces/{namespace}/secrets"
                reflector = self._secrets[namespace] = self._reflector("Secret", (path,))
            self._start(reflector)

    def _referred(self) -> frozenset[ObjectKey]:
        found: set[ObjectKey] = set()
        for reflector in self._kinds.values():
            for entry in reflector.items.values():
                found |= entry.secrets
        return frozenset(found | self._secrets_of_gateways())

    def _secrets_of_gateways(self) -> set[ObjectKey]:
        """Return the Secrets with certificates; they are in the namespaces of the gateways' proxies."""
        gateways = [
            entry.loaded
            for entry in self._kinds["Gateway"].items.values()
            if entry.loaded and _credentials(entry.loaded.object)
        ]
        if not gateways:
            return set()
        services = [entry.loaded for entry in self._services.items.values() if entry.loaded]
        world = world_of(SourceState(tuple(services)), self.mesh.settings)
        return {
            ObjectKey("Secret", proxy.namespace, name + suffix)
            for item in gateways
            if isinstance(item.object, Gateway)
            for proxy in typical_proxies(world, item.object)
            for name in _credentials(item.object)
            for suffix in ("", CA_SUFFIX)
        }

    def _read(self, kind: str, document: Mapping[str, Any], known: Entry | None) -> Entry | None:
        """Make an entry of a document, or return the known one if it means the same."""
        metadata = document["metadata"]
        key = ObjectKey(kind, metadata.get("namespace", DEFAULT_NAMESPACE), metadata["name"])
        if kind == "Secret" and key not in self._wanted:
            return None
        content = _content(kind, document)
        text = json.dumps(content, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        status = document.get("status") or {}
        if known is not None and known.digest == digest:
            known.status = status  # of no interest for anybody but the one who writes it
            return known
        item, problems = load_object(content)
        problems += tuple(readable_keys(item))
        is_closed = item is None and kind in SECURITY_KINDS
        return Entry(
            key,
            content["apiVersion"],
            metadata.get("uid", ""),
            metadata.get("generation", 0),
            digest,
            LoadedObject(item, "", 0, "" if kind == "Secret" else text, digest) if item else None,
            problems,
            UnreadablePolicy(key, selected_labels(content)) if is_closed else None,
            _referred_secrets(item),
            status,
        )

    def _is_read(self) -> bool:
        objects_are_read = all(each.is_synced for each in (*self._kinds.values(), self._services))
        return self.mesh.is_known and self.acknowledged.reflector.is_synced and objects_are_read

    def _state(self) -> SourceState:
        entries = [
            entry
            for reflector in (*self._kinds.values(), self._services, *self._secrets.values())
            for entry in reflector.items.values()
        ]
        loaded = Loaded(
            tuple(entry.loaded for entry in entries if entry.loaded),
            tuple(problem for entry in entries for problem in entry.problems),
            {entry.key: _NOWHERE for entry in entries if entry.loaded is None},
            broken=False,
            unreadable=tuple((entry.unreadable, _NOWHERE) for entry in entries if entry.unreadable),
        )
        unread = any(not each.is_synced for each in self._secrets.values())
        state = self._keeper.merge(loaded, list(self._failures()), incomplete=unread)
        failures = {name: each.failure for name, each in self._secrets.items() if each.failure}
        return replace(state, unread_secrets=failures)

    def _failures(self) -> Iterator[Problem]:
        """Tell of what cannot be read at the moment."""
        for kind, reflector in (*self._kinds.items(), ("Service", self._services)):
            if reflector.failure:
                text = f"cannot be read, what was read before stays in use: {reflector.failure}"
                yield Problem(Severity.ERROR, "", 0, kind, "", "", "", text)
            elif not reflector.is_installed and kind in {own.__name__ for own in kinds.OWN}:
                text = "the cluster does not have this kind: kubectl apply -f crds/"
                yield Problem(Severity.ERROR, "", 0, kind, "", "", "", text)
        for namespace, reflector in self._secrets.items():
            if reflector.failure:
                text = f"the Secrets of namespace {namespace} cannot be read: {reflector.failure}"
                yield Problem(Severity.ERROR, "", 0, "Secret", "", "", "", text)


class KubernetesMesh:
    """Istio's mesh configuration in the ConfigMap `istio`; while it is broken, what it was stays."""

    def __init__(self, api: Api, settings: MeshSettings, changed: Callable[[], None]) -> None:
        self.settings = settings
        self.is_known = False
        """There was one that can be used, or it was seen that there is none."""
        self.problems: tuple[Problem, ...] = ()
        self._is_new = asyncio.Event()
        namespace = settings.config.root_namespace
        self._file = f"ConfigMap {namespace}/{_MESH_CONFIG_MAP[0]}"
        self._source_changed = changed
        self.reflector: Reflector[str] = Reflector(
            api,
            (f"/api/v1/namespaces/{namespace}/configmaps",),
            _mesh_text,
            self._take,
            fieldSelector=f"metadata.name={_MESH_CONFIG_MAP[0]}",
        )

    async def states(self, stop: asyncio.Event) -> AsyncIterator[MeshSettings]:
        """Yield the settings after each change of them, or of what is wrong with them."""
        while not stop.is_set():
            await self._is_new.wait()
            self._is_new.clear()
            yield self.settings

    def _take(self) -> None:
        if not self.reflector.is_synced:  # it could not be read: that does not say that there is none
            return
        text = next(iter(self.reflector.items.values()), "")
        config, found = load_mesh_config(text, self._file)
        problems = tuple(replace(problem, line=0) for problem in found)
        self.is_known |= config is not None
        if not self.is_known:
            _LOG.error("nothing is served before this can be read", problem="; ".join(map(str, problems)))
        if config is not None and config != self.settings.config:
            self.settings = replace(self.settings, config=config)
            self._is_new.set()
        if problems != self.problems:
            self.problems = problems
            self._is_new.set()
        self._source_changed()


def _paths() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each kind with its paths, one for each version."""
    groups = {GROUP: dict.fromkeys(kinds.OWN, VERSIONS), **kinds.ISTIO}
    for group, of in groups.items():
        for kind, versions in of.items():
            name = kind.__name__
            yield name, tuple(f"/apis/{group}/{version}/{kinds.plural(name)}" for version in versions)


def path_of(entry: Entry) -> str:
    """Return the path of an object at the API server."""
    key = entry.key
    return f"/apis/{entry.api_version}/namespaces/{key.namespace}/{kinds.plural(key.kind)}/{key.name}"


def _content(kind: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what counts of a document: what others write beside it, our status too, does not."""
    metadata = document["metadata"]
    kept = {
        name: metadata[name]
        for name in ("name", "namespace", "labels", "creationTimestamp", "generation", "uid")
        if name in metadata
    }
    annotations = {
        name: value for name, value in (metadata.get("annotations") or {}).items() if name != _LAST_APPLIED
    }
    if annotations:
        kept["annotations"] = annotations
    content = {name: value for name, value in document.items() if name not in {"metadata", "status"}}
    # The items of a list of Kubernetes' own kinds do not say what they are.
    return {"apiVersion": "v1", "kind": kind, **content, "metadata": kept}


def _mesh_text(document: Mapping[str, Any], known: str | None) -> str | None:
    text = str((document.get("data") or {}).get(_MESH_CONFIG_MAP[1], ""))
    return known if text == known else text


def _referred_secrets(item: BaseObject | None) -> frozenset[ObjectKey]:
    names: Iterable[str | None] = ()
    if isinstance(item, LLMProvider):
        configs = [item.spec.config_for(rule) for rule in (None, *item.spec.route_names)]
        refs = [config.api_key_secret_ref for config in configs if config.api_key_secret_ref]
        names = [*(ref.name for ref in refs), item.spec.tls.credential_name]
    elif isinstance(item, APIKeyAuthentication):
        names = [ref.name for ref in item.spec.credential_refs]
    return (
        frozenset(ObjectKey("Secret", item.namespace, name) for name in names if name)
        if item
        else frozenset()
    )


def readable_keys(item: BaseObject | None) -> Iterator[Problem]:
    """Warn of keys in objects, for more people may read these than Secrets, and of placeholders."""
    if not isinstance(item, LLMProvider):
        return
    for rule in (None, *item.spec.route_names):
        config = item.spec.config_for(rule)
        if config.api_key is not None:
            place = f"routeSpecificConfigs.{rule}" if rule else "defaultConfig"
            why = "whoever may read this object has the key"
            if config.placeholder is not None:
                why = f"nothing fills in {config.placeholder} on Kubernetes"
            text = f"{why}: put the key into a Secret (apiKeySecretRef)"
            field_name = f"spec.configs.{place}.openAIConfig.apiKey"
            yield Problem(Severity.WARNING, "", 0, *item.key, field_name, text)
            return


def _credentials(item: BaseObject) -> set[str]:
    if not isinstance(item, Gateway):
        return set()
    settings = [server.tls for server in item.spec.servers if server.tls is not None]
    names = [name for tls in settings for name in (*tls.secrets, tls.ca_cert_credential_name) if name]
    return set(names)
