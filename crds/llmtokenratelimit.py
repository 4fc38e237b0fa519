"""LLMTokenRateLimit: how many tokens who may use in which time.

A kind of ours: `selector` and `targetRefs` are those of Istio's policies, keys and rules by key value those
of Higress' ai-token-ratelimit, units those of Envoy's ratelimit service, the reservation is how OpenAI counts
(its guide to rate limits: the greater of an estimate and `max_tokens`).
"""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictInt, WithJsonSchema, model_validator

from crds.credentials import check_name
from crds.meta import BaseObject, Model, StringMatch, cel
from crds.problems import Finding
from crds.selection import LabelSelectingSpec
from crds.values import KubernetesName, Line, header_name, invalid, refuse

MAX_TOKENS = 2**32 - 2
"""The greatest limit: Envoy's ratelimit service counts in 32 bits, and the greatest number is no limit."""

_MAX_KEYS = 4
_MAX_RULES = 32
_MAX_LIMITS = 8
_MAX_TARGETS = 16


class Mode(StrEnum):
    """Who counts."""

    LOCAL = "Local"
    GLOBAL = "Global"


class Unit(StrEnum):
    """The length of a window; windows begin at multiples of it since 1970, in UTC."""

    SECOND = "Second"
    MINUTE = "Minute"
    HOUR = "Hour"
    DAY = "Day"
    MONTH = "Month"

    @property
    def seconds(self) -> int:
        """The length in seconds; a month has 30 days, as for Envoy's ratelimit service."""
        return _SECONDS[self]


_SECONDS = {
    Unit.SECOND: 1,
    Unit.MINUTE: 60,
    Unit.HOUR: 3600,
    Unit.DAY: 24 * 3600,
    Unit.MONTH: 30 * 24 * 3600,
}
_LONG = (Unit.DAY, Unit.MONTH)


class TokenType(StrEnum):
    """Which tokens are counted."""

    PROMPT = "Prompt"
    COMPLETION = "Completion"
    TOTAL = "Total"


class Attribute(StrEnum):
    """What is known of a request, besides its headers and claims."""

    CLIENT = "Client"
    WORKLOAD = "Workload"
    ADDRESS = "Address"
    MODEL = "Model"
    PROVIDER = "Provider"


def _key_header(text: str) -> str:
    name = header_name(text)
    check_name("the header", name)
    return name


def _claim(text: str) -> str:
    check_name("the claim", text)
    return text


class LimitKey(Model):
    """What requests are told apart by: a header, a claim or an attribute."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            {
                "must have exactly one of header, claim and attribute": "[has(self.header), has(self.claim),"
                " has(self.attribute)].exists_one(given, given)"
            }
        )
    )

    header: (
        Annotated[
            str,
            AfterValidator(_key_header),
            WithJsonSchema({"type": "string", "maxLength": 256, "pattern": r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$"}),
        ]
        | None
    ) = None
    """A request header, as the client sends it: it can choose any value. Headers that may hold a key cannot
    be used."""
    claim: Annotated[Line, AfterValidator(_claim)] | None = None
    """A claim of the checked JSON Web Token (RequestAuthentication); on gateways only."""
    attribute: Attribute | None = None
    """Client: the client that an APIKeyAuthentication found. Workload: the calling workload, on a gateway the
    service account of its certificate (namespace/name). Address: the IP address of the client. Model: the
    member model of the request as the client sends it. Provider: host of the provider that is tried first."""

    @property
    def name(self) -> str:
        """A name that no other key has."""
        if self.header is not None:
            return f"header {self.header}"
        return f"claim {self.claim}" if self.claim is not None else str(self.attribute)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(way is not None for way in (self.header, self.claim, self.attribute)) != 1:
            raise ValueError("must have exactly one of header, claim and attribute")
        return self


class TokenLimit(Model):
    """So many tokens in each window."""

    tokens: Annotated[StrictInt, Field(ge=1, le=MAX_TOKENS)]
    """Tokens in a window."""
    unit: Unit
    """Length of the windows: Second, Minute, Hour, Day (in UTC) or Month (30 days). In mode Local, Day and
    Month need local.longWindows."""
    type: TokenType = TokenType.TOTAL
    """Which tokens count (default: Total, prompt and completion)."""


class LimitRule(Model):
    """Limits for requests whose keys have certain values; each combination of values is counted apart."""

    name: Line | None = None
    """Name of the rule, for logs and metrics (default: `default` for the last rule, else `rule-` and its
    index)."""
    match: Annotated[tuple[StringMatch, ...], Field(max_length=_MAX_KEYS)] = ()
    """What the keys' values must be, one for each key in their order ({}: any that is there). Every rule but
    the last one has it."""
    limits: Annotated[tuple[TokenLimit, ...], Field(min_length=1, max_length=_MAX_LIMITS)]
    """The limits; all of them hold."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        seen = [(limit.type, limit.unit) for limit in self.limits]
        again = [index for index, of in enumerate(seen) if of in seen[:index]]
        if again:
            text = "has type and unit of a limit before"
            raise invalid(*(Finding(("limits", index), text) for index in again))
        return self


