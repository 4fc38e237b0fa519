"""Gateway: which ports and hosts a gateway opens, and with which certificates (networking.istio.io).

Rules and wording are those of Istio's webhook (istio/istio pkg/config/validation, ValidateGateway).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StrictInt, WithJsonSchema, model_validator

from crds.meta import BaseObject, Model
from crds.problems import Finding, Path
from crds.values import FilePath, KubernetesName, Line, invalid, refuse, route_host

_HTTP = frozenset({"http", "http2", "http_proxy", "grpc", "grpc-web"})
_TLS = frozenset({"https", "tls"})
_PROTOCOLS = _HTTP | _TLS | {"tcp", "udp", "mongo", "redis", "mysql"}

CIPHER_SUITES = (
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES128-SHA",
    "ECDHE-RSA-AES128-SHA",
    "ECDHE-ECDSA-AES256-SHA",
    "ECDHE-RSA-AES256-SHA",
    "AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-SHA",
    "AES256-SHA",
    "DES-CBC3-SHA",
)
"""The cipher suites that BoringSSL, and so Envoy, knows (Istio's ValidCipherSuites)."""

ECDH_CURVES = ("P-224", "P-256", "P-384", "P-521", "X25519", "X25519Kyber768Draft00", "X25519MLKEM768")
"""The key exchanges that BoringSSL knows (Istio's ValidECDHCurves)."""

_UNIX = "unix://"
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_OLD_VERSIONS = ("TLSV1_0", "TLSV1_1")


def _protocol(text: str) -> str:
    if text.lower() not in _PROTOCOLS:
        raise ValueError(
            f"invalid protocol '{text}', supported protocols are HTTP, HTTPS, HTTP2, GRPC, GRPC-WEB, TLS, "
            "MONGO, REDIS, MYSQL, TCP"
        )
    return text


class ServerPort(Model):
    """A port, as clients know it: where a Service maps it to another one, that one is opened."""

    number: Annotated[StrictInt, Field(ge=0, le=65535)]
    """The port's number."""
    protocol: Annotated[str, AfterValidator(_protocol)]
    """HTTP, HTTPS, GRPC, GRPC-WEB, HTTP2, MONGO, TCP or TLS, in any case. HTTP and HTTPS are served."""
    name: str
    """A name, unique among the servers of the Gateway."""
    target_port: Annotated[StrictInt, Field(ge=0, le=2**32 - 1)] = 0
    """Has no meaning for a Gateway."""

    @property
    def is_http(self) -> bool:
        """Whether it is plain HTTP, in whichever version."""
        return self.protocol.lower() in _HTTP

    @property
    def is_https(self) -> bool:
        """Whether it is HTTP over TLS."""
        return self.protocol.lower() == "https"

    @property
    def is_tls(self) -> bool:
        """Whether the server must have TLS settings."""
        return self.protocol.lower() in _TLS

    @model_validator(mode="after")
    def _check(self) -> Self:
        findings = []
        if self.target_port:
            findings.append(Finding(("targetPort",), "targetPort has no impact on Gateways"))
        if not self.name:
            findings.append(Finding(("name",), "port name must be set"))
        refuse(findings)
        return self


class TLSCertificate(Model):
    """A server certificate in files on the gateway's machine."""

    server_certificate: FilePath | None = None
    """The certificate chain (PEM)."""
    private_key: FilePath | None = None
    """Its key (PEM)."""
    ca_certificates: FilePath | None = None
    """Not used by Istio."""


TLSMode = Literal["PASSTHROUGH", "SIMPLE", "MUTUAL", "AUTO_PASSTHROUGH", "ISTIO_MUTUAL", "OPTIONAL_MUTUAL"]
TLSVersion = Literal["TLS_AUTO", "TLSV1_0", "TLSV1_1", "TLSV1_2", "TLSV1_3"]


class ServerTLSSettings(Model):
    """How a server speaks TLS."""

    https_redirect: Annotated[bool, Field(strict=True)] = False
    """Answer plain HTTP with a redirect (301) to HTTPS."""
    mode: TLSMode = "PASSTHROUGH"
    """SIMPLE, MUTUAL (clients must have a certificate), OPTIONAL_MUTUAL or ISTIO_MUTUAL (of the mesh)."""
    credential_name: KubernetesName | None = None
    """Secret of the gateway's namespace with tls.crt, tls.key and, for MUTUAL, ca.crt."""
    credential_names: Annotated[tuple[KubernetesName, ...], Field(min_length=1, max_length=2)] | None = None
    """The same for several certificates, such as an RSA and an ECDSA one."""
    tls_certificates: Annotated[tuple[TLSCertificate, ...], Field(min_length=1, max_length=2)] | None = None
    """Several certificates in files."""
    server_certificate: FilePath | None = None
    """The certificate chain, a file on the gateway's machine."""
    private_key: FilePath | None = None
    """Its key, a file."""
    ca_certificates: FilePath | None = None
    """The CAs of clients' certificates, a file."""
    ca_cert_credential_name: KubernetesName | None = None
    """Secret whose ca.crt has the CAs of clients' certificates."""
    ca_crl: FilePath | None = None
    """Revoked certificates of clients, a file."""
    subject_alt_names: tuple[Line, ...] = ()
    """Names of which a client's certificate must have one."""
    verify_certificate_spki: tuple[Line, ...] = ()
    """SHA-256 of the public keys that clients may have, in base64."""
    verify_certificate_hash: tuple[Line, ...] = ()
    """SHA-256 of the certificates that clients may have, in hexadecimal digits."""
    insecure_skip_verify: Annotated[bool, Field(strict=True)] = False
    """Take clients' certificates of any CA."""
    min_protocol_version: TLSVersion = "TLS_AUTO"
    """The oldest version of TLS (default: 1.2)."""
    max_protocol_version: TLSVersion = "TLS_AUTO"
    """The newest version of TLS (default: 1.3)."""
    cipher_suites: tuple[str, ...] = ()
    """Cipher suites for TLS up to 1.2, by OpenSSL's names (default: Envoy's)."""
    ecdh_curves: tuple[str, ...] = ()
    """Key exchanges (default: Envoy's)."""

    @property
    def is_passthrough(self) -> bool:
        """Whether the TLS connection would not end at the gateway."""
        return self.mode in {"PASSTHROUGH", "AUTO_PASSTHROUGH"}

    @property
    def is_mutual(self) -> bool:
        """Whether clients are asked for a certificate."""
        return self.mode in {"MUTUAL", "OPTIONAL_MUTUAL", "ISTIO_MUTUAL"}

    @property
    def secrets(self) -> tuple[str, ...]:
        """The Secrets with the server's certificates."""
        return self.credential_names or ((self.credential_name,) if self.credential_name else ())

    @property
    def files(self) -> tuple[tuple[str, str], ...]:
        """The files with the server's certificates: (certificate chain, key)."""
        pairs = [(each.server_certificate, each.private_key) for each in self.tls_certificates or ()]
        pairs.append((self.server_certificate, self.private_key))
        return tuple((chain, key) for chain, key in pairs if chain and key)

    @property
    def names_files(self) -> bool:
        """Whether one of the three files is named."""
        return bool(self.server_certificate or self.private_key or self.ca_certificates)

    @property
    def known_cipher_suites(self) -> tuple[str, ...]:
        """The cipher suites without those that would make Envoy refuse the listener, as in Istio."""
        return tuple(name for name in dict.fromkeys(self.cipher_suites) if _is_cipher(name))

    @property
    def known_ecdh_curves(self) -> tuple[str, ...]:
        """The key exchanges without those that would make Envoy refuse the listener."""
        return tuple(name for name in dict.fromkeys(self.ecdh_curves) if name in ECDH_CURVES)

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self._findings())
        return self

    def _findings(self) -> Iterator[Finding]:
        if self.mode == "ISTIO_MUTUAL":
            given: tuple[tuple[str, object, str], ...] = (
                ("serverCertificate", self.server_certificate, "server certificate"),
                ("privateKey", self.private_key, "private key"),
                ("caCertificates", self.ca_certificates, "CA bundle"),
                ("tlsCertificates", self.tls_certificates, "tlsCertificates"),
                ("credentialName", self.credential_name, "credentialName"),
                ("credentialNames", self.credential_names, "credentialNames"),
            )
            for field, value, name in given:
                if value:
                    yield Finding((field,), f"ISTIO_MUTUAL TLS cannot have associated {name}")
            return
        sources = (
            self.server_certificate and self.private_key,
            self.credential_name,
            self.credential_names,
            self.tls_certificates,
        )
        if sum(map(bool, sources)) > 1:
            yield Finding(
                (),
                "only one of credentialName, credentialNames, serverCertificate/privateKey, tlsCertificates "
                "should be specified",
            )
        if not self.is_passthrough and not self.secrets:
            yield from self._missing_files()
        if self.ca_crl and self.credential_name:
            text = "CRL is not supported with credentialName. CRL has to be specified in the credential"
            yield Finding(("caCrl",), text)
        if self.ca_crl and self.mode == "SIMPLE":
            yield Finding(("caCrl",), "CRL is not supported with SIMPLE TLS")

    def _missing_files(self) -> Iterator[Finding]:
        prefix = "MUTUAL TLS" if self.is_mutual else "SIMPLE TLS"
        if self.is_mutual and not (self.ca_certificates or self.ca_cert_credential_name):
            yield Finding((), f"{prefix} requires a client CA bundle")
        given: tuple[tuple[Path, str | None, str | None], ...] = (
            ((), self.server_certificate, self.private_key),
        )
        if self.tls_certificates:
            given = tuple(
                (("tlsCertificates", index), each.server_certificate, each.private_key)
                for index, each in enumerate(self.tls_certificates)
            )
        for path, certificate, key in given:
            if not certificate:
                yield Finding(path, f"{prefix} requires a server certificate")
            if not key:
                yield Finding(path, f"{prefix} requires a private key")

    def warnings(self) -> Iterator[Finding]:
        """Tell of settings that are ignored, as Istio does."""
        if self.min_protocol_version in _OLD_VERSIONS and not self.cipher_suites:
            text = (
                "TLS version below TLSV1_2 require setting compatible ciphers as by default they no longer "
                "include compatible ciphers."
            )
            yield Finding(("minProtocolVersion",), text)
        for name, given, known in (
            ("cipherSuites", self.cipher_suites, _is_cipher),
            ("ecdhCurves", self.ecdh_curves, ECDH_CURVES.__contains__),
        ):
            what = "cipher suites" if name == "cipherSuites" else "ECDH curves"
            unknown = sorted({each for each in given if not known(each)})
            if unknown:
                yield Finding((name,), f"ignoring invalid {what}: {', '.join(unknown)}")
            twice = sorted(each for each, count in Counter(given).items() if count > 1 and known(each))
            if twice:
                yield Finding((name,), f"ignoring duplicate {what}: {', '.join(twice)}")
        if self.insecure_skip_verify and self.is_mutual:
            text = (
                "certificates of any CA are taken: a client is whoever its certificate says, for policies too"
            )
            yield Finding(("insecureSkipVerify",), text)
        if self.is_passthrough and (self.ca_crl or self.secrets or self.tls_certificates or self.names_files):
            yield Finding((), f"{self.mode} mode does not use certificates, they will be ignored")


