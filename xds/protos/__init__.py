"""Envoy's messages as protobuf classes, each by a short name.

    from xds import protos

    protos.Cluster(name="a", type="STRICT_DNS", connect_timeout={"seconds": 5})

The classes are made when this module is imported, from `descriptors.binpb`, the work of
`tools/derive_descriptors.py`. It holds more messages than have a name here: a field's message needs no class,
because in the keyword arguments of a class, protobuf takes

- a dict for a message: `load_assignment={"endpoints": [...]}`; an empty dict sets an empty message;
- the name or the number for an enum's value: `type="STRICT_DNS"`;
- `{"seconds": 5}` or a `datetime.timedelta` for a Duration, `{"value": 5}` for a wrapper such as UInt32Value;
- a plain dict of any depth for a Struct, but `struct(...)` in a map of Structs (`Metadata.filter_metadata`);
- for an Any, what `pack` returns;
- None for a field that shall stay unset.

A field or an enum's value that does not exist raises ValueError, a value of a wrong type TypeError.

All classes live in a descriptor pool of their own, `POOL`, and messages of different pools do not mix: take
every class from here, also `Struct`, `Any` and the like, never from `google.protobuf.*_pb2`.

For a type checker the classes are `Any`, because they exist only at run time; annotate with `Message`.
"""

import json
import typing
from collections.abc import Mapping
from pathlib import Path

from google.protobuf import (
    any_pb2,
    duration_pb2,
    empty_pb2,
    json_format,
    message_factory,
    struct_pb2,
    timestamp_pb2,
    wrappers_pb2,
)
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message


def _load() -> DescriptorPool:
    pool = DescriptorPool()
    for module in (any_pb2, duration_pb2, empty_pb2, struct_pb2, timestamp_pb2, wrappers_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    for file in FileDescriptorSet.FromString(Path(__file__).with_name("descriptors.binpb").read_bytes()).file:
        pool.Add(file)
    return pool


POOL = _load()


def _message(full_name: str) -> typing.Any:
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(full_name))


# Well-known types
Any = _message("google.protobuf.Any")
BoolValue = _message("google.protobuf.BoolValue")
DoubleValue = _message("google.protobuf.DoubleValue")
Duration = _message("google.protobuf.Duration")
Empty = _message("google.protobuf.Empty")
ListValue = _message("google.protobuf.ListValue")
StringValue = _message("google.protobuf.StringValue")
Struct = _message("google.protobuf.Struct")
Timestamp = _message("google.protobuf.Timestamp")
UInt32Value = _message("google.protobuf.UInt32Value")
UInt64Value = _message("google.protobuf.UInt64Value")
Value = _message("google.protobuf.Value")

# The xDS protocol
DeltaDiscoveryRequest = _message("envoy.service.discovery.v3.DeltaDiscoveryRequest")
DeltaDiscoveryResponse = _message("envoy.service.discovery.v3.DeltaDiscoveryResponse")
DiscoveryRequest = _message("envoy.service.discovery.v3.DiscoveryRequest")
DiscoveryResponse = _message("envoy.service.discovery.v3.DiscoveryResponse")
Node = _message("envoy.config.core.v3.Node")
Resource = _message("envoy.service.discovery.v3.Resource")
Status = _message("google.rpc.Status")

# The protocol of rate limit services
RateLimitRequest = _message("envoy.service.ratelimit.v3.RateLimitRequest")
RateLimitResponse = _message("envoy.service.ratelimit.v3.RateLimitResponse")

# Parts of many messages
Address = _message("envoy.config.core.v3.Address")
CidrRange = _message("envoy.config.core.v3.CidrRange")
ConfigSource = _message("envoy.config.core.v3.ConfigSource")
DataSource = _message("envoy.config.core.v3.DataSource")
FractionalPercent = _message("envoy.type.v3.FractionalPercent")
GrpcService = _message("envoy.config.core.v3.GrpcService")
HeaderMutation = _message("envoy.config.common.mutation_rules.v3.HeaderMutation")
HeaderValueOption = _message("envoy.config.core.v3.HeaderValueOption")
HttpService = _message("envoy.config.core.v3.HttpService")
HttpUri = _message("envoy.config.core.v3.HttpUri")
Locality = _message("envoy.config.core.v3.Locality")
Metadata = _message("envoy.config.core.v3.Metadata")
Percent = _message("envoy.type.v3.Percent")
RuntimeFractionalPercent = _message("envoy.config.core.v3.RuntimeFractionalPercent")
SubstitutionFormatString = _message("envoy.config.core.v3.SubstitutionFormatString")
TokenBucket = _message("envoy.type.v3.TokenBucket")
TransportSocket = _message("envoy.config.core.v3.TransportSocket")
TypedExtensionConfig = _message("envoy.config.core.v3.TypedExtensionConfig")
TypedStruct = _message("xds.type.v3.TypedStruct")

