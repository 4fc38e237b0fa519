"""The errors that a client sees: OpenAI's JSON, also for the answers that Envoy makes itself.

Source of the form: https://platform.openai.com/docs/guides/error-codes; design decision 11.
"""

import json
from collections.abc import Mapping
from typing import Any

from google.protobuf.message import Message

from crds.llmprovider import MAX_REQUEST_BYTES
from xds import protos

JSON = "application/json"
LUA_METADATA = "llm"
"""Dynamic metadata namespace in which the Lua script marks its own answers (key ``error``)."""
LIMIT_METADATA = ("llm.limits", "maxRequestBytes")
"""Namespace and key of the metadata in which the cluster of a provider with a limit of its own tells it."""

_NO_API_KEY = ("missing_api_key", "unknown_api_key", "unkonwn_api_key", "missing_credentials")
"""Response code details of the API key filter; the misspelt one is that of older Envoys."""


def openai_error(message: str, kind: str, code: str) -> dict[str, Any]:
    """Make OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def local_reply_config() -> Message:
    """Turn Envoy's own answers into OpenAI's JSON; the first mapper that matches counts."""
    return protos.LocalReplyConfig(
        mappers=[
            _mapper(_denied(), _as_it_is("text/plain")),
            _mapper(
                {
                    "metadata_filter": {
                        "matcher": {
                            "filter": LUA_METADATA,
                            "path": [{"key": "error"}],
                            "value": {"bool_match": True},
                        },
                        "match_if_key_not_found": {"value": False},
                    }
                },
                _as_it_is(JSON),
            ),
            _error(
                _TUNNEL,
                "Tunnels (CONNECT) and upgrades (WebSocket) are not supported: send plain HTTP requests; TLS "
                "to the provider is made here.",
                "invalid_request_error",
                "unsupported_request",
                status=405,
            ),
            _error(
                _UNKNOWN_HOST,
                "No LLMRoute and no LLMProvider takes this request: %REQ(:AUTHORITY)%.",
                "invalid_request_error",
                "route_not_found",
            ),
            _error(
                _flags("NC"),
                "The LLMProvider that this request is routed to does not exist or cannot be used.",
                "server_error",
                "provider_not_found",
            ),
            _error(
                _details(' == "ext_authz_error"'),
                "The authorization service could not be asked.",
                "server_error",
                "authorization_unavailable",
            ),
            _error(
                _details('.startsWith("jwt_authn_access_denied")'),
                "%LOCAL_REPLY_BODY%",
                "authentication_error",
                "invalid_token",
            ),
            _error(
                _details(f" in {json.dumps(_NO_API_KEY)}"),
                "There is no API key in the request, or none that this gateway knows.",
                "authentication_error",
                "invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            ),
            _error(
                _status(421),
                "This connection was made for another TLS server name than %REQ(:AUTHORITY)%: connect anew.",
                "invalid_request_error",
                "misdirected_request",
            ),
            _error(
                _status(401),
                "The provider of this request has no API key: its Secret or apiKey is missing.",
                "authentication_error",
                "provider_key_missing",
            ),
            _error(
                _cel(
                    f'response.code == 413 && "{LIMIT_METADATA[0]}" in xds.cluster_metadata.filter_metadata'
                ),
                f"The request body is larger than %METADATA(CLUSTER:{':'.join(LIMIT_METADATA)})% bytes.",
                "invalid_request_error",
                "request_too_large",
            ),
            _error(
                _status(413),
                f"The request body is larger than {MAX_REQUEST_BYTES} bytes.",
                "invalid_request_error",
                "request_too_large",
            ),
            _error(
                _flags("UT", "UPE", "SI", "DT"),
                "The provider did not answer in time.",
                "server_error",
                "timeout",
            ),
            _error(
                _flags("UF", "UH", "UC", "UR", "URX", "LR"),
                "The provider could not be reached or broke off: %RESPONSE_CODE_DETAILS%.",
                "server_error",
                "provider_unreachable",
            ),
            _error(
                _flags("RL"),
                "Rate limit reached: all tokens of the limit are used. Retry after the time in retry-after.",
                "tokens",
                "rate_limit_exceeded",
            ),
            _error(
                _flags("RLSE"),
                "The rate limit service could not be asked.",
                "server_error",
                "rate_limit_unavailable",
            ),
            _error(
                _flags("UO"),
                "The provider has too many requests under way.",
                "server_error",
                "overloaded",
                headers={"retry-after": "1"},
            ),
            _error(
                _status(499, "LE"),
                "The request cannot be used: %RESPONSE_CODE_DETAILS%.",
                "invalid_request_error",
                "bad_request",
            ),
        ],
        body_format={
            "json_format": openai_error(
                "The proxy cannot answer: %RESPONSE_CODE_DETAILS%.", "server_error", "internal_error"
            ),
            "content_type": JSON,
        },
    )


def _mapper(filter_: dict[str, Any], body: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"filter": filter_, "body_format_override": body, **more}


def _as_it_is(content_type: str) -> dict[str, Any]:
    return {"text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"}, "content_type": content_type}


def _denied() -> dict[str, Any]:
    """Match what an AuthorizationPolicy denied: seed 004 has Envoy's own text, `RBAC: access denied`.

    An authorization service has its own text, and its own content type, which Envoy keeps.
    """
    return _details('.startsWith("rbac_access_denied") || response.code_details == "ext_authz_denied"')


def _details(condition: str) -> dict[str, Any]:
    """Match by Envoy's response code details; the condition is what follows them in CEL."""
    return _cel(f"response.code_details{condition}")


def _cel(expression: str) -> dict[str, Any]:
    made = protos.ExpressionFilter(expression=expression)
    return {"extension_filter": {"name": "cel", "typed_config": protos.pack(made)}}


def _error(
    filter_: dict[str, Any],
    message: str,
    kind: str,
    code: str,
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """``status`` replaces Envoy's, ``headers`` are added to the answer."""
    body = {"json_format": openai_error(message, kind, code), "content_type": JSON}
    more: dict[str, Any] = {"status_code": {"value": status}} if status else {}
    if headers:
        more["headers_to_add"] = [
            {"header": {"key": name, "value": value}} for name, value in headers.items()
        ]
    return _mapper(filter_, body, **more)


def _flags(*flags: str) -> dict[str, Any]:
    return {"response_flag_filter": {"flags": flags}}


def _status(status: int, operator: str = "EQ") -> dict[str, Any]:
    value = {"default_value": status, "runtime_key": f"llmplane.status.{status}"}
    return {"status_code_filter": {"comparison": {"op": operator, "value": value}}}


def _header(name: str, **match: Any) -> dict[str, Any]:
    return {"header_filter": {"header": {"name": name, **match}}}


_TUNNEL = {
    "or_filter": {
        "filters": [
            _header(":method", string_match={"exact": "CONNECT"}),
            # Envoy refuses an upgrade that no upgrade_configs allow with 403.
            {"and_filter": {"filters": [_status(403), _header("upgrade", present_match=True)]}},
        ]
    }
}

_HAS_OWN_LIMIT = _cel(
    f'response.code == 413 && "{LIMIT_METADATA[0]}" in xds.cluster_metadata.filter_metadata'
)

_UNKNOWN_HOST = {"and_filter": {"filters": [_status(404), _flags("NR", "NC")]}}
"""No route, or on a sidecar no cluster of the host's name (translator.routes)."""
