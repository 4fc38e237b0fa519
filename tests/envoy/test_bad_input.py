"""A mistake in a file costs nothing that worked: the last good version stays, and everybody is told.

tests/unit/test_cli.py has the texts of `llmplane validate`, tests/unit/test_files_source.py the rules.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmplane.cli import main
from llmplane.fakellm import Host
from llmplane.local import end
from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, OPENAI, Lab
from tests.support.objects import provider
from tests.support.wait import eventually

PLACEHOLDER = "${ API_KEY of dashscope}"


def dashscope(model: str, key: str = PLACEHOLDER) -> str:
    return provider("dashscope", DASHSCOPE, key, model)


def moonshot(model: str) -> str:
    return provider("moonshot", MOONSHOT, KEYS[MOONSHOT], model)


@pytest.fixture
def config(lab: Lab) -> Iterator[Path]:
    """Give the folder that is served, which is empty again afterwards."""
    folder = lab.mesh.config
    yield folder
    for item in folder.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()
    eventually(lambda: lab.mesh.status()["problems"] == [])


def model(lab: Lab, host: str) -> str:
    """Which model answers a request to this host, or the status of an error."""
    answer = lab.client.request(host)
    return str(answer.json()["model"] if answer.status == 200 else answer.status)


def status(lab: Lab) -> str:
    """Return what a user sees."""
    result = CliRunner().invoke(main, ["status", "--admin-address", str(lab.mesh.admin)])
    assert result.exit_code == 0, result.output
    return result.output


def state_of(lab: Lab, name: str) -> str:
    (state,) = (item["state"] for item in lab.mesh.status()["objects"] if item["name"] == name)
    return str(state)


def logged(lab: Lab, event: str) -> list[dict[str, str]]:
    """Return the entries of the control plane's log about an event; one line each."""
    lines = lab.mesh.log("control-plane").splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]  # not one that is being written
    return [entry for entry in entries if entry["event"] == event]


def kill(lab: Lab) -> None:
    assert lab.mesh.control_plane
    lab.mesh.control_plane.kill()
    lab.mesh.control_plane.wait()


def assert_no_key_on_disk(lab: Lab) -> None:
    files = [file for file in (lab.mesh.directory / "state").rglob("*") if file.is_file()]
    assert files
    for file in files:
        assert not [key for key in KEYS.values() if key.encode() in file.read_bytes()]


# While it runs

