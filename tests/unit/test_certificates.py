"""The certificate authority of the fake LLM: strict TLS clients accept what it issues, for its names only."""

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from llmplane import certificates
from llmplane.certificates import CertificateAuthority


def shake_hands(client_context: ssl.SSLContext, server_context: ssl.SSLContext, server_name: str) -> None:
    """Do a TLS handshake in memory; raises ssl.SSLCertVerificationError if the client refuses."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=server_name)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    for end in (client, server, client, server):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue


@pytest.mark.parametrize(
    "name", ["dashscope.aliyuncs.com", "127.0.0.1", "::1", "localhost", "a" * 63 + ".very-long.test"]
)
def test_a_strict_client_that_trusts_the_authority_accepts_the_names_of_a_certificate(name: str) -> None:
    authority = CertificateAuthority.create()
    client_context = authority.client_context()
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    shake_hands(client_context, authority.server_context("api.moonshot.cn", name), name)


def test_a_certificate_is_not_valid_for_another_name() -> None:
    authority = CertificateAuthority.create()
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(
            authority.client_context(), authority.server_context("api.moonshot.cn"), "dashscope.aliyuncs.com"
        )


def test_a_client_of_another_authority_refuses() -> None:
    authority, other = CertificateAuthority.create(), CertificateAuthority.create()
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        shake_hands(other.client_context(), authority.server_context("localhost"), "localhost")


def test_a_certificate_says_what_it_is_for() -> None:
    authority = CertificateAuthority.create()
    pem, _ = authority.issue("api.moonshot.cn", "127.0.0.1")
    leaf = x509.load_pem_x509_certificate(pem)
    leaf.verify_directly_issued_by(authority.certificate)

    basic = leaf.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca) == (True, False)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["api.moonshot.cn"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    issuer_key = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    ca_key = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert issuer_key.key_identifier == ca_key.digest


def test_a_certificate_of_a_workload_is_for_clients_too() -> None:
    identity = "spiffe://cluster.local/ns/default/sa/sleep"
    pem, _ = CertificateAuthority.create().issue(identity)
    leaf = x509.load_pem_x509_certificate(pem)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [identity]
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}


@pytest.mark.parametrize("names", [[], ["bücher.example"]])
def test_a_certificate_needs_a_name_that_certificates_can_hold(names: list[str]) -> None:
    authority = CertificateAuthority.create()
    with pytest.raises(ValueError, match=r"at least one name|ascii|A-label"):
        authority.issue(*names)


def test_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    authority = CertificateAuthority.create()
    assert authority.write(tmp_path / "new" / "ca") == tmp_path / "new" / "ca" / "ca.pem"
    certificates.write_pair(tmp_path / "cert.pem", tmp_path / "key.pem", authority.issue("localhost"))

    files = [
        tmp_path / "new/ca/ca.pem",
        tmp_path / "new/ca/ca-key.pem",
        tmp_path / "cert.pem",
        tmp_path / "key.pem",
    ]
    assert [oct(file.stat().st_mode & 0o777) for file in files] == ["0o644", "0o600", "0o644", "0o600"]
    assert "PRIVATE" not in repr(authority)


def test_a_directory_keeps_its_authority(tmp_path: Path) -> None:
    first = CertificateAuthority.load_or_create(tmp_path)
    second = CertificateAuthority.load_or_create(tmp_path)
    assert first.pem == second.pem == (tmp_path / "ca.pem").read_bytes()
    shake_hands(first.client_context(), second.server_context("localhost"), "localhost")


def test_an_authority_that_ends_soon_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "_CA_LIFETIME", certificates._LEAF_LIFETIME / 2)
        old = CertificateAuthority.load_or_create(tmp_path)
    new = CertificateAuthority.load_or_create(tmp_path)
    assert new.pem != old.pem
    assert new.pem == (tmp_path / "ca.pem").read_bytes()


def test_a_key_that_does_not_belong_to_the_certificate_is_an_error(tmp_path: Path) -> None:
    CertificateAuthority.create().write(tmp_path)
    key = (tmp_path / "ca-key.pem").read_bytes()
    CertificateAuthority.create().write(tmp_path)
    (tmp_path / "ca-key.pem").write_bytes(key)
    with pytest.raises(ValueError, match=r"ca-key\.pem: the key is not that of the certificate"):
        CertificateAuthority.load_or_create(tmp_path)
