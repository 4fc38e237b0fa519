"""Access logs for people and collectors (envoy.config.accesslog.v3.AccessLog)."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from google.protobuf.message import Message

from crds.extensionprovider import EnvoyFileAccessLog, EnvoyOtelAls, LogFormat
from crds.formats import JsonFormat, commands
from translator.collectors import grpc_service, http_service
from translator.features import Feature
from translator.older_envoy import STATE_METADATA
from translator.proxy import Proxy
from translator.services import ServiceDestination
from translator.telemetry import Logging, logging
from translator.world import World
from xds import protos

DEFAULT_TEXT = (
    '[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% '
    "%RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% "
    '"%UPSTREAM_TRANSPORT_FAILURE_REASON%" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% '
    '%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "%REQ(X-FORWARDED-FOR)%" "%REQ(USER-AGENT)%" '
    '"%REQ(X-REQUEST-ID)%" "%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%" %UPSTREAM_CLUSTER_RAW% '
    "%UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% "
    "%REQUESTED_SERVER_NAME% %ROUTE_NAME%\n"
)
"""Istio's EnvoyTextLogFormat (pilot/pkg/model/telemetry_logging.go)."""

DEFAULT_JSON: JsonFormat = {
    "authority": "%REQ(:AUTHORITY)%",
    "bytes_received": "%BYTES_RECEIVED%",
    "bytes_sent": "%BYTES_SENT%",
    "connection_termination_details": "%CONNECTION_TERMINATION_DETAILS%",
    "downstream_local_address": "%DOWNSTREAM_LOCAL_ADDRESS%",
    "downstream_remote_address": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "duration": "%DURATION%",
    "method": "%REQ(:METHOD)%",
    "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
    "protocol": "%PROTOCOL%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "requested_server_name": "%REQUESTED_SERVER_NAME%",
    "response_code": "%RESPONSE_CODE%",
    "response_code_details": "%RESPONSE_CODE_DETAILS%",
    "response_flags": "%RESPONSE_FLAGS%",
    "route_name": "%ROUTE_NAME%",
    "start_time": "%START_TIME%",
    "upstream_cluster": "%UPSTREAM_CLUSTER_RAW%",
    "upstream_host": "%UPSTREAM_HOST%",
    "upstream_local_address": "%UPSTREAM_LOCAL_ADDRESS%",
    "upstream_service_time": "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%",
    "upstream_transport_failure_reason": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    "user_agent": "%REQ(USER-AGENT)%",
    "x_forwarded_for": "%REQ(X-FORWARDED-FOR)%",
}
"""Istio's EnvoyJSONLogFormatIstio."""

_STATE = re.compile(r"%FILTER_STATE\(((?:wasm\.asm\.llmproxy|llm)\.[^:()]+)(?::PLAIN)?\)")
_FORMATTERS = {"REQ_WITHOUT_QUERY": ("envoy.formatter.req_without_query", protos.ReqWithoutQueryFormatter)}
"""Extensions of Envoy's formats that are not built in."""


def access_logs(world: World, proxy: Proxy) -> list[Message]:
    """Make the access logs that users want of a proxy."""
    found = logging(world, proxy)
    if found is not None:
        return [_access_log(world, proxy, log) for log in found]
    config = world.mesh.config
    if not config.access_log_file:
        return []
    return [_file(proxy, config.access_log_file, _mesh_format(world), omits_empty=False)]


def services(world: World, proxy: Proxy) -> Iterator[ServiceDestination]:
    """Name the collectors that a proxy's access logs go to."""
    for log in logging(world, proxy) or ():
        if log.provider.envoy_otel_als is not None:
            yield _collector(log.provider.envoy_otel_als)


def when(*expressions: str) -> dict[str, Any]:
    """Make the filter that lets through what all CEL expressions hold for."""
    filters = [
        {
            "extension_filter": {
                "name": "envoy.access_loggers.extension_filters.cel",
                "typed_config": protos.pack(protos.ExpressionFilter(expression=expression)),
            }
        }
        for expression in expressions
    ]
    return filters[0] if len(filters) == 1 else {"and_filter": {"filters": filters}}


