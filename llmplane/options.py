"""The forms that values on the command line have."""

from ipaddress import ip_address
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from llmplane.address import Address


class AddressType(click.ParamType[Address]):
    """HOST:PORT; an IPv6 address stands in brackets."""

    name = "HOST:PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        """Read the option's text."""
        try:
            return value if isinstance(value, Address) else Address.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ConnectToType(click.ParamType[tuple[Address, Address]]):
    """The form of curl's --connect-to."""

    name = "HOST:PORT:ADDR:PORT"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Address, Address]:
        """Read the option's text."""
        host, _, rest = str(value).partition(":")
        port, _, address = rest.partition(":")
        try:
            return Address.parse(f"{host.lower()}:{port}"), Address.parse(address)
        except ValueError:
            self.fail(f"{value!r} is not {self.name}", param, ctx)


class PairType(click.ParamType[tuple[str, str]]):
    """NAME=VALUE. The value may be a key, so that no error repeats it."""

    name = "NAME=VALUE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Read the option's text."""
        name, equals, rest = str(value).partition("=")
        if not equals or not name.strip():
            self.fail("it is not NAME=VALUE", param, ctx)
        return name, rest


class IPAddressType(click.ParamType[str]):
    """An IP address."""

    name = "ADDRESS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Read the option's text."""
        try:
            return str(ip_address(value))
        except ValueError:
            self.fail(f"{value!r} is not an IP address", param, ctx)


class NameType(click.ParamType[str]):
    """A name that Kubernetes would accept; ``form`` is its type in the object model."""

    name = "NAME"

    def __init__(self, form: Any) -> None:
        self._adapter: TypeAdapter[str] = TypeAdapter(form)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Read the option's text."""
        try:
            return self._adapter.validate_python(value)
        except ValidationError as error:
            why = error.errors()[0]["msg"].removeprefix("Value error, ")
            self.fail(f"{value!r} {why}", param, ctx)
