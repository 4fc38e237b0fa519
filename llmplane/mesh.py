"""Mesh-wide settings from the command line and the mesh configuration file."""

from collections.abc import Sequence
from pathlib import Path

import certifi
import click
import yaml
from cryptography import x509
from pydantic import ValidationError

from crds.meshconfig import MeshConfig
from crds.problems import field_name
from crds.validation import findings
from llmplane.address import Address
from translator.world import MeshSettings

_SYSTEM_CA = Path("/etc/ssl/certs/ca-certificates.crt")


def mesh_settings(
    mesh_config: Path | None, connect_to: Sequence[tuple[Address, Address]], ca_file: Path | None
) -> MeshSettings:
    """Read the settings. Raises click.ClickException that names file and field."""
    config = _read(mesh_config) if mesh_config else MeshConfig()
    return MeshSettings(
        root_namespace=config.root_namespace,
        proxy_http_port=config.proxy_http_port,
        connect_timeout=config.connect_timeout,
        connect_to=dict(connect_to),
        trusted_ca=_trust_roots(ca_file),
    )


def _read(file: Path) -> MeshConfig:
    try:
        return MeshConfig.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.ClickException(f"{file}: {error}") from None
    except ValidationError as error:
        found = findings(MeshConfig, error)
        texts = [f"{file}: {field_name(finding.path)}: {finding.message}" for finding in found]
        raise click.ClickException("\n".join(texts)) from None


def _trust_roots(ca_file: Path | None) -> bytes:
    """Return the machine's trust roots (certifi's, where it has none) and the CA given besides, as PEM."""
    system = _SYSTEM_CA if _SYSTEM_CA.exists() else Path(certifi.where())
    own = _certificates(ca_file) + b"\n" if ca_file else b""
    return own + system.read_bytes()


def _certificates(file: Path) -> bytes:
    """Read a file of PEM certificates. A proxy would refuse anything else, and reach no provider."""
    try:
        pem = file.read_bytes()
        x509.load_pem_x509_certificates(pem)
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}") from None
    except ValueError:
        raise click.ClickException(f"{file}: has no CA certificate in PEM form") from None
    return pem
