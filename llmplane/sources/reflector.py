"""What an API server has of one kind, kept up to date: a list, then a watch from there on.

While the API server cannot be asked, what was read before stays. A watch goes on where the last one ended;
only where the API server has forgotten that point (410) everything is listed again.
"""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Generic, TypeVar

import structlog

from llmplane.kubeapi import Api, ApiError

_LOG = structlog.get_logger(__name__)

_T = TypeVar("_T")

PAGE = 500
"""Objects that are asked for at once (kubectl's number)."""
_GONE = 410
_NOT_FOUND = 404
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
_NOT_INSTALLED_PAUSE = 10.0
"""Seconds until it is looked again for a kind that the cluster does not have."""

_NO_ANSWER = "the API server does not answer"

Name = tuple[str, str]
"""Namespace and name."""


class Reflector(Generic[_T]):
    """The objects below the first one of `paths` that the API server has (versions of one kind).

    `read` makes of a document what is kept of it; it is given what was kept before, and returns just that if
    nothing of interest changed. `changed` is called when something else is kept than before, or `failure`
    is different. `query` narrows what is asked for.
    """

    def __init__(
        self,
        api: Api,
        paths: Sequence[str],
        read: Callable[[Mapping[str, Any], _T | None], _T | None],
        changed: Callable[[], None],
        **query: str,
    ) -> None:
        self._api = api
        self._paths = paths
        self._read = read
        self._changed = changed
        self._query = query
        self._pause = _FIRST_PAUSE
        self._missed = False
        """The kind seemed to be gone when it was looked for last."""
        self._version = ""
        """Up to where everything was seen (resourceVersion)."""
        self._path = ""
        self.items: dict[Name, _T] = {}
        self.is_synced = False
        """Everything was read once."""
        self.is_installed = True
        """The cluster has the kind."""
        self.failure = ""
        """Why nothing new can be read at the moment."""

    async def run(self) -> None:
        """Read and watch, for ever."""
        while True:
            wait = 0.0
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except ApiError as error:
                wait = error.retry_after
                if error.status == _GONE and self._version:
                    self._version = ""
                elif error.status == _NOT_FOUND:
                    self._set_not_installed()
                    wait = _NOT_INSTALLED_PAUSE
                else:
                    self._set_failure(error)
            # Not in step with the other kinds and replicas, whose watches ended at the same moment.
            await asyncio.sleep(max(wait, self._pause * random.uniform(0.5, 1)))  # noqa: S311
            self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    def read_again(self) -> None:
        """Have `run` list everything, when it is called again, before it counts as synced."""
        self._version = ""
        self.is_synced = False
        self.failure = ""

    async def _list(self) -> None:
        """List everything; what is not there any more is removed at the end."""
        path = await self._installed_path()
        version, found = await self._all(path)
        is_same = self.is_synced and self.is_installed and _is_same(found, self.items)
        self.items, self._path, self._version = found, path, version
        self.is_synced = self.is_installed = True
        self._missed = False
        if not is_same:
            self._changed()

    async def _installed_path(self) -> str:
        """Return the first path that the API server has."""
        for path in self._paths[:-1]:
            try:
                await self._api.get(path, **self._query, limit=1)
            except ApiError as error:
                if error.status != _NOT_FOUND:
                    raise
            else:
                return path
        return self._paths[-1]

    async def _all(self, path: str) -> tuple[str, dict[Name, _T]]:
        """Return resourceVersion and what is kept of all objects, which are asked for in pages."""
        found: dict[Name, _T] = {}
        token = ""
        while True:
            query = {**self._query, "limit": str(PAGE), **({"continue": token} if token else {})}
            try:
                page = await self._api.get(path, **query)
            except ApiError as error:
                if error.status != _GONE or not token:
                    raise
                # What the pages are of is forgotten: all at once, as client-go does.
                page = await self._api.get(path, **self._query)
                found.clear()
            for document in page["items"] or ():
                self._keep(document, found, self.items)
            metadata = page["metadata"]
            token = metadata.get("continue", "")
            if not token:
                return metadata["resourceVersion"], found
            await asyncio.sleep(0)

    async def _watch(self) -> None:
        """Follow the changes until the watch ends."""
        events = await self._api.watch(
            self._path,
            **self._query,
            resourceVersion=self._version,
            allowWatchBookmarks="true",
            timeoutSeconds=random.randint(300, 600),  # noqa: S311 - so that not all watches begin at once
        )
        self._set_failure(None)
        async with aclosing(events):
            async for event in events:
                document = event["object"]
                if event["type"] == "DELETED":
                    if self.items.pop(_name(document), None) is not None:
                        self._changed()
                elif event["type"] != "BOOKMARK" and self._keep(document, self.items, self.items):
                    self._changed()
                self._version = document["metadata"]["resourceVersion"]
                self._pause = _FIRST_PAUSE

    def _keep(self, document: Mapping[str, Any], items: dict[Name, _T], before: Mapping[Name, _T]) -> bool:
        """Put into `items` what is kept of a document; return whether it is another than `before`."""
        name = _name(document)
        known = before.get(name)
        item = self._read(document, known)
        if item is None:
            items.pop(name, None)
        else:
            items[name] = item
        return item is not known

    def _set_failure(self, error: ApiError | None) -> None:
        """Note why nothing can be read, or that it can be read again."""
        why = ""
        if error is not None:
            # What the transport says is for the log, and different each time.
            why = _NO_ANSWER if error.is_passing else str(error)
        if why == self.failure:
            return
        if error is not None:
            _LOG.warning("the API server cannot be read", path=self._paths[0], problem=str(error))
        else:
            _LOG.info("the API server can be read again", path=self._paths[0])
        self.failure = why
        self._changed()

    def _set_not_installed(self) -> None:
        """Note that the cluster does not have the kind: its objects are gone with it.

        It must be missed twice: an API server that has just started may not know its kinds yet.
        """
        self._version = ""
        if self.is_synced and not self.is_installed:
            return
        if self.items and not self._missed:
            self._missed = True
            return
        self.items = {}
        self.is_synced, self.is_installed, self.failure = True, False, ""
        self._changed()


def _name(document: Mapping[str, Any]) -> Name:
    metadata = document["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _is_same(one: Mapping[Name, Any], other: Mapping[Name, Any]) -> bool:
    return one.keys() == other.keys() and all(item is other[name] for name, item in one.items())
