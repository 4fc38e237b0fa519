"""What gateways open, which routes attach to it, and what is said of what does not."""

from typing import Any

import pytest
from google.protobuf import message_factory

from crds.meshconfig import MeshConfig
from llmplane.certificates import CertificateAuthority
from tests.support.objects import backends, gateway, provider, route, secret, server, service, world
from translator.conditions import conditions
from translator.gateways import intersection, merge
from translator.proxy import Proxy, ProxyType, WorkloadCertificate
from translator.routes import ROUTES_HEADER, gateway_route_table
from translator.translate import Translator
from translator.world import MeshSettings, World
from xds import protos

INGRESS = Proxy(ProxyType.ROUTER, "istio-system", "ingress", frozenset({("istio", "ingressgateway")}))
LLM = "llm.example.com"
RULE = {"backendRefs": backends(LLM)}


def attached(
    name: str, host: str, *rules: dict[str, Any], gateways: tuple[str, ...] = ("istio-system/gw",)
) -> str:
    return route(name, host, *(rules or (RULE,)), gateways=list(gateways))


def resources(objects: World, proxy: Proxy = INGRESS) -> dict[str, Any]:
    """Return the messages of a proxy by type and name."""
    found = {}
    for resource in Translator().translate(objects, proxy).resources:
        packed = protos.Any.FromString(resource.body)
        name = resource.type_url.rpartition("/")[2]
        message = message_factory.GetMessageClass(protos.POOL.FindMessageTypeByName(name))()
        packed.Unpack(message)
        found[f"{name.rpartition('.')[2]} {resource.name}"] = message
    return found


def listeners(objects: World, proxy: Proxy = INGRESS) -> list[str]:
    return [name.split(" ")[1] for name in resources(objects, proxy) if name.startswith("Listener ")]


def hosts(objects: World, proxy: Proxy = INGRESS) -> dict[str, list[str]]:
    """Return, of each route configuration, name -> the names of its hosts."""
    tables = [
        gateway_route_table(objects, proxy, chain)
        for listener in merge(objects, proxy).listeners
        for chain in listener.chains
    ]
    return {table.name: [name for host in table.hosts for name in host.names] for table in tables}


def virtual_host(objects: World, name: str, proxy: Proxy = INGRESS) -> Any:
    """Return the one virtual host that has this name."""
    (found,) = (
        host.virtual_host
        for listener in merge(objects, proxy).listeners
        for chain in listener.chains
        for host in gateway_route_table(objects, proxy, chain).hosts
        if name in host.names
    )
    return found


def condition(objects: World, name: str, kind: str = "Accepted") -> tuple[bool, str, str]:
    (found,) = (
        each
        for key, of in conditions(objects).items()
        for each in of
        if f"{key.namespace}/{key.name}" == name and each.type == kind
    )
    return found.status, found.reason, found.message


# Which gateways


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({"istio": "ingressgateway"}, ["127.0.0.1_80"]),
        ({}, ["127.0.0.1_80"]),
        ({"istio": "egressgateway"}, []),
        ({"istio": "ingressgateway", "version": "v2"}, []),
    ],
)
def test_a_gateway_selects_workloads_of_all_namespaces(selector: dict[str, str], expected: list[str]) -> None:
    assert listeners(world(gateway("team-a/gw", server(), selector=selector))) == expected


def test_a_sidecar_opens_no_gateway() -> None:
    sidecar = Proxy(ProxyType.SIDECAR, "istio-system", "a", INGRESS.labels)
    assert listeners(world(gateway("istio-system/gw", server())), sidecar) == ["127.0.0.1_15080"]


# Ports


def test_servers_of_a_port_are_one_listener_and_one_route_configuration() -> None:
    objects = world(
        provider("istio-system/llm", LLM),
        gateway("istio-system/gw", server("a.com")),
        gateway("istio-system/other", server("b.com"), server("c.com", number=8080)),
        attached("a", "a.com"),
        attached("b", "b.com", gateways=("istio-system/other",)),
        attached("c", "c.com", gateways=("istio-system/other",)),
    )
    assert listeners(objects) == ["127.0.0.1_80", "127.0.0.1_8080"]
    assert hosts(objects) == {"http.80": ["a.com", "b.com"], "http.8080": ["c.com"]}


