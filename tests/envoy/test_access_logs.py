"""Access logs of a real Envoy: the fields of seed 002, Telemetry objects, collectors, and never a key."""

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import yaml

from crds.formats import check_format
from crds.loader import load
from crds.meshconfig import load_mesh_config
from crds.problems import Severity
from llmplane.fakellm import Fault
from tests.envoy.conftest import DASHSCOPE, KEYS, MOONSHOT, Lab, running_lab
from tests.support.collector import Collector, running_collector
from tests.support.envoy import running_envoy
from tests.support.objects import backends, provider, route
from tests.support.wait import eventually

FIELDS = {
    "duration": "%DURATION%",
    "response_code": "%RESPONSE_CODE%",
    "authority_for": "%REQ(:AUTHORITY)%",
    "request_model": "FILTER_STATE(wasm.asm.llmproxy.request_model:PLAIN)",
    "request_prompt_tokens": "FILTER_STATE(wasm.asm.llmproxy.request_prompt_tokens:PLAIN)",
    "request_completion_tokens": "FILTER_STATE(wasm.asm.llmproxy.request_completion_tokens:PLAIN)",
}
"""The document's fields, written as it writes them."""
QWEN = provider("dashscope", DASHSCOPE, key=KEYS[DASHSCOPE], model="qwen-1.8b-chat")
JSON_LOG = {
    "accessLogFile": "/dev/stdout",
    "accessLogEncoding": "JSON",
    "accessLogFormat": json.dumps(FIELDS),
}


class LoggingLab:
    """A lab whose mesh configuration is a file that tests write."""

    def __init__(self, lab: Lab, mesh_file: Path) -> None:
        self.lab = lab
        self._mesh_file = mesh_file
        self._read = 0
        self._lines = 0

    def configure(self, mesh: dict[str, Any], *documents: str) -> None:
        """Make this the whole configuration, and wait until the sidecar has it."""
        # A field without effect is told of, with its line: so it shows when the file was read.
        self._lines += 1
        text = "\n" * self._lines + yaml.safe_dump({"ingressClass": "x", **mesh}, sort_keys=False)
        self._mesh_file.write_text(text)
        read = f"{self._mesh_file}:{self._lines + 1}: warning: ingressClass"
        eventually(lambda: read in json.dumps(self.lab.mesh.status()["problems"]))
        self.lab.apply(*documents)
        self.lines()

    def lines(self) -> list[str]:
        """Return what Envoy printed since the last look."""
        text = self.lab.mesh.log("sidecar")
        new, self._read = text[self._read :], len(text)
        return [line for line in new.splitlines() if "][warning][" not in line]

    def line(self) -> str:
        """Return the next line that Envoy prints."""
        found: list[str] = []

        def look() -> bool:
            found.extend(self.lines())
            return bool(found)

        eventually(look)
        (line,) = found
        return line


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[LoggingLab]:
    mesh_file = tmp_path_factory.mktemp("mesh") / "mesh.yaml"
    mesh_file.write_text("{}\n")
    options = ["--mesh-config", str(mesh_file)]
    for port in (collector.grpc_port, collector.http_port):
        options += ["--connect-to", f"collector.example.com:{port}:127.0.0.1:{port}"]
    with running_lab(options=options) as lab:
        yield LoggingLab(lab, mesh_file)


@pytest.fixture
def logging(shared: LoggingLab, collector: Collector) -> LoggingLab:
    collector.exports.clear()
    for host in shared.lab.fake.hosts:
        shared.lab.fake.set_fault(host, None)
    return shared


def telemetry(name: str, spec: dict[str, Any]) -> str:
    namespace, _, name = name.rpartition("/")
    metadata = {"name": name, "namespace": namespace}
    return json.dumps(
        {"apiVersion": "telemetry.istio.io/v1", "kind": "Telemetry", "metadata": metadata, "spec": spec}
    )


def test_the_fields_of_the_document(logging: LoggingLab) -> None:
    """Model and tokens as the provider reports them, with the operators unchanged."""
    logging.configure(JSON_LOG, QWEN)
    logging.lab.client.request(DASHSCOPE)
    line = json.loads(logging.line())
    assert line.pop("duration") >= 0
    assert line == {
        "authority_for": DASHSCOPE,
        "request_completion_tokens": "72",
        "request_model": "qwen-1.8b-chat",
        "request_prompt_tokens": "3",
        "response_code": 200,
    }


