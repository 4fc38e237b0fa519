"""The message classes: the schema is Envoy's, and messages are written as plain dicts."""

import datetime as dt
import importlib
import mmap
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from envoy_data_plane.message_pool import default_message_pool
from google.protobuf import json_format, struct_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from google.protobuf.message_factory import GetMessageClass

from llmplane.envoy import find_envoy
from tools import derive_descriptors
from xds import protos

# envoy-data-plane's generated code uses deprecated names of pydantic, and warns of deprecated fields.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SCHEMA = FileDescriptorSet.FromString(derive_descriptors.OUTPUT.read_bytes())


def test_the_committed_schema_is_what_the_tool_derives() -> None:
    assert derive_descriptors.derive() == derive_descriptors.OUTPUT.read_bytes()


def test_every_message_that_the_schema_was_derived_for_has_a_class() -> None:
    named = {
        cls.DESCRIPTOR.full_name for cls in vars(protos).values() if isinstance(cls, type(protos.Cluster))
    }
    assert {root for root in derive_descriptors.ROOTS if not root.endswith(".*")} - named == set()


def test_importing_the_classes_imports_no_second_codec_and_no_server() -> None:
    code = "import sys; from xds import protos; print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {"envoy_data_plane", "betterproto2", "grpc"} & set(printed.split()) == set()


# Keyword arguments


def test_nested_messages_are_dicts_and_enum_values_are_names() -> None:
    cluster = protos.Cluster(
        name="a",
        type="STRICT_DNS",
        load_assignment={"endpoints": [{"lb_endpoints": [{"endpoint": {"hostname": "b"}}]}]},
        eds_cluster_config={"eds_config": {"ads": {}}},
    )
    assert cluster.type == 1
    assert cluster.load_assignment.endpoints[0].lb_endpoints[0].endpoint.hostname == "b"
    assert cluster.eds_cluster_config.eds_config.HasField("ads")


def test_a_duration_is_a_dict_or_a_timedelta_and_a_wrapper_is_a_dict() -> None:
    cluster = protos.Cluster(connect_timeout={"seconds": 1, "nanos": 500_000_000})
    assert cluster == protos.Cluster(connect_timeout=dt.timedelta(seconds=1.5))
    assert protos.Cluster(per_connection_buffer_limit_bytes={"value": 0}).HasField(
        "per_connection_buffer_limit_bytes"
    )


def test_none_leaves_a_field_unset() -> None:
    assert protos.Cluster(name=None, connect_timeout=None) == protos.Cluster()


JSON: dict[str, Any] = {
    "null": None,
    "yes": True,
    "number": 1.5,
    "text": "ü",
    "list": [1, "a", {"b": []}],
    "empty": {},
}


def test_a_struct_is_a_plain_dict_and_in_a_map_what_struct_returns() -> None:
    lua = protos.Lua(filter_context=JSON)
    metadata = protos.Metadata(filter_metadata={"envoy.lb": protos.struct(JSON)})
    assert lua.filter_context == metadata.filter_metadata["envoy.lb"]
    assert protos.to_dict(lua) == {"filter_context": JSON}


@pytest.mark.parametrize(
    "arguments", [{"nmae": "a"}, {"type": "STRICT_DSN"}, {"load_assignment": {"naem": ""}}]
)
def test_a_name_that_the_schema_does_not_have_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"nmae|STRICT_DSN|naem"):
        protos.Cluster(**arguments)


def test_a_message_of_another_pool_is_refused() -> None:
    with pytest.raises(TypeError):
        protos.Metadata(filter_metadata={"envoy.lb": struct_pb2.Struct()})


# Any, and printing


def test_pack_names_the_type_and_gives_equal_bytes_for_equal_messages() -> None:
    names = [f"metadata-{number}" for number in range(20)]
    forwards = protos.Metadata(filter_metadata={name: protos.struct({}) for name in names})
    backwards = protos.Metadata(filter_metadata={name: protos.struct({}) for name in reversed(names)})
    packed = protos.pack(forwards)
    assert packed.type_url == protos.type_url(protos.Metadata) == protos.type_url(forwards)
    assert packed.type_url == "type.googleapis.com/envoy.config.core.v3.Metadata"
    assert packed.value == protos.pack(backwards).value
    assert protos.Metadata.FromString(packed.value) == forwards


