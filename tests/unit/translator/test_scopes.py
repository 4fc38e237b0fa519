"""Many hosts -> scoped routes (SRDS): which form, which scopes, which buckets."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

from tests.support.objects import backends, provider, route, world
from translator.memory import Memory
from translator.proxy import Proxy, ProxyType
from translator.scopes import MARGIN, THRESHOLD
from translator.translate import Translation, Translator
from translator.world import MeshSettings, World
from xds import protos
from xds.resources import LDS, RDS, SRDS, Resource

A, B = "a.example.com", "b.example.com"
SIDECAR = Proxy(ProxyType.SIDECAR, "default", "sleep")
MESH = MeshSettings()
PROVIDERS = world(provider("a", A), provider("b", B), mesh=MESH)
MANY = THRESHOLD + MARGIN + 1


def routes(names: Iterable[str], to: str = A, **spec: Any) -> list[Any]:
    """Return LLMRoutes whose hosts are these Services of `default`."""
    documents = [route(name, name, {"backendRefs": backends(to)}, **spec) for name in names]
    return list(world(*documents, mesh=MESH).routes["default"])


HOSTS = routes(f"host-{number}" for number in range(2 * MANY))


def many(count: int, *others: Any) -> World:
    """Return a world in which a sidecar has `count` virtual hosts and those of `others`, and two providers.

    These are plain ones: they have no virtual host of their own.
    """
    return World.of([*PROVIDERS.providers["default"], *HOSTS[:count], *others], MESH)


def plain_provider(host: str) -> Sequence[Any]:
    return world(provider(host.partition(".")[0], host), mesh=MESH).providers["default"]


def decoded(translation: Translation, type_url: str) -> dict[str, Any]:
    kinds: Mapping[str, Any] = {
        LDS: protos.Listener,
        RDS: protos.RouteConfiguration,
        SRDS: protos.ScopedRouteConfiguration,
    }
    return {
        resource.name: kinds[type_url].FromString(protos.Any.FromString(resource.body).value)
        for resource in translation.resources
        if resource.type_url == type_url
    }


def manager(translation: Translation) -> Any:
    (listener,) = decoded(translation, LDS).values()
    packed = listener.filter_chains[0].filters[0].typed_config
    return protos.HttpConnectionManager.FromString(packed.value)


def changed(before: Translation, after: Translation) -> dict[str, Resource]:
    """Return what Envoy is sent for a change."""
    return {new.name: new for new in after.resources if new not in before.resources}


# Which form


@pytest.mark.parametrize(
    ("count", "is_scoped", "has_one", "has_scopes"),
    [
        (THRESHOLD - MARGIN, False, True, False),
        (THRESHOLD - MARGIN + 1, False, True, True),
        (THRESHOLD, False, True, True),
        (THRESHOLD + 1, True, True, True),
        (THRESHOLD + MARGIN, True, True, True),
        (THRESHOLD + MARGIN + 1, True, False, True),
    ],
)
def test_routes_are_scoped_above_the_threshold_and_around_it_there_are_both_forms(
    count: int, is_scoped: bool, has_one: bool, has_scopes: bool
) -> None:
    made = Translator().translate(many(count), SIDECAR)
    assert manager(made).WhichOneof("route_specifier") == ("scoped_routes" if is_scoped else "rds")
    assert ("http_proxy" in decoded(made, RDS)) == has_one
    assert bool(decoded(made, SRDS)) == has_scopes


def test_a_proxy_whose_routes_were_scoped_is_given_scopes_for_ever() -> None:
    """Connections that began before drain, for minutes, and look their routes up as they did."""
    translator = Translator()
    translator.translate(many(MANY), SIDECAR)
    few = translator.translate(many(3), SIDECAR)
    assert manager(few).HasField("rds")
    assert {"host-0", A, B} <= decoded(few, SRDS).keys()
    other = Proxy(ProxyType.SIDECAR, "default", "other")
    assert not decoded(translator.translate(many(3), other), SRDS)


@pytest.mark.parametrize("host", ["*", "*.wild.example.com"])
def test_with_a_wildcard_there_is_one_route_configuration(host: str) -> None:
    wild = world(route("wild", host, {"backendRefs": backends(A)}), mesh=MESH).routes["default"]
    made = Translator().translate(many(MANY, *wild), SIDECAR)
    assert manager(made).HasField("rds")
    (found,) = (one for one in decoded(made, RDS)["http_proxy"].virtual_hosts if host in one.domains)
    assert found
    assert not [name for name in decoded(made, SRDS) if "*" in name]


def test_a_gateway_has_none_of_it() -> None:
    made = Translator().translate(many(MANY), Proxy(ProxyType.ROUTER, "default", "gateway"))
    assert not decoded(made, RDS)
    assert not decoded(made, SRDS)


# Scopes and buckets


def test_the_names_of_a_service_are_two_scopes() -> None:
    """Envoy takes what stands before `.svc` in the host: that is the same for all but the bare name."""
    made = Translator().translate(many(MANY), SIDECAR)
    (fragment,) = manager(made).scoped_routes.scope_key_builder.fragments
    extractor = fragment.header_value_extractor
    assert (extractor.name, extractor.element_separator, extractor.index) == (":authority", ".svc", 0)
    scopes, buckets = decoded(made, SRDS), decoded(made, RDS)
    assert {name for name in scopes if name.startswith("host-1.") or name == "host-1"} == {
        "host-1",
        "host-1.default",
    }
    for name, scope in scopes.items():
        assert [fragment.string_key for fragment in scope.key.fragments] == [name] == [scope.name]
        domain = "*" if name in {A, B} else name
        bucket = buckets[scope.route_configuration_name]
        assert [host.name for host in bucket.virtual_hosts if domain in host.domains], name
    assert {scope.route_configuration_name for scope in scopes.values()} == buckets.keys()


ODD = (
    "chat.default",
    "chat.default.svc.example.com",
    "chat.other.svc.cluster.local",
    "chat.other.svcs.example.com",
    "chat.svc",
    "chat.svc.example.com",
    "tiny.chat.svc.cluster.local",
    "x.svc.y.svc.cluster.local",
    "only.svc.example.com",
)


def test_hosts_that_begin_like_a_service_share_its_scope_and_its_bucket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever object has which of the names: what a host is looked up by leads to where the host is."""
    monkeypatch.setattr("translator.scopes.THRESHOLD", 0)
    plain = [f"{first}.svc.example.net" for first in ("chat", "only", "plain", "chat.default")]
    namespaces = ("default", "other")
    objects = world(
        *(provider(f"istio-system/plain-{number}", host) for number, host in enumerate(plain)),
        *(
            route(f"{namespace}/odd-{number}", host, {"backendRefs": backends(A)})
            for namespace in namespaces
            for number, host in enumerate([*ODD, "chat", "tiny"])
        ),
        mesh=MESH,
    )
    translator = Translator()
    for namespace in namespaces:
        made = translator.translate(objects, Proxy(ProxyType.SIDECAR, namespace, "sleep"))
        scopes, buckets = decoded(made, SRDS), decoded(made, RDS)
        del buckets["http_proxy"]
        leads_to = {name: scope.route_configuration_name for name, scope in scopes.items()}
        served = {
            name: bucket
            for bucket, of in buckets.items()
            for host in of.virtual_hosts[:-1]
            for name in host.domains
        }
        assert {*ODD, "chat", "tiny"} <= served.keys()
        assert {name: leads_to[name.partition(".svc")[0]] for name in served} == served
        for host in plain:
            bucket = leads_to[host.partition(".svc")[0]]
            assert buckets[bucket].virtual_hosts[-1].domains == ["*"]


