"""Mesh-wide settings from the command line and the mesh configuration file."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import certifi
import click
from cryptography import x509

from crds.meshconfig import MeshConfig, load_mesh_config
from crds.problems import Problem, Severity
from llmplane.address import Address
from llmplane.sources.watch import changes
from translator.world import MeshSettings

_SYSTEM_CA = Path("/etc/ssl/certs/ca-certificates.crt")


def mesh_settings(
    mesh_config: Path | None, connect_to: Sequence[tuple[Address, Address]], ca_file: Path | None
) -> MeshSettings:
    """Read the settings. Raises click.ClickException that names file and field."""
    settings = MeshSettings(connect_to=dict(connect_to), trusted_ca=_trust_roots(ca_file))
    return MeshConfigFile(mesh_config, settings).settings if mesh_config else settings


class MeshConfigFile:
    """The mesh configuration file, read again when it changes. While it is broken, what it was stays."""

    def __init__(self, file: Path, settings: MeshSettings) -> None:
        """Raise click.ClickException that names file and field: it begins with a good version."""
        self._file = file
        self._text = ""
        self.settings = settings
        self.problems: tuple[Problem, ...] = ()
        if not self._read():
            raise click.ClickException("\n".join(map(str, self.problems)))

    async def states(self, stop: asyncio.Event) -> AsyncIterator[MeshSettings]:
        """Yield the settings after each change of them, or of what is wrong with the file."""
        async for _ in changes([self._file], self._look, stop):
            before = (self.settings.config, self.problems)
            self._read()
            if (self.settings.config, self.problems) != before:
                yield self.settings

    def _look(self) -> object:
        try:
            status = self._file.stat()
        except OSError as error:
            return error.errno
        return (status.st_ino, status.st_size, status.st_mtime_ns)

    def _read(self) -> bool:
        """Take over what the file holds, unless it is broken."""
        config: MeshConfig | None = None
        try:
            text = self._file.read_bytes().decode(errors="surrogateescape")
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
            self.problems = (Problem(Severity.ERROR, str(self._file), 0, "", "", "", "", problem),)
        else:
            if (
                not text and self._text
            ):  # `generate > mesh.yaml` has emptied the file long before it is written
                return False
            self._text = text
            config, found = load_mesh_config(text, str(self._file))
            self.problems = tuple(found)
        if config is None:
            return False
        if config != self.settings.config:
            self.settings = replace(self.settings, config=config)
        return True


def _trust_roots(ca_file: Path | None) -> bytes:
    """Return the machine's trust roots (certifi's, where it has none) and the CA given besides, as PEM."""
    system = _SYSTEM_CA if _SYSTEM_CA.exists() else Path(certifi.where())
    own = read_certificates(ca_file) + b"\n" if ca_file else b""
    return own + system.read_bytes()


def read_certificates(file: Path) -> bytes:
    """Read a file of CA certificates (PEM), for a proxy, which would refuse anything else.

    Raises ClickException.
    """
    try:
        pem = file.read_bytes()
        x509.load_pem_x509_certificates(pem)
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}") from None
    except ValueError:
        raise click.ClickException(f"{file}: has no CA certificate in PEM form") from None
    return pem
