"""What was made of unchanged objects, so that a change costs what it changes and not the whole world."""

from collections.abc import Callable, Hashable
from typing import TypeVar, cast

_T = TypeVar("_T")


class Memory:
    """Remembers results by the identity of what they were made of.

    Objects are compared by identity: a source hands out the same object until its content changes.
    """

    def __init__(self) -> None:
        self._new: dict[Hashable, tuple[object, object]] = {}
        self._old: dict[Hashable, tuple[object, object]] = {}

    def begin(self) -> None:
        """Begin a new state of the world: what this one does not ask for is forgotten with the next."""
        self._old, self._new = self._new, {}

    def recall(self, key: Hashable, objects: object, make: Callable[[], _T]) -> _T:
        """Return what was made under this key, or make it.

        The key names ``objects`` by ``id``; they are kept with the result, so that their ids stay theirs.
        """
        found = self._new.get(key)
        if found is None:
            found = self._new[key] = self._old.get(key) or (objects, make())
        return cast("_T", found[1])