class Reservation(Model):
    """What a request is charged before it is known what it uses, so that parallel requests do not overshoot.

    At its end it is charged what the provider reports. Where nothing is reported, and for requests that are
    broken off, the greater of reservation and what was counted so far stays.
    """

    bytes_per_token: Annotated[StrictInt, Field(ge=1, le=100)] = 4
    """How many bytes of the request body make a prompt token (default: 4)."""
    completion_tokens: Annotated[StrictInt, Field(ge=0, le=MAX_TOKENS)] = 256
    """Completion tokens of a request that does not say how many it wants at most (default: 256)."""
    max_tokens: StrictBool = True
    """Whether max_completion_tokens, max_output_tokens and max_tokens of the request are reserved instead of
    completionTokens (default: true)."""


class LocalCounting(Model):
    """How mode Local counts."""

    max_keys: Annotated[StrictInt, Field(ge=1, le=10_000)] = 1000
    """How many combinations of key values each Envoy counts apart; beyond them, those that come new share
    one count until older ones' windows end (default: 1000)."""
    long_windows: StrictBool = False
    """Allows windows of a day and a month. Each Envoy counts for itself and begins anew when it restarts, so
    what is used in such a window can be a multiple of the limit (default: false)."""


class LimitProvider(Model):
    """A ratelimit service: an extensionProvider of the mesh configuration."""

    name: Line
    """Name of the extensionProvider."""


class LimitTarget(Model):
    """An object of the policy's namespace that the policy is for."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            {
                "sectionName is the rule of an LLMRoute": "!has(self.sectionName) || self.kind == 'LLMRoute'",
            }
        )
    )

    group: Literal["istio.alibabacloud.com", "networking.istio.io"] = "istio.alibabacloud.com"
    """API group: istio.alibabacloud.com (default), for a Gateway networking.istio.io."""
    kind: Literal["LLMRoute", "LLMProvider", "Gateway"]
    """LLMRoute, LLMProvider or Gateway."""
    name: KubernetesName
    """Name of the object."""
    section_name: Line | None = None
    """Name of a rule of the LLMRoute (default: all its rules)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.group == "networking.istio.io") is not (self.kind == "Gateway"):
            group = "networking.istio.io" if self.kind == "Gateway" else "istio.alibabacloud.com"
            raise invalid(Finding(("group",), f"must be '{group}' for a {self.kind}"))
        if self.section_name is not None and self.kind != "LLMRoute":
            raise invalid(Finding(("sectionName",), "is the rule of an LLMRoute"))
        return self


def _without_match(rules: str) -> str:
    return f"(!has({rules}.match) || size({rules}.match) == 0)"


