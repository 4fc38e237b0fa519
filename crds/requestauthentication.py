"""RequestAuthentication of Istio (security.istio.io): which tokens (JWT) a workload takes.

Fields and schema: istio/api security/v1 and Istio's crd-all.gen.yaml. Checks and their words: Istio's
pkg/config/validation (ValidateRequestAuthentication).
"""

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from crds.meta import BaseObject, Model
from crds.problems import Finding
from crds.selection import SelectingSpec
from crds.values import PositiveDuration, describe, header_name, invalid

DRY_RUN = "istio.io/dry-run"

_OUTPUT_HEADER = re.compile(r"[-_A-Za-z0-9]+")
_PRIVATE_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth"})
"""Members of a JSON Web Key that only its owner may know (RFC 7518, RFC 8037)."""
_KEY_MEMBERS = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x"), "oct": ("k",)}
"""Members that a key of a type must have (RFC 7518 section 6, RFC 8037 section 2)."""
_BINARY = frozenset({"n", "e", "x", "y", "k"})


class JwksUri(NamedTuple):
    """Where a key set is fetched from."""

    host: str
    port: int
    tls: bool
    path: str
    """With the query."""


def _jwks_uri(text: str) -> str:
    split_jwks_uri(text)
    return text


def split_jwks_uri(text: str) -> JwksUri:
    """Take an address apart. Raises `ValueError` where Istio's ParseJwksURI does, or no host is in it."""
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"}:
        raise ValueError(
            f'URI scheme "{parts.scheme}" is not supported: url must have scheme http:// or https://'
        )
    if not parts.hostname or not re.fullmatch(r"[!-~]+", text):
        raise ValueError("is no address of a key set: https://HOST/PATH")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user or a password: Envoy would not send them")
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(f"is no address: {error}") from None
    tls = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return JwksUri(parts.hostname, port or (443 if tls else 80), tls, path)


def _jwks(text: str) -> str:
    """Check a JSON Web Key Set. No text of an error holds a part of it: it may be a secret."""
    try:
        keys = json.loads(text)
    except ValueError as error:
        raise ValueError(f"jwks parse error: is no JSON ({getattr(error, 'msg', 'not readable')})") from None
    if not isinstance(keys, dict) or not isinstance(keys.get("keys"), list) or not keys["keys"]:
        raise ValueError('jwks parse error: must be a JSON object with a list "keys" that is not empty')
    for index, key in enumerate(keys["keys"]):
        problem = _key_problem(key)
        if problem:
            raise ValueError(f"jwks parse error: key {index} {problem}")
    return text


def _key_problem(key: Any) -> str:
    if not isinstance(key, dict):
        return f"must be an object, but is {describe(key)}"
    kind = key.get("kty")
    if kind not in _KEY_MEMBERS:
        return f'must have a "kty" of {", ".join(_KEY_MEMBERS)}'
    for name in _KEY_MEMBERS[kind]:
        value = key.get(name)
        if not isinstance(value, str) or not value or (name in _BINARY and not _is_base64url(value)):
            return f'must have a member "{name}"' + (" in base64url" if name in _BINARY else "")
    return ""


def _is_base64url(text: str) -> bool:
    try:
        base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


def public_jwks(jwks: str) -> str:
    """Return a key set without what is private of its keys; one without is returned as it is."""
    keys = json.loads(jwks)
    if not any(_PRIVATE_MEMBERS & key.keys() for key in keys["keys"]):
        return jwks
    public = [{name: key[name] for name in key if name not in _PRIVATE_MEMBERS} for key in keys["keys"]]
    return json.dumps({**keys, "keys": public})


def _header(text: str) -> str:
    if not text:
        raise ValueError("location header name must be non-empty string")
    header_name(text)
    return text


def _output_header(text: str) -> str:
    if not text:
        raise ValueError("outputClaimToHeaders header and claim value must be non-empty string")
    if not _OUTPUT_HEADER.fullmatch(text):
        raise ValueError(f"header name {text} is not a valid header name")
    return text


def _claim(text: str) -> str:
    if not text:
        raise ValueError("outputClaimToHeaders header and claim value must be non-empty string")
    return text


def _filled(message: str) -> AfterValidator:
    def check(text: str) -> str:
        if not text:
            raise ValueError(message)
        return text

    return AfterValidator(check)


class JWTHeader(Model):
    """A header that a token may be in."""

    name: Annotated[str, AfterValidator(_header)]
    """Name of the header."""
    prefix: str = ""
    """What stands in front of the token, such as "Bearer " (default: nothing)."""


class ClaimToHeader(Model):
    """A claim of a good token that is copied to a header."""

    header: Annotated[str, AfterValidator(_output_header)]
    """Name of the header."""
    claim: Annotated[str, AfterValidator(_claim)]
    """Name of the claim; a claim within a claim is named `a.b`."""


class Presence(StrEnum):
    """Whether a request must have a token."""

    OPTIONAL = "OPTIONAL"
    REQUIRED = "REQUIRED"


