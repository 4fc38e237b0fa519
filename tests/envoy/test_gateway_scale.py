"""Many hosts on a gateway: its listeners have scoped routes, each its own."""

import json
import socket

import pytest

from tests.envoy.conftest import DASHSCOPE, KEYS, Lab
from tests.support.client import GatewayClient
from tests.support.objects import backends, gateway, provider, route, server
from tests.support.wait import eventually
from translator.scopes import MARGIN, THRESHOLD

MANY = THRESHOLD + MARGIN + 1


def is_open(address: str, port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex((address, port)) == 0


def are_scoped(lab: Lab) -> set[bool]:
    """Return whether the two listeners in use, not those that drain, have scoped routes."""
    dump = json.loads(lab.envoy_admin("/config_dump?resource=dynamic_listeners", "istio-ingressgateway"))
    served = [found for found in dump["configs"] if found["name"].endswith(("_80", "_81"))]
    return {"scoped_routes" in json.dumps(found.get("active_state")) for found in served}


@pytest.mark.parametrize("counts", [(3, MANY), (MANY,)], ids=["growing", "at once"])
def test_each_port_has_its_own_routes(gateway_lab: Lab, counts: tuple[int, ...]) -> None:
    """One host, two Gateways with a port each, two routes."""
    gateway_lab.apply(provider("istio-system/llm", DASHSCOPE, KEYS[DASHSCOPE]))
    for count in counts:
        check_ports(gateway_lab, count)


def check_ports(gateway_lab: Lab, count: int) -> None:
    hosts = [f"host-{number}.example.com" for number in range(count)]
    rules = {"one": "model-one", "two": "model-two"}
    objects = [
        route(
            f"{name}-{number}",
            host,
            {"name": name, "backendRefs": backends(DASHSCOPE)},
            gateways=[f"istio-system/{name}"],
        )
        for name in rules
        for number, host in enumerate(hosts)
    ]
    configs = {name: {"openAIConfig": {"model": model}} for name, model in rules.items()}
    of_rules = {
        "defaultConfig": {"openAIConfig": {"apiKey": KEYS[DASHSCOPE]}},
        "routeSpecificConfigs": configs,
    }
    gateway_lab.apply(
        provider("istio-system/llm", DASHSCOPE, configs=of_rules),
        gateway("istio-system/one", server(number=80)),
        gateway("istio-system/two", server(number=81)),
        *objects,
    )
    eventually(lambda: are_scoped(gateway_lab) == {count == MANY})
    address = gateway_lab.mesh.gateways[0].bind_address
    for port, model in ((80, "model-one"), (81, "model-two")):
        client = GatewayClient(address, port)
        # A new listener is acknowledged at once, opened when Envoy has its scopes, and answers 404 for a host
        # as long as the routes of its scope are on their way.
        eventually(lambda port=port: is_open(address, port))
        for host in (hosts[0], hosts[-1], hosts[1], hosts[2]):
            eventually(lambda client=client, host=host: client.request(host).status == 200)
        for host in (hosts[0], hosts[-1], hosts[1].upper(), f"{hosts[2]}:8443"):
            answer = client.request(host, headers={"x-envoy-llmplane-routes": "http.80"})
            assert (answer.status, answer.json().get("model")) == (200, model)
        assert client.request("nobody.example.com").status == 404
    assert not [
        name for seen in gateway_lab.all_seen() for name, _ in seen.headers if "llmplane" in name.lower()
    ]
