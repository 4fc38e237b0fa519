"""What the tests of the object model share."""

from collections.abc import Callable
from textwrap import dedent

import pytest

from crds.loader import load


@pytest.fixture
def problems() -> Callable[[str], list[str]]:
    """Return a function that finds the problems of a text, without file and line."""

    def find(text: str) -> list[str]:
        return [str(problem).partition(": ")[2] for problem in load(dedent(text), "f.yaml", {}).problems]

    return find
