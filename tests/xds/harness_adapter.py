"""What the conformance harness of https://github.com/ii/xds-test-harness needs to drive the server.

    python -m tests.xds.harness_adapter [XDS_PORT [ADAPTER_PORT]]

runs the management server beside the five calls of the harness's `api/adapter/adapter.proto`. The harness
names versions itself ("1", "2"), per type; ours are hashes of the content, so they are replaced by its
names where a response is encoded, and nowhere else. tests/xds/README.md says how to run it.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Final
from unittest.mock import patch

import grpc
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory

from tests.xds.client import resource
from xds import protos
from xds.group import Group, Response
from xds.resources import CDS, EDS, LDS, RDS
from xds.server import ManagementServer, Node
from xds.snapshot import Snapshot

_MESSAGES: Final = {
    CDS: protos.Cluster,
    EDS: protos.ClusterLoadAssignment,
    LDS: protos.Listener,
    RDS: protos.RouteConfiguration,
}
_FIELD: Final = descriptor_pb2.FieldDescriptorProto
_SUCCESS: Final = b"\x08\x01"
"""`success = true`; the harness looks at no answer."""


def _requests() -> tuple[Any, Any]:
    """Return the classes of SetStateRequest and ResourceRequest."""
    file = descriptor_pb2.FileDescriptorProto(name="adapter.proto", package="adapter", syntax="proto3")
    file.dependency.append("google/protobuf/any.proto")
    fields = {
        "SetStateRequest": ("node", "version", "resources"),
        "ResourceRequest": ("node", "typeUrl", "resourceName", "version"),
    }
    for message, names in fields.items():
        made = file.message_type.add(name=message)
        for number, name in enumerate(names, 1):
            field = made.field.add(name=name, number=number, type=_FIELD.TYPE_STRING)
            field.label = _FIELD.LABEL_OPTIONAL
            if name == "resources":
                field.type, field.label = _FIELD.TYPE_MESSAGE, _FIELD.LABEL_REPEATED
                field.type_name = ".google.protobuf.Any"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    classes = [pool.FindMessageTypeByName(f"adapter.{message}") for message in fields]
    one, other = (message_factory.GetMessageClass(descriptor) for descriptor in classes)
    return one, other


class Adapter:
    """The state that the harness sets, as the source of a management server."""

    def __init__(self) -> None:
        self.server = ManagementServer(self, identifier="server under test")
        self._contents: dict[Hashable, dict[tuple[str, str], int]] = {}
        """Per node: what each resource holds, a number that grows with each update."""
        self.versions: dict[str, str] = {}
        self._set_state, self._resource = _requests()

    def group(self, node: Node, identity: object) -> Hashable:  # noqa: ARG002
        return node.id

    def snapshot(self, group: Hashable) -> Snapshot:
        contents = self._contents.get(group, {})
        return Snapshot(resource(type_url, name, content) for (type_url, name), content in contents.items())

    def service(self) -> "grpc.GenericRpcHandler[bytes, bytes]":
        """Return the five calls."""
        calls = {
            "SetState": self.set_state,
            "ClearState": self.clear_state,
            "AddResource": self.add_or_update,
            "UpdateResource": self.add_or_update,
            "RemoveResource": self.remove,
        }
        handlers = {name: grpc.unary_unary_rpc_method_handler(_call(call)) for name, call in calls.items()}
        return grpc.method_handlers_generic_handler("adapter.Adapter", handlers)

    def set_state(self, data: bytes) -> bytes:
        request = self._set_state.FromString(data)
        contents = {}
        for body in request.resources:
            message = _MESSAGES[body.type_url].FromString(body.value)
            contents[body.type_url, message.cluster_name if body.type_url == EDS else message.name] = 1
            self.versions[body.type_url] = request.version
        return self._publish(request.node, contents)

    def clear_state(self, data: bytes) -> bytes:
        self._publish(self._resource.FromString(data).node, {})
        return b""

    def add_or_update(self, data: bytes) -> bytes:
        request = self._resource.FromString(data)
        contents = self._contents[request.node]
        name = (request.typeUrl, request.resourceName)
        self.versions[request.typeUrl] = request.version
        return self._publish(request.node, {**contents, name: contents.get(name, 0) + 1})

    def remove(self, data: bytes) -> bytes:
        request = self._resource.FromString(data)
        removed = (request.typeUrl, request.resourceName)
        contents = self._contents[request.node]
        return self._publish(request.node, {name: contents[name] for name in contents if name != removed})

    def _publish(self, node: Hashable, contents: dict[tuple[str, str], int]) -> bytes:
        self._contents[node] = contents
        self.server.publish({node: self.snapshot(node)})
        return _SUCCESS


def _call(method: Callable[[bytes], bytes]) -> Callable[[bytes, Any], Awaitable[bytes]]:
    async def handle(data: bytes, _: Any) -> bytes:
        return method(data)

    return handle


async def main(xds_port: int = 18000, adapter_port: int = 17000) -> None:
    """Serve until the process is ended."""
    adapter = Adapter()

    def named(encode: Callable[..., Response]) -> Callable[..., Response]:
        def encode_named(group: Group, type_url: str, version: str, *content: Any) -> Response:
            return encode(group, type_url, adapter.versions.get(type_url, version), *content)

        return encode_named

    with (
        patch.object(Group, "encode_sotw", named(Group.encode_sotw)),
        patch.object(Group, "encode_delta", named(Group.encode_delta)),
    ):
        await adapter.server.start(f"127.0.0.1:{xds_port}")
        adapter.server.ready()
        calls = grpc.aio.server()
        calls.add_generic_rpc_handlers((adapter.service(),))
        calls.add_insecure_port(f"127.0.0.1:{adapter_port}")
        await calls.start()
        await calls.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:3])))