# Matchers
AddressMatcher = _message("envoy.type.matcher.v3.AddressMatcher")
DoubleMatcher = _message("envoy.type.matcher.v3.DoubleMatcher")
FilterStateMatcher = _message("envoy.type.matcher.v3.FilterStateMatcher")
HttpRequestHeaderMatchInput = _message("envoy.type.matcher.v3.HttpRequestHeaderMatchInput")
ListMatcher = _message("envoy.type.matcher.v3.ListMatcher")
ListStringMatcher = _message("envoy.type.matcher.v3.ListStringMatcher")
Matcher = _message("xds.type.matcher.v3.Matcher")
MetadataMatcher = _message("envoy.type.matcher.v3.MetadataMatcher")
PathMatcher = _message("envoy.type.matcher.v3.PathMatcher")
RegexMatchAndSubstitute = _message("envoy.type.matcher.v3.RegexMatchAndSubstitute")
RegexMatcher = _message("envoy.type.matcher.v3.RegexMatcher")
StatTagValueInput = _message("envoy.extensions.matching.common_inputs.stats.v3.StatTagValueInput")
StringMatcher = _message("envoy.type.matcher.v3.StringMatcher")
UriTemplateMatchConfig = _message("envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig")
TransformStat = _message("envoy.extensions.matching.actions.transform_stat.v3.TransformStat")
ValueMatcher = _message("envoy.type.matcher.v3.ValueMatcher")

# Bootstrap
Bootstrap = _message("envoy.config.bootstrap.v3.Bootstrap")

# Clusters and endpoints; `HttpProtocolOptions` is the extension of a cluster, not its namesake in config.core
CaresDnsResolverConfig = _message("envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig")
CircuitBreakers = _message("envoy.config.cluster.v3.CircuitBreakers")
Cluster = _message("envoy.config.cluster.v3.Cluster")
ClusterLoadAssignment = _message("envoy.config.endpoint.v3.ClusterLoadAssignment")
DnsCluster = _message("envoy.extensions.clusters.dns.v3.DnsCluster")
GetAddrInfoDnsResolverConfig = _message(
    "envoy.extensions.network.dns_resolver.getaddrinfo.v3.GetAddrInfoDnsResolverConfig"
)
HealthCheck = _message("envoy.config.core.v3.HealthCheck")
HttpProtocolOptions = _message("envoy.extensions.upstreams.http.v3.HttpProtocolOptions")
LbEndpoint = _message("envoy.config.endpoint.v3.LbEndpoint")
LocalityLbEndpoints = _message("envoy.config.endpoint.v3.LocalityLbEndpoints")
OutlierDetection = _message("envoy.config.cluster.v3.OutlierDetection")

# TLS
CertificateValidationContext = _message(
    "envoy.extensions.transport_sockets.tls.v3.CertificateValidationContext"
)
CommonTlsContext = _message("envoy.extensions.transport_sockets.tls.v3.CommonTlsContext")
DownstreamTlsContext = _message("envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext")
RawBuffer = _message("envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer")
SdsSecretConfig = _message("envoy.extensions.transport_sockets.tls.v3.SdsSecretConfig")
Secret = _message("envoy.extensions.transport_sockets.tls.v3.Secret")
SubjectAltNameMatcher = _message("envoy.extensions.transport_sockets.tls.v3.SubjectAltNameMatcher")
TlsCertificate = _message("envoy.extensions.transport_sockets.tls.v3.TlsCertificate")
UpstreamTlsContext = _message("envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext")

