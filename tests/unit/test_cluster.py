"""The control plane of a cluster as a whole; tests/kube has it at work on a real API server."""

import asyncio
from pathlib import Path

import pytest
import structlog

from llmplane.address import Address
from llmplane.cluster import connected
from llmplane.controlplane import ControlPlane
from llmplane.local import free_port
from llmplane.replicas import Replicas
from tests.support.kubeapi import FakeApi, write_kubeconfig
from translator.world import MeshSettings


async def test_it_ends_when_what_writes_the_status_fails(
    fake: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake of ours; what is started again is better than a status that is silently not true any more."""
    file = str(write_kubeconfig(tmp_path / "kubeconfig", fake.url))
    monkeypatch.setenv("KUBECONFIG", file)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", file)

    async def serve() -> None:
        async with connected(None, MeshSettings(), ControlPlane, lambda _: None, None) as (
            control_plane,
            _,
            _,
        ):
            ports = (Address("127.0.0.1", free_port()) for _ in range(2))
            await control_plane.run(*ports, asyncio.Event())

    with structlog.testing.capture_logs() as logs:

        async def fail(_: Replicas) -> None:
            while not any(line["event"] == "serving" for line in logs):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            raise KeyError("x")

        monkeypatch.setattr(Replicas, "run", fail)
        with pytest.raises(KeyError, match="x"):
            async with asyncio.timeout(60) as deadline:
                await serve()
    assert not deadline.expired()
    assert not any(line["log_level"] in {"warning", "error"} for line in logs)
