"""What the server knows of its proxies, as plain values."""

from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum

from xds.delta import DeltaSubscription
from xds.group import ORIGIN, Group
from xds.sotw import SotwSubscription
from xds.subscription import LastError


class State(StrEnum):
    """The state of one type at one proxy, in the words of `istioctl proxy-status`."""

    SYNCED = "SYNCED"
    """The proxy accepted everything that it was sent."""
    STALE = "STALE"
    """Its answer is awaited, or something waits to be sent."""
    NACK = "NACK"
    """It refuses something, and keeps what it had."""


@dataclass(frozen=True, slots=True)
class TypeStatus:
    """One resource type at one proxy."""

    state: State
    since: float
    """When it got into this state, seconds since the epoch."""
    version: str
    """Hash of all resources of the type that the proxies of the group should have (`ResourceSet.version`)."""
    sent: str
    """The version to which the proxy was brought, as far as it subscribed to the type; empty: none yet."""
    acknowledged: str
    """The version that the proxy accepted last, or has from an earlier stream; empty: none yet."""
    nonce_sent: str
    """Of the latest response; empty: none yet."""
    nonce_acknowledged: str
    """Of the response that was accepted last."""
    unanswered: int
    """Responses that the proxy has neither accepted nor refused."""
    subscribed: int | None
    """The number of names that it subscribed to; None: all."""
    refused: tuple[str, ...]
    """Names of resources of which it refuses the current version."""
    error: LastError | None
    """The last NACK of this type on this stream, also if it is settled since."""


@dataclass(frozen=True, slots=True)
class ProxyStatus:
    """One stream of one proxy. With separate streams a proxy has several."""

    node_id: str
    node_cluster: str
    metadata: dict[str, object]
    envoy_version: str
    """`1.40.0`; empty if the client does not say."""
    group: Hashable
    delta: bool
    connected_since: float
    """Seconds since the epoch."""
    peer: str
    types: dict[str, TypeStatus]
    """By type URL."""

    @property
    def state(self) -> State:
        """The worst state of all types."""
        states = {status.state for status in self.types.values()}
        return next((state for state in (State.NACK, State.STALE) if state in states), State.SYNCED)


def state_of(subscription: DeltaSubscription | SotwSubscription, group: Group) -> State:
    """Return the state of one subscription."""
    if subscription.failing:
        return State.NACK
    newest = group.point[subscription.type_url]
    reached = subscription.point is not ORIGIN and subscription.point[subscription.type_url] is newest
    if subscription.pending or subscription.deferred or not reached:
        return State.STALE
    return State.SYNCED


def type_status(subscription: DeltaSubscription | SotwSubscription, group: Group) -> TypeStatus:
    """Describe one subscription, whose state is noted."""
    state = state_of(subscription, group)
    sent = subscription.point[subscription.type_url].version if subscription.point is not ORIGIN else ""
    return TypeStatus(
        state=state,
        since=subscription.noted_at,
        version=group.point[subscription.type_url].version,
        sent=sent,
        acknowledged=sent if state is State.SYNCED else subscription.accepted_version,
        nonce_sent=subscription.nonce,
        nonce_acknowledged=subscription.accepted_nonce,
        unanswered=len(subscription.pending),
        subscribed=None if subscription.wildcard else len(subscription.names),
        refused=tuple(sorted(subscription.refused)),
        error=subscription.last_error,
    )