# Routes
ClusterSpecifierPlugin = _message("envoy.config.route.v3.ClusterSpecifierPlugin")
DirectResponseAction = _message("envoy.config.route.v3.DirectResponseAction")
FilterConfig = _message("envoy.config.route.v3.FilterConfig")
HeaderMatcher = _message("envoy.config.route.v3.HeaderMatcher")
PriorityGroup = _message("envoy.extensions.router.cluster_specifiers.priority_group.v3.PriorityGroup")
PriorityGroupClusterSpecifier = _message(
    "envoy.extensions.router.cluster_specifiers.priority_group.v3.PriorityGroupClusterSpecifier"
)
QueryParameterMatcher = _message("envoy.config.route.v3.QueryParameterMatcher")
RetryPolicy = _message("envoy.config.route.v3.RetryPolicy")
Route = _message("envoy.config.route.v3.Route")
RouteAction = _message("envoy.config.route.v3.RouteAction")
RouteConfiguration = _message("envoy.config.route.v3.RouteConfiguration")
RouteMatch = _message("envoy.config.route.v3.RouteMatch")
RouteRateLimit = _message("envoy.config.route.v3.RateLimit")
ScopedRouteConfiguration = _message("envoy.config.route.v3.ScopedRouteConfiguration")
VirtualHost = _message("envoy.config.route.v3.VirtualHost")
WeightedCluster = _message("envoy.config.route.v3.WeightedCluster")

# Listeners, their filters and network filters
DnsFilter = _message("envoy.extensions.filters.udp.dns_filter.v3.DnsFilterConfig")
FilterChain = _message("envoy.config.listener.v3.FilterChain")
FilterChainMatch = _message("envoy.config.listener.v3.FilterChainMatch")
HttpConnectionManager = _message(
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
)
Http1ProtocolOptions = _message("envoy.config.core.v3.Http1ProtocolOptions")
HttpInspector = _message("envoy.extensions.filters.listener.http_inspector.v3.HttpInspector")
Listener = _message("envoy.config.listener.v3.Listener")
ListenerFilter = _message("envoy.config.listener.v3.ListenerFilter")
LocalReplyConfig = _message("envoy.extensions.filters.network.http_connection_manager.v3.LocalReplyConfig")
NetworkFilter = _message("envoy.config.listener.v3.Filter")
OriginalDst = _message("envoy.extensions.filters.listener.original_dst.v3.OriginalDst")
ResponseMapper = _message("envoy.extensions.filters.network.http_connection_manager.v3.ResponseMapper")
TcpProxy = _message("envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy")
TlsInspector = _message("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector")

# HTTP filters, their forms for a route, and extensions of the HTTP connection manager
ApiKeyAuth = _message("envoy.extensions.filters.http.api_key_auth.v3.ApiKeyAuth")
ApiKeyAuthPerRoute = _message("envoy.extensions.filters.http.api_key_auth.v3.ApiKeyAuthPerRoute")
Buffer = _message("envoy.extensions.filters.http.buffer.v3.Buffer")
BufferPerRoute = _message("envoy.extensions.filters.http.buffer.v3.BufferPerRoute")
Cors = _message("envoy.extensions.filters.http.cors.v3.Cors")
CorsPolicy = _message("envoy.extensions.filters.http.cors.v3.CorsPolicy")
CredentialInjector = _message("envoy.extensions.filters.http.credential_injector.v3.CredentialInjector")
EarlyHeaderMutation = _message(
    "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation"
)
ExtAuthz = _message("envoy.extensions.filters.http.ext_authz.v3.ExtAuthz")
ExtAuthzPerRoute = _message("envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute")
FilterChainConfig = _message("envoy.extensions.filters.http.filter_chain.v3.FilterChainConfig")
GenericCredential = _message("envoy.extensions.http.injected_credentials.generic.v3.Generic")
HeaderMutationFilter = _message("envoy.extensions.filters.http.header_mutation.v3.HeaderMutation")
HeaderMutationPerRoute = _message("envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute")
HealthCheckFilter = _message("envoy.extensions.filters.http.health_check.v3.HealthCheck")
HttpFilter = _message("envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter")
JwtAuthentication = _message("envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication")
JwtPerRoute = _message("envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig")
JwtProvider = _message("envoy.extensions.filters.http.jwt_authn.v3.JwtProvider")
JwtRequirement = _message("envoy.extensions.filters.http.jwt_authn.v3.JwtRequirement")
LocalRateLimit = _message("envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit")
LocalRateLimitDescriptor = _message("envoy.extensions.common.ratelimit.v3.LocalRateLimitDescriptor")
Lua = _message("envoy.extensions.filters.http.lua.v3.Lua")
LuaPerRoute = _message("envoy.extensions.filters.http.lua.v3.LuaPerRoute")
OnDemand = _message("envoy.extensions.filters.http.on_demand.v3.OnDemand")
OnDemandPerRoute = _message("envoy.extensions.filters.http.on_demand.v3.PerRouteConfig")
PreserveCase = _message(
    "envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig"
)
RateLimitFilter = _message("envoy.extensions.filters.http.ratelimit.v3.RateLimit")
RateLimitPerRoute = _message("envoy.extensions.filters.http.ratelimit.v3.RateLimitPerRoute")
Router = _message("envoy.extensions.filters.http.router.v3.Router")
SetFilterState = _message("envoy.extensions.filters.http.set_filter_state.v3.Config")
UpstreamCodec = _message("envoy.extensions.filters.http.upstream_codec.v3.UpstreamCodec")
XffConfig = _message("envoy.extensions.http.original_ip_detection.xff.v3.XffConfig")

