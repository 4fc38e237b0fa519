"""The control plane's own authority: made once, renewed before its end, never a moment without trust."""

import base64
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from llmplane import meshca
from llmplane.certificates import CertificateAuthority
from llmplane.kubeapi import ApiError
from llmplane.meshca import MeshCA
from tests.unit.test_certificates import shake_hands

NAME = "llmplane.llmplane-system.svc"


class Secret:
    """The Secret llmplane-ca, as the API server has it."""

    namespace = "llmplane-system"

    def __init__(self) -> None:
        self.data: dict[str, str] = {}
        self.version = 1
        self.failure: ApiError | None = None

    async def get(self, path: str) -> dict[str, Any]:
        assert path == "/api/v1/namespaces/llmplane-system/secrets/llmplane-ca"
        if self.failure:
            raise self.failure
        return {"metadata": {"resourceVersion": str(self.version)}, "data": dict(self.data)}

    async def put(self, _: str, body: dict[str, Any]) -> None:
        if body["metadata"]["resourceVersion"] != str(self.version):
            raise ApiError(409, "the object has been modified")
        self.version += 1
        self.data = body["data"]

    def hold(self, *authorities: CertificateAuthority) -> None:
        self.data = meshca._data(authorities)

    @property
    def certificates(self) -> list[x509.Certificate]:
        return x509.load_pem_x509_certificates(base64.b64decode(self.data["ca.crt"]))


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def secret() -> Secret:
    return Secret()


def replica(secret: Any, folder: Path) -> MeshCA:
    folder.mkdir(exist_ok=True)
    return MeshCA(secret, folder, (NAME, "127.0.0.1"))


def ends_in(days: float) -> CertificateAuthority:
    return CertificateAuthority.create("llmplane", timedelta(days=days))


def issued_by(ca: MeshCA, authority: CertificateAuthority | x509.Certificate) -> bool:
    certificate = authority if isinstance(authority, x509.Certificate) else authority.certificate
    leaf = x509.load_pem_x509_certificate(ca.certificate.read_bytes())
    try:
        leaf.verify_directly_issued_by(certificate)
    except Exception:  # noqa: BLE001 - of several kinds
        return False
    return True


async def test_the_first_replica_makes_the_authority_and_the_others_take_it(
    secret: Secret, tmp_path: Path
) -> None:
    first, second = replica(secret, tmp_path / "1"), replica(secret, tmp_path / "2")
    await first.start()
    await second.start()
    (authority,) = secret.certificates
    assert first.bundle == second.bundle
    assert issued_by(first, authority)
    assert issued_by(second, authority)
    assert first.certificate.read_bytes() != second.certificate.read_bytes()


async def test_whoever_trusts_the_bundle_trusts_the_certificate(secret: Secret, tmp_path: Path) -> None:
    import ssl  # noqa: PLC0415

    ca = replica(secret, tmp_path)
    await ca.start()
    client = ssl.create_default_context(cadata=ca.bundle)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(ca.certificate, ca.key)
    shake_hands(client, server, NAME)


async def test_of_two_that_make_one_at_once_one_wins(secret: Secret, tmp_path: Path, logs: list[Any]) -> None:
    loser = replica(secret, tmp_path / "1")
    get = secret.get

    async def late(path: str) -> dict[str, Any]:
        found = await get(path)
        secret.version += 1  # another replica writes just then
        return found

    secret.get = late  # type: ignore[method-assign]
    assert not await loser._look()
    assert "has been modified" in logs[-1]["problem"]
    secret.get = get  # type: ignore[method-assign]
    winner = replica(secret, tmp_path / "2")
    await winner.start()
    await loser.start()
    assert loser.bundle == winner.bundle


async def test_a_successor_is_trusted_long_before_it_issues(secret: Secret, tmp_path: Path) -> None:
    old = ends_in(300)
    secret.hold(old)
    ca = replica(secret, tmp_path)
    await ca.start()
    (first, second) = secret.certificates
    assert first == old.certificate
    assert second.not_valid_after_utc > datetime.now(UTC) + timedelta(days=3600)
    assert ca.bundle.encode() == base64.b64decode(secret.data["ca.crt"])
    assert issued_by(ca, old)
    await ca._look()
    assert len(secret.certificates) == 2


async def test_the_successor_issues_when_the_old_one_is_about_to_end(secret: Secret, tmp_path: Path) -> None:
    old, new = ends_in(20), ends_in(3000)
    secret.hold(new, old)
    ca = replica(secret, tmp_path)
    await ca.start()
    assert issued_by(ca, new)
    assert old.pem.decode() in ca.bundle


async def test_what_has_ended_is_not_trusted(secret: Secret, tmp_path: Path) -> None:
    secret.hold(ends_in(-0.01), ends_in(3000))
    ca = replica(secret, tmp_path)
    await ca.start()
    assert ca.bundle.count("BEGIN CERTIFICATE") == 1


async def test_a_certificate_is_renewed_at_half_of_its_time(secret: Secret, tmp_path: Path) -> None:
    ca = replica(secret, tmp_path)
    await ca.start()
    first = ca.certificate.read_bytes()
    await ca._look()
    assert ca.certificate.read_bytes() == first
    ca._renew = datetime.now(UTC)
    secret.failure = ApiError(0, "it does not answer")  # it needs nobody for that
    await ca._look()
    assert ca.certificate.read_bytes() != first
    end = x509.load_pem_x509_certificate(ca.certificate.read_bytes()).not_valid_after_utc
    assert ca._renew < end - timedelta(days=3)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"ca.crt": "YQ=="}, "llmplane-ca has no ca.key"),
        ({"ca.crt": "YQ==", "ca.key": "YQ=="}, "MalformedFraming"),
    ],
)
async def test_what_somebody_else_put_there_is_not_overwritten(
    data: dict[str, str], why: str, secret: Secret, tmp_path: Path, logs: list[Any]
) -> None:
    secret.data = data
    ca = replica(secret, tmp_path)
    assert not await ca._look()
    assert secret.data == data
    assert why in logs[-1]["problem"]


async def test_a_key_that_is_encrypted_is_not_overwritten(
    secret: Secret, tmp_path: Path, logs: list[Any]
) -> None:
    secret.hold(ends_in(3000))
    key = load_pem_private_key(base64.b64decode(secret.data["ca.key"]), None)
    encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    secret.data["ca.key"] = base64.b64encode(encrypted).decode()
    before = dict(secret.data)
    assert not await replica(secret, tmp_path)._look()
    assert secret.data == before
    assert "is encrypted" in logs[-1]["problem"]


async def test_an_authority_that_cannot_be_named_by_what_it_issues_is_not_used(
    secret: Secret, tmp_path: Path, logs: list[Any]
) -> None:
    """Verifiers find the one of several by its key's identifier."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "own CA")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=3000))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret.hold(CertificateAuthority(certificate, key))
    assert not await replica(secret, tmp_path)._look()
    assert "has no subject key identifier" in logs[-1]["problem"]


async def test_what_somebody_has_emptied_is_put_back(secret: Secret, tmp_path: Path) -> None:
    ca = replica(secret, tmp_path)
    await ca.start()
    before, secret.data = secret.data, {}
    await ca._look()
    assert secret.data == before


async def test_the_last_good_authority_stays_while_the_secret_is_broken(
    secret: Secret, tmp_path: Path
) -> None:
    ca = replica(secret, tmp_path)
    await ca.start()
    bundle = ca.bundle
    secret.data = {"ca.crt": "YQ==", "ca.key": "YQ=="}
    await ca._look()
    assert ca.bundle == bundle
