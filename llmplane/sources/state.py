"""What a source hands on: valid objects, what is wrong with the others, and what it cannot tell."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from crds.loader import LoadedObject
from crds.problems import ObjectKey, Problem
from crds.unreadable import UnreadablePolicy
from translator.world import MeshSettings, World


@dataclass(frozen=True, slots=True)
class SourceState:
    """The objects of a source at one moment."""

    objects: tuple[LoadedObject, ...] = ()
    """In the order of their keys; an object that did not change is the same one as before."""
    problems: tuple[Problem, ...] = ()
    kept: frozenset[ObjectKey] = frozenset()
    """Objects that are served in their last good version, because the newest one cannot be read."""
    held: frozenset[ObjectKey] = frozenset()
    """Of these, providers whose key is not known: no key is ever kept on disk."""
    incomplete: bool = False
    """Something cannot be read, and what is missing may be in it."""
    unknown: bool = False
    """No good version of what cannot be read is known here, but proxies may have it."""
    unreadable: tuple[UnreadablePolicy, ...] = ()
    """Security policies that cannot be read, and of which no good version is known."""
    unread_secrets: Mapping[str, str] = field(default_factory=dict)
    """Namespaces whose Secrets cannot be read at the moment, and why."""


def world_of(state: SourceState, mesh: MeshSettings) -> World:
    """Put the objects of a source into a world."""
    return World.of(
        (item.object for item in state.objects),
        mesh,
        held=state.held,
        incomplete=state.incomplete,
        unreadable=(_placed(policy, mesh.config.root_namespace) for policy in state.unreadable),
        unread_secrets=state.unread_secrets,
    )


def _placed(policy: UnreadablePolicy, root_namespace: str) -> UnreadablePolicy:
    """Put a policy that may be of any namespace into the one whose policies are for all."""
    if policy.key.namespace:
        return policy
    return replace(policy, key=policy.key._replace(namespace=root_namespace))
