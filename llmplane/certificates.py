"""A certificate authority made on the spot: for a cluster, for the fake LLM of the demo, and for tests.

Its certificates carry everything that strict verifiers ask for (RFC 5280): BoringSSL in Envoy, and Python's
`ssl` with `VERIFY_X509_STRICT`, which is the default from Python 3.13.
"""

import os
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CA_LIFETIME = timedelta(days=30)
_LEAF_LIFETIME = timedelta(days=7)
_CLOCK_SKEW = timedelta(hours=1)
_SPIFFE = "spiffe://"
_CA_FILE = "ca.pem"
_CA_KEY_FILE = "ca-key.pem"


@dataclass(frozen=True)
class CertificateAuthority:
    """A root certificate and its key (EC P-256); made by `create` or `load_or_create`."""

    certificate: x509.Certificate
    _key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create(cls, common_name: str = "llmplane demo CA", lifetime: timedelta | None = None) -> Self:
        """Make a new authority, valid for 30 days if nothing else is said."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(common_name)
        public_key = key.public_key()
        certificate = (
            _builder(name, public_key, issuer=name, not_after=datetime.now(UTC) + (lifetime or _CA_LIFETIME))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @classmethod
    def load_or_create(cls, directory: Path) -> Self:
        """Return the authority of a directory; make it there if there is none or it ends within 7 days.

        Raises ValueError if the files hold something else than this class writes, OSError if they cannot be
        read or written.
        """
        try:
            found = cls.load((directory / _CA_FILE).read_bytes(), (directory / _CA_KEY_FILE).read_bytes())
        except FileNotFoundError:
            pass
        except ValueError as error:
            raise ValueError(f"{directory}: {_CA_FILE}, {_CA_KEY_FILE}: {error}; remove both") from error
        else:
            if found.ends > datetime.now(UTC) + _LEAF_LIFETIME:
                return found
        authority = cls.create()
        authority.write(directory)
        return authority

    @classmethod
    def load(cls, certificate_pem: bytes, key_pem: bytes) -> Self:
        """Read an authority that this class has written. Raises ValueError."""
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            key = load_pem_private_key(key_pem, password=None)
        except ValueError as error:
            raise ValueError("certificate or key is not PEM") from error
        except TypeError:
            raise ValueError("the key is encrypted") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
            raise ValueError("the key is not that of the certificate")
        try:
            certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        except x509.ExtensionNotFound:
            raise ValueError("the certificate has no subject key identifier") from None
        return cls(certificate, key)

    @property
    def ends(self) -> datetime:
        """When the authority's certificate expires."""
        return self.certificate.not_valid_after_utc

    @property
    def key_pem(self) -> bytes:
        """The key in PEM, for those who shall issue certificates."""
        return _key_pem(self._key)

    @property
    def pem(self) -> bytes:
        """The root certificate, for those who shall trust it."""
        return self.certificate.public_bytes(Encoding.PEM)

    def write(self, directory: Path) -> Path:
        """Write `ca.pem` and `ca-key.pem` (mode 0600) into a directory; return the path of the first.

        The directory is made if need be. `ca.pem` comes last, so a process that waits for it finds both.
        """
        directory.mkdir(parents=True, exist_ok=True)
        write_pair(directory / _CA_FILE, directory / _CA_KEY_FILE, (self.pem, _key_pem(self._key)))
        return directory / _CA_FILE

    def issue(self, *names: str) -> tuple[bytes, bytes]:
        """Issue a certificate for DNS names, IP addresses or a workload's SPIFFE identity, valid for 7 days.

        One with an identity (``spiffe://DOMAIN/ns/NAMESPACE/sa/NAME``) is for clients, too.

        Returns (certificate, key) in PEM. Raises ValueError without a name, and for a DNS name that is not
        ASCII.
        """
        if not names:
            raise ValueError("a server certificate needs at least one name")
        key = ec.generate_private_key(ec.SECP256R1())
        ca_key_id = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        usages = [ExtendedKeyUsageOID.SERVER_AUTH]
        if any(name.startswith(_SPIFFE) for name in names):
            usages.append(ExtendedKeyUsageOID.CLIENT_AUTH)
        not_after = min(datetime.now(UTC) + _LEAF_LIFETIME, self.certificate.not_valid_after_utc)
        certificate = (
            # The names are in the SAN only: no verifier reads the common name, which ends at 64 characters.
            _builder(
                _name("llmplane demo"), key.public_key(), issuer=self.certificate.subject, not_after=not_after
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_key_id), critical=False
            )
            .add_extension(
                x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(Encoding.PEM), _key_pem(key)

    def server_context(self, *names: str) -> ssl.SSLContext:
        """Make the TLS context of a server that has these names. Raises ValueError as `issue` does."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # OpenSSL's Python interface reads certificates from files only.
        with TemporaryDirectory() as directory:
            certificate, key = Path(directory, "cert.pem"), Path(directory, "key.pem")
            write_pair(certificate, key, self.issue(*names))
            context.load_cert_chain(certificate, key)
        return context

    def client_context(self) -> ssl.SSLContext:
        """Make the TLS context of a client that trusts this authority only, and verifies names."""
        return ssl.create_default_context(cadata=self.pem.decode())


def write_pair(certificate_file: Path, key_file: Path, pair: tuple[bytes, bytes]) -> None:
    """Write (certificate, key): the key first and with mode 0600, each file whole or not at all."""
    certificate, key = pair
    _write(key_file, key, 0o600)
    _write(certificate_file, certificate, 0o644)


def _write(path: Path, content: bytes, mode: int) -> None:
    with NamedTemporaryFile(dir=path.parent, delete=False) as file:  # has mode 0600
        file.write(content)
        os.fchmod(file.fileno(), mode)
    Path(file.name).replace(path)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(name: str) -> x509.GeneralName:
    if name.startswith(_SPIFFE):
        return x509.UniformResourceIdentifier(name)
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(
    subject: x509.Name, public_key: ec.EllipticCurvePublicKey, *, issuer: x509.Name, not_after: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _CLOCK_SKEW)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