def _access_log(world: World, proxy: Proxy, log: Logging) -> Message:
    provider = log.provider
    made: Any
    if provider.envoy_otel_als is not None:
        made = _open_telemetry(proxy, provider.envoy_otel_als)
    else:
        file = provider.envoy_file_access_log or EnvoyFileAccessLog()
        is_unset = provider.name == "envoy" and file.log_format is None and not file.omit_empty_values
        log_format = _mesh_format(world) if is_unset else _format_of(file)
        made = _file(proxy, file.path, log_format, omits_empty=file.omit_empty_values)
    if log.expression is None:
        return made
    return protos.AccessLog(name=made.name, typed_config=made.typed_config, filter=when(log.expression))


def _mesh_format(world: World) -> str | JsonFormat:
    config = world.mesh.config
    if config.access_log_encoding == "JSON":
        return config.json_format or DEFAULT_JSON
    return config.text_format or DEFAULT_TEXT


def _format_of(file: EnvoyFileAccessLog) -> str | JsonFormat:
    if file.log_format is not None and file.log_format.labels is not None:
        return file.log_format.labels or DEFAULT_JSON
    return (file.log_format.text if file.log_format else "") or DEFAULT_TEXT


def _file(proxy: Proxy, path: str, log_format: str | JsonFormat, *, omits_empty: bool) -> Message:
    log_format = _for_version(proxy, log_format)
    options: dict[str, Any] = {"omit_empty_values": omits_empty, "formatters": _formatters([log_format])}
    if isinstance(log_format, str):
        options["text_format_source"] = {"inline_string": log_format}
    else:
        options["json_format"] = protos.struct(log_format)
    config = protos.FileAccessLog(path=path, log_format=options)
    return protos.AccessLog(name="envoy.access_loggers.file", typed_config=protos.pack(config))


def _open_telemetry(proxy: Proxy, als: EnvoyOtelAls) -> Message:
    log_format = als.log_format or LogFormat()
    text = _for_version(proxy, log_format.text or DEFAULT_TEXT)
    labels = _for_version(proxy, log_format.labels or {})
    collector = _collector(als)
    config = protos.OpenTelemetryAccessLog(
        disable_builtin_labels=True,
        resource_attributes={"values": [_attribute("service.name", f"{proxy.workload}.{proxy.namespace}")]},
        body={"string_value": text.removesuffix("\n")},
        attributes={"values": [_attribute(name, value) for name, value in sorted(labels.items())]},
        formatters=_formatters([text, labels]),
    )
    if als.http is not None:
        config.http_service.CopyFrom(http_service(collector, als.http))
        config.log_name = als.log_name
    else:
        config.common_config.CopyFrom(
            type(config.common_config)(
                log_name=als.log_name, transport_api_version="V3", grpc_service=grpc_service(collector)
            )
        )
    return protos.AccessLog(name="envoy.access_loggers.open_telemetry", typed_config=protos.pack(config))


def _attribute(name: str, value: object) -> dict[str, Any]:
    return {"key": name, "value": {"string_value": value if isinstance(value, str) else ""}}


def _collector(als: EnvoyOtelAls) -> ServiceDestination:
    return ServiceDestination.of(als.service, als.port, http2=als.http is None)


def _formatters(formats: Iterable[str | JsonFormat]) -> list[dict[str, Any]]:
    used = {command for each in formats for command in commands(each)}
    return [
        {"name": name, "typed_config": protos.pack(config())}
        for command, (name, config) in _FORMATTERS.items()
        if command in used
    ]


def _for_version(proxy: Proxy, log_format: Any) -> Any:
    """Read filter state from where an Envoy has it whose Lua cannot set filter state."""
    if proxy.supports(Feature.LUA_FILTER_STATE):
        return log_format
    if isinstance(log_format, str):
        return _STATE.sub(rf"%DYNAMIC_METADATA({STATE_METADATA}:\1)", log_format)
    if isinstance(log_format, Mapping):
        return {name: _for_version(proxy, value) for name, value in log_format.items()}
    if isinstance(log_format, list):
        return [_for_version(proxy, item) for item in log_format]
    return log_format
