"""Which kinds there are, and what becomes of the others.

Nothing that a user wrote for us is passed over in silence: a kind that we do not know is an error, and so is
a kind of Istio that we do not honour yet, for a security policy without effect is worse than none.
"""

import difflib
from collections.abc import Iterable

from crds.core import Secret, Service
from crds.llmprovider import LLMProvider
from crds.llmroute import LLMRoute
from crds.meta import GROUP, VERSIONS, BaseObject

OWN: tuple[type[BaseObject], ...] = (LLMProvider, LLMRoute)
"""The kinds of `GROUP`."""

MODELS: tuple[type[BaseObject], ...] = (*OWN, Secret, Service)
"""All kinds that are read."""

_OWN = {model.__name__: model for model in OWN}
_CORE: dict[str, type[BaseObject]] = {"Secret": Secret, "Service": Service}


class UnknownKindError(ValueError):
    """There is no such kind: which object was meant is not known."""


class UnsupportedKindError(ValueError):
    """The kind exists in Istio, but has no effect here."""


def lookup(api_version: str, kind: str) -> type[BaseObject] | None:
    """Return the model of a kind, or None for the kinds of Kubernetes that we do not need.

    Raises `UnknownKindError` and `UnsupportedKindError`, with a text for people.
    """
    group, slash, version = api_version.rpartition("/")
    if group == GROUP:
        if kind not in _OWN:
            raise UnknownKindError(f"unknown kind '{kind}' of {GROUP}{did_you_mean(kind, _OWN)}")
        if version not in VERSIONS:
            raise UnknownKindError(f"unknown version '{api_version}', must be {_own_versions()}")
        return _OWN[kind]
    if kind in _OWN:
        raise UnknownKindError(f"'{api_version}' has no kind '{kind}': its apiVersion is {_own_versions()}")
    if group == "istio.io" or group.endswith(".istio.io"):
        raise UnsupportedKindError(
            f"'{kind}' of {group} is not supported by this version of llmplane; it has no effect"
        )
    if api_version == "v1":
        return _CORE.get(kind)
    if not slash:
        raise UnknownKindError(f"unknown apiVersion '{api_version}'")
    if "." not in group or group.endswith(".k8s.io"):
        return None
    raise UnknownKindError(
        f"unknown kind '{kind}' of {group}{did_you_mean(f'{group}/{kind}', _full_names())}"
    )


def _own_versions() -> str:
    return " or ".join(f"{GROUP}/{version}" for version in VERSIONS)


def _full_names() -> list[str]:
    return [f"{GROUP}/{kind}" for kind in _OWN]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `, did you mean '...'?` for the known word that is nearest, in whichever case, or nothing."""
    by_lower_case = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(word.lower(), by_lower_case, n=1)
    return f", did you mean '{by_lower_case[nearest[0]]}'?" if nearest else ""
