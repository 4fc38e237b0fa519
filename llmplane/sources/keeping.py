"""What of the objects is served while something cannot be read: their last good versions.

An object that is there, but broken, stays in its last good version (design decision 5). Until a good version
of everything was known once, in this process or by what `last_good` remembers, the state is `unknown`.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from crds.loader import Loaded, LoadedObject, Location
from crds.problems import ObjectKey, Problem, Severity
from crds.unreadable import UnreadablePolicy
from llmplane.sources.lastgood import LastGood
from llmplane.sources.state import SourceState


class Keeper:
    """Knows the objects of a source as they were served last.

    ``variables`` fill the placeholders of what ``last_good`` remembers over a restart.
    """

    def __init__(self, last_good: LastGood | None, variables: Mapping[str, str]) -> None:
        self._last_good = last_good
        self._variables = variables
        self._objects: dict[ObjectKey, LoadedObject] = {}
        self._held: frozenset[ObjectKey] = frozenset()
        self._was_complete = last_good is not None and last_good.found
        """A good version of everything was known once."""

    def known(self) -> set[ObjectKey]:
        """Return the objects of which a good version is known."""
        return {*self._objects, *(self._last_good.keys() if self._last_good else ())}

    def had_objects_of(self, path: str) -> bool:
        """Whether good versions that came from a file, or from files in a folder, are known."""
        files = {item.file for item in self._objects.values()}
        if self._last_good:
            files |= self._last_good.files()
        return path in files or any(file.startswith(f"{path}{os.sep}") for file in files)

    def put_on_disk(self) -> None:
        """Have the good versions remembered, once everything was good."""
        if self._last_good and self._was_complete:
            self._last_good.put(self._objects.values())

    def merge(
        self,
        loaded: Loaded,
        problems: Sequence[Problem] = (),
        *,
        doubtful: Collection[ObjectKey] = (),
        complete: bool = True,
        incomplete: bool = False,
    ) -> SourceState:
        """Return the state with what was read, and what is kept beside it.

        `doubtful` are objects that may be there although they were not read. Not `complete`: something was
        not read, and it is not known what. `incomplete` is the state's.
        """
        problems = [*problems, *loaded.problems]
        objects = {item.key: self._same(item) for item in loaded.objects}
        kept: set[ObjectKey] = set()
        held: set[ObjectKey] = set()
        for key in {*loaded.invalid, *doubtful} - objects.keys():
            version = self._last_version(key)
            if version is None:
                complete = False
                # Secrets are not kept on disk: a provider that refers to this one has a key, but not here.
                incomplete |= key.kind == "Secret"
                continue
            objects[key], has_keys = version
            kept.add(key)
            if not has_keys:
                held.add(key)
        unreadable = [
            (policy, location)
            for policy, location in loaded.unreadable
            if not _has_version(policy.key, location, objects, kept)
        ]
        problems += [_denies(policy, location) for policy, location in unreadable]
        self._objects = {key: objects[key] for key in sorted(objects)}
        self._held = frozenset(held)
        self._was_complete = self._was_complete or complete
        problems.sort(key=lambda problem: (problem.file, problem.line))
        return SourceState(
            tuple(self._objects.values()),
            tuple(problems),
            frozenset(kept),
            self._held,
            incomplete,
            unknown=not self._was_complete,
            unreadable=tuple(policy for policy, _ in unreadable),
        )

    def _same(self, item: LoadedObject) -> LoadedObject:
        """Give an object that was read again its identity back: what was made of it is still good."""
        known = self._objects.get(item.key)
        if known is None or known.object is item.object or known.digest != item.digest:
            return item
        return replace(item, object=known.object)

    def _last_version(self, key: ObjectKey) -> tuple[LoadedObject, bool] | None:
        """Return the last good version of an object and whether its keys are known, None if there is none."""
        if key in self._objects:
            return self._objects[key], key not in self._held
        return self._last_good.get(key, self._variables) if self._last_good else None


def _has_version(
    key: ObjectKey,
    location: Location,
    objects: Mapping[ObjectKey, LoadedObject],
    kept: AbstractSet[ObjectKey],
) -> bool:
    """Whether a good version of a broken policy is served; without a name, one that is likely its own."""
    if key.name:
        return key in objects
    return any(other.kind == key.kind and objects[other].file == location.file for other in kept)


def _denies(policy: UnreadablePolicy, location: Location) -> Problem:
    text = (
        f"no good version of this policy is known: {policy.scope} refuse every request until it can be read"
    )
    return Problem(Severity.ERROR, *location, *policy.key, "", text)
