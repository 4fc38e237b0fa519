"""Objects from files: what a mistake costs, how a change is noticed, what lies on the disk."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml
from structlog.testing import capture_logs

from crds.llmprovider import LLMProvider
from llmplane.sources import watch
from llmplane.sources.files import FileSource
from llmplane.sources.lastgood import LastGood, NoStateDirectoryError, state_file
from llmplane.sources.state import SourceState
from tests.support.objects import provider

VARIABLES = {"KEY_OF_A": "sk-of-the-environment"}
BROKEN = "kind: LLMProvider\n  spec: {"
DASHSCOPE = provider("dashscope", "dashscope.aliyuncs.com")
MOONSHOT = provider("moonshot", "api.moonshot.cn")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "config"
    folder.mkdir()
    return folder


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Where the last good versions lie."""
    return tmp_path / "state" / "last-good.json"


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def names(state: SourceState) -> list[str]:
    return [item.name for item in state.objects]


def problems(state: SourceState, below: Path) -> list[str]:
    return [str(problem).removeprefix(f"{below}/") for problem in state.problems]


def key_of(state: SourceState, name: str) -> str | None:
    (item,) = (item.object for item in state.objects if item.name == name)
    assert isinstance(item, LLMProvider)
    key = item.spec.config_for(None).api_key
    return key.get_secret_value() if key else None


# Which files count


def test_yaml_and_json_files_of_all_folders_count(config: Path) -> None:
    (config / "below" / "deeper").mkdir(parents=True)
    (config / "a.yaml").write_text(provider("a", "a.example.com"))
    (config / "below" / "b.yml").write_text(provider("b", "b.example.com"))
    (config / "below" / "deeper" / "c.json").write_text(provider("c", "c.example.com"))
    (config / "README.md").write_text("# no object")
    assert names(FileSource([config], {}).read()) == ["a", "b", "c"]


def test_hidden_files_and_folders_are_no_configuration(config: Path) -> None:
    (config / ".git").mkdir()
    (config / ".git" / "b.yaml").write_text(BROKEN)
    (config / ".a.yaml.swp").write_text(BROKEN)
    (config / ".a.yaml").write_text(BROKEN)
    assert FileSource([config], {}).read() == SourceState()


def test_a_file_that_is_given_by_name_may_be_called_anything(config: Path) -> None:
    (config / "objects").write_text(DASHSCOPE)
    assert names(FileSource([config / "objects"], {}).read()) == ["dashscope"]


def test_a_file_that_is_given_twice_is_read_once(config: Path) -> None:
    write(config, a=DASHSCOPE)
    state = FileSource([config, config / "a.yaml"], {}).read()
    assert names(state) == ["dashscope"]
    assert state.problems == ()