def test_a_service_in_front_says_which_port_is_opened() -> None:
    labels = {"istio": "ingressgateway"}
    objects = world(
        gateway("istio-system/gw", server(), server(number=81), server(number=82)),
        service("istio-system/ingress", labels, (80, 8080), (81, "named")),
        service("other/ingress", labels, (82, 9999)),
        service("istio-system/something-else", {"app": "x"}, (82, 9999)),
    )
    assert listeners(objects) == ["127.0.0.1_8080", "127.0.0.1_81", "127.0.0.1_82"]
    assert list(hosts(objects)) == ["http.8080", "http.81", "http.82"]


def test_bind_is_an_address_of_its_own() -> None:
    objects = world(gateway("istio-system/gw", server()), gateway("istio-system/b", server(bind="10.0.0.1")))
    assert listeners(objects) == ["10.0.0.1_80", "127.0.0.1_80"]
    assert list(hosts(objects)) == ["http.80.10.0.0.1", "http.80"]


LOOKED_INTO = "is not supported: LLM traffic is looked into, so TLS must end here"
TAKEN = "is already taken by Gateway istio-system/a for HTTP, which HTTPS cannot share"


@pytest.mark.parametrize(
    ("refused", "reason", "message"),
    [
        (
            server(protocol="TCP"),
            "Unsupported",
            "spec.servers[0].port.protocol: protocol TCP is not supported, only HTTP and HTTPS are",
        ),
        (
            server(protocol="TLS", tls={"mode": "PASSTHROUGH"}),
            "Unsupported",
            "spec.servers[0].port.protocol: protocol TLS is not supported, only HTTP and HTTPS are",
        ),
        (
            server(protocol="HTTPS", tls={}),
            "Unsupported",
            f"spec.servers[0].tls.mode: PASSTHROUGH {LOOKED_INTO}",
        ),
        (
            server(protocol="HTTPS", tls={"mode": "AUTO_PASSTHROUGH"}),
            "Unsupported",
            f"spec.servers[0].tls.mode: AUTO_PASSTHROUGH {LOOKED_INTO}",
        ),
        (
            server(bind="unix:///run/gw.sock", number=0),
            "Unsupported",
            "spec.servers[0].bind: Unix domain sockets are not supported",
        ),
        (
            server(number=15021),
            "Conflicted",
            "spec.servers[0].port.number: port 15021 is the proxy's own, for the health check",
        ),
        (
            server(protocol="HTTPS", tls={"mode": "ISTIO_MUTUAL"}, number=8080),
            "Conflicted",
            f"spec.servers[0].port.protocol: port 8080 {TAKEN}",
        ),
        (
            server("x.com", "b.com", protocol="HTTPS", tls={"mode": "ISTIO_MUTUAL"}, number=8443),
            "Conflicted",
            "spec.servers[0].hosts: b.com at port 8443 is already taken by Gateway istio-system/a",
        ),
    ],
)
def test_a_server_that_cannot_be_is_left_out_and_told(
    refused: dict[str, Any], reason: str, message: str
) -> None:
    mutual = {"mode": "ISTIO_MUTUAL"}
    first = (server("a.com", number=8080), server("b.com", protocol="HTTPS", number=8443, tls=mutual))
    objects = world(gateway("istio-system/a", *first), gateway("istio-system/gw", refused))
    assert condition(objects, "istio-system/gw") == (False, reason, message)
    assert condition(objects, "istio-system/a") == (True, "Accepted", "")
    proxy = Proxy(
        ProxyType.ROUTER,
        "istio-system",
        "",
        INGRESS.labels,
        certificate=WorkloadCertificate("/c", "/k", "/r"),
    )
    assert listeners(objects, proxy) == ["127.0.0.1_8080", "127.0.0.1_8443"]


def test_gateways_of_different_workloads_do_not_meet() -> None:
    objects = world(
        gateway("istio-system/a", server(number=8080)),
        gateway(
            "istio-system/b",
            server(protocol="HTTPS", number=8080, tls={"mode": "ISTIO_MUTUAL"}),
            selector={"istio": "egress"},
        ),
    )
    assert condition(objects, "istio-system/b") == (True, "Accepted", "")


# Hosts and namespaces


@pytest.mark.parametrize(
    ("served", "asked", "expected"),
    [
        (["*"], "a.com", ["a.com"]),
        (["a.com"], "*", ["a.com"]),
        (["*.example.com"], "a.example.com", ["a.example.com"]),
        (["a.example.com", "b.example.com", "c.com"], "*.example.com", ["a.example.com", "b.example.com"]),
        (["*.com"], "*.example.com", ["*.example.com"]),
        (["*.example.com"], "example.com", []),
        (["a.com"], "b.com", []),
    ],
)
def test_hosts_that_server_and_route_have_in_common(
    served: list[str], asked: str, expected: list[str]
) -> None:
    """Istio's table of host.Names.Intersection."""
    assert intersection(served, [asked]) == expected


