"""One of several replicas does what must be done once: the holder of a Lease (coordination.k8s.io/v1).

As in client-go: who holds it renews it; who does not takes it over when it was not renewed for its duration,
by one's own clock. The API server lets one of several writers win (resourceVersion).
"""

import os
import secrets
import socket
import time
from datetime import UTC, datetime
from typing import Any

import structlog

from llmplane.kubeapi import Api, ApiError

_LOG = structlog.get_logger(__name__)

DURATION = 15
"""Seconds after which a Lease that is not renewed can be taken over (client-go's default)."""
RENEW = 5
"""Seconds between two renewals."""
_CONFLICT = 409
_NOT_FOUND = 404


class Leader:
    """Holds a Lease, or tries to."""

    def __init__(self, api: Api, namespace: str, name: str, identity: str | None = None) -> None:
        self._api = api
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._metadata = {"name": name, "namespace": namespace}
        self._identity = identity or f"{socket.gethostname()}_{os.getpid()}_{secrets.token_hex(4)}"
        self._seen: tuple[Any, Any] | None = None
        """Holder and time of the renewal that was seen last, and when."""
        self._seen_at = 0.0
        self._until = 0.0

    @property
    def is_leading(self) -> bool:
        """Whether nobody else can hold the Lease now."""
        return time.monotonic() < self._until

    async def step(self) -> None:
        """Renew the Lease, or take it if it is free. Call it every `RENEW` seconds."""
        was_leading = self.is_leading
        began = time.monotonic()
        try:
            is_held = await self._take()
        except ApiError as error:
            # Its time goes on: whether it is held until then does not depend on this answer.
            if error.status != _CONFLICT:
                _LOG.warning("the Lease cannot be written", problem=str(error))
            return
        self._until = began + DURATION - RENEW if is_held else 0.0
        if is_held != was_leading:
            _LOG.info("leading" if is_held else "not leading any more", lease=self._metadata["name"])

    async def release(self) -> None:
        """Let another replica have the Lease at once."""
        if not self.is_leading:
            return
        self._until = 0.0
        try:
            lease = await self._api.get(f"{self._path}/{self._metadata['name']}")
            if lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self._api.put(f"{self._path}/{self._metadata['name']}", lease)
        except ApiError as error:
            _LOG.warning("the Lease cannot be released", problem=str(error))

    async def _take(self) -> bool:
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        own: dict[str, Any] = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": DURATION,
            "renewTime": now,
        }
        try:
            lease = await self._api.get(f"{self._path}/{self._metadata['name']}")
        except ApiError as error:
            if error.status != _NOT_FOUND:
                raise
            own |= {"acquireTime": now, "leaseTransitions": 0}
            kind = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
            await self._api.post(self._path, {**kind, "metadata": self._metadata, "spec": own})
            return True
        spec: dict[str, Any] = lease.get("spec") or {}
        holder = spec.get("holderIdentity")
        if holder and holder != self._identity:
            if self._seen != (holder, spec.get("renewTime")):
                self._seen, self._seen_at = (holder, spec.get("renewTime")), time.monotonic()
            if time.monotonic() - self._seen_at < int(spec.get("leaseDurationSeconds") or DURATION):
                return False
        if holder != self._identity:
            own |= {"acquireTime": now, "leaseTransitions": int(spec.get("leaseTransitions") or 0) + 1}
        await self._api.put(f"{self._path}/{self._metadata['name']}", {**lease, "spec": {**spec, **own}})
        return True