def test_the_buckets_hold_the_virtual_hosts_of_the_one_route_configuration() -> None:
    made = decoded(Translator().translate(many(THRESHOLD + 1), SIDECAR), RDS)
    one = made.pop("http_proxy")
    assert sorted(
        host.SerializeToString() for each in made.values() for host in each.virtual_hosts[:-1]
    ) == sorted(host.SerializeToString() for host in one.virtual_hosts[:-1])
    assert all(each.virtual_hosts[-1].routes == one.virtual_hosts[-1].routes[-1:] for each in made.values())
    assert all(each.request_headers_to_remove == one.request_headers_to_remove for each in made.values())


def test_the_form_is_the_same_for_all_replicas_whatever_the_order_of_the_objects() -> None:
    there = many(MANY)
    objects = [item for of in (there.providers, there.routes) for item in of["default"]]
    first = Translator().translate(there, SIDECAR)
    second = Translator().translate(World.of(reversed(objects), MESH), SIDECAR)
    assert set(first.resources) == set(second.resources)


def test_no_host_moves_to_another_bucket_when_others_come() -> None:
    few = decoded(Translator().translate(many(MANY), SIDECAR), SRDS)
    more = decoded(Translator().translate(many(2 * MANY), SIDECAR), SRDS)
    assert {name: more[name] for name in few} == few


