"""Many hosts: scoped routes answer as one route configuration does, and no change of form costs a request."""

import re
from collections.abc import Sequence

import pytest

from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, Lab
from tests.support.client import MESSAGES
from tests.support.load import running_load
from tests.support.objects import backends, provider, route
from translator.scopes import MARGIN, THRESHOLD

FEW, MANY = 10, THRESHOLD + MARGIN + 100
QWEN = provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], "qwen")
KIMI = provider("moonshot", MOONSHOT, KEYS[MOONSHOT], "kimi")


def chat(host: str = "chat", to: str = DASHSCOPE) -> str:
    """Return the LLMRoute that the tests look at; by default its host is a Service of its namespace."""
    return route("chat", host, {"backendRefs": backends(to)})


def objects(count: int, *others: str) -> Sequence[str]:
    """Return `others` (LLMRoutes), two providers, and LLMRoutes so that there are `count` in all."""
    filling = range(count - len(others))
    fill = [route(f"host-{n}", f"host-{n}", {"backendRefs": backends(DASHSCOPE)}) for n in filling]
    return (QWEN, KIMI, *others, *fill)


def is_scoped(lab: Lab) -> bool:
    return '"scoped_routes"' in lab.envoy_admin("/config_dump?resource=dynamic_listeners")


def reloads(lab: Lab) -> dict[str, int]:
    """Return how often each route configuration of this Envoy was taken over."""
    text = lab.envoy_admin(r"/stats?filter=rds\.http_proxy/\d+\.config_reload$")
    return {name: int(number) for name, number in re.findall(r"(http_proxy/\d+)\S*: (\d+)", text)}


# Hosts


@pytest.mark.parametrize("count", [FEW, MANY], ids=["few", "many"])
def test_a_host_is_found_by_all_its_names_however_they_are_written(lab: Lab, count: int) -> None:
    lab.apply(*objects(count, chat()))
    assert is_scoped(lab) == (count == MANY)
    names = ["chat", "chat.default", "chat.default.svc", "chat.default.svc.cluster.local", DASHSCOPE]
    for name in names:
        for written in (
            name,
            name.upper(),
            name.title(),
            f"{name}:80",
            f"{name}:8443",
            f"{name}.",
            f"{name}.:80",
        ):
            answer = lab.client.request(written)
            assert (answer.status, answer.json().get("model")) == (200, "qwen"), written


@pytest.mark.parametrize("count", [FEW, MANY], ids=["few", "many"])
def test_an_unknown_host_is_told_so(lab: Lab, count: int) -> None:
    lab.apply(*objects(count, chat()))
    similar = ("chat.other", "chat.default.svc.example.com", "chat.svc", "chat.default.svcs", "xchat")
    for host in ("nobody", "NoBody.example.com", "[::1]", *similar):
        answer = lab.client.request(host)
        assert (answer.status, answer.error["code"]) == (404, "route_not_found"), host


@pytest.mark.parametrize("count", [FEW, MANY], ids=["few", "many"])
def test_hosts_that_begin_like_a_service_are_others(lab: Lab, count: int) -> None:
    others = ("chat.svc.example.com", "chat.default.svc.example.com", "Chat.default.svcs.example.com")
    routes = [
        route(f"other-{n}", host.lower(), {"backendRefs": backends(MOONSHOT)})
        for n, host in enumerate(others)
    ]
    lab.apply(*objects(count, chat(), *routes))
    assert is_scoped(lab) == (count == MANY)
    for host in ("chat", "chat.default", "chat.default.svc", "chat.default.svc.cluster.local"):
        assert lab.client.request(host).json()["model"] == "qwen", host
    for host in others:
        assert lab.client.request(host).json()["model"] == "kimi", host


