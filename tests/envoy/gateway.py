"""A gateway that serves one host by one provider, under the policies of a test."""

from collections.abc import Mapping

from tests.envoy.conftest import DASHSCOPE, KEYS, Lab
from tests.support.client import Answer, GatewayClient
from tests.support.envoy import has
from tests.support.policies import HOST, opened
from tests.support.wait import eventually
from translator.features import Feature

GATEWAY = "istio-ingressgateway"


class Gateway:
    """The ingress gateway of a lab."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.address = lab.mesh.gateways[0].bind_address
        self.client = GatewayClient(self.address)

    def apply(self, *objects: str) -> None:
        """Make these objects the whole configuration, besides those by which HOST is served."""
        self.lab.apply(*opened(DASHSCOPE, KEYS[DASHSCOPE]), *objects)
        if not has(Feature.FILTER_CHAIN):
            # There policies can change the listener, which Envoy acknowledges before its workers use it.
            eventually(lambda: self.admin("/stats?filter=total_listeners_warming").split()[-1] == "0")
            self.client.request("nobody.example.com")
        self.lab.fake.forget()

    def ask(
        self, headers: Mapping[str, str] | None = None, *, token: str | None = None, path: str = "/"
    ) -> Answer:
        """Send a request, with a token in Authorization if there is one."""
        bearer = {} if token is None else {"authorization": f"Bearer {token}"}
        return self.client.request(HOST, headers={**bearer, **(headers or {})}, path=path)

    def get(self, path: str, headers: Mapping[str, str]) -> Answer:
        """Send a GET request."""
        return self.client.request(HOST, None, headers, method="GET", path=path)

    def admin(self, path: str) -> str:
        """Ask Envoy's admin interface."""
        return self.lab.envoy_admin(path, GATEWAY)
