"""The objects of the seed documents, as they stand in `examples/`."""

from pathlib import Path
from typing import Any

import pytest

from crds.llmprovider import LLMProvider
from crds.llmroute import LLMRoute
from crds.loader import Loaded, combine, load
from crds.meshconfig import load_mesh_config
from crds.problems import Severity

EXAMPLES = Path(__file__).parents[3] / "examples"
VARIABLES = {
    "API_KEY": "sk-gateway",
    "API_KEY_OF_DASHSCOPE": "sk-dashscope",
    "API_KEY_OF_MOONSHOT": "sk-moonshot",
    "YOUR_DASHSCOPE_API_KEY": "sk-dashscope",
    "YOUR_MOONSHOT_API_KEY": "sk-moonshot",
    "本机IP": "192.0.2.1",
}


FOLDERS = sorted({file.parent for file in EXAMPLES.rglob("*.yaml") if file.name != "mesh.yaml"})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(EXAMPLES)))
def test_no_example_has_an_error(folder: Path) -> None:
    loaded = step(str(folder))
    assert loaded.objects
    assert not [problem for problem in loaded.problems if problem.severity is Severity.ERROR]


def step(folder: str) -> Loaded:
    files = sorted((EXAMPLES / folder).glob("*.yaml"))
    return combine([load(file.read_text("utf-8"), file.name, VARIABLES) for file in files])


@pytest.mark.parametrize("document", ["000-traffic-routing", "003-traffic-routing-ja"])
@pytest.mark.parametrize(
    ("number", "keys"),
    [
        (1, {"Service default/sleep"}),
        (2, {"Service default/sleep", "LLMProvider default/dashscope-qwen"}),
        (
            3,
            {
                "Service default/sleep",
                "LLMProvider default/dashscope-qwen",
                "LLMRoute default/dashscope-route",
            },
        ),
        (
            4,
            {
                "Service default/sleep",
                "LLMProvider default/dashscope-qwen",
                "LLMRoute default/dashscope-route",
                "LLMProvider default/moonshot",
                "Service default/demo-llm-server",
                "LLMRoute default/demo-llm-server",
            },
        ),
    ],
)
def test_the_steps_of_traffic_routing(document: str, number: int, keys: set[str]) -> None:
    loaded = step(f"{document}/step-{number}")
    assert loaded.problems == ()
    assert {str(found.key) for found in loaded.objects} == keys


@pytest.mark.parametrize(
    ("document", "model", "stream"),
    [("000-traffic-routing", "qwen-1.8b-chat", False), ("003-traffic-routing-ja", "qwen1.5-72b-chat", None)],
)
def test_vip_route_has_a_model_of_its_own(document: str, model: str, stream: bool | None) -> None:
    (provider,) = [
        found.object for found in step(f"{document}/step-3").objects if isinstance(found.object, LLMProvider)
    ]
    default, vip = provider.spec.config_for(None), provider.spec.config_for("vip-route")
    assert (default.model, default.stream) == (model, stream)
    assert (vip.model, vip.stream) == ("qwen-turbo", stream)
    assert vip.api_key
    assert vip.api_key.get_secret_value() == "sk-dashscope"


@pytest.mark.parametrize("document", ["000-traffic-routing", "003-traffic-routing-ja"])
def test_demo_llm_server_is_shared_half_and_half(document: str) -> None:
    found = {str(loaded.key): loaded.object for loaded in step(f"{document}/step-4").objects}
    route = found["LLMRoute default/demo-llm-server"]
    assert isinstance(route, LLMRoute)
    (rule,) = route.spec.rules
    (group,) = rule.priority_groups()
    assert [(ref.provider_host, weight) for ref, weight in group] == [
        ("dashscope.aliyuncs.com", 50),
        ("api.moonshot.cn", 50),
    ]


def test_the_ingress_gateway() -> None:
    loaded = step("004-ingress-gateway/step-5")
    assert {str(found.key) for found in loaded.objects} == {
        "LLMProvider istio-system/dashscope-qwen",
        "Gateway istio-system/ingress-gw",
        "LLMRoute default/dashscope-route",
        "AuthorizationPolicy istio-system/auth-policy",
    }
    assert not [problem for problem in loaded.problems if problem.severity is Severity.ERROR]


def test_observability() -> None:
    """The document's ConfigMap does no harm, its fields and its dimension are taken as they are."""
    folder = EXAMPLES / "002-observability"
    loaded = step("002-observability/objects")
    assert loaded.problems == ()
    assert {str(found.key) for found in loaded.objects} == {"Telemetry istio-system/mesh-default"}
    mesh, problems = load_mesh_config((folder / "mesh.yaml").read_text("utf-8"), "mesh.yaml")
    assert problems == []
    assert mesh
    assert mesh.access_log_file == "/dev/stdout"


def test_docker_compose_has_the_ingress_gateway_with_another_name_of_its_route() -> None:
    def objects(folder: str) -> list[dict[str, Any]]:
        found = [loaded.object.model_dump(mode="json") for loaded in step(folder).objects]
        for item in found:
            item["metadata"]["name"] = item["metadata"]["name"].removesuffix("-of-the-gateway")
        return found

    assert objects("docker-compose") == objects("004-ingress-gateway/step-5")


def test_a_file_that_several_steps_have_is_the_same() -> None:
    for document in EXAMPLES.iterdir():
        texts: dict[str, set[str]] = {}
        for file in document.glob("step-*/*.yaml"):
            texts.setdefault(file.name, set()).add(file.read_text("utf-8"))
        assert all(len(same) == 1 for same in texts.values())
