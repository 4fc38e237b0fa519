"""What options of several commands have in common: the forms of their values, and the options themselves."""

from collections.abc import Callable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import TypeAdapter, ValidationError

from crds.values import KubernetesName, Namespace
from llmplane import __version__
from llmplane.address import Address
from llmplane.bootstrap import XdsCredentials
from translator.proxy import ProxyType

_F = TypeVar("_F", bound=Callable[..., Any])
Pairs = tuple[tuple[str, str], ...]
"""Of options NAME=VALUE."""
ConnectTo = tuple[tuple[Address, Address], ...]
"""Of options --connect-to."""

EXISTING = click.Path(exists=True, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
PROXY_TYPES = {"sidecar": ProxyType.SIDECAR, "gateway": ProxyType.ROUTER}


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


def options(*given: Callable[[_F], _F]) -> Callable[[_F], _F]:
    """Join options to one decorator."""

    def apply(function: _F) -> _F:
        for option in reversed(given):
            function = option(function)
        return function

    return apply


SET = click.option(
    "--set",
    "settings",
    type=PairType(),
    multiple=True,
    help="Fill the placeholder ${NAME} of an apiKey. What is not set here comes from the environment: "
    "${ API_KEY of dashscope} from the variable API_KEY_OF_DASHSCOPE. May be given several times.",
)
MESH_CONFIG = click.option(
    "--mesh-config",
    type=EXISTING_FILE,
    metavar="FILE",
    help="Istio's mesh configuration (MeshConfig in YAML): access logs, extensionProviders, rootNamespace, "
    "trustDomain ... Read again by `llmplane serve` when it changes.",
)
MESH = options(
    MESH_CONFIG,
    click.option(
        "--connect-to",
        type=ConnectToType(),
        multiple=True,
        help="Have Envoy reach the provider HOST:PORT at ADDR:PORT, as with curl's option of this name; the "
        "certificate must still be HOST's. May be given several times.",
    ),
    click.option(
        "--ca-file",
        type=EXISTING_FILE,
        metavar="FILE",
        help="Trust the CA certificates of this PEM file too, for providers that no public CA knows.",
    ),
)
WORKLOAD = options(
    click.option(
        "--namespace",
        type=NameType(Namespace),
        default="default",
        show_default=True,
        help="The workload's namespace: it gets the objects of this one, and of the root namespace.",
    ),
    click.option(
        "--label",
        "labels",
        type=PairType(),
        multiple=True,
        help="A label of the workload, for workloadSelector and sourceLabels. May be given several times.",
    ),
)
CREDENTIALS = options(
    click.option(
        "--xds-ca-file",
        type=FILE,
        metavar="FILE",
        help="Speak TLS with `llmplane serve`; its certificate must be of this CA (PEM) and for the host of "
        "its address.",
    ),
    click.option(
        "--xds-client-cert-file",
        type=FILE,
        metavar="FILE",
        help="Mutual TLS: one's own certificate chain (PEM).",
    ),
    click.option(
        "--xds-client-key-file", type=FILE, metavar="FILE", help="Key of --xds-client-cert-file (PEM)."
    ),
    click.option(
        "--xds-token-file",
        type=FILE,
        metavar="FILE",
        help="Show `llmplane serve` the token that this file holds. Needs --xds-ca-file, or loopback.",
    ),
)
PROXY_IMAGE = click.option(
    "--proxy-image",
    default=f"llmplane-proxy:{__version__}",
    show_default=True,
    metavar="IMAGE",
    help="The image of injected proxies (deploy/image).",
)
PROXY = options(
    click.argument("kind", metavar="(sidecar|gateway)", type=click.Choice(list(PROXY_TYPES))),
    click.option(
        "--xds-address",
        type=AddressType(),
        default="127.0.0.1:18000",
        show_default=True,
        help="Where `llmplane serve` is.",
    ),
    CREDENTIALS,
    click.option(
        "--workload-cert",
        type=FILE,
        metavar="FILE",
        help="The workload's certificate chain (PEM), for mutual TLS between sidecars and gateways; it names "
        "the workload as spiffe://DOMAIN/ns/NAMESPACE/sa/NAME. Envoy alone reads this file and those below, "
        "and again when they change.",
    ),
    click.option("--workload-key", type=FILE, metavar="FILE", help="Key of --workload-cert (PEM)."),
    click.option(
        "--workload-ca", type=FILE, metavar="FILE", help="The CAs of the mesh's workload certificates (PEM)."
    ),
    click.option(
        "--workload",
        type=NameType(KubernetesName),
        required=True,
        help="Name of the workload that this Envoy is for, e.g. its Deployment's.",
    ),
    WORKLOAD,
    click.option(
        "--bind-address",
        type=IPAddressType(),
        default="127.0.0.1",
        show_default=True,
        help="Where this Envoy listens; with 127.0.0.2, 127.0.0.3 ... several run on one machine.",
    ),
    click.option(
        "--status-address",
        type=IPAddressType(),
        help="Where its metrics (port 15090) and its health (15021) are asked for, if not at --bind-address; "
        "0.0.0.0 for a Prometheus elsewhere.",
    ),
    click.option(
        "--capture",
        is_flag=True,
        help="Take what iptables redirects to port 15001 (a sidecar's deploy/image/capture.sh): applications "
        "need no proxy setting then.",
    ),
    click.option(
        "--capture-dns",
        is_flag=True,
        help="Take DNS queries too, on port 15053 (DNS_CAPTURE=true of capture.sh), for names that have no "
        "address. With --capture.",
    ),
    click.option(
        "--admin-port",
        type=click.IntRange(1, 65535),
        help="Open Envoy's admin interface on this port of 127.0.0.1. Without it, it is a Unix socket that "
        "only this user can open.",
    ),
)


def credentials_of(server: Address, settings: Mapping[str, Any]) -> XdsCredentials:
    """Return what CREDENTIALS gave, for a control plane at this address. Raises click.UsageError."""
    given = {name: settings[f"xds_{name}"] for name in XdsCredentials.__slots__}
    credentials = XdsCredentials(**{name: file and file.absolute() for name, file in given.items()})
    if (credentials.client_cert_file is None) != (credentials.client_key_file is None):
        raise click.UsageError("--xds-client-cert-file and --xds-client-key-file belong together")
    if credentials.client_cert_file and not credentials.ca_file:
        raise click.UsageError("--xds-client-cert-file needs --xds-ca-file: it is for mutual TLS")
    if credentials.token_file and not credentials.ca_file and not server.is_loopback:
        raise click.UsageError("--xds-token-file needs --xds-ca-file: tokens travel in clear without TLS")
    return credentials