@pytest.mark.parametrize(
    ("entry", "namespace", "attaches"),
    [
        ("*", "team-a", True),
        ("*/*", "team-a", True),
        ("team-a/*", "team-a", True),
        ("team-a/chat.com", "team-a", True),
        ("team-b/*", "team-a", False),
        ("./*", "team-a", False),
        ("./*", "istio-system", True),
        ("team-a/other.com", "team-a", False),
    ],
)
def test_a_server_says_which_namespaces_routes_may_attach(entry: str, namespace: str, attaches: bool) -> None:
    objects = world(
        provider("istio-system/llm", LLM),
        gateway("istio-system/gw", server(entry)),
        attached(f"{namespace}/chat", "chat.com"),
    )
    assert hosts(objects) == {"http.80": ["chat.com"] if attaches else []}
    status, reason, message = condition(objects, f"{namespace}/chat")
    assert (status, reason) == ((True, "Accepted") if attaches else (False, "NotAllowedByGateway"))
    if not attaches:
        assert message == (
            "spec.gateways[0]: Gateway istio-system/gw does not take host chat.com from namespace "
            f"{namespace}: its hosts are {entry}"
        )


@pytest.mark.parametrize(("proxies", "status"), [(0, False), (1, True)])
def test_a_redirect_serves_no_route_but_behind_a_proxy_that_ends_tls(proxies: int, status: bool) -> None:
    config = MeshConfig.model_validate({"defaultConfig": {"gatewayTopology": {"numTrustedProxies": proxies}}})
    objects = world(
        gateway("istio-system/gw", server(tls={"httpsRedirect": True})),
        attached("r", "a.com"),
        mesh=MeshSettings(config),
    )
    assert condition(objects, "default/r")[0] is status


def test_a_gateway_that_is_not_there_is_told() -> None:
    objects = world(
        provider("istio-system/llm", LLM),
        gateway("istio-system/gw", server()),
        attached("r", "a.com", gateways=("gw",)),
    )
    assert condition(objects, "default/r", "ResolvedRefs") == (
        False,
        "GatewayNotFound",
        "spec.gateways[0]: Gateway default/gw does not exist, did you mean 'istio-system/gw'?",
    )


def test_a_service_is_served_by_its_full_names() -> None:
    objects = world(
        provider("istio-system/llm", LLM), gateway("istio-system/gw", server()), attached("r", "chat")
    )
    assert hosts(objects) == {
        "http.80": ["chat.default", "chat.default.svc", "chat.default.svc.cluster.local"]
    }


def test_a_provider_without_a_route_is_not_exposed() -> None:
    assert hosts(world(provider("istio-system/llm", LLM), gateway("istio-system/gw", server()))) == {
        "http.80": []
    }


def test_a_route_of_gateways_alone_is_not_for_sidecars() -> None:
    objects = world(
        provider("istio-system/llm", LLM), gateway("istio-system/gw", server()), attached("r", "a.com")
    )
    sidecar = Proxy(ProxyType.SIDECAR, "default", "sleep")
    routes = resources(objects, sidecar)["RouteConfiguration http_proxy"]
    assert [host.name for host in routes.virtual_hosts] == ["plain providers"]


# Rules


def headers(name: str) -> dict[str, Any]:
    return {"matches": [{"headers": {name: {"exact": "1"}}}], "name": name, **RULE}


def test_routes_of_one_host_are_put_together_with_the_catch_alls_last() -> None:
    objects = world(
        provider("istio-system/llm", LLM),
        gateway("istio-system/gw", server()),
        attached("a", "a.com", headers("x-a"), {"name": "all-a", **RULE}),
        attached("b", "A.com", headers("x-b"), {"name": "all-b", **RULE}),
    )
    assert [of.name for of in virtual_host(objects, "a.com").routes] == ["x-a", "x-b", "all-a", "all-b"]
    assert condition(objects, "default/b") == (True, "Accepted", "")


