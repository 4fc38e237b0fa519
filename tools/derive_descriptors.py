"""Derive `xds/protos/descriptors.binpb`, the schema of Envoy's messages, from envoy-data-plane.

    python tools/derive_descriptors.py

envoy-data-plane is the Envoy API as betterproto2 dataclasses. Building and encoding messages with those costs
a hundred times more than with upb, protobuf's own C library, and importing them takes a second. But their
metadata holds all that upb needs: names, numbers, types, repetition, maps, oneofs, enums and wrappers. This
tool turns it into descriptors, for all messages that can be reached from `ROOTS`.

The result holds one file for each protobuf package, behind the files that it imports. `google.protobuf.*` is
left out: protobuf has it. Options, deprecations and gRPC services are left out too: nothing reads them.
"""

import dataclasses
import graphlib
import importlib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import betterproto2
from envoy_data_plane.message_pool import default_message_pool
from google.protobuf import any_pb2, duration_pb2, empty_pb2, struct_pb2, timestamp_pb2, wrappers_pb2
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

OUTPUT = Path(__file__).parent.parent / "xds" / "protos" / "descriptors.binpb"

# The messages that llmplane sends or reads, also those that travel only inside a google.protobuf.Any.
# `package.*` stands for all messages of a package.
ROOTS = (
    # The protocol.
    "envoy.service.discovery.v3.DeltaDiscoveryRequest",
    "envoy.service.discovery.v3.DeltaDiscoveryResponse",
    "envoy.service.discovery.v3.DiscoveryRequest",
    "envoy.service.discovery.v3.DiscoveryResponse",
    "envoy.service.discovery.v3.Resource",
    "google.rpc.Status",
    # The protocol of rate limit services.
    "envoy.service.ratelimit.v3.RateLimitRequest",
    "envoy.service.ratelimit.v3.RateLimitResponse",
    # What it carries.
    "envoy.config.bootstrap.v3.Bootstrap",
    "envoy.config.cluster.v3.Cluster",
    "envoy.config.core.v3.Node",
    "envoy.config.core.v3.TypedExtensionConfig",
    "envoy.config.endpoint.v3.ClusterLoadAssignment",
    "envoy.config.listener.v3.Listener",
    "envoy.config.route.v3.FilterConfig",
    "envoy.config.route.v3.RouteConfiguration",
    "envoy.config.route.v3.ScopedRouteConfiguration",
    "envoy.extensions.transport_sockets.tls.v3.Secret",
    # Extensions of clusters.
    "envoy.extensions.clusters.dns.v3.DnsCluster",
    "envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig",
    "envoy.extensions.network.dns_resolver.getaddrinfo.v3.GetAddrInfoDnsResolverConfig",
    "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer",
    "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
    "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
    # Extensions of listeners.
    "envoy.extensions.filters.listener.http_inspector.v3.HttpInspector",
    "envoy.extensions.filters.listener.original_dst.v3.OriginalDst",
    "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
    "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
    "envoy.extensions.filters.udp.dns_filter.v3.DnsFilterConfig",
    "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
    "envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig",
    "envoy.extensions.http.original_ip_detection.xff.v3.XffConfig",
    # HTTP filters, with their forms for a route.
    "envoy.extensions.filters.http.api_key_auth.v3.*",
    "envoy.extensions.filters.http.buffer.v3.*",
    "envoy.extensions.filters.http.cors.v3.*",
    "envoy.extensions.filters.http.credential_injector.v3.*",
    "envoy.extensions.filters.http.ext_authz.v3.*",
    "envoy.extensions.filters.http.header_mutation.v3.*",
    "envoy.extensions.filters.http.health_check.v3.*",
    "envoy.extensions.filters.http.jwt_authn.v3.*",
    "envoy.extensions.filters.http.local_ratelimit.v3.*",
    "envoy.extensions.filters.http.lua.v3.*",
    "envoy.extensions.filters.http.on_demand.v3.*",
    "envoy.extensions.filters.http.ratelimit.v3.*",
    "envoy.extensions.filters.http.rbac.v3.*",
    "envoy.extensions.filters.http.router.v3.*",
    "envoy.extensions.filters.http.set_filter_state.v3.*",
    "envoy.extensions.filters.http.upstream_codec.v3.*",
    "envoy.extensions.http.injected_credentials.generic.v3.Generic",
    # Access logs.
    "envoy.extensions.access_loggers.file.v3.FileAccessLog",
    "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter",
    "envoy.extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig",
    "envoy.extensions.access_loggers.stats.v3.Config",
    "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
    "envoy.extensions.formatter.cel.v3.Cel",
    "envoy.extensions.formatter.metadata.v3.Metadata",
    "envoy.extensions.formatter.req_without_query.v3.ReqWithoutQuery",
    # Traces.
    "envoy.config.trace.v3.OpenTelemetryConfig",
    "envoy.extensions.tracers.opentelemetry.samplers.v3.ParentBasedSamplerConfig",
    "envoy.extensions.tracers.opentelemetry.samplers.v3.TraceIdRatioBasedSamplerConfig",
    # Matchers.
    "envoy.extensions.matching.actions.transform_stat.v3.TransformStat",
    "envoy.extensions.matching.common_inputs.stats.v3.StatTagValueInput",
    "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig",
    "envoy.type.matcher.v3.*",
)


