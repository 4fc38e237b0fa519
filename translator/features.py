"""What an Envoy can do, by its version: every feature that the configuration needs and not all Envoys have.

Minimal versions are those of the API that released binaries carry, and of their behaviour (`make
test-envoy-versions`). An Envoy without a feature gets what is equivalent; where nothing is, objects say so.
"""

import re
from enum import Enum

Version = tuple[int, int]
"""Major and minor: patch releases add no feature."""

OLDEST: Version = (1, 36)
"""The oldest version that is tested; older ones get the same configuration as this one."""

_VERSION = re.compile(r"(\d+)\.(\d+)\.", re.ASCII)


class Feature(Enum):
    """A feature: the version that brought it, what it is, and what is missing without it (empty: nothing)."""

    LUA_CONTEXT = (1, 40), "filter_context and shared_vm_id of Lua filters", ""
    """Without: the data are written into each cluster's own script (translator.older_envoy)."""
    NEGATIVE_HITS = (1, 40), "is_negative_hits of Envoy's ratelimit filter", ""
    """Without: reservations are settled upward only (translator.global_rate_limits)."""
    PRIORITY_GROUPS = (1, 40), "the cluster specifier priority_group", ""
    """Without: weights of which each group's is far above that of all later ones (translator.rules)."""
    SCOPED_ROUTES = (1, 40), "a change between one route configuration and scoped routes", ""
    """Without: one route configuration, however many hosts there are (translator.scopes)."""
    FALLBACK = (
        (1, 39),
        "fallback to another provider",
        "a failed request is not sent to another one, and of priorities only the first is used",
    )
    """``refresh_cluster_on_retry``: a retry chooses the cluster anew."""
    FILTER_CHAIN = (
        (1, 39),
        "a policy that holds at once (the HTTP filter filter_chain)",
        "connections that are open go on under the policies of before, ten minutes at most",
    )
    """Without: each filter of the policies is a resource of its own, and another number of them is another
    listener (translator.policies)."""
    METRICS = (1, 39), "metrics of requests (stats_scope of the stats access logger)", "they are not counted"
    TOKEN_LIMITS = (1, 39), "limits of tokens (stats() of Lua)", "it uses as many tokens as it likes"
    LUA_FILTER_STATE = (1, 39), "filterState():set() of Lua, again and again for one key", ""
    """Without: dynamic metadata (translator.older_envoy). 1.38 keeps the first value of a key for ever."""
    ROUTE_CACHE = (1, 38), "clear_route_cache of the HTTP filter set_filter_state", ""
    """Without: where traffic is captured, a virtual host for each provider (translator.capture)."""
    CREDENTIAL_PREFIX = (1, 37), "header_value_prefix of injected credentials", ""
    """Without: the secret is the whole header value (translator.secrets)."""

    def __init__(self, since: Version, what: str, without: str) -> None:
        self.since = since
        self.what = what
        self.without = without

    def lack_of(self, version: Version) -> str:
        """Say for people what an Envoy lacks: the version, the feature, and what happens."""
        return f"Envoy {version_text(version)}: {self.what} needs {version_text(self.since)}; {self.without}"


NEWEST: Version = max(feature.since for feature in Feature)
"""From this version on there is nothing to look at."""


def read_version(text: str) -> Version | None:
    """Return what counts of a node's version (``1.38.3``): None for one with all features, or none."""
    match = _VERSION.match(text)
    version = (int(match[1]), int(match[2])) if match else NEWEST
    return version if version < NEWEST else None


def version_text(version: Version) -> str:
    """Write a version: ``1.38``."""
    return f"{version[0]}.{version[1]}"
