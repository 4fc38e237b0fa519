"""The Pods of connected proxies: what a workload is called, and its labels, as the API server has them.

Of each only the metadata is read, and only while a stream needs it: a watch of that one Pod.
"""

import asyncio
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from llmplane.kubeapi import Api
from llmplane.sources.reflector import Reflector

_PATIENCE = 10.0
"""Seconds in which the API server has to tell of a Pod."""
_OF_CRON_JOB = re.compile(r"(.+)-\d{8,10}")
"""The name of a Job that a CronJob made."""


class PodName(NamedTuple):
    """A Pod, and no later one of its name."""

    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"Pod {self.namespace}/{self.name}"


class Workload(NamedTuple):
    """What the Pod of a proxy says of it."""

    uid: str
    name: str
    labels: frozenset[tuple[str, str]]


class PodUnknownError(RuntimeError):
    """The API server does not tell of a Pod; the text says why."""


class Pods:
    """The Pods that are in use; `revision` is another one as soon as one of them changed."""

    def __init__(self, api: Api) -> None:
        self._api = api.of_metadata()
        self._pods: dict[PodName, _Pod] = {}
        self.revision = 0

    async def hold(self, pod: PodName) -> None:
        """Watch a Pod, until `release` was called as often. Raises PodUnknownError."""
        if pod not in self._pods:
            self._pods[pod] = _Pod(self._api, pod, self._note)
        held = self._pods[pod]
        held.holders += 1
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE):
                    await held.is_known.wait()
        except BaseException:
            self.release(pod)
            raise
        if why := held.failure:
            self.release(pod)
            raise PodUnknownError(why)

    def release(self, pod: PodName) -> None:
        """Take back one `hold`."""
        held = self._pods.get(pod)
        if held is None:  # closed
            return
        held.holders -= 1
        if not held.holders:
            held.end()
            del self._pods[pod]

    def workload(self, pod: PodName) -> Workload | None:
        """Return what a Pod that is held says, None if it is gone."""
        return self._pods[pod].workload

    async def close(self) -> None:
        """End all watches."""
        tasks = [pod.end() for pod in self._pods.values()]
        self._pods.clear()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task

    def _note(self) -> None:
        self.revision += 1


class _Pod:
    """A watch of one Pod."""

    def __init__(self, api: Api, pod: PodName, changed: Callable[[], None]) -> None:
        self.holders = 0
        self.is_known = asyncio.Event()
        self._pod = pod
        self._told: Workload | None = None
        self._reflector: Reflector[Workload] = Reflector(
            api,
            (f"/api/v1/namespaces/{pod.namespace}/pods",),
            _workload,
            partial(self._note, changed),
            fieldSelector=f"metadata.name={pod.name}",
        )
        self._task = asyncio.create_task(self._reflector.run())

    @property
    def workload(self) -> Workload | None:
        """What the Pod says, None if it is gone, be there another one of its name."""
        found = self._reflector.items.get((self._pod.namespace, self._pod.name))
        return found if found is not None and found.uid == self._pod.uid else None

    @property
    def failure(self) -> str:
        """Why it was never read."""
        return (
            "" if self._reflector.is_synced else self._reflector.failure or "the API server does not answer"
        )

    def end(self) -> asyncio.Task[None]:
        """End the watch."""
        self._task.cancel()
        return self._task

    def _note(self, changed: Callable[[], None]) -> None:
        was_known = self._reflector.is_synced and self.is_known.is_set()
        self.is_known.set()
        if self.workload != self._told:
            self._told = self.workload
            if was_known:
                changed()


def workload_name(metadata: Mapping[str, Any]) -> str:
    """Return the name of a Pod's workload by who made the Pod, as Istio does (GetDeployMetaFromPod)."""
    owner = next((each for each in metadata.get("ownerReferences") or () if each.get("controller")), None)
    if owner is None:
        return str(metadata.get("name") or metadata.get("generateName", "").rstrip("-"))
    name = str(owner["name"])
    digest = (metadata.get("labels") or {}).get("pod-template-hash")
    if owner["kind"] == "ReplicaSet" and digest:
        return name.removesuffix(f"-{digest}")
    if owner["kind"] == "Job" and (found := _OF_CRON_JOB.fullmatch(name)):
        return found[1]
    return name


def _workload(document: Mapping[str, Any], known: Workload | None) -> Workload:
    metadata = document["metadata"]
    labels = frozenset((metadata.get("labels") or {}).items())
    found = Workload(metadata["uid"], workload_name(metadata), labels)
    return known if found == known and known is not None else found
