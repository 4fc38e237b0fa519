"""Captured traffic: which names get an address, which routes there are, what a node says of it."""

from collections.abc import Iterable
from typing import Any

import pytest

from tests.support.objects import backends, provider, route, world
from translator.captured_routes import bucket
from translator.hosts import domains, short_name
from translator.proxy import Proxy, ProxyType
from translator.scopes import MARGIN, THRESHOLD
from translator.translate import Translation, Translator
from translator.world import MeshSettings, World
from xds import protos
from xds.resources import LDS, RDS, SRDS

SIDECAR = Proxy(ProxyType.SIDECAR, "default", "sleep", captures=True, captures_dns=True)
LLM = "llm.example.com"


def resources(translation: Translation, type_url: str, message: Any) -> dict[str, Any]:
    return {
        resource.name: message.FromString(protos.Any.FromString(resource.body).value)
        for resource in translation.resources
        if resource.type_url == type_url
    }


def listeners(of: World, proxy: Proxy = SIDECAR) -> dict[str, Any]:
    return resources(Translator().translate(of, proxy), LDS, protos.Listener)


def virtual_names(of: World, proxy: Proxy = SIDECAR) -> set[str]:
    """Return the names that Envoy's DNS answers for."""
    packed = listeners(of, proxy)["dns_127.0.0.1"].listener_filters[0].typed_config
    config = protos.DnsFilter.FromString(packed.value)
    return {domain.name for domain in config.server_config.inline_dns_table.virtual_domains}


def many(count: int) -> World:
    """Return a world with so many virtual hosts: one for each LLMRoute, none for the provider.

    The hosts are Services and others by turns.
    """
    names = (f"host-{number}" + number % 2 * ".example.com" for number in range(count))
    rule = {"backendRefs": backends(LLM)}
    routes = (route(name.partition(".")[0], name, rule) for name in names)
    return world(provider("p", LLM), *routes, mesh=MeshSettings())


# What a node says


@pytest.mark.parametrize(
    ("metadata", "captures", "captures_dns", "has_ipv6"),
    [
        ({}, False, False, False),
        ({"INTERCEPTION_MODE": "NONE", "DNS_CAPTURE": "true"}, False, False, False),
        ({"INTERCEPTION_MODE": "REDIRECT"}, True, False, False),
        ({"INTERCEPTION_MODE": "REDIRECT", "DNS_CAPTURE": "true"}, True, True, False),
        ({"INTERCEPTION_MODE": "REDIRECT", "INSTANCE_IPS": "10.0.0.1"}, True, False, False),
        ({"INTERCEPTION_MODE": "REDIRECT", "INSTANCE_IPS": "10.0.0.1,fd00::1"}, True, False, True),
    ],
)
def test_metadata_with_istios_names(
    metadata: dict[str, str], captures: bool, captures_dns: bool, has_ipv6: bool
) -> None:
    proxy = Proxy.from_node("sidecar~10.0.0.1~a.b~c", {"NAMESPACE": "default", **metadata})
    assert (proxy.captures, proxy.captures_dns, proxy.has_ipv6) == (captures, captures_dns, has_ipv6)


def test_a_gateway_captures_nothing() -> None:
    proxy = Proxy.from_node(
        "router~10.0.0.1~a.b~c", {"NAMESPACE": "default", "INTERCEPTION_MODE": "REDIRECT"}
    )
    assert not proxy.captures


# Listeners


def test_http_is_looked_for_on_port_80_and_where_providers_are_called_in_clear() -> None:
    plain = provider("plain", "ollama.example", port=11434, tls={"mode": "DISABLE"})
    found = listeners(world(plain, provider("tls", LLM, port=8443), mesh=MeshSettings()))
    assert {name for name in found if name[0].isdigit()} - {"127.0.0.1_15080"} == {
        "0.0.0.0_80",
        "0.0.0.0_11434",
    }


def test_an_ipv6_address_is_listened_on_where_there_is_one() -> None:
    proxy = Proxy(ProxyType.SIDECAR, "default", "sleep", captures=True, has_ipv6=True)
    (other,) = listeners(many(2), proxy)["virtualOutbound"].additional_addresses
    assert other.address.socket_address.address == "::1"
    assert not listeners(many(2))["virtualOutbound"].additional_addresses


