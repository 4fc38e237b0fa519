"""Certificates of TLS servers and of workloads, by SDS: Envoy changes to a new one without a restart.

Secrets of Kubernetes are sent, under Istio's names ``kubernetes://NAMESPACE/NAME``. Of files only the paths
are sent (``file-cert:``, ``file-root:``): Envoy reads them, and again when they change. So the key of a
workload never comes here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import PurePosixPath
from typing import Any

from google.protobuf.message import Message

from crds.gateway import ServerTLSSettings
from translator import secrets
from translator.proxy import Proxy
from translator.world import World
from xds import protos
from xds.resources import SDS, Resource

_ADS = {"ads": {}, "resource_api_version": "V3"}


class MissingWorkloadCertificateError(LookupError):
    """A proxy has no certificate of the mesh; the text says so."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """What a TLS context refers to: names of certificates, that of the CAs of peers, and the resources."""

    own: tuple[str, ...]
    peers: str | None
    resources: tuple[Resource, ...]


def certificates(world: World, proxy: Proxy, tls: ServerTLSSettings) -> Certificates:
    """Look up what a server of a Gateway refers to.

    Raises MissingSecretError and MissingWorkloadCertificateError; a server that waits for a secret would keep
    all listeners of its proxy waiting.
    """
    if tls.mode == "ISTIO_MUTUAL":
        return workload_certificates(proxy)
    found = [_secret(world, secrets.server_certificate, proxy.namespace, name) for name in tls.secrets]
    found += [_file_certificate(chain, key) for chain, key in tls.files if not tls.secrets]
    own = tuple(resource.name for resource in found)
    if not tls.is_mutual:
        return Certificates(own, None, tuple(found))
    # As in Istio, with a Secret for the server's certificate the CAs are in a Secret, too.
    names = (tls.ca_cert_credential_name, *tls.secrets)
    name = next((name for name in names if name), None)
    if name is not None:
        peers = _secret(world, secrets.client_ca, proxy.namespace, name)
    else:
        peers = _file_root(str(tls.ca_certificates), tls.ca_crl)
    return Certificates(own, peers.name, (*found, peers))


def workload_certificates(proxy: Proxy) -> Certificates:
    """Return the certificate of a proxy's workload. Raises MissingWorkloadCertificateError."""
    files = proxy.certificate
    if files is None:
        raise MissingWorkloadCertificateError(
            f"{proxy.workload}.{proxy.namespace} has no workload certificate (llmplane proxy --workload-cert)"
        )
    own = _file_certificate(files.chain, files.key)
    peers = _file_root(files.root)
    return Certificates((own.name,), peers.name, (own, peers))


def server_context(found: Certificates, tls: ServerTLSSettings, trust_domains: Iterable[str]) -> Message:
    """Make the TLS context of a server (Istio's BuildListenerTLSContext)."""
    common = _common(found, _sans(tls, trust_domains))
    common["alpn_protocols"] = ["h2", "http/1.1"]
    parameters = {
        "tls_minimum_protocol_version": tls.min_protocol_version.replace("TLSV", "TLSv"),
        "tls_maximum_protocol_version": tls.max_protocol_version.replace("TLSV", "TLSv"),
        "cipher_suites": tls.known_cipher_suites,
        "ecdh_curves": tls.known_ecdh_curves,
    }
    if tls.mode != "ISTIO_MUTUAL":
        common["tls_params"] = parameters
    if found.peers:
        common["combined_validation_context"]["default_validation_context"] |= {
            "verify_certificate_spki": tls.verify_certificate_spki,
            "verify_certificate_hash": tls.verify_certificate_hash,
            "trust_chain_verification": "ACCEPT_UNTRUSTED"
            if tls.insecure_skip_verify
            else "VERIFY_TRUST_CHAIN",
        }
    return protos.DownstreamTlsContext(
        common_tls_context=common,
        require_client_certificate={"value": tls.mode in {"MUTUAL", "ISTIO_MUTUAL"}},
    )


def client_context(found: Certificates, sans: list[dict[str, Any]]) -> Message:
    """Make the TLS context of a client that shows its workload's certificate; the SNI is set elsewhere."""
    return protos.UpstreamTlsContext(common_tls_context=_common(found, sans))


def spiffe(prefix: str) -> dict[str, Any]:
    """Match workloads whose identity begins with ``spiffe://`` and this."""
    return {"san_type": "URI", "matcher": {"prefix": f"spiffe://{prefix}/"}}


def _common(found: Certificates, sans: list[dict[str, Any]]) -> dict[str, Any]:
    common: dict[str, Any] = {
        "tls_certificate_sds_secret_configs": [{"name": name, "sds_config": _ADS} for name in found.own]
    }
    if found.peers:
        common["combined_validation_context"] = {
            "default_validation_context": {"match_typed_subject_alt_names": sans},
            "validation_context_sds_secret_config": {"name": found.peers, "sds_config": _ADS},
        }
    return common


def _sans(tls: ServerTLSSettings, trust_domains: Iterable[str]) -> list[dict[str, Any]]:
    """Match the names of clients: those that are listed, else for the mesh's mutual TLS its trust domain."""
    if tls.subject_alt_names:
        return [
            {"san_type": kind, "matcher": {"exact": name}}
            for name in tls.subject_alt_names
            for kind in _san_types(name)
        ]
    return [spiffe(domain) for domain in trust_domains] if tls.mode == "ISTIO_MUTUAL" else []


def _san_types(name: str) -> tuple[str, ...]:
    if "://" in name:
        return ("URI",)
    if "@" in name:
        return ("EMAIL",)
    try:
        ip_address(name)
    except ValueError:
        return ("DNS", "URI")
    return ("IP_ADDRESS",)


def _secret(world: World, make: Callable[[World, str, str], Resource], namespace: str, name: str) -> Resource:
    """Make a secret; one that cannot be told of at the moment is what proxies have."""
    try:
        return make(world, namespace, name)
    except secrets.MissingSecretError:
        if world.incomplete:
            suffix = secrets.CA_SUFFIX if make is secrets.client_ca else ""
            return Resource.unknown(SDS, f"kubernetes://{namespace}/{name}{suffix}")
        raise


def _file_certificate(chain: str, key: str) -> Resource:
    certificate = {
        "certificate_chain": {"filename": chain},
        "private_key": {"filename": key},
        "watched_directory": {"path": str(PurePosixPath(chain).parent)},
    }
    return Resource.of(protos.Secret(name=f"file-cert:{chain}~{key}", tls_certificate=certificate))


def _file_root(path: str, crl: str | None = None) -> Resource:
    validation = {
        "trusted_ca": {"filename": path},
        "watched_directory": {"path": str(PurePosixPath(path).parent)},
        **({"crl": {"filename": crl}} if crl else {}),
    }
    return Resource.of(protos.Secret(name=f"file-root:{path}", validation_context=validation))