def test_the_documents_text_as_it_is(logging: LoggingLab) -> None:
    """What the document prints, pasted as a text format."""
    text = " ".join(
        f"{name} {value}" for name, value in FIELDS.items() if "tokens" in name or "model" in name
    )
    logging.configure({"accessLogFile": "/dev/stdout", "accessLogFormat": text}, QWEN)
    logging.lab.client.request(DASHSCOPE)
    assert logging.line() == (
        "request_model qwen-1.8b-chat request_prompt_tokens 3 request_completion_tokens 72"
    )


def test_a_refused_request_has_no_model_and_no_tokens(logging: LoggingLab) -> None:
    logging.configure(JSON_LOG, QWEN)
    assert logging.lab.client.request("nowhere.example.com").status == 404
    line = json.loads(logging.line())
    assert (line["response_code"], line["request_model"], line["request_prompt_tokens"]) == (404, None, None)


def test_istios_default_format(logging: LoggingLab) -> None:
    logging.configure({"accessLogFile": "/dev/stdout"}, QWEN)
    logging.lab.client.request(DASHSCOPE)
    line = logging.line()
    assert (
        '"POST /compatible-mode' in line or '"POST /v1/chat/completions HTTP/1.1" 200 - via_upstream' in line
    )


def file_log(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "envoyFileAccessLog": {"path": "/dev/stdout", "logFormat": {"text": text}}}


def test_telemetry_of_namespace_and_workload_wins(logging: LoggingLab) -> None:
    """Istio's precedence: mesh, then namespace, then workload; what is nearer replaces what is wider."""
    mesh = {"extensionProviders": [file_log(name, name) for name in ("mesh", "namespace", "workload")]}
    of = {
        name: telemetry(
            f"{'istio-system' if name == 'mesh' else 'default'}/{name}",
            {
                "accessLogging": [{"providers": [{"name": name}]}],
                **({"selector": {"matchLabels": {"app": "sleep"}}} if name == "workload" else {}),
            },
        )
        for name in ("mesh", "namespace", "workload")
    }
    for names in (["mesh"], ["mesh", "namespace"], ["mesh", "namespace", "workload"]):
        logging.configure(mesh, QWEN, *(of[name] for name in names))
        logging.lab.client.request(DASHSCOPE)
        assert logging.line() == names[-1]


def test_a_filter_says_which_requests_are_logged(logging: LoggingLab) -> None:
    mesh = {"extensionProviders": [file_log("errors", "%RESPONSE_CODE%")]}
    spec = {
        "accessLogging": [
            {"providers": [{"name": "errors"}], "filter": {"expression": "response.code >= 400"}}
        ]
    }
    logging.configure(mesh, QWEN, telemetry("istio-system/mesh", spec))
    logging.lab.client.request(DASHSCOPE)
    logging.lab.client.request("nowhere.example.com")
    assert logging.line() == "404"


def test_a_filter_may_look_at_the_model(logging: LoggingLab) -> None:
    """Filter state is bytes in CEL."""
    mesh = {"extensionProviders": [file_log("qwen", "%RESPONSE_CODE%")]}
    expression = 'filter_state["wasm.asm.llmproxy.request_model"] == bytes("qwen-1.8b-chat")'
    spec = {"accessLogging": [{"providers": [{"name": "qwen"}], "filter": {"expression": expression}}]}
    logging.configure(
        mesh, QWEN, provider("moonshot", MOONSHOT, KEYS[MOONSHOT]), telemetry("istio-system/mesh", spec)
    )
    logging.lab.client.request(MOONSHOT)
    logging.lab.client.request(DASHSCOPE)
    assert logging.line() == "200"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_logs_for_a_collector(logging: LoggingLab, collector: Collector, protocol: str) -> None:
    port = collector.grpc_port if protocol == "grpc" else collector.http_port
    als: dict[str, Any] = {
        "service": "collector.example.com",
        "port": port,
        "logFormat": {"labels": {"model": FIELDS["request_model"]}},
    }
    if protocol == "http":
        als["http"] = {"path": "/v1/logs"}
    mesh = {
        "extensionProviders": [{"name": "otel", "envoyOtelAls": als}],
        "defaultProviders": {"accessLogging": ["otel"]},
    }
    logging.configure(mesh, QWEN)
    logging.lab.client.request(DASHSCOPE)
    eventually(lambda: b"qwen-1.8b-chat" in collector.data)
    assert KEYS[DASHSCOPE].encode() not in collector.data


def test_a_broken_mesh_configuration_changes_nothing(logging: LoggingLab) -> None:
    logging.configure({"accessLogFile": "/dev/stdout", "accessLogFormat": "good"}, QWEN)
    logging._mesh_file.write_text("accessLogFile: /dev/stdout\naccessLogFormat: '%REQ(authorization)%'\n")
    eventually(lambda: "accessLogFormat" in json.dumps(logging.lab.mesh.status()["problems"]))
    logging.lab.client.request(DASHSCOPE)
    assert logging.line() == "good"


