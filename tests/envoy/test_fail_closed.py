"""A policy never fails open by accident: what is broken, missing or late denies, or the last good one stays.

(Design decision 14. Key sets that cannot be fetched: test_authentication.py; Secrets: test_api_keys.py.)
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection

import pytest

from tests.envoy.conftest import DASHSCOPE, KEYS, Lab
from tests.envoy.gateway import Gateway
from tests.support.objects import backends, route, secret
from tests.support.policies import (
    HOST,
    ROOT,
    api_key_authentication,
    authorization_policy,
    istio_object,
    opened,
    request_authentication,
)
from tests.support.tokens import Issuer
from tests.support.wait import eventually
from translator.features import Feature

# All of them want policies that hold at once: on an older Envoy it is chance.
pytestmark = pytest.mark.needs(Feature.FILTER_CHAIN)

ISSUER = Issuer("https://issuer.example.com")
RULE = {"issuer": ISSUER.name, "jwks": ISSUER.jwks, "presence": "REQUIRED"}
ALICE = "sk-of-alice-0123456789"
CLIENTS = secret(f"{ROOT}/clients", {"alice": ALICE})
NOT_ALICE = authorization_policy(
    {"from": [{"source": {"ipBlocks": ["127.0.0.0/8"]}}], "to": [{"operation": {"paths": ["/secret"]}}]},
    action="DENY",
)
"""A good policy: /secret is closed, the rest open."""
BROKEN = authorization_policy({"to": [{"operation": {"pathz": ["/secret"]}}]}, action="DENY")
"""The same policy with a slip of the pen."""


@pytest.fixture
def gateway(gateway_lab: Lab) -> Gateway:
    """Give a gateway without policies: with those of other tests their good versions are gone."""
    made = Gateway(gateway_lab)
    made.apply()
    assert made.ask().status == 200
    return made


def problems(gateway: Gateway) -> str:
    return "\n".join(gateway.lab.mesh.status()["problems"])


def denied(gateway: Gateway, path: str = "/") -> bool:
    answer = gateway.ask(path=path)
    return (answer.status, answer.body) == (403, b"RBAC: access denied")


@pytest.mark.parametrize(
    "policy",
    [
        BROKEN,
        authorization_policy(action="PERMIT"),
        request_authentication({**RULE, "issuer": ""}),
        request_authentication({**RULE, "jwks": "no key set"}),
        api_key_authentication(),
        api_key_authentication("clients", fromParams=["key"]),
        istio_object("security.istio.io/v9", "AuthorizationPolicy", f"{ROOT}/rules", {}),
        NOT_ALICE.replace("AuthorizationPolicy", "AuthorisationPolicy"),
    ],
)
def test_a_policy_that_is_broken_when_it_first_comes_denies(gateway: Gateway, policy: str) -> None:
    gateway.apply(policy)
    assert denied(gateway)
    assert "no good version of this policy is known: " in problems(gateway)
    assert "refuse every request until it can be read" in problems(gateway)


def test_a_policy_that_only_envoy_finds_wrong_denies_too(gateway: Gateway) -> None:
    """Of no policy before it there is nothing good to go on with."""
    admin = "/runtime_modify?re2.max_program_size.error_level="
    gateway.lab.envoy_admin(f"{admin}20", "istio-ingressgateway", method="POST")
    try:
        suffixes = {"source": {"principals": ["*/a-service-account-with-a-long-name"]}}
        policy = authorization_policy({"from": [suffixes]}, action="DENY")
        documents = (*opened(DASHSCOPE, KEYS[DASHSCOPE]), policy)
        gateway.lab.mesh.apply("objects.yaml", "\n---\n".join(documents), settle=False)
        eventually(lambda: "refused policies: " in problems(gateway))
        eventually(lambda: denied(gateway))
        assert "istio-ingressgateway" in problems(gateway)
    finally:
        gateway.lab.envoy_admin(f"{admin}32768", "istio-ingressgateway", method="POST")
    gateway.apply()
    assert gateway.ask().status == 200


def test_it_denies_to_those_that_it_selects_or_to_its_namespace(gateway: Gateway) -> None:
    elsewhere = {"matchLabels": {"istio": "egressgateway"}}
    gateway.apply(authorization_policy(action="PERMIT", selector=elsewhere))
    assert gateway.ask().status == 200
    assert "the gateways of namespace istio-system with istio=egressgateway" in problems(gateway)
    gateway.apply(authorization_policy(action="PERMIT", name="default/rules"))
    assert gateway.ask().status == 200
    # Whom it was to select cannot be read.
    gateway.apply(authorization_policy(selector={"matchLabel": {"istio": "egressgateway"}}))
    assert denied(gateway)
    assert "all gateways of namespace istio-system" in problems(gateway)


@pytest.mark.parametrize(
    "text",
    [
        "kind: AuthorizationPolicy\nmetadata:\n  name: a\n  namespace: istio-system\nspec: [",
        "apiVersion: security.istio.io/v1\nmetadata: {\nkind: AuthorizationPolicy\n",
    ],
)
def test_a_policy_that_is_no_yaml_denies(gateway: Gateway, text: str) -> None:
    gateway.apply(text)
    assert denied(gateway)


def test_an_invalid_change_leaves_the_last_good_policy(gateway: Gateway) -> None:
    gateway.apply(NOT_ALICE)
    gateway.apply(BROKEN)
    assert denied(gateway, "/secret")
    assert gateway.ask().status == 200
    assert f"AuthorizationPolicy {ROOT}/rules: its last good version is in use" in problems(gateway)


def test_nothing_is_taken_away_while_a_file_cannot_be_read(gateway: Gateway) -> None:
    gateway.apply(NOT_ALICE)
    gateway.apply("what is this: [")
    assert denied(gateway, "/secret")
    assert gateway.ask().status == 200


def test_a_policy_that_is_deleted_is_gone(gateway: Gateway) -> None:
    gateway.apply(NOT_ALICE)
    assert denied(gateway, "/secret")
    gateway.apply()
    assert gateway.ask(path="/secret").status != 403


def restart(gateway: Gateway, *objects: str) -> None:
    """Restart the control plane; meanwhile the configuration becomes these objects."""
    mesh = gateway.lab.mesh
    assert mesh.control_plane
    mesh.control_plane.terminate()
    mesh.control_plane.wait()
    documents = "\n---\n".join([*opened(DASHSCOPE, KEYS[DASHSCOPE]), *objects])
    mesh.replace(mesh.config / "objects.yaml", documents)
    mesh.start_control_plane()
    eventually(lambda: [proxy["state"] for proxy in mesh.status()["proxies"]] == ["SYNCED", "SYNCED"])


def test_the_last_good_policy_stays_over_a_restart_with_a_broken_file(gateway: Gateway) -> None:
    gateway.apply(NOT_ALICE)
    restart(gateway, BROKEN)
    assert denied(gateway, "/secret")
    assert gateway.ask().status == 200


def test_a_policy_that_breaks_before_it_was_ever_good_denies_after_a_restart(gateway: Gateway) -> None:
    restart(gateway, BROKEN)
    assert denied(gateway)


@pytest.mark.parametrize("broken", [BROKEN, "what is this: ["])
def test_a_control_plane_that_never_saw_the_good_policy_leaves_it_to_those_that_have_it(
    gateway: Gateway, broken: str
) -> None:
    gateway.apply(NOT_ALICE)
    for folder in gateway.lab.mesh.directory.rglob("state"):
        shutil.rmtree(folder)
    restart(gateway, broken)
    assert denied(gateway, "/secret")
    assert gateway.ask().status == 200


def test_keys_of_clients_stay_over_a_restart_that_cannot_read_them(gateway: Gateway) -> None:
    """Secrets are kept on no disk: the gateway goes on with what it has."""
    gateway.apply(CLIENTS, api_key_authentication("clients"))
    restart(
        gateway, api_key_authentication("clients"), CLIENTS.replace('"stringData"', '"stringData": 1, "x"')
    )
    assert gateway.ask({"x-api-key": ALICE}).status == 200
    assert gateway.ask().status == 401


def test_a_gateway_goes_on_denying_while_the_control_plane_is_dead(gateway: Gateway) -> None:
    gateway.apply(NOT_ALICE)
    assert gateway.lab.mesh.control_plane
    gateway.lab.mesh.control_plane.kill()
    gateway.lab.mesh.control_plane.wait()
    assert denied(gateway, "/secret")
    gateway.lab.mesh.start_control_plane()


def test_a_custom_policy_without_its_provider_denies(gateway: Gateway) -> None:
    gateway.apply(authorization_policy({}, action="CUSTOM", provider={"name": "nobody"}))
    assert denied(gateway)


@contextmanager
def hammering(address: str, host: str) -> Iterator[Callable[[], list[int]]]:
    """Send requests for a host without a pause, on connections that stay; yield what the answers were."""
    seen: list[set[int]] = [set() for _ in range(4)]
    rounds = [0] * 4
    stop = threading.Event()

    def ask(number: int) -> None:
        connection = HTTPConnection(address, 80)
        while not stop.is_set():
            connection.request("POST", "/", b"{}", {"host": host, "content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            seen[number].add(answer.status)
            rounds[number] += 1
        connection.close()

    def statuses() -> list[int]:
        before = list(rounds)
        eventually(lambda: all(now > then + 5 for now, then in zip(rounds, before, strict=True)))
        return sorted(set().union(*seen))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize(
    ("policies", "status"),
    [
        ([authorization_policy({"to": [{"operation": {"hosts": ["new.com"]}}]}, action="DENY")], 403),
        ([request_authentication(RULE)], 401),
        ([CLIENTS, api_key_authentication("clients")], 401),
    ],
    ids=["authorization", "token", "key"],
)
def test_no_request_gets_through_before_the_policy_that_comes_with_its_route(
    gateway: Gateway, policies: list[str], status: int
) -> None:
    """Not even on a connection that was open before: there a new listener would come too late."""
    new = route("new", "new.com", {"backendRefs": backends(DASHSCOPE)}, gateways=[f"{ROOT}/ingress-gw"])
    with hammering(gateway.address, "new.com") as statuses:
        assert statuses() == [404]
        for _ in range(5):
            gateway.apply(new, *policies)
            assert set(statuses()) == {404, status}
            gateway.apply()
            eventually(lambda: gateway.client.request("new.com").status == 404)
    assert gateway.lab.all_seen() == ()


def test_a_policy_holds_on_connections_that_are_open_and_drains_none(gateway: Gateway) -> None:
    connection = HTTPConnection(gateway.address, 80)

    def ask() -> int:
        headers = {"host": HOST, "content-type": "application/json"}
        connection.request("POST", "/secret", json.dumps({"messages": []}), headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status

    assert ask() != 403
    socket = connection.sock
    gateway.apply(NOT_ALICE)
    assert ask() == 403
    gateway.apply()
    assert ask() != 403
    assert connection.sock is socket
    connection.close()