def test_folders_behind_links_are_read_and_a_circle_ends(config: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write(elsewhere, a=DASHSCOPE)
    (elsewhere / "back").symlink_to(config)
    (config / "link").symlink_to(elsewhere)
    assert names(FileSource([config], {}).read()) == ["dashscope"]


# Mistakes


def test_a_broken_object_keeps_its_last_good_version_and_the_others_change(config: Path) -> None:
    source = FileSource([config], {})
    write(config, a=f"{DASHSCOPE}\n---\n{MOONSHOT}")
    before = source.read()
    write(
        config, a=f"{DASHSCOPE.replace('host', 'hots')}\n---\n{provider('moonshot', 'moonshot.example.com')}"
    )
    after = source.read()
    assert after.objects[0].object is before.objects[0].object
    assert [str(key) for key in after.kept] == ["LLMProvider default/dashscope"]
    assert [item.object.spec.host for item in after.objects] == [
        "dashscope.aliyuncs.com",
        "moonshot.example.com",
    ]  # type: ignore[attr-defined]
    assert not after.incomplete
    write(config, a=MOONSHOT)
    assert names(source.read()) == ["moonshot"], "repaired: what is not there is removed"


def unreadable_by_text(file: Path) -> None:
    file.write_text(BROKEN)


def unreadable_by_bytes(file: Path) -> None:
    file.write_bytes(b"kind: \xff\xfe\n")


def unreadable_by_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("/nowhere")


def unreadable_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def unreadable_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def unreadable_by_emptiness(file: Path) -> None:
    file.write_bytes(b"")


UNREADABLE: dict[Callable[[Path], None], str] = {
    unreadable_by_text: "a.yaml:2:7: is not valid YAML: mapping values are not allowed in this context",
    unreadable_by_bytes: "a.yaml:1:7: is not",
    unreadable_by_link: "a.yaml: cannot be read: No such file or directory",
    unreadable_by_folder: "a.yaml: is a folder, not a file",
    unreadable_by_pipe: "a.yaml: is not a file",
    unreadable_by_emptiness: "a.yaml: is empty: its objects stay until something is written or it is deleted",
}


@pytest.mark.parametrize("spoil", UNREADABLE, ids=lambda spoil: str(spoil.__name__))
def test_while_a_file_is_unreadable_nothing_is_removed_but_all_else_changes(
    config: Path, spoil: Callable[[Path], None]
) -> None:
    source = FileSource([config], {})
    write(config, a=DASHSCOPE, b=MOONSHOT, c=provider("c", "c.example.com"))
    source.read()
    spoil(config / "a.yaml")
    (config / "b.yaml").unlink()
    write(config, c=provider("c", "changed.example.com"), d=provider("d", "d.example.com"))
    state = source.read()
    assert names(state) == ["c", "d", "dashscope", "moonshot"]
    assert {key.name for key in state.kept} == {"dashscope", "moonshot"}
    assert state.incomplete
    (problem,) = problems(state, config)
    assert problem.startswith(UNREADABLE[spoil])


def test_a_file_that_is_deleted_takes_its_objects_away(config: Path) -> None:
    source = FileSource([config], {})
    write(config, a=DASHSCOPE, b=MOONSHOT)
    source.read()
    (config / "a.yaml").unlink()
    state = source.read()
    assert names(state) == ["moonshot"]
    assert not state.incomplete


def test_a_new_file_without_a_byte_is_nothing(config: Path) -> None:
    write(config, a="")
    assert FileSource([config], {}).read() == SourceState()


def test_a_folder_that_vanishes_takes_nothing_away(config: Path) -> None:
    source = FileSource([config], {})
    write(config, a=DASHSCOPE)
    source.read()
    shutil.rmtree(config)
    state = source.read()
    assert names(state) == ["dashscope"]
    assert [str(problem) for problem in state.problems] == [
        f"{config}: cannot be read: No such file or directory"
    ]
    config.mkdir()
    assert names(source.read()) == []


def test_an_object_that_did_not_change_keeps_its_identity(config: Path) -> None:
    source = FileSource([config], {})
    write(config, a=f"{DASHSCOPE}\n---\n{MOONSHOT}")
    before = source.read()
    write(config, a=f"# a comment\n{DASHSCOPE}\n---\n{provider('moonshot', 'moonshot.example.com')}")
    after = source.read()
    assert after.objects[0].object is before.objects[0].object
    assert after.objects[0].line == 2
    assert after.objects[1].object != before.objects[1].object


# Over a restart


def restarted(config: Path, state: Path, variables: dict[str, str] | None = None) -> FileSource:
    return FileSource([config], VARIABLES if variables is None else variables, LastGood(state))


def run_once(config: Path, state: Path, **texts: str) -> None:
    """Run a control plane's life on these files."""
    write(config, **texts)
    last_good = LastGood(state)
    last_good.put(FileSource([config], VARIABLES, last_good).read().objects)


def test_last_good_versions_survive_a_restart_with_keys_of_placeholders(config: Path, state: Path) -> None:
    run_once(config, state, a=provider("a", "a.example.com", "${key of A}"), b=MOONSHOT)
    write(config, a=BROKEN)
    (config / "b.yaml").unlink()
    after = restarted(config, state).read()
    assert names(after) == ["a", "moonshot"]
    assert key_of(after, "a") == VARIABLES["KEY_OF_A"]
    assert after.held == frozenset()
    write(config, a=provider("a", "a.example.com"))
    assert names(restarted(config, state).read()) == ["a"]


@pytest.mark.parametrize(
    "key",
    [
        "sk-inline-secret",
        "sk-inline-secret-${key of A}",
        "${key of A}${key of A}",
        "${key of A}sk-inline-secret}",
    ],
)
def test_a_key_of_the_file_is_not_kept_so_that_the_provider_is_held(
    config: Path, state: Path, key: str
) -> None:
    run_once(config, state, a=provider("a", "a.example.com", key))
    assert "sk-" not in state.read_text()
    write(config, a=BROKEN)
    source = restarted(config, state)
    for _ in range(2):
        after = source.read()
        assert [str(key) for key in after.held] == ["LLMProvider default/a"]
    write(config, a=provider("a", "a.example.com", key))
    assert source.read().held == frozenset()


def test_a_placeholder_that_is_not_filled_any_more_holds_the_provider(config: Path, state: Path) -> None:
    run_once(config, state, a=provider("a", "a.example.com", "${key of A}"))
    last_good = LastGood(state)
    after = FileSource([config], {}, last_good).read()
    (problem,) = problems(after, config)
    assert problem == (
        "a.yaml:1: LLMProvider default/a: spec.configs.defaultConfig.openAIConfig.apiKey: "
        "the variable KEY_OF_A is not set: export it, or give --set 'KEY_OF_A=...'"
    )
    assert [str(key) for key in after.held] == ["LLMProvider default/a"]
    last_good.put(after.objects)
    write(config, a=BROKEN)
    assert key_of(restarted(config, state).read(), "a") == VARIABLES["KEY_OF_A"], "its name is still known"


def test_nothing_on_the_disk_holds_a_key(config: Path, state: Path) -> None:
    object_ = json.loads(provider("a", "a.example.com", "sk-inline-secret"))
    object_["metadata"]["annotations"] = {
        "kubectl.kubernetes.io/last-applied-configuration": json.dumps(object_),
    }
    object_["status"] = {"applied": json.dumps(object_)}
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s"},
        "stringData": {"key": "sk-secret"},
    }
    listed = {"apiVersion": "v1", "kind": "List", "items": [object_, secret]}
    run_once(config, state, a=yaml.safe_dump(listed), b=provider("b", "b.example.com", "${key of A}"))
    (file,) = state.parent.iterdir()
    assert "sk-" not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    write(config, a=BROKEN, b=BROKEN)
    assert names(restarted(config, state).read()) == ["a", "b"]


