"""GET /metrics: each metric moves when the thing happens that it is about."""

import asyncio
import shutil
import subprocess
from collections.abc import Callable

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmplane.metrics import Figures, Metrics
from tests.support.control_plane import RunningControlPlane
from tests.support.objects import backends, provider, route
from xds.resources import CDS, RDS

Samples = dict[str, float]


def samples(exposition: str) -> Samples:
    """Return the values of an exposition by name and labels, as Prometheus writes them."""
    found = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


async def metrics_when(running: RunningControlPlane, condition: Callable[[Samples], object]) -> Samples:
    async with asyncio.timeout(60):
        while not condition(found := samples(await running.get("/metrics"))):  # noqa: ASYNC110 - over the network
            await asyncio.sleep(0.01)
    return found


# Proxies, pushes and refusals


async def test_connected_proxies_are_counted_by_version_and_state(running: RunningControlPlane) -> None:
    await running.apply(provider("a", "a.example.com"))
    async with running.proxy() as proxy:
        await proxy.request(CDS)
        answer = await proxy.receive()
        found = samples(await running.get("/metrics"))
        assert found['pilot_xds{version="1.40.0"}'] == 1
        assert found['llmplane_proxies{state="STALE"}'] == 1
        await proxy.ack(answer)
        await metrics_when(running, lambda found: found['llmplane_proxies{state="SYNCED"}'] == 1)
    await metrics_when(running, lambda found: 'pilot_xds{version="1.40.0"}' not in found)


async def test_a_push_is_counted_with_its_time_and_size(running: RunningControlPlane) -> None:
    await running.apply(provider("a", "a.example.com"))
    async with running.proxy() as proxy:
        await proxy.request(CDS)
        await proxy.ack(await proxy.receive())
        found = await metrics_when(running, lambda found: found['pilot_xds_pushes{type="cds"}'])
    assert found['pilot_xds_pushes{type="cds"}'] == 1
    assert found['pilot_xds_push_time_count{type="cds"}'] == 1
    assert found['pilot_xds_config_size_bytes_sum{type="cds"}'] > 100
    assert found['pilot_xds_pushes{type="rds"}'] == 0, "a counter exists before it counts"


async def test_the_convergence_time_is_of_changes_that_are_acknowledged(running: RunningControlPlane) -> None:
    await running.apply(provider("a", "a.example.com"))
    async with running.proxy() as proxy:
        await proxy.request(CDS)
        await proxy.ack(await proxy.receive())
        await running.apply(provider("a", "a.example.com", path="/other"))
        answer = await proxy.receive()
        assert samples(await running.get("/metrics"))["pilot_proxy_convergence_time_count"] == 0
        await proxy.ack(answer)
        found = await metrics_when(running, lambda found: found["pilot_proxy_convergence_time_count"])
    assert found["pilot_proxy_convergence_time_count"] == 1
    assert found["pilot_proxy_convergence_time_sum"] > 0


async def test_a_stream_that_is_not_served_is_counted(running: RunningControlPlane) -> None:
    async with running.proxy() as proxy:
        proxy._node.metadata.update({"BIND_ADDRESS": "everywhere"})
        await proxy.request(CDS)
        status, _ = await proxy.expect_end()
        found = samples(await running.get("/metrics"))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert found['llmplane_rejected_streams{status="INVALID_ARGUMENT"}'] == 1
    assert found['llmplane_rejected_streams{status="UNAUTHENTICATED"}'] == 0


async def test_a_refusal_is_counted_and_is_a_problem_of_its_object(running: RunningControlPlane) -> None:
    await running.apply(provider("a", "a.example.com"))
    async with running.proxy() as proxy:
        await proxy.request(CDS)
        await proxy.nack(await proxy.receive(), "no such filter")
        found = await metrics_when(running, lambda found: found['pilot_total_xds_rejects{type="cds"}'])
    assert found['pilot_total_xds_rejects{type="cds"}'] == found["pilot_xds_cds_reject"] == 1
    assert found["pilot_xds_rds_reject"] == 0
    assert found['llmplane_proxies{state="NACK"}'] == 1
    assert found['llmplane_objects{kind="LLMProvider",state="Refused"}'] == 1
    assert found['llmplane_problems{severity="error"}'] == 1
    assert found["pilot_proxy_convergence_time_count"] == 0