PRINTED = [
    "%REQ(AUTHORIZATION)%",
    "%REQ(authorization):9%",
    "%REQ(x-none?authorization)%",
    "%REQUEST_HEADER(Authorization)%",
    "%STREAM_INFO_REQ(authorization)%",
    '%COALESCE({"operators": [{"command": "REQ", "param": "authorization"}]})%',
    "%CEL(request.headers['authorization'])%",
    '%CEL(request.headers["Authorization".size() > 1 ? "authorization" : "x"])%',
    "%CEL(request.headers.authorization)%",
    "%CEL(request['headers']['authorization'])%",
    "%CEL((request).headers['authorization'])%",
    "%CEL(request.headers['author' + 'ization'])%",
    "%CEL([request][0].headers['authorization'])%",
    "%CEL({'a': request}.a.headers['authorization'])%",
    "%CEL(request.headers['\\x61uthorization'])%",
    "%CEL(request.headers)%",
    "%CEL(request.headers['authorization'].startsWith('Bearer s'))%",
    "%CEL(request)%",
    "%ENVIRONMENT(SOME_KEY)%",
]
"""What Envoy takes, and prints a key for in most cases."""

LEAKS = [
    *PRINTED,
    "%ENVIRONMENT(DASHSCOPE_API_KEY)%",
    '%CEL(request.headers["auth"+"orization"])%',
    "%CEL(request.headers['AUTHORIZATION'])%",
    "%CEL(request.headers[request.headers['x-which']])%",
    "%CEL(request.headers[['authorization'][0]])%",
    "%CEL(request.headers.map(h, request.headers[h]))%",
    "%CEL(request.headers.exists(h, request.headers[h].startsWith('Bearer sk-a')))%",
    "%CEL([request.headers])%",
    "%CEL({'all': request.headers})%",
    "%CEL(dyn(request).headers['authorization'])%",
    "%CEL(true ? request.headers['authorization'] : '')%",
    "%CEL(size(request.headers['authorization']))%",
    "%CEL(request.headers['authorization'] == request.headers['x-guess'])%",
    "%CEL(request.headers['x-guess'] in request.headers)%",
    "%CEL('Bearer sk-a' < request.headers['authorization'])%",
    "%CEL(response.headers['set-cookie'])%",
    "%CEL(response.trailers['x-auth-token'])%",
    "%CEL(metadata)%",
    "%CEL(metadata.filter_metadata)%",
    "%CEL(metadata.filter_metadata['envoy.filters.http.jwt_authn'])%",
    "%CEL(filter_state)%",
    "%CEL(filter_state['x-api-key'])%",
    "%CEL(upstream_filter_state)%",
    "%REQ_WITHOUT_QUERY(X-NONE?AUTHORIZATION)%",
    "%REQ(COOKIE)% %REQ(PROXY-AUTHORIZATION)%",
    "%REQ(X-API-KEY)%",
    "%REQ(X-GOOG-API-KEY)%",
    "%RESP(X-NONE?SET-COOKIE)%",
    "%RESPONSE_TRAILER(X-AUTH-TOKEN)%",
    "%QUERY_PARAM(api_key)%",
    "%START_TIME(%REQ(authorization)%)%",
    "%DYNAMIC_METADATA(envoy.filters.http.jwt_authn)%",
    "%DYNAMIC_METADATA(envoy.filters.http.jwt_authn:payload)%",
    "%METADATA(DYNAMIC:envoy.filters.http.jwt_authn:payload)%",
    "%METADATA(DYNAMIC:envoy.filters.http.ext_authz)%",
    "%METADATA(DYNAMIC:envoy.filters.http.ext_authz:token)%",
    "%FILTER_STATE(session:PLAIN)%",
    "%FILE_CONTENT(/etc/hostname)%",
    "%FILE(/etc/hostname)%",
    "%SECRET(key/default/dashscope)%",
]
"""What would print a key, or tell of it."""

