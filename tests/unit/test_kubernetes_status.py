"""The status of the cluster's objects, and who writes it."""

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import pytest
import structlog
import yaml
from aiohttp import ClientTimeout, web

from crds.loader import LoadedObject, load_object
from crds.problems import ObjectKey
from llmplane import kubeapi, kubestatus, leader
from llmplane.background import running
from llmplane.kubeapi import Api
from llmplane.kubestatus import Figure, StatusWriter, figures, is_written, status_of
from llmplane.leader import Leader
from llmplane.replicas import Replicas
from llmplane.sources.kubernetes import Entry
from tests.support.kubeapi import FakeApi

PROVIDER = """
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata: {name: a}
spec: {host: a.example.com, path: /v1}
"""
GATEWAY = "{apiVersion: networking.istio.io/v1, kind: Gateway, metadata: {name: g}, spec: {}}"
PROGRAMMED = Figure("Programmed", "True", "Programmed", "3/3 proxies", 2)
PENDING = Figure("Programmed", "False", "Pending", "1/3 proxies", 2)


class TestStatus:
    def test_a_word_for_all_conditions(self) -> None:
        accepted = Figure("Accepted", "True", "Accepted", "", 2)
        assert status_of([accepted, PROGRAMMED], {}, "now")["status"] == "OK"
        assert status_of([accepted, PENDING], {}, "now")["status"] == "Pending"

    def test_the_time_is_that_of_the_last_change_of_the_status(self) -> None:
        """Not of the message: 2/3 proxies is as little as 1/3."""
        first = status_of([PENDING], {}, "10:00")
        second = status_of([PENDING._replace(message="2/3 proxies")], first, "10:01")
        third = status_of([PROGRAMMED], second, "10:02")
        times = [each["conditions"][0]["lastTransitionTime"] for each in (first, second, third)]
        assert times == ["10:00", "10:00", "10:02"]

    def test_what_is_there_is_not_written_again(self) -> None:
        status = status_of([PROGRAMMED], {}, "10:00")
        others = {"type": "Audited", "status": "True"}
        assert is_written(status, {**status, "conditions": [others, *status["conditions"]]})
        assert not is_written(status, {**status, "status": "Pending"})
        assert not is_written(status_of([PROGRAMMED._replace(generation=3)], status, "10:01"), status)


def view(programmed: str, *conditions: tuple[str, bool, str, str], generation: int = 2) -> dict[str, Any]:
    names = ("type", "status", "reason", "message")
    found = [dict(zip(names, each, strict=True)) for each in conditions]
    return {"programmed": programmed, "generation": generation, "conditions": found}


class TestProgrammed:
    """By what proxies have acknowledged of the generation that is served."""

    ACCEPTED = ("Accepted", True, "Accepted", "")

    def figure(self, served: dict[str, Any]) -> tuple[str, str, str]:
        *_, figure = figures(self.entry(), served)
        return figure.status, figure.reason, figure.message

    def entry(self) -> Entry:
        document = yaml.safe_load(PROVIDER)
        document["metadata"]["generation"] = 2
        item, _ = load_object(document)
        assert item
        loaded = LoadedObject(item, "", 0, "", "")
        return Entry(loaded.key, "", "uid", 2, "", loaded, (), None, frozenset(), {})

    def test_all_of_them(self) -> None:
        assert self.figure(view("3/3", self.ACCEPTED)) == ("True", "Programmed", "3/3 proxies")

    def test_some_of_them(self) -> None:
        assert self.figure(view("1/3", self.ACCEPTED)) == ("False", "Pending", "1/3 proxies")

    def test_there_are_none(self) -> None:
        status, reason, _ = self.figure(view("0/0", self.ACCEPTED))
        assert (status, reason) == ("Unknown", "NoProxies")

    def test_one_refuses(self) -> None:
        """Envoy's own words stand on the object that caused it."""
        refused = ("Programmed", False, "Refused", "sleep-1 refused outbound|443||a: bad")
        assert self.figure(view("2/3", self.ACCEPTED, refused)) == (
            "False",
            "Refused",
            "2/3 proxies; sleep-1 refused outbound|443||a: bad",
        )

    def test_nothing_is_said_of_a_generation_that_is_not_served_yet(self) -> None:
        assert figures(self.entry(), view("3/3", self.ACCEPTED, generation=1)) == ()


