"""Providers that no LLMRoute names: one more is no new route, and no host reaches what it must not."""

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from llmplane.fakellm import FakeLLM, Host, running_in_thread
from tests.envoy.conftest import DASHSCOPE, KEYLESS, KEYS, MOONSHOT, OPENAI, Lab, running_lab
from tests.support.client import MESSAGES, Answer
from tests.support.envoy import has
from tests.support.load import running_load
from tests.support.objects import backends, provider, route, service
from tests.support.wait import eventually
from translator.features import Feature
from translator.scopes import MARGIN, THRESHOLD

QWEN = provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], "qwen")
KIMI = provider("moonshot", MOONSHOT, KEYS[MOONSHOT], "kimi")
GPT = provider("openai", OPENAI, KEYS[OPENAI], "gpt")
MANY = [
    route(f"host-{n}", f"host-{n}.example.org", {"backendRefs": backends(DASHSCOPE)})
    for n in range(THRESHOLD + MARGIN + 1)
]
UNKNOWN = (404, "route_not_found")

needs_scopes = pytest.mark.needs(Feature.SCOPED_ROUTES)
both_forms = pytest.mark.parametrize("others", [[], MANY], ids=["one form", "scoped"])


@pytest.fixture(scope="module", params=["DELTA_GRPC", "GRPC"], ids=["delta", "sotw"])
def shared_lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Run a lab whose Envoy speaks this variant of the protocol."""
    ads = {"dynamic_resources": {"ads_config": {"api_type": request.param}}}
    with running_lab(envoy_options=["--config-yaml", json.dumps(ads)]) as lab:
        yield lab


def model(lab: Lab, host: str) -> object:
    """Return the model that answers for a host, or the code of the error."""
    answer = lab.client.request(host)
    return answer.json().get("model") if answer.status == 200 else (answer.status, answer.error["code"])


def send(lab: Lab, host: str, body: bytes, *headers: str) -> Answer:
    """Send a request whose host is a header and nothing else, as it is."""
    lines = ["POST / HTTP/1.1", f"host: {host}", "content-type: application/json", *headers]
    lines += [f"content-length: {len(body)}", "connection: close"]
    return lab.client.raw("\r\n".join((*lines, "", "")).encode() + body)


def is_scoped(lab: Lab) -> bool:
    return '"scoped_routes"' in lab.envoy_admin("/config_dump?resource=dynamic_listeners")


def clusters(lab: Lab) -> set[str]:
    """Return the names of Envoy's clusters."""
    return {line.partition("::")[0] for line in lab.envoy_admin("/clusters").splitlines()}


def updates(lab: Lab) -> dict[str, int]:
    """Return how often Envoy was sent listeners and each route configuration, and how often it took them."""
    pattern = r"^(listener_manager\.lds|http\S*\.rds\S*)\.(update_attempt|update_success|config_reload)$"
    text = lab.envoy_admin(f"/stats?filter={quote(pattern)}")
    found = {name: int(number) for name, number in re.findall(r"(\S+): (\d+)", text)}
    assert any(".rds." in name for name in found), text
    return found


def assert_no_route_changed(lab: Lab, before: dict[str, int]) -> None:
    """Scoped, or scoped before, the bucket of a new host may be one that no host had."""
    assert {name: number for name, number in updates(lab).items() if name in before} == before


@both_forms
def test_a_provider_comes_and_goes_beside_requests_and_no_route_changes(lab: Lab, others: list[str]) -> None:
    lab.apply(QWEN, GPT, *others)
    assert model(lab, MOONSHOT) == UNKNOWN
    eventually(lambda: model(lab, DASHSCOPE) == "qwen")
    before = updates(lab)
    with running_load(lab.mesh.http_proxy, DASHSCOPE, ["qwen"], connections=8) as load:
        lab.apply(QWEN, GPT, KIMI, *others)
        eventually(lambda: model(lab, MOONSHOT) == "kimi")
        load.wait_for_more()
        lab.apply(QWEN, GPT, *others)
        eventually(lambda: model(lab, MOONSHOT) == UNKNOWN)
    assert_no_route_changed(lab, before)


