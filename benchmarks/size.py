"""What a provider costs: bytes on the wire, field by field, and memory in Envoy."""

import queue
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message

from benchmarks.processes import message, providers, resident_bytes, to_dict, translated
from benchmarks.report import Table
from llmplane.bootstrap import ProxySettings, bootstrap
from llmplane.local import LocalMesh, free_bind_address
from llmplane.mesh import mesh_settings
from tests.support.envoy import running_envoy
from translator import lua
from translator.proxy import ProxyType
from xds import protos
from xds.resources import CDS, ECDS, LDS, RDS, SDS, SRDS, Resource

_DOMAIN = "example.com"
_LOCAL_DOMAIN = "localhost"
_SCRIPT = Path("/run/user/1000/llmplane-1000/llm_provider-0123456789abcdef.lua")
"""A usual path: it travels with each cluster."""
_METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
_ROOTS = Path("/etc/ssl/certs/ca-certificates.crt")


def measure(*, quick: bool) -> list[Table]:
    """Measure with 1, 100 and 1000 providers."""
    counts = (1, 20) if quick else (1, 100, 1000)
    return [_wire(counts[-1]), _fields(), _memory(counts)]


def _wire(count: int) -> Table:
    """Ask the real server as an Envoy does, and count the bytes of its responses."""
    one, many = _received(1), _received(count)
    bare = len(Resource.of(_bare_cluster(f"provider-0000.{_DOMAIN}", _ROOTS)).delta_frame)
    rows: list[list[Any]] = []
    for name, type_url in (
        ("cluster", CDS),
        ("key", SDS),
        ("routes", RDS),
        ("scopes", SRDS),
        ("listener", LDS),
    ):
        rows.append([name, (many[type_url] - one[type_url]) / (count - 1), many[type_url]])
    each = sum(float(row[1]) for row in rows)
    rows.append(["all", each, sum(many.values())])
    rows.append(["reference: bare TLS cluster", bare, None])
    rows.append(["x reference", each / bare, None])
    return Table(
        f"size: bytes on the wire (delta, what the server sent for {count} providers)",
        ["resource", "bytes a provider", "bytes in all"],
        rows,
        "Aim: at most 2048 bytes a provider. The trust roots are sent once (among the keys, in all).",
    )


def _received(count: int) -> Counter[str]:
    """Return the bytes of all responses by type."""
    expected = translated(list(providers(count, _DOMAIN).values()), mesh_settings(None, (), None), _SCRIPT)
    missing = {(resource.type_url, resource.name) for resource in expected}
    found: Counter[str] = Counter()
    requests: queue.SimpleQueue[Message] = queue.SimpleQueue()
    with _control_plane(count, _DOMAIN) as mesh, grpc.insecure_channel(str(mesh.xds), _UNLIMITED) as channel:
        call = channel.stream_stream(
            _METHOD,
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=bytes,
        )(iter(requests.get, None))
        wildcards = [(type_url, list[str]()) for type_url in (CDS, LDS, SRDS)]
        for type_url, names in (
            *wildcards,
            *((named, _names(expected, named)) for named in (RDS, SDS, ECDS)),
        ):
            requests.put(
                protos.DeltaDiscoveryRequest(node=_node(), type_url=type_url, resource_names_subscribe=names)
            )
        for raw in call:
            response = protos.DeltaDiscoveryResponse.FromString(raw)
            found[response.type_url] += len(raw)
            missing -= {(response.type_url, resource.name) for resource in response.resources}
            if not missing:
                break
            requests.put(
                protos.DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
            )
        call.cancel()  # type: ignore[no-untyped-call]
    return found


_UNLIMITED = (("grpc.max_receive_message_length", -1),)


def _names(resources: Sequence[Resource], type_url: str) -> list[str]:
    return [resource.name for resource in resources if resource.type_url == type_url]


def _node() -> Any:
    metadata = {"NAMESPACE": "default", "LUA_SCRIPTS": {lua.SCRIPT_SHA256: str(_SCRIPT)}}
    return protos.Node(id="sidecar~127.0.0.1~sleep.default~default", metadata=protos.struct(metadata))


def _fields() -> Table:
    resources = translated(list(providers(1, _DOMAIN).values()), mesh_settings(None, (), None), _SCRIPT)
    rows: list[list[Any]] = []
    for resource in resources:
        if resource.type_url == CDS:
            rows.append(["Cluster, with its name and version", len(resource.delta_frame)])
            rows.extend(_of_message(message(resource), 1))
        elif resource.type_url == SDS and resource.name != "ROOTCA":
            rows.append(["Secret, with its name and version", len(resource.delta_frame)])
            rows.extend(_of_message(message(resource), 1))
    note = "A field counts with its tag and length. Fields of less than 8 bytes are left out."
    return Table("size: bytes of one provider by field", ["field", "bytes"], rows, note)


