"""Proxies of several replicas, added up, and events: without an API server of Kubernetes."""

import asyncio
import base64
import gzip
from collections.abc import AsyncIterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from crds.problems import ObjectKey, Problem, Severity
from llmplane import replicas
from llmplane.background import running
from llmplane.events import Call, Events, calls
from llmplane.kubeapi import Api, ApiError
from llmplane.replicas import NAME, Count, Replicas, key_of, total
from llmplane.sources.kubernetes import Entry
from tests.support.kubeapi import FakeApi

NAMESPACE = "llmplane-system"


def view(programmed: str, *, generation: int = 2, refused: str = "", name: str = "a") -> dict[str, Any]:
    accepted = {"type": "Accepted", "status": True, "reason": "Accepted", "message": ""}
    objection = {"type": "Programmed", "status": False, "reason": "Refused", "message": refused}
    return {
        "kind": "LLMProvider",
        "namespace": "default",
        "name": name,
        "uid": "uid-1",
        "generation": generation,
        "programmed": programmed,
        "conditions": [accepted, *([objection] if refused else [])],
    }


def counts(*views: dict[str, Any]) -> dict[ObjectKey, Count]:
    return {key_of(each): Count.of(each) for each in views}


class TestTotal:
    def test_proxies_are_added_up(self) -> None:
        found = total(view("1/1"), [counts(view("1/2")), counts(view("0/0"))])
        assert (found["programmed"], found["unread"]) == ("2/3", 0)

    def test_those_with_another_version_have_not_acknowledged_this_one(self) -> None:
        assert total(view("1/1"), [counts(view("2/2", generation=1))])["programmed"] == "1/3"

    def test_a_replica_that_has_not_read_the_object_yet(self) -> None:
        assert total(view("1/1"), [counts(view("1/1", name="other"))])["unread"] == 1

    def test_what_envoy_says_at_another_replica_is_told(self) -> None:
        found = total(view("1/1"), [counts(view("0/1", refused="x refused y: bad"))])
        assert found["conditions"][-1] == {
            "type": "Programmed",
            "status": False,
            "reason": "Refused",
            "message": "x refused y: bad",
        }


@pytest.fixture
async def leader(api: Api) -> AsyncIterator[Replicas]:
    """Watch what the others say."""
    watching = Replicas(api, NAMESPACE)
    task = asyncio.create_task(watching.run())
    yield watching
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def programmed(leader: Replicas, expected: list[str]) -> None:
    """Wait until the others say so."""

    def found() -> list[str]:
        return [f"{c.acknowledged}/{c.reached}" for of in leader.others() for c in of.values()]

    async with asyncio.timeout(60):
        while found() != expected:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.01)


