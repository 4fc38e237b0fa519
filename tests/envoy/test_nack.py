"""A resource that passes every check of ours, and that Envoy refuses: it costs nothing but its own change."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from llmplane.local import LocalMesh, end
from tests.envoy.conftest import DASHSCOPE, KEYLESS, KEYS, MOONSHOT, Lab
from tests.support.objects import backends, provider, route
from tests.support.wait import eventually

NOWHERE = "/nowhere/ca.pem"
"""A path on Envoy's machine: the control plane cannot know that nothing is there."""


def good(model: str) -> str:
    return provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], model)


def bad(model: str) -> str:
    return provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], model, tls={"caCertificates": NOWHERE})


def moonshot(model: str) -> str:
    return provider("moonshot", MOONSHOT, KEYS[MOONSHOT], model)


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    """Leave nothing behind that is refused."""
    yield
    lab.apply("")


def model(lab: Lab, host: str) -> str:
    """Which model answers a request to this host, or the status of an error."""
    answer = lab.client.request(host)
    return str(answer.json()["model"] if answer.status == 200 else answer.status)


def apply(lab: Lab, *documents: str) -> None:
    """Make these the configuration, of which the sidecar refuses something; wait until it has."""
    lab.mesh.apply("objects.yaml", "\n---\n".join(documents), settle=False)
    eventually(lambda: is_refused(lab))


def is_refused(lab: Lab) -> bool:
    conditions = [c for item in lab.mesh.status()["objects"] for c in item["conditions"]]
    return "Refused" in [condition["reason"] for condition in conditions]


def rejected(lab: Lab) -> dict[str, int]:
    """Return how often the sidecar refused a response."""
    page = json.loads(lab.envoy_admin("/stats?format=json&filter=update_rejected$"))
    return {stat["name"]: stat["value"] for stat in page["stats"] if stat.get("value")}


def assert_status_says_it(lab: Lab) -> None:
    met, reason, message = lab.condition("dashscope", "Programmed")
    assert (met, reason) == (False, "Refused")
    assert NOWHERE in message, "Envoy's own words"
    (text,) = (text for text in lab.mesh.status()["problems"] if NOWHERE in text)
    assert text.startswith("LLMProvider default/dashscope: sidecar~")


def assert_no_loop(lab: Lab, expected: dict[str, int]) -> None:
    """Make sure that the sidecar refused so often and no more, and is sent nothing as nothing changes."""
    assert rejected(lab) == expected
    answers = "cluster_manager.cds.update_(attempt|success)$"

    def taken() -> list[int]:
        page = json.loads(lab.envoy_admin(f"/stats?format=json&filter={answers}"))
        return [stat["value"] for stat in page["stats"] if "value" in stat]

    before = taken()
    for _ in range(20):
        assert model(lab, DASHSCOPE) != "404"
    assert taken() == before


@contextmanager
def killed(lab: Lab) -> Iterator[None]:
    """Kill the control plane (-9), and start it again after the block; the sidecar goes on."""
    assert lab.mesh.control_plane
    lab.mesh.control_plane.kill()
    lab.mesh.control_plane.wait()
    yield
    lab.mesh.start_control_plane()
    eventually(lambda: lab.mesh.status()["proxies"])


def replace_sidecar(lab: Lab) -> None:
    """Start a new sidecar, which knows nothing, instead of the old one."""
    assert lab.mesh.proxy
    end(lab.mesh.proxy)
    start_newcomer(lab.mesh)


def start_newcomer(mesh: LocalMesh) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "settle", lambda: None)  # what is refused is not synchronised
        mesh.start_proxy()


CDS_REFUSED = "cluster_manager.cds.update_rejected"


def test_a_refused_change_costs_no_other_one_and_a_repair_heals(lab: Lab) -> None:
    chat = route("chat", "chat.example.com", {"backendRefs": backends(DASHSCOPE)})
    lab.apply(good("one"), moonshot("one"), chat)
    before = rejected(lab).get(CDS_REFUSED, 0)
    apply(lab, bad("two"), moonshot("two"), provider("keyless", KEYLESS, model="new"), chat)
    eventually(lambda: model(lab, KEYLESS) == "new")
    assert [model(lab, host) for host in (DASHSCOPE, MOONSHOT)] == ["one", "two"]
    assert model(lab, "chat.example.com") == "one"
    assert_status_says_it(lab)
    # The whole response, then the culprit on its own.
    assert_no_loop(lab, {CDS_REFUSED: before + 2})

    replace_sidecar(lab)
    eventually(lambda: model(lab, KEYLESS) == "new")
    assert [model(lab, host) for host in (DASHSCOPE, MOONSHOT)] == ["one", "two"]
    assert rejected(lab) == {}, "a newcomer never sees what others refused"
    assert_status_says_it(lab)

    lab.apply(good("three"), moonshot("two"), chat)
    assert [model(lab, host) for host in (DASHSCOPE, MOONSHOT)] == ["three", "two"]
    assert lab.mesh.status()["problems"] == []


