"""Who may get configuration: TLS on the xDS port, client certificates, and bearer tokens.

A stream is authenticated when it begins: `FileAuthenticator` makes an `Identity` of what the peer proves,
and the identity then admits what the peer claims in its node message, or does not (as Istio does in its
`pilot/pkg/xds/auth.go`). When the files change, that is done again, for a CA too: a connection was verified
when it began, and its certificate need not be of a CA of today. Another way to prove something is another
`xds.server.Authenticator` that returns an `Identity`, such as llmplane.serviceaccounts.

All files are read again when the next peer comes and every second, so a change needs no restart. One that
cannot be read then changes nothing: the last good content stays in use, and the log says so. No text here
holds a token.
"""

import hashlib
import hmac
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Generic, TypeVar

import grpc
import structlog
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from pydantic import TypeAdapter, ValidationError

from crds.values import KubernetesName, Namespace
from llmplane.bootstrap import XdsCredentials
from llmplane.certificates import write_pair
from translator.proxy import Proxy, WorkloadCertificate
from xds.server import Node, NodeRejected, Peer, Unauthenticated

_LOG = structlog.get_logger(__name__)
_T = TypeVar("_T")

EVERY_NAMESPACE = "*"
_LONGEST_NAME = 320
"""Characters of NAMESPACE/WORKLOAD; what a peer claims may be any text."""
_SHORTEST_TOKEN = 16
"""Characters."""
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""RFC 6750, section 2.1."""
_SPIFFE = re.compile(r"spiffe://[^/]+/ns/([^/]+)/sa/[^/]+")
"""Istio's form of a SPIFFE ID."""
_SPIFFE_SCHEME = "spiffe:"
_SERVICE = "svc"
_NAMESPACE: TypeAdapter[str] = TypeAdapter(Namespace)
_NAME: TypeAdapter[str] = TypeAdapter(KubernetesName)


