"""Everything that one group of proxies should have, as an immutable value."""
# ruff: noqa: SLF001 - all private members are those of another instance of the same class

import hashlib
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping
from typing import Self
from weakref import WeakKeyDictionary, WeakValueDictionary

from xds.names import NONE, Names
from xds.resources import Resource, is_glob


class ResourceSet:
    """The resources of one type by name: a mapping that is immutable and compared by identity.

    A set made by `replace` knows what distinguishes it from its origin; any other difference is computed
    once.
    """

    __slots__ = (
        "__weakref__",
        "_asked",
        "_changed",
        "_checksum",
        "_parts",
        "_resources",
        "expiring",
        "get",
        "held",
    )

    get: Callable[[str], Resource | None]
    """Returns the resource of a name, if there is one: the method of a dictionary, for speed."""

    def __init__(self, resources: Mapping[str, Resource]) -> None:
        self._resources = resources
        self.get = resources.get
        self._changed: WeakKeyDictionary[ResourceSet, frozenset[str]] = WeakKeyDictionary()
        self._parts: WeakValueDictionary[Names, ResourceSet] = WeakValueDictionary()
        self._asked = NONE
        """Of what is a part, the names that were asked for."""
        self._checksum: int | None = None
        self.held: frozenset[str] = frozenset(name for name, resource in resources.items() if resource.held)
        self.expiring: frozenset[str] = frozenset(
            name for name, resource in resources.items() if resource.ttl is not None
        )
        """Names of those that have a time to live."""

    def __getitem__(self, name: str) -> Resource:
        return self._resources[name]

    def __contains__(self, name: object) -> bool:
        return name in self._resources

    def __iter__(self) -> Iterator[str]:
        return iter(self._resources)

    def __len__(self) -> int:
        return len(self._resources)

    def __repr__(self) -> str:
        return f"<{len(self)} resources, version {self.version}>"

    def values(self) -> Iterable[Resource]:
        """Return the resources."""
        return self._resources.values()

    def keys(self) -> KeysView[str]:
        """Return the names."""
        return self._resources.keys()

    @property
    def version(self) -> str:
        """A hash of names and versions; equal content has an equal version in every process.

        It is a sum over the members, so that a change costs what was changed.
        """
        if self._checksum is None:
            self._checksum = sum(_checksum(resource) for resource in self.values())
        return f"{self._checksum % 2**64:016x}"

    def changed(self, old: "ResourceSet") -> frozenset[str]:
        """Return the names whose resource was added, changed or removed since `old`."""
        if old is self:
            return frozenset()
        names = self._changed.get(old)
        if names is None:
            before, after = old._resources, self._resources
            # Most are the very same object; to compare them by value would cost ten times as much.
            upserted = {
                name
                for name, resource in after.items()
                if (other := before.get(name)) is not resource and other != resource
            }
            names = frozenset(upserted | (before.keys() - after.keys()))
            self._changed[old] = names
            if self._checksum is None and old._checksum is not None:
                gone = sum(_checksum(before[name]) for name in names if name in before)
                self._checksum = (
                    old._checksum - gone + sum(_checksum(after[name]) for name in names if name in after)
                )
        return names

    def part(self, names: Names, near: "ResourceSet") -> "ResourceSet":
        """Return the set of those that are asked for; the same object as long as anybody has it.

        If `near` is the part of other names, only those in which they differ are looked at.
        """
        if not self._resources:
            return EMPTY
        part = self._parts.get(names)
        if part is None:
            part = self._part(names, near)
            if part is not EMPTY:  # that one is there for ever, and the names would be
                self._parts[names] = part
                part._asked = names
        return part

    def _part(self, names: Names, near: "ResourceSet") -> "ResourceSet":
        for old, changed in self._changed.items():
            before = old._parts.get(names)
            if before is not None:
                return before.replace({name: self.get(name) for name in names.covered(changed)})
        differing = names ^ near._asked
        if self._parts.get(near._asked) is near and not any(map(is_glob, differing)):
            wanted = {name: self.get(name) if names.cover(name) else None for name in differing}
            # Even if nothing differs it is another set: one would be known by, and keep, ever more names.
            return (
                near._but({name: new for name, new in wanted.items() if new is not near.get(name)}) or EMPTY
            )
        covered = sorted(names.covered(self._resources.keys()))
        return ResourceSet({name: self._resources[name] for name in covered}) or EMPTY

    def towards(self, goal: "ResourceSet", names: frozenset[str]) -> "ResourceSet":
        """Return this set with those of its differences from `goal` made good that have these names."""
        between = self.replace({name: goal.get(name) for name in names})
        goal._changed[between] = goal.changed(self) - names
        return between

    def replace(self, changes: Mapping[str, Resource | None]) -> "ResourceSet":
        """Return a set with these resources put in, or taken out where None; itself if nothing differs."""
        differing = {name: resource for name, resource in changes.items() if self.get(name) != resource}
        return self._but(differing) if differing else self

    def _but(self, differing: Mapping[str, Resource | None]) -> "ResourceSet":
        resources = dict(self._resources)
        checksum = self._checksum
        held, expiring = set(self.held), set(self.expiring)
        for name, resource in differing.items():
            old = resources.pop(name, None)
            held.discard(name)
            expiring.discard(name)
            if checksum is not None and old is not None:
                checksum -= _checksum(old)
            if resource is not None:
                resources[name] = resource
                if checksum is not None:
                    checksum += _checksum(resource)
                if resource.held:
                    held.add(name)
                if resource.ttl is not None:
                    expiring.add(name)
        new = ResourceSet.__new__(ResourceSet)
        new._resources = resources
        new.get = resources.get
        new._changed = WeakKeyDictionary({self: frozenset(differing)})
        new._parts = WeakValueDictionary()
        new._asked = NONE
        new._checksum = checksum
        new.held, new.expiring = frozenset(held), frozenset(expiring)
        return new


