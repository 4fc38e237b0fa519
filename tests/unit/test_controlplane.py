"""A mistake of ours in the middle of the way does not end the program, nor what already works."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import structlog

from llmplane.address import Address
from llmplane.controlplane import ControlPlane
from llmplane.sources.state import SourceState
from translator.world import MeshSettings

ANY = Address("127.0.0.1", 0)


class ThreeStates:
    """A source of three states; it ends the program after the last one."""

    async def states(self, stop: asyncio.Event) -> AsyncIterator[SourceState]:
        for held in (1, 2, 3):
            yield SourceState(incomplete=held % 2 == 0)
        stop.set()


async def test_a_state_that_cannot_be_taken_over_is_logged_and_the_next_one_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []

    def world_of(state: SourceState, mesh: MeshSettings) -> object:
        taken.append(state)
        if len(taken) == 1:
            raise ValueError("a mistake")
        return real(state, mesh)

    from llmplane import controlplane  # noqa: PLC0415 - to be patched

    real = controlplane.world_of
    control_plane = ControlPlane(ThreeStates(), MeshSettings())
    taken.clear()
    monkeypatch.setattr(controlplane, "world_of", world_of)
    with structlog.testing.capture_logs() as logs:
        await control_plane.run(ANY, ANY, asyncio.Event())
    events = [entry["event"] for entry in logs]
    assert any("could not be taken over" in event for event in events)
    assert "serving" in events, "the second state was served"
