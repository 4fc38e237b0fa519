"""What can be seen of the streams from outside: events for metrics, and since when a stream is as it is."""

import time
from collections.abc import Mapping

from xds.delta import DeltaSubscription
from xds.group import Group
from xds.sotw import SotwSubscription
from xds.status import State, state_of


class Observer:
    """Is told what happens on the streams, on the event loop. This one does not listen.

    Type URLs are what the clients say: any text.
    """

    def pushed(self, type_url: str, size: int, seconds: float) -> None:
        """Note a response of `size` bytes that took so long to make, and to hand to the transport."""

    def rejected(self, type_url: str) -> None:
        """Note a NACK."""

    def nonce_expired(self, type_url: str) -> None:
        """Note a request with a nonce that is neither the latest one nor that of an unanswered response."""

    def node_rejected(self, status: str) -> None:
        """Note a stream that is not served, or not any longer, with the name of its gRPC status."""

    def converged(self, seconds: float) -> None:
        """Note that a proxy acknowledged everything, so long after a change began."""


class Progress:
    """How one stream follows the changes."""

    __slots__ = ("_changed_at",)

    def __init__(self) -> None:
        self._changed_at: float | None = None
        """When the first change that is not acknowledged yet began (`time.monotonic`)."""

    def begin(self, changed_at: float) -> None:
        """Note that there is a change, which began at that time (`time.monotonic`)."""
        if self._changed_at is None:
            self._changed_at = changed_at

    def note(
        self, subscriptions: Mapping[str, DeltaSubscription | SotwSubscription], group: Group
    ) -> float | None:
        """Note the states; return seconds since the change that is acknowledged now, if there is one."""
        worst = State.SYNCED
        for subscription in subscriptions.values():
            state = state_of(subscription, group)
            if state != subscription.noted:
                late = state is State.STALE and self._changed_at is not None
                ago = time.monotonic() - self._changed_at if late and self._changed_at is not None else 0.0
                subscription.noted, subscription.noted_at = state, time.time() - ago
            if state is not State.SYNCED:
                worst = State.NACK if State.NACK in (state, worst) else State.STALE
        if worst is State.STALE or self._changed_at is None:
            return None
        seconds, self._changed_at = time.monotonic() - self._changed_at, None
        return seconds if worst is State.SYNCED else None