def _of_message(made: Message, depth: int) -> Iterator[list[Any]]:
    for field, value in made.ListFields():
        alone = type(made)()
        alone.MergeFrom(made)
        for other, _ in made.ListFields():
            if other.number != field.number:
                alone.ClearField(other.name)
        if alone.ByteSize() >= 8:
            yield [". " * depth + field.name, alone.ByteSize()]
        is_map = bool(field.message_type and field.message_type.GetOptions().map_entry)
        for part in value.values() if is_map else value if field.is_repeated else [value]:
            if isinstance(part, Message):
                yield from _of_part(part, depth + 1)


def _of_part(part: Any, depth: int) -> Iterator[list[Any]]:
    name = part.DESCRIPTOR.full_name
    if name == "google.protobuf.Any":
        inner = part.type_url.rpartition("/")[2]
        yield [". " * depth + f"type URL of {inner.rpartition('.')[2]}", len(part.type_url) + 2]
        made = message_factory.GetMessageClass(protos.POOL.FindMessageTypeByName(inner))
        yield from _of_message(made.FromString(part.value), depth)
    elif name != "google.protobuf.Struct":
        yield from _of_message(part, depth)


def _memory(counts: Sequence[int]) -> Table:
    rows: list[list[Any]] = []
    ways: dict[str, dict[int, int]] = {}
    for count in counts:
        with _control_plane(count, _LOCAL_DOMAIN) as mesh:
            for name, is_file in (("llmplane, script as file", True), ("llmplane, script inline", False)):
                ways.setdefault(name, {})[count] = _configured_memory(mesh, is_file=is_file)
        for name, roots in (("bare TLS clusters", _ROOTS), ("bare TLS clusters, no trust roots", None)):
            hosts = [f"provider-{n:04}.{_LOCAL_DOMAIN}" for n in range(count)]
            clusters = [to_dict(_bare_cluster(host, roots)) for host in hosts]
            ways.setdefault(name, {})[count] = _memory_of({"static_resources": {"clusters": clusters}})
    reference = _each(ways["bare TLS clusters"], counts)
    for name, found in ways.items():
        each = _each(found, counts)
        rows.append([name, *(found[count] / 1e6 for count in counts), each / 1e3, each / reference])
    return Table(
        "size: Envoy's memory (RssAnon)",
        ["configuration", *(f"MB with {count}" for count in counts), "KB a provider", "x bare TLS"],
        rows,
        "Reference: as many clusters with TLS and the same trust roots in the bootstrap, without filters.",
    )


def _each(found: dict[int, int], counts: Sequence[int]) -> float:
    return (found[counts[-1]] - found[counts[0]]) / (counts[-1] - counts[0])


def _configured_memory(mesh: LocalMesh, *, is_file: bool) -> int:
    script = mesh.directory / "llm_provider.lua"
    script.write_text(lua.SCRIPT, encoding="utf-8")
    settings = ProxySettings(
        type=ProxyType.SIDECAR,
        xds_host=mesh.xds.host,
        xds_port=mesh.xds.port,
        namespace="default",
        workload="sleep",
        admin_socket=mesh.directory / "admin.sock",
        bind_address=free_bind_address(),
        scripts={lua.SCRIPT_SHA256: script} if is_file else {},
    )
    return _memory_of(bootstrap(settings))


def _memory_of(configuration: dict[str, Any]) -> int:
    with running_envoy(configuration) as envoy:
        time.sleep(1)  # what was only needed to read the configuration is given back
        return resident_bytes(envoy.pid)


@contextmanager
def _control_plane(count: int, domain: str) -> Iterator[LocalMesh]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        mesh = LocalMesh(Path(folder))
        mesh.config.mkdir()
        for name, text in providers(count, domain).items():
            (mesh.config / name).write_text(text, encoding="utf-8")
        try:
            mesh.start_control_plane()
            yield mesh
        finally:
            mesh.stop()


def _bare_cluster(host: str, roots: Path | None) -> Message:
    """Make what Envoy needs at least to reach a provider over TLS, verified (if there are trust roots)."""
    name = f"outbound|443||{host}"
    address = {"socket_address": {"address": host, "port_value": 443}}
    validation = {"validation_context": {"trusted_ca": {"filename": str(roots)}}} if roots else {}
    tls = protos.UpstreamTlsContext(
        common_tls_context=validation, sni=host, auto_sni_san_validation=roots is not None
    )
    made: Message = protos.Cluster(
        name=name,
        type="STRICT_DNS",
        load_assignment={
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
        transport_socket={"name": "envoy.transport_sockets.tls", "typed_config": protos.pack(tls)},
    )
    return made