FULL = "llm.default.svc.cluster.local"


@pytest.fixture(scope="module")
def in_clear() -> Iterator[FakeLLM]:
    """Run an LLM in the mesh: a Service, called without TLS."""
    fake = FakeLLM({host: Host() for host in ("llm", FULL, KEYLESS)})
    with running_in_thread(fake):
        yield fake


def at(fake: FakeLLM) -> dict[str, Any]:
    """Return what leads a provider there."""
    address, _, port = fake.address.rpartition(":")
    return {"tls": {"mode": "DISABLE"}, "endpoints": [{"address": address, "port": int(port)}]}


@both_forms
def test_whatever_a_provider_is_like_it_changes_no_route(
    lab: Lab, in_clear: FakeLLM, others: list[str]
) -> None:
    """Its port, its host, how much it takes."""
    lab.apply(QWEN, GPT, *others)
    before = updates(lab)
    large = at(in_clear) | {"maxRequestBytes": 40_000_000}
    lab.apply(
        QWEN,
        GPT,
        provider("llm", "llm", model="small", **at(in_clear)),
        provider("ollama", KEYLESS, model="llama", port=11434, **large),
        *others,
    )
    for host in ("llm", "llm.default", "llm.default.svc", FULL, FULL.upper(), "LLM:80", "llm.default."):
        eventually(lambda host=host: model(lab, host) == "small")
    eventually(lambda: model(lab, KEYLESS) == "llama")
    assert model(lab, "llm.other") == UNKNOWN
    assert_no_route_changed(lab, before)


@both_forms
def test_the_names_of_a_service_are_one_host(lab: Lab, in_clear: FakeLLM, others: list[str]) -> None:
    """Whichever the provider, an LLMRoute that refers to it, and the client have."""
    lab.apply(
        provider("llm", FULL, model="small", **at(in_clear)),
        route("chat", "chat.example.com", {"backendRefs": backends("llm.default")}),
        *([QWEN, *others] if others else ()),
    )
    for host in ("llm", "llm.default.svc", FULL.title(), "chat.example.com"):
        eventually(lambda host=host: model(lab, host) == "small")
    for host in ("llm.default.svc.svc.cluster.local", "a.llm.default.svc", ".svc", "llm.svc"):
        assert model(lab, host) == UNKNOWN, host
    (name,) = {name for name in clusters(lab) if "llm" in name}
    assert name == "outbound|443||llm.default"


@both_forms
def test_a_plain_host_is_found_however_it_is_written(lab: Lab, others: list[str]) -> None:
    lab.apply(QWEN, *others)
    assert is_scoped(lab) == (bool(others) and has(Feature.SCOPED_ROUTES))
    eventually(lambda: model(lab, DASHSCOPE) == "qwen")
    for name in (DASHSCOPE, DASHSCOPE.upper(), DASHSCOPE.title()):
        for written in (name, f"{name}:80", f"{name}:8443", f"{name}.", f"{name}.:80"):
            assert model(lab, written) == "qwen", written
    for seen in lab.all_seen():
        assert dict(seen.headers)["host"] == DASHSCOPE
        assert not [name for name, _ in seen.headers if name.startswith("x-envoy")]