@pytest.mark.parametrize(
    ("match", "on_gateway", "on_sidecar"),
    [
        ({}, True, True),
        ({"gateways": ["istio-system/gw"]}, True, False),
        ({"gateways": ["mesh"]}, False, True),
        ({"gateways": ["istio-system/gw"], "sourceLabels": {"app": "sleep"}}, True, False),
        ({"sourceLabels": {"app": "sleep"}}, False, True),
        ({"sourceLabels": {"istio": "ingressgateway"}}, True, False),
    ],
)
def test_which_matches_hold_where(match: dict[str, Any], on_gateway: bool, on_sidecar: bool) -> None:
    """With `gateways`, Istio asks a gateway for no labels (sourceMatchHTTP)."""
    special = {"name": "special", "matches": [match], **RULE}
    objects = world(
        provider("istio-system/llm", LLM),
        gateway("istio-system/gw", server()),
        attached("r", "a.com", special, {"name": "rest", **RULE}, gateways=("mesh", "istio-system/gw")),
    )
    sidecar = Proxy(ProxyType.SIDECAR, "default", "sleep", frozenset({("app", "sleep")}))
    routes = resources(objects, sidecar)["RouteConfiguration http_proxy"]
    assert (virtual_host(objects, "a.com").routes[0].name == "special") == on_gateway
    assert (routes.virtual_hosts[0].routes[0].name == "special") == on_sidecar


def test_a_redirect_is_for_all_hosts_of_its_server_with_and_without_routes() -> None:
    redirect = {"httpsRedirect": True}
    objects = world(
        provider("istio-system/llm", LLM),
        gateway("istio-system/gw", server("*.com", "b.org", tls=redirect)),
        gateway("team-a/gw", server("./*", tls=redirect)),
        gateway("istio-system/plain", server("c.net")),
        attached("r", "a.com"),
        attached("team-a/s", "s.org", gateways=("team-a/gw",)),
        attached("t", "c.net", gateways=("istio-system/plain",)),
    )
    required = {name: virtual_host(objects, name).require_tls for name in hosts(objects)["http.80"]}
    assert required == {"a.com": 2, "s.org": 2, "c.net": 0, "*.com": 2, "b.org": 2}
    assert not virtual_host(objects, "b.org").routes


# What a gateway trusts


def manager(objects: World) -> dict[str, Any]:
    (listener,) = (message for name, message in resources(objects).items() if name.startswith("Listener "))
    found: dict[str, Any] = protos.to_dict(listener)["filter_chains"][0]["filters"][0]["typed_config"]
    return found


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("DEFAULT", (True, None, "KEEP_UNCHANGED")),
        ("NONE", (False, None, "KEEP_UNCHANGED")),
        ("BASE", (True, None, "KEEP_UNCHANGED")),
        ("MERGE_SLASHES", (True, True, "KEEP_UNCHANGED")),
        ("DECODE_AND_MERGE_SLASHES", (True, True, "UNESCAPE_AND_FORWARD")),
    ],
)
def test_paths_are_normalised_as_in_istio(normalization: str, expected: tuple[Any, ...]) -> None:
    config = MeshConfig.model_validate({"pathNormalization": {"normalization": normalization}})
    made = manager(world(gateway("istio-system/gw", server()), mesh=MeshSettings(config)))
    action = made["path_with_escaped_slashes_action"]
    assert (made["normalize_path"], made.get("merge_slashes"), action) == expected


@pytest.mark.parametrize("proxies", [0, 2])
def test_forwarded_addresses_count_as_far_as_proxies_are_trusted(proxies: int) -> None:
    config = MeshConfig.model_validate({"defaultConfig": {"gatewayTopology": {"numTrustedProxies": proxies}}})
    made = manager(world(gateway("istio-system/gw", server()), mesh=MeshSettings(config)))
    assert made["use_remote_address"] is True
    assert made.get("xff_num_trusted_hops", 0) == proxies


# TLS


@pytest.fixture(scope="module")
def certificate() -> dict[str, str]:
    """Return the values of a Secret of the type kubernetes.io/tls."""
    chain, key = CertificateAuthority.create().issue("a.com")
    return {"tls.crt": chain.decode(), "tls.key": key.decode()}


def https(*names: str, mode: str = "SIMPLE", number: int = 443, **tls: Any) -> dict[str, Any]:
    return server(*names, protocol="HTTPS", number=number, tls={"mode": mode, **tls})


def chains(objects: World) -> dict[tuple[str, ...], Any]:
    """Return the TLS contexts of port 443 by the names of their servers."""
    listener = protos.to_dict(resources(objects)["Listener 127.0.0.1_443"])
    return {
        tuple(chain.get("filter_chain_match", {}).get("server_names", ())): chain["transport_socket"][
            "typed_config"
        ]
        for chain in listener["filter_chains"]
    }


