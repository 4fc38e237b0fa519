"""Objects from an API server: what is read, what survives which fault, and what is asked for."""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from crds.meshconfig import MeshConfig
from crds.problems import ObjectKey, Problem, Severity
from llmplane.kubeacknowledged import NAME
from llmplane.sources import reflector
from llmplane.sources.kubernetes import KubernetesSource
from llmplane.sources.lastgood import LastGood
from llmplane.sources.state import SourceState, world_of
from tests.support.kubeapi import FakeApi, connected_api, running_api, write_kubeconfig
from translator.conditions import conditions
from translator.world import MeshSettings


def provider(name: str = "a", *, host: str = "a.example.com", key: str = "sk-1", **metadata: str) -> str:
    namespace = metadata.get("namespace", "default")
    return f"""
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  host: {host}
  path: /v1/chat/completions
  configs: {{defaultConfig: {{openAIConfig: {{model: m, apiKey: "{key}"}}}}}}
"""


def with_secret(name: str = "a", of: str = "keys") -> str:
    return provider(name).replace('apiKey: "sk-1"', f"apiKeySecretRef: {{name: {of}, key: k}}")


def secret(name: str = "keys", value: str = "c2stMQ==") -> str:  # sk-1
    return f"{{apiVersion: v1, kind: Secret, metadata: {{name: {name}}}, data: {{k: {value}}}}}"


def refs(state: SourceState) -> str:
    """Return what the condition ResolvedRefs of the provider `a` says."""
    _, resolved = conditions(world_of(state, MeshSettings()))[ObjectKey("LLMProvider", "default", "a")]
    assert resolved.status == (not resolved.message)
    return resolved.message


FIRST, SECOND = "token-1", "token-2"
BROKEN = provider().replace("path: /v1/chat/completions", "path: no-slash")
MESH = """
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: "rootNamespace: mesh-root"}
"""


class Watched:
    """A source that runs, and the states that it yielded."""

    def __init__(self, source: KubernetesSource) -> None:
        self.source = source
        self.states: list[SourceState] = []
        self._new = asyncio.Event()

    async def follow(self, stop: asyncio.Event) -> None:
        async for state in self.source.states(stop):
            self.states.append(state)
            self._new.set()

    async def when(self, condition: Callable[[SourceState], object]) -> SourceState:
        """Return the newest state as soon as it meets a condition."""
        async with asyncio.timeout(120):
            while not self.states or not condition(self.states[-1]):
                self._new.clear()
                await self._new.wait()
        return self.states[-1]

    @property
    def names(self) -> list[str]:
        return names(self.states[-1])


def names(state: SourceState) -> list[str]:
    return [item.name for item in state.objects]


def errors(state: SourceState) -> list[Problem]:
    """Return what is wrong; that a provider has its key in the clear is only a warning."""
    return [problem for problem in state.problems if problem.severity is Severity.ERROR]


