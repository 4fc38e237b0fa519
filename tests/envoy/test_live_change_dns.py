"""A provider that is reached by name: while a changed cluster asks for the name again, no request fails."""

import json
from collections.abc import Iterator

import pytest

from tests.envoy.conftest import DASHSCOPE, KEYS, Lab, running_lab
from tests.support.dns import DnsServer, asking, running_dns_server
from tests.support.load import running_load
from tests.support.objects import provider

NAME = "dashscope.example.com"
"""What the provider's endpoint is called: a name that has to be asked for."""


@pytest.fixture(scope="module")
def dns() -> Iterator[DnsServer]:
    with running_dns_server() as server:
        server.records = {NAME: ["127.0.0.1"], "second." + NAME: ["127.0.0.1"]}
        yield server


@pytest.fixture(scope="module")
def shared_lab(dns: DnsServer) -> Iterator[Lab]:
    with running_lab(envoy_options=["--config-yaml", json.dumps(asking(dns.port))]) as lab:
        yield lab


@pytest.mark.parametrize("delay", [0, 0.03])
def test_a_changed_provider_that_is_reached_by_name_costs_no_request(
    lab: Lab, dns: DnsServer, delay: float
) -> None:
    models = [f"model-{number}" for number in range(21)]

    def dashscope(number: int) -> str:
        # Each time the other name, so that it is resolved anew.
        endpoint = {"address": NAME if number % 2 else f"second.{NAME}", "port": lab.fake.port}
        return provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], models[number], endpoints=[endpoint])

    dns.delay = delay
    lab.apply(dashscope(0))
    with running_load(lab.mesh.http_proxy, DASHSCOPE, models, connections=16) as load:
        for number in range(1, len(models)):
            lab.apply(dashscope(number))
            load.wait_for(models[number])