class Added(NamedTuple):
    """One field that envoy-data-plane does not have."""

    name: str
    number: int
    type: str  # a scalar of protobuf, or the full name of a message
    repeated: bool = False
    oneof: str | None = None


_PRIORITY_GROUP = "envoy.extensions.router.cluster_specifiers.priority_group.v3"

# What Envoy 1.40 has and envoy-data-plane 2.2.0 lacks, as far as llmplane needs it; a message that the
# package does not know is added whole. The numbers come from the descriptors inside the Envoy 1.40 binary;
# tests/unit/test_protos.py compares the whole schema with those.
ADDED: dict[str, tuple[Added, ...]] = {
    "envoy.config.cluster.v3.Cluster": (Added("stats_matcher", 61, "envoy.config.metrics.v3.StatsMatcher"),),
    "envoy.extensions.filters.http.filter_chain.v3.FilterChain": (
        Added("filters", 1, "envoy.config.core.v3.TypedExtensionConfig", repeated=True),
    ),
    "envoy.extensions.filters.http.filter_chain.v3.FilterChainConfig": (
        Added("default_filter_chain", 1, "envoy.extensions.filters.http.filter_chain.v3.FilterChain"),
    ),
    "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit": (
        Added("enable_retry_after_header", 19, "bool"),
    ),
    "envoy.extensions.filters.http.lua.v3.Lua": (
        Added("filter_context", 6, "google.protobuf.Struct"),
        Added("shared_vm_id", 9, "string"),
    ),
    "envoy.extensions.filters.http.lua.v3.LuaPerRoute": (Added("shared_vm_id", 7, "string"),),
    "envoy.extensions.filters.http.ratelimit.v3.RateLimit": (Added("enable_retry_after_header", 19, "bool"),),
    f"{_PRIORITY_GROUP}.ClusterWeight": (
        Added("cluster_name", 1, "string"),
        Added("weight", 2, "google.protobuf.UInt32Value"),
    ),
    f"{_PRIORITY_GROUP}.PriorityGroup": (
        Added("name", 1, "string"),
        Added("clusters", 2, f"{_PRIORITY_GROUP}.ClusterWeight", repeated=True),
    ),
    f"{_PRIORITY_GROUP}.PriorityGroupClusterSpecifier": (
        Added("priority_groups", 1, f"{_PRIORITY_GROUP}.PriorityGroup", repeated=True),
        Added("override_metadata_namespace", 2, "string"),
        Added("header_name", 3, "string", oneof="random_value_specifier"),
        Added("use_hash_policy", 4, "google.protobuf.BoolValue", oneof="random_value_specifier"),
    ),
    f"{_PRIORITY_GROUP}.PriorityGroupsOverride": (
        Added("priority_groups", 1, f"{_PRIORITY_GROUP}.PriorityGroup", repeated=True),
    ),
    "xds.type.v3.TypedStruct": (
        Added("type_url", 1, "string"),
        Added("value", 2, "google.protobuf.Struct"),
    ),
}


class Name(NamedTuple):
    """The full name of a message or enum; `name` has dots when it is nested in a message."""

    package: str
    name: str

    def __str__(self) -> str:
        return f"{self.package}.{self.name}"


