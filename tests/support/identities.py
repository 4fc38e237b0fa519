"""Certificates of proxies: what a mesh's own CA would issue to them."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from llmplane.certificates import write_pair

_numbers = count()


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in PEM."""

    certificate: bytes
    key: bytes

    def write(self, directory: Path, name: str) -> tuple[Path, Path]:
        """Write NAME.pem and NAME-key.pem, each at once; return their paths."""
        files = directory / f"{name}.pem", directory / f"{name}-key.pem"
        write_pair(*files, (self.certificate, self.key))
        return files


class MeshCA:
    """Issues certificates to proxies."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = f"mesh CA {next(_numbers)}"  # of two with one name, BoringSSL tries only the first
        self._chain = b""
        self.pem = _authority(self._name, self._key, self._name, self._key)

    def intermediate(self, *, is_ca: bool = True) -> "MeshCA":
        """Make a CA of this CA, whose certificate goes along with those that it issues."""
        made = MeshCA()
        made._chain = made.pem = _authority(made._name, made._key, self._name, self._key, is_ca=is_ca)
        return made

    def issue(self, *names: str, days: float = 1) -> Pair:
        """Issue a client certificate for URIs (with a scheme) and DNS names; negative `days`: expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        sans = [x509.UniformResourceIdentifier(n) if ":" in n else x509.DNSName(n) for n in names]
        builder = _builder("proxy", self._name, key, days).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Pair(certificate.public_bytes(Encoding.PEM) + self._chain, pem)


def _authority(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    is_ca: bool = True,
) -> bytes:
    constraints = x509.BasicConstraints(ca=is_ca, path_length=1 if is_ca and issuer == name else None)
    builder = _builder(name, issuer, key, days=30).add_extension(constraints, critical=True)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _builder(
    subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=days))
    )
