"""Providers that no LLMRoute names: to add one is to add a cluster, and no host reaches what it must not."""

from typing import Any

import pytest

from tests.support.objects import backends, provider, route, service, world
from translator.hosts import short_name
from translator.proxy import Proxy, ProxyType
from translator.routes import RouteTable, route_table
from translator.scopes import MARGIN, THRESHOLD
from translator.translate import Translation, Translator
from xds.resources import CDS, LDS, RDS, SDS, SRDS

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
    by_host = f"outbound|443||{short_name(host, SIDECAR.namespace, 'cluster.local')}"
    named = {by_host if made.route.cluster_header else made.route.cluster for made in found.routes}
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


KINDS = {
    "port": (provider("other", C, port=8443), C),
    "in clear": (provider("other", C, tls={"mode": "DISABLE"}), C),
    "elsewhere": (provider("other", C, endpoints=[{"address": "10.0.0.7", "port": 11434}]), C),
    "body": (provider("other", C, maxRequestBytes=50_000_000), C),
    "bare name": (provider("other", "llm"), "llm.default"),
    "namespace": (provider("other", "llm.ai"), "llm.ai"),
    "Service": (provider("other", "llm.ai.svc.cluster.local"), "llm.ai"),
    "of all": (provider("istio-system/other", "llm"), "llm.default"),
    "selecting": (provider("other", C, workloadSelector={"labels": {"app": "sleep"}}), C),
    "address": (provider("other", "10.0.0.7"), "10.0.0.7"),
    "IPv6": (provider("other", "2001:db8::5"), "[2001:db8::5]"),
}


@pytest.mark.parametrize(("other", "short"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("captures", [False, True], ids=["called", "captured"])
def test_no_provider_changes_a_route_whatever_it_is_like(other: str, short: str, *, captures: bool) -> None:
    proxy = Proxy(
        ProxyType.SIDECAR, "default", "sleep", labels=frozenset({("app", "sleep")}), captures=captures
    )
    translator = Translator()
    before = translator.translate(world(provider("a", A), CHAT), proxy)
    after = translator.translate(world(provider("a", A), CHAT, other), proxy)
    routes = {(type_url, name) for type_url, name in changed(before, after) if type_url in {RDS, SRDS}}
    assert (CDS, f"outbound|443||{short}") in changed(before, after)
    assert not routes


def test_among_many_hosts_one_more_provider_is_a_scope() -> None:
    translator = Translator()
    many = [
        route(f"r{number}", f"host-{number}.example.org", {"backendRefs": backends(A)})
        for number in range(THRESHOLD + MARGIN + 1)
    ]
    before = translator.translate(world(provider("a", A), *many), SIDECAR)
    after = translator.translate(
        world(provider("a", A), *many, provider("c", "llm.ai.svc", port=80)), SIDECAR
    )
    assert {each for each in changed(before, after) if each[0] == SRDS} == {(SRDS, "llm.ai")}


@pytest.mark.parametrize("change", [{"port": 8443}, {"tls": {"mode": "DISABLE"}}, {"maxRequestBytes": 1000}])
def test_what_changes_of_a_provider_its_cluster_has_the_same_name(change: dict[str, Any]) -> None:
    """So Envoys that refuse the change keep the version before."""
    translator = Translator()
    before = translator.translate(world(provider("a", A), CHAT), SIDECAR)
    after = translator.translate(world(provider("a", A, **change), CHAT), SIDECAR)
    assert changed(before, after) == {(CDS, f"outbound|443||{A}")}


# The names of a Service


FULL = "llm.default.svc.cluster.local"


@pytest.mark.parametrize("written", ["llm", "llm.default", "llm.default.svc", FULL])
def test_a_service_is_one_host_however_the_provider_is_written(written: str) -> None:
    table = table_of(provider("llm", written))
    for name in ("llm", "llm.default", "llm.default.svc", FULL):
        assert clusters_of(table, name) == {"outbound|443||llm.default"}
    elsewhere = table_of(provider("istio-system/llm", written), proxy=Proxy(ProxyType.SIDECAR, "ai", "sleep"))
    of = "ai" if written == "llm" else "default"
    assert [target.cluster_name for host in elsewhere.plain for target in host.destinations] == [
        f"outbound|443||llm.{of}"
    ]


@pytest.mark.parametrize("written", ["llm", "llm.default", "llm.default.svc", FULL])
@pytest.mark.parametrize("named", ["llm", "llm.default", "llm.default.svc", FULL])
def test_an_llmroute_refers_to_a_service_by_any_of_its_names(written: str, named: str) -> None:
    table = table_of(provider("llm", written), route("r", "r.example.com", {"backendRefs": backends(named)}))
    assert clusters_of(table, "r.example.com") == {"outbound|443||llm.default"}


def test_an_llmroute_for_a_service_leaves_none_of_its_names_to_the_provider() -> None:
    for of_route in ("llm", "llm.default.svc"):
        table = table_of(
            provider("llm", FULL), provider("a", A), route("r", of_route, {"backendRefs": backends(A)})
        )
        for name in ("llm", "llm.default", "llm.default.svc", FULL):
            assert clusters_of(table, name) == {f"outbound|443||{A}"}


def test_the_host_of_an_llmroute_leads_to_its_provider_by_no_other_name() -> None:
    """`example.com.svc` could be the Service `example` of a namespace `com`."""
    table = table_of(
        provider("e", "example.com"), route("e", "example.com", {"backendRefs": backends("example.com")})
    )
    assert clusters_of(table, "example.com") == {"outbound|443||example.com"}
    assert clusters_of(table, "example.com.svc") == set()
    assert clusters_of(table, "example.com.svc.cluster.local") == set()
    assert clusters_of(table, "example.com.svc.svc.cluster.local") == set()


def test_the_older_of_two_providers_has_a_service_by_all_its_names() -> None:
    objects = world(provider("b", FULL, model="first"), provider("c", "llm", model="second"))
    assert objects.providers_for(SIDECAR)["llm.default"].name == "b"
    bare_first = world(provider("b", "llm", model="first"), provider("c", FULL, model="second"))
    assert bare_first.providers_for(SIDECAR)["llm.default"].name == "b"


@pytest.mark.parametrize(
    ("host", "taken"),
    [
        ("*.svc.cluster.local", {FULL}),
        ("*.default.svc.cluster.local", {FULL}),
        ("*.default", {"llm.default"}),
        ("*.ai.svc.cluster.local", set()),
    ],
)
def test_a_wildcard_takes_the_names_below_it_and_no_others(host: str, taken: set[str]) -> None:
    table = table_of(
        provider("llm", "llm"), provider("a", A), route("every", host, {"backendRefs": backends(A)})
    )
    assert clusters_of(table, A) == {f"outbound|443||{A}"}
    for name in ("llm", "llm.default", "llm.default.svc", FULL):
        assert clusters_of(table, name) == {f"outbound|443||{A if name in taken else 'llm.default'}"}, name


# Who is plain


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
    assert clusters_of(table, "egress") == clusters_of(table, "egress.default") == set()


def test_a_service_and_a_provider_of_its_name_are_two_clusters() -> None:
    """The Service has no key, and the provider's filters are not its own."""
    reference = {"backendRefs": [{"backendRef": {"name": "llm", "port": 443}}]}
    table = table_of(
        service("llm", {}, (443, 8443)), provider("llm", "llm"), route("r", "r.example.com", reference)
    )
    assert clusters_of(table, "r.example.com") == {f"outbound|443||{FULL}"}
    assert clusters_of(table, FULL) == {"outbound|443||llm.default"}
