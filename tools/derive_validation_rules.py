"""Derive `xds/protos/validation_rules.json`, the rules of Envoy's API for its fields, from an Envoy 1.40.

    python -m tools.derive_validation_rules [PATH-OF-ENVOY]

The rules are protoc-gen-validate's options of fields and oneofs (`validate/validate.proto`). An Envoy holds
the descriptors of its messages with them; envoy-data-plane has none. The output has those of the messages and
fields that `xds.protos` knows, one a line: for the full name of a field its `validate.FieldRules` as JSON
values, and `{"oneof": {"required": true}}` for a oneof of which one member has to be set.

A rule that `xds.validation` does not know ends it with a ValueError.
"""

import json
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, duration_pb2, timestamp_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from llmplane.envoy import find_envoy
from xds import protos, validation

_BEGIN = re.compile(rb"\n.((?:envoy|xds|validate)/[\w/]+\.proto)[\x12\x1a]", re.DOTALL)
_VARINT, _LENGTH_DELIMITED = 0, 2


def embedded_files(envoy: Path) -> Iterator[tuple[str, bytes]]:
    """Find the serialized FileDescriptorProtos in an Envoy; yield names and contents. Some occur twice."""
    with envoy.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for match in _BEGIN.finditer(content):
            if content[match.start() + 1] == len(match[1]):
                yield match[1].decode(), content[match.start() : _end(content, match.start())]


def _end(content: mmap.mmap, position: int) -> int:
    """Return where a FileDescriptorProto ends: its fields are in the order of their numbers, `name` first."""
    last_number = 0
    largest = max(descriptor_pb2.FileDescriptorProto.DESCRIPTOR.fields_by_number)
    while True:
        tag, after = _varint(content, position)
        number, wire_type = tag >> 3, tag & 7
        begins_anew = number == last_number == 1
        if (
            not last_number <= number <= largest
            or begins_anew
            or wire_type not in {_VARINT, _LENGTH_DELIMITED}
        ):
            return position
        value, after = _varint(content, after)
        position = after + value if wire_type == _LENGTH_DELIMITED else after
        last_number = number


def _varint(content: mmap.mmap, position: int) -> tuple[int, int]:
    """Return a number in protobuf's base-128 form, and where it ends."""
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte <= 0x7F:  # noqa: PLR2004
            return value, position


class Rules:
    """The rules in descriptors, by the full name of a field or oneof."""

    def __init__(self, validate_proto: bytes) -> None:
        pool = DescriptorPool()
        for module in (descriptor_pb2, duration_pb2, timestamp_pb2):
            pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
        pool.AddSerializedFile(validate_proto)
        # Classes of this pool know the extensions of validate.proto.
        self._file: Any = GetMessageClass(pool.FindMessageTypeByName("google.protobuf.FileDescriptorProto"))
        self._of_field = pool.FindExtensionByName("validate.rules")
        self._of_oneof = pool.FindExtensionByName("validate.required")
        self._of_message = [pool.FindExtensionByName(f"validate.{name}") for name in ("disabled", "ignored")]
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, content: bytes) -> None:
        """Add the rules of one file."""
        file = self._file.FromString(content)
        for message in file.message_type:
            self._add(f"{file.package}.{message.name}", message)

    def _add(self, full_name: str, message: Any) -> None:
        for nested in message.nested_type:
            self._add(f"{full_name}.{nested.name}", nested)
        try:
            known = protos.POOL.FindMessageTypeByName(full_name)
        except KeyError:
            return
        if any(message.options.HasExtension(option) for option in self._of_message):
            raise ValueError(f"{full_name} is exempt from validation, which xds.validation does not know")
        for oneof in message.oneof_decl:
            if oneof.options.Extensions[self._of_oneof]:
                self._put(f"{full_name}.{oneof.name}", {"oneof": {"required": True}})
        for field in message.field:
            if field.name in known.fields_by_name and field.options.HasExtension(self._of_field):
                self._put(f"{full_name}.{field.name}", _readable(field.options.Extensions[self._of_field]))

    def _put(self, full_name: str, rules: dict[str, Any]) -> None:
        if self.found.setdefault(full_name, rules) != rules:
            raise ValueError(f"Envoy holds two descriptors of {full_name} with different rules")


def _readable(message: Any) -> dict[str, Any]:
    """Return what is set in a message as JSON values; unlike `json_format`, 64-bit numbers as numbers."""
    return {field.name: _readable_value(field, value) for field, value in message.ListFields()}


def _readable_value(field: FieldDescriptor, value: Any) -> Any:
    if field.is_repeated:
        return list(value)
    if field.message_type:
        is_duration = field.message_type.full_name == "google.protobuf.Duration"
        return value.ToJsonString() if is_duration else _readable(value)
    return field.enum_type.values_by_number[value].name if field.enum_type else value


def derive(envoy: Path) -> str:
    """Return the content of the file for this Envoy."""
    files = list(embedded_files(envoy))
    rules = Rules(dict(files)["validate/validate.proto"])
    for name, content in files:
        if not name.startswith("validate/"):
            rules.add(content)
    validation.Validator(rules.found).compile_all()
    lines = (f"{json.dumps(name)}: {json.dumps(of_field)}" for name, of_field in sorted(rules.found.items()))
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    validation.RULES.write_text(derive(Path(sys.argv[1]) if sys.argv[1:] else find_envoy()), encoding="utf-8")
