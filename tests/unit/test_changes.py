"""Whatever changed before: the outcome is the one of a control plane that was started just now."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crds.loader import LoadedObject, load_object
from llmplane.controlplane import ControlPlane
from llmplane.sources.state import SourceState, world_of
from tests.support.identities import MeshCA
from tests.support.objects import backends, gateway, provider, route, secret, server, service
from translator import scopes
from translator.conditions import conditions
from translator.memory import Memory
from translator.proxy import Proxy, ProxyType
from translator.translate import NOTHING, Translator
from translator.world import MeshSettings
from xds import validation
from xds.resources import CDS, SDS, Resource
from xds.snapshot import Snapshot

MESH = MeshSettings(trusted_ca=b"PEM")
A, B, C = "a.example.com", "b.example.com", "c.example.com"
LABELS = frozenset({("app", "chat")})
PROXIES = (
    Proxy(ProxyType.SIDECAR, "default", "sleep"),
    Proxy(ProxyType.SIDECAR, "default", "chat", labels=LABELS),
    Proxy(ProxyType.SIDECAR, "team", "sleep"),
    Proxy(ProxyType.SIDECAR, "team", "sleep", version=(1, 36, 0)),
    Proxy(ProxyType.ROUTER, "default", "gateway", labels=frozenset({("istio", "ingressgateway")})),
)


def configs(key: str, model: str = "m") -> dict[str, object]:
    """Return the configs of a provider whose keys are in the Secret `keys`."""
    ref = {"name": "keys", "key": key}
    default = {"openAIConfig": {"model": model, "apiKeySecretRef": ref}}
    own = {"openAIConfig": {"model": "own", "apiKeySecretRef": {"name": "keys", "key": "second"}}}
    return {"defaultConfig": default, "routeSpecificConfigs": {"vip": own}}


PAIR = MeshCA().issue("proxy")
TLS = {"tls.crt": PAIR.certificate.decode(), "tls.key": PAIR.key.decode()}
SELECTOR = {"labels": {"app": "chat"}}
VARIANTS: tuple[tuple[str, ...], ...] = (
    (provider("a", A, key="sk-1"), provider("a", A, key="sk-2"), provider("a", B, key="sk-1")),
    (provider("b", B, configs=configs("first")), provider("b", B, configs=configs("other"))),
    (
        provider("c", C, configs=configs("first")),
        provider("c", C, tls={"mode": "MUTUAL", "credentialName": "keys"}),
    ),
    (provider("d", A, workloadSelector=SELECTOR), provider("d", C, key="${KEY}", exportTo=["."])),
    (provider("istio-system/e", A, key="sk-3"), provider("istio-system/e", "llm", exportTo=["team"])),
    (provider("istio-system/f", "llm.default.svc"), provider("istio-system/f", "llm.default")),
    (
        route("r", "chat", {"name": "vip", "backendRefs": backends(A, B)}),
        route("r", "chat", {"backendRefs": backends(B), "matches": [{"sourceLabels": {"app": "chat"}}]}),
        route("r", "llm", {"backendRefs": backends("nowhere.example.com")}),
        route("r", B, {"backendRefs": backends(A)}),
    ),
    (
        route("s", "*.example.com", {"backendRefs": backends(C)}),
        route("s", "chat.default", {"backendRefs": [{"backendRef": {"name": "egress"}}]}),
        route("s", C, {"name": "vip", "backendRefs": backends(B)}, gateways=["gw"]),
    ),
    (route("team/r", "llm", {"backendRefs": backends(A)}), route("team/r", A, {"backendRefs": backends(C)})),
    (gateway("gw", server()), gateway("gw", server("b.example.com", C), server(C, number=81))),
    (service("egress", {"istio": "egress"}, (80, 8080)), service("egress", {}, (80, 81), (90, 91))),
    (
        secret("keys", {"first": "sk-4"}),
        secret("keys", {"first": "sk-5", "second": "sk-6", "other": " ", **TLS}),
    ),
    (secret("istio-system/keys", {"first": "sk-7"}),),
)
"""Of each object the versions that there can be."""


def loaded(text: str) -> LoadedObject:
    """Read an object as from an API server, where nothing fills placeholders."""
    item, problems = load_object(json.loads(text))
    assert item is not None, problems
    return LoadedObject(item, "objects.yaml", 1, text, digest=text)


OBJECTS = tuple(tuple(loaded(text) for text in versions) for versions in VARIANTS)


@st.composite
def states(draw: st.DrawFn) -> list[SourceState]:
    """Draw a history: some objects change with each step, and what can be read."""
    chosen: dict[int, LoadedObject] = {}
    history = []
    for _ in range(draw(st.integers(2, 6))):
        for number in draw(st.sets(st.integers(0, len(OBJECTS) - 1), max_size=4 if chosen else None)):
            version = draw(st.sampled_from((None, *OBJECTS[number])))
            if version is None:
                chosen.pop(number, None)
            else:
                chosen[number] = version
        objects = tuple(sorted(chosen.values(), key=lambda item: item.key))
        providers = [item.key for item in objects if item.kind == "LLMProvider"]
        held = draw(st.frozensets(st.sampled_from(providers), max_size=2)) if providers else frozenset()
        flags = draw(st.booleans()), draw(st.booleans())
        history.append(SourceState(objects, held=held, incomplete=all(flags), unknown=flags[0]))
    return history


def control_plane() -> ControlPlane:
    """Make one to which the proxies are connected, and for which nothing is read."""
    made = ControlPlane(None, MESH)  # type: ignore[arg-type]
    made.server.groups = lambda: list(PROXIES)  # type: ignore[method-assign]
    return made


def by_name(resources: Iterable[Resource]) -> dict[tuple[str, str], Resource]:
    return {(resource.type_url, resource.name): resource for resource in resources}


def content(snapshot: Snapshot) -> Mapping[str, object]:
    return {
        url: ({name: snapshot[url][name] for name in snapshot[url]}, snapshot[url].version)
        for url in snapshot
    }


@settings(max_examples=60, deadline=None)
@given(states())
def test_what_is_remembered_changes_no_outcome(history: list[SourceState]) -> None:
    with patch.object(scopes, "THRESHOLD", 3), patch.object(scopes, "MARGIN", 1):
        warm, remembered = Translator(), Memory()
        for state in history:
            world = world_of(state, MESH)
            remembered.begin()
            assert conditions(world, remembered) == conditions(world)
            for proxy in PROXIES:
                cold = Translator()
                cold._scoped = set(warm._scoped)  # what draining connections may still use
                found, expected = warm.translate(world, proxy), cold.translate(world, proxy)
                assert by_name(found.resources) == by_name(expected.resources)
                assert found.origins == expected.origins
                assert found.missing == expected.missing
                assert found.uncertified == expected.uncertified
                of_parts = [by_name(part.resources.values()) for part in found.parts]
                for name, resource in by_name(found.resources).items():
                    assert all(part.get(name, resource) == resource for part in of_parts), name


@settings(max_examples=40, deadline=None)
@given(states())
def test_a_change_leads_to_the_snapshot_of_a_fresh_start(history: list[SourceState]) -> None:
    warm = control_plane()
    for state in history:
        cold = control_plane()
        for each in (warm, cold):
            asyncio.run(each._take(state))
        for proxy in PROXIES:
            found, expected = warm._snapshots[proxy], cold._snapshots[proxy]
            assert content(found) == content(expected)
            assert found.incomplete == expected.incomplete
        assert warm._conditions == cold._conditions
        assert list(warm._problems) == list(cold._problems)


@settings(max_examples=40, deadline=None)
@given(states())
def test_the_difference_of_two_translations_leads_from_one_to_the_other(history: list[SourceState]) -> None:
    translator, proxy = Translator(), PROXIES[0]
    before, resources = NOTHING, {}
    for state in history:
        after = translator.translate(world_of(state, MESH), proxy)
        resources |= after.changed(before)
        assert {name: of for name, of in resources.items() if of is not None} == by_name(after.resources)
        before = after


def test_a_changed_provider_is_all_that_is_looked_at() -> None:
    many = [loaded(provider(f"p{n}", f"host-{n}.example.com", key="sk-1")) for n in range(50)]
    translator, proxy = Translator(), PROXIES[0]

    def translate(*objects: LoadedObject) -> object:
        return translator.translate(world_of(SourceState(objects), MESH), proxy)

    before = translate(*many)
    after = translate(*many[1:], loaded(provider("p0", "host-0.example.com", key="sk-2")))
    assert {name for name in after.changed(before) if name[0] in {CDS, SDS}} == {
        (CDS, "outbound|443||host-0.example.com"),
        (SDS, "api-key/default/p0"),
        (SDS, "ROOTCA"),
    }


def test_what_several_hosts_lead_to_is_gone_with_the_last_of_them() -> None:
    translator, proxy = Translator(), PROXIES[0]
    (own, *_), (routed, *_) = OBJECTS[0], OBJECTS[6]
    both, alone = (
        translator.translate(world_of(SourceState(objects), MESH), proxy)
        for objects in ((own, routed), (own,))
    )
    nothing = translator.translate(world_of(SourceState(), MESH), proxy)
    cluster, key = (CDS, f"outbound|443||{A}"), (SDS, "api-key/default/a")
    assert {cluster, key}.isdisjoint(alone.changed(both))
    assert {name for name, of in nothing.changed(both).items() if of is None} >= {cluster, key}


def test_a_resource_that_breaks_the_rules_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def violations(message: object) -> list[str]:
        return ["is forbidden"] if b"forbidden" in message.value else []  # type: ignore[attr-defined]

    monkeypatch.setattr(validation, "violations", violations)
    plane, proxy, name = control_plane(), PROXIES[0], f"outbound|443||{A}"

    def served(*documents: str) -> str | None:
        objects = tuple(map(loaded, documents))
        asyncio.run(plane._take(SourceState(objects)))
        resource = plane._snapshots[proxy][CDS].get(name)
        return resource and resource.body.partition(b"model-")[2][:1].decode()

    good, bad = provider("a", A, model="model-1"), provider("a", A, model="model-2 is forbidden")
    other = provider("b", B)
    assert served(bad) == "", "a cluster without hosts"
    assert served(good) == "1"
    assert not plane._violations[proxy]
    assert served(bad) == "1"
    assert served(bad, other) == "1", "another change does not make it good"
    assert list(plane._violations[proxy]) == [(CDS, name)]
    assert [str(key) for key in plane._refusals()] == ["LLMProvider default/a"]
    assert served(other) is None
    assert not plane._violations[proxy]
