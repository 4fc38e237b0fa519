"""A running server for each test."""

from collections.abc import AsyncIterator

import pytest

from tests.xds.client import World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    world.port = await world.server.start("127.0.0.1:0")
    world.server.ready()
    yield world
    await world.server.stop()
