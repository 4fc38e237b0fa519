"""The kinds of Kubernetes itself that we read. The API server checks them, so unknown members are ignored."""

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, SecretBytes, SecretStr

from crds.meta import BaseObject, Model
from crds.values import Port


def _base64(value: object) -> SecretBytes:
    if isinstance(value, str):
        try:
            # Kubernetes takes line breaks, too.
            return SecretBytes(base64.b64decode("".join(value.split()), validate=True))
        except (binascii.Error, ValueError):
            pass
    raise ValueError("must be base64")


class Secret(BaseObject):
    """Keys of providers, certificates. Its values appear in no repr and no error."""

    model_config = ConfigDict(extra="ignore")

    kind: Literal["Secret"]
    type: str = "Opaque"
    data: Mapping[str, Annotated[SecretBytes, BeforeValidator(_base64)]] = {}
    """Values in base64."""
    string_data: Mapping[str, SecretStr] = {}
    """Values as text; they win over `data`."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the values."""
        return tuple(dict.fromkeys([*self.data, *self.string_data]))

    def value(self, key: str) -> bytes | None:
        """Return a value, or None where the Secret does not have it."""
        if key in self.string_data:
            return self.string_data[key].get_secret_value().encode()
        return self.data[key].get_secret_value() if key in self.data else None


class ServicePort(Model):
    """A port of a Service."""

    model_config = ConfigDict(extra="ignore")

    port: Port
    name: str = ""
    protocol: str = "TCP"
    target_port: int | str | None = None
    """Port of the pods, or its name."""

    @property
    def target(self) -> int:
        """The port of the pods, as far as the Service tells it: a name is known to the pods alone."""
        return self.target_port if isinstance(self.target_port, int) else self.port


class ServiceSpec(Model):
    """What a Service is."""

    model_config = ConfigDict(extra="ignore")

    ports: tuple[ServicePort, ...] = ()
    selector: Mapping[str, str] = {}
    cluster_ip: str | None = Field(None, alias="clusterIP")
    type: str = "ClusterIP"


class Service(BaseObject):
    """A Service: its name is a host that workloads call."""

    model_config = ConfigDict(extra="ignore")

    kind: Literal["Service"]
    spec: ServiceSpec = Field(default_factory=lambda: ServiceSpec.model_validate({}))
