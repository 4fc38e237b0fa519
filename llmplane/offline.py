"""What needs no server: checking files, and showing what a proxy would get from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from crds.problems import ObjectKey
from crds.problems import Problem, Severity
from llmplane.sources.files import FileSource
from llmplane.sources.state import SourceState, world_of
from translator.conditions import conditions
from translator.proxy import Proxy
from translator.translate import Translator
from translator.world import MeshSettings
from xds import protos


def translate(
    files: Sequence[Path], proxy: Proxy, mesh: MeshSettings, variables: Mapping[str, str]
) -> tuple[str, list[Problem]]:
    """Return the resources that a proxy would get as YAML, keys redacted, and the problems of the files."""
    state = FileSource(files, variables).read()
    translation = Translator().translate(world_of(state, mesh), proxy)
    documents = []
    for resource in translation.resources:
        message = protos.Any.FromString(resource.body)
        documents.append(_redacted(protos.to_dict(message)))
    # Sorted, because protobuf's maps have no order.
    return yaml.safe_dump_all(documents, sort_keys=True, allow_unicode=True), list(state.problems)


def validate(
    files: Sequence[Path], variables: Mapping[str, str], mesh: MeshSettings
) -> tuple[int, list[Problem]]:
    """Return how many objects there are, and everything that is wrong with them, also between objects."""
    state = FileSource(files, variables).read()
    return len(state.objects), [*state.problems, *_relations(state, mesh)]


def _relations(state: SourceState, mesh: MeshSettings) -> list[Problem]:
    """Conditions as problems: an object that does not count is an error, a reference may yet come."""
    places = {item.key: (item.file, item.line) for item in state.objects}
    found = []
    for key, of in conditions(world_of(state, mesh)).items():
        for condition in of:
            if not condition.status:
                severity = Severity.ERROR if condition.type == "Accepted" else Severity.WARNING
                found.append(_problem(severity, places[key], key, condition.message))
    return found


def _problem(severity: Severity, place: tuple[str, int], key: ObjectKey, message: str) -> Problem:
    field, _, text = message.partition(": ")
    return Problem(severity, *place, *key, field, text)


def _redacted(resource: dict[str, object]) -> dict[str, object]:
    if "generic_secret" in resource:
        return {**resource, "generic_secret": "[redacted]"}
    if "tls_certificate" in resource:
        return {**resource, "tls_certificate": "[redacted]"}
    return resource
