"""The API server of Kubernetes: requests on raw paths, with the credentials that kubectl or a pod has.

Of the `kubernetes` package only configuration, authentication and transport are used: its models cost many
times what JSON costs, and its watches know neither a list nor a store (llmplane.sources.reflector).
"""

import copy
import json
import os
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, Self

import aiohttp
import structlog
import yaml
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

_LOG = structlog.get_logger(__name__)

_REQUEST = aiohttp.ClientTimeout(total=30, sock_connect=5)
_SILENCE = 150
"""Seconds of silence after which a watch is given up: an API server sends a bookmark about once a minute."""
_UNAUTHORIZED = 401
_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount")

_BROKEN = (aiohttp.ClientError, OSError, ValueError)  # a timeout is an OSError

APPLY = "application/apply-patch+yaml"
"""Server-side apply; JSON is YAML."""


class NoClusterError(RuntimeError):
    """It is not known where the API server is, or the credentials cannot be used; the text says why."""


class ApiError(RuntimeError):
    """The API server refused a request, or could not be asked (status 0)."""

    def __init__(self, status: int, message: str, retry_after: float = 0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        """Seconds that the API server asks to wait."""

    @property
    def is_passing(self) -> bool:
        """Whether the API server could not answer, and the request itself may be right."""
        return self.status in {0, 429} or self.status >= 500  # noqa: PLR2004 - HTTP

    @property
    def is_of_request(self) -> bool:
        """Whether the request itself was refused; credentials that were (401) are read again."""
        return not self.is_passing and self.status != _UNAUTHORIZED


class Api:
    """An API server. Close it in the end."""

    def __init__(self, client: Any, namespace: str, context: str | None) -> None:
        self._client = client
        self._context = context
        self._forms = ("", "")
        """In which form objects and lists are asked for, if not whole."""
        self.namespace = namespace
        """The pod's namespace, or that of kubectl's context."""

    @classmethod
    async def connect(cls, context: str | None = None) -> Self:
        """Take kubectl's configuration ($KUBECONFIG, ~/.kube/config), or within a pod that of the pod.

        Raises NoClusterError.
        """
        configuration, namespace = await _configuration(context)
        return cls(ApiClient(configuration), namespace, context)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    def of_metadata(self) -> Self:
        """Return this API server with the metadata of objects only, whatever they are."""
        narrow = copy.copy(self)
        narrow._forms = ("PartialObjectMetadata", "PartialObjectMetadataList")  # noqa: SLF001 - one's own
        return narrow

    async def get(self, path: str, **query: str | int) -> dict[str, Any]:
        """Return an object or a list. Raises ApiError."""
        return await self._request("GET", path, query)

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Make an object. Raises ApiError, with 409 if it is there."""
        return await self._request("POST", path, {}, body)

    async def put(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Replace an object. Raises ApiError, with 409 if its resourceVersion is not the newest."""
        return await self._request("PUT", path, {}, body)

    async def apply(self, path: str, body: Mapping[str, Any], manager: str) -> dict[str, Any]:
        """Apply these fields of an object (server-side apply), and take them from whoever set them.

        Raises ApiError.
        """
        return await self._request("PATCH", path, {"fieldManager": manager, "force": "true"}, body)

    async def watch(self, path: str, **query: str | int) -> AsyncGenerator[dict[str, Any]]:
        """Begin a watch, and return its events, until it ends. Raises ApiError.

        So do the events: where the connection breaks, and for an event that is an error.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=_SILENCE)
        try:
            return _events(await self._send("GET", path, {**query, "watch": "true"}, None, timeout))
        except _BROKEN as error:
            raise ApiError(0, _reason(error)) from None

    async def _request(
        self, method: str, path: str, query: Mapping[str, str | int], body: Any = None
    ) -> dict[str, Any]:
        try:
            response = await self._send(method, path, query, body, _REQUEST)
            async with response:
                answer: dict[str, Any] = json.loads(await response.read())
                return answer
        except _BROKEN as error:
            raise ApiError(0, _reason(error)) from None

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | int],
        body: Any,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - the client's own
    ) -> aiohttp.ClientResponse:
        form = self._forms["watch" not in query]
        accept = f"application/json;as={form};g=meta.k8s.io;v=v1" if form else "application/json"
        headers = {"Accept": accept, "User-Agent": "llmplane"}
        if body is not None:
            headers["Content-Type"] = APPLY if method == "PATCH" else "application/json"
        try:
            request = await self._client.param_serialize(
                method,
                path,
                query_params=list(query.items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
        except ConfigException as error:
            raise ApiError(0, str(error)) from None
        answer = await self._client.call_api(*request, _request_timeout=timeout)
        response: aiohttp.ClientResponse = answer.response
        if response.status < 300:  # noqa: PLR2004 - HTTP
            return response
        async with response:
            refusal = _refusal(response, await response.read())
        if refusal.status == _UNAUTHORIZED:
            await self._renew_credentials()
        raise refusal

    async def _renew_credentials(self) -> None:
        """Read the credentials again: they were changed, or a program of the kubeconfig makes new ones."""
        try:
            configuration, _ = await _configuration(self._context)
        except NoClusterError as error:
            _LOG.warning("credentials for the API server cannot be read", problem=str(error))
            return
        now = self._client.configuration
        now.api_key = configuration.api_key
        now.refresh_api_key_hook = configuration.refresh_api_key_hook
        if configuration.cert_file:
            context = self._client.rest_client.ssl_context
            context.load_cert_chain(configuration.cert_file, keyfile=configuration.key_file)


async def _events(response: aiohttp.ClientResponse) -> AsyncGenerator[dict[str, Any]]:
    try:
        async with response:
            rest = b""
            async for piece in response.content.iter_any():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        status = event["object"]
                        raise ApiError(int(status.get("code", 500)), str(status.get("message", "")))
                    yield event
    except _BROKEN as error:
        raise ApiError(0, _reason(error)) from None


async def _configuration(context: str | None) -> tuple[Any, str]:
    """Return where the API server is and how to speak with it, and one's own namespace."""
    configuration = Configuration()
    configuration.connection_pool_maxsize = 0  # each watch has a connection of its own
    try:
        if context is None and (_POD / "token").exists() and "KUBECONFIG" not in os.environ:
            load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            return configuration, (_POD / "namespace").read_text(encoding="utf-8").strip()
        loader = await load_kube_config(  # type: ignore[no-untyped-call]
            context=context, client_configuration=configuration, persist_config=False
        )
        return configuration, str(loader.current_context["context"].get("namespace") or "default")
    except (ConfigException, OSError, yaml.YAMLError) as error:
        raise NoClusterError(f"no cluster can be reached: {error}") from None


def _refusal(response: aiohttp.ClientResponse, body: bytes) -> ApiError:
    """Make the error of an answer; Kubernetes puts its reason into a Status object."""
    try:
        message = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        message = response.reason or "no reason given"
    try:
        retry_after = float(response.headers.get("Retry-After", 0))
    except ValueError:
        retry_after = 0
    return ApiError(response.status, message, retry_after)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it does not answer"
    if isinstance(error, ValueError):
        return "its answer cannot be read"
    return str(error) or type(error).__name__