def test_https_servers_of_a_port_are_told_apart_by_their_names(certificate: dict[str, str]) -> None:
    objects = world(
        provider("istio-system/llm", LLM),
        secret("istio-system/one", certificate),
        gateway("istio-system/gw", https("a.com", "./b.com", credentialName="one")),
        gateway("team-a/gw", https("*", credentialName="one", number=443)),
        attached("r", "a.com"),
    )
    assert list(chains(objects)) == [("a.com", "b.com"), ()]
    assert hosts(objects) == {
        "https.443.https-443.gw.istio-system": ["a.com"],
        "https.443.https-443.gw.team-a": ["a.com", "b.com"],
    }
    context = chains(objects)[("a.com", "b.com")]["common_tls_context"]
    assert context["alpn_protocols"] == ["h2", "http/1.1"]
    (config,) = context["tls_certificate_sds_secret_configs"]
    assert config["name"] == "kubernetes://istio-system/one"
    assert "Secret kubernetes://istio-system/one" in resources(objects)


@pytest.mark.parametrize(
    ("secrets", "message"),
    [
        ({}, "Secret istio-system/one does not exist"),
        ({"istio-system/one": {"tls.crt": "x"}}, "Secret istio-system/one has no key 'tls.key'"),
        (
            {"istio-system/one": {"tls.crt": "x", "tls.key": "y"}},
            "Secret istio-system/one: tls.crt and tls.key are not a certificate and its key in PEM",
        ),
        ({"default/one": {"tls.crt": "x", "tls.key": "y"}}, "Secret istio-system/one does not exist"),
    ],
)
def test_a_certificate_that_is_not_there_costs_its_server_only(
    secrets: dict[str, dict[str, str]], message: str, certificate: dict[str, str]
) -> None:
    objects = world(
        secret("istio-system/good", certificate),
        *(secret(name, values) for name, values in secrets.items()),
        gateway("istio-system/a", https("a.com", credentialName="good")),
        gateway("istio-system/b", https("b.com", credentialName="one")),
    )
    assert list(chains(objects)) == [("a.com",)]
    assert condition(objects, "istio-system/b", "ResolvedRefs") == (
        False,
        "SecretNotFound",
        f"spec.servers[0].tls: {message}; the server is left out",
    )


@pytest.mark.parametrize(
    ("wide", "narrow", "routed", "served"),
    [
        ("*.a.com", ("x.a.com",), "x.a.com", ["x.a.com"]),
        ("*.a.com", ("x.a.com",), "*.a.com", ["*.a.com", "x.a.com"]),
        ("*.a.com", ("*.x.a.com",), "y.x.a.com", ["*.x.a.com"]),
        ("*.a.com", ("*.x.a.com",), "x.a.com", ["x.a.com", "*.x.a.com"]),
        ("*", ("a.com", "*.b.com"), "*.b.com", ["a.com", "*.b.com"]),
        # It is no wildcard, or the other name is not below it.
        ("x.a.com", ("*.a.com",), "x.a.com", ["x.a.com"]),
        ("*.a.com", ("a.com",), "*.a.com", ["*.a.com"]),
    ],
)
@pytest.mark.parametrize("has_secret", [True, False])
def test_a_wildcard_does_not_serve_the_names_of_other_tls_servers(
    wide: str,
    narrow: tuple[str, ...],
    routed: str,
    served: list[str],
    *,
    has_secret: bool,
    certificate: dict[str, str],
) -> None:
    """The last of the names are those whose clients are told to connect anew (421)."""
    objects = world(
        provider("istio-system/llm", LLM),
        secret("istio-system/one", certificate),
        gateway("istio-system/gw", https(wide, credentialName="one")),
        gateway("istio-system/other", https(*narrow, credentialName="one" if has_secret else "missing")),
        attached("r", routed),
    )
    assert hosts(objects)["https.443.https-443.gw.istio-system"] == served
    for name in set(served) & set(narrow) if wide.startswith("*") else ():
        (refusal,) = (
            host.virtual_host.routes
            for host in gateway_route_table(
                objects, INGRESS, merge(objects, INGRESS).listeners[0].chains[0]
            ).hosts
            if name in host.names
        )
        assert [each.direct_response.status for each in refusal] == [421]


def test_hosts_with_a_scope_in_common_are_in_one_bucket(certificate: dict[str, str]) -> None:
    """Also those that are refused: Envoy may look for what stands before `.svc` (translator.scopes)."""
    refused = "chat.default.svc.example.com"
    objects = world(
        provider("istio-system/llm", LLM),
        secret("istio-system/one", certificate),
        gateway("istio-system/gw", https("*.example.com", "*.svc.cluster.local", credentialName="one")),
        gateway("istio-system/other", https(refused, credentialName="one")),
        attached("service", "chat.default.svc.cluster.local"),
        attached("external", "chat.default.svcs.example.com"),
    )
    table = gateway_route_table(objects, INGRESS, merge(objects, INGRESS).listeners[0].chains[0])
    assert {name for host in table.hosts for name in host.names} == {
        "chat.default.svc.cluster.local",
        "chat.default.svcs.example.com",
        refused,
    }
    assert len({host.bucket for host in table.hosts}) == 1