class CredentialsError(ValueError):
    """A file with certificates, keys or tokens cannot be used; the text names it and says why."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Which proxies somebody may be: of a namespace (`*`: all), and of one workload unless that is empty.

    `labels`, if not None, are the labels of the workload: its proxy may claim no other.
    """

    namespace: str
    workload: str = ""
    labels: frozenset[tuple[str, str]] | None = None

    def admits(self, proxy: Proxy) -> bool:
        """Whether a proxy may be what it claims."""
        return (
            self.namespace in (EVERY_NAMESPACE, proxy.namespace)
            and self.workload in ("", proxy.workload)
            and (self.labels is None or proxy.labels <= self.labels)
        )

    def __str__(self) -> str:
        """Return the form of the token file, without the token."""
        name = f"{self.namespace}/{self.workload}" if self.workload else self.namespace
        return " ".join([name, *(f"{key}={value}" for key, value in sorted(self.labels or ()))])


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a peer proved to be. Each of `proofs` says which proxies it may be, and all have to agree."""

    proofs: tuple[tuple[Grant, ...], ...]

    def admit(self, proxy: Proxy) -> Proxy:
        """Return the proxy that a peer claims to be, with the labels that it has been given.

        Raises NodeRejected (PERMISSION_DENIED) if it may not be that.
        """
        claimed = proxy
        for grants in self.proofs:
            grant = next((each for each in grants if each.admits(claimed)), None)
            if grant is None:
                name = f"{claimed.namespace}/{claimed.workload}"[:_LONGEST_NAME]
                raise NodeRejected(
                    f"a proxy of {name} with its labels is not what the credentials are for: "
                    f"{' or '.join(map(str, grants))}",
                    forbidden=True,
                )
            if grant.labels is not None:  # fewer than it has could evade a policy that selects by label
                proxy = replace(proxy, labels=grant.labels)
        return proxy

    def oversees(self, root_namespace: str) -> bool:
        """Whether it may see what concerns all: if it stands for every namespace, or for the root namespace.

        As in Istio, where the debug endpoints show all to its own namespace only.
        """
        namespaces = (EVERY_NAMESPACE, root_namespace)
        return all(
            any(grant.namespace in namespaces and not grant.workload for grant in grants)
            for grants in self.proofs
        )


class _Watched(Generic[_T]):
    """What files mean; read again on every call, and the last good meaning stays while they are broken."""

    def __init__(self, files: tuple[Path, ...], parse: Callable[[tuple[bytes, ...]], _T]) -> None:
        self._files = files
        self._parse = parse
        self._problem = ""
        self._revision = 0
        self._contents = self._read()
        self._value = parse(self._contents)

    def __call__(self) -> _T:
        try:
            contents = self._read()
            if contents != self._contents:
                self._value = self._parse(contents)
                self._contents = contents
                self._revision += 1
                _LOG.info("credentials read again", files=[str(file) for file in self._files])
            self._problem = ""
        except CredentialsError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                _LOG.error("credentials cannot be used; the last good ones stay in use", problem=str(error))
        return self._value

    def revision(self) -> int:
        """Return how often the meaning changed."""
        self()
        return self._revision

    def _read(self) -> tuple[bytes, ...]:
        return tuple(map(_read, self._files))


class ServerCertificate:
    """The server's own certificate and key and, with `client_ca`, the CA that clients' must be of (PEM).

    Raises CredentialsError.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._files = (certificate, key, *([client_ca] if client_ca else []))
        self._current = _Watched(self._files, self._check)
        self._context: tuple[int, ssl.SSLContext] | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that ask the files again for each new connection.

        Where these are the same, gRPC keeps its TLS context: while it takes another, connections that begin
        at that moment use one that is gone, and the process dies (seen with grpcio 1.85.1, within seconds
        when hundreds of clients connect at once and each gets a context of its own). So a client can resume
        a session; `certificate_proof` looks whether its certificate is still good.
        """
        served = self._current.revision()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            revision = self._current.revision()
            if revision == served:
                return None
            served = revision
            return self._configuration()

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            changed,  # type: ignore[arg-type] # the stubs know no "no change"
            require_client_authentication=len(self._files) > 2,  # noqa: PLR2004
        )

    def context(self) -> ssl.SSLContext:
        """Return the TLS context of today, for HTTP; a new object when the files change.

        Each new connection gets it also from a context of before. A client may come without a certificate;
        sessions are not resumed, so that none outlives its certificate.
        """
        revision = self._current.revision()
        if self._context is None or self._context[0] != revision:
            certificate, key, *client_ca = self._current()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0
            # OpenSSL's Python interface reads certificates from files only.
            with TemporaryDirectory() as directory:
                files = Path(directory, "certificate.pem"), Path(directory, "key.pem")
                write_pair(*files, (certificate, key))
                context.load_cert_chain(*files)
            for pem in client_ca:
                context.load_verify_locations(cadata=pem.decode())
                context.verify_mode = ssl.CERT_OPTIONAL
            context.sni_callback = self._follow
            self._context = revision, context
        return self._context[1]

    def _follow(self, connection: ssl.SSLObject, *_: object) -> None:
        connection.context = self.context()

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        # A new object each time: gRPC takes what is in it away.
        certificate, key, *client_ca = self._current()
        return grpc.ssl_server_certificate_configuration([(key, certificate)], *client_ca)

    def _check(self, contents: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Refuse what gRPC would refuse without naming a file, and a certificate without its own key."""
        certificate, key, *client_ca = contents
        try:
            server = x509.load_pem_x509_certificates(certificate)[0]
        except ValueError:
            raise CredentialsError(f"{self._files[0]}: has no certificate in PEM form") from None
        try:
            own_key = load_pem_private_key(key, password=None)
        except (ValueError, TypeError):  # TypeError: it is encrypted
            raise CredentialsError(f"{self._files[1]}: has no unencrypted key in PEM form") from None
        if own_key.public_key() != server.public_key():
            raise CredentialsError(f"{self._files[1]}: is not the key of {self._files[0]}")
        for pem in client_ca:
            try:
                x509.load_pem_x509_certificates(pem)
            except ValueError:
                raise CredentialsError(f"{self._files[2]}: has no CA certificate in PEM form") from None
        return contents


