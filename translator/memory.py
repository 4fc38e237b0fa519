"""What was made of unchanged objects, so that a change costs what it changes and not the whole world."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

_T = TypeVar("_T")


class Memory:
    """Remembers results by the identity of what they were made of.

    Objects are compared by identity: a source hands out the same object until its content changes.
    """

    def __init__(self) -> None:
        self._new: dict[Hashable, tuple[object, Any]] = {}
        self._old: dict[Hashable, tuple[object, Any]] = {}
        self._parts: dict[Hashable, Memory] = {}

    def begin(self) -> None:
        """Begin a new state of the world: what this one does not ask for is forgotten with the next."""
        self._parts = {name: part for name, part in self._parts.items() if part._new}  # noqa: SLF001 - of its own class
        for part in self._parts.values():
            part.begin()
        self._old, self._new = self._new, {}

    def part(self, *circumstances: Hashable) -> "Memory":
        """Return the memory of what is made under these circumstances, which its keys need not repeat."""
        found = self._parts.get(circumstances)
        if found is None:
            found = self._parts[circumstances] = Memory()
        return found

    def recall(self, key: Hashable, objects: object, make: Callable[[], _T]) -> _T:
        """Return what was made under this key, or make it.

        The key names ``objects`` by ``id``; they are kept with the result, so that their ids stay theirs.
        """
        found = self._new.get(key)
        if found is None:
            found = self._new[key] = self._old.get(key) or (objects, make())
        made: _T = found[1]
        return made