def _is_cipher(name: str) -> bool:
    # OpenSSL's operators (-AES128-SHA, [A|B]) are passed on without being looked at, as in Istio.
    return name in CIPHER_SUITES or name == "ALL" or not name[:1].isalnum()


def _server_host(text: str) -> str:
    """Check `[namespace/]host` and return it in lower case."""
    namespace, slash, host = text.partition("/")
    if not slash:
        namespace, host = "*", text
    if not namespace or not host:
        raise ValueError("config namespace and dnsName in host entry cannot be empty")
    if namespace not in {"*", "."} and not _LABEL.fullmatch(namespace):
        raise ValueError(f"invalid namespace value '{namespace}' in gateway")
    if host != "*" and "." not in host and ":" not in host:
        raise ValueError("short names (non FQDN) are not allowed")
    if host.startswith("*") and host != "*" and not host.startswith("*."):
        raise ValueError(f"partial wildcard '{host}' not allowed")
    try:
        host = route_host(host)
    except ValueError as error:
        raise ValueError(f"domain name '{host}' invalid: {error}") from None
    return f"{namespace}/{host}" if slash else host


ServerHost = Annotated[
    str,
    AfterValidator(_server_host),
    WithJsonSchema({"type": "string", "minLength": 1, "pattern": r"^([0-9a-z-]+/|[.*]/)?[^/]+$"}),
]
"""A host of a server: a DNS name, `*.suffix` or `*`, with the namespace of the routes that may use it."""


