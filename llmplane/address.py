"""Addresses as they are written on the command line."""

from ipaddress import ip_address
from typing import NamedTuple, Self

_HIGHEST_PORT = 65535


class Address(NamedTuple):
    """HOST:PORT; an IPv6 address stands in brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read HOST:PORT. Raises ValueError."""
        host, _, port = text.rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        in_brackets = host == f"[{bare}]"
        is_port = port.isascii() and port.isdecimal() and int(port) <= _HIGHEST_PORT
        if not bare or not is_port or in_brackets != (":" in bare):
            raise ValueError(f"{text!r} is not HOST:PORT")
        return cls(bare, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"