def test_a_key_of_another_certificate_is_found_out(certificate: dict[str, str]) -> None:
    _, other = CertificateAuthority.create().issue("a.com")
    objects = world(
        secret("istio-system/one", {**certificate, "tls.key": other.decode()}),
        gateway("istio-system/gw", https(credentialName="one")),
    )
    assert condition(objects, "istio-system/gw", "ResolvedRefs")[2] == (
        "spec.servers[0].tls: Secret istio-system/one: tls.key is not the key of tls.crt; "
        "the server is left out"
    )
    assert listeners(objects) == []


CA = "ca.crt"


@pytest.mark.parametrize(
    ("tls", "more"),
    [
        ({"credentialName": "one"}, {"istio-system/one-cacert": ("cacert",)}),
        ({"credentialName": "one"}, {"istio-system/one-cacert": (CA,)}),
        ({"credentialName": "one"}, {"istio-system/one": (CA,)}),
        ({"credentialName": "one", "caCertCredentialName": "clients"}, {"istio-system/clients": (CA,)}),
    ],
)
@pytest.mark.parametrize(("mode", "required"), [("MUTUAL", True), ("OPTIONAL_MUTUAL", False)])
def test_the_cas_of_clients_are_in_the_same_secret_or_in_one_beside_it(
    tls: dict[str, Any], more: dict[str, tuple[str]], mode: str, required: bool, certificate: dict[str, str]
) -> None:
    pem = CertificateAuthority.create().pem.decode()
    values = {"istio-system/one": dict(certificate)}
    for name, (part,) in more.items():
        values.setdefault(name, {})[part] = pem
    objects = world(
        *(secret(name, of) for name, of in values.items()),
        gateway("istio-system/gw", https("a.com", mode=mode, **tls, subjectAltNames=["client.example.com"])),
    )
    context = chains(objects)[("a.com",)]
    assert context["require_client_certificate"] is required
    validation = context["common_tls_context"]["combined_validation_context"]
    name = validation["validation_context_sds_secret_config"]["name"]
    assert name == f"kubernetes://istio-system/{tls.get('caCertCredentialName', 'one')}-cacert"
    assert resources(objects)[f"Secret {name}"].validation_context.trusted_ca.inline_bytes == pem.encode()
    sans = validation["default_validation_context"]["match_typed_subject_alt_names"]
    assert [(san["san_type"], san["matcher"]["exact"]) for san in sans] == [
        ("DNS", "client.example.com"),
        ("URI", "client.example.com"),
    ]


def test_istios_names_of_the_parts_of_a_secret(certificate: dict[str, str]) -> None:
    values = {"cert": certificate["tls.crt"], "key": certificate["tls.key"]}
    objects = world(
        secret("istio-system/one", values), gateway("istio-system/gw", https(credentialName="one"))
    )
    made = resources(objects)["Secret kubernetes://istio-system/one"].tls_certificate
    assert made.private_key.inline_bytes == certificate["tls.key"].encode()


def test_of_files_only_the_paths_are_sent() -> None:
    files = {
        "serverCertificate": "/tls/cert.pem",
        "privateKey": "/tls/key.pem",
        "caCertificates": "/tls/ca.pem",
    }
    objects = world(gateway("istio-system/gw", https("a.com", mode="MUTUAL", **files)))
    made = resources(objects)
    own, peers = made["Secret file-cert:/tls/cert.pem~/tls/key.pem"], made["Secret file-root:/tls/ca.pem"]
    assert own.tls_certificate.watched_directory.path == "/tls"
    assert own.tls_certificate.private_key.filename == "/tls/key.pem"
    assert peers.validation_context.trusted_ca.filename == "/tls/ca.pem"


def test_versions_ciphers_and_curves() -> None:
    tls = {
        "minProtocolVersion": "TLSV1_2",
        "maxProtocolVersion": "TLSV1_3",
        "cipherSuites": ["ECDHE-RSA-AES128-GCM-SHA256"],
        "ecdhCurves": ["X25519"],
    }
    files = {"serverCertificate": "/c", "privateKey": "/k"}
    context = chains(world(gateway("istio-system/gw", https("a.com", **tls, **files))))[("a.com",)]
    assert context["common_tls_context"]["tls_params"] == {
        "tls_minimum_protocol_version": "TLSv1_2",
        "tls_maximum_protocol_version": "TLSv1_3",
        "cipher_suites": ["ECDHE-RSA-AES128-GCM-SHA256"],
        "ecdh_curves": ["X25519"],
    }


