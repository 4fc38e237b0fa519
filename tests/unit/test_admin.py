"""The admin endpoints: what each answers, and that no key is in any answer."""

import asyncio
import base64
import json
from typing import Any

import pytest
import yaml

from llmplane import offline
from llmplane.address import Address
from llmplane.admin import AdminServer
from llmplane.mesh import MeshSettings
from llmplane.status import StatusUnavailableError, fetch_status, short_name
from tests.support.control_plane import NODE, RunningControlPlane, fetch
from tests.support.objects import backends, provider, route, secret
from translator.proxy import Proxy, ProxyType
from xds.resources import CDS, LDS, RDS, SDS, Resource

KEY = "sk-0123456789abcdefghijklmnop"
ENDPOINTS = (
    "/healthz",
    "/readyz",
    "/metrics",
    "/debug/status",
    "/debug/syncz",
    "/debug/config_dump",
    "/debug/objects",
)
STATUS = {"revision": 1, "objects": [], "proxies": [], "problems": []}


class Nothing:
    """A control plane that has nothing, and nobody."""

    ready = False

    def is_ready(self) -> bool:
        return self.ready

    def status(self) -> dict[str, Any]:
        return STATUS

    def syncz(self) -> dict[str, Any]:
        return {"proxies": []}

    def objects(self) -> list[dict[str, Any]]:
        return []

    def resources_of(self, _: str) -> list[Resource] | None:
        return None

    def metrics(self) -> bytes:
        return b"m 1\n"


async def test_the_endpoints_of_a_control_plane_that_has_nothing() -> None:
    nothing = Nothing()
    server = AdminServer(nothing)
    address = await server.start(Address("127.0.0.1", 0))

    async def get(path: str, **query: str) -> tuple[int, str, str]:
        return await asyncio.to_thread(fetch, address, path, **query)

    text, json_ = "text/plain; charset=utf-8", "application/json; charset=utf-8"
    try:
        assert await get("/healthz") == (200, "ok\n", text)
        assert await get("/readyz") == (503, "the sources were not read yet\n", text)
        nothing.ready = True
        assert await get("/readyz") == (200, "ok\n", text)
        assert await get("/metrics") == (200, "m 1\n", "text/plain; version=0.0.4; charset=utf-8")
        assert await get("/debug/status") == (200, json.dumps(STATUS), json_)
        assert await get("/debug/syncz") == (200, '{"proxies": []}', json_)
        assert await get("/debug/objects") == (200, "[]", json_)
        hint = "(/debug/syncz has them)\n"
        assert await get("/debug/config_dump") == (400, f"say which proxy: ?proxy=<node_id> {hint}", text)
        assert await get("/debug/config_dump", proxy="x") == (
            404,
            f"this proxy is not connected {hint}",
            text,
        )
        assert (await get("/"))[0] == 404
        assert await asyncio.to_thread(fetch_status, address) == STATUS
    finally:
        await server.stop()
    with pytest.raises(StatusUnavailableError, match=f"no llmplane answers at {address}"):
        await asyncio.to_thread(fetch_status, address)


async def test_the_index_explains_every_endpoint(running: RunningControlPlane) -> None:
    index = await running.get("/debug/")
    assert [line for line in index.splitlines() if line.startswith("/")] == list(ENDPOINTS)
    assert "    Answer 200: the process runs.\n" in index
    assert await running.get("/debug") == index


async def test_what_a_proxy_was_sent_and_acknowledged_is_in_syncz(running: RunningControlPlane) -> None:
    await running.apply(provider("a", "a.example.com"))
    async with running.proxy() as proxy:
        await proxy.request(CDS)
        answer = await proxy.receive()
        (found,) = json.loads(await running.get("/debug/syncz"))["proxies"]
    assert found["node_id"] == NODE
    assert (found["variant"], found["state"]) == ("delta", "STALE")
    clusters = found["types"]["Cluster"]
    since = clusters.pop("since")
    assert since >= found["connected_since"]
    assert clusters == {
        "state": "STALE",
        "version": answer.version,
        "sent": answer.version,
        "acknowledged": "",
        "nonce_sent": answer.nonce,
        "nonce_acknowledged": "",
        "unanswered": 1,
        "subscribed": None,
        "refused": [],
        "error": None,
    }


