"""Which proxies see which objects, and which of two objects wins (design decisions 6 and 7)."""

from typing import Any

import pytest

from crds.meshconfig import MeshConfig
from tests.support.objects import backends, provider, route, world
from translator.conditions import conditions
from translator.proxy import Proxy, ProxyType
from translator.routes import route_table
from translator.world import MeshSettings, World

HOST = "llm.example.com"


def sidecar(namespace: str = "default", **labels: str) -> Proxy:
    return Proxy(ProxyType.SIDECAR, namespace, "sleep", frozenset(labels.items()))


def providers_of(objects: World, proxy: Proxy) -> dict[str, str]:
    """Return host -> namespace/name of the provider that the proxy gets."""
    return {host: f"{p.namespace}/{p.name}" for host, p in objects.providers_for(proxy).items()}


def virtual_hosts(objects: World, proxy: Proxy) -> dict[str, list[str]]:
    """Return domain -> the clusters that its requests go to, in the order of the routes.

    Also of the providers that have no virtual host of their own.
    """
    table = route_table(objects, proxy, "http_proxy")
    own: Any = [host.virtual_host for host in table.hosts]
    found = {domain: [made.route.cluster for made in host.routes] for host in own for domain in host.domains}
    return found | {name: [host.destinations[0].cluster_name] for host in table.plain for name in host.names}


def condition(objects: World, name: str, kind: str) -> tuple[bool, str]:
    """Return whether a condition of an object is met, and its message."""
    ((status, message),) = (
        (found.status, found.message)
        for key, of in conditions(objects).items()
        for found in of
        if f"{key.namespace}/{key.name}" == name and found.type == kind
    )
    return status, message


# Providers


def test_a_provider_reaches_its_own_namespace_only() -> None:
    objects = world(provider("team-a/llm", HOST))
    assert providers_of(objects, sidecar("team-a")) == {HOST: "team-a/llm"}
    assert providers_of(objects, sidecar("team-b")) == {}


def test_a_provider_of_the_root_namespace_reaches_all() -> None:
    objects = world(provider("istio-system/llm", HOST))
    assert providers_of(objects, sidecar("team-a")) == {HOST: "istio-system/llm"}


def test_the_root_namespace_is_a_setting() -> None:
    mesh = MeshSettings(MeshConfig.model_validate({"rootNamespace": "mesh-config"}))
    objects = world(
        provider("mesh-config/llm", HOST), provider("istio-system/llm2", "b.example.com"), mesh=mesh
    )
    assert providers_of(objects, sidecar("team-a")) == {HOST: "mesh-config/llm"}


@pytest.mark.parametrize("namespace", ["team-a", "istio-system"])
def test_a_workload_selector_narrows(namespace: str) -> None:
    selector = {"labels": {"app": "chat", "version": "v1"}}
    objects = world(provider(f"{namespace}/llm", HOST, workloadSelector=selector))
    assert providers_of(objects, sidecar("team-a", app="chat", version="v1", more="x")) == {
        HOST: f"{namespace}/llm"
    }
    assert providers_of(objects, sidecar("team-a", app="chat")) == {}
    assert providers_of(objects, sidecar("team-a")) == {}


def test_the_own_namespace_is_before_the_root_namespace() -> None:
    selector = {"labels": {"app": "chat"}}
    objects = world(
        provider("istio-system/a", HOST, workloadSelector=selector),
        provider("team-a/z", HOST),
    )
    assert providers_of(objects, sidecar("team-a", app="chat")) == {HOST: "team-a/z"}
    assert providers_of(objects, sidecar("team-b", app="chat")) == {HOST: "istio-system/a"}
    for name in ("istio-system/a", "team-a/z"):
        assert condition(objects, name, "Accepted") == (True, ""), (
            "the one is meant to be instead of the other"
        )


def test_a_selector_is_before_none() -> None:
    objects = world(
        provider("a", HOST),
        provider("z", HOST, workloadSelector={"labels": {"app": "chat"}}),
    )
    assert providers_of(objects, sidecar(app="chat")) == {HOST: "default/z"}
    assert providers_of(objects, sidecar(app="sleep")) == {HOST: "default/a"}