def test_without_a_kept_state_it_is_unknown_what_cannot_be_read(config: Path, state: Path) -> None:
    """A fresh container. What it learns meanwhile is no replacement: it is not kept as a whole."""
    for broken in (BROKEN, DASHSCOPE.replace("host", "hots")):
        write(config, a=broken, b=MOONSHOT)
        source = restarted(config, state)
        assert source.read().unknown
        assert restarted(config, state).read().unknown
    write(config, a=DASHSCOPE)
    assert not source.read().unknown
    write(config, a=BROKEN)
    after = source.read()
    assert not after.unknown, "its good version is known from now on"
    assert names(after) == ["dashscope", "moonshot"]


async def test_an_unknown_state_is_not_kept_on_disk(config: Path, state: Path) -> None:
    """The next start would take it for all that there was."""
    stop = asyncio.Event()
    write(config, a=BROKEN, b=MOONSHOT)
    async for seen in restarted(config, state).states(stop):
        if not seen.unknown:
            stop.set()
            continue
        assert not state.exists()  # noqa: ASYNC240 - nobody waits
        write(config, a=DASHSCOPE)
    assert not restarted(config, state).read().unknown
    write(config, a=BROKEN)
    assert names(restarted(config, state).read()) == ["dashscope", "moonshot"]


def test_a_secret_that_is_broken_after_a_restart_leaves_the_state_incomplete(
    config: Path, state: Path
) -> None:
    """Who refers to it has its key, but this process has not: it must not be taken for missing."""
    run_once(
        config, state, a="{apiVersion: v1, kind: Secret, metadata: {name: s}, stringData: {key: sk-secret}}"
    )
    write(config, a="{apiVersion: v1, kind: Secret, metadata: {name: s}, stringData: 1}")
    assert restarted(config, state).read().incomplete


def test_yaml_means_the_same_after_it_was_kept(config: Path, state: Path) -> None:
    text = """
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata: {name: a, creationTimestamp: 2026-01-01T00:00:00Z}
spec:
  host: a.example.com
  path: /v1/chat/completions
  configs: {defaultConfig: {openAIConfig: {overrides: {temperature: 1e-1, seed: 0x10, stop: "no"}}}}
"""
    run_once(config, state, a=text)
    before = restarted(config, state).read()
    write(config, a=BROKEN)
    after = restarted(config, state).read()
    assert after.objects[0].object == before.objects[0].object


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"key": ["a"]}]', "null"])
def test_a_damaged_state_file_is_no_obstacle(config: Path, state: Path, content: str) -> None:
    state.parent.mkdir()
    state.write_text(content)
    write(config, a=DASHSCOPE)
    with capture_logs() as logs:
        last_good = LastGood(state)
    last_good.put(FileSource([config], {}, last_good).read().objects)
    assert [log["event"] for log in logs] == ["last good versions cannot be read"]
    assert LastGood(state).files() == {str(config / "a.yaml")}