def test_to_dict_prints_the_names_of_the_proto_and_the_content_of_each_any() -> None:
    options = protos.HttpProtocolOptions(explicit_http_config={"http2_protocol_options": {}})
    cluster = protos.Cluster(
        name="a",
        type="LOGICAL_DNS",
        connect_timeout={"seconds": 5},
        typed_extension_protocol_options={"http": protos.pack(options)},
    )
    printed = {
        "name": "a",
        "type": "LOGICAL_DNS",
        "connect_timeout": "5s",
        "typed_extension_protocol_options": {
            "http": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
    }
    assert protos.to_dict(cluster) == printed
    assert json_format.ParseDict(printed, protos.Cluster(), descriptor_pool=protos.POOL) == cluster


# The same bytes as envoy-data-plane


SAMPLES = {
    FieldDescriptor.CPPTYPE_BOOL: True,
    FieldDescriptor.CPPTYPE_DOUBLE: 0.1,
    FieldDescriptor.CPPTYPE_FLOAT: 0.5,
    FieldDescriptor.CPPTYPE_INT32: -1,
    FieldDescriptor.CPPTYPE_INT64: -(2**63),
    FieldDescriptor.CPPTYPE_MESSAGE: {},
    FieldDescriptor.CPPTYPE_STRING: "text",
    FieldDescriptor.CPPTYPE_UINT32: 2**32 - 1,
    FieldDescriptor.CPPTYPE_UINT64: 2**64 - 1,
}


def _sample(field: FieldDescriptor) -> Any:
    if field.message_type and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        return {_sample(key): GetMessageClass(value.message_type)() if value.message_type else _sample(value)}
    one: Any
    if field.enum_type:
        one = field.enum_type.values[-1].number
    else:
        one = b"\xff" if field.type == FieldDescriptor.TYPE_BYTES else SAMPLES[field.cpp_type]
    return [one, one] if field.is_repeated else one


def _nested(name: str, message: DescriptorProto) -> Iterator[tuple[str, DescriptorProto]]:
    yield name, message
    for nested in message.nested_type:
        yield from _nested(f"{name}.{nested.name}", nested)


def _messages(files: Iterable[FileDescriptorProto]) -> dict[str, DescriptorProto]:
    """Return all messages by their full names."""
    top = ((f"{file.package}.{message.name}", message) for file in files for message in file.message_type)
    return {name: message for outer in top for name, message in _nested(*outer)}


def test_envoy_data_plane_reads_every_field_and_writes_the_same_bytes() -> None:
    derive_descriptors.derive()  # imports the modules of all messages
    fields = 0
    for name, message in _messages(SCHEMA.file).items():
        added = {field.name for field in derive_descriptors.ADDED.get(name, ())}
        if message.options.map_entry or {field.name for field in message.field} <= added:
            continue
        theirs = default_message_pool.url_to_type[f"type.googleapis.com/{name}"]
        descriptor = protos.POOL.FindMessageTypeByName(name)
        for field in descriptor.fields:
            if field.name not in added:
                encoded = GetMessageClass(descriptor)(**{field.name: _sample(field)}).SerializeToString()
                parsed = theirs.parse(encoded)
                assert not parsed._unknown_fields, field.full_name
                assert bytes(parsed) == encoded, field.full_name
                fields += 1
    assert fields > 2000


def test_envoy_data_plane_reads_and_writes_the_same_cluster() -> None:
    derive_descriptors.derive()  # imports the modules of all messages
    cluster, core, endpoint, protobuf = (
        importlib.import_module(f"envoy_data_plane.{package}")
        for package in (
            "envoy.config.cluster.v3",
            "envoy.config.core.v3",
            "envoy.config.endpoint.v3",
            "google.protobuf",
        )
    )
    options = protos.pack(protos.HttpProtocolOptions(explicit_http_config={"http_protocol_options": {}}))
    address = {"socket_address": {"address": "127.0.0.1", "port_value": 443}}
    ours = protos.Cluster(
        name="outbound|443||dashscope.aliyuncs.com",
        type="STRICT_DNS",
        connect_timeout={"seconds": 10},
        per_connection_buffer_limit_bytes={"value": 32768},
        load_assignment={"endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]},
        metadata={"filter_metadata": {"istio": protos.struct({"default_original_port": 443})}},
        typed_extension_protocol_options={"http": options},
    )
    lb_endpoint = endpoint.LbEndpoint(
        endpoint=endpoint.Endpoint(
            address=core.Address(socket_address=core.SocketAddress(address="127.0.0.1", port_value=443))
        )
    )
    theirs = cluster.Cluster(
        name="outbound|443||dashscope.aliyuncs.com",
        type=cluster.ClusterDiscoveryType.STRICT_DNS,
        connect_timeout=dt.timedelta(seconds=10),
        per_connection_buffer_limit_bytes=32768,
        load_assignment=endpoint.ClusterLoadAssignment(
            endpoints=[endpoint.LocalityLbEndpoints(lb_endpoints=[lb_endpoint])]
        ),
        metadata=core.Metadata(
            filter_metadata={
                "istio": protobuf.Struct(fields={"default_original_port": protobuf.Value(number_value=443)})
            }
        ),
        typed_extension_protocol_options={
            "http": protobuf.Any(type_url=options.type_url, value=options.value)
        },
    )
    assert protos.Cluster.FromString(bytes(theirs)) == ours
    assert cluster.Cluster.parse(ours.SerializeToString()) == theirs


# The same schema as Envoy's own


def _enums(files: Iterable[FileDescriptorProto]) -> dict[str, EnumDescriptorProto]:
    """Return all enums by their full names."""
    top = {f"{file.package}.{enum.name}": enum for file in files for enum in file.enum_type}
    return top | {
        f"{name}.{enum.name}": enum
        for name, message in _messages(files).items()
        for enum in message.enum_type
    }


def _files_inside(binary: Path) -> list[FileDescriptorProto]:
    """Return the descriptors of Envoy's API that a stock Envoy holds.

    A serialized FileDescriptorProto begins with the field `name` and ends with the field `syntax`.
    """
    pattern = re.compile(
        rb"\n.((?:envoy|google/api|google/rpc|opentelemetry|xds)/[\w/]+\.proto)\x12.*?b\x06proto3", re.DOTALL
    )
    with binary.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [FileDescriptorProto.FromString(match[0]) for match in pattern.finditer(content)]


def _oneof(message: DescriptorProto, field: FieldDescriptorProto) -> str | None:
    return message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else None


@pytest.mark.envoy
def test_every_field_and_enum_value_is_the_same_inside_envoy() -> None:
    files = _files_inside(find_envoy())
    messages, enums, our_enums = _messages(files), _enums(files), _enums(SCHEMA.file)
    for name, message in _messages(SCHEMA.file).items():
        their_fields = {field.name: field for field in messages[name].field}
        for field in message.field:
            theirs = their_fields[field.name]
            same = ("number", "label", "type", "proto3_optional")
            assert [getattr(field, part) for part in same] == [getattr(theirs, part) for part in same], (
                f"{name}.{field.name}"
            )
            assert _oneof(message, field) == _oneof(messages[name], theirs), f"{name}.{field.name}"
            if field.type == FieldDescriptorProto.TYPE_MESSAGE:
                assert field.type_name == theirs.type_name
            # Values, not names: envoy-data-plane says RfcVersion for RFCVersion, which no message shows.
            if (
                field.type == FieldDescriptorProto.TYPE_ENUM
                and field.type_name != ".google.protobuf.NullValue"
            ):
                values, their_values = (
                    {(value.name, value.number) for value in enum.value}
                    for enum in (our_enums[field.type_name[1:]], enums[theirs.type_name[1:]])
                )
                assert values == their_values, f"{name}.{field.name}"