class ClientCA:
    """The CA certificates (PEM) that clients' must be of. Raises CredentialsError."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._current = _Watched((file,), self._parse)

    def revision(self) -> int:
        """Return how often the file changed."""
        return self._current.revision()

    def issued(self, chain: bytes) -> bool:
        """Whether a chain that was good for some CA before is good for one of today.

        It is the certificate of a peer and those between it and a CA, in PEM.
        """
        authorities = self._current()
        try:
            certificates = x509.load_pem_x509_certificates(chain)
        except ValueError:
            return False
        for certificate, between in zip(certificates, [*certificates[1:], None], strict=True):
            if any(_is_issued(certificate, authority) for authority in authorities):
                return True
            if between is None or not _is_authority(between) or not _is_issued(certificate, between):
                return False
        return False

    def _parse(self, contents: tuple[bytes, ...]) -> list[x509.Certificate]:
        try:
            return x509.load_pem_x509_certificates(contents[0])
        except ValueError:
            raise CredentialsError(f"{self._file}: has no CA certificate in PEM form") from None


class TokenFile:
    """The tokens of a file, by what they grant.

    A file with nothing but a token grants everything. Otherwise each line is
    `NAMESPACE[/WORKLOAD] [LABEL=VALUE ...] TOKEN`, where the namespace `*` stands for all; empty lines and
    those that begin with `#` do not count.

    Raises CredentialsError.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._grants = _Watched((file,), self._parse)

    def revision(self) -> int:
        """Return how often the file changed."""
        return self._grants.revision()

    def grant(self, authorization: str | bytes) -> Grant | None:
        """Return what the `authorization` header of a request grants, None if nothing."""
        digest, found = _digest(bearer_token(authorization)), None
        for known, grant in self._grants().items():  # to the end, so that the time tells nothing
            if hmac.compare_digest(known, digest):
                found = grant
        return found

    def _parse(self, contents: tuple[bytes, ...]) -> dict[bytes, Grant]:
        try:
            text = contents[0].decode("ascii")
        except UnicodeDecodeError:
            raise CredentialsError(f"{self._file}: is not ASCII") from None
        lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1)]
        lines = [(number, words) for number, words in lines if words and not words[0].startswith("#")]
        if not lines:
            raise CredentialsError(f"{self._file}: has no token")
        if len(lines) == 1 and len(lines[0][1]) == 1:
            lines[0][1].insert(0, EVERY_NAMESPACE)
        grants: dict[bytes, Grant] = {}
        for number, words in lines:
            try:
                digest, grant = _grant(words)
            except ValueError as error:
                raise CredentialsError(f"{self._file}:{number}: {error}") from None
            if digest in grants:
                raise CredentialsError(f"{self._file}:{number}: has the token of an earlier line")
            grants[digest] = grant
        return grants


class FileAuthenticator:
    """Authenticates peers by certificate, by token, or by both (an xds.server.Authenticator)."""

    def __init__(self, tokens: TokenFile | None, client_ca: ClientCA | None) -> None:
        self._tokens = tokens
        self._client_ca = client_ca

    def revision(self) -> tuple[int, ...]:
        """Return how often the files changed."""
        return tuple(of.revision() for of in (self._tokens, self._client_ca) if of)

    async def authenticate(
        self, peer: Peer, metadata: Mapping[str, str | bytes], _: Node, known: object = None
    ) -> Identity:
        """Return who the peer proves to be. Raises Unauthenticated."""
        proofs: list[tuple[Grant, ...]] = []
        if self._client_ca:
            proofs.append(certificate_proof(peer, self._client_ca, known))
        if self._tokens:
            authorization = metadata.get("authorization")
            if authorization is None:
                raise Unauthenticated("a bearer token is required")
            grant = self._tokens.grant(authorization)
            if grant is None:
                raise Unauthenticated("the bearer token is not known")
            proofs.append((grant,))
        return Identity(tuple(proofs))

    def left(self, _: object) -> None:
        """Do nothing: no identity needs looking after."""


def certificate_proof(peer: Peer, client_ca: ClientCA, known: object = None) -> tuple[Grant, ...]:
    """Return which proxies a peer's certificate allows it to be. Raises Unauthenticated.

    It has to be valid when a stream begins, that of a resumed session too; `known` says that the stream is
    there already.
    """
    if peer.chain:
        if not client_ca.issued(peer.chain):
            raise Unauthenticated("the client certificate is of a CA that is not trusted any more")
        if known is None and _is_expired(peer.chain):
            raise Unauthenticated("the client certificate has expired")
        peer = _with_whole_names(peer)
    grants = certificate_grants(peer)
    if not grants:
        raise Unauthenticated(
            "the client certificate has no name of a proxy: the URI spiffe://DOMAIN/ns/NAMESPACE/sa/"
            "NAME, or one of the DNS names WORKLOAD.NAMESPACE and NAME.NAMESPACE.svc"
        )
    return grants