def test_without_a_workload_certificate_there_is_no_mutual_tls_of_the_mesh() -> None:
    objects = world(gateway("istio-system/gw", https("a.com", mode="ISTIO_MUTUAL")))
    made = Translator().translate(objects, INGRESS)
    assert [str(key) for key in made.uncertified] == ["Gateway istio-system/gw"]
    assert listeners(objects) == []
    assert condition(objects, "istio-system/gw") == (True, "Accepted", "")


# Services as destinations: egress gateways

EGRESS_LABELS = {"istio": "egressgateway"}
EGRESS = service("istio-system/egress", EGRESS_LABELS, (80, 8080))
MUTUAL = gateway("istio-system/egress-gw", https("*", mode="ISTIO_MUTUAL", number=80), selector=EGRESS_LABELS)
EGRESS_CLUSTER = "outbound|80||egress.istio-system.svc.cluster.local"
FILES = WorkloadCertificate("/tls/cert.pem", "/tls/key.pem", "/tls/ca.pem")
SLEEP = Proxy(ProxyType.SIDECAR, "default", "sleep", certificate=FILES)


def to_egress(**reference: Any) -> dict[str, Any]:
    ref = {"name": "egress", "namespace": "istio-system", "port": 80, **reference}
    return {"backendRefs": [{"backendRef": ref}]}


def routes_of(objects: World, proxy: Proxy) -> dict[str, Any]:
    """Return the routes of a sidecar by the name of their virtual host."""
    made = resources(objects, proxy)["RouteConfiguration http_proxy"]
    return {host.name: list(host.routes) for host in made.virtual_hosts}


def test_a_service_is_a_cluster_without_a_key_spoken_to_with_the_workloads_certificate() -> None:
    objects = world(EGRESS, MUTUAL, route("r", LLM, to_egress()))
    made = resources(objects, SLEEP)
    cluster = protos.to_dict(made[f"Cluster {EGRESS_CLUSTER}"])
    options = cluster["typed_extension_protocol_options"].popitem()[1]
    assert "http_filters" not in options
    assert options["upstream_http_protocol_options"] == {"auto_sni": True}
    context = cluster["transport_socket"]["typed_config"]["common_tls_context"]
    names = [config["name"] for config in context["tls_certificate_sds_secret_configs"]]
    assert names == ["file-cert:/tls/cert.pem~/tls/key.pem"]
    validation = context["combined_validation_context"]["default_validation_context"]
    assert validation["match_typed_subject_alt_names"] == [
        {"san_type": "URI", "matcher": {"prefix": "spiffe://cluster.local/ns/istio-system/"}}
    ]
    secrets = [name for name in made if name.startswith("Secret ")]
    assert secrets == ["Secret file-cert:/tls/cert.pem~/tls/key.pem", "Secret file-root:/tls/ca.pem"]
    (found,) = routes_of(objects, SLEEP)[LLM]
    assert (found.route.cluster, found.route.host_rewrite_literal) == (EGRESS_CLUSTER, "")


def test_without_a_gateway_that_asks_for_it_a_service_gets_plain_http() -> None:
    objects = world(EGRESS, route("r", LLM, to_egress()))
    assert not resources(objects, SLEEP)[f"Cluster {EGRESS_CLUSTER}"].HasField("transport_socket")


def test_without_a_certificate_nothing_is_sent_in_clear_instead() -> None:
    objects = world(EGRESS, MUTUAL, route("r", LLM, to_egress()))
    sidecar = Proxy(ProxyType.SIDECAR, "default", "sleep")
    (found,) = routes_of(objects, sidecar)[LLM]
    assert found.route.cluster == "missing|Service egress"
    made = Translator().translate(objects, sidecar)
    assert [str(key) for key in made.uncertified] == ["LLMRoute default/r"]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"name": "other"}, "Service istio-system/other does not exist"),
        ({"namespace": None}, "Service default/egress does not exist"),
        ({"port": 81}, "Service istio-system/egress: has no port 81, only 80"),
        ({"kind": "InferencePool"}, "InferencePool egress is not supported"),
        ({"group": "apps"}, "Service egress is not supported"),
    ],
)
def test_a_service_that_is_not_there_is_told(reference: dict[str, Any], message: str) -> None:
    objects = world(EGRESS, route("r", LLM, to_egress(**reference)))
    text = f"spec.rules[0].backendRefs[0].backendRef: {message}; its share is answered 503"
    assert condition(objects, "default/r", "ResolvedRefs")[2] == text
    (found,) = routes_of(objects, SLEEP)[LLM]
    assert found.route.cluster.startswith("missing|")


