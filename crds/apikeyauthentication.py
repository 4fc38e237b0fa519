"""APIKeyAuthentication: which clients may use a gateway, by keys of their own.

A kind of ours, named and shaped like Istio's RequestAuthentication: the official SDKs of OpenAI
(Authorization) and Anthropic (x-api-key) send such a key and work unchanged. The form of the Secrets, an
entry for each client, is that of Envoy Gateway's SecurityPolicy (apiKeyAuth).
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, WithJsonSchema, model_validator

from crds.meta import BaseObject, Model
from crds.problems import Finding
from crds.selection import LabelSelectingSpec
from crds.values import NOT_EMPTY, KubernetesName, header_name, invalid

_NOT_FOR_KEYS = frozenset(
    {
        *("host", "content-length", "content-type", "transfer-encoding", "connection", "cookie"),
        *("x-llm-client", "x-request-id"),
    }
)


def _key_header(text: str) -> str:
    name = header_name(text)
    if name in _NOT_FOR_KEYS or name.startswith(("x-envoy-", "x-forwarded-")):
        raise ValueError("cannot be the header of a key: it has another meaning")
    return name


class SecretReference(Model):
    """A Secret of the policy's namespace."""

    name: KubernetesName
    """Name of the Secret."""


class KeyHeader(Model):
    """A header that a key may be in."""

    name: Annotated[
        str,
        AfterValidator(_key_header),
        WithJsonSchema({"type": "string", "maxLength": 256, "pattern": r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$"}),
    ]
    """Name of the header. `Bearer ` in front of the key is not part of it."""


DEFAULT_HEADERS = (KeyHeader(name="x-api-key"), KeyHeader(name="authorization"))
"""Where the SDKs of Anthropic and OpenAI send the key."""


class APIKeyAuthenticationSpec(LabelSelectingSpec):
    """Whose keys are taken, and where."""

    credential_refs: Annotated[tuple[SecretReference, ...], *NOT_EMPTY]
    """Secrets with the keys: each entry is the name of a client and its key."""
    from_headers: Annotated[tuple[KeyHeader, ...], *NOT_EMPTY] = DEFAULT_HEADERS
    """Headers that a key may be in; the first that a request has counts (default: x-api-key, then
    Authorization)."""

    @model_validator(mode="after")
    def _check(self) -> "APIKeyAuthenticationSpec":
        for field, names in (
            ("credentialRefs", [ref.name for ref in self.credential_refs]),
            ("fromHeaders", [header.name for header in self.from_headers]),
        ):
            again = [index for index, name in enumerate(names) if name in names[:index]]
            if again:
                raise invalid(*(Finding((field, index, "name"), "is named twice") for index in again))
        return self


class APIKeyAuthentication(BaseObject):
    """Says which clients may use the gateways that it selects, by keys that are checked and then removed."""

    kind: Literal["APIKeyAuthentication"]
    spec: APIKeyAuthenticationSpec

    def warnings(self) -> list[Finding]:
        """Tell of a selector that selects all."""
        return self.spec.selection_warnings()