SAFE = [
    "%REQ(:AUTHORITY)% %REQ(:PATH)% %REQ(USER-AGENT?CONTENT-TYPE)% %RESP(CONTENT-TYPE)% %TRAILER(X)%",
    "%REQUEST_HEADERS_BYTES% %DOWNSTREAM_HEADER_BYTES_RECEIVED% %UPSTREAM_HEADER_BYTES_SENT%",
    "%REQ_WITHOUT_QUERY(:PATH)% %PATH(NQ)% %QUERY_PARAMS(ORIG)% %QUERY_PARAM(a)% %STREAM_ID% %TRACE_ID%",
    "%FILTER_STATE(llm.attempt)% %FILTER_STATE(llm.path:PLAIN)% %UPSTREAM_FILTER_STATE(llm.path:PLAIN)%",
    "%DYNAMIC_METADATA(llm:error)% %DYNAMIC_METADATA(envoy.filters.http.credential_injector:x)%",
    "%METADATA(CLUSTER:llm)% %METADATA(ROUTE:llm)% %METADATA(LISTENER:llm)% %CLUSTER_METADATA(llm)%",
    "%UPSTREAM_METADATA(llm:a)% %LOCAL_REPLY_BODY% %RESPONSE_CODE_DETAILS% %UPSTREAM_CLUSTER_RAW%",
    "%CEL(request.path)% %CEL(request.host)% %CEL(request.id)% %CEL(request.query)% %CEL(request.referer)%",
    "%CEL(response.code_details)% %CEL(xds.node)% %CEL(xds.cluster_metadata)% %CEL(xds.route_metadata)%",
    "%CEL(metadata.filter_metadata['llm']['error'])% %CEL(filter_state['llm.attempt'])%",
    "%CEL('authorization' in request.headers)% %CEL(request.headers['x-a'])% %ENVIRONMENT(HOSTNAME)%",
    "%UPSTREAM_TRANSPORT_FAILURE_REASON% %CONNECTION_TERMINATION_DETAILS% %UPSTREAM_PEER_CERT%",
    "%DYNAMIC_METADATA(llm:error)% %METADATA(DYNAMIC:llm:error)% %METADATA(UPSTREAM_HOST:llm)%",
    "%METADATA(VIRTUAL_HOST:llm)% %METADATA(CLUSTER:envoy)% %METADATA(LISTENER_FILTER_CHAIN:a)%",
    "%FILTER_STATE(llm.model_label)% %FILTER_STATE(llm.client)% %FILTER_STATE(llm.usage:TYPED)%",
    "%CEL(xds.upstream_host_metadata)% %CEL(xds.listener_metadata)% %CEL(xds.virtual_host_metadata)%",
    "%CEL(request.url_path)% %CEL(request.useragent)% %CEL(response.flags)% %CEL(upstream.address)%",
    "%CEL(connection.id)% %CEL(connection.requested_server_name)% %CEL(upstream.transport_failure_reason)%",
    "%CEL(response.headers['x-request-id'])% %CEL('x-a' in response.headers ? 'a' : 'b')%",
    "%CEL(request.headers['x-a'] + request.headers['x-b'])% %CEL([request.path, request.host][0])%",
    "%UPSTREAM_HOSTS_ATTEMPTED% %RESPONSE_FLAGS_LONG% %REQ(VIA?X-ENVOY-ORIGINAL-PATH)% %CUSTOM_FLAGS%",
]
"""What may be written, and so must never print a key."""


@pytest.mark.parametrize("leak", LEAKS)
def test_what_could_print_a_key_is_refused(leak: str) -> None:
    with pytest.raises(ValueError, match=r"^(%[A-Z_]+%: )?(must|is|has|calls|uses|takes)"):
        check_format(leak)


EXPRESSIONS = [leak[5:-2] for leak in LEAKS if leak.startswith("%CEL(")]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_no_filter_can_be_asked_what_a_key_is(expression: str) -> None:
    """Whether a line is there would tell of a key, one question at a time; so would a label."""
    entry = {"providers": [{"name": "envoy"}], "filter": {"expression": f"{expression} != ''"}}
    assert refusals(telemetry("default/a", {"accessLogging": [entry]}))
    entry["filter"] = {"expression": expression}
    assert refusals(telemetry("default/a", {"accessLogging": [entry]}))
    override = {"tagOverrides": {"label": {"value": expression}}}
    assert refusals(telemetry("default/a", {"metrics": [{"overrides": [override]}]}))


@pytest.mark.parametrize(
    "tag",
    [
        *({"formatter": {"value": leak}} for leak in LEAKS),
        *({"header": {"name": name}} for name in ("authorization", "Cookie", "x-api-key", "X-Auth-Token")),
        *({"environment": {"name": name}} for name in ("OPENAI_API_KEY", "SOME", "PATH")),
    ],
)
def test_no_attribute_of_a_trace_can_be_a_key(tag: dict[str, Any]) -> None:
    assert refusals(telemetry("default/a", {"tracing": [{"customTags": {"tag": tag}}]}))