def test_where_nothing_can_be_kept_a_warning_says_so(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    write(config, a=DASHSCOPE)
    with capture_logs() as logs:
        LastGood(tmp_path / "file" / "below" / "x.json").put(FileSource([config], {}).read().objects)
    assert logs[-1]["event"] == "last good versions cannot be kept"


def test_each_set_of_paths_has_a_state_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    one, other = state_file("kind", [Path("/one")]), state_file("kind", [Path("/other")])
    assert one != other
    assert one.parent == Path("/state/llmplane")
    assert state_file("kind", [Path("/a"), Path("/b")]) == state_file("kind", [Path("/b"), Path("/a")])
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert state_file("kind", []).is_relative_to("/home/somebody/.local/state")

    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(NoStateDirectoryError, match="set XDG_STATE_HOME"):
        state_file("kind", [])


# How a change is noticed


class Watching:
    """A source whose states are collected while the test goes on."""

    def __init__(self) -> None:
        self.states: list[SourceState] = []
        self._new = asyncio.Event()

    def take(self, state: SourceState) -> None:
        self.states.append(state)
        self._new.set()

    async def until(self, *expected: str) -> None:
        """Wait until there are these objects."""
        async with asyncio.timeout(60):
            while not self.states or names(self.states[-1]) != list(expected):
                self._new.clear()
                await self._new.wait()


@asynccontextmanager
async def watching(*paths: Path) -> AsyncIterator[Watching]:
    found, stop = Watching(), asyncio.Event()

    async def collect() -> None:
        async for state in FileSource(paths, {}).states(stop):
            found.take(state)

    task = asyncio.create_task(collect())
    try:
        yield found
    finally:
        stop.set()
        await task


def in_place(file: Path, text: str) -> None:
    file.write_text(text)


def renamed_over(file: Path, text: str) -> None:
    new = file.with_name(f".{file.name}.tmp")
    new.write_text(text)
    new.replace(file)


def deleted_and_written_again(file: Path, text: str) -> None:
    file.unlink()
    file.write_text(text)


def backed_up(file: Path, text: str) -> None:
    file.rename(file.with_name(f"{file.name}~"))
    file.write_text(text)


@pytest.mark.parametrize("save", [in_place, renamed_over, deleted_and_written_again, backed_up])
@pytest.mark.parametrize("given", ["folder", "file"])
async def test_every_way_to_save_a_file_is_noticed_each_time(
    config: Path, save: Callable[[Path, str], None], given: str
) -> None:
    write(config, a=provider("v0", "a.example.com"))
    async with watching(config if given == "folder" else config / "a.yaml") as found:
        await found.until("v0")
        for version in ("v1", "v2", "v3"):
            save(config / "a.yaml", provider(version, "a.example.com"))
            await found.until(version)


async def test_a_kubernetes_volume_is_swapped_by_a_link(config: Path) -> None:
    """A ConfigMap: a.yaml -> ..data/a.yaml, ..data -> ..VERSION, and ..data is replaced."""

    def swap(version: str) -> None:
        (config / f"..{version}" / "below").mkdir(parents=True)
        (config / f"..{version}" / "a.yaml").write_text(provider(version, "a.example.com"))
        (config / f"..{version}" / "below" / "b.yaml").write_text(
            provider(f"{version}-below", "b.example.com")
        )
        (config / "..data_tmp").symlink_to(f"..{version}")
        (config / "..data_tmp").replace(config / "..data")

    swap("v1")
    (config / "a.yaml").symlink_to("..data/a.yaml")
    (config / "below").symlink_to("..data/below")
    async with watching(config) as found:
        await found.until("v1", "v1-below")
        swap("v2")
        await found.until("v2", "v2-below")
        assert [names(state) for state in found.states] == [["v1", "v1-below"], ["v2", "v2-below"]]


async def test_a_folder_that_comes_back_is_read_and_watched_again(config: Path) -> None:
    write(config, a=DASHSCOPE)
    async with watching(config) as found:
        await found.until("dashscope")
        shutil.rmtree(config)
        config.mkdir()  # noqa: ASYNC240 - takes no time
        write(config, b=MOONSHOT)
        await found.until("moonshot")
        write(config, b=provider("changed", "c.example.com"))
        await found.until("changed")


async def test_a_new_folder_is_watched(config: Path) -> None:
    async with watching(config) as found:
        await found.until()
        (config / "below").mkdir()
        write(config / "below", a=DASHSCOPE)
        await found.until("dashscope")
        (config / "below" / "a.yaml").unlink()
        await found.until()


async def test_a_file_that_is_being_written_is_not_seen(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "QUIET_MS", 1000)  # long enough for a machine that is busy
    monkeypatch.setattr(watch, "LONGEST_QUIET_MS", 10_000)
    write(config, a=f"{DASHSCOPE}\n---\n{MOONSHOT}")
    async with watching(config) as found:
        await found.until("dashscope", "moonshot")
        with (config / "a.yaml").open("w") as file:  # is empty now
            for part in (DASHSCOPE[:100], DASHSCOPE[100:], "\n---\n", provider("other", "b.example.com")):
                file.write(part)
                file.flush()
                await asyncio.sleep(0.02)
        await found.until("dashscope", "other")
    assert [names(state) for state in found.states] == [["dashscope", "moonshot"], ["dashscope", "other"]]


async def test_editors_own_files_are_no_change(config: Path) -> None:
    write(config, a=DASHSCOPE)
    async with watching(config) as found:
        await found.until("dashscope")
        (config / ".b.yaml.swp").write_text("text")
        write(config, b=MOONSHOT)
        await found.until("dashscope", "moonshot")
    assert len({names(state)[-1] for state in found.states}) == len(found.states)