# Names without an address


RULE = {"backendRefs": backends(LLM)}


@pytest.mark.parametrize(
    ("objects", "names"),
    [
        ([provider("p", LLM)], set()),  # Envoy itself needs its address, so DNS has one
        ([provider("p", LLM, endpoints=[{"address": "10.0.0.7"}])], {LLM}),
        ([provider("p", LLM), route("r", LLM, RULE)], set()),
        ([provider("p", LLM), route("r", "mine.example", RULE)], {"mine.example"}),
        (
            [route("r", "demo", RULE)],
            {"demo", "demo.default", "demo.default.svc", "demo.default.svc.cluster.local"},
        ),
        ([route("r", "*.example", RULE), route("s", "10.0.0.7", RULE)], set()),
    ],
)
def test_who_gets_an_address(objects: Iterable[str], names: set[str]) -> None:
    assert virtual_names(world(*objects, mesh=MeshSettings())) == names


@pytest.mark.parametrize(
    ("spec", "has_address"),
    [
        ("{}", False),  # from a file: nobody gave it one
        ("{clusterIP: 10.96.0.9}", True),
        ("{clusterIP: None}", True),
        ("{type: ExternalName}", True),
    ],
)
def test_a_service_with_an_address_keeps_it(spec: str, has_address: bool) -> None:
    service = f"{{apiVersion: v1, kind: Service, metadata: {{name: demo, namespace: default}}, spec: {spec}}}"
    of = world(service, route("r", "demo", RULE), mesh=MeshSettings())
    assert (virtual_names(of) == set()) is has_address


# Routes


def test_a_host_that_takes_all_leaves_nothing_to_pass_through() -> None:
    of = world(provider("p", LLM), route("r", "*", RULE), mesh=MeshSettings())
    found = resources(Translator().translate(of, SIDECAR), RDS, protos.RouteConfiguration)
    domains = [name for host in found["captured"].virtual_hosts for name in host.domains]
    assert domains.count("*") == 1


@pytest.mark.parametrize(
    ("count", "forms"),
    [
        (THRESHOLD - MARGIN, {"one"}),
        (THRESHOLD, {"one", "buckets"}),
        (THRESHOLD + MARGIN + 1, {"buckets"}),
    ],
)
def test_the_routes_have_the_form_of_the_http_proxys(count: int, forms: set[str]) -> None:
    made = Translator().translate(many(count), SIDECAR)
    names = resources(made, RDS, protos.RouteConfiguration).keys()
    scopes = resources(made, SRDS, protos.ScopedRouteConfiguration).keys()
    assert ("captured" in names) is ("one" in forms)
    assert {"captured/0", "captured/127", "captured/128"} <= names or "buckets" not in forms
    assert {name for name in names if name.startswith("captured/")} == {
        name for name in scopes if name.startswith("captured/")
    }


def test_every_host_is_in_the_bucket_in_which_envoy_looks_for_it() -> None:
    made = Translator().translate(many(THRESHOLD + MARGIN + 1), SIDECAR)
    routes = resources(made, RDS, protos.RouteConfiguration)
    for number in range(128):
        *hosts, last = routes[f"captured/{number}"].virtual_hosts
        assert last.domains == ["*"]
        short_names = {short_name(host.domains[0], "default", "cluster.local") for host in hosts}
        assert {bucket(name) for name in short_names} <= {number}
        for host in hosts:
            assert len(host.domains) == 2 * len(domains(host.name, "default", "default", "cluster.local"))


def test_a_changed_host_changes_one_bucket() -> None:
    before = many(THRESHOLD + MARGIN + 2)
    translator = Translator()
    first = translator.translate(before, SIDECAR)
    objects = [*before.providers["default"], *before.routes["default"][:-1]]
    second = translator.translate(World.of(objects, before.mesh), SIDECAR)
    changed = {name for kind, name in second.changed(first) if kind == RDS and name.startswith("captured")}
    assert len(changed) == 1
