"""Whatever Envoy it is: it gets what it can use, nothing is refused, and the status says what is missing.

`make test-envoy-versions` runs this file and those of the request path with one release of each version.
"""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmplane import offline
from llmplane.envoy import find_envoy
from llmplane.fakellm import Fault
from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, Lab
from tests.golden.test_golden import VARIABLES, as_bootstrap, inputs, mesh_of, proxy_of
from tests.support.envoy import envoy_version, has
from tests.support.objects import backends, provider, route
from translator.features import Feature, read_version

A, B = DASHSCOPE, MOONSHOT
CHAT = "chat.example.com"
PROVIDERS = [provider("a", A, KEYS[A], "model-a"), provider("b", B, KEYS[B], "model-b")]


def chat(**rule: Any) -> str:
    return route("chat", CHAT, rule)


def ordered() -> list[dict[str, Any]]:
    return [{"providerHost": A}, {"providerHost": B, "priority": 1}]


def asked(lab: Lab) -> list[str]:
    """Return the providers that saw a request since the last look, in order."""
    return [seen.provider for seen in lab.all_seen()]


def rejected(lab: Lab) -> list[str]:
    """Return Envoy's counters of refused updates that are not 0."""
    lines = lab.envoy_admin("/stats?filter=update_rejected").splitlines()
    return [line for line in lines if not line.endswith(": 0")]


@pytest.mark.parametrize("case", inputs(), ids=lambda case: str(case.stem))
def test_this_envoy_knows_every_field_that_it_gets(case: Path, tmp_path: Path) -> None:
    """In a bootstrap it refuses fields that it does not know; those that come by xDS it skips silently."""
    proxy = replace(proxy_of(case), scripts=frozenset(), version=read_version(envoy_version()))
    text, _ = offline.translate([case], proxy, mesh_of(case), VARIABLES)
    bootstrap = tmp_path / "bootstrap.json"
    resources = list(yaml.safe_load_all(text))
    bootstrap.write_text(json.dumps(as_bootstrap(resources, tmp_path)), encoding="utf-8")
    command = [find_envoy(), "--mode", "validate", "-c", bootstrap, "-l", "error"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_control_plane_knows_the_version(lab: Lab) -> None:
    (proxy,) = lab.mesh.status()["proxies"]
    assert proxy["version"] == envoy_version()


@pytest.mark.parametrize("refs", [ordered(), backends(A, B)], ids=["priorities", "equal"])
def test_a_failed_request_moves_on_or_the_route_says_that_it_cannot(
    lab: Lab, refs: list[dict[str, Any]]
) -> None:
    lab.apply(*PROVIDERS, chat(backendRefs=refs, retries={"attempts": 1}))
    for host in (A, B):
        lab.fake.set_fault(host, Fault(status=503))
    statuses = {lab.client.request(CHAT).status for _ in range(4)}
    assert statuses == {503}
    pairs = [tuple(pair) for pair in zip(*[iter(asked(lab))] * 2, strict=True)]
    (proxy,) = lab.mesh.status()["proxies"]
    if has(Feature.FALLBACK):
        assert set(pairs) <= {(A, B), (B, A)}, "the second attempt is the other's"
        assert not any("fallback" in text for text in proxy["missing"])
    else:
        assert set(pairs) <= {(A, A), (B, B)}, "a retry stays with the provider"
        met, reason, message = lab.condition("chat", "Programmed")
        assert (met, reason) == (False, "EnvoyTooOld")
        version = ".".join(envoy_version().split(".")[:2])
        assert message.startswith(f"Envoy {version}: fallback to another provider needs 1.39; ")
        assert f"{message} (LLMRoute default/chat)" in proxy["missing"]
        assert f"LLMRoute default/chat: {message}" in lab.mesh.status()["problems"]
    if refs == ordered():
        assert {first for first, _ in pairs} == {A}, "the first priority is the first"
    assert rejected(lab) == []


def test_without_fallback_a_second_priority_is_no_reason_to_ask_the_first_one_twice(lab: Lab) -> None:
    lab.apply(*PROVIDERS, chat(backendRefs=ordered()))
    lab.fake.set_fault(A, Fault(status=503))
    answer = lab.client.request(CHAT)
    assert (answer.status, asked(lab)) == ((200, [A, B]) if has(Feature.FALLBACK) else (503, [A]))


def test_an_order_holds_for_every_request(lab: Lab) -> None:
    lab.apply(*PROVIDERS, chat(backendRefs=ordered()))
    assert {lab.client.request(CHAT).json()["model"] for _ in range(100)} == {"model-a"}


def test_a_retry_is_made_of_the_clients_own_request(lab: Lab) -> None:
    """An attempt leaves its headers to the next one; the client's path is kept beside them."""
    lab.apply(
        provider("a", A, KEYS[A], path="/v1/chat/completions?version=1"),
        chat(backendRefs=backends(A), retries={"attempts": 1}),
    )
    lab.fake.set_fault(A, Fault(status=503, times=1))
    lab.client.request(CHAT, None, method="GET", path="/v1/models?limit=5")
    assert [seen.path for seen in lab.all_seen()] == ["/v1/models?version=1&limit=5"] * 2


def test_without_a_route_of_several_providers_nothing_is_missing(lab: Lab) -> None:
    lab.apply(*PROVIDERS, chat(backendRefs=backends(A)))
    assert lab.client.request(CHAT).json()["model"] == "model-a"
    status = lab.mesh.status()
    assert {item["state"] for item in status["objects"]} == {"OK"}
    assert status["problems"] == []
    missing = [text.partition(" needs ")[0] for text in status["proxies"][0]["missing"]]
    version = ".".join(envoy_version().split(".")[:2])
    assert missing == ([] if has(Feature.METRICS) else [f"Envoy {version}: {Feature.METRICS.what}"])
    assert rejected(lab) == []


def test_many_hosts(lab: Lab) -> None:
    """More than scoped routes begin with; an Envoy that cannot change to them keeps one configuration."""
    hosts = [route(f"r{n}", f"host-{n}", {"backendRefs": backends(A)}) for n in range(1200)]
    lab.apply(*PROVIDERS, *hosts)
    for host in ("host-0", "HOST-1199", "host-7.default.svc"):
        assert lab.client.request(host).json()["model"] == "model-a"
    assert lab.client.request("nowhere.example.com").status == 404
    types = lab.mesh.status()["proxies"][0]["types"]
    assert ("ScopedRouteConfiguration" in types) == has(Feature.SCOPED_ROUTES)
    assert rejected(lab) == []
