"""External authorization services; as Istio's sample, they let pass what has `x-ext-authz: allow`."""

from collections.abc import Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool

from tests.support.serving import serving_tcp

DENIED = b"denied by the authorization service"
_HEADER = "x-ext-authz"


@dataclass(frozen=True)
class Asked:
    """A question of Envoy's; header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class AuthorizationService:
    """A service on a free port of 127.0.0.1, and what it was asked."""

    port: int = 0
    asked: list[Asked] = field(default_factory=list)

    def only(self) -> Asked:
        """Return the one question since the last look."""
        (one,) = self.asked
        self.asked.clear()
        return one


@contextmanager
def running_http_service() -> Iterator[AuthorizationService]:
    """Run an HTTP service: 200 with `x-user: alice`, or 403 with `x-reason`."""
    service = AuthorizationService()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", "0")))
            service.asked.append(Asked(self.command, self.path, headers, body))
            allowed = headers.get(_HEADER) == "allow"
            answer = b"" if allowed else DENIED
            self.send_response_only(200 if allowed else 403)
            self.send_header("content-length", str(len(answer)))
            self.send_header("x-user", "alice")
            self.send_header("x-reason", "policy")
            self.end_headers()
            self.wfile.write(answer)

    with serving_tcp(Handler) as service.port:
        yield service


@contextmanager
def running_grpc_service() -> Iterator[AuthorizationService]:
    """Run envoy.service.auth.v3.Authorization: OK, or PERMISSION_DENIED with 403."""
    service = AuthorizationService()

    def check(request: Any, _: grpc.ServicerContext) -> Any:
        http = request.attributes.request.http
        headers = {entry.key: entry.value for entry in http.headers}
        service.asked.append(Asked(http.method, http.path, headers, http.body.encode() or http.raw_body))
        if headers.get(_HEADER) == "allow":
            user = {"header": {"key": "x-user", "value": "alice"}}
            return _CheckResponse(status={"code": 0}, ok_response={"headers": [user]})
        reason = {"header": {"key": "x-reason", "value": "policy"}}
        denied = {"status": {"code": 403}, "headers": [reason], "body": DENIED.decode()}
        return _CheckResponse(status={"code": 7}, denied_response=denied)

    method = grpc.unary_unary_rpc_method_handler(
        check,
        request_deserializer=_CheckRequest.FromString,
        response_serializer=lambda response: response.SerializeToString(),
    )
    handler = grpc.method_handlers_generic_handler("envoy.service.auth.v3.Authorization", {"Check": method})
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((handler,))
    service.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield service
    finally:
        server.stop(None).wait()


# As much of envoy/service/auth/v3 as is looked at here; on the wire, a map is a list of key and value.

_MESSAGES: Mapping[str, Mapping[str, tuple[int, str]]] = {
    "Pair": {"key": (1, "string"), "value": (2, "string")},
    "HttpRequest": {
        "method": (2, "string"),
        "headers": (3, "[Pair]"),
        "path": (4, "string"),
        "body": (11, "string"),
        "raw_body": (12, "bytes"),
    },
    "Request": {"http": (2, "HttpRequest")},
    "Attributes": {"request": (4, "Request")},
    "CheckRequest": {"attributes": (1, "Attributes")},
    "Code": {"code": (1, "int32")},
    "Header": {"header": (1, "Pair")},
    "Denied": {"status": (1, "Code"), "headers": (2, "[Header]"), "body": (3, "string")},
    "Allowed": {"headers": (2, "[Header]")},
    "CheckResponse": {
        "status": (1, "Code"),
        "denied_response": (2, "Denied"),
        "ok_response": (3, "Allowed"),
    },
}


def _messages() -> tuple[Any, Any]:
    kinds = descriptor_pb2.FieldDescriptorProto
    scalars = {"string": kinds.TYPE_STRING, "bytes": kinds.TYPE_BYTES, "int32": kinds.TYPE_INT32}
    file = descriptor_pb2.FileDescriptorProto(name="check.proto", package="check", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, (number, kind) in fields.items():
            label = kinds.LABEL_REPEATED if kind.startswith("[") else kinds.LABEL_OPTIONAL
            made = message.field.add(name=field_name, number=number, label=label)
            of = kind.strip("[]")
            made.type = scalars.get(of, kinds.TYPE_MESSAGE)
            if of not in scalars:
                made.type_name = f".check.{of}"
    pool = DescriptorPool()
    pool.Add(file)
    request, response = (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"check.{name}"))
        for name in ("CheckRequest", "CheckResponse")
    )
    return request, response


_CheckRequest, _CheckResponse = _messages()
