"""Addresses as they are written on the command line."""

from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any, NamedTuple, Self

import click


class Address(NamedTuple):
    """HOST:PORT; an IPv6 address stands in brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read HOST:PORT. Raises ValueError."""
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"{text!r} is not HOST:PORT")
        return cls(host.removeprefix("[").removesuffix("]"), int(port))

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


class AddressType(click.ParamType[Address]):
    """An option of the form HOST:PORT."""

    name = "HOST:PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        """Read the option's text."""
        try:
            return value if isinstance(value, Address) else Address.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ConnectToType(click.ParamType[tuple[Address, Address]]):
    """curl's --connect-to: HOST:PORT:ADDRESS:PORT."""

    name = "HOST:PORT:ADDR:PORT"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Address, Address]:
        """Read the option's text."""
        parts: Sequence[str] = str(value).split(":", 2)
        try:
            if len(parts) != 3:  # noqa: PLR2004 - host, port, address
                raise ValueError(f"{value!r} is not HOST:PORT:ADDR:PORT")  # noqa: TRY301 - one way out
            return Address.parse(f"{parts[0]}:{parts[1]}"), Address.parse(parts[2])
        except ValueError as error:
            self.fail(str(error), param, ctx)
