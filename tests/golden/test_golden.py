"""Objects in, Envoy configuration out: each case is a file of objects and, beside it, what a sidecar gets.

`cases/NAME.yaml` may begin with `# proxy: [gateway] [capture] namespace=NS k=v ...` for a gateway, a sidecar
that captures connections and DNS queries, another namespace or labels, and have a line `# mesh: {...}` with
a mesh configuration in JSON. A stock Envoy accepts every golden file.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from crds.meshconfig import MeshConfig
from crds.problems import Severity
from llmplane import offline
from llmplane.certificates import CertificateAuthority, write_pair
from llmplane.envoy import find_envoy
from translator import lua
from translator.proxy import Proxy, ProxyType, WorkloadCertificate
from translator.world import MeshSettings

CASES = Path(__file__).parent / "cases"
VARIABLES = {
    "API_KEY": "sk-golden",
    "API_KEY_OF_DASHSCOPE": "sk-golden-dashscope",
    "API_KEY_OF_MOONSHOT": "sk-golden-moonshot",
}
SCRIPT = "/etc/envoy/llm_provider.lua"
CERTIFICATE = WorkloadCertificate(
    "/etc/certs/cert-chain.pem", "/etc/certs/key.pem", "/etc/certs/root-cert.pem"
)


def inputs() -> list[Path]:
    return sorted(path for path in CASES.glob("*.yaml") if not path.name.endswith(".envoy.yaml"))


def proxy_of(case: Path) -> Proxy:
    first = case.read_text(encoding="utf-8").splitlines()[0]
    words = first.removeprefix("# proxy:").split() if first.startswith("# proxy:") else []
    kind = ProxyType.ROUTER if "gateway" in words else ProxyType.SIDECAR
    captures = "capture" in words
    labels = dict(word.split("=", 1) for word in words if "=" in word)
    namespace = labels.pop("namespace", "default")
    scripts = frozenset({(lua.SCRIPT_SHA256, SCRIPT)})
    workload = "sleep" if kind is ProxyType.SIDECAR else "gateway"
    found = frozenset(labels.items())
    return Proxy(
        kind,
        namespace,
        workload,
        found,
        scripts=scripts,
        certificate=CERTIFICATE,
        captures=captures,
        captures_dns=captures,
        has_ipv6=captures,
    )


def mesh_of(case: Path) -> MeshSettings:
    (config,) = re.findall(r"^# mesh: (.*)$", case.read_text(encoding="utf-8"), re.MULTILINE) or ["{}"]
    return MeshSettings(config=MeshConfig.model_validate(json.loads(config)), trusted_ca=b"PEM")


@pytest.mark.parametrize("case", inputs(), ids=lambda case: str(case.stem))
def test_translation(case: Path, update_golden: bool) -> None:
    text, problems = offline.translate([case], proxy_of(case), mesh_of(case), VARIABLES)
    assert all(problem.severity is Severity.WARNING for problem in problems)
    assert "sk-golden" not in text, "a key shows"
    expected = case.with_suffix(".envoy.yaml")
    if update_golden:
        expected.write_text(text, encoding="utf-8")
    assert text == expected.read_text(encoding="utf-8"), "rerun with --update-golden if this is meant"


@pytest.mark.envoy
@pytest.mark.parametrize("case", inputs(), ids=lambda case: str(case.stem))
def test_envoy_accepts_it(case: Path, tmp_path: Path) -> None:
    resources = list(yaml.safe_load_all(case.with_suffix(".envoy.yaml").read_text(encoding="utf-8")))
    bootstrap = tmp_path / "bootstrap.json"
    bootstrap.write_text(json.dumps(as_bootstrap(resources, tmp_path)), encoding="utf-8")
    command = [find_envoy(), "--mode", "validate", "-c", bootstrap, "-l", "error"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def as_bootstrap(resources: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Put resources that come over ADS into a bootstrap: the same messages, but for where they come from."""
    script = folder / "llm_provider.lua"
    script.write_text(lua.SCRIPT, encoding="utf-8")
    of: dict[str, list[dict[str, Any]]] = {}
    for resource in resources:
        of.setdefault(resource.pop("@type").rpartition(".")[2], []).append(resource)
    named = {
        one["name"]: one
        for kind in ("RouteConfiguration", "TypedExtensionConfig")
        for one in of.get(kind, [])
    }
    static = {
        "clusters": [_static(cluster, named, script) for cluster in of.get("Cluster", [])],
        "listeners": [_static(listener, named, script) for listener in of.get("Listener", [])],
        "secrets": [_secret(secret, folder) for secret in of.get("Secret", [])],
    }
    return {"node": {"id": "golden", "cluster": "golden"}, "static_resources": static}


def _static(value: Any, named: dict[str, Any], script: Path) -> Any:
    """Put what is referred to by name in the place of its name."""
    if isinstance(value, list):
        return [_static(item, named, script) for item in value]
    if not isinstance(value, dict):
        return str(script) if value == SCRIPT else value
    if "config_discovery" in value:
        config = _static(named[value["name"]]["typed_config"], named, script)
        return {"name": value["name"], "typed_config": config}
    if value.keys() == {"client", "key"}:  # a client's API key, which is redacted; Envoy wants different ones
        return {**value, "key": f"key-{id(value)}"}
    made = {name: _static(item, named, script) for name, item in value.items() if name != "sds_config"}
    if "rds" in made:
        made["route_config"] = {**named[made.pop("rds")["route_config_name"]], "validate_clusters": False}
    return made


def _secret(secret: dict[str, Any], folder: Path) -> dict[str, Any]:
    if "tls_certificate" in secret:
        files = folder / "cert.pem", folder / "key.pem"
        write_pair(*files, CertificateAuthority.create().issue("localhost"))
        parts = zip(("certificate_chain", "private_key"), files, strict=True)
        return {**secret, "tls_certificate": {part: {"filename": str(file)} for part, file in parts}}
    if "generic_secret" in secret:
        return {**secret, "generic_secret": {"secret": {"inline_string": "some-key"}}}
    if "validation_context" in secret:
        return {
            **secret,
            "validation_context": {"trusted_ca": {"filename": "/etc/ssl/certs/ca-certificates.crt"}},
        }
    return secret
