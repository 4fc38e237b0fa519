"""Security policies that cannot be read: whom they were meant for, as far as that can be told.

Such a policy is not just left out, as any other broken object is: what it was to guard would be open. As long
as no good version of it is known, it denies everything to those it selects (design decision 14).
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from crds.problems import ObjectKey
from crds.selection import LabelSelector

SECURITY_KINDS = frozenset(
    {"AuthorizationPolicy", "RequestAuthentication", "APIKeyAuthentication", "LLMTokenRateLimit"}
)
"""Kinds whose objects keep requests out."""

_CLOSE = 0.85  # PeerAuthentication, a kind of Istio that is not one of these, is at 0.77


@dataclass(frozen=True, slots=True)
class UnreadablePolicy:
    """A security policy that is there, but cannot be read."""

    key: ObjectKey
    """Namespace and name are empty where they cannot be read either."""
    labels: Mapping[str, str] | None
    """Labels of the workloads that it selects; None where its selector cannot be read."""

    @property
    def scope(self) -> str:
        """Say for people what is denied."""
        where = f"namespace {self.key.namespace}" if self.key.namespace else "every namespace"
        proxies = "proxies" if self.key.kind == "LLMTokenRateLimit" else "gateways"
        if not self.labels:
            return f"all {proxies} of {where}"
        labels = ", ".join(f"{name}={value}" for name, value in sorted(self.labels.items()))
        return f"the {proxies} of {where} with {labels}"


def meant_kind(api_version: str, kind: str) -> str:
    """Return the security policy that a kind that does not exist was meant to be, or the kind as it is.

    A slip of the pen (AuthorisationPolicy) must not open what the policy was to guard.
    """
    if not kind and api_version.startswith("security.istio.io/"):
        return "AuthorizationPolicy"
    by_lower_case = {name.lower(): name for name in SECURITY_KINDS}
    nearest = difflib.get_close_matches(kind.lower(), by_lower_case, n=1, cutoff=_CLOSE)
    return by_lower_case[nearest[0]] if nearest else kind


def selected_labels(document: Any) -> Mapping[str, str] | None:
    """Return the labels that the policy of a document selects by, None where that is not sure.

    A selector that may be another one under a misspelt name, or none at all, counts as not readable.
    """
    spec = document.get("spec") if isinstance(document, Mapping) else None
    selector = spec.get("selector") if isinstance(spec, Mapping) else None
    if not isinstance(selector, Mapping):
        return None
    try:
        return LabelSelector.model_validate(selector).match_labels or None
    except ValidationError:
        return None