# betterproto2 calls a field's type "string", "message", ...; protobuf calls it TYPE_STRING, TYPE_MESSAGE, ...
_TYPES = {name.removeprefix("TYPE_").lower(): number for name, number in FieldDescriptorProto.Type.items()}

_WELL_KNOWN_FILES = {
    Name("google.protobuf", name): module.DESCRIPTOR.name
    for module in (any_pb2, duration_pb2, empty_pb2, struct_pb2, timestamp_pb2, wrappers_pb2)
    for name in (*module.DESCRIPTOR.message_types_by_name, *module.DESCRIPTOR.enum_types_by_name)
}

_MODULES = "envoy_data_plane."  # envoy-data-plane has one Python module for each protobuf package

Message = type[betterproto2.Message]
Enum = type[betterproto2.Enum]


def _package(cls: type) -> str:
    return cls.__module__.removeprefix(_MODULES)


def _message(name: Name) -> Message:
    return default_message_pool.url_to_type[f"type.googleapis.com/{name}"]


def _message_name(cls: Message) -> Name:
    full_name = default_message_pool.type_to_url[cls].removeprefix("type.googleapis.com/")
    return Name(_package(cls), full_name.removeprefix(f"{_package(cls)}."))


def _enclosing_message(cls: Enum) -> Message | None:
    """Return the message that an enum is nested in.

    The pool does not know enums. A nested one's Python name is the message's name and its own in one word
    (`ClusterDiscoveryType`), so it is nested in the message with the longest name that this word begins with.
    """
    candidates = [
        message
        for message in default_message_pool.type_to_url
        if message.__module__ == cls.__module__ and cls.__name__.startswith(message.__name__)
    ]
    return max(candidates, key=lambda message: len(message.__name__), default=None)


