"""What stands in for refused resources is shared by all replicas of a cluster, and never a secret."""

import asyncio
import base64
import gzip
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from llmplane import kubeacknowledged
from llmplane.acknowledged import Refused
from llmplane.background import running
from llmplane.kubeacknowledged import NAME, AcknowledgedConfigMap, merged
from llmplane.kubeapi import Api
from llmplane.refusals import Refusals
from tests.support.kubeapi import FakeApi
from translator.proxy import Proxy, ProxyType
from xds import protos
from xds.group import Refusal
from xds.resources import CDS, ECDS, SDS, Resource

NAMESPACE = "llmplane-system"


def refused(version: object) -> Refused:
    return (CDS, "a", str(version))


SLEEP, OTHER = (Proxy(ProxyType.SIDECAR, "default", name) for name in ("sleep", "other"))


def refusal(group: Proxy = SLEEP, version: object = 1, name: str = "a") -> Refusal:
    return Refusal(group, CDS, name, str(version), "no such file", time.time(), "sleep-1")


def cluster(seconds: int, *, name: str = "a") -> Resource:
    return Resource.of(protos.Cluster(name=name, connect_timeout={"seconds": seconds}, type="EDS"))


def incompressible(size: int) -> Resource:
    text = random.Random(size).randbytes(size).hex()  # noqa: S311 - it need not be secret
    return Resource.of(protos.Cluster(name="a", alt_stat_name=text))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait little before writing again."""
    monkeypatch.setattr(kubeacknowledged, "_PAUSE", 0.01)
    monkeypatch.setattr(kubeacknowledged, "_FAILURE_PAUSE", 0.01)


@asynccontextmanager
async def replica(api: Api) -> AsyncIterator[AcknowledgedConfigMap]:
    """Run what a replica runs, from when it has read what there is."""
    synced = asyncio.Event()
    archive = AcknowledgedConfigMap(api, synced.set)
    async with running(archive.reflector.run(), archive.write()):
        async with asyncio.timeout(60):
            await synced.wait()
        assert archive.reflector.is_synced
        yield archive


async def when(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.01)


def written(fake: FakeApi) -> dict[str, str]:
    key = ("configmaps", NAMESPACE, NAME)
    data: dict[str, str] = fake.objects[key]["binaryData"] if key in fake.objects else {}
    return data


async def test_what_one_replica_puts_another_one_gets(api: Api, fake: FakeApi) -> None:
    async with replica(api) as one, replica(api) as two:
        assert two.get(refused(1)) is None
        for good in (cluster(1), cluster(2)):
            one.put(refused(1), good)
            assert one.get(refused(1)) == good, "at once"
            await when(lambda good=good: two.get(refused(1)) == good)
        found = two.get(refused(1))
        assert found
        assert found.delta_frame == cluster(2).delta_frame
        assert len(written(fake)) == 1


async def test_who_did_not_find_something_is_told_when_there_is_more(api: Api) -> None:
    async with replica(api) as one, replica(api) as two:
        found: list[Resource | None] = []
        two.on_change = lambda: found.append(two.get(refused(1)))
        one.put(refused(1), cluster(1))
        await when(lambda: found)
        assert found == [cluster(1)]


async def test_a_replica_that_starts_has_read_it_before_it_serves(api: Api) -> None:
    async with replica(api) as one:
        one.put(refused(1), cluster(1))
    # It was written, although the replica ended at once.
    async with replica(api) as later:
        assert later.get(refused(1)) == cluster(1)


async def test_replicas_that_write_at_the_same_time_lose_nothing(api: Api, fake: FakeApi) -> None:
    async with replica(api) as one, replica(api) as two, replica(api) as three:
        for number in range(12):
            for place, archive in enumerate((one, two, three)):
                archive.put(refused(f"{place}-{number}"), cluster(number))
            await asyncio.sleep(0.01)
        await when(lambda: len(written(fake)) == 36)
        for place in range(3):
            for number in range(12):
                version = refused(f"{place}-{number}")
                await when(lambda version=version: all(each.get(version) for each in (one, two, three)))


class TestWhoRefused:
    """It is shared beside what stands in, where people can read it."""

    async def test_other_replicas_and_later_ones_know(self, api: Api, fake: FakeApi) -> None:
        async with replica(api) as one, replica(api) as two:
            one.add(refusal())
            (known,) = one.refusals(SLEEP)
            assert (known.group, known.detail, known.archived) == (SLEEP, "no such file", True)
            two.add(refusal(OTHER))
            for each in (one, two):
                await when(lambda each=each: each.refusals(SLEEP) and each.refusals(OTHER))
            assert not one.refusals("no proxy")
        (record,) = json.loads(fake.objects["configmaps", NAMESPACE, NAME]["data"]["refusals"])
        assert record["audiences"].keys() == {"sidecar~sleep.default~", "sidecar~other.default~"}
        async with replica(api) as later:
            assert later.refusals(SLEEP)
            later.drop(refusal())
            assert not later.refusals(SLEEP)
        async with replica(api) as last:
            assert not last.refusals(SLEEP)
            assert last.refusals(OTHER)

    async def test_replicas_that_write_at_the_same_time_lose_nothing(self, api: Api) -> None:
        async with replica(api) as one, replica(api) as two, replica(api) as three:
            for number in range(12):
                for group, archive in ((SLEEP, one), (OTHER, two), (SLEEP, three)):
                    archive.add(refusal(group, number, "c" if archive is three else "a"))
                await asyncio.sleep(0.01)
            for archive in (one, two, three):
                await when(lambda a=archive: (len(a.refusals(SLEEP)), len(a.refusals(OTHER))) == (24, 12))

    async def test_who_has_not_read_it_yet_loses_nothing(self, api: Api) -> None:
        async with replica(api) as one:
            one.add(refusal())
        blind = AcknowledgedConfigMap(api, lambda: None)
        async with running(blind.write()):
            blind.add(refusal(OTHER))
            await when(lambda: not blind._due_refusals)
        async with replica(api) as later:
            assert later.refusals(SLEEP)
            assert later.refusals(OTHER)

    async def test_what_cannot_be_written_yet_is_known_here(self, api: Api, fake: FakeApi) -> None:
        async with replica(api) as one, replica(api) as two:
            fake.refuse = lambda request: (
                None if request.method == "GET" else web.json_response({}, status=500)
            )
            with capture_logs():
                one.add(refusal())
                metadata = {"name": NAME, "namespace": NAMESPACE}
                other = Refusals()
                other.add(refusal(OTHER))
                data = {"refusals": other.dump()}
                await fake.put_object({"kind": "ConfigMap", "metadata": metadata, "data": data})
                await when(lambda: one.refusals(OTHER))
                assert one.refusals(SLEEP)
                assert not two.refusals(SLEEP)
                fake.refuse = None
                await when(lambda: two.refusals(SLEEP))

    async def test_the_same_is_written_once(self, api: Api, fake: FakeApi) -> None:
        async with replica(api) as one:
            one.add(refusal())
            await when(lambda: not one._due_refusals)
            for _ in range(1000):
                one.add(refusal())
            one.drop(refusal(version=2))
            assert not one._due_refusals
        assert (fake.requests["POST configmaps"], fake.requests["PUT configmaps"]) == (1, 0)

    async def test_a_configmap_of_before_has_only_what_stands_in(self, api: Api, fake: FakeApi) -> None:
        async with replica(api) as one:
            one.put(refused(1), cluster(1))
        document = dict(fake.objects["configmaps", NAMESPACE, NAME])
        del document["data"]
        await fake.put_object({"kind": "ConfigMap", **document})
        async with replica(api) as later:
            assert later.get(refused(1)) == cluster(1)
            assert not later.refusals(SLEEP)
            later.add(refusal())
            await when(lambda: not later._due_refusals)
            assert later.get(refused(1)) == cluster(1)

    async def test_what_cannot_be_read_is_a_warning(self, api: Api, fake: FakeApi) -> None:
        metadata = {"name": NAME, "namespace": NAMESPACE}
        await fake.put_object({"kind": "ConfigMap", "metadata": metadata, "data": {"refusals": "[1]"}})
        with capture_logs() as logs:
            async with replica(api) as one:
                assert not one.refusals(SLEEP)
                one.add(refusal())
        assert {entry["log_level"] for entry in logs} == {"warning"}
        async with replica(api) as later:
            assert later.refusals(SLEEP)


async def test_the_same_is_written_once(api: Api, fake: FakeApi) -> None:
    async with replica(api) as one, replica(api) as two:
        for archive in (one, two):
            archive.put(refused(1), cluster(1))
            await when(lambda archive=archive: not archive._due)
            await when(lambda archive=archive: archive._read())
        asked = fake.requests["GET configmaps"]
        for _ in range(1000):  # as many Envoys refuse it
            one.put(refused(1), cluster(1))
        assert not one._due
        two.put(refused(2), cluster(2))
        await when(lambda: one.get(refused(2)))
        assert (fake.requests["POST configmaps"], fake.requests["PUT configmaps"]) == (1, 1)
        assert fake.requests["GET configmaps"] == asked + 1


async def test_an_api_server_that_takes_nothing_is_a_warning(api: Api, fake: FakeApi) -> None:
    def refuse(request: web.Request) -> web.Response | None:
        if request.method == "GET":
            return None
        return web.json_response({"message": "configmaps is forbidden"}, status=403)

    fake.refuse = refuse
    with capture_logs() as logs:
        async with replica(api) as one:
            one.put(refused(1), cluster(1))
            await when(lambda: fake.requests["POST configmaps"] > 3)
            assert one.get(refused(1)) == cluster(1)
            fake.refuse = None
            await when(lambda: written(fake))
    warnings = [entry for entry in logs if entry["log_level"] == "warning"]
    assert [entry["problem"] for entry in warnings] == ["configmaps is forbidden"], "told once"


async def test_an_entry_that_cannot_be_used_is_a_warning(api: Api, fake: FakeApi) -> None:
    async with replica(api) as one:
        one.put(refused(1), cluster(1))
        one.put(refused(2), cluster(1))
    (first, text), (second, _) = written(fake).items()
    nothing = base64.b64encode(gzip.compress(b"{}")).decode()
    for bad in ("?", base64.b64encode(b"?").decode(), nothing):
        metadata = {"name": NAME, "namespace": NAMESPACE}
        data = {first: bad, second: text, "other": "x"}
        await fake.put_object({"kind": "ConfigMap", "metadata": metadata, "binaryData": data})
        async with replica(api) as later:
            with capture_logs() as logs:
                assert later.get(refused(1)) is None
            assert [entry["log_level"] for entry in logs] == ["warning"]
            assert later.get(refused(2)) is None, "it is that of another version"


async def test_no_key_gets_into_it(api: Api, fake: FakeApi) -> None:
    secret = protos.Secret(name="a", generic_secret={"secret": {"inline_string": "sk-secret"}})
    keys = protos.ApiKeyAuth(credentials=[{"key": "sk-secret", "client": "alice"}])
    policy = protos.TypedExtensionConfig(name="api_keys", typed_config=protos.pack(keys))
    async with replica(api) as one:
        one.put((SDS, "a", "1"), Resource.of(secret))
        one.put((ECDS, "api_keys", "1"), Resource.of(policy))
        one.put(refused(1), cluster(1))
    (text,) = written(fake).values()
    assert b"secret" not in gzip.decompress(base64.b64decode(text))


class TestBounds:
    """A ConfigMap may have a mebibyte."""

    def test_the_oldest_are_forgotten(self) -> None:
        entries: dict[str, str] = {}
        for number in range(300):
            entries = merged(entries, {refused(number): cluster(1)})
        newest = merged({}, {refused(number): cluster(1) for number in range(44, 300)})
        assert list(entries.items()) == list(newest.items())

    def test_what_is_replaced_is_new_again_and_what_is_the_same_stays(self) -> None:
        first, second = merged({}, {refused(1): cluster(1), refused(2): cluster(1)})
        entries = merged({}, {refused(1): cluster(1), refused(2): cluster(1)})
        assert list(merged(entries, {refused(1): cluster(1)})) == [first, second]
        assert list(merged(entries, {refused(1): cluster(2)})) == [second, first]

    def test_as_many_of_the_newest_as_there_is_room_for(self) -> None:
        entries: dict[str, str] = {}
        for number in range(10):
            entries = merged(entries, {refused(number): incompressible(100_000 + number)})
        (newest,) = merged({}, {refused(9): incompressible(100_009)})
        assert 4 <= len(entries) < 10
        assert list(entries)[-1] == newest
        assert sum(map(len, entries.values())) <= 1_000_000

    async def test_what_is_too_large_costs_the_others_nothing(self, api: Api, fake: FakeApi) -> None:
        with capture_logs() as logs:
            async with replica(api) as one:
                one.put(refused(1), cluster(1))
                await when(lambda: written(fake))
                one.put(refused(2), incompressible(1_000_000))
                await when(lambda: logs)
                assert one.get(refused(2)), "here it stands in"
        assert [entry["resources"] for entry in logs] == [["a"]]
        assert len(written(fake)) == 1

    def test_ten_thousand_hosts_compress_well(self) -> None:
        """One route configuration with all of them is the largest resource that there is."""
        hosts = [
            {
                "name": f"p{number}",
                "domains": [f"p{number}.example.com", f"p{number}.example.com:*"],
                "routes": [{"match": {"prefix": "/"}, "route": {"cluster": f"outbound|443||p{number}"}}],
            }
            for number in range(10_000)
        ]
        routes = Resource.of(protos.RouteConfiguration(name="a", virtual_hosts=hosts))
        assert merged({}, {refused(1): routes})
