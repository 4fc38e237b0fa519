"""The control plane's own certificate authority, for its xDS port and its webhooks; it looks after itself.

Authorities are in the Secret `llmplane-ca` of its own namespace, which all replicas read; each issues its own
certificate of them, and keeps that in files that are read again when they change. A new authority is made a
year before the last one ends, trusted from then on, and issues only when the old one is about to end. So
whoever learned the authorities within that year needs to learn nothing new.
"""

import asyncio
import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from llmplane.certificates import CertificateAuthority, write_pair
from llmplane.kubeapi import Api, ApiError

_LOG = structlog.get_logger(__name__)

SECRET = "llmplane-ca"  # noqa: S105 - a name
"""Made by whoever installs llmplane, empty: so that llmplane needs no right to make Secrets."""
_CERTIFICATES, _KEYS = "ca.crt", "ca.key"
_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL)
_LIFETIME = timedelta(days=3650)
"""Of an authority (Istio's)."""
_SUCCESSOR = timedelta(days=365)
"""Before the end of an authority, when the next one is made."""
_ISSUES_UNTIL = timedelta(days=30)
"""Before its own end, if there is another one."""
_LOOK = 5.0
"""Seconds between two looks at the Secret."""


class MeshCA:
    """The authorities, and a certificate of this replica for `names`, as `certificate` and `key`."""

    def __init__(self, api: Api, directory: Path, names: Sequence[str]) -> None:
        self.certificate = directory / "tls.crt"
        self.key = directory / "tls.key"
        self._api = api
        self._path = f"/api/v1/namespaces/{api.namespace}/secrets/{SECRET}"
        self._names = names
        self._authorities: tuple[CertificateAuthority, ...] = ()
        self._issuer = b""
        """The certificate of the authority that issued ours."""
        self._renew = datetime.min.replace(tzinfo=UTC)

    @property
    def bundle(self) -> str:
        """The authorities that are to be trusted (PEM)."""
        return b"".join(each.pem for each in self._authorities).decode()

    async def start(self) -> None:
        """Make the certificate, as soon as the Secret can be read."""
        while True:
            if await self._look():
                return
            await asyncio.sleep(1)

    async def run(self) -> None:
        """Renew what is to be renewed until cancelled."""
        while True:
            await asyncio.sleep(_LOOK)
            await self._look()

    async def _look(self) -> bool:
        """Read the Secret, and issue a certificate if it is time; what was good stays where that fails."""
        try:
            await self._read()
        except (ApiError, ValueError) as error:
            _LOG.warning("the Secret of the certificate authority cannot be used", problem=str(error))
        try:
            self._issue()
        except OSError as error:
            _LOG.warning("the certificate cannot be written", problem=str(error))
        return bool(self._issuer)

    async def _read(self) -> None:
        secret = await self._api.get(self._path)
        now = datetime.now(UTC)
        # What somebody has emptied is put back: sidecars trust these.
        known = _authorities(secret["data"]) if secret.get("data") else list(self._authorities)
        found = [each for each in known if each.ends > now]
        has_successor = any(each.ends > now + _SUCCESSOR for each in found)
        if not has_successor:
            found.append(CertificateAuthority.create("llmplane", _LIFETIME))
        if not (has_successor and secret.get("data")):
            await self._api.put(self._path, {**secret, "data": _data(found)})
            _LOG.info("wrote the certificate authority", ends=found[-1].ends.isoformat())
        self._authorities = tuple(sorted(found, key=lambda each: each.ends))

    def _issue(self) -> None:
        if not self._authorities:
            return
        now = datetime.now(UTC)
        lasting = [each for each in self._authorities if each.ends > now + _ISSUES_UNTIL]
        issuer = (lasting or self._authorities[-1:])[0]
        if self._issuer == issuer.pem and now < self._renew:
            return
        pem, key = issuer.issue(*self._names)
        write_pair(self.certificate, self.key, (pem, key))
        end = x509.load_pem_x509_certificate(pem).not_valid_after_utc
        self._issuer, self._renew = issuer.pem, now + (end - now) / 2
        _LOG.info("issued a certificate for this replica", names=list(self._names), ends=end.isoformat())


def _authorities(data: Mapping[str, Any]) -> list[CertificateAuthority]:
    """Read the authorities of a Secret. Raises ValueError."""
    try:
        certificates, keys = (base64.b64decode(data[name]) for name in (_CERTIFICATES, _KEYS))
    except KeyError as error:
        raise ValueError(f"{SECRET} has no {error.args[0]}") from None
    pems = [each.public_bytes(Encoding.PEM) for each in x509.load_pem_x509_certificates(certificates)]
    return [CertificateAuthority.load(*pair) for pair in zip(pems, _KEY.findall(keys), strict=True)]


def _data(authorities: Iterable[CertificateAuthority]) -> dict[str, str]:
    parts = {
        _CERTIFICATES: b"".join(each.pem for each in authorities),
        _KEYS: b"".join(each.key_pem for each in authorities),
    }
    return {name: base64.b64encode(part).decode() for name, part in parts.items()}