EMPTY = ResourceSet({})


class Snapshot:
    """All resources for one group of proxies, by type and name.

    Building one from all resources compares all of them with the one before; `replace` costs what it changes.

    `incomplete` says that proxies may rightly have more than this: a source cannot be read, and nobody knows
    what was in it. See `xds.subscription` for what that means. `routes_first` says that filters (ECDS) follow
    routes, which they precede else (`xds.resources.PUSH_ORDER`).
    """

    __slots__ = ("_sets", "incomplete", "routes_first")

    def __init__(
        self, resources: Iterable[Resource] = (), *, incomplete: bool = False, routes_first: bool = False
    ) -> None:
        self.incomplete = incomplete
        self.routes_first = routes_first
        by_type: dict[str, dict[str, Resource]] = {}
        for resource in resources:
            if by_type.setdefault(resource.type_url, {}).setdefault(resource.name, resource) != resource:
                raise ValueError(
                    f"two different resources of type {resource.type_url} named {resource.name!r}"
                )
        self._sets = {type_url: ResourceSet(by_name) for type_url, by_name in by_type.items()}

    @classmethod
    def from_sets(
        cls, sets: Mapping[str, ResourceSet], *, incomplete: bool = False, routes_first: bool = False
    ) -> Self:
        """Make a snapshot of sets by type, leaving out empty ones."""
        snapshot = cls(incomplete=incomplete, routes_first=routes_first)
        snapshot._sets = {type_url: resources for type_url, resources in sets.items() if resources}
        return snapshot

    def __getitem__(self, type_url: str) -> ResourceSet:
        return self._sets.get(type_url, EMPTY)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sets)

    def __repr__(self) -> str:
        return f"Snapshot({ {type_url: len(resources) for type_url, resources in self._sets.items()} })"

    def replace(
        self,
        upserts: Iterable[Resource] = (),
        removals: Iterable[tuple[str, str]] = (),
        *,
        incomplete: bool | None = None,
        routes_first: bool = False,
    ) -> "Snapshot":
        """Return a snapshot with `upserts` put in and `removals` (type URL, name) taken out.

        It is as incomplete as this one, unless said.
        """
        changes: dict[str, dict[str, Resource | None]] = {}
        for type_url, name in removals:
            changes.setdefault(type_url, {})[name] = None
        for resource in upserts:
            changes.setdefault(resource.type_url, {})[resource.name] = resource
        sets = dict(self._sets)
        for type_url, by_name in changes.items():
            sets[type_url] = self[type_url].replace(by_name)
        incomplete = self.incomplete if incomplete is None else incomplete
        return Snapshot.from_sets(sets, incomplete=incomplete, routes_first=routes_first)

    def diff(self, old: "Snapshot") -> dict[str, frozenset[str]]:
        """Return the names that were added, changed or removed since `old`, by type, of changed types."""
        names = {type_url: self[type_url].changed(old[type_url]) for type_url in {*self, *old}}
        return {type_url: changed for type_url, changed in names.items() if changed}


def _checksum(resource: Resource) -> int:
    digest = hashlib.blake2b(f"{resource.name}\0{resource.version}\0{resource.held}".encode(), digest_size=8)
    return int.from_bytes(digest.digest())
