"""Addresses as they are written on the command line, and why one cannot be listened on."""

import os
import socket
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


class AddressInUseError(RuntimeError):
    """An address cannot be listened on; the text names the option and says why."""

    @classmethod
    def of(cls, option: str, address: Address, error: Exception) -> Self:
        """Say why in the system's words."""
        why = str(error)
        if isinstance(error, OSError) and error.errno:  # asyncio puts words around the system's own
            why = str(error.strerror) if isinstance(error, socket.gaierror) else os.strerror(error.errno)
        return cls(f"{option} {address}: {why}")


def check_free(address: Address) -> None:
    """Raise OSError if an address cannot be listened on; gRPC's own error says nothing."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(tuple(address))
