"""What the API server is answered; tests/kube/test_admission.py has a real one ask."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
import yaml

from crds.problems import Severity
from llmplane import offline
from llmplane.address import Address, AddressInUseError
from llmplane.auth import ServerCertificate
from llmplane.certificates import CertificateAuthority, write_pair
from llmplane.injection import InjectionError, InjectionSettings, inject
from llmplane.local import free_port
from llmplane.webhook import WebhookServer, injected, validated
from translator.world import MeshSettings

SETTINGS = InjectionSettings("proxy", Address("llmplane.llmplane-system.svc", 18000), "PEM")
GOOD = """
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata: {name: a, namespace: b}
spec: {host: a.example.com, path: /v1/chat/completions}
"""


def provider(**config: object) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(GOOD)
    document["spec"]["configs"] = {"defaultConfig": {"openAIConfig": config}}
    return document


@pytest.mark.parametrize(
    "document",
    [
        yaml.safe_load(GOOD),
        provider(model="${MODEL}"),
        provider(defaults={"a": 1}, overrides={"a": 2}),
        {**yaml.safe_load(GOOD), "spec": {"host": "https://a", "path": "b", "typo": 1}},
        {**yaml.safe_load(GOOD), "kind": "LLMRoute", "spec": {"host": "a", "rules": [{"timeout": "1"}]}},
    ],
)
def test_an_object_is_judged_in_the_words_of_validate(document: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "object.yaml"
    file.write_text(json.dumps(document))
    _, problems = offline.validate([file], {}, MeshSettings())
    texts: dict[Severity, list[str]] = {severity: [] for severity in Severity}
    for problem in problems:
        text = str(problem).removeprefix(f"{file}:{problem.line}: ").removeprefix("warning: ")
        texts[problem.severity].append(text)

    answer = validated({"operation": "CREATE", "object": document})
    if texts[Severity.ERROR]:
        assert not answer["allowed"]
        assert answer["status"]["message"].split("\n") == texts[Severity.ERROR]
    else:
        assert answer == {"allowed": True, "warnings": texts[Severity.WARNING]}


def test_whoever_writes_a_key_into_an_object_is_warned() -> None:
    """A file may be as well kept as a Secret; an object of an API server is not."""
    answer = validated({"operation": "CREATE", "object": provider(apiKey="sk-1")})
    assert answer["allowed"]
    (warning,) = answer["warnings"]
    assert warning.startswith(
        "LLMProvider b/a: spec.configs.defaultConfig.openAIConfig.apiKey: whoever may read"
    )
    assert "sk-1" not in warning


def test_an_edit_that_leaves_the_spec_as_it_is_passes() -> None:
    """A label, or the finalizer that would else keep it for ever."""
    wrong = provider(defaults={"a": 1}, overrides={"a": 2})
    labelled = {**wrong, "metadata": {**wrong["metadata"], "labels": {"a": "b"}}}
    answer = validated({"operation": "UPDATE", "object": labelled, "oldObject": wrong})
    assert answer["allowed"]
    assert "set it in one of them" in answer["warnings"][0]
    assert not validated({"operation": "UPDATE", "object": wrong, "oldObject": provider()})["allowed"]


def test_an_edit_of_an_object_without_a_spec_passes() -> None:
    bare = {name: value for name, value in provider().items() if name != "spec"}
    labelled = {**bare, "metadata": {**bare["metadata"], "labels": {"a": "b"}}}
    assert validated({"operation": "UPDATE", "object": labelled, "oldObject": bare})["allowed"]
    assert not validated({"operation": "CREATE", "object": bare, "oldObject": None})["allowed"]


def pod(**annotations: str) -> dict[str, Any]:
    return {
        "metadata": {"generateName": "sleep-", "annotations": annotations},
        "spec": {"containers": [{"name": "sleep", "image": "sleep"}]},
    }


def test_a_pod_gets_what_inject_makes_of_it() -> None:
    answer = injected({"object": pod()}, SETTINGS)
    assert (answer["allowed"], answer["patchType"]) == (True, "JSONPatch")
    made = inject(pod(), SETTINGS)
    assert made is not None
    assert json.loads(base64.b64decode(answer["patch"])) == [
        {"op": "add", "path": "/metadata/annotations", "value": made["metadata"]["annotations"]},
        {"op": "add", "path": "/spec", "value": made["spec"]},
    ]


def test_a_pod_without_a_proxy_stays_as_it_is() -> None:
    assert injected({"object": pod(**{"sidecar.istio.io/inject": "false"})}, SETTINGS) == {"allowed": True}


@pytest.mark.parametrize(
    ("annotation", "value", "why"),
    [
        ("inject.istio.io/templates", "custom", "'custom' is not one of sidecar, gateway"),
        ("sidecar.istio.io/interceptionMode", "TPROXY", "'TPROXY' is not one of REDIRECT, NONE"),
        ("sidecar.istio.io/logLevel", "loud", "'loud' is not one of trace, debug, info"),
        ("sidecar.istio.io/proxyCPU", "much", "'much' is no quantity, as 100m or 128Mi"),
        ("traffic.sidecar.istio.io/excludeOutboundPorts", "80,http", "'http' is no port number"),
        ("traffic.sidecar.istio.io/includeOutboundPorts", "65536", "'65536' is no port number"),
        ("traffic.sidecar.istio.io/includeOutboundIPRanges", "10.0.0/8", "'10.0.0/8' is no IP address or"),
        ("traffic.sidecar.istio.io/excludeOutboundIPRanges", "*", "'*' is no IP address or range"),
        ("proxy.istio.io/config", "concurrency: two", "concurrency must be a number from 0"),
        ("proxy.istio.io/config", "[", "is not valid YAML"),
        ("proxy.istio.io/config", "two", "must be an object"),
        ("proxy.istio.io/config", "since: 2024-13-01", "is not valid YAML"),
    ],
)
def test_an_annotation_that_cannot_be_followed_is_named(annotation: str, value: str, why: str) -> None:
    """Whoever wrote it wants something else than what would happen without it."""
    answer = injected({"object": pod(**{annotation: value})}, SETTINGS)
    assert not answer["allowed"]
    assert answer["status"]["message"].startswith(f"annotation {annotation}: {why}")


@pytest.mark.parametrize(
    ("metadata", "workload"),
    [
        (
            {
                "generateName": "sleep-7d4b9-",
                "labels": {"pod-template-hash": "7d4b9"},
                "ownerReferences": [{"kind": "ReplicaSet", "name": "sleep-7d4b9", "controller": True}],
            },
            "sleep",
        ),
        ({"name": "sleep"}, "sleep"),
        ({"generateName": "sleep-"}, "sleep"),
    ],
)
def test_a_proxy_knows_its_workload(metadata: dict[str, Any], workload: str) -> None:
    made = inject({"metadata": metadata, "spec": pod()["spec"]}, SETTINGS)
    assert made is not None
    arguments = made["spec"]["initContainers"][-1]["args"]
    own = json.loads(arguments[arguments.index("--config-yaml") + 1])
    assert own["node"]["metadata"]["WORKLOAD_NAME"] == workload


def test_an_error_offline_names_the_object() -> None:
    from llmplane.injection import inject_documents  # noqa: PLC0415

    text = json.dumps({"kind": "Pod", "metadata": {"name": "a"}})
    with pytest.raises(InjectionError, match=r"^Pod a: has no spec$"):
        inject_documents(text, SETTINGS)
    text = json.dumps({"kind": "Job", "metadata": {"name": "a"}, "spec": {}})
    with pytest.raises(InjectionError, match=r"^Job a: has no spec.template.spec$"):
        inject_documents(text, SETTINGS)


@pytest.mark.parametrize("what", ["label", "annotation"])
@pytest.mark.parametrize("key", ["sidecar.istio.io/inject", "traffic.sidecar.istio.io/excludeOutboundPorts"])
def test_what_yaml_does_not_take_for_a_string_is_named(what: str, key: str) -> None:
    """As kubectl does; `true` is not `"true"`."""
    from llmplane.injection import inject_documents  # noqa: PLC0415

    document = {"kind": "Pod", **pod(), "metadata": {"name": "a", f"{what}s": {key: True}}}
    with pytest.raises(InjectionError, match=f"^Pod a: {what} {key}: must be a string"):
        inject_documents(yaml.safe_dump(document), SETTINGS)
    document["metadata"][f"{what}s"] = {"checksum": None}
    assert "istio-proxy" in inject_documents(yaml.safe_dump(document), SETTINGS), "as the API server takes it"


@pytest.fixture
def authority() -> CertificateAuthority:
    return CertificateAuthority.create()


@pytest.fixture
def certificate(tmp_path: Path, authority: CertificateAuthority) -> ServerCertificate:
    files = tmp_path / "tls.crt", tmp_path / "tls.key"
    write_pair(*files, authority.issue("localhost"))
    return ServerCertificate(*files, None)


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


async def ask(address: Address, path: str, body: bytes, authority: CertificateAuthority) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session:
        url = f"https://localhost:{address.port}{path}"
        async with session.post(url, data=body, ssl=authority.client_context()) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if answer.status == 200 else text


async def test_the_server_answers_reviews_and_nothing_else(
    certificate: ServerCertificate, authority: CertificateAuthority
) -> None:
    server = WebhookServer(certificate, lambda: SETTINGS)
    address = Address("127.0.0.1", free_port())
    await server.start(address)
    try:
        review = {"request": {"uid": "1", "operation": "CREATE", "object": provider(apiKey="sk-1")}}
        status, answer = await ask(address, "/validate", json.dumps(review).encode(), authority)
        assert (status, answer["kind"], answer["response"]["uid"]) == (200, "AdmissionReview", "1")
        assert answer["response"]["allowed"]
        for body in (b"{", b"[]", b"{}", b'{"request": 1}', b'{"request": {}}'):
            assert (await ask(address, "/inject", body, authority))[0] == 400
        with pytest.raises(AddressInUseError, match="--webhook-address"):
            await WebhookServer(certificate, lambda: SETTINGS).start(address)
    finally:
        await server.stop()
