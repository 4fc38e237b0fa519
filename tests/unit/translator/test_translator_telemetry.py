"""Which Telemetry counts for a proxy: Istio's precedence, as its own tests have it."""

import json
from typing import Any

import pytest

from crds.meshconfig import MeshConfig
from tests.support.objects import provider, world
from translator import observability, telemetry
from translator.conditions import conditions
from translator.proxy import Proxy, ProxyType
from translator.world import MeshSettings, World
from xds import protos

SLEEP = Proxy(ProxyType.SIDECAR, "default", "sleep", frozenset({("app", "sleep")}))
GATEWAY = Proxy(ProxyType.ROUTER, "istio-system", "gateway", frozenset({("istio", "ingressgateway")}))
MESH = {
    "extensionProviders": [
        {"name": "a", "envoyFileAccessLog": {}},
        {"name": "b", "envoyFileAccessLog": {}},
        {"name": "otel", "opentelemetry": {"service": "otel.example.com", "port": 4317}},
    ]
}
MODEL = {"tagOverrides": {"model": {"value": "request.path"}}}


def item(name: str, *, selects: bool = False, kind: str = "accessLogging", **entry: Any) -> str:
    namespace, _, name = name.partition("/")
    selector = {"selector": {"matchLabels": {"app": "sleep"}}} if selects else {}
    entry = {
        key: [{"name": n} for n in value] if key == "providers" else value for key, value in entry.items()
    }
    return json.dumps(
        {
            "apiVersion": "telemetry.istio.io/v1",
            "kind": "Telemetry",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {**selector, kind: [entry]},
        }
    )


def of(*documents: str, **mesh: Any) -> World:
    return world(*documents, mesh=MeshSettings(MeshConfig.model_validate({**MESH, **mesh})))


def logs(made: World, proxy: Proxy = SLEEP) -> list[str] | None:
    found = telemetry.logging(made, proxy)
    return None if found is None else [log.provider.name for log in found]


ROOT_A = item("istio-system/m", providers=["a"])
OFF = item("default/off", disabled=True)


@pytest.mark.parametrize(
    ("documents", "default", "expected"),
    [
        ([], [], None),
        ([], ["a"], ["a"]),
        ([ROOT_A], [], ["a"]),
        ([ROOT_A], ["b"], ["a"]),
        ([ROOT_A, item("default/n", providers=["b"])], [], ["b"]),
        ([ROOT_A, item("default/n")], [], ["a"]),
        ([ROOT_A, OFF], [], []),
        ([OFF], ["a"], []),
        ([ROOT_A, OFF, item("default/w", selects=True, providers=["b"])], [], ["b"]),
        ([ROOT_A, item("default/n", providers=["none"])], ["a"], None),
        ([ROOT_A, item("default/n", match={"mode": "SERVER"}, disabled=True)], [], ["a"]),
        ([item("istio-system/m", match={"mode": "SERVER"}, providers=["a"])], [], None),
        ([ROOT_A, item("other/n", providers=["b"])], [], ["a"]),
        ([ROOT_A, item("istio-system/w", selects=True, providers=["b"])], [], ["a"]),
        ([item("default/1", providers=["a"]), item("default/2", providers=["b"])], [], ["a"]),
        ([item("default/1", providers=["b", "A"])], [], ["a", "b"]),
    ],
)
def test_access_logs(documents: list[str], default: list[str], expected: list[str] | None) -> None:
    """None: what accessLogFile says counts. `default` are the mesh's default providers."""
    assert logs(of(*documents, defaultProviders={"accessLogging": default})) == expected


def test_the_access_log_file_is_for_those_without_telemetry() -> None:
    made = of(accessLogFile="/dev/stdout")
    access_logs = observability.of_connection_manager(made, SLEEP)["access_log"]
    assert [log.name for log in access_logs].count("envoy.access_loggers.file") == 1
    assert "access_logs" not in [log.name for log in access_logs]


def test_a_filter_goes_with_inherited_providers() -> None:
    made = of(ROOT_A, item("default/n", filter={"expression": "response.code >= 400"}))
    (log,) = telemetry.logging(made, SLEEP) or ()
    assert log.expression == "response.code >= 400"


