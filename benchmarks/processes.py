"""What runs beside a benchmark: the CPU time and memory of a process, a fake LLM, static Envoys."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from crds.loader import load
from llmplane.local import end
from translator import lua
from translator.proxy import Proxy, ProxyType
from translator.translate import Translator
from translator.world import MeshSettings, World
from xds import protos
from xds.resources import CDS, ECDS, LDS, RDS, SDS, Resource

_TICKS = os.sysconf("SC_CLK_TCK")
_MESSAGES = {
    CDS: protos.Cluster,
    ECDS: protos.TypedExtensionConfig,
    LDS: protos.Listener,
    RDS: protos.RouteConfiguration,
    SDS: protos.Secret,
}


def cpu_seconds(pid: int) -> float:
    """Return utime + stime of a process, all its threads (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def run_seconds(pid: int) -> float:
    """Return the time that all threads of a process ran, in steps finer than the 10 ms of `cpu_seconds`."""
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(file.read_text(encoding="utf-8").split()[0]) for file in files) / 1e9


def resident_bytes(pid: int) -> int:
    """Return the memory of a process that no file backs (RssAnon): what its configuration costs."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"process {pid} has no RssAnon")


@contextmanager
def running_fake_llm(host: str, ca_dir: Path, *options: str) -> Iterator[str]:
    """Run a fake LLM that plays `host`, with `options`, in its own process; yields ADDRESS:PORT."""
    command = [sys.executable, "-m", "llmplane.fakellm", "--listen", "127.0.0.1:0", "--host", host]
    command += ["--ca-dir", str(ca_dir), "--maxlen", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().decode().split()[3].rstrip(",")
        finally:
            end(process)


def providers(count: int, domain: str, **edits: str) -> dict[str, str]:
    """Return the YAML of `count` LLMProviders of the form of the documents', by file name.

    `*.localhost` is a domain that Envoy resolves without asking a name server. `edits` replace the whole text
    of one of them.
    """
    return {f"provider-{n:04}.yaml": provider(f"provider-{n:04}", domain) for n in range(count)} | edits


def provider(name: str, domain: str, model: str = "qwen-1.8b-chat") -> str:
    """Return the YAML of one LLMProvider."""
    return f"""\
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata:
  name: {name}
spec:
  host: {name}.{domain}
  path: /compatible-mode/v1/chat/completions
  configs:
    defaultConfig:
      openAIConfig:
        model: {model}
        stream: false
        apiKey: sk-{name}-0123456789abcdef
"""


def translated(texts: Sequence[str], mesh: MeshSettings, script: Path | None = None) -> tuple[Resource, ...]:
    """Translate objects for a sidecar; `script` is the file with the Lua text (None: the text is sent)."""
    loaded = load("---\n".join(texts), "benchmark.yaml", {})
    assert not loaded.problems
    scripts = frozenset({(lua.SCRIPT_SHA256, str(script))}) if script else frozenset()
    proxy = Proxy(ProxyType.SIDECAR, "default", "sleep", scripts=scripts)
    world = World.of((item.object for item in loaded.objects), mesh)
    return Translator().translate(world, proxy).resources


def message(resource: Resource) -> Any:
    """Decode what a resource carries."""
    return _MESSAGES[resource.type_url].FromString(protos.Any.FromString(resource.body).value)


def as_static(resources: Sequence[Resource]) -> dict[str, list[Any]]:
    """Return the resources of a sidecar as `static_resources`, for the same Envoy without a control plane."""
    found: dict[str, list[Any]] = {CDS: [], ECDS: [], LDS: [], RDS: [], SDS: []}
    for resource in resources:
        if resource.type_url in found:
            found[resource.type_url].append(_without_ads(to_dict(message(resource))))
    (listener,) = found[LDS]
    listener["address"]["socket_address"]["port_value"] = 0
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    filters = {each["name"]: each for each in found[ECDS]}
    manager["http_filters"] = [filters.get(each["name"], each) for each in manager["http_filters"]]
    for dynamic in ("rds", "scoped_routes"):
        manager.pop(dynamic, None)
    hosts = [host for routes in found[RDS] for host in routes["virtual_hosts"]]
    manager["route_config"] = found[RDS][0] | {
        "virtual_hosts": hosts,
        "validate_clusters": False,
    }  # as with RDS
    return {"clusters": found[CDS], "listeners": [listener], "secrets": found[SDS]}


def to_dict(made: Message) -> dict[str, Any]:
    """Return a message as Envoy's JSON."""
    return json_format.MessageToDict(made, preserving_proto_field_name=True, descriptor_pool=protos.POOL)


def _without_ads(value: Any) -> Any:
    """Make references to secrets static ones: those have no `sds_config`."""
    if isinstance(value, list):
        return [_without_ads(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _without_ads(item) for key, item in value.items() if key != "sds_config"}
    return value
