"""What several of the tests need."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.control_plane import RunningControlPlane, running_control_plane


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[RunningControlPlane]:
    async with running_control_plane(tmp_path) as running:
        yield running