class Server(Model):
    """A port that a gateway opens for some hosts."""

    port: ServerPort
    """Where clients connect to."""
    hosts: tuple[ServerHost, ...] = ()
    """`[namespace/]host`: what routes may serve here, and which namespaces' (`.`: the Gateway's own)."""
    bind: str = ""
    """The address to listen on (default: the gateway's)."""
    tls: ServerTLSSettings | None = None
    """TLS, for HTTPS; httpsRedirect, for HTTP."""
    default_endpoint: str = ""
    """Not used."""
    name: str = ""
    """A name for statistics."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self._findings())
        return self

    def _findings(self) -> Iterator[Finding]:
        if not self.hosts:
            yield Finding(("hosts",), "server config must contain at least one host")
        if self.bind.startswith(_UNIX):
            if self.port.number:
                yield Finding(("port", "number"), "port number must be 0 for unix domain socket")
        else:
            if not self.port.number:
                yield Finding(("port", "number"), "port number 0 must be in the range 1..65535")
            if self.bind and not _is_ip(self.bind):
                yield Finding(("bind",), f"{self.bind} is not a valid IP")
        if self.port.is_tls and self.tls is None:
            yield Finding((), "server must have TLS settings for HTTPS/TLS protocols")
        elif self.tls is not None and not self.port.is_tls:
            if not self.port.is_http:
                yield Finding(("tls",), "server cannot have TLS settings for non HTTPS/TLS ports")
            elif not self.tls.is_passthrough or self.tls.names_files:
                yield Finding(("tls",), "server cannot have TLS settings for plain text HTTP ports")

    @property
    def https_redirect(self) -> bool:
        """Whether plain HTTP is redirected to HTTPS."""
        return self.port.is_http and self.tls is not None and self.tls.https_redirect

    def hosts_for(self, route_namespace: str, gateway_namespace: str) -> tuple[str, ...]:
        """Return the hosts that a route of this namespace may serve here."""
        found = []
        for entry in self.hosts:
            namespace, slash, host = entry.rpartition("/")
            if namespace == ".":
                namespace = gateway_namespace
            if not slash or namespace in {"*", route_namespace}:
                found.append(host)
        return tuple(dict.fromkeys(found))

    @property
    def open_names(self) -> tuple[str, ...]:
        """The hosts that routes of all namespaces may serve here."""
        entries = (entry.rpartition("/") for entry in self.hosts)
        return tuple(dict.fromkeys(host for namespace, _, host in entries if namespace in {"", "*"}))

    @property
    def names(self) -> tuple[str, ...]:
        """The hosts without namespaces."""
        return tuple(dict.fromkeys(entry.rpartition("/")[2] for entry in self.hosts))


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


class GatewaySpec(Model):
    """Which gateways open what."""

    selector: Mapping[str, str] = {}
    """Labels of the gateways' workloads, in whichever namespace. None = every gateway."""
    servers: tuple[Server, ...] = ()
    """Ports and hosts."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.servers:
            raise invalid(Finding(("servers",), "gateway must have at least one server"))
        names = Counter(server.port.name for server in self.servers)
        findings = [
            Finding(("servers", index, "port", "name"), f"{_DUPLICATE} {server.port.name}")
            for index, server in enumerate(self.servers)
            if names[server.port.name] > 1 and server.port.name in {s.port.name for s in self.servers[:index]}
        ]
        refuse(findings)
        return self


_DUPLICATE = "port names in servers must be unique: duplicate name"


class Gateway(BaseObject):
    """Opens ports of gateways; LLMRoutes attach to it by their `gateways`."""

    kind: Literal["Gateway"]
    spec: GatewaySpec

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if not _LABEL.fullmatch(self.name):
            raise invalid(Finding(("metadata", "name"), f"invalid gateway name: '{self.name}'"))
        return self

    @property
    def full_name(self) -> str:
        """`namespace/name`, as LLMRoutes refer to it."""
        return f"{self.namespace}/{self.name}"

    def warnings(self) -> list[Finding]:
        """Tell of settings without effect."""
        findings = []
        for index, server in enumerate(self.spec.servers):
            place: Path = ("spec", "servers", index, "tls")
            if server.tls is None:
                continue
            findings += [Finding((*place, *found.path), found.message) for found in server.tls.warnings()]
            if server.tls.https_redirect and not server.port.is_http:
                text = "tls.httpsRedirect should only be used with http servers"
                findings.append(Finding((*place, "httpsRedirect"), text))
        return findings
