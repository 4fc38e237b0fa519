"""Resources are checked against the API's own rules before an Envoy sees them.

One resource that violates them makes Envoy drop the whole response (envoy#32880).
"""

from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

from translator.parts import ResourceName
from xds import protos, validation
from xds.resources import Resource


class ResourceChecker:
    """Holds violating resources back; each is checked once, as long as somebody keeps it.

    ``enabled`` False lets everything pass: the rules can differ from those of another version of Envoy.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._verdicts: WeakKeyDictionary[Resource, str] = WeakKeyDictionary()

    def check(
        self, resources: Iterable[Resource], before: Mapping[ResourceName, Resource]
    ) -> tuple[dict[ResourceName, Resource], dict[ResourceName, str]]:
        """Return what to serve, and what is wrong with the others by their type URL and name.

        A violating resource is served in its version of ``before``, or not at all where there is none; one
        that restricts, not in one that is open.
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
            stand_in = resource.stand_in(before.get(name))
            if stand_in is not None:
                served[name] = stand_in
        return served, wrong

    def _verdict(self, resource: Resource) -> str:
        if not self._enabled:
            return ""
        known = self._verdicts.get(resource)
        if known is None:
            found = validation.violations(protos.Any.FromString(resource.body))
            known = self._verdicts[resource] = "; ".join(str(violation) for violation in found)
        return known