CONFIG = "LLMProvider default/dashscope: spec.configs.defaultConfig.openAIConfig"
MISTAKES: dict[str, tuple[Callable[[str], str], str]] = {
    "broken YAML": (
        lambda text: text.removesuffix("}"),
        ":2:1: LLMProvider default/dashscope: is not valid YAML: did not find expected ',' or '}'",
    ),
    "an unknown kind": (
        lambda text: text.replace("LLMProvider", "LLMProvidr"),
        ":1: LLMProvidr default/dashscope: kind: unknown kind 'LLMProvidr' of istio.alibabacloud.com, did",
    ),
    "a misspelt field": (
        lambda text: text.replace('"path"', '"paht"'),
        ":1: LLMProvider default/dashscope: spec.paht: unknown field, did you mean 'path'?",
    ),
    "a wrong type": (
        lambda text: text.replace('"model": "bad"', '"model": 7'),
        f":1: {CONFIG}.model: must be a string, but is a number: write it in quotes",
    ),
    "a placeholder that is not filled": (
        lambda text: text.replace("API_KEY of", "API_KEY off"),
        f":1: {CONFIG}.apiKey: the variable API_KEY_OFF_DASHSCOPE is not set",
    ),
    "no UTF-8": (
        lambda text: text.replace('"dashscope"', '"\udcff"'),
        ":1:95: is not",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_keeps_the_last_good_version_and_lets_the_rest_of_the_file_change(
    lab: Lab, config: Path, mistake: str
) -> None:
    make, expected = MISTAKES[mistake]
    lab.apply(dashscope("good"), moonshot("one"))
    broken = f"{make(dashscope('bad'))}\n---\n{moonshot('two')}"
    (config / "objects.yaml").write_bytes(broken.encode(errors="surrogateescape"))
    eventually(lambda: model(lab, MOONSHOT) == "two")
    assert model(lab, DASHSCOPE) == "good"

    problems = lab.mesh.status()["problems"]
    problem = next(text for text in problems if text.startswith(f"{config}/objects.yaml{expected}"))
    assert problem in status(lab).splitlines()
    assert "LLMProvider default/dashscope: its last good version is in use" in status(lab).splitlines()
    assert state_of(lab, "dashscope") == "last good version"
    assert problem in [entry["problem"] for entry in logged(lab, "problem")]
    assert logged(lab, "last good version stays in use")[-1]["object"] == "LLMProvider default/dashscope"

    lab.apply(dashscope("repaired"), moonshot("three"))
    assert [model(lab, host) for host in (DASHSCOPE, MOONSHOT)] == ["repaired", "three"]
    assert "PROBLEMS" not in status(lab)
    assert problem in [entry["problem"] for entry in logged(lab, "problem solved")]


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_broken_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("/nowhere/objects.yaml")


def emptied(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("spoil", [a_folder, a_broken_link, emptied], ids=lambda spoil: str(spoil.__name__))
def test_an_unreadable_file_removes_nothing(lab: Lab, config: Path, spoil: Callable[[Path], None]) -> None:
    lab.apply(dashscope("good"))
    lab.mesh.apply("other.yaml", moonshot("one"))
    spoil(config / "objects.yaml")
    eventually(lambda: lab.mesh.status()["problems"])
    lab.mesh.apply("other.yaml", moonshot("two"))
    assert [model(lab, host) for host in (DASHSCOPE, MOONSHOT)] == ["good", "two"]
    (config / "other.yaml").unlink()
    eventually(lambda: state_of(lab, "moonshot") == "last good version")
    assert model(lab, MOONSHOT) == "two", "while anything is unreadable, nothing is removed"

    shutil.rmtree(config / "objects.yaml") if spoil is a_folder else (config / "objects.yaml").unlink()
    lab.apply(dashscope("repaired"))
    assert [model(lab, host) for host in (DASHSCOPE, MOONSHOT)] == ["repaired", "404"]


def test_the_whole_folder_may_vanish_and_come_back(lab: Lab, config: Path) -> None:
    lab.apply(dashscope("good"))
    away = config.with_name("away")
    config.rename(away)
    eventually(lambda: lab.mesh.status()["problems"])
    assert lab.mesh.status()["problems"][0] == f"{config}: cannot be read: No such file or directory"
    assert model(lab, DASHSCOPE) == "good"
    away.rename(config)
    eventually(lambda: not lab.mesh.status()["problems"])
    lab.apply(dashscope("changed"))
    assert model(lab, DASHSCOPE) == "changed"


def test_a_file_that_is_deleted_on_purpose_takes_its_objects_away(lab: Lab, config: Path) -> None:
    lab.mesh.apply("other.yaml", moonshot("one"))
    assert model(lab, MOONSHOT) == "one"
    (config / "other.yaml").unlink()
    eventually(lambda: model(lab, MOONSHOT) == "404")
    assert lab.mesh.status()["problems"] == []


def test_of_two_providers_with_one_host_the_first_one_keeps_it(lab: Lab, config: Path) -> None:
    lab.apply(dashscope("good"))
    lab.mesh.apply("other.yaml", provider("later", DASHSCOPE, KEYS[DASHSCOPE], "intruder"))
    assert model(lab, DASHSCOPE) == "good"
    problem = (
        f"{config}/other.yaml:1: LLMProvider default/later: spec.host: {DASHSCOPE} is already taken by "
        "LLMProvider default/dashscope, which is older or first by name"
    )
    assert problem in status(lab).splitlines()
    assert state_of(lab, "later") == "Conflicted"
    assert logged(lab, "problem")[-1]["problem"] == problem


# Over the death of the control plane


@contextmanager
def killed(lab: Lab) -> Iterator[None]:
    """Kill the control plane (-9), and start again after the block; the sidecar is left running."""
    kill(lab)
    yield
    lab.mesh.start_control_plane()
    lab.mesh.settle()


def replace_sidecar(lab: Lab) -> None:
    """Start a new sidecar, which knows nothing, instead of the old one."""
    assert lab.mesh.proxy
    end(lab.mesh.proxy)
    lab.mesh.start_proxy()


BROKEN = '{"kind": "LLMProvider", "spec": {{'


def test_the_last_good_version_survives_kill_9_with_the_file_still_broken(lab: Lab, config: Path) -> None:
    """The key came from a placeholder: it can be filled again, so that new sidecars get all there is."""
    lab.apply(dashscope("good"))
    lab.mesh.apply("objects.yaml", BROKEN)
    with killed(lab):
        assert model(lab, DASHSCOPE) == "good"
        (config / "new.yaml").write_text(moonshot("new"))
    assert [model(lab, host) for host in (DASHSCOPE, MOONSHOT)] == ["good", "new"]
    assert "LLMProvider default/dashscope: its last good version is in use" in status(lab).splitlines()
    replace_sidecar(lab)
    assert [model(lab, host) for host in (DASHSCOPE, MOONSHOT)] == ["good", "new"]
    assert_no_key_on_disk(lab)

    lab.apply(dashscope("repaired"))
    assert model(lab, DASHSCOPE) == "repaired"
    assert "PROBLEMS" not in status(lab)


def test_a_key_of_a_broken_file_is_known_only_to_sidecars_that_have_it(lab: Lab, config: Path) -> None:
    """It was written into the file, and is never kept elsewhere."""
    lab.apply(dashscope("good", key=KEYS[DASHSCOPE]), provider("openai", OPENAI, KEYS[OPENAI], "gpt"))
    assert model(lab, OPENAI) == "gpt"
    lab.mesh.replace(config / "objects.yaml", BROKEN)
    eventually(lambda: lab.mesh.status()["problems"])
    with killed(lab):
        pass
    assert [model(lab, host) for host in (DASHSCOPE, OPENAI)] == ["good", "gpt"], "the running one keeps it"
    assert_no_key_on_disk(lab)
    (text,) = (line for line in status(lab).splitlines() if "LLMProvider default/openai: spec" in line)
    assert text.endswith(
        "the key is not known since the restart: proxies that have it keep it, new ones answer 401"
    )

    replace_sidecar(lab)
    answer = lab.client.request(DASHSCOPE)
    assert (answer.status, answer.error["type"]) == (401, "authentication_error")

    lab.apply(dashscope("repaired", key=KEYS[DASHSCOPE]))
    assert [model(lab, host) for host in (DASHSCOPE, OPENAI)] == ["repaired", "404"]


@contextmanager
def killed_without_a_trace(lab: Lab) -> Iterator[None]:
    """Kill the control plane (-9), and start it after the block where nothing but the files was kept."""
    with killed(lab):
        yield
        shutil.rmtree(lab.mesh.directory / "state")


UNKNOWN = "some objects cannot be read, and no good version of them is known here"


@pytest.mark.parametrize("broken", [BROKEN, dashscope("bad").replace("host", "hots")], ids=["YAML", "field"])
def test_a_fresh_container_with_a_broken_file_takes_nothing_from_a_running_sidecar(
    lab: Lab, config: Path, broken: str
) -> None:
    """Models, keys and new providers of other files arrive; the table of routes is that of before."""
    lab.apply(dashscope("good"))
    lab.mesh.apply("other.yaml", moonshot("one"))
    with killed_without_a_trace(lab):
        lab.mesh.replace(config / "objects.yaml", broken)
        lab.mesh.replace(config / "other.yaml", moonshot("two"))
    assert [model(lab, host) for host in (DASHSCOPE, MOONSHOT)] == ["good", "two"]
    assert [line for line in status(lab).splitlines() if line.startswith(UNKNOWN)]
    lab.fake.hosts[MOONSHOT] = Host("sk-rotated")
    lab.mesh.apply("other.yaml", provider("moonshot", MOONSHOT, "sk-rotated", "three"))
    assert model(lab, MOONSHOT) == "three"
    lab.fake.hosts[MOONSHOT] = Host(KEYS[MOONSHOT])
    lab.mesh.apply("other.yaml", moonshot("four"))
    lab.mesh.apply("new.yaml", provider("openai", OPENAI, KEYS[OPENAI], "gpt"))
    assert [model(lab, host) for host in (DASHSCOPE, MOONSHOT, OPENAI)] == ["good", "four", "gpt"]

    with killed(lab):
        pass
    assert [model(lab, host) for host in (DASHSCOPE, MOONSHOT)] == ["good", "four"], "the second start, too"

    lab.apply(dashscope("repaired"))
    assert [model(lab, host) for host in (DASHSCOPE, MOONSHOT, OPENAI)] == ["repaired", "four", "gpt"]
    assert "PROBLEMS" not in status(lab)
    (config / "other.yaml").unlink()
    eventually(lambda: model(lab, MOONSHOT) == "404")


def test_a_sidecar_that_starts_beside_a_broken_file_gets_what_there_is(lab: Lab, config: Path) -> None:
    """Also what comes later: the mistake in one file holds up no other one."""
    lab.apply(dashscope("good"))
    lab.mesh.apply("other.yaml", moonshot("one"))
    with killed_without_a_trace(lab):
        lab.mesh.replace(config / "objects.yaml", BROKEN)
    replace_sidecar(lab)
    assert [model(lab, host) for host in (DASHSCOPE, MOONSHOT)] == ["404", "one"]
    lab.mesh.apply("new.yaml", provider("openai", OPENAI, KEYS[OPENAI], "gpt"))
    assert [model(lab, host) for host in (DASHSCOPE, MOONSHOT, OPENAI)] == ["404", "one", "gpt"]
    lab.apply(dashscope("repaired"))
    assert model(lab, DASHSCOPE) == "repaired"