# Role-based access control; `RBAC` is the HTTP filter, `RBACRules` what it enforces
RBAC = _message("envoy.extensions.filters.http.rbac.v3.RBAC")
RBACPerRoute = _message("envoy.extensions.filters.http.rbac.v3.RBACPerRoute")
RBACPermission = _message("envoy.config.rbac.v3.Permission")
RBACPolicy = _message("envoy.config.rbac.v3.Policy")
RBACPrincipal = _message("envoy.config.rbac.v3.Principal")
RBACRules = _message("envoy.config.rbac.v3.RBAC")

# Access logs
AccessLog = _message("envoy.config.accesslog.v3.AccessLog")
AccessLogFilter = _message("envoy.config.accesslog.v3.AccessLogFilter")
CelFormatter = _message("envoy.extensions.formatter.cel.v3.Cel")
ExpressionFilter = _message("envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter")
FileAccessLog = _message("envoy.extensions.access_loggers.file.v3.FileAccessLog")
MetadataFormatter = _message("envoy.extensions.formatter.metadata.v3.Metadata")
OpenTelemetryAccessLog = _message(
    "envoy.extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig"
)
ReqWithoutQueryFormatter = _message("envoy.extensions.formatter.req_without_query.v3.ReqWithoutQuery")
StatsAccessLog = _message("envoy.extensions.access_loggers.stats.v3.Config")
StdoutAccessLog = _message("envoy.extensions.access_loggers.stream.v3.StdoutAccessLog")

# Traces
CustomTag = _message("envoy.type.tracing.v3.CustomTag")
ParentBasedSamplerConfig = _message(
    "envoy.extensions.tracers.opentelemetry.samplers.v3.ParentBasedSamplerConfig"
)
TraceIdRatioBasedSamplerConfig = _message(
    "envoy.extensions.tracers.opentelemetry.samplers.v3.TraceIdRatioBasedSamplerConfig"
)
OpenTelemetryConfig = _message("envoy.config.trace.v3.OpenTelemetryConfig")
Tracing = _message(
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.Tracing"
)


def type_url(message: Message | type[Message]) -> str:
    """Return the type URL of a message or its class, as in `Any.type_url` and in discovery requests."""
    return f"type.googleapis.com/{message.DESCRIPTOR.full_name}"


def pack(message: Message) -> typing.Any:
    """Return an `Any` that holds the message; equal messages give equal bytes, also if they hold maps."""
    return Any(type_url=type_url(message), value=message.SerializeToString(deterministic=True))


def struct(values: Mapping[str, typing.Any]) -> typing.Any:
    """Return a `Struct` of JSON values (None, bool, int, float, str, list, dict); ValueError for others."""
    result = Struct()
    result.update(values)
    return result


def to_dict(message: Message) -> dict[str, typing.Any]:
    """Return the message as JSON values to print: field names as in the proto, the content of each Any shown.

    Raise TypeError for an Any of a type that `POOL` does not hold.
    """
    text = json_format.MessageToJson(message, preserving_proto_field_name=True, descriptor_pool=POOL)
    values: dict[str, typing.Any] = json.loads(text)  # plain dicts all the way down
    return values