class LLMTokenRateLimitSpec(LabelSelectingSpec):
    """Which requests are counted, by what, and how much is allowed."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            {
                "only one of selector and targetRefs can be set": (
                    "!has(self.selector) || !has(self.targetRefs) || size(self.targetRefs) == 0"
                ),
                "the last rule has no match: it is for all other requests": (
                    f"size(self.rules) == 0 || {_without_match('self.rules[size(self.rules) - 1]')}"
                ),
                "every rule but the last one has a match for each key": (
                    "self.rules.filter(r, has(r.match) && size(r.match) > 0).all(r, "
                    "has(self.keys) && size(r.match) == size(self.keys)) && "
                    f"self.rules.filter(r, {_without_match('r')}).size() == 1"
                ),
                "provider is for mode Global, which needs it": (
                    "(has(self.mode) && self.mode == 'Global') == has(self.provider)"
                ),
                "mode Local needs local.longWindows for limits of a Day or a Month": (
                    "(has(self.mode) && self.mode == 'Global') || (has(self.local) && "
                    "has(self.local.longWindows) && self.local.longWindows) || "
                    "self.rules.all(r, r.limits.all(l, !(l.unit in ['Day', 'Month'])))"
                ),
            }
        )
    )

    target_refs: Annotated[tuple[LimitTarget, ...], Field(max_length=_MAX_TARGETS)] = ()
    """LLMRoutes, LLMProviders and Gateways of the policy's namespace whose requests are counted, instead of a
    selector."""
    mode: Mode = Mode.LOCAL
    """Local: each Envoy counts for itself and begins anew when it restarts, so with several Envoys that many
    times the limit can be used; it needs nothing else. Global: a ratelimit service counts for all Envoys
    (default: Local)."""
    keys: Annotated[tuple[LimitKey, ...], Field(max_length=_MAX_KEYS)] = ()
    """What requests are told apart by (default: nothing, one count for all). A request that lacks one is
    under the last rule, with all others that lack it."""
    rules: Annotated[tuple[LimitRule, ...], Field(min_length=1, max_length=_MAX_RULES)]
    """Limits by the values of the keys; the first rule that matches counts, the last one is for all other
    requests."""
    reservation: Reservation = Field(default_factory=Reservation)
    """What a request is charged before its usage is known."""
    local: LocalCounting = Field(default_factory=LocalCounting)
    """How mode Local counts."""
    provider: LimitProvider | None = None
    """Mode Global: the ratelimit service."""
    shadow: StrictBool = False
    """Counts and shows in logs and metrics what would be refused, but refuses nothing (default: false)."""
    fail_open: StrictBool = False
    """Mode Global: whether requests pass while the ratelimit service cannot be asked (default: false, they
    are refused)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self._findings())
        return self

    def _findings(self) -> list[Finding]:
        found = []
        if self.selector is not None and self.target_refs:
            found.append(Finding(("targetRefs",), "only one of selector and targetRefs can be set"))
        if self.mode is Mode.GLOBAL and self.provider is None:
            found.append(Finding(("provider",), "is missing: mode Global needs the service that counts"))
        if self.mode is Mode.LOCAL and self.provider is not None:
            found.append(Finding(("provider",), "is for mode Global only"))
        names = [key.name for key in self.keys]
        found += [
            Finding(("keys", index), f"is '{name}' again")
            for index, name in enumerate(names)
            if name in names[:index]
        ]
        last = len(self.rules) - 1
        for index, rule in enumerate(self.rules):
            path = ("rules", index, "match")
            if index == last and rule.match:
                text = "the last rule must have no match: it is for all other requests, none is unlimited"
                found.append(Finding(path, text))
            elif index < last and not rule.match:
                found.append(Finding(path, "is missing: only the last rule is for all other requests"))
            elif index < last and len(rule.match) != len(self.keys):
                number = f"{len(self.keys)} {'entry' if len(self.keys) == 1 else 'entries'}"
                found.append(Finding(path, f"must have {number}, one for each of keys"))
            if self.mode is Mode.LOCAL and not self.local.long_windows:
                found += [
                    Finding(
                        ("rules", index, "limits", place, "unit"),
                        f"a {limit.unit} in mode Local needs local.longWindows: true; each Envoy counts for "
                        "itself and begins anew when it restarts",
                    )
                    for place, limit in enumerate(rule.limits)
                    if limit.unit in _LONG
                ]
        rule_names = [self.rule_name(index) for index in range(len(self.rules))]
        found += [
            Finding(("rules", index, "name"), f"'{name}' is the name of a rule before")
            for index, name in enumerate(rule_names)
            if name in rule_names[:index]
        ]
        return found

    def rule_name(self, index: int) -> str:
        """Return the name of a rule in logs and metrics."""
        default = "default" if index == len(self.rules) - 1 else f"rule-{index}"
        return self.rules[index].name or default


class LLMTokenRateLimit(BaseObject):
    """Limits how many tokens of LLMs may be used in a second, a minute, an hour, a day or a month."""

    kind: Literal["LLMTokenRateLimit"]
    spec: LLMTokenRateLimitSpec

    def warnings(self) -> list[Finding]:
        """Tell of what has no effect, and of what a client can get around."""
        spec = self.spec
        found = spec.selection_warnings()
        if spec.fail_open and spec.mode is Mode.LOCAL:
            found.append(Finding(("spec", "failOpen"), "has no effect in mode Local"))
        return found
