"""Resources are checked against the API's own rules before an Envoy sees them.

One resource that violates them makes Envoy drop the whole response (envoy#32880).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

from translator.parts import ResourceName
from xds import protos, validation
from xds.group import Archive
from xds.resources import Resource


class ResourceChecker:
    """Holds violating resources back; each is checked once, as long as somebody keeps it.

    ``enabled`` False lets everything pass: the rules can differ from those of another version of Envoy.
    What stands in for a violating version is told to ``archive``, and asked of it.
    """

    def __init__(self, archive: Archive | None = None, *, enabled: bool = True) -> None:
        self._archive = archive
        self._enabled = enabled
        self._verdicts: WeakKeyDictionary[Resource, str] = WeakKeyDictionary()

    def check(
        self, resources: Iterable[Resource], before: Mapping[ResourceName, Resource]
    ) -> tuple[dict[ResourceName, Resource], dict[ResourceName, str]]:
        """Return what to serve, and what is wrong with the others by their type URL and name.

        A violating resource is served in its version of ``before``, or that of the archive; where there is
        none, who has any version keeps it. One that restricts is not served in a version that is open.
        """
        served: dict[ResourceName, Resource] = {}
        wrong: dict[ResourceName, str] = {}
        for resource in resources:
            name = (resource.type_url, resource.name)
            verdict = self._verdict(resource)
            if not verdict:
                served[name] = resource
                continue
            wrong[name] = verdict
            stand_in = resource.stand_in(self._good(resource, before.get(name)))
            served[name] = stand_in or Resource.unknown(*name)
        return served, wrong

    def _good(self, resource: Resource, before: Resource | None) -> Resource | None:
        """Return the last good version of a violating resource."""
        if self._archive is None:
            return before
        refused = (resource.type_url, resource.name, resource.version)
        if before is None or before.held:
            found = self._archive.get(refused)
            return before if found is None else replace(found, guard=resource.guard)
        self._archive.put(refused, before)
        return before

    def _verdict(self, resource: Resource) -> str:
        if not self._enabled:
            return ""
        known = self._verdicts.get(resource)
        if known is None:
            found = validation.violations(protos.Any.FromString(resource.body))
            known = self._verdicts[resource] = "; ".join(str(violation) for violation in found)
        return known