def has(*expected: str) -> Callable[[SourceState], bool]:
    return lambda state: names(state) == list(expected)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait little before asking again."""
    monkeypatch.setattr(reflector, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(reflector, "_LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(reflector, "_NOT_INSTALLED_PAUSE", 0.05)


@pytest.fixture
def watching(fake: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    @asynccontextmanager
    async def watching(last_good: LastGood | None = None) -> AsyncIterator[Watched]:
        file = write_kubeconfig(tmp_path / "kubeconfig", fake.url, fake.token)
        async with connected_api(file, monkeypatch) as api:
            watched, stop = Watched(KubernetesSource(api, MeshSettings(), last_good)), asyncio.Event()
            task = asyncio.create_task(watched.follow(stop))
            yield watched
            stop.set()
            await task

    return watching


async def test_what_is_there_and_each_change(fake: FakeApi, watching: Any) -> None:
    await fake.put(provider("a"), provider("b", host="b.example.com"))
    async with watching() as source:
        first = await source.when(has("a", "b"))
        await fake.put(provider("b", host="c.example.com"))
        second = await source.when(lambda state: state.objects[1].object.spec.host == "c.example.com")
        assert second.objects[0].object is first.objects[0].object, "what did not change is the same object"
        await fake.delete("llmproviders", "a")
        await source.when(has("b"))


async def test_nothing_is_handed_on_before_everything_was_read(fake: FakeApi, watching: Any) -> None:
    """A policy that cannot be read, for want of a right, would be a policy without effect."""
    await fake.put(provider())

    def refuse(request: web.Request) -> web.Response | None:
        if "authorizationpolicies" not in request.path:
            return None
        return web.json_response({"message": "authorizationpolicies is forbidden"}, status=403)

    fake.refuse = refuse
    async with watching() as source:
        async with asyncio.timeout(60):
            while fake.requests["LIST authorizationpolicies"] < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert not source.states
        fake.refuse = None
        await source.when(has("a"))


async def test_what_stands_in_for_refused_resources_is_read_first(fake: FakeApi, watching: Any) -> None:
    """Else a newcomer would be sent what others refused, as if nothing were known of it."""
    await fake.put(provider())

    def refuse(request: web.Request) -> web.Response | None:
        if NAME not in request.query_string:
            return None
        return web.json_response({"message": "configmaps is forbidden"}, status=403)

    fake.refuse = refuse
    async with watching() as source:
        async with asyncio.timeout(60):
            while not source.source.acknowledged.reflector.failure:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert not source.states
        fake.refuse = None
        await source.when(has("a"))


async def test_a_cluster_without_istio(fake: FakeApi, watching: Any) -> None:
    """Its kinds are looked for again: they may be installed later."""
    fake.missing = {"gateways", "telemetries", "authorizationpolicies", "requestauthentications"}
    await fake.put(provider())
    async with watching() as source:
        assert not errors(await source.when(has("a")))
        await fake.put("{apiVersion: telemetry.istio.io/v1, kind: Telemetry, metadata: {name: t}, spec: {}}")
        fake.missing = set()
        await source.when(has("a", "t"))


async def test_a_cluster_without_our_kinds_is_told_what_to_do(fake: FakeApi, watching: Any) -> None:
    fake.missing = {"llmroutes"}
    async with watching() as source:
        state = await source.when(errors)
        assert [str(problem) for problem in errors(state)] == [
            "LLMRoute: the cluster does not have this kind: kubectl apply -f crds/"
        ]


async def test_large_clusters_are_read_in_pages(fake: FakeApi, watching: Any) -> None:
    fake.page = 3
    for number in range(10):
        await fake.put(provider(f"p{number}", host=f"h{number}.example.com"))
    async with watching() as source:
        await source.when(lambda state: len(state.objects) == 10)
    assert fake.requests["LIST llmproviders"] == 5, "a look for the version, and four pages"


async def test_ten_thousand_objects(fake: FakeApi, watching: Any) -> None:
    template = yaml.safe_load(provider())
    for number in range(10_000):
        document = copy.deepcopy(template)
        document["metadata"] = {"name": f"p{number}"}
        document["spec"]["host"] = f"p{number}.example.com"
        await fake.put_object(document)
    async with watching() as source:
        first = await source.when(lambda state: len(state.objects) == 10_000)
        await fake.put(provider("p7", host="other.example.com"))
        second = await source.when(lambda state: state != first)
        kept = {id(item.object) for item in first.objects} & {id(item.object) for item in second.objects}
        assert len(kept) == 9_999


async def test_a_page_that_is_too_old_is_asked_for_as_a_whole(fake: FakeApi, watching: Any) -> None:
    """What was deleted since the first page, which had it, is gone."""
    fake.page = 3
    for number in range(10):
        await fake.put(provider(f"p{number}", host=f"h{number}.example.com"))

    def forget(request: web.Request) -> None:
        if "continue" in request.query:
            fake.objects.pop(("llmproviders", "default", "p0"), None)
            fake.forget_history()

    fake.refuse = forget
    async with watching() as source:
        state = await source.when(names)
        assert names(state) == [f"p{number}" for number in range(1, 10)]


async def test_a_watch_that_is_cut_goes_on_where_it_was(fake: FakeApi, watching: Any) -> None:
    await fake.put(provider("a"))
    async with watching() as source:
        await source.when(has("a"))
        lists = fake.requests["LIST llmproviders"]
        await fake.cut()
        await fake.put(provider("b", host="b.example.com"))
        await source.when(has("a", "b"))
        assert fake.requests["LIST llmproviders"] == lists


async def test_a_bookmark_moves_the_point_to_go_on_from(fake: FakeApi, watching: Any) -> None:
    """Without it, a quiet kind's point would be forgotten by the API server after some minutes."""
    await fake.put(provider("a"))
    async with watching() as source:
        await source.when(has("a"))
        await fake.bookmark()
        await fake.put(provider("b", host="b.example.com"))
        await source.when(has("a", "b"))
        fake.forget_history()
        await fake.cut()
        await fake.put(provider("c", host="c.example.com"))
        await source.when(has("a", "b", "c"))
        assert fake.requests["LIST llmproviders"] == 2