async def test_an_answer_to_no_response_is_counted(running: RunningControlPlane) -> None:
    await running.apply(provider("a", "a.example.com"))
    async with running.proxy() as proxy:
        await proxy.request(CDS)
        answer = await proxy.receive()
        await proxy.ack(answer)
        await proxy.request(CDS, nonce=answer.nonce)
        await proxy.request(CDS, nonce="never")
        found = await metrics_when(running, lambda found: found['pilot_xds_expired_nonce{type="cds"}'])
    assert found['pilot_xds_expired_nonce{type="cds"}'] == 1, "the latest nonce is none of these"


async def test_what_a_client_says_makes_no_label(running: RunningControlPlane) -> None:
    async with running.proxy() as proxy:
        proxy._node.user_agent_build_version.version.major_number = 4_000_000_000
        await proxy.request("type.googleapis.com/anything", ["*"])
        await proxy.receive()
        found = await metrics_when(running, lambda found: found.get('pilot_xds_pushes{type="other"}'))
        exposition = await running.get("/metrics")
    assert found['pilot_xds{version="unknown"}'] == 1
    assert found['pilot_xds_pushes{type="other"}'] == 1
    assert "sleep" not in exposition
    assert "anything" not in exposition


# Objects


async def test_objects_are_counted_by_kind_and_state(running: RunningControlPlane) -> None:
    begin = samples(await running.get("/metrics"))["llmplane_last_change_timestamp_seconds"]
    good = provider("a", "a.example.com")
    await running.apply(good, route("r", "r.example.com", {"backendRefs": backends("nowhere.example.com")}))
    found = samples(await running.get("/metrics"))
    assert found['llmplane_objects{kind="LLMProvider",state="OK"}'] == 1
    assert found['llmplane_objects{kind="LLMRoute",state="BackendNotFound"}'] == 1
    assert found['llmplane_problems{severity="warning"}'] == 1
    assert found['llmplane_problems{severity="error"}'] == 0
    assert found["llmplane_last_good_versions"] == 0
    assert found["llmplane_last_change_timestamp_seconds"] > begin

    await running.apply(good.replace("host", "hots"))
    found = samples(await running.get("/metrics"))
    assert found['llmplane_objects{kind="LLMProvider",state="LastGoodVersion"}'] == 1
    assert found["llmplane_last_good_versions"] == 1
    assert found['llmplane_problems{severity="error"}'] == 2, "one field is unknown, and one is missing"


# The format


def everything() -> Metrics:
    metrics = Metrics(
        lambda: Figures(
            versions={"1.40.0": 2},
            proxies={"SYNCED": 2},
            objects={("LLMProvider", "OK"): 3},
            problems={"error": 0},
            last_good=1,
            last_change=1.5,
        )
    )
    metrics.pushed(CDS, 1000, 0.001)
    metrics.rejected(RDS)
    metrics.nonce_expired("anything")
    metrics.converged(0.01)
    return metrics


def test_the_names() -> None:
    families = text_string_to_metric_families(everything().exposition().decode())
    assert sorted(family.name for family in families) == [
        "llmplane_last_change_timestamp_seconds",
        "llmplane_last_good_versions",
        "llmplane_objects",
        "llmplane_problems",
        "llmplane_proxies",
        "llmplane_rejected_streams",
        "pilot_proxy_convergence_time",
        "pilot_total_xds_rejects",
        "pilot_xds",
        "pilot_xds_cds_reject",
        "pilot_xds_config_size_bytes",
        "pilot_xds_eds_reject",
        "pilot_xds_expired_nonce",
        "pilot_xds_lds_reject",
        "pilot_xds_push_time",
        "pilot_xds_pushes",
        "pilot_xds_rds_reject",
    ]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say() -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=everything().exposition(),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