@pytest.mark.parametrize("leak", [*LEAKS, "REQ(authorization)", "CEL(request.headers)"])
def test_nor_a_member_of_a_log_in_json(leak: str) -> None:
    """At whatever depth, and written with or without percent signs."""
    for value in (leak, [leak], {"a": {"b": leak}}):
        mesh = {"accessLogEncoding": "JSON", "accessLogFormat": json.dumps({"field": value})}
        labels = {"envoyFileAccessLog": {"logFormat": {"labels": {"field": value}}}}
        otel = {"service": "a.example.com", "port": 4317, "logFormat": {"labels": {"field": value}}}
        for config in (
            mesh,
            {"extensionProviders": [{"name": "a", **labels}]},
            {"extensionProviders": [{"name": "a", "envoyOtelAls": otel}]},
        ):
            made, _ = load_mesh_config(yaml.safe_dump(config), "mesh.yaml")
            assert made is None


def refusals(document: str) -> list[str]:
    """Return why an object is refused."""
    return [
        str(problem)
        for problem in load(document, "objects.yaml", {}).problems
        if problem.severity is Severity.ERROR
    ]


def test_why_they_are_refused(tmp_path: Path) -> None:
    """Envoy itself would print the key for most of them: the list above is no guesswork."""
    log = tmp_path / "log"
    key = "sk-of-the-provider"
    set_key = f"function envoy_on_request(h) h:headers():replace('authorization', 'Bearer {key}') end"
    types = "type.googleapis.com/envoy.extensions"
    manager = {
        "@type": f"{types}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "x",
        "access_log": [
            {
                "name": "file",
                "typed_config": {
                    "@type": f"{types}.access_loggers.file.v3.FileAccessLog",
                    "path": str(log),
                    "log_format": {"text_format_source": {"inline_string": f"{number} {leak}\n"}},
                },
            }
            for number, leak in enumerate(PRINTED)
        ],
        "http_filters": [
            {
                "name": "lua",
                "typed_config": {
                    "@type": f"{types}.filters.http.lua.v3.Lua",
                    "default_source_code": {"inline_string": set_key},
                },
            },
            {"name": "router", "typed_config": {"@type": f"{types}.filters.http.router.v3.Router"}},
        ],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "x",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "direct_response": {"status": 200}}],
                }
            ]
        },
    }
    listener = {
        "name": "in",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    with running_envoy(
        {"static_resources": {"listeners": [listener]}}, "--file-flush-interval-msec", "50"
    ) as envoy:
        connection = HTTPConnection("127.0.0.1", envoy.port("in"))
        connection.request("GET", "/")
        connection.getresponse().read()
        connection.close()
        eventually(lambda: log.read_text().count("\n") >= len(PRINTED))
    printing = [line for line in log.read_text().splitlines() if key in line]
    assert len(printing) >= 10


def test_no_form_that_is_allowed_prints_a_key(logging: LoggingLab) -> None:
    """On success, on a retry at another provider, when the client goes away, and on Envoy's own answers."""
    mesh = {
        "extensionProviders": [
            file_log("text", " | ".join(SAFE)),
            {
                "name": "json",
                "envoyFileAccessLog": {"logFormat": {"labels": {str(i): s for i, s in enumerate(SAFE)}}},
            },
        ],
        "defaultProviders": {"accessLogging": ["text", "json"]},
    }
    rule = {"backendRefs": [{**ref, "priority": i} for i, ref in enumerate(backends(DASHSCOPE, MOONSHOT))]}
    logging.configure(
        mesh,
        QWEN,
        provider("moonshot", MOONSHOT, key=KEYS[MOONSHOT]),
        route("both", "demo-llm-server", {**rule, "retries": {"attempts": 2, "retryOn": "5xx"}}),
    )
    client, fake = logging.lab.client, logging.lab.fake
    assert client.request(DASHSCOPE, headers={"authorization": "Bearer sk-client-0123456789"}).status == 200
    fake.set_fault(DASHSCOPE, Fault(status=503))
    assert client.request("demo-llm-server").status == 200
    assert client.request("nowhere.example.com").status == 404
    assert client.request(DASHSCOPE, b"no JSON").status == 400
    fake.set_fault(DASHSCOPE, Fault(delay=30))
    with pytest.raises(TimeoutError):
        client.request(DASHSCOPE, timeout=0.3)
    found: list[str] = []
    eventually(lambda: found.extend(logging.lines()) or len(found) >= 10)
    assert "qwen-1.8b-chat" not in KEYS.values()
    for key in (*KEYS.values(), "sk-client-0123456789"):
        assert key not in "\n".join(found)