async def test_after_410_everything_is_listed_again(fake: FakeApi, watching: Any) -> None:
    """What was deleted meanwhile is gone, what was not is the same object."""
    await fake.put(provider("a"), provider("b", host="b.example.com"))
    async with watching() as source:
        first = await source.when(has("a", "b"))
        async with fake._news:
            del fake.objects["llmproviders", "default", "b"]
        fake._version += 1
        fake.forget_history()
        await fake.cut()
        second = await source.when(has("a"))
        assert second.objects[0].object is first.objects[0].object


async def test_the_api_server_dies_and_returns(
    tmp_path: Path, watching: Any, fake: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read stays in use, and the status says so."""
    other = FakeApi()
    async with running_api(other):
        port = int(other.url.rpartition(":")[2])
        await other.put(provider("a"))
        file = write_kubeconfig(tmp_path / "other", other.url)
        api_of = connected_api(file, monkeypatch)
        api = await api_of.__aenter__()
        watched, stop = Watched(KubernetesSource(api, MeshSettings())), asyncio.Event()
        task = asyncio.create_task(watched.follow(stop))
        await watched.when(has("a"))
    state = await watched.when(errors)
    assert names(state) == ["a"]
    assert "what was read before stays in use" in str(errors(state)[0])
    other.objects.clear()
    await other.put(provider("b", host="b.example.com"))
    other.forget_history()
    async with running_api(other, port):
        await watched.when(lambda state: names(state) == ["b"] and not errors(state))
        stop.set()
        await task
        await api_of.__aexit__(None, None, None)


async def test_expired_credentials_are_read_again(fake: FakeApi, watching: Any, tmp_path: Path) -> None:
    fake.token = FIRST
    await fake.put(provider("a"))
    async with watching() as source:
        await source.when(has("a"))
        fake.token = SECOND
        write_kubeconfig(tmp_path / "kubeconfig", fake.url, SECOND)
        await fake.cut()
        await fake.put(provider("b", host="b.example.com"))
        await source.when(has("a", "b"))


async def test_an_invalid_object_stays_in_its_last_good_version(fake: FakeApi, watching: Any) -> None:
    await fake.put(provider("a"))
    async with watching() as source:
        first = await source.when(has("a"))
        await fake.put(BROKEN)
        state = await source.when(errors)
        assert state.kept == {ObjectKey("LLMProvider", "default", "a")}
        assert state.objects[0].object is first.objects[0].object
        assert str(errors(state)[0]) == "LLMProvider default/a: spec.path: must start with '/'"
        assert not state.unknown, "a good version of everything was known"
        await fake.delete("llmproviders", "a")
        await source.when(has())


async def test_the_last_good_version_survives_a_restart_without_its_key(
    fake: FakeApi, watching: Any, tmp_path: Path
) -> None:
    await fake.put(provider("a", key="sk-very-secret"))
    file = tmp_path / "last-good.json"
    async with watching(LastGood(file)) as source:
        await source.when(has("a"))
        await fake.put(BROKEN)
        await source.when(errors)
    assert "sk-very-secret" not in file.read_text()
    async with watching(LastGood(file)) as source:
        state = await source.when(has("a"))
        assert state.kept == state.held == {ObjectKey("LLMProvider", "default", "a")}


async def test_a_security_policy_that_is_invalid_denies(fake: FakeApi, watching: Any) -> None:
    await fake.put(
        """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p}
