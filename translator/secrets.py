"""API keys and certificates, by SDS: Envoy redacts them in its config dump, and rotates them at once."""

from crds.llmprovider import LLMProvider, check_api_key
from crds.problems import ObjectKey
from translator.world import World
from xds import protos
from xds.resources import Resource

ROOT_CA = "ROOTCA"
"""Istio's name of the trust roots; sent once a proxy."""


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
    secret = world.secrets.get(ObjectKey("Secret", namespace, name))
    if secret is None:
        raise MissingSecretError(f"Secret {namespace}/{name} does not exist")
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


def current_api_key(world: World, provider: LLMProvider, rule: str | None) -> tuple[str, bool]:
    """Return the key to send, and whether Envoys that have another one keep it (it is not known here)."""
    if provider.key in world.held:
        return "", True
    try:
        return api_key(world, provider, rule), False
    except MissingSecretError:
        return "", world.incomplete


def api_key_resource(name: str, key: str, *, held: bool) -> Resource:
    """Make the SDS secret of a key. An empty one makes Envoy answer 401 at once.

    Without any answer all listeners would wait 15 s at the start (envoy-facts.md part 1, section 4).
    """
    secret = protos.Secret(name=name, generic_secret={"secret": {"inline_string": key}})
    return Resource.of(secret, held=held)


def client_certificate_name(provider: LLMProvider) -> str:
    """Name of the SDS secret of ``tls.credentialName``, in Istio's form."""
    return f"kubernetes://{provider.namespace}/{provider.spec.tls.credential_name}"


def client_certificate(world: World, provider: LLMProvider) -> Resource:
    """Make the client certificate of ``tls.credentialName``, a Secret of Kubernetes' type ``tls``.

    Raises MissingSecretError where the Secret or one of its two parts is not there.
    """
    name = str(provider.spec.tls.credential_name)
    chain, key = (_value(world, provider.namespace, name, part) for part in ("tls.crt", "tls.key"))
    certificate = {"certificate_chain": {"inline_bytes": chain}, "private_key": {"inline_bytes": key}}
    return Resource.of(protos.Secret(name=client_certificate_name(provider), tls_certificate=certificate))
