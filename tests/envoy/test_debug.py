"""The control plane's insides, with a real Envoy: /metrics, /debug/ and `llmplane status`."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from llmplane.status import format_status
from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, Lab
from tests.support.control_plane import fetch
from tests.support.objects import backends, provider, route
from tests.support.wait import eventually

NOWHERE = "/nowhere/ca.pem"
"""A path on Envoy's machine: the control plane cannot know that nothing is there."""
REFUSED = f"outbound|443||{DASHSCOPE}"


def good(model: str) -> str:
    return provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], model)


def bad() -> str:
    return provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], tls={"caCertificates": NOWHERE})


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    """Leave nothing behind that is refused."""
    yield
    lab.apply("")


def get(lab: Lab, path: str, **query: str) -> str:
    return fetch(lab.mesh.admin, path, **query)[1]


def metric(lab: Lab, name: str, **labels: str) -> float:
    """Return the value of a metric, 0 if there is none."""
    families = text_string_to_metric_families(get(lab, "/metrics"))
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in found if labels.items() <= sample.labels.items())


def proxy(lab: Lab) -> dict[str, Any]:
    found: dict[str, Any]
    (found,) = json.loads(get(lab, "/debug/syncz"))["proxies"]
    return found


def refuse(lab: Lab) -> None:
    """Apply a cluster that the sidecar refuses; wait until it has, and everything else is settled."""
    lab.mesh.apply("objects.yaml", bad(), settle=False)
    eventually(lambda: [item["state"] for item in lab.mesh.status()["objects"]] == ["Refused"])


def test_a_change_that_envoy_accepts_moves_the_metrics(lab: Lab) -> None:
    lab.apply(good("one"))
    pushes, changes = (
        metric(lab, "pilot_xds_pushes", type="cds"),
        metric(lab, "pilot_proxy_convergence_time_count"),
    )
    lab.apply(good("two"))
    eventually(lambda: metric(lab, "pilot_proxy_convergence_time_count") > changes)
    assert metric(lab, "pilot_xds_pushes", type="cds") > pushes
    assert metric(lab, "pilot_xds", version="1.40.0") == 1
    assert metric(lab, "llmplane_proxies", state="SYNCED") == 1
    assert metric(lab, "llmplane_objects", kind="LLMProvider", state="OK") == 1


def test_a_refusal_is_seen_everywhere_until_it_is_gone(lab: Lab) -> None:
    lab.apply(good("one"))
    rejects = metric(lab, "pilot_total_xds_rejects", type="cds")
    refuse(lab)
    assert metric(lab, "pilot_total_xds_rejects", type="cds") > rejects
    assert metric(lab, "llmplane_proxies", state="NACK") == 1
    clusters = proxy(lab)["types"]["Cluster"]
    assert clusters["state"] == "NACK"
    assert clusters["refused"] == [REFUSED]
    assert NOWHERE in clusters["error"]["detail"]
    text = format_status(lab.mesh.status())
    assert f"it keeps what it had instead of {REFUSED}: " in text
    (programmed,) = (item["programmed"] for item in json.loads(get(lab, "/debug/objects")))
    assert programmed == "0/1"

    lab.apply(good("two"))
    assert metric(lab, "llmplane_proxies", state="NACK") == 0
    assert metric(lab, "llmplane_problems") == 0
    assert "NOT IN SYNC" not in format_status(lab.mesh.status())
    (programmed,) = (item["programmed"] for item in json.loads(get(lab, "/debug/objects")))
    assert programmed == "1/1"


def test_what_envoy_acknowledged_is_what_it_was_sent(lab: Lab) -> None:
    lab.apply(good("one"))
    found = proxy(lab)
    assert found["variant"] == "delta"
    assert {"Cluster", "Listener", "RouteConfiguration", "Secret"} <= found["types"].keys()
    for status in found["types"].values():
        assert status["acknowledged"] == status["sent"] == status["version"]
        assert status["nonce_acknowledged"] == status["nonce_sent"]
        assert status["unanswered"] == 0


def test_the_dump_has_what_envoy_has(lab: Lab) -> None:
    lab.apply(good("one"))
    dump = list(yaml.safe_load_all(get(lab, "/debug/config_dump", proxy=proxy(lab)["node_id"])))
    clusters = {item["name"] for item in dump if item["@type"].endswith(".Cluster")}
    envoy = json.loads(lab.envoy_admin("/config_dump?resource=dynamic_active_clusters"))["configs"]
    assert clusters == {item["cluster"]["name"] for item in envoy}


def test_no_answer_has_a_key(lab: Lab) -> None:
    hosts = (DASHSCOPE, MOONSHOT)
    lab.apply(
        good("one"),
        provider("moonshot", MOONSHOT, KEYS[MOONSHOT]),
        route("r", "r.example.com", {"backendRefs": backends(*hosts)}),
    )
    refuse(lab)
    node_id = proxy(lab)["node_id"]
    paths = ("/metrics", "/debug/", "/debug/status", "/debug/syncz", "/debug/objects")
    answers = "".join([*(get(lab, path) for path in paths), get(lab, "/debug/config_dump", proxy=node_id)])
    assert "[redacted]" in answers
    for key in (KEYS[host] for host in hosts):
        for hidden in (key, key[:8], base64.b64encode(key.encode()).decode()[:10]):
            assert hidden not in answers