@pytest.mark.parametrize("host", ["chat", "CHAT"])
def test_the_limit_of_a_body_is_that_of_the_route_however_the_host_is_written(lab: Lab, host: str) -> None:
    lab.apply(*objects(MANY, chat()))
    body = MESSAGES.replace(b"Hi", b"x" * 3_000_000)  # more than what Envoy buffers by default
    assert lab.client.request(host, body).status == 200
    lines = ("POST / HTTP/1.1", f"host: {host}", "content-type: application/json", "content-length: 35000000")
    head = "\r\n".join((*lines, "", "")).encode()
    assert lab.client.raw(head + b" " * 35_000_000).error["code"] == "request_too_large"


def test_many_hosts_with_a_wildcard_among_them_keep_one_route_configuration(lab: Lab) -> None:
    anything = route("anything", "*.wild.example.com", {"backendRefs": backends(MOONSHOT)})
    lab.apply(*objects(MANY, chat()))
    with running_load(lab.mesh.http_proxy, "chat", ["qwen"]):
        lab.apply(*objects(MANY, chat(), anything))
        assert not is_scoped(lab)
        assert lab.client.request("A.Wild.example.com").json()["model"] == "kimi"
        assert lab.client.request("host-1.default").json()["model"] == "qwen"


# Changes


def test_a_changed_host_among_many_reloads_its_bucket_alone(lab: Lab) -> None:
    lab.apply(*objects(MANY, chat()))
    before = reloads(lab)
    assert len(before) > 10
    lab.apply(*objects(MANY, chat(to=MOONSHOT)))
    assert lab.client.request("CHAT").json()["model"] == "kimi"
    after = reloads(lab)
    assert after.keys() == before.keys()
    assert sum(after.values()) == sum(before.values()) + 1


@pytest.mark.parametrize("host", ["chat", "CHAT"])
def test_crossing_the_threshold_costs_no_request(lab: Lab, host: str) -> None:
    """On connections that stay open, through both forms and back, with a change of the route in each."""
    counts = [FEW, THRESHOLD, THRESHOLD + 1, THRESHOLD, MANY, THRESHOLD + 1, THRESHOLD, FEW]
    lab.apply(*objects(FEW, chat()))
    with running_load(lab.mesh.http_proxy, host, ["qwen"]) as load:
        for count in counts:
            lab.apply(*objects(count, chat()))
            assert is_scoped(lab) == (count > THRESHOLD)
            load.wait_for_more()


def test_a_connection_that_drains_gets_the_newest_routes(lab: Lab) -> None:
    """Just above the threshold and below: the form that was in use before is kept up to date."""
    lab.apply(*objects(THRESHOLD, chat()))
    with running_load(lab.mesh.http_proxy, "chat", ["qwen", "kimi"]) as load:
        lab.apply(*objects(THRESHOLD + 1, chat()))
        lab.apply(*objects(THRESHOLD + 1, chat(to=MOONSHOT)))
        load.wait_for("kimi")
        load.wait_for_more()
    with running_load(lab.mesh.http_proxy, "chat", ["kimi", "qwen"]) as load:
        lab.apply(*objects(THRESHOLD, chat(to=MOONSHOT)))
        lab.apply(*objects(THRESHOLD, chat()))
        load.wait_for("qwen")
        load.wait_for_more()


def test_hosts_come_and_go_beside_a_host_under_load(lab: Lab) -> None:
    lab.apply(*objects(MANY, chat()))
    with running_load(lab.mesh.http_proxy, "chat", ["qwen"]):
        for count in (MANY + 20, MANY + 40, 3 * MANY, MANY + 40, MANY):
            lab.apply(*objects(count, chat()))


def test_a_host_that_moves_between_objects_is_answered_all_the_time(lab: Lab) -> None:
    """A provider's own host gets an LLMRoute, and loses it again."""
    routed = chat(DASHSCOPE)
    lab.apply(*objects(MANY))
    with running_load(lab.mesh.http_proxy, DASHSCOPE, ["qwen"]):
        for _ in range(3):
            lab.apply(*objects(MANY + 1, routed))
            lab.apply(*objects(MANY))
