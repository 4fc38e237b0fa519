"""Tokens (JWT) and who makes them: a key, its key set (JWKS), and a server that a proxy fetches it from."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.support.serving import serving

FOREVER = 4102444800
"""The year 2100, in seconds since the epoch."""


class Issuer:
    """Makes tokens (RS256); `name` is their claim iss."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    @property
    def jwks(self) -> str:
        """The public key as a JSON Web Key Set."""
        numbers = self._key.public_key().public_numbers()
        key = {"kty": "RSA", "alg": "RS256", "use": "sig", "n": _number(numbers.n), "e": _number(numbers.e)}
        return json.dumps({"keys": [key]})

    def token(self, **claims: Any) -> str:
        """Make a token that never expires, unless a claim says otherwise."""
        return self.sign({"iss": self.name, "sub": "somebody", "exp": FOREVER, **claims})

    def sign(self, claims: dict[str, Any]) -> str:
        """Make a token of just these claims."""
        text = f"{_encode({'alg': 'RS256', 'typ': 'JWT'})}.{_encode(claims)}"
        return f"{text}.{_base64(self._key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


@dataclass
class KeyServer:
    """Answers each path with a text, all others with 404."""

    port: int
    texts: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def running_key_server() -> Iterator[KeyServer]:
    """Run a server on a free port of 127.0.0.1 until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.requests.append(self.path)
            body = keys.texts.get(self.path, "").encode()
            self.send_response(200 if body else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        keys = KeyServer(server.server_address[1])
        with serving(server):
            yield keys


def _encode(value: dict[str, Any]) -> str:
    return _base64(json.dumps(value).encode())


def _number(value: int) -> str:
    return _base64(value.to_bytes((value.bit_length() + 7) // 8))


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