class TestReplicas:
    async def test_what_a_replica_tells_arrives_until_it_takes_it_back(
        self, api: Api, leader: Replicas
    ) -> None:
        other = Replicas(api, NAMESPACE)
        await other.tell([view("1/2")])
        await programmed(leader, ["1/2"])
        await other.retire()
        await programmed(leader, [])

    async def test_the_same_is_written_once_and_changes_at_a_bounded_rate(
        self, api: Api, fake: FakeApi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 1000.0
        other = Replicas(api, NAMESPACE)
        monkeypatch.setattr(replicas, "time", SimpleNamespace(monotonic=lambda: now))
        for _ in range(3):
            await other.tell([view("1/2")])
        assert fake.requests["PATCH configmaps"] == 1
        for number in range(100):
            now += 0.019
            await other.tell([view(f"{number}/100")])
        assert fake.requests["PATCH configmaps"] == 2, "one in each of two seconds"

    async def test_a_dead_replica_counts_no_longer(
        self, api: Api, leader: Replicas, fake: FakeApi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = Replicas(api, NAMESPACE)
        await other.tell([view("1/2")])
        await programmed(leader, ["1/2"])
        real = replicas.time.monotonic
        monkeypatch.setattr(replicas.time, "monotonic", lambda: real() + 13)
        assert leader.others() == []
        await other.renew()
        await programmed(leader, ["1/2"])
        monkeypatch.setattr(replicas.time, "monotonic", lambda: real() + 120)
        await leader.bury()
        assert fake.get("configmaps", NAME, NAMESPACE)["binaryData"] == {}

    async def test_who_was_taken_for_dead_is_counted_again(
        self, api: Api, leader: Replicas, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It could not reach the API server for more than a minute; its counts are what they were."""
        other = Replicas(api, NAMESPACE)
        async with running(other.run()):
            await other.tell([view("1/2")])
            await programmed(leader, ["1/2"])
            real = replicas.time.monotonic
            monkeypatch.setattr(replicas.time, "monotonic", lambda: real() + 120)
            await leader.bury()
            async with asyncio.timeout(60):
                while leader.others() == []:
                    await other.renew()
                    await other.tell([view("1/2")])
                    await asyncio.sleep(0.01)
            await programmed(leader, ["1/2"])

    @pytest.mark.parametrize("size", [5, 15, 25])
    async def test_counts_that_cannot_be_read(
        self, api: Api, leader: Replicas, fake: FakeApi, size: int
    ) -> None:
        """They hinder no status: the replica has not read any object yet, as far as one knows."""
        await Replicas(api, NAMESPACE).tell([view("1/2")])
        await programmed(leader, ["1/2"])
        config_map = fake.get("configmaps", NAME, NAMESPACE)
        bad = base64.b64encode(gzip.compress(bytes(100))[:size]).decode()
        await fake.put_object({**config_map, "binaryData": dict.fromkeys(config_map["binaryData"], bad)})
        await programmed(leader, [])
        assert leader.others() == [{}]

    async def test_ten_thousand_objects_are_some_hundred_kilobytes(self, api: Api, fake: FakeApi) -> None:
        """A ConfigMap may have a megabyte."""
        views = [view("3/3", name=f"provider-{n}") | {"uid": f"{n * 7919:036x}"} for n in range(10_000)]
        await Replicas(api, NAMESPACE).tell(views)
        (text,) = fake.get("configmaps", NAME, NAMESPACE)["binaryData"].values()
        assert len(text) < 200_000


def entry(*problems: str, severity: Severity = Severity.ERROR, generation: int = 2) -> Entry:
    key = ObjectKey("LLMProvider", "default", "a")
    found = tuple(Problem(severity, "", 0, *key, "spec.host", text) for text in problems)
    return Entry(
        key, "istio.alibabacloud.com/v1", "uid-1", generation, "", None, found, None, frozenset(), {}
    )


class TestEvents:
    def test_what_is_told_of_an_object(self) -> None:
        assert list(calls(entry("is wrong"), None)) == [Call("Invalid", "spec.host: is wrong", "2")]
        warned = entry("is odd", severity=Severity.WARNING)
        (call,) = calls(warned, None)
        assert call[:2] == ("Warning", "spec.host: is odd")
        assert [call] == list(calls(entry("is odd", severity=Severity.WARNING, generation=3), None)), (
            "one for all generations"
        )

    async def test_each_is_made_once(self, api: Api, fake: FakeApi) -> None:
        """Also by another replica; but again for another generation."""
        for of in (Events(api), Events(api)):
            for _ in range(2):
                await of.tell([(entry(), Call("Invalid", "is wrong", "2"))])
        assert fake.requests["POST events"] == 2
        ((_, _, name),) = [key for key in fake.objects if key[0] == "events"]
        event = fake.get("events", name)
        assert (event["type"], event["reason"], event["note"]) == ("Warning", "Invalid", "is wrong")
        assert event["regarding"]["uid"] == "uid-1"
        await Events(api).tell([(entry(), Call("Invalid", "is wrong", "3"))])
        assert len([key for key in fake.objects if key[0] == "events"]) == 2

    async def test_one_that_is_not_made_for_want_of_credentials_is_made_later(
        self, api: Api, fake: FakeApi
    ) -> None:
        """They were changed, and are read again."""
        found = [(entry(), Call("Invalid", "is wrong", "2"))]
        events = Events(api)
        fake.token = "token-2"  # noqa: S105 - of a test
        with pytest.raises(ApiError, match="Unauthorized"):
            await events.tell(found)
        fake.token = ""
        await events.tell(found)
        assert [key for key in fake.objects if key[0] == "events"]

    async def test_what_an_event_may_be(self, api: Api, fake: FakeApi) -> None:
        """Its name is one of DNS, and its note has 1,024 bytes at most (seen on a real API server)."""
        long = entry()
        long.key = long.key._replace(name="a" * 199 + "-b")
        await Events(api).tell([(long, Call("Invalid", "\u4ef7" * 500, "2"))])
        ((_, _, name),) = [key for key in fake.objects if key[0] == "events"]
        assert "-." not in name
        note = fake.get("events", name)["note"]
        assert note == "\u4ef7" * 340 + " ..."
        assert len(note.encode()) == 1024

    async def test_a_few_at_a_time(self, api: Api, fake: FakeApi) -> None:
        many = [(entry(), Call("Invalid", "is wrong", str(n))) for n in range(25)]
        events = Events(api)
        await events.tell(many)
        assert fake.requests["POST events"] == 10
        await events.tell(many)
        await events.tell(many)
        assert fake.requests["POST events"] == 25