spec: {selector: {matchLabels: {app: gw}}, action: DENY}
"""
    )
    async with watching() as source:
        state = await source.when(errors)
        (policy,) = state.unreadable
        assert policy.labels == {"app": "gw"}


async def test_a_placeholder_is_not_filled_in(
    fake: FakeApi, watching: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment of the control plane is not theirs to read."""
    monkeypatch.setenv("API_KEY_OF_DASHSCOPE", "sk-of-the-control-plane")
    await fake.put(provider("a", key="${ API_KEY of dashscope}"))
    async with watching() as source:
        state = await source.when(has("a"))
        assert "the placeholder ${ API_KEY of dashscope} was not filled in" in refs(state)
        (warning,) = state.problems
        assert warning.message == (
            "nothing fills in ${ API_KEY of dashscope} on Kubernetes: "
            "put the key into a Secret (apiKeySecretRef)"
        )


async def test_what_others_write_into_an_object_is_no_change(fake: FakeApi, watching: Any) -> None:
    await fake.put(provider("a"))
    async with watching() as source:
        await source.when(has("a"))
        document = fake.get("llmproviders", "a")
        document["metadata"]["managedFields"] = [{"manager": "kubectl"}]
        document["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": "{}"}
        document["status"] = {"status": "OK"}
        await fake.put_object(document)
        await fake.put(provider("b", host="b.example.com"))
        await source.when(has("a", "b"))
        assert [names(state) for state in source.states] == [["a"], ["a", "b"]]
        assert {entry.key.name: entry.status for entry in source.source.entries()} == {
            "a": {"status": "OK"},
            "b": {},
        }


class TestSecrets:
    async def test_only_those_that_objects_refer_to_are_kept(self, fake: FakeApi, watching: Any) -> None:
        await fake.put(with_secret(), secret(), secret("of-others"))
        async with watching() as source:
            await source.when(has("a", "keys"))

    async def test_nobody_asks_for_secrets_where_nothing_refers_to_one(
        self, fake: FakeApi, watching: Any
    ) -> None:
        await fake.put(provider())
        async with watching() as source:
            await source.when(has("a"))
        assert not fake.requests["LIST secrets"]

    async def test_a_changed_one(self, fake: FakeApi, watching: Any) -> None:
        await fake.put(with_secret(), secret())
        async with watching() as source:
            await source.when(has("a", "keys"))
            await fake.put(secret(value="c2stMg=="))
            await source.when(lambda state: state.objects[1].object.value("k") == b"sk-2")

    async def test_one_that_comes_later(self, fake: FakeApi, watching: Any) -> None:
        await fake.put(with_secret())
        async with watching() as source:
            await source.when(has("a"))
            await fake.put(secret())
            await source.when(has("a", "keys"))

    async def test_a_new_reference_to_one_that_was_there(self, fake: FakeApi, watching: Any) -> None:
        """It was not kept when nobody referred to it."""
        await fake.put(with_secret(), secret(), secret("other"))
        async with watching() as source:
            await source.when(has("a", "keys"))
            await fake.put(with_secret("b", of="other").replace("a.example", "b.example"))
            await source.when(has("a", "b", "keys", "other"))

    async def test_a_reference_that_goes(self, fake: FakeApi, watching: Any) -> None:
        await fake.put(with_secret(), secret())
        async with watching() as source:
            await source.when(has("a", "keys"))
            await fake.put(provider("a"))
            await source.when(has("a"))

    async def test_a_namespace_whose_secrets_are_forbidden_holds_nobody_up(
        self, fake: FakeApi, watching: Any
    ) -> None:
        """Envoys that have a key keep it: it is not known that there is none."""

        def refuse(request: web.Request) -> web.Response | None:
            if "secrets" not in request.path:
                return None
            return web.json_response({"message": "secrets is forbidden"}, status=403)

        fake.refuse = refuse
        await fake.put(with_secret(), secret())
        async with watching() as source:
            state = await source.when(has("a"))
            assert state.incomplete
            assert not state.unknown
            assert [str(problem) for problem in errors(state)] == [
                "Secret: the Secrets of namespace default cannot be read: secrets is forbidden"
            ]
            assert "Secret default/keys cannot be read: secrets is forbidden; requests are" in refs(state)
            fake.refuse = None
            state = await source.when(has("a", "keys"))
            assert not state.incomplete
            assert refs(state) == ""

    async def test_a_secret_that_is_not_there(self, fake: FakeApi, watching: Any) -> None:
        await fake.put(with_secret())
        async with watching() as source:
            assert "Secret default/keys does not exist; requests are" in refs(await source.when(has("a")))


