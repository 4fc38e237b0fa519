"""External authorization services, which the action CUSTOM of an AuthorizationPolicy asks.

The fields of Istio's MeshConfig.ExtensionProvider envoyExtAuthzHttp and envoyExtAuthzGrpc
(istio.mesh.v1alpha1), with the checks of Istio's pkg/config/validation/agent/extensionprovider.go.
"""

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema

from crds.meta import Model
from crds.problems import Finding
from crds.values import Port, PositiveDuration, ServiceName, header_name, invalid

STATUS_CODES = frozenset(
    {
        *(100, *range(200, 209), 226, *range(300, 306), 307, 308, *range(400, 418), *range(421, 425), 426),
        *(428, 429, 431, *range(500, 509), 510, 511),
    }
)
"""The status codes that Envoy answers with (envoy.type.v3.StatusCode)."""

_HEADER_VALUE = re.compile(r"[\t -~\x80-\U0010ffff]*")


def _status(text: str) -> str:
    if not (text.isascii() and text.isdecimal() and int(text) in STATUS_CODES):
        raise ValueError("must be a status code that Envoy knows, such as '403'")
    return text


def _header_pattern(text: str) -> str:
    if text == "*":
        raise ValueError(
            'a single wildcard ("*") is not supported, change it to either prefix or suffix match'
        )
    header_name(text)  # '*' may stand in a name
    return text


def _path_prefix(text: str) -> str:
    if text and not re.fullmatch(r"/[!-~]*", text):
        raise ValueError("must begin with '/' and hold visible ASCII characters only")
    return text


def _headers(headers: Mapping[str, str]) -> Mapping[str, str]:
    for name, value in headers.items():
        try:
            header_name(name)
        except ValueError as error:
            raise invalid(Finding((name,), str(error))) from None
        if not _HEADER_VALUE.fullmatch(value):
            raise invalid(Finding((name,), "must not hold control characters"))
    return headers


Flag = Annotated[bool, Field(strict=True)]

HeaderPattern = Annotated[
    str, AfterValidator(_header_pattern), WithJsonSchema({"type": "string", "minLength": 1})
]
"""The name of a header, or its beginning (`x-*`) or end (`*-id`)."""


class RequestBody(Model):
    """How much of a request's body the authorization service is sent."""

    max_request_bytes: Annotated[int, Field(ge=1, le=2**32 - 1, strict=True)]
    """What Envoy holds in memory; a longer body is answered 413, also with failOpen."""
    allow_partial_message: Flag = False
    """Send the first maxRequestBytes instead of the 413."""
    pack_as_bytes: Flag = False
    """Send bytes (raw_body), not text (body). For gRPC services only."""


class _EnvoyExtAuthz(Model):
    """What both protocols have."""

    service: ServiceName
    """Host of the service: `[<namespace>/]<host>`."""
    port: Port
    """Port of the service."""
    timeout: PositiveDuration = timedelta(seconds=600)
    """How long its answer may take; after that it counts as failed."""
    fail_open: Flag = False
    """Let requests pass while the service cannot be reached, or answers 5xx."""
    clear_route_cache: Flag = False
    """Choose the route anew, by the headers that the service set or removed."""
    status_on_error: Annotated[str, AfterValidator(_status)] | None = None
    """What clients are answered while the service cannot be reached (default: 403)."""
    include_request_body_in_check: RequestBody | None = None
    """Send the request's body, too."""


class EnvoyExtAuthzHttp(_EnvoyExtAuthz):
    """A service that answers 200 to the request's method, path and headers, or denies it."""

    path_prefix: Annotated[str, AfterValidator(_path_prefix)] = ""
    """Put in front of the request's path."""
    include_headers_in_check: tuple[HeaderPattern, ...] = ()
    """The former name of includeRequestHeadersInCheck."""
    include_request_headers_in_check: tuple[HeaderPattern, ...] = ()
    """Headers of the request that the service is sent, besides method, host, path and Authorization."""
    include_additional_headers_in_check: Annotated[Mapping[str, str], AfterValidator(_headers)] = {}
    """Fixed headers that the service is sent; they win over those of the request."""
    headers_to_upstream_on_allow: tuple[HeaderPattern, ...] = ()
    """Headers of the service's answer that are set in an allowed request."""
    headers_to_downstream_on_deny: tuple[HeaderPattern, ...] = ()
    """Headers of the service's answer that a denied client gets (default: all but the host)."""
    headers_to_downstream_on_allow: tuple[HeaderPattern, ...] = ()
    """Headers of the service's answer that are set in the response to an allowed request."""


class EnvoyExtAuthzGrpc(_EnvoyExtAuthz):
    """A service that implements envoy.service.auth.v3.Authorization. It gets all headers of the request."""