def replica(api: Api, name: str) -> Leader:
    return Leader(api, api.namespace, "llmplane", name)


class TestLeader:
    async def test_one_of_two(self, api: Api) -> None:
        one, two = replica(api, "one"), replica(api, "two")
        for each in (one, two, one, two):
            await each.step()
        assert (one.is_leading, two.is_leading) == (True, False)

    async def test_who_ends_lets_the_other_one_lead_at_once(self, api: Api, fake: FakeApi) -> None:
        one, two = replica(api, "one"), replica(api, "two")
        await one.step()
        await one.release()
        await two.step()
        assert (one.is_leading, two.is_leading) == (False, True)
        assert fake.get("leases", "llmplane", "llmplane-system")["spec"]["leaseTransitions"] == 1

    async def test_who_dies_is_waited_for(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 1000.0
        monkeypatch.setattr(leader.time, "monotonic", lambda: now)
        one, two = replica(api, "one"), replica(api, "two")
        await one.step()
        await two.step()
        now += leader.DURATION - 1
        await two.step()
        assert not two.is_leading
        assert not one.is_leading, "it stops before another one can begin"
        now += 2
        await two.step()
        assert two.is_leading

    async def test_two_that_take_it_at_once(self, api: Api) -> None:
        """The API server lets one of them."""
        replicas = [replica(api, str(number)) for number in range(5)]
        await asyncio.gather(*(each.step() for each in replicas))
        assert sum(each.is_leading for each in replicas) == 1


def entry_of(fake: FakeApi) -> Entry:
    found = fake.get("llmproviders", "a")
    key = ObjectKey("LLMProvider", "default", "a")
    metadata = found["metadata"]
    return Entry(
        key, found["apiVersion"], metadata["uid"], metadata["generation"], "", None, (), None, frozenset(),
        found.get("status", {}),
    )  # fmt: skip


class TestWriter:
    async def test_it_writes_what_is_different_and_nothing_else(
        self, api: Api, fake: FakeApi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kubestatus, "_LOOK", 0.01)
        await fake.put(PROVIDER)
        views: list[dict[str, Any]] = []
        writer = StatusWriter(api, replica(api, "one"), lambda: [entry_of(fake)], lambda: views, bool)
        task = asyncio.create_task(writer.run())
        async with asyncio.timeout(60):
            while "status" not in fake.get("llmproviders", "a"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        found = fake.get("llmproviders", "a")["status"]
        assert found["status"] == "Invalid"
        assert [(each["type"], each["status"]) for each in found["conditions"]] == [
            ("Accepted", "False"),
            ("Programmed", "False"),
        ]
        assert fake.get("llmproviders", "a")["metadata"]["generation"] == 1
        await asyncio.sleep(0.2)
        assert fake.requests["PATCH llmproviders"] == 1
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert fake.get("leases", "llmplane", "llmplane-system")["spec"]["holderIdentity"] == ""

    async def test_one_that_is_refused_keeps_no_other_from_its_status(
        self, api: Api, fake: FakeApi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A right is missing for one kind, or an admission policy is against one object."""
        monkeypatch.setattr(kubestatus, "_LOOK", 0.01)
        await fake.put(PROVIDER)
        provider = entry_of(fake)
        key = provider.key._replace(kind="LLMRoute")
        routes = [replace(provider, key=key._replace(name=name), uid=name) for name in "xyz"]
        refused: list[str] = []

        def refuse(request: web.Request) -> web.Response | None:
            if request.method != "PATCH" or "llmroutes" not in request.path:
                return None
            refused.append(request.path)
            return web.json_response({"message": "llmroutes/status is forbidden"}, status=403)

        fake.refuse = refuse
        writer = StatusWriter(api, replica(api, "one"), lambda: [*routes, entry_of(fake)], list, bool)
        async with running(writer.run()), asyncio.timeout(60):
            while "status" not in fake.get("llmproviders", "a"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert len(refused) == 1, "of its kind one is tried at a time"

    async def test_what_another_replica_wrote_meanwhile_is_corrected_at_once(
        self, api: Api, fake: FakeApi
    ) -> None:
        await fake.put(PROVIDER)
        one, two = replica(api, "one"), replica(api, "two")
        writer = StatusWriter(api, one, lambda: [entry_of(fake)], list, bool)
        await one.step()
        await writer._look()
        written = fake.get("llmproviders", "a")["status"]
        await one.release()
        await two.step()
        await writer._look()
        await fake.put_object({**fake.get("llmproviders", "a"), "status": {"status": "OK"}})
        await two.release()
        await one.step()
        await writer._look()
        assert fake.get("llmproviders", "a")["status"]["status"] == written["status"] == "Invalid"

    async def test_a_mistake_of_ours_lets_another_replica_lead(
        self, api: Api, fake: FakeApi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = replica(api, "one")

        async def fail(_: Replicas) -> None:
            while not one.is_leading:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            raise KeyError("x")

        monkeypatch.setattr(Replicas, "run", fail)
        with pytest.raises(KeyError):
            await StatusWriter(api, one, list, list, bool).run()
        assert fake.get("leases", "llmplane", "llmplane-system")["spec"]["holderIdentity"] == ""

    async def test_who_ends_does_not_wait_for_an_api_server_that_hangs(
        self, api: Api, fake: FakeApi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kubestatus, "_LAST_WRITE", 0.1)
        monkeypatch.setattr(kubeapi, "_REQUEST", ClientTimeout(total=None))
        one = replica(api, "one")
        task = asyncio.create_task(StatusWriter(api, one, list, list, bool).run())
        async with asyncio.timeout(60):
            while not one.is_leading:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            fake.hangs = True
            task.cancel()
            with structlog.testing.capture_logs() as logs, pytest.raises(asyncio.CancelledError):
                await task
        (line,) = logs
        assert line["event"].startswith("the API server does not answer")

    async def test_who_does_not_lead_writes_nothing(
        self, api: Api, fake: FakeApi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kubestatus, "_LOOK", 0.01)
        await replica(api, "other").step()
        await fake.put(PROVIDER)
        writer = StatusWriter(api, replica(api, "one"), lambda: [entry_of(fake)], list, bool)
        task = asyncio.create_task(writer.run())
        await asyncio.sleep(0.2)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert not fake.requests["PATCH llmproviders"]

    @pytest.mark.parametrize(
        ("labels", "is_ours"), [({"app.kubernetes.io/part-of": "llmplane"}, True), ({}, False)]
    )
    async def test_istios_kinds_are_written_where_their_schema_is_ours(
        self,
        api: Api,
        fake: FakeApi,
        monkeypatch: pytest.MonkeyPatch,
        labels: dict[str, str],
        *,
        is_ours: bool,
    ) -> None:
        """Where Istio is installed, its status is its own."""
        monkeypatch.setattr(kubestatus, "_LOOK", 0.01)
        await fake.put(PROVIDER)
        metadata = {"name": "gateways.networking.istio.io", "namespace": "", "labels": labels}
        await fake.put_object({"kind": "CustomResourceDefinition", "metadata": metadata})
        await fake.put(GATEWAY)
        found = fake.get("gateways", "g")["metadata"]
        key = ObjectKey("Gateway", "default", "g")
        gateway = Entry(
            key, "networking.istio.io/v1", found["uid"], 1, "", None, (), None, frozenset(), {}
        )  # fmt: skip
        writer = StatusWriter(api, replica(api, "one"), lambda: [gateway, entry_of(fake)], list, bool)
        task = asyncio.create_task(writer.run())
        async with asyncio.timeout(60):
            while "status" not in fake.get("llmproviders", "a"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert ("status" in fake.get("gateways", "g")) == is_ours
