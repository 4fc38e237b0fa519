"""All resource types on one stream: in which order they are sent, and what waits for what. No I/O.

Make before break, for each proxy by itself (xds_protocol, "Eventual consistency considerations"):

1. Clusters that are new or changed are sent, then their endpoints, unasked. Secrets never wait.
2. Changes of listeners, routes and filters that the proxy has in use wait until it accepted (ACK) the
   clusters that are new to it. From Envoy 1.40 over ADS, the ACK of clusters means that they are warm. What
   a proxy asks for and does not have is answered at once.
3. Clusters that vanished are removed when the proxy accepted the listeners and routes of the same point.
4. Endpoints and secrets that vanished are removed when it accepted the removal of the clusters.

Each step waits at most `PATIENCE`: a provider whose DNS never answers delays the others that long, once.
The exception: as long as a proxy refuses a listener or route and keeps an older one, what that may refer to
stays.

On separate streams (one a type) there is no order between types; Envoy's documentation wants ADS for that.
"""

import math
from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar

from xds.delta import DeltaSubscription
from xds.group import ORIGIN, Group, Point, Response
from xds.resources import CDS, ECDS, EDS, LDS, RDS, SDS, SRDS
from xds.sotw import SotwSubscription
from xds.subscription import MAX_NAME, MAX_NAMES, Phase, TooManyNamesError

PATIENCE: Final = 5.0
"""Seconds that one step waits for the one before."""

MAX_TYPES: Final = 32
"""Resource types that one stream may subscribe to."""

AFTER_CLUSTERS: Final = frozenset({LDS, SRDS, RDS, ECDS})

REMOVED_AFTER: Final = {
    CDS: ((LDS, SRDS, RDS, ECDS), 2 * PATIENCE),
    RDS: ((LDS, SRDS), 2 * PATIENCE),
    EDS: ((CDS,), 3 * PATIENCE),
    SDS: ((CDS, LDS), 3 * PATIENCE),
}
"""Per type: whose new state has to be accepted before something is removed, and seconds that this waits,
counted from when it was seen to have vanished."""

S = TypeVar("S", DeltaSubscription, SotwSubscription)


class TooManyTypesError(Exception):
    """A client subscribed to more types than there are, or to one whose name is no type's."""


class Stream(Generic[S]):
    """The subscriptions of one stream."""

    __slots__ = ("_kind", "_node_id", "_settled", "group", "subscriptions")

    def __init__(self, group: Group, node_id: str, kind: Callable[[str, Group, str], S]) -> None:
        self.group = group
        self.subscriptions: dict[str, S] = {}
        self._node_id = node_id
        self._kind: Callable[[str, Group, str], S] = kind
        self._settled: Point = ORIGIN
        """The newest point of which the client accepted all new clusters."""

    def subscription(self, type_url: str) -> S:
        """Return the subscription to a type, a new one if there is none. Raises TooManyTypesError."""
        subscription = self.subscriptions.get(type_url)
        if subscription is None:
            if len(self.subscriptions) >= MAX_TYPES or len(type_url) > MAX_NAME:
                raise TooManyTypesError
            subscription = self.subscriptions[type_url] = self._kind(type_url, self.group, self._node_id)
        return subscription

    def check_names(self) -> None:
        """Raise TooManyNamesError if the client subscribed to too many names, all types together."""
        if sum(len(subscription.names) for subscription in self.subscriptions.values()) > MAX_NAMES:
            raise TooManyNamesError

    def next_response(self, now: float) -> Response | None:
        """Return the response that is to be sent now, if any; `now` in seconds of a monotonic clock."""
        response = self._next_response(now)
        if response is None and any(subscription.deferred for subscription in self.subscriptions.values()):
            # Types that come later in the order may just have got to the newest point without a response.
            response = self._next_response(now)
        heartbeats = (subscription.heartbeat(now) for subscription in self._in_order())
        return response or next((heartbeat for heartbeat in heartbeats if heartbeat is not None), None)

    def wake_at(self, now: float) -> float | None:
        """Return when something waited long enough, if anything waits: a time after `now`."""
        times = []
        for subscription in self.subscriptions.values():
            if subscription.waiting_since is not None:
                times.append(subscription.waiting_since + PATIENCE)
            if subscription.renew_at is not None:
                times.append(subscription.renew_at)
            if subscription.deferred:
                _, patience = self._removal(subscription)
                times += [deferral.since + patience for deferral in subscription.deferred.values()]
        return min((time for time in times if now < time < math.inf), default=None)

    def _next_response(self, now: float) -> Response | None:
        clusters = self.subscriptions.get(CDS)
        self._note_settled(clusters)
        for subscription in self._in_order():
            if subscription.is_at_rest(self.group.point):
                continue
            response = subscription.next_response(self._phase(subscription, clusters, now))
            if subscription is clusters:
                self._note_settled(clusters)
                if response is not None and response.endpoints and EDS in self.subscriptions:
                    self.subscriptions[EDS].force_endpoints(response.endpoints)
            if response is not None:
                return response
        return None

    def _in_order(self) -> Iterator[S]:
        subscriptions, order = self.subscriptions, self.group.order
        yield from (subscriptions[type_url] for type_url in order if type_url in subscriptions)
        yield from (subscription for type_url, subscription in subscriptions.items() if type_url not in order)

    def _note_settled(self, clusters: S | None) -> None:
        if clusters is not None and not clusters.adding and clusters.point.sequence > self._settled.sequence:
            self._settled = clusters.point

    def _phase(self, subscription: S, clusters: S | None, now: float) -> Phase:
        newest = self.group.point
        removable, patience = self._removal(subscription)
        phase = Phase(newest=newest, target=newest, now=now, removable=removable, patience=patience)
        waits = (
            clusters is not None
            and clusters.adding
            and subscription.live
            and subscription.type_url in AFTER_CLUSTERS
        )
        if not waits or clusters is None:
            subscription.waiting_since = None
            return phase
        reachable = max(subscription.point, self._settled, key=lambda point: point.sequence)
        if reachable is not ORIGIN and reachable[subscription.type_url] is newest[subscription.type_url]:
            subscription.waiting_since = None
            return phase
        if subscription.waiting_since is None:
            subscription.waiting_since = now
        if now < subscription.waiting_since + PATIENCE:
            phase.target = reachable
        else:
            clusters.excuse()
        return phase

    def _removal(self, subscription: S) -> tuple[float, float]:
        """Return up to which sequence removals need not wait, and how many seconds the others wait."""
        types, patience = REMOVED_AFTER.get(subscription.type_url, ((), 0.0))
        removable = math.inf
        for type_url in types:
            other = self.subscriptions.get(type_url)
            if other is None:
                continue
            removable = min(removable, other.settled_sequence)
            if other.deferred:
                removable = min(removable, min(deferral.sequence for deferral in other.deferred.values()) - 1)
            if other.refused:
                removable = min(removable, other.refused_at - 1)
                patience = math.inf
        return removable, patience