def test_then_the_first_by_name_wins_and_the_other_is_told() -> None:
    objects = world(provider("b", HOST), provider("a", HOST))
    assert providers_of(objects, sidecar()) == {HOST: "default/a"}
    assert condition(objects, "default/a", "Accepted") == (True, "")
    met, message = condition(objects, "default/b", "Accepted")
    assert not met
    assert HOST in message
    assert "default/a" in message


def test_the_older_one_wins_where_the_age_is_known() -> None:
    def of(name: str, created: str) -> str:
        return provider(name, HOST).replace(
            f'"name": "{name}"', f'"name": "{name}", "creationTimestamp": "{created}"'
        )

    objects = world(of("a", "2026-02-01T00:00:00Z"), of("b", "2026-01-01T00:00:00Z"))
    assert providers_of(objects, sidecar()) == {HOST: "default/b"}
    met, message = condition(objects, "default/a", "Accepted")
    assert not met
    assert "default/b" in message


def test_two_selectors_that_exclude_each_other_are_no_conflict() -> None:
    objects = world(
        provider("a", HOST, workloadSelector={"labels": {"app": "chat"}}),
        provider("b", HOST, workloadSelector={"labels": {"app": "sleep"}}),
    )
    assert providers_of(objects, sidecar(app="sleep")) == {HOST: "default/b"}
    assert condition(objects, "default/b", "Accepted") == (True, "")


# Direct requests to a provider


def test_a_provider_without_a_route_is_called_by_its_host() -> None:
    assert virtual_hosts(world(provider("llm", HOST)), sidecar()) == {HOST: [f"outbound|443||{HOST}"]}


@pytest.mark.parametrize(
    ("export_to", "namespace", "reached"),
    [
        (["."], "istio-system", True),
        (["."], "team-a", False),
        (["team-a"], "team-a", True),
        (["team-b"], "team-a", False),
        (["*"], "team-a", True),
    ],
)
def test_export_to_says_from_where_a_provider_may_be_called(
    export_to: list[str], namespace: str, reached: bool
) -> None:
    objects = world(provider("istio-system/llm", HOST, exportTo=export_to))
    assert bool(virtual_hosts(objects, sidecar(namespace))) is reached


def test_a_route_of_the_hosts_name_is_instead_of_the_direct_way() -> None:
    objects = world(
        provider("llm", HOST),
        provider("other", "other.example.com"),
        route("all-to-other", HOST, {"backendRefs": backends("other.example.com")}),
    )
    assert virtual_hosts(objects, sidecar())[HOST] == ["outbound|443||other.example.com"]


# Routes


def test_a_route_applies_in_its_own_namespace_only() -> None:
    objects = world(
        provider("istio-system/llm", HOST),
        route("team-a/chat", "chat.example.com", {"backendRefs": backends(HOST)}),
    )
    assert "chat.example.com" in virtual_hosts(objects, sidecar("team-a"))
    assert "chat.example.com" not in virtual_hosts(objects, sidecar("team-b"))


def test_a_route_of_the_root_namespace_applies_everywhere_after_the_own_one() -> None:
    objects = world(
        provider("istio-system/a", "a.example.com"),
        provider("istio-system/b", "b.example.com"),
        route("istio-system/chat", "chat.example.com", {"backendRefs": backends("a.example.com")}),
        route("team-b/chat", "chat.example.com", {"backendRefs": backends("b.example.com")}),
    )
    assert virtual_hosts(objects, sidecar("team-a"))["chat.example.com"] == ["outbound|443||a.example.com"]
    assert virtual_hosts(objects, sidecar("team-b"))["chat.example.com"] == ["outbound|443||b.example.com"]


