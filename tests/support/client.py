"""A plain HTTP client that goes through a sidecar's HTTP proxy listener, and keeps all of the answer."""

import http.client
import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

MESSAGES = b'{"messages": [{"role": "user", "content": "Hi"}]}'
"""What an application sends: content only."""


@dataclass(frozen=True)
class Answer:
    """An HTTP answer; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the decoded body."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The OpenAI-style error of the body. Raises AssertionError for anything else."""
        assert self.headers.get("content-type") == "application/json", (self.headers, self.body)
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return dict(error)


class ProxyClient:
    """Sends requests as `http_proxy=http://ADDRESS:15080 curl http://HOST/PATH` does."""

    def __init__(self, address: str, port: int = 15080) -> None:
        self._address = (address, port)

    def request(
        self,
        host: str,
        body: bytes | None = MESSAGES,
        headers: Mapping[str, str] | None = None,
        *,
        method: str = "POST",
        path: str = "/",
        timeout: float = 60,
    ) -> Answer:
        """Send one request on a connection of its own. Raises IncompleteRead for a broken answer."""
        with self.open(host, body, headers, method=method, path=path, timeout=timeout) as response:
            answer_headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, answer_headers, response.read())

    @contextmanager
    def open(
        self,
        host: str,
        body: bytes | None = MESSAGES,
        headers: Mapping[str, str] | None = None,
        *,
        method: str = "POST",
        path: str = "/",
        timeout: float = 60,
    ) -> Iterator[http.client.HTTPResponse]:
        """Send one request on a connection of its own, and yield the answer once its headers are there."""
        connection = self._connection(host, timeout)
        try:
            target = self._target(host, path)
            connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            connection.putheader("Host", host)
            given = {name.lower() for name in headers or {}}
            if body is not None and "content-length" not in given and "transfer-encoding" not in given:
                connection.putheader("Content-Length", str(len(body)))
            if body is not None and "content-type" not in given:
                connection.putheader("Content-Type", "application/json")
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            connection.endheaders(body)
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()

    def raw(self, data: bytes, timeout: float = 60) -> Answer:
        """Send bytes as they are, and read one answer; one that comes before all is sent counts too."""
        with socket.create_connection(self._address, timeout=timeout) as connection:
            with suppress(ConnectionError):
                connection.sendall(data)
            with http.client.HTTPResponse(connection) as response:
                response.begin()
                answer_headers = {name.lower(): value for name, value in response.getheaders()}
                return Answer(response.status, answer_headers, response.read())

    def _connection(self, host: str, timeout: float) -> http.client.HTTPConnection:  # noqa: ARG002
        return http.client.HTTPConnection(*self._address, timeout=timeout)

    def _target(self, host: str, path: str) -> str:
        # A name on the request line and in Host, as proxies get it.
        return f"http://{host}{path}"


class GatewayClient(ProxyClient):
    """Sends requests as `curl http://ADDRESS:PORT/PATH --header 'host: HOST'` does, or over TLS.

    `tls` is what a connection for the TLS server name `sni` (default: the host) is made with.
    """

    def __init__(
        self, address: str, port: int = 80, tls: ssl.SSLContext | None = None, sni: str | None = None
    ) -> None:
        super().__init__(address, port)
        self._tls = tls
        self._sni = sni

    def _connection(self, host: str, timeout: float) -> http.client.HTTPConnection:
        connection = super()._connection(host, timeout)
        if self._tls is not None:
            connection.sock = self._tls.wrap_socket(
                socket.create_connection(self._address, timeout), server_hostname=self._sni or host
            )
        return connection

    def _target(self, host: str, path: str) -> str:  # noqa: ARG002
        return path