def test_a_host_stays_in_its_bucket_when_another_object_takes_it() -> None:
    """A provider's own host gets an LLMRoute: the scope stays, so no request falls between two buckets."""
    routed = world(route("own", A, {"backendRefs": backends(B)}), mesh=MESH).routes["default"]
    translator = Translator()
    before = translator.translate(many(MANY), SIDECAR)
    after = translator.translate(many(MANY, *routed), SIDECAR)
    (bucket,) = changed(before, after)
    assert bucket == decoded(before, SRDS)[A].route_configuration_name


# Changes


def test_a_changed_host_changes_its_bucket_alone() -> None:
    translator = Translator()
    before = translator.translate(many(MANY, *routes(["chat"])), SIDECAR)
    after = translator.translate(many(MANY, *routes(["chat"], to=B)), SIDECAR)
    (bucket,) = changed(before, after).values()
    assert bucket.name == decoded(after, SRDS)["chat"].route_configuration_name
    assert len(bucket.delta_frame) < 10_000


def test_a_new_host_changes_its_bucket_and_adds_its_scopes() -> None:
    translator = Translator()
    before = translator.translate(many(MANY), SIDECAR)
    after = translator.translate(many(MANY, *routes(["chat"])), SIDECAR)
    names = changed(before, after).keys()
    bucket = decoded(after, SRDS)["chat"].route_configuration_name
    assert names == {"chat", "chat.default", bucket}


def test_a_new_provider_adds_a_scope_and_changes_no_route_configuration() -> None:
    """Its bucket has the catch-all virtual host; it is there already, unless it was the bucket of no host."""
    plain = [item for host in "cdefgh" for item in plain_provider(f"{host}.example.com")]
    translator = Translator()
    before = translator.translate(many(MANY, *plain[:1]), SIDECAR)
    after = translator.translate(many(MANY, *plain), SIDECAR)
    assert decoded(after, LDS) == decoded(before, LDS)
    assert decoded(after, SRDS).keys() - decoded(before, SRDS).keys() == {
        item.spec.host for item in plain[1:]
    }
    buckets = decoded(after, RDS)
    assert {name: buckets[name] for name in decoded(before, RDS)} == decoded(before, RDS)
    for item in plain:
        bucket = buckets[decoded(after, SRDS)[item.spec.host].route_configuration_name]
        assert bucket.virtual_hosts[-1].domains == ["*"]
    gone = translator.translate(many(MANY, *plain[:1]), SIDECAR)
    assert set(gone.resources) == set(before.resources)


def test_what_did_not_change_is_not_made_again() -> None:
    translator = Translator()
    before = translator.translate(many(MANY, *routes(["chat"])), SIDECAR)
    after = translator.translate(many(MANY, *routes(["chat"], to=B)), SIDECAR)
    made = {id(resource) for resource in before.resources}
    new = [one for one in after.resources if one.type_url == RDS and id(one) not in made]
    assert len(new) == 1


def test_each_object_is_traced_to_its_bucket_and_scopes() -> None:
    made = Translator().translate(many(MANY, *routes(["chat"])), SIDECAR)
    (chat,) = routes(["chat"])
    names = {name for _, name in made.origins[chat.key]}
    bucket = decoded(made, SRDS)["chat"].route_configuration_name
    assert names == {"chat", "chat.default", bucket}


def test_a_memory_forgets_what_two_states_of_the_world_did_not_ask_for() -> None:
    memory, made = Memory(), []

    def ask() -> object:
        return memory.recall("key", (), lambda: made.append(1))

    for _ in range(3):
        memory.begin()
        ask()
    assert len(made) == 1
    memory.begin()
    memory.begin()
    ask()
    assert len(made) == 2
