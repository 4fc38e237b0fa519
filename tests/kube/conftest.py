"""A real API server for all tests of this folder; each works in namespaces of its own."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.kube import ROOT, ApiServer, running_api_server
from tools import kube_assets


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kube-is-there", action="store_true", help="fail, not skip, where there is no API server"
    )


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.kube)


@pytest.fixture(scope="session")
def empty_cluster(request: pytest.FixtureRequest) -> Iterator[ApiServer]:
    """Give an API server without any kind of ours."""
    if lacking := kube_assets.missing():
        text = f"no {' and '.join(lacking)}: `make kube-assets` builds them"
        (pytest.fail if request.config.getoption("--kube-is-there", default=False) else pytest.skip)(text)
    with running_api_server() as server:
        yield server


@pytest.fixture(scope="session")
def cluster(empty_cluster: ApiServer) -> ApiServer:
    """Give an API server with our kinds, and those of Istio that we honour."""
    empty_cluster.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system}\n")
    empty_cluster.apply_files(ROOT / "crds", ROOT / "crds" / "istio")
    empty_cluster.kubectl(
        "wait",
        "--for=condition=Established",
        "--timeout=60s",
        "crd",
        "-l",
        "app.kubernetes.io/part-of=llmplane",
    )
    return empty_cluster


_numbers = itertools.count(1)


@pytest.fixture
def namespace(cluster: ApiServer) -> str:
    """Make a namespace."""
    name = f"test-{next(_numbers)}"
    cluster.kubectl("create", "namespace", name)
    return name