def test_the_only_port_of_a_service_need_not_be_said() -> None:
    objects = world(EGRESS, route("r", LLM, to_egress(port=None)))
    assert routes_of(objects, SLEEP)[LLM][0].route.cluster == EGRESS_CLUSTER


@pytest.mark.parametrize(
    ("host", "rewrite", "expected"),
    [
        (LLM, None, ""),
        ("chat", None, "chat.default.svc.cluster.local"),
        ("chat.team-a", None, ""),
        ("chat.team-a.svc", None, "chat.team-a.svc.cluster.local"),
        ("chat", "other.example.com", "other.example.com"),
    ],
)
def test_for_which_host_a_service_is_asked(host: str, rewrite: str | None, expected: str) -> None:
    rule = to_egress()
    if rewrite:
        rule["backendRefs"][0]["hostRewrite"] = rewrite
    (found,) = routes_of(world(EGRESS, route("r", host, rule)), SLEEP)[host]
    assert found.route.host_rewrite_literal == expected


def test_headers_stay_on_the_way_to_a_service_and_are_removed_on_the_way_to_a_provider() -> None:
    """The egress gateway may check the client's Authorization; no provider ever gets it."""
    both = {"backendRefs": [*to_egress()["backendRefs"], {"providerHost": LLM}]}
    objects = world(
        EGRESS,
        provider("llm", LLM),
        provider("other", "other.example.com"),
        route("a", "a.example.com", to_egress()),
        route("b", "b.example.com", RULE),
        route("c", "c.example.com", both),
    )
    made = resources(objects, SLEEP)["RouteConfiguration http_proxy"]
    assert made.request_headers_to_remove == [ROUTES_HEADER], "what the listener told the routes"
    removing = {
        host.name: "authorization" in host.routes[0].request_headers_to_remove for host in made.virtual_hosts
    }
    assert removing == {
        "a.example.com": False,
        "b.example.com": True,
        "c.example.com": True,
        "plain providers": True,
    }


def test_without_services_the_headers_are_said_once() -> None:
    objects = world(provider("llm", LLM), route("b", "b.example.com", RULE))
    made = resources(objects, SLEEP)["RouteConfiguration http_proxy"]
    assert "authorization" in made.request_headers_to_remove
    assert not any(route.request_headers_to_remove for host in made.virtual_hosts for route in host.routes)


def test_the_two_legs_of_one_route() -> None:
    legs = (
        {"name": "out", "matches": [{"gateways": ["mesh"]}], **to_egress()},
        {"name": "up", "matches": [{"gateways": ["istio-system/egress-gw"]}], **RULE},
    )
    objects = world(
        EGRESS,
        MUTUAL,
        provider("istio-system/llm", LLM, "sk-1", workloadSelector={"labels": EGRESS_LABELS}),
        attached("istio-system/r", LLM, *legs, gateways=("mesh", "istio-system/egress-gw")),
    )
    egress = Proxy(
        ProxyType.ROUTER, "istio-system", "egress", frozenset(EGRESS_LABELS.items()), certificate=FILES
    )
    assert [of.name for of in routes_of(objects, SLEEP)[LLM]] == ["out"]
    assert [of.name for of in virtual_host(objects, LLM, egress).routes] == ["up"]
    assert [name for name in resources(objects, SLEEP) if "api-key" in name] == []
    assert [name for name in resources(objects, egress) if "api-key" in name]
    assert condition(objects, "istio-system/r", "ResolvedRefs")[0]


def test_objects_that_did_not_change_are_not_made_again() -> None:
    objects = world(
        EGRESS,
        MUTUAL,
        provider("istio-system/llm", LLM),
        gateway("istio-system/gw", server()),
        attached("r", "a.com"),
    )
    items = [
        item
        for of in (objects.providers, objects.routes, objects.gateways)
        for each in of.values()
        for item in each
    ]
    again = World.of([*items, *objects.services.values()], objects.mesh)
    translator = Translator()
    before = {(r.type_url, r.name): r for r in translator.translate(objects, INGRESS).resources}
    after = {(r.type_url, r.name): r for r in translator.translate(again, INGRESS).resources}
    assert before == after
    table = [key for key in before if key[1].startswith("outbound|")]
    assert table
    assert all(before[key] is after[key] for key in table)
