"""Istio's mesh configuration (istio.mesh.v1alpha1 MeshConfig), as far as it is honoured."""

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from crds.meta import Model
from crds.values import Duration, Namespace


class MeshConfig(Model):
    """What holds for the whole mesh."""

    root_namespace: Namespace = "istio-system"
    """Namespace whose objects reach all workloads."""
    proxy_http_port: Annotated[int, Field(ge=0, le=65535, strict=True)] = 15080
    """Port of the sidecars' HTTP proxy listener; 0 for none."""
    connect_timeout: Duration = timedelta(seconds=10)
    """How long a connection to a provider may take, its TLS handshake included."""
