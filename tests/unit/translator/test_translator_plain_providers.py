"""Providers that no LLMRoute names: to add one is to add a cluster, and no host reaches what it must not."""

from typing import Any

import pytest

from tests.support.objects import backends, provider, route, service, world
from translator.proxy import Proxy, ProxyType
from translator.routes import RouteTable, route_table
from translator.translate import Translation, Translator
from xds.resources import CDS, LDS, RDS, SDS

A, B, C = "a.example.com", "b.example.com", "c.example.com"
SIDECAR = Proxy(ProxyType.SIDECAR, "default", "sleep")
CHAT = route("chat", "chat.example.com", {"backendRefs": backends(A)})


def table_of(*documents: str, proxy: Proxy = SIDECAR) -> RouteTable:
    return route_table(world(*documents), proxy, "http_proxy")


def hosts_of(table: RouteTable) -> tuple[list[str], list[str]]:
    """Return the hosts with a virtual host of their own, and those without."""
    own: Any = [host.virtual_host for host in table.hosts]
    return [host.name for host in own], [name for host in table.plain for name in host.names]


def clusters_of(table: RouteTable, host: str) -> set[str]:
    """Return the clusters that a request for a host can reach: Envoy's order of domains, then its cluster."""
    routes: Any = table.routes
    domains = {domain: each for each in routes.virtual_hosts for domain in each.domains}
    suffixes = sorted((name for name in domains if name.startswith("*")), key=len, reverse=True)
    found = domains.get(host) or next(domains[name] for name in suffixes if host.endswith(name[1:]))
    served = (*table.hosts, *table.plain)
    there = {target.cluster_name for of in served for target in of.destinations}
    there |= {backend.cluster_name for backend in table.backends}
    named = {
        f"outbound|443||{host}" if made.route.cluster_header else made.route.cluster for made in found.routes
    }
    return named & there


def changed(before: Translation, after: Translation) -> set[tuple[str, str]]:
    """Return types and names of all resources that are new, gone or different."""
    return {(each.type_url, each.name) for each in set(before.resources) ^ set(after.resources)}


# What a change costs


@pytest.mark.parametrize("others", [(), (provider("a", A), CHAT)], ids=["alone", "beside others"])
def test_a_provider_that_comes_or_goes_is_a_cluster_and_its_key(others: tuple[str, ...]) -> None:
    translator = Translator()
    first = provider("b", B, "sk-b")  # with the first of all, trust roots come
    before = translator.translate(world(*others, first), SIDECAR)
    after = translator.translate(world(*others, first, provider("c", C, "sk-c")), SIDECAR)
    assert changed(before, after) == {(CDS, f"outbound|443||{C}"), (SDS, "api-key/default/c")}
    gone = translator.translate(world(*others, first), SIDECAR)
    assert set(gone.resources) == set(before.resources)


def test_the_first_provider_of_all_changes_no_route_either() -> None:
    translator = Translator()
    before = translator.translate(world(), SIDECAR)
    after = translator.translate(world(provider("a", A)), SIDECAR)
    assert {RDS, LDS}.isdisjoint({type_url for type_url, _ in changed(before, after)})


def test_a_plain_provider_is_traced_to_its_cluster_and_not_to_the_routes_of_all() -> None:
    made = Translator().translate(world(provider("a", A), provider("b", B)), SIDECAR)
    (names,) = {key.name: names for key, names in made.origins.items() if key.name == "a"}.values()
    assert names == {(CDS, f"outbound|443||{A}")}


# Who is plain


@pytest.mark.parametrize(
    "other",
    [
        provider("other", C, port=8443),
        provider("other", C, maxRequestBytes=50_000_000),
        provider("other", "llm"),
        provider("other", "llm.default.svc.cluster.local"),
        provider("other", "2001:db8::5"),
    ],
    ids=["port", "body", "short name", "Service", "IPv6"],
)
def test_who_is_not_alike_has_a_virtual_host(other: str) -> None:
    (own,), plain = hosts_of(table_of(provider("a", A), other))
    assert (own != A, plain) == (True, [A])


def test_the_host_of_an_llmroute_is_the_llmroutes() -> None:
    table = table_of(provider("a", A), provider("b", B), route("own", A, {"backendRefs": backends(B)}))
    assert hosts_of(table) == ([A], [B])
    assert clusters_of(table, A) == {f"outbound|443||{B}"}


@pytest.mark.parametrize(("host", "plain"), [("*.example.com", ["d.example.org"]), ("*", [])])
def test_what_is_below_a_wildcard_is_the_llmroutes(host: str, plain: list[str]) -> None:
    table = table_of(
        *(provider(name[0], name) for name in (A, B, "d.example.org")),
        route("every", host, {"backendRefs": backends(A)}),
    )
    assert hosts_of(table) == ([host], plain)
    for name in (A, B, "other.example.com"):
        assert clusters_of(table, name) == {f"outbound|443||{A}"}


def test_where_connections_are_captured_a_provider_changes_no_route_either() -> None:
    """Though other hosts pass through there."""
    captures = Proxy(ProxyType.SIDECAR, "default", "sleep", captures=True, captures_dns=True)
    translator = Translator()
    before = translator.translate(world(provider("a", A)), captures)
    after = translator.translate(world(provider("a", A), provider("b", B)), captures)
    assert changed(before, after) == {(CDS, f"outbound|443||{B}")}


def test_where_connections_are_captured_by_an_older_envoy_each_provider_has_a_virtual_host() -> None:
    captures = Proxy(ProxyType.SIDECAR, "default", "sleep", captures=True, version=(1, 37))
    table = table_of(provider("a", A), provider("b", B), proxy=captures)
    assert hosts_of(table) == ([A, B], [])
    assert [host.domains for host in table.routes.virtual_hosts] == [[A], [B]]  # type: ignore[attr-defined]


# What a client cannot reach by a made-up host


@pytest.mark.parametrize(
    "host", ["nobody.example.com", "a", "", "-", "vip|a.example.com", "|a.example.com", "443||a.example.com"]
)
def test_an_unknown_host_reaches_nothing(host: str) -> None:
    configs = {"routeSpecificConfigs": {"vip": {"openAIConfig": {"model": "large"}}}}
    vip = route("chat", "chat.example.com", {"name": "vip", "backendRefs": backends(A)})
    assert clusters_of(table_of(provider("a", A, configs=configs), provider("b", B), vip), host) == set()


def test_a_provider_that_is_not_exported_to_the_client_is_for_the_llmroute_alone() -> None:
    table = table_of(
        provider("istio-system/a", A, exportTo=["."]),
        provider("istio-system/b", B),
        route("istio-system/chat", "chat.example.com", {"backendRefs": backends(A)}),
    )
    assert clusters_of(table, "chat.example.com") == {f"outbound|443||{A}"}
    assert clusters_of(table, A) == set()
    assert clusters_of(table, B) == {f"outbound|443||{B}"}


@pytest.mark.parametrize("wildcard", [False, True])
def test_a_service_is_for_the_llmroute_alone(wildcard: bool) -> None:
    reference = {"backendRefs": [{"backendRef": {"name": "egress", "port": 443}}]}
    more = [route("every", "*.svc.cluster.local", {"backendRefs": backends(A)})] if wildcard else []
    documents = [service("egress", {}, (443, 8443)), provider("a", A), route("r", "r.example.com", reference)]
    table = table_of(*documents, *more)
    host = "egress.default.svc.cluster.local"
    assert clusters_of(table, "r.example.com") == {f"outbound|443||{host}"}
    assert clusters_of(table, host) == ({f"outbound|443||{A}"} if wildcard else set())
