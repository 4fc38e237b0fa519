# ruff: noqa: INP001 - a script, no package
"""Write the bootstraps of docker-compose.yaml: `make golden`, or `python envoy-bootstrap/generate.py`.

They are what `llmplane proxy` starts Envoy with, but for two things that a container settles otherwise: the
node id is fixed, so that the files are, and the Lua script is a file that is mounted.

Those in pod/ are for the image of injected proxies (deploy/image): what all of them have in common.
"""

import json
import sys
from pathlib import Path

from llmplane.bootstrap import ProxySettings, bootstrap
from llmplane.injection import image_files
from translator import lua
from translator.proxy import ProxyType

XDS = ("control-plane", 18000)
ADMIN_SOCKET = Path("/tmp/llmplane-admin.sock")  # noqa: S108 - in the container, with mode 0600
SCRIPTS = {lua.SCRIPT_SHA256: Path("/etc/envoy/llm_provider.lua")}

PROXIES = {
    # A sidecar shares the network of its workload: loopback is all that it needs, but for Prometheus.
    "sidecar.json": ProxySettings(
        type=ProxyType.SIDECAR,
        xds_host=XDS[0],
        xds_port=XDS[1],
        namespace="default",
        workload="sleep",
        labels={"app": "sleep"},
        status_address="0.0.0.0",  # noqa: S104 - in the container
        admin_socket=ADMIN_SOCKET,
        scripts=SCRIPTS,
        instance="compose",
    ),
    # The names of examples/004-ingress-gateway; a gateway is called by others.
    "gateway.json": ProxySettings(
        type=ProxyType.ROUTER,
        xds_host=XDS[0],
        xds_port=XDS[1],
        namespace="istio-system",
        workload="istio-ingressgateway",
        labels={"istio": "ingressgateway"},
        bind_address="0.0.0.0",  # noqa: S104 - in the container
        admin_socket=ADMIN_SOCKET,
        scripts=SCRIPTS,
        instance="compose",
    ),
}


def generate(folder: Path) -> None:
    """Write all bootstraps into a folder."""
    for name, proxy in PROXIES.items():
        (folder / name).write_text(json.dumps(bootstrap(proxy), indent=2) + "\n", encoding="utf-8")
    (folder / "pod").mkdir(exist_ok=True)
    for name, text in image_files().items():
        (folder / "pod" / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
