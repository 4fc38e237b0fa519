"""Which kinds there are, and what becomes of the others.

Nothing that a user wrote for us is passed over in silence: a kind that we do not know is an error, and so is
a kind of Istio that we do not honour yet, for a security policy without effect is worse than none.
"""

import difflib
from collections.abc import Iterable, Mapping

from crds.apikeyauthentication import APIKeyAuthentication
from crds.authorizationpolicy import AuthorizationPolicy
from crds.core import Secret, Service
from crds.gateway import Gateway
from crds.llmprovider import LLMProvider
from crds.llmroute import LLMRoute
from crds.llmtokenratelimit import LLMTokenRateLimit
from crds.meta import GROUP, VERSIONS, BaseObject
from crds.requestauthentication import RequestAuthentication
from crds.telemetry import Telemetry

OWN: tuple[type[BaseObject], ...] = (LLMProvider, LLMRoute, APIKeyAuthentication, LLMTokenRateLimit)
"""The kinds of `GROUP`."""

ISTIO: Mapping[str, Mapping[type[BaseObject], tuple[str, ...]]] = {
    "networking.istio.io": {Gateway: ("v1", "v1beta1", "v1alpha3")},
    "security.istio.io": {
        AuthorizationPolicy: ("v1", "v1beta1"),
        RequestAuthentication: ("v1", "v1beta1"),
    },
    "telemetry.istio.io": {Telemetry: ("v1", "v1alpha1")},
}
"""The kinds of Istio that we honour, by their group, with the versions that it serves."""

MODELS: tuple[type[BaseObject], ...] = (
    *OWN,
    *(kind for of in ISTIO.values() for kind in of),
    Secret,
    Service,
)
"""All kinds that are read."""

_GROUPS = {GROUP: dict.fromkeys(OWN, VERSIONS), **ISTIO}
_KINDS = {
    (group, kind.__name__): (kind, versions)
    for group, kinds in _GROUPS.items()
    for kind, versions in kinds.items()
}
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
    if (group, kind) in _KINDS:
        model, versions = _KINDS[group, kind]
        if version not in versions:
            text = f"unknown version '{api_version}', must be {_versions(group, versions)}"
            raise UnknownKindError(text)
        return model
    own = [name for of, name in _KINDS if of == GROUP]
    if group == GROUP:
        raise UnknownKindError(f"unknown kind '{kind}' of {GROUP}{did_you_mean(kind, own)}")
    if kind in own:
        served = _versions(GROUP, VERSIONS)
        raise UnknownKindError(f"'{api_version}' has no kind '{kind}': its apiVersion is {served}")
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


def _versions(group: str, versions: Iterable[str]) -> str:
    return " or ".join(f"{group}/{version}" for version in versions)


def _full_names() -> list[str]:
    return [f"{group}/{kind}" for group, kind in _KINDS]


def plural(kind: str) -> str:
    """Return the plural of a kind of `OWN` or `ISTIO`, as it stands in the paths of an API server."""
    lower = kind.lower()
    return f"{lower[:-1]}ies" if lower.endswith(("cy", "ry")) else f"{lower}s"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `, did you mean '...'?` for the known word that is nearest, in whichever case, or nothing."""
    by_lower_case = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(word.lower(), by_lower_case, n=1)
    return f", did you mean '{by_lower_case[nearest[0]]}'?" if nearest else ""
