"""What a client asks for by name."""

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Final

from xds.resources import glob_of, is_glob


class Names(frozenset[str]):
    """Names that a client subscribed to; immutable, since all clients that ask for the same share them."""

    __slots__ = ("globs",)

    def __init__(self, _: Iterable[str] = ()) -> None:
        self.globs = frozenset(filter(is_glob, self))
        """Those of the names that stand for collections."""

    def but(self, added: frozenset[str], removed: frozenset[str]) -> "Names":
        """Return these with some added and others removed; only those are looked at."""
        rest: frozenset[str] = self - removed if removed else self
        new = Names.__new__(Names, rest | added if added else rest)
        new.globs = (self.globs - removed).union(filter(is_glob, added))
        return new

    def cover(self, name: str) -> bool:
        """Whether a resource of this name is asked for."""
        return name in self or bool(self.globs and glob_of(name) in self.globs)

    def covered(self, names: AbstractSet[str]) -> AbstractSet[str]:
        """Return which of these names are asked for, also by their collections."""
        named = self & names
        return named | members_of(self.globs, names) if self.globs else named


NONE: Final = Names()


def members_of(globs: AbstractSet[str], names: Iterable[str]) -> set[str]:
    """Return which of these names are in one of these collections."""
    return {name for name in names if glob_of(name) in globs} if globs else set()