@both_forms
def test_no_made_up_host_reaches_a_cluster(lab: Lab, others: list[str]) -> None:
    """Clusters of rules, Services, providers of others: they are for LLMRoutes."""
    rules = {"name": "vip", "backendRefs": backends(DASHSCOPE)}
    configs = {"defaultConfig": {"openAIConfig": {"apiKey": KEYS[DASHSCOPE], "model": "qwen"}}}
    to_service = {"backendRefs": [{"backendRef": {"name": "egress", "port": 443}}]}
    vip = configs | {"routeSpecificConfigs": {"vip": {"openAIConfig": {"model": "large"}}}}
    lab.apply(
        provider("dashscope", DASHSCOPE, configs=vip),
        provider("istio-system/moonshot", MOONSHOT, KEYS[MOONSHOT], "kimi", exportTo=["."]),
        provider("openai", OPENAI, KEYS[OPENAI], "gpt", port=8443),
        service("egress", {}, (443, 8443)),
        route("chat", "chat.example.com", rules),
        route("istio-system/moonshot", "kimi.example.com", {"backendRefs": backends(MOONSHOT)}),
        route("egress", "egress.example.com", to_service),
        *others,
    )
    eventually(lambda: model(lab, "chat.example.com") == "large")
    assert model(lab, "kimi.example.com") == "kimi"
    lab.fake.forget()
    found = clusters(lab)
    assert {f"outbound|443|vip|{DASHSCOPE}", "outbound|443||egress.default.svc.cluster.local"} <= found
    made_up = {"nobody", "-", "egress.default.svc.cluster.local", MOONSHOT, MOONSHOT.upper(), "[::1]"}
    made_up |= {"egress", "egress.default", "egress.default.svc"}
    for name in found:  # whole names, and all that is behind a separator
        made_up |= {name} | {name.split("|", parts)[parts] for parts in range(1, name.count("|") + 1)}
    for host in made_up - {DASHSCOPE, OPENAI}:
        answer = send(lab, host, MESSAGES, f"x-envoy-llmplane-routes: outbound|443|vip|{DASHSCOPE}")
        assert answer.status in {400, 404}, host
        if answer.status == 404:
            assert answer.error["code"] == "route_not_found"
    assert not lab.all_seen()


def test_the_client_cannot_choose_the_cluster_by_a_header(lab: Lab) -> None:
    lab.apply(QWEN, KIMI)
    for name in ("x-envoy-llmplane-routes", "X-Envoy-LLMPlane-Routes"):
        headers = {name: f"outbound|443||{MOONSHOT}"}
        assert lab.client.request(DASHSCOPE, headers=headers).json()["model"] == "qwen"
        assert lab.client.request("nobody.example.com", headers=headers).status == 404


def test_a_plain_provider_gets_an_llmroute_and_loses_it_under_load(lab: Lab) -> None:
    lab.apply(QWEN)
    with running_load(lab.mesh.http_proxy, DASHSCOPE, ["qwen"], connections=8) as load:
        for _ in range(3):
            lab.apply(QWEN, route("own", DASHSCOPE, {"backendRefs": backends(DASHSCOPE)}))
            load.wait_for_more()
            lab.apply(QWEN)
            load.wait_for_more()


@needs_scopes
def test_plain_hosts_are_served_while_the_form_of_the_routes_changes(lab: Lab) -> None:
    lab.apply(QWEN)
    with running_load(lab.mesh.http_proxy, DASHSCOPE.title(), ["qwen"], connections=8) as load:
        for count in (THRESHOLD + 1, THRESHOLD, len(MANY), 1):
            lab.apply(QWEN, *MANY[:count])
            assert is_scoped(lab) == (count > THRESHOLD)
            load.wait_for_more()


def test_a_body_that_is_too_large_is_told_so(lab: Lab) -> None:
    lab.apply(provider("ollama", KEYLESS, model="llama"))
    body = MESSAGES.replace(b"Hi", b"x" * 3_000_000)  # more than what Envoy buffers by default
    assert lab.client.request(KEYLESS, body).status == 200
    assert send(lab, KEYLESS, b" " * 35_000_000).error["code"] == "request_too_large"


def test_a_provider_takes_as_much_as_it_says_and_no_more(lab: Lab) -> None:
    """More than what routes let pass, and less."""
    large, small = 36_000_000, 1000
    lab.apply(
        provider("ollama", KEYLESS, model="llama", maxRequestBytes=large),
        provider("openai", OPENAI, KEYS[OPENAI], "gpt", maxRequestBytes=small),
    )
    assert lab.client.request(KEYLESS, MESSAGES.replace(b"Hi", b"x" * 35_000_000)).status == 200
    for host, limit in ((KEYLESS, large), (OPENAI, small)):
        for size in (limit + 1, 37_000_000):
            answer = send(lab, host, b" " * size)
            assert (answer.status, answer.error["code"]) == (413, "request_too_large")
            assert answer.error["message"] == f"The request body is larger than {limit} bytes."
