"""Every query of the Grafana dashboard and the Prometheus rules finds something in what real Envoys expose.

A real Prometheus reads the sidecar and the control plane while traffic of every kind flows: streams, cached
and reasoning tokens, a fallback, a limit, a provider that cannot be reached, a client that goes away.
"""

import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmplane.fakellm import Fault
from llmplane.local import end, free_port
from llmplane.prices import prometheus_rules, read_prices
from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, OPENAI, Lab, running_lab
from tests.support.objects import provider, rate_limit, route
from tests.support.wait import eventually

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "llm-traffic.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((DEPLOY / "prometheus" / "llmplane.rules.yaml").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
STREAM = json.dumps({"stream": True, "messages": [{"role": "user", "content": "Hi"}]}).encode()
UNREACHABLE = "unreachable.example.com"
VARIABLES = {
    "$__rate_interval": "30s",
    "$__interval_ms": "1000",
    "$__interval": "1s",
    "$__range": "5m",
    "$namespace": ".*",
    "$workload": ".*",
    "$provider": ".*",
    "$model": ".*",
}

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no prometheus: sudo apt-get install prometheus"
)


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def get(self, path: str, **parameters: str) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self._url}/{path}?{urllib.parse.urlencode(parameters)}", timeout=60) as answer:
            return json.load(answer)["data"]

    def query(self, text: str) -> list[dict[str, Any]]:
        """Return the series of a query as it stands in the dashboard."""
        for name, value in VARIABLES.items():
            text = text.replace(name, value)
        series: list[dict[str, Any]] = self.get("query", query=text)["result"]
        return series


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Read a mesh with traffic until every kind of it was seen twice."""
    with running_lab(options=["--connect-to", f"{UNREACHABLE}:443:127.0.0.1:1"]) as lab:
        configure(lab)
        folder = tmp_path_factory.mktemp("prometheus")
        port = free_port()
        command = [
            "prometheus",
            f"--config.file={configuration(folder, lab)}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ]
        log = (folder / "prometheus.log").open("w")
        process = subprocess.Popen(command, stderr=log)
        try:
            found = Prometheus(port)
            eventually(lambda: targets(found) == {"up"})
            for _ in range(3):  # a rate needs a counter that was there before
                traffic(lab)
                read_so_far = len(samples(found))
                eventually(lambda known=read_so_far: len(samples(found)) > known + 3)
            eventually(lambda: found.query("llmplane:cost:rate5m") != [])
            yield found
        finally:
            end(process)
            log.close()


def targets(prometheus: Prometheus) -> set[str]:
    try:
        return {target["health"] for target in prometheus.get("targets")["activeTargets"]}
    except (OSError, KeyError):
        return set()


def samples(prometheus: Prometheus) -> list[Any]:
    """Return the samples of one series: as many as there were readings."""
    (series,) = prometheus.query('up{job="envoy"}[10m]')
    return list(series["values"])


def configuration(folder: Path, lab: Lab) -> Path:
    """Write the configuration of docker-compose.yaml with the addresses of this machine, and read often."""
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    text = text.replace("/etc/prometheus/", f"{DEPLOY / 'prometheus'}/")
    loaded = yaml.safe_load(text)
    loaded["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    addresses = {"envoy": f"{lab.mesh.bind_address}:15090", "llmplane": str(lab.mesh.admin)}
    for job in loaded["scrape_configs"]:
        job["static_configs"] = [{"targets": [addresses[job["job_name"]]]}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(loaded), encoding="utf-8")
    return file


def configure(lab: Lab) -> None:
    """Apply providers that have a price, and a route with a fallback."""
    lab.apply(
        provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], "qwen-turbo"),
        provider(
            "moonshot",
            MOONSHOT,
            KEYS[MOONSHOT],
            "moonshot-v1-8k",
            trafficPolicy={"outlierDetection": {"consecutive5xxErrors": 1}},
        ),
        provider("openai", OPENAI, KEYS[OPENAI], "gpt-4o"),
        provider("unreachable", UNREACHABLE, "sk-none", "some-model"),
        route(
            "chat",
            "chat",
            {"backendRefs": [{"providerHost": MOONSHOT}, {"providerHost": DASHSCOPE, "priority": 1}]},
        ),
        token_limit("users", "greedy"),
        token_limit("trial", "curious", shadow=True),
    )


def token_limit(name: str, user: str, **spec: Any) -> str:
    """Return a policy that leaves one user nearly nothing."""
    few, many = ([{"tokens": tokens, "unit": "Hour"}] for tokens in (1, 10**9))
    rules = [{"match": [{"exact": user}], "limits": few}, {"limits": many}]
    return rate_limit(name, keys=[{"header": "x-user"}], rules=rules, **spec)


def traffic(lab: Lab) -> None:
    """Send some of everything."""
    lab.fake.set_fault(DASHSCOPE, Fault(cached_tokens=2, reasoning_tokens=5))
    assert lab.client.request(DASHSCOPE).status == 200
    assert lab.client.request(DASHSCOPE, STREAM).status == 200
    for user in ("greedy", "curious"):
        for _ in range(2):
            lab.client.request(DASHSCOPE, headers={"x-user": user})
    lab.fake.set_fault(DASHSCOPE, Fault(no_usage=True))
    assert lab.client.request(DASHSCOPE).status == 200
    lab.fake.set_fault(DASHSCOPE, None)
    lab.fake.set_fault(OPENAI, Fault(chunk_delay=0.1))
    with lab.client.open(OPENAI, STREAM) as answer:  # and goes away
        answer.read(100)
    lab.fake.set_fault(OPENAI, Fault(status=429))
    assert lab.client.request(OPENAI).status == 429
    lab.fake.set_fault(MOONSHOT, Fault(status=500))
    assert lab.client.request("chat").status == 200
    assert lab.client.request(UNREACHABLE).status == 503


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_a_panel_shows_something(prometheus: Prometheus, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        found = prometheus.query(target["expr"])
        assert found, target["expr"]
        legend = re.findall(r"{{(\w+)}}", target["legendFormat"])
        assert all(set(legend) <= set(series["metric"]) for series in found), (legend, found[0]["metric"])


@pytest.mark.parametrize("variable", DASHBOARD["templating"]["list"][1:], ids=lambda each: str(each["name"]))
def test_a_variable_has_values(prometheus: Prometheus, variable: dict[str, Any]) -> None:
    metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
    assert any(series["metric"].get(label) for series in prometheus.query(metric))


def test_the_cost_is_that_of_the_price_table(prometheus: Prometheus) -> None:
    """Three requests of qwen-turbo had the same tokens: cost and tokens must agree at its prices.

    They do when rules of one round are read.
    """

    def agree() -> bool:
        tokens = {
            series["metric"]["kind"]: float(series["value"][1])
            for series in prometheus.query('llmplane:tokens:rate5m{model="qwen-turbo"}')
        }
        (cost,) = prometheus.query('llmplane:cost:rate5m{model="qwen-turbo"}')
        assert cost["metric"]["currency"] == "CNY"
        expected = (tokens["input"] * 0.3 + tokens["cached_input"] * 0.12 + tokens["output"] * 0.6) / 1e6
        return float(cost["value"][1]) == pytest.approx(expected, rel=0.01)

    eventually(agree)


ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: str(alert["alert"]))
def test_the_metrics_of_an_alert_are_there(prometheus: Prometheus, alert: dict[str, Any]) -> None:
    """With its bound taken away, the left side of an alert finds something: the names are right."""
    expression = re.split(r" [<>] [\d.]+", alert["expr"])[0]
    assert prometheus.query(expression), expression


def test_the_rules_are_well_formed() -> None:
    files = sorted(str(file) for file in (DEPLOY / "prometheus").glob("*.rules.yaml"))
    subprocess.run(["promtool", "check", "rules", *files], check=True, capture_output=True)


def test_the_price_rules_are_those_of_the_price_table() -> None:
    made = prometheus_rules(read_prices(DEPLOY / "prices.yaml"))
    kept = (DEPLOY / "prometheus" / "prices.rules.yaml").read_text(encoding="utf-8")
    assert kept == made, "llmplane prices deploy/prices.yaml > deploy/prometheus/prices.rules.yaml"