class Schema:
    """The descriptors so far: one file for each package."""

    def __init__(self) -> None:
        self._files: dict[str, FileDescriptorProto] = {}
        self._messages: dict[Name, DescriptorProto] = {}
        self._enums: set[Name] = set()
        self._pending: list[Message] = []

    def add_root(self, root: str) -> None:
        """Add the message, or with `package.*` all of the package, and everything that it refers to."""
        package, _, name = root.rpartition(".")
        with warnings.catch_warnings(action="ignore"):  # the generated code uses deprecated names of pydantic
            module = importlib.import_module(_MODULES + package)
        if name == "*":
            self._pending += [m for m in default_message_pool.type_to_url if m.__module__ == module.__name__]
        else:
            self._pending.append(_message(Name(package, name)))
        while self._pending:
            self._add_message(self._pending.pop())

    def add_missing(self, full_name: str, fields: tuple[Added, ...]) -> None:
        """Add fields that envoy-data-plane lacks, to a message that it may lack as well."""
        owner = Name(*full_name.rsplit(".", 1))
        message = self._messages.get(owner) or self._new_message(owner)
        for added in fields:
            field = _new_field(added.name, added.number, repeated=added.repeated)
            if "." in added.type:
                self._refer(owner, field, Name(*added.type.rsplit(".", 1)))
            else:
                field.type = _TYPES[added.type]
            _append(message, field, added.oneof)

    def serialize(self) -> bytes:
        """Return the file descriptor set, each file behind those that it imports."""
        files = {file.name: file for file in self._files.values()}
        imports = {name: file.dependency for name, file in files.items()}
        in_order = [
            files[name] for name in graphlib.TopologicalSorter(imports).static_order() if name in files
        ]
        return FileDescriptorSet(file=in_order).SerializeToString(deterministic=True)

    def _add_message(self, cls: Any) -> None:  # Any: for mypy, betterproto2's messages are no dataclasses
        name = _message_name(cls)
        if name in self._messages or name in _WELL_KNOWN_FILES:
            return
        message = self._new_message(name)
        value_classes = cls._betterproto.cls_by_field
        for python_field in dataclasses.fields(cls):
            meta = betterproto2.FieldMetadata.get(python_field)
            value_class = value_classes.get(f"{python_field.name}.value", value_classes[python_field.name])
            _append(message, self._field(name, python_field.name, meta, value_class), meta.group)

    def _new_message(self, name: Name) -> DescriptorProto:
        """Make an empty message, inside the message around it or else in the file of its package."""
        outer, _, inner = name.name.rpartition(".")
        if outer:
            self._add_message(_message(Name(name.package, outer)))
            siblings = self._messages[Name(name.package, outer)].nested_type
        else:
            siblings = self._file(name.package).message_type
        self._messages[name] = siblings.add(name=inner)
        return self._messages[name]

    def _field(
        self, owner: Name, name: str, meta: betterproto2.FieldMetadata, value_class: Any
    ) -> FieldDescriptorProto:
        """Describe a field; `value_class` is the Python class of a value, also in a list or a map."""
        field = _new_field(name, meta.number, repeated=bool(meta.repeated or meta.map_meta))
        if meta.map_meta:  # for protoc a map is a list of messages with a key and a value
            entry = self._messages[owner].nested_type.add(name=f"{name.title().replace('_', '')}Entry")
            entry.options.map_entry = True
            for part, part_meta in zip(("key", "value"), meta.map_meta, strict=True):
                entry.field.append(self._field(owner, part, part_meta, value_class))
            self._refer(owner, field, Name(owner.package, f"{owner.name}.{entry.name}"))
        elif meta.proto_type == betterproto2.TYPE_MESSAGE:
            # For a wrapper or a Duration the annotation is a native type of Python.
            cls = meta.unwrap() if meta.unwrap else value_class
            self._pending.append(cls)
            self._refer(owner, field, _message_name(cls))
        elif meta.proto_type == betterproto2.TYPE_ENUM:
            self._refer(owner, field, self._add_enum(value_class))
            field.type = FieldDescriptorProto.TYPE_ENUM
        else:
            field.type = _TYPES[meta.proto_type]
        return field

    def _add_enum(self, cls: Enum) -> Name:
        """Add an enum, to the message around it or else to the file of its package."""
        outer = _enclosing_message(cls)
        own_name = cls.__name__.removeprefix(outer.__name__ if outer else "")
        name = Name(_package(cls), f"{_message_name(outer).name}.{own_name}" if outer else own_name)
        if name not in self._enums and name not in _WELL_KNOWN_FILES:
            self._enums.add(name)
            if outer:
                self._add_message(outer)
                siblings = self._messages[_message_name(outer)].enum_type
            else:
                siblings = self._file(name.package).enum_type
            enum = siblings.add(name=own_name)
            for member_name, member in cls.__members__.items():
                enum.value.add(name=member.proto_name or member_name, number=member)
        return name

    def _refer(self, owner: Name, field: FieldDescriptorProto, target: Name) -> None:
        """Give the field the message type `target`, and let the owner's file import the target's."""
        field.type = FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = f".{target}"
        imported = _WELL_KNOWN_FILES.get(target) or _file_name(target.package)
        dependencies = self._file(owner.package).dependency
        if target.package != owner.package and imported not in dependencies:
            dependencies.append(imported)

    def _file(self, package: str) -> FileDescriptorProto:
        if package not in self._files:
            self._files[package] = FileDescriptorProto(
                name=_file_name(package), package=package, syntax="proto3"
            )
        return self._files[package]


def _file_name(package: str) -> str:
    return f"{package.replace('.', '/')}.proto"


def _new_field(name: str, number: int, *, repeated: bool) -> FieldDescriptorProto:
    """Make a field whose type is to be set."""
    label = FieldDescriptorProto.LABEL_REPEATED if repeated else FieldDescriptorProto.LABEL_OPTIONAL
    return FieldDescriptorProto(name=name, number=number, label=label)


def _append(message: DescriptorProto, field: FieldDescriptorProto, oneof: str | None) -> None:
    if oneof:
        oneofs = [declared.name for declared in message.oneof_decl]
        if oneof not in oneofs:
            oneofs.append(message.oneof_decl.add(name=oneof).name)
        field.oneof_index = oneofs.index(oneof)
    message.field.append(field)


def derive() -> bytes:
    """Return the serialized FileDescriptorSet, the same bytes for the same envoy-data-plane."""
    schema = Schema()
    for root in ROOTS:
        schema.add_root(root)
    for full_name, fields in ADDED.items():
        schema.add_missing(full_name, fields)
    return schema.serialize()


if __name__ == "__main__":
    OUTPUT.write_bytes(derive())
