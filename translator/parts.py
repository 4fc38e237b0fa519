"""The resources of a proxy in parts: one that did not change is the same object as before."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from crds.problems import ObjectKey
from xds.resources import Resource

ResourceName = tuple[str, str]
"""Type URL and name."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some resources that are made together, and for each object those that it went into."""

    resources: Mapping[ResourceName, Resource]
    origins: Mapping[ObjectKey, frozenset[ResourceName]]


class Collection:
    """Collects the resources of a part, and the objects that they come from."""

    def __init__(self) -> None:
        self._resources: dict[ResourceName, Resource] = {}
        self._origins: defaultdict[ObjectKey, set[ResourceName]] = defaultdict(set)

    def add(self, resource: Resource, *objects: ObjectKey) -> None:
        """Add a resource, unless it is there."""
        name = (resource.type_url, resource.name)
        self._resources.setdefault(name, resource)
        for key in objects:
            self._origins[key].add(name)

    def part(self) -> Part:
        """Return what was collected."""
        return Part(self._resources, {key: frozenset(names) for key, names in self._origins.items()})