def metric(name: str, *overrides: dict[str, Any], **entry: Any) -> str:
    return item(name, kind="metrics", overrides=list(overrides), **entry)


ALL_OFF = {"disabled": True}
COUNT_OFF = {"match": {"metric": "REQUEST_COUNT"}, "disabled": True}


def test_metrics_are_on_unless_switched_off() -> None:
    assert telemetry.metrics(of(), SLEEP) == {}
    assert telemetry.metrics(of(defaultProviders={"metrics": []}), SLEEP) is None
    assert telemetry.metrics(of(metric("istio-system/m", ALL_OFF)), SLEEP) is None
    server = {"match": {"mode": "SERVER"}, "disabled": True}
    assert telemetry.metrics(of(metric("istio-system/m", server)), SLEEP) == {}
    again = metric("default/n", {"match": {"metric": "REQUEST_COUNT"}, "disabled": False})
    assert telemetry.metrics(of(metric("istio-system/m", ALL_OFF), again), SLEEP) is not None


def test_overrides_add_up() -> None:
    """Later ones win per metric and label; ALL_METRICS are all of Istio's."""
    wide = metric("istio-system/m", {**MODEL, "match": {"metric": "ALL_METRICS"}})
    near = metric("default/n", COUNT_OFF, {"tagOverrides": {"model": {"operation": "REMOVE"}}})
    found = telemetry.metrics(of(wide, near), SLEEP)
    assert found is not None
    assert {name: override.disabled for name, override in found.items()} == {
        "REQUEST_COUNT": True,
        "REQUEST_DURATION": False,
        "REQUEST_SIZE": False,
        "RESPONSE_SIZE": False,
    }
    assert {override.tags["model"].operation for override in found.values()} == {"REMOVE"}


def test_traces() -> None:
    trace = {"kind": "tracing"}
    made = of(
        item("istio-system/m", **trace, providers=["otel"], randomSamplingPercentage=10),
        item("default/n", **trace, customTags={"a": {"literal": {"value": "b"}}}),
    )
    found = telemetry.tracing(made, SLEEP)
    assert found is not None
    assert (found.sampling, sorted(found.custom_tags)) == (10, ["a"])
    assert telemetry.tracing(of(), SLEEP) is None
    off = item("default/n", **trace, disableSpanReporting=True)
    assert telemetry.tracing(of(off, defaultProviders={"tracing": ["otel"]}), SLEEP) is None
    assert {service.cluster_name for service in observability.services(made, SLEEP)} == {
        "service|4317|grpc|otel.example.com"
    }


def test_gateways_too() -> None:
    made = of(ROOT_A)
    assert logs(made, GATEWAY) == ["a"]
    assert observability.of_connection_manager(made, GATEWAY)["access_log"]


def test_a_user_sees_what_does_not_count() -> None:
    made = of(item("default/1", providers=["a", "none"]), item("default/2", providers=["a"]))
    (first, second) = (conditions(made)[item_.key] for item_ in made.telemetries["default"])
    assert [(c.type, c.status) for c in first] == [("Accepted", True), ("ResolvedRefs", False)]
    assert "no extensionProvider 'none'" in first[1].message
    assert (second[0].status, second[0].reason) == (False, "Conflicted")


def test_an_older_envoy_has_logs_but_no_metrics() -> None:
    """Its Lua writes what the log wants to other places."""
    old = Proxy(ProxyType.SIDECAR, "default", "sleep", version=(1, 36))
    text = "%FILTER_STATE(wasm.asm.llmproxy.request_model:PLAIN)%"
    made = of(provider("default/p", "a.example.com"), accessLogFile="/dev/stdout", accessLogFormat=text)
    (log,) = observability.of_connection_manager(made, old)["access_log"]
    file = protos.FileAccessLog.FromString(log.typed_config.value)
    expected = "%DYNAMIC_METADATA(llm.state:wasm.asm.llmproxy.request_model)%\n"
    assert file.log_format.text_format_source.inline_string == expected