def test_of_two_routes_with_one_host_the_first_by_name_wins_and_the_other_is_told() -> None:
    objects = world(
        provider("a", "a.example.com"),
        provider("b", "b.example.com"),
        route("second", "chat.example.com", {"backendRefs": backends("b.example.com")}),
        route("first", "chat.example.com", {"backendRefs": backends("a.example.com")}),
    )
    assert virtual_hosts(objects, sidecar())["chat.example.com"] == ["outbound|443||a.example.com"]
    met, message = condition(objects, "default/second", "Accepted")
    assert not met
    assert "default/first" in message


def test_two_names_of_one_service_are_one_host() -> None:
    objects = world(
        provider("llm", HOST),
        route("first", "demo", {"backendRefs": backends(HOST)}),
        route("second", "demo.default.svc.cluster.local", {"backendRefs": backends(HOST)}),
    )
    hosts = virtual_hosts(objects, sidecar())
    assert set(hosts) == {
        "demo",
        "demo.default",
        "demo.default.svc",
        "demo.default.svc.cluster.local",
        HOST,
    }
    assert condition(objects, "default/second", "Accepted")[0] is False


def test_one_short_name_in_two_namespaces_is_two_hosts() -> None:
    objects = world(
        provider("istio-system/llm", HOST),
        route("team-a/demo", "demo", {"backendRefs": backends(HOST)}),
        route("istio-system/demo", "demo", {"backendRefs": backends(HOST)}),
    )
    hosts = virtual_hosts(objects, sidecar("team-a"))
    assert {"demo", "demo.team-a", "demo.istio-system"} <= set(hosts)


@pytest.mark.parametrize("wildcard", ["*", "*.example.com"])
def test_a_wildcard_route_takes_the_providers_below_it(wildcard: str) -> None:
    objects = world(
        provider("llm", HOST),
        provider("other", "other.example.org"),
        route("all", wildcard, {"backendRefs": backends("other.example.org")}),
    )
    hosts = virtual_hosts(objects, sidecar())
    assert hosts[wildcard] == ["outbound|443||other.example.org"]
    assert HOST not in hosts
    assert ("other.example.org" in hosts) is (wildcard != "*")


def test_a_route_for_gateways_only_does_not_concern_sidecars() -> None:
    objects = world(
        provider("llm", HOST),
        route("ingress", "chat.example.com", {"backendRefs": backends(HOST)}, gateways=["ingress-gw"]),
        route("both", "both.example.com", {"backendRefs": backends(HOST)}, gateways=["ingress-gw", "mesh"]),
    )
    assert set(virtual_hosts(objects, sidecar())) == {"both.example.com", HOST}


# References


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (
            {"providerHost": "nowhere.example.com"},
            "no LLMProvider with host nowhere.example.com in namespace team-a",
        ),
        ({"providerHost": "b.example.com"}, "no LLMProvider with host b.example.com in namespace team-a"),
        ({"providerHost": "private.example.com"}, "no LLMProvider with host private.example.com"),
        ({"backendRef": {"name": "svc"}}, "Service team-a/svc does not exist"),
        (
            {"backendRef": {"kind": "InferencePool", "group": "x.k8s.io", "name": "p"}},
            "InferencePool p is not",
        ),
    ],
    ids=["nowhere", "another namespace", "not exported", "Service", "InferencePool"],
)
def test_a_reference_that_leads_nowhere_is_told_and_names_a_cluster_that_is_not_there(
    reference: dict[str, Any], words: str
) -> None:
    objects = world(
        provider("team-b/llm", "b.example.com"),
        provider("istio-system/private", "private.example.com", exportTo=["."]),
        route("team-a/chat", "chat.example.com", {"backendRefs": [reference]}),
    )
    table = route_table(objects, sidecar("team-a"), "http_proxy")
    assert not any(host.destinations for host in table.hosts)
    (cluster,) = virtual_hosts(objects, sidecar("team-a"))["chat.example.com"]
    assert cluster.startswith("missing|")
    met, message = condition(objects, "team-a/chat", "ResolvedRefs")
    assert not met
    assert "spec.rules[0].backendRefs[0]" in message
    assert words in message
    assert "503" in message