async def test_objects_have_their_conditions(running: RunningControlPlane) -> None:
    status = await running.apply(provider("a", "a.example.com"))
    objects = json.loads(await running.get("/debug/objects"))
    assert objects == status["objects"]
    assert [condition["type"] for condition in objects[0]["conditions"]] == ["Accepted", "ResolvedRefs"]


async def test_the_dump_of_a_proxy_is_what_translate_prints(running: RunningControlPlane) -> None:
    await running.apply(provider("a", "a.example.com", KEY))
    async with running.proxy() as proxy:
        await proxy.request(CDS)
        await proxy.receive()
        dump = await running.get(f"/debug/config_dump?proxy={NODE}")
        assert await running.get(f"/debug/config_dump?proxy={short_name(NODE)}") == dump
    mine = Proxy(ProxyType.SIDECAR, "default", "")
    text, _ = offline.translate([running.folder], mine, MeshSettings(), {})
    assert sorted(yaml.safe_load_all(dump), key=str) == sorted(yaml.safe_load_all(text), key=str)
    assert "'[redacted]'" in dump


async def test_the_dump_has_the_good_version_of_what_is_in_quarantine(running: RunningControlPlane) -> None:
    def cluster(model_path: str) -> str:
        return provider("a", "a.example.com", KEY, path=model_path)

    await running.apply(cluster("/good"))
    async with running.proxy() as proxy:
        await proxy.request(CDS)
        await proxy.ack(await proxy.receive())
        await running.apply(cluster("/bad"))
        await proxy.nack(await proxy.receive())
        await running.status_when(lambda status: status["problems"])
        dump = await running.get(f"/debug/config_dump?proxy={NODE}")
    clusters = "".join(text for text in dump.split("---\n") if "envoy.config.cluster.v3.Cluster" in text)
    assert "/good" in clusters
    assert "/bad" not in clusters


async def test_no_key_is_in_any_answer(
    running: RunningControlPlane, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither from objects nor from what an Envoy says of the message that it refuses."""
    encoded = base64.b64encode(KEY.encode()).decode()
    by_reference = {"defaultConfig": {"openAIConfig": {"apiKeySecretRef": {"name": "s", "key": "k"}}}}
    await running.apply(
        provider("a", "a.example.com", KEY),
        provider("b", "b.example.com", configs=by_reference),
        secret("s", {"k": KEY}),
        route("r", "r.example.com", {"backendRefs": backends("a.example.com", "b.example.com")}),
    )
    async with running.proxy() as proxy:
        for type_url in (CDS, LDS):
            await proxy.request(type_url)
            await proxy.ack(await proxy.receive())
        await proxy.request(RDS, ["15080"])
        await proxy.ack(await proxy.receive())
        await proxy.request(SDS, ["api-key/default/a", "api-key/default/b"])
        answer = await proxy.receive()
        assert set(answer.versions) == {"api-key/default/a", "api-key/default/b"}
        await proxy.nack(answer, f'bad: generic_secret {{ inline_string: "{KEY}" }} inline_string: {KEY}')
        for _ in range(2):
            await proxy.nack(await proxy.receive(), f'inline_bytes: {encoded} "{KEY[:9]}\\"{KEY[:20]}')
        await running.status_when(
            lambda status: [item["state"] for item in status["objects"]] == ["Refused", "Refused", "OK"]
        )
        answers = [await running.get(path) for path in ("/debug/", *ENDPOINTS) if "config_dump" not in path]
        answers.append(await running.get(f"/debug/config_dump?proxy={NODE}"))
    everything = "".join(answers) + "".join(capsys.readouterr())
    assert "api-key/default/a: inline_bytes: [redacted] [redacted]" in everything
    for hidden in (KEY, KEY[:6], encoded, encoded[:8]):
        assert hidden not in everything