def bearer_token(authorization: str | bytes) -> str:
    """Return the token of an `authorization` header, empty if it has none, or what can be none."""
    text = authorization.decode("latin-1") if isinstance(authorization, bytes) else authorization
    scheme, _, rest = text.partition(" ")
    token = rest.strip()
    return token if scheme.lower() == "bearer" and _TOKEN.fullmatch(token) else ""


def certificate_grants(peer: Peer) -> tuple[Grant, ...]:
    """Return which proxies the names of a verified client certificate allow, none if they say nothing.

    A SPIFFE ID wins over DNS names, and has to be the only URI (SPIFFE's X509-SVID, section 2).
    """
    if any(uri.lower().startswith(_SPIFFE_SCHEME) for uri in peer.uris):
        found = _SPIFFE.fullmatch(peer.uris[0]) if len(peer.uris) == 1 else None
        return (Grant(found[1]),) if found and _is(_NAMESPACE, found[1]) else ()
    return tuple(grant for name in peer.dns_names if (grant := _dns_grant(name.lower())))


def _with_whole_names(peer: Peer) -> Peer:
    """Return a peer with the names that are in its certificate.

    gRPC's end at a NUL (seen with grpcio 1.85.1): one for `sleep.team-a`, NUL, `.example.com` would be one
    for `sleep.team-a`.
    """
    try:
        certificate = x509.load_pem_x509_certificates(peer.chain)[0]
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return replace(peer, uris=(), dns_names=())
    return replace(
        peer,
        uris=tuple(names.get_values_for_type(x509.UniformResourceIdentifier)),
        dns_names=tuple(names.get_values_for_type(x509.DNSName)),
    )


def _dns_grant(name: str) -> Grant | None:
    workload, _, rest = name.partition(".")
    namespace, _, domain = rest.partition(".")
    if not _is(_NAME, workload) or not _is(_NAMESPACE, namespace):
        return None
    if not domain:
        return Grant(namespace, workload)
    # The name of a Service, which may stand for several workloads.
    return Grant(namespace) if domain.split(".")[0] == _SERVICE else None


def _grant(words: list[str]) -> tuple[bytes, Grant]:
    """Read a line of a token file. Raises ValueError, without the token."""
    *grant, token = words
    if len(token) < _SHORTEST_TOKEN or not _TOKEN.fullmatch(token):
        raise ValueError(
            f"a token is {_SHORTEST_TOKEN} or more of the signs A-Z a-z 0-9 . _ ~ + / - (and = at its end)"
        )
    if not grant:
        raise ValueError("is not NAMESPACE[/WORKLOAD] [LABEL=VALUE ...] TOKEN")
    namespace, slash, workload = grant[0].partition("/")
    if namespace != EVERY_NAMESPACE and not _is(_NAMESPACE, namespace):
        raise ValueError("does not begin with NAMESPACE[/WORKLOAD]")
    if slash and not _is(_NAME, workload):
        raise ValueError("does not begin with NAMESPACE[/WORKLOAD]")
    labels = [word.partition("=") for word in grant[1:]]
    if not all(name and equals for name, equals, _ in labels):
        raise ValueError("has a word that is not LABEL=VALUE between the namespace and the token")
    bound = frozenset((name, value) for name, _, value in labels) if labels else None
    return _digest(token), Grant(namespace, workload, bound)


def check_files(files: XdsCredentials, certificate: WorkloadCertificate | None = None) -> None:
    """Find out what Envoy would only log, for a proxy on this machine. Raises CredentialsError."""
    for pem in (files.ca_file, files.client_cert_file, files.client_key_file, *(certificate or ())):
        if pem:
            _read(Path(pem))
    if files.token_file:
        token = _read(files.token_file).decode("ascii", errors="replace").strip()
        if len(token) < _SHORTEST_TOKEN or not _TOKEN.fullmatch(token):
            raise CredentialsError(f"{files.token_file}: does not hold one token and nothing else")


def _is_issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _is_expired(chain: bytes) -> bool:
    return datetime.now(UTC) > x509.load_pem_x509_certificates(chain)[0].not_valid_after_utc


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CredentialsError(f"{file}: cannot be read: {error.strerror}") from None


def _is(form: TypeAdapter[str], value: str) -> bool:
    try:
        form.validate_python(value)
    except ValidationError:
        return False
    return True
