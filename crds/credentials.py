"""What a user-written expression must not read: names under which keys and credentials travel.

Access logs, metrics, traces and their filters see a request as it left for the provider, key included. So
no expression may name such a header, and none may name all headers at once (design decision 15). Names are
judged by their words, for nobody knows all headers that carry a credential.
"""

import re

_WORDS = re.compile(r"[^-_.:\s/]+")
_SECRET = {
    "apikey", "auth", "authentication", "authorization", "bearer", "cookie", "cookies", "credential",
    "credentials", "jwt", "key", "keys", "passwd", "password", "passwords", "secret", "secrets", "session",
    "signature", "sig", "token",
}  # fmt: skip
_HARMLESS = {
    "idempotency-key",
    "llm.ratelimit.key",
    "llm.time_per_output_token",
    "llm.time_to_first_token",
    "www-authenticate",
    "sec-websocket-key",
}
_ENVIRONMENT = {
    "CLUSTER_ID", "HOSTNAME", "HOST_IP", "INSTANCE_IP", "NODE_NAME", "POD_IP", "POD_NAME", "POD_NAMESPACE",
    "REVISION", "SERVICE_ACCOUNT", "TRUST_DOMAIN",
}  # fmt: skip
"""Variables that Istio's sidecars have of the Downward API."""


def may_hold_credential(name: str) -> bool:
    """Whether a header, claim, parameter or variable of this name may hold a credential.

    ``x-ratelimit-remaining-tokens`` counts tokens, ``x-auth-token`` is one: the plural is harmless.
    """
    lower = name.strip().lower()
    return lower not in _HARMLESS and not _SECRET.isdisjoint(_WORDS.findall(lower))


def check_name(what: str, name: str) -> None:
    """Raise ValueError if what has this name may hold a credential."""
    if may_hold_credential(name):
        raise ValueError(f"must not read {what} '{name}': it may hold a key or another credential")


def check_environment(name: str) -> None:
    """Raise ValueError for a variable of Envoy's environment that may hold a key.

    Any variable may hold one, for placeholders take them by any name: only well-known ones can be read.
    """
    if name in _ENVIRONMENT or (name.startswith("ISTIO_META_") and not may_hold_credential(name)):
        return
    known = ", ".join(sorted(_ENVIRONMENT))
    raise ValueError(
        f"must not read the environment variable '{name}': it may hold a key (allowed are {known} and "
        "ISTIO_META_...)"
    )
