"""What needs no server: checking files, and showing what a proxy would get from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from crds.problems import Problem
from llmplane.dump import to_yaml
from llmplane.problems import problems
from llmplane.sources.files import FileSource
from llmplane.sources.state import world_of
from translator.conditions import conditions
from translator.proxy import Proxy
from translator.translate import Translator
from translator.world import MeshSettings


def translate(
    files: Sequence[Path], proxy: Proxy, mesh: MeshSettings, variables: Mapping[str, str]
) -> tuple[str, list[Problem]]:
    """Return the resources that a proxy would get as YAML, keys redacted, and all that is wrong."""
    state = FileSource(files, variables).read()
    world = world_of(state, mesh)
    text = to_yaml(Translator().translate(world, proxy).resources)
    return text, problems(state, conditions(world))


def validate(
    files: Sequence[Path], variables: Mapping[str, str], mesh: MeshSettings
) -> tuple[int, list[Problem]]:
    """Return how many valid objects there are, and everything that is wrong, also between objects."""
    state = FileSource(files, variables).read()
    return len(state.objects), problems(state, conditions(world_of(state, mesh)))