def _older_names(schema: dict[str, Any]) -> None:
    older = {**schema["properties"]["jwksUri"], "description": "The older name of jwksUri."}
    schema["properties"]["jwks_uri"] = older


class JWTRule(Model):
    """Tokens of one issuer: who made them, by which keys they are checked, and where they are."""

    model_config = ConfigDict(json_schema_extra=_older_names)

    issuer: str = ""
    """Claim `iss` of the tokens; empty = any."""
    audiences: tuple[Annotated[str, _filled("audience must be non-empty string")], ...] = ()
    """Claim `aud`: one of these must be in it (default: not looked at)."""
    jwks_uri: Annotated[str, Field(max_length=2048), AfterValidator(_jwks_uri)] | None = None
    """Where the key set is; the proxy fetches it."""
    jwks: Annotated[str, AfterValidator(_jwks)] | None = None
    """The key set itself (RFC 7517)."""
    from_headers: tuple[JWTHeader, ...] = ()
    """Headers with the token (default: Authorization, and the query parameter access_token)."""
    from_params: tuple[Annotated[str, _filled("location query must be non-empty string")], ...] = ()
    """Query parameters with the token."""
    from_cookies: tuple[Annotated[str, _filled("cookie name must be non-empty string")], ...] = ()
    """Cookies with the token."""
    output_payload_to_header: str = ""
    """Header that gets the content of a good token, in base64url."""
    output_claim_to_headers: tuple[ClaimToHeader, ...] = ()
    """Claims of a good token that are copied to headers."""
    forward_original_token: bool = False
    """Whether policies and logs still see the token. A provider never does."""
    timeout: PositiveDuration | None = None
    """How long fetching the key set may take (default: 5s)."""
    space_delimited_claims: Annotated[
        tuple[Annotated[str, _filled("must be non-empty string")], ...], Field(max_length=64)
    ] = ()
    """Claims that are lists of words, besides scope and permission."""
    presence: Presence = Presence.OPTIONAL
    """REQUIRED: a request without a token is refused."""

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, data: Any) -> Any:
        # Istio's CRD has both names.
        if isinstance(data, Mapping) and "jwks_uri" in data:
            if data.get("jwksUri") is not None:
                raise invalid(Finding(("jwks_uri",), "only one of jwks or jwksUri can be set"))
            return {"jwksUri" if name == "jwks_uri" else name: value for name, value in data.items()}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.issuer and not self.jwks_uri:
            raise ValueError("issuer or jwksUri must be non-empty string")
        if self.jwks_uri and self.jwks:
            raise invalid(Finding(("jwks",), "only one of jwks or jwksUri can be set"))
        if self.output_payload_to_header:
            try:
                header_name(self.output_payload_to_header)
            except ValueError as error:
                raise invalid(Finding(("outputPayloadToHeader",), str(error))) from None
        return self

    def warnings(self) -> Iterator[Finding]:
        """Tell of key sets that hold secrets, and of tokens that are shown."""
        for index, key in enumerate(json.loads(self.jwks)["keys"] if self.jwks else ()):
            if _PRIVATE_MEMBERS & key.keys():
                text = (
                    f"jwks key at index {index} contains private key material; "
                    "only public keys are used for verification"
                )
                yield Finding(("jwks",), text)
            elif key["kty"] == "oct":
                text = f"jwks key at index {index} is a secret: everyone who sees this object can sign"
                yield Finding(("jwks",), text)
        if self.jwks_uri and not split_jwks_uri(self.jwks_uri).tls:
            yield Finding(
                ("jwksUri",), "is fetched without TLS: who can change it on the way can sign tokens"
            )
        if self.from_params:
            text = "access logs show addresses, and so the tokens of refused requests"
            yield Finding(("fromParams",), text)
        if self.forward_original_token:
            text = "policies see the token, but it is not sent to a provider"
            yield Finding(("forwardOriginalToken",), text)


class RequestAuthenticationSpec(SelectingSpec):
    """Which tokens are taken, and where."""

    jwt_rules: Annotated[tuple[JWTRule, ...], Field(max_length=4096)] = ()
    """Tokens that are taken. One that is there must be good; whether one must be there says presence, or an
    AuthorizationPolicy (requestPrincipals)."""


class RequestAuthentication(BaseObject):
    """Says which tokens (JWT) the workloads take that it selects."""

    kind: Literal["RequestAuthentication"]
    spec: RequestAuthenticationSpec = Field(
        default_factory=lambda: RequestAuthenticationSpec.model_validate({})
    )

    @model_validator(mode="after")
    def _check_annotations(self) -> Self:
        if DRY_RUN in self.metadata.annotations:
            text = f"has unsupported annotation {DRY_RUN}, please remove the annotation"
            raise invalid(Finding(("metadata", "annotations", DRY_RUN), text))
        return self

    def warnings(self) -> list[Finding]:
        """Tell of what has no effect or shows more than it should."""
        findings = self.spec.selection_warnings()
        for index, rule in enumerate(self.spec.jwt_rules):
            place = ("spec", "jwtRules", index)
            findings += [Finding((*place, *finding.path), finding.message) for finding in rule.warnings()]
        return findings