class TestMeshConfiguration:
    async def test_it_is_known_before_the_first_state(self, fake: FakeApi, watching: Any) -> None:
        await fake.put(MESH, provider())
        async with watching() as source:
            await source.when(has("a"))
            assert source.source.mesh.settings.config.root_namespace == "mesh-root"

    async def test_without_one_the_defaults_hold(self, watching: Any) -> None:
        async with watching() as source:
            await source.when(has())
            assert source.source.mesh.settings.config == MeshConfig()

    async def test_one_that_cannot_be_read_yet_is_not_one_that_is_not_there(
        self, fake: FakeApi, watching: Any
    ) -> None:
        """Policies of its root namespace would have no effect."""
        await fake.put(MESH, provider())
        refused: list[str] = []

        def refuse(request: web.Request) -> web.Response | None:
            if "istio-system" not in request.path:
                return None
            refused.append(request.path)
            return web.json_response({"message": "configmaps is forbidden"}, status=403)

        fake.refuse = refuse
        async with watching() as source:
            async with asyncio.timeout(60):
                while len(refused) < 10:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert not source.states
            fake.refuse = None
            await source.when(has("a"))
            assert source.source.mesh.settings.config.root_namespace == "mesh-root"

    async def test_a_broken_one_changes_nothing(self, fake: FakeApi, watching: Any) -> None:
        await fake.put(MESH)
        async with watching() as source:
            await source.when(has())
            changes = source.source.mesh.states(asyncio.Event())
            await fake.put(MESH.replace("rootNamespace: mesh-root", "rootNamespace: [1]"))
            async with asyncio.timeout(60):
                while not source.source.mesh.problems:
                    await anext(changes)
            assert source.source.mesh.settings.config.root_namespace == "mesh-root"
            (problem,) = source.source.mesh.problems
            assert str(problem).startswith("ConfigMap istio-system/istio: rootNamespace: ")


async def test_a_key_that_whoever_reads_objects_can_read_is_a_warning(fake: FakeApi, watching: Any) -> None:
    await fake.put(provider(), with_secret("b"), secret())
    async with watching() as source:
        state = await source.when(lambda state: len(state.objects) == 3)
        (warning,) = state.problems
        assert (warning.name, warning.field) == ("a", "spec.configs.defaultConfig.openAIConfig.apiKey")
        assert warning.message == (
            "whoever may read this object has the key: put the key into a Secret (apiKeySecretRef)"
        )
