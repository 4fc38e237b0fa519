"""API keys and certificates, by SDS: Envoy redacts them in its config dump, and rotates them at once."""

from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from crds.llmprovider import LLMProvider, check_api_key
from crds.problems import ObjectKey
from translator.world import World
from xds import protos
from xds.resources import Resource

ROOT_CA = "ROOTCA"
"""Istio's name of the trust roots; sent once a proxy."""

BEARER = "Bearer "
"""What stands in front of a key in its header."""


CA_SUFFIX = "-cacert"
"""Istio's ending of the names of Secrets that hold CAs."""


class MissingSecretError(LookupError):
    """A key or certificate that a provider refers to is not there; the text says which."""


def api_key_name(provider: LLMProvider, rule: str | None) -> str | None:
    """Name of the SDS secret with the key of a provider's configuration; None for a keyless one."""
    config, default = provider.spec.config_for(rule), provider.spec.config_for(None)
    if not config.has_key:
        return None
    same = (config.api_key, config.api_key_secret_ref) == (default.api_key, default.api_key_secret_ref)
    own = "" if same else f"/{rule}"
    return f"api-key/{provider.namespace}/{provider.name}{own}"


def api_key(world: World, provider: LLMProvider, rule: str | None) -> str:
    """Look the key of a provider's configuration up.

    Raises MissingSecretError, without the key in its text, where there is none that can be sent.
    """
    config = provider.spec.config_for(rule)
    if config.placeholder is not None:
        raise MissingSecretError(f"apiKey: the placeholder {config.placeholder} was not filled in")
    if config.api_key is not None:
        return config.api_key.get_secret_value()
    ref = config.api_key_secret_ref
    if ref is None:
        raise MissingSecretError("neither apiKey nor apiKeySecretRef is set")
    value = _value(world, provider.namespace, ref.name, ref.key)
    try:
        return check_api_key(value.decode())
    except ValueError as error:  # UnicodeDecodeError is one, and would print the bytes
        why = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        text = f"apiKeySecretRef: key {ref.key!r} of Secret {provider.namespace}/{ref.name} {why}"
        raise MissingSecretError(text) from None


def _value(world: World, namespace: str, name: str, key: str) -> bytes:
    wanted = ObjectKey("Secret", namespace, name)
    secret = world.secrets.get(wanted)
    if secret is None:
        raise MissingSecretError(world.lacks(wanted))
    value = secret.value(key)
    if value is None:
        raise MissingSecretError(f"Secret {namespace}/{name} has no key {key!r}")
    return value


def root_ca(world: World) -> Resource:
    """Make the trust roots that every provider's certificate is checked against."""
    return Resource.of(
        protos.Secret(
            name=ROOT_CA,
            validation_context={"trusted_ca": {"inline_bytes": world.mesh.trusted_ca}},
        )
    )


def lacks_a_secret(world: World, provider: LLMProvider, rule: str | None) -> bool:
    """Whether a key or the certificate of a provider's configuration is not there."""
    try:
        if api_key_name(provider, rule) is not None:
            api_key(world, provider, rule)
        if provider.spec.tls.credential_name is not None:
            client_certificate(world, provider)
    except MissingSecretError:
        return True
    return False


def current_api_key(world: World, provider: LLMProvider, rule: str | None) -> tuple[str, bool]:
    """Return the key to send, and whether Envoys that have another one keep it (it is not known here)."""
    if provider.key in world.held:
        return "", True
    try:
        return api_key(world, provider, rule), False
    except MissingSecretError:
        return "", world.incomplete


def api_key_resource(name: str, key: str, *, held: bool, has_prefix: bool = False) -> Resource:
    """Make the SDS secret of a key. An empty one makes Envoy answer 401 at once.

    ``has_prefix``: it is the whole value of its header, for an Envoy that adds nothing to it.
    Without any answer all listeners would wait 15 s at the start (seen with Envoy 1.40).
    """
    value = BEARER + key if key and has_prefix else key
    secret = protos.Secret(name=name, generic_secret={"secret": {"inline_string": value}})
    return Resource.of(secret, held=held)


def client_certificate_name(provider: LLMProvider) -> str:
    """Name of the SDS secret of ``tls.credentialName``, in Istio's form."""
    return f"kubernetes://{provider.namespace}/{provider.spec.tls.credential_name}"


def client_certificate(world: World, provider: LLMProvider) -> Resource:
    """Make the client certificate of ``tls.credentialName``.

    Raises MissingSecretError where the Secret or one of its two parts is not there.
    """
    return server_certificate(world, provider.namespace, str(provider.spec.tls.credential_name))


def server_certificate(world: World, namespace: str, name: str) -> Resource:
    """Make the certificate of a Secret of Kubernetes' type ``tls``, or with Istio's names of the parts.

    Raises MissingSecretError where the Secret or one of its two parts is not there or cannot be used: Envoy
    would refuse it, and a listener would wait for another one.
    """
    names = _present(world, namespace, name, ("cert", "key")) or ("tls.crt", "tls.key")
    chain, key = (_value(world, namespace, name, part) for part in names)
    try:
        certificates = x509.load_pem_x509_certificates(chain)
        private_key = load_pem_private_key(key, password=None, unsafe_skip_rsa_key_validation=True)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        text = f"Secret {namespace}/{name}: {' and '.join(names)} are not a certificate and its key in PEM"
        raise MissingSecretError(text) from None
    if certificates[0].public_key() != private_key.public_key():
        raise MissingSecretError(f"Secret {namespace}/{name}: {names[1]} is not the key of {names[0]}")
    certificate = {"certificate_chain": {"inline_bytes": chain}, "private_key": {"inline_bytes": key}}
    return Resource.of(protos.Secret(name=f"kubernetes://{namespace}/{name}", tls_certificate=certificate))


def client_ca(world: World, namespace: str, name: str) -> Resource:
    """Make the CAs of clients: of the Secret ``<name>-cacert`` or, without it, of the one with this name.

    Raises MissingSecretError as `server_certificate` does.
    """
    own = ObjectKey("Secret", namespace, f"{name}{CA_SUFFIX}")
    secret = own.name if own in world.secrets else name
    (part,) = _present(world, namespace, secret, ("cacert",)) or ("ca.crt",)
    ca = _value(world, namespace, secret, part)
    try:
        x509.load_pem_x509_certificates(ca)
    except ValueError:
        raise MissingSecretError(f"Secret {namespace}/{secret}: {part} is no certificate in PEM") from None
    validation: dict[str, Any] = {"trusted_ca": {"inline_bytes": ca}}
    for crl in _present(world, namespace, secret, ("ca.crl",)) or ():
        validation["crl"] = {"inline_bytes": _value(world, namespace, secret, crl)}
    made = protos.Secret(name=f"kubernetes://{namespace}/{name}{CA_SUFFIX}", validation_context=validation)
    return Resource.of(made)


def _present(world: World, namespace: str, name: str, parts: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return these parts if a Secret has them all."""
    secret = world.secrets.get(ObjectKey("Secret", namespace, name))
    return parts if secret is not None and set(parts) <= set(secret.keys) else None
