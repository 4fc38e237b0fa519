"""What several of the tests need."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmplane.kubeapi import Api
from tests.support.control_plane import RunningControlPlane, running_control_plane
from tests.support.kubeapi import FakeApi, connected_api, running_api, write_kubeconfig


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[RunningControlPlane]:
    async with running_control_plane(tmp_path) as running:
        yield running


@pytest.fixture
async def fake() -> AsyncIterator[FakeApi]:
    """Run an API server of the test's own."""
    async with running_api(FakeApi()) as running:
        yield running


@pytest.fixture
async def api(fake: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    """Give a client of it."""
    async with connected_api(write_kubeconfig(tmp_path / "kubeconfig", fake.url), monkeypatch) as connected:
        yield connected