def test_a_refused_change_of_the_port_keeps_the_acknowledged_version(lab: Lab) -> None:
    """Here, over a restart, and at a newcomer: what stands in is found by the cluster's name."""
    lab.apply(good("one"))
    moved = {"port": 8443, "tls": {"caCertificates": NOWHERE}}
    apply(lab, provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], "two", **moved))
    assert model(lab, DASHSCOPE) == "one"
    assert_status_says_it(lab)
    with killed(lab):
        assert model(lab, DASHSCOPE) == "one"
    assert is_refused(lab)
    assert model(lab, DASHSCOPE) == "one"
    replace_sidecar(lab)
    eventually(lambda: model(lab, DASHSCOPE) == "one")
    assert rejected(lab) == {}


def test_over_kill_9_of_the_control_plane_the_last_acknowledged_version_stays(lab: Lab) -> None:
    lab.apply(good("one"), moonshot("one"))
    apply(lab, bad("two"), moonshot("one"))
    before = rejected(lab)[CDS_REFUSED]
    with killed(lab):
        assert model(lab, DASHSCOPE) == "one"
    assert is_refused(lab), "at once"
    assert model(lab, DASHSCOPE) == "one"
    assert_status_says_it(lab)
    assert_no_loop(lab, {CDS_REFUSED: before})  # it was not sent again

    replace_sidecar(lab)
    eventually(lambda: model(lab, MOONSHOT) == "one")
    assert model(lab, DASHSCOPE) == "one", "the acknowledged version was kept on disk"
    assert rejected(lab) == {}
    assert_status_says_it(lab)
    for file in (lab.mesh.directory / "state").rglob("*.json"):
        assert not [key for key in KEYS.values() if key in file.read_text()]

    lab.apply(good("repaired"), moonshot("two"))
    assert [model(lab, host) for host in (DASHSCOPE, MOONSHOT)] == ["repaired", "two"]
    assert lab.mesh.status()["problems"] == []


def test_changed_while_the_control_plane_was_dead(lab: Lab) -> None:
    """Nobody knows the bytes that the sidecar has. It keeps them; who has none goes without this provider."""
    lab.apply(good("one"), moonshot("one"))
    before = rejected(lab).get(CDS_REFUSED, 0)
    with killed(lab):
        lab.mesh.replace(lab.mesh.config / "objects.yaml", f"{bad('unheard-of')}\n---\n{moonshot('two')}")
    eventually(lambda: is_refused(lab) and model(lab, MOONSHOT) == "two")
    assert model(lab, DASHSCOPE) == "one"
    assert_status_says_it(lab)
    assert_no_loop(lab, {CDS_REFUSED: before + 2})
    replace_sidecar(lab)
    eventually(lambda: model(lab, MOONSHOT) == "two")
    assert model(lab, DASHSCOPE) == "503", "its cluster has no hosts"
    assert rejected(lab) == {}


def test_a_replica_that_never_saw_the_refusal_serves_the_last_acknowledged_version(lab: Lab) -> None:
    """Two control planes on one folder: the sidecar of one refuses, a newcomer asks the other.

    Its labels are different, so that it shares no snapshot with the first.
    """
    lab.apply(good("one"), moonshot("one"))
    mesh = lab.mesh
    replica = LocalMesh(
        mesh.directory,
        serve_options=mesh._serve_options,
        environment=mesh._environment,
        bind_address=mesh.bind_address,
        labels={"app": "other"},
    )
    other = replace(lab, mesh=replica)
    try:
        replica.start_control_plane()
        apply(lab, bad("two"), moonshot("two"))
        revision = replica.status()["revision"]
        mesh.apply("other.yaml", "# nothing\n", settle=False)
        eventually(lambda: replica.status()["revision"] > revision)
        assert not is_refused(other)

        assert mesh.proxy
        end(mesh.proxy)
        start_newcomer(replica)
        eventually(lambda: is_refused(other))
        eventually(lambda: model(other, MOONSHOT) == "two")
        assert model(other, DASHSCOPE) == "one"
        assert_status_says_it(other)
        assert_no_loop(other, {})  # it never saw what the other one refused
    finally:
        replica.stop()
        mesh.start_proxy() if not is_refused(lab) else start_newcomer(mesh)
