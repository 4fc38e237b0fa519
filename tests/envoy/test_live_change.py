"""A changed file changes what the next request gets, and costs no request that is on its way."""

from itertools import pairwise

from llmplane.fakellm import Fault, Host, fingerprint
from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, Lab
from tests.support.load import running_load
from tests.support.objects import backends, provider, route

CHANGES = 50


def test_a_model_that_changes_fifty_times_costs_no_request_and_no_stream(lab: Lab) -> None:
    models = [f"model-{number}" for number in range(CHANGES + 1)]

    def dashscope(model: str) -> str:
        return provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], model)

    lab.fake.set_fault(DASHSCOPE, Fault(chunks=30, chunk_delay=0.05))  # a stream lives for many changes
    lab.apply(dashscope(models[0]))
    with running_load(lab.mesh.http_proxy, DASHSCOPE, models, connections=32, streams=1) as load:
        for model in models[1:]:
            lab.apply(dashscope(model))
            load.wait_for(model)
        load.wait_until(lambda: load.streams >= 2)
    assert lab.client.request(DASHSCOPE).json()["model"] == models[-1]


def test_a_key_is_rotated_without_a_refused_request(lab: Lab) -> None:
    """The provider takes the old and the new key while the file changes, and then the new one only."""
    keys = [f"sk-rotated-{number}" for number in range(6)]

    def dashscope(key: str) -> str:
        return provider("dashscope", DASHSCOPE, key, "some-model")

    def newest_key() -> str | None:
        return lab.fake.seen[-1].key_fingerprint

    lab.fake.hosts[DASHSCOPE] = Host(keys[0])
    lab.apply(dashscope(keys[0]))
    try:
        with running_load(lab.mesh.http_proxy, DASHSCOPE, ["some-model"]) as load:
            for old, new in pairwise(keys):
                lab.fake.hosts[DASHSCOPE] = Host((old, new))
                lab.apply(dashscope(new))
                load.wait_until(lambda new=new: newest_key() == fingerprint(new))  # type: ignore[misc]
                load.wait_for_all()
                lab.fake.forget()
                lab.fake.hosts[DASHSCOPE] = Host(new)
                load.wait_for_more()
                assert {seen.key_fingerprint for seen in lab.fake.seen} == {fingerprint(new)}
    finally:
        lab.fake.hosts[DASHSCOPE] = Host(KEYS[DASHSCOPE])


def test_other_objects_come_and_go_beside_a_provider_under_load(lab: Lab) -> None:
    dashscope = provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], "qwen")
    moonshot = provider("moonshot", MOONSHOT, KEYS[MOONSHOT], "kimi")
    chat = route("chat", "chat.example.com", {"backendRefs": backends(MOONSHOT)})
    lab.apply(dashscope)
    with running_load(lab.mesh.http_proxy, DASHSCOPE, ["qwen"]):
        for _ in range(5):
            assert lab.client.request("chat.example.com").status != 200
            lab.apply(dashscope, moonshot)
            assert lab.client.request(MOONSHOT).json()["model"] == "kimi"
            lab.apply(dashscope, moonshot, chat)
            assert lab.client.request("chat.example.com").json()["model"] == "kimi"
            lab.apply(dashscope)
            assert lab.client.request(MOONSHOT).status != 200


def test_a_route_moves_its_traffic_to_another_provider_without_a_lost_request(lab: Lab) -> None:
    """The new provider is made with the change that needs it, and the old one goes with it."""
    hosts = {"qwen": DASHSCOPE, "kimi": MOONSHOT}

    def chat(model: str) -> tuple[str, str]:
        host = hosts[model]
        return provider(model, host, KEYS[host], model), route(
            "chat", "chat.example.com", {"backendRefs": backends(host)}
        )

    for host in hosts.values():
        lab.fake.set_fault(host, Fault(chunks=10, chunk_delay=0.05))
    lab.apply(*chat("qwen"))
    for old, new in (("qwen", "kimi"), ("kimi", "qwen")):
        with running_load(lab.mesh.http_proxy, "chat.example.com", [old, new]) as load:
            lab.apply(*chat(new))
            load.wait_for(new)
            streams = load.streams
            load.wait_until(lambda load=load, streams=streams: load.streams > streams)  # type: ignore[misc]


def test_a_change_of_one_file_leaves_the_resources_of_the_others_alone(lab: Lab) -> None:
    """Only what is different travels: Envoy is sent one cluster, and nothing else."""
    lab.apply(
        provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE]), provider("moonshot", MOONSHOT, KEYS[MOONSHOT])
    )
    before = lab.mesh.status()["proxies"][0]["types"]
    lab.apply(
        provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], "other"),
        provider("moonshot", MOONSHOT, KEYS[MOONSHOT]),
    )
    after = lab.mesh.status()["proxies"][0]["types"]
    assert {name for name in after if after[name]["version"] != before[name]["version"]} == {"Cluster"}
