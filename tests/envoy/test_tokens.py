"""What the Lua script reads of responses, in a real Envoy: the filter state of logs and metrics.

The expected values are written by hand, from what the vendors' API references say that the members mean.
"""

import http.client
import itertools
import json
import re
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.envoy import Envoy, running_envoy
from tests.support.lua import filter_state, provider_filter
from tests.support.scripted import Script, ScriptedServer, cut, running_scripted_server
from translator.lua import SCRIPT, Operation, filter_context
from translator.operations import STREAM_USAGE

pytestmark = pytest.mark.envoy

EXTENSIONS = "type.googleapis.com/envoy.extensions."
STATE = {
    "model": "wasm.asm.llmproxy.request_model",
    "prompt": "wasm.asm.llmproxy.request_prompt_tokens",
    "completion": "wasm.asm.llmproxy.request_completion_tokens",
    "total": "llm.total_tokens",
    "cached": "llm.cached_tokens",
    "reasoning": "llm.reasoning_tokens",
    "usage": "llm.usage",
    "stream": "llm.stream",
    "response_model": "llm.response_model",
    "operation": "llm.operation",
    "first": "llm.time_to_first_token",
    "each": "llm.time_per_output_token",
    "retried": "llm.retried_prompt_tokens",
}
JSON = (("content-type", "application/json"),)
EVENTS = (("content-type", "text/event-stream; charset=utf-8"),)
CUTS = (0, *range(1, 65), 100, 127, 200, 255, 1000)
BIG_CUTS = (0, 1, 2, 7, 64, 255, 1000)

# --------------------------------------------------------------------------------------------------
# An Envoy


def operations(*, stream_usage: bool) -> list[Operation]:
    members = (STREAM_USAGE,) if stream_usage else ()
    return [
        Operation("POST", "/chat/completions", "/v1/chat/completions", members),
        Operation("POST", "/completions", "/v1/completions", members),
        Operation("POST", "/embeddings", "/v1/embeddings", ()),
        Operation("POST", "/responses", "/v1/responses", ()),
        Operation("POST", "/messages", "/v1/messages", ()),
        Operation("POST", "/gemini-2.0:streamGenerateContent", "/v1beta/models/gemini-2.0:generate", ()),
        Operation("POST", "/audio/transcriptions", "/v1/audio/transcriptions"),
        Operation("GET", "/models", "/v1/models"),
    ]


def cluster(name: str, port: int, script: str) -> dict[str, Any]:
    protocol = "http2_protocol_options" if name.startswith("h2") else "http_protocol_options"
    context = filter_context("provider.example", operations(stream_usage="plain" not in name))
    lua = provider_filter(context, script)
    codec = {"@type": f"{EXTENSIONS}filters.http.upstream_codec.v3.UpstreamCodec"}
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {
        "name": name,
        "type": "STATIC",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
        "typed_extension_protocol_options": {
            options: {
                "@type": f"type.googleapis.com/{options}",
                "explicit_http_config": {protocol: {}},
                "http_filters": [
                    {"name": "llm.provider", "typed_config": lua},
                    {"name": "codec", "typed_config": codec},
                ],
            }
        },
    }


def bootstrap(port: int, log: Path) -> dict[str, Any]:
    scripts = {
        "h1": SCRIPT,
        "h2": SCRIPT,
        "h1-plain": SCRIPT,  # streamUsage: false
        "h2-broken": SCRIPT.replace("local function finish_object(r)", "local function finish_object()"),
    }
    assert scripts["h2-broken"] != SCRIPT
    retry = {"retry_on": "5xx", "num_retries": 1}
    route = {"timeout": "0s", "retry_policy": retry}
    hosts = [
        {
            "name": name,
            "domains": [name],
            "request_body_buffer_limit": 33554432,
            "routes": [{"match": {"prefix": "/"}, "route": {"cluster": name, **route}}],
        }
        for name in scripts
    ]
    fields = {name: filter_state(key) for name, key in STATE.items()}
    fields |= {
        "id": "%REQ(x-test)%",
        "flags": "%RESPONSE_FLAGS%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
    }
    manager = {
        "@type": f"{EXTENSIONS}filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "test",
        "access_log": [
            {
                "name": "file",
                "typed_config": {
                    "@type": f"{EXTENSIONS}access_loggers.file.v3.FileAccessLog",
                    "path": str(log),
                    "log_format": {"json_format": fields},
                },
            }
        ],
        "http_filters": [
            {"name": "router", "typed_config": {"@type": f"{EXTENSIONS}filters.http.router.v3.Router"}}
        ],
        "route_config": {"name": "test", "virtual_hosts": hosts},
    }
    listener = {
        "name": "test",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
        "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}],
    }
    return {
        "static_resources": {
            "listeners": [listener],
            "clusters": [cluster(name, port, script) for name, script in scripts.items()],
        }
    }


@dataclass
class World:
    """A client, and the provider that it reaches through Envoy."""

    envoy: Envoy
    provider: ScriptedServer
    log: Path
    _ids: Iterator[int] = field(default_factory=itertools.count)

    def send(
        self,
        script: Script,
        *,
        host: str = "h2",
        path: str = "/v1/chat/completions",
        body: bytes | None = b'{"model":"gpt-4o"}',
    ) -> tuple[str, http.client.HTTPMessage, bytes]:
        """Send a request that the provider answers with the script; return its id and the answer."""
        self.provider.answer(script)
        return self.request(host, path, body)

    def request(self, host: str, path: str, body: bytes | None) -> tuple[str, http.client.HTTPMessage, bytes]:
        name = str(next(self._ids))
        connection = self.connect()
        headers = {"host": host, "x-test": name, "content-type": "application/json"}
        connection.request("POST" if body is not None else "GET", path, body, headers)
        response = connection.getresponse()
        received = response.read()
        connection.close()
        return name, response.headers, received

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.envoy.port("test"), timeout=30)

    def logged(self, name: str) -> dict[str, Any]:
        """Return what the log says of a request, without what is absent."""
        return self.all_logged([name])[name]

    def all_logged(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        deadline = time.monotonic() + 60
        while True:
            lines = (
                json.loads(line)
                for line in self.log.read_text().splitlines(keepends=True)
                if line[-1:] == "\n"
            )
            found = {line["id"]: {k: v for k, v in line.items() if v is not None} for line in lines}
            if all(name in found for name in names):
                return found
            assert time.monotonic() < deadline, "not logged"
            time.sleep(0.01)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    log = tmp_path_factory.mktemp("envoy") / "access.log"
    log.touch()
    with ExitStack() as stack:
        provider = stack.enter_context(running_scripted_server())
        envoy = stack.enter_context(
            running_envoy(bootstrap(provider.port, log), "--file-flush-interval-msec", "5")
        )
        yield World(envoy, provider, log)


# --------------------------------------------------------------------------------------------------
# The shapes of answers


def dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def events(*values: Any, end: bytes = b"data: [DONE]\n\n") -> bytes:
    return b"".join(b"data: " + dump(value) + b"\n\n" for value in values) + end


def typed(*values: dict[str, Any]) -> bytes:
    """Events with their type in a line of its own, as Anthropic's and those of OpenAI's Responses."""
    return b"".join(b"event: %b\ndata: %b\n\n" % (value["type"].encode(), dump(value)) for value in values)


FOOL = 'a "usage": {"prompt_tokens": 9, "completion_tokens": 9} \\ "usage'
"""What a model may say. It must not be taken for usage."""

OPENAI_USAGE = {
    "prompt_tokens": 1234567,
    "completion_tokens": 7654321,
    "total_tokens": 8888888,
    "prompt_tokens_details": {"cached_tokens": 1024, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 320, "accepted_prediction_tokens": 5},
}
OPENAI = {
    "prompt": "1234567",
    "completion": "7654321",
    "total": "8888888",
    "cached": "1024",
    "reasoning": "320",
    "usage": "reported",
    "response_model": "gpt-4o-2024-08-06",
}
CHUNK = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-2024-08-06"}


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {**CHUNK, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


SAID = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "Hello"}),
    chunk({"content": FOOL}),
    chunk({"content": "你好 " * 3000}),
    chunk({}, "stop"),
]
USAGE_CHUNK = {**CHUNK, "choices": [], "usage": OPENAI_USAGE}
ANTHROPIC = {"prompt": "117", "completion": "34", "total": "151", "cached": "100", "usage": "reported"}
ANTHROPIC_INPUT = {"input_tokens": 12, "cache_creation_input_tokens": 5, "cache_read_input_tokens": 100}
ANTHROPIC_STREAM: list[dict[str, Any]] = [
    {
        "type": "message_start",
        "message": {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-3", "content": [],
                    "usage": {**ANTHROPIC_INPUT, "output_tokens": 1}},
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "ping"},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": FOOL}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 34}},
    {"type": "message_stop"},
]  # fmt: skip
RESPONSES_USAGE = {
    "input_tokens": 36,
    "input_tokens_details": {"cached_tokens": 8},
    "output_tokens": 87,
    "output_tokens_details": {"reasoning_tokens": 64},
    "total_tokens": 123,
}
RESPONSES = {"prompt": "36", "completion": "87", "total": "123", "cached": "8", "reasoning": "64"}
RESPONSES |= {"usage": "reported", "response_model": "gpt-4.1"}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "instructions": FOOL,
    "model": "gpt-4.1",
    "output": [{"type": "message", "content": [{"type": "output_text", "text": FOOL}]}],
    "usage": RESPONSES_USAGE,
}
GEMINI_USAGE = {
    "promptTokenCount": 6,
    "toolUsePromptTokenCount": 1,
    "cachedContentTokenCount": 4,
    "candidatesTokenCount": 20,
    "thoughtsTokenCount": 9,
    "totalTokenCount": 36,
    "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 6}],
}
GEMINI = {"prompt": "7", "completion": "29", "total": "36", "cached": "4", "reasoning": "9"}
GEMINI |= {"usage": "reported", "response_model": "gemini-2.0"}


def gemini(text: str, usage: dict[str, Any]) -> dict[str, Any]:
    content = {"parts": [{"text": text}], "role": "model"}
    return {"candidates": [{"content": content}], "usageMetadata": usage, "modelVersion": "gemini-2.0"}


GEMINI_BEGUN = gemini("Hel", {"promptTokenCount": 6, "totalTokenCount": 6})


@dataclass(frozen=True)
class Shape:
    body: bytes
    expected: Mapping[str, str]
    path: str = "/v1/chat/completions"
    stream: bool = False

    @property
    def headers(self) -> Sequence[tuple[str, str]]:
        return EVENTS if self.stream else JSON


CHAT = {"id": "1", "choices": [{"index": 0, "message": {"role": "assistant", "content": FOOL}}]}
SHAPES = {
    "chat": Shape(dump({**CHAT, "model": "gpt-4o-2024-08-06", "usage": OPENAI_USAGE}), OPENAI),
    "chat, usage first, pretty": Shape(
        json.dumps({"usage": OPENAI_USAGE, "model": "gpt-4o-2024-08-06", **CHAT}, indent=2).encode(), OPENAI
    ),
    "chat, usage elsewhere, too": Shape(
        dump(
            {
                "model": "gpt-4o-2024-08-06",
                "usage": OPENAI_USAGE,
                "choices": [{"message": {"usage": {"prompt_tokens": 1}, "model": "x"}, "model": "y"}],
                "usage_of_yesterday": {"prompt_tokens": 2},
            }
        ),
        OPENAI,
    ),
    "completions": Shape(
        dump({"choices": [{"text": FOOL}], "usage": {"prompt_tokens": 3, "completion_tokens": 72}}),
        {"prompt": "3", "completion": "72", "total": "75", "usage": "reported"},
        "/v1/completions",
    ),
    "embeddings": Shape(
        dump(
            {
                "object": "list",
                "data": [{"embedding": [0.1, -2e-5] * 200, "index": 0}],
                "model": "embed-3",
                "usage": {"prompt_tokens": 8, "total_tokens": 8},
            }
        ),
        {"prompt": "8", "completion": "0", "total": "8", "usage": "reported", "response_model": "embed-3"},
        "/v1/embeddings",
    ),
    "Responses": Shape(dump(RESPONSE), RESPONSES, "/v1/responses"),
    "Responses, stream": Shape(
        typed(
            {"type": "response.created", "response": {**RESPONSE, "output": [], "usage": None}},
            {"type": "response.output_text.delta", "item_id": "1", "delta": "Hello"},
            {"type": "response.output_text.delta", "item_id": "1", "delta": FOOL},
            {"type": "response.completed", "response": RESPONSE},
        ),
        RESPONSES,
        "/v1/responses",
        stream=True,
    ),
    "Anthropic": Shape(
        dump(
            {
                "type": "message",
                "model": "claude-3",
                "content": [{"type": "tool_use", "input": {"usage": {"input_tokens": 1}, "x": FOOL}}],
                "usage": {
                    **ANTHROPIC_INPUT,
                    "cache_creation": {"ephemeral_5m_input_tokens": 5},
                    "output_tokens": 34,
                    "service_tier": "standard",
                },
            }
        ),
        {**ANTHROPIC, "response_model": "claude-3"},
        "/v1/messages",
    ),
    "Anthropic, stream": Shape(
        typed(*ANTHROPIC_STREAM), {**ANTHROPIC, "response_model": "claude-3"}, "/v1/messages", stream=True
    ),
    "Gemini": Shape(dump(gemini(FOOL, GEMINI_USAGE)), GEMINI, "/v1beta/gemini-2.0:streamGenerateContent"),
    "Gemini, array": Shape(
        json.dumps([GEMINI_BEGUN, gemini(FOOL, GEMINI_USAGE)], indent=1).encode(),
        GEMINI,
        "/v1beta/gemini-2.0:streamGenerateContent",
    ),
    "Gemini, stream": Shape(
        events(GEMINI_BEGUN, gemini(FOOL, GEMINI_USAGE), end=b""),
        GEMINI,
        "/v1beta/gemini-2.0:streamGenerateContent",
        stream=True,
    ),
    "chat, stream": Shape(events(*SAID, USAGE_CHUNK), OPENAI, stream=True),
    "chat, stream, null in each chunk": Shape(
        events(*({**said, "usage": None} for said in SAID), USAGE_CHUNK), OPENAI, stream=True
    ),
    "chat, stream, usage in each chunk": Shape(
        events(
            *({**said, "usage": {"prompt_tokens": 1, "completion_tokens": n}} for n, said in enumerate(SAID)),
            chunk({}, "stop", usage=OPENAI_USAGE),
        ),
        OPENAI,
        stream=True,
    ),
    "chat, stream, usage in the last chunk with a choice": Shape(
        events(*SAID[:-1], chunk({"content": "!"}, "stop", usage=OPENAI_USAGE)), OPENAI, stream=True
    ),
    "chat, stream, CRLF": Shape(events(*SAID, USAGE_CHUNK).replace(b"\n", b"\r\n"), OPENAI, stream=True),
    "chat, stream, CR": Shape(events(*SAID, USAGE_CHUNK).replace(b"\n", b"\r"), OPENAI, stream=True),
    "chat, stream, no blank line at the end": Shape(
        events(*SAID, USAGE_CHUNK, end=b"").rstrip(), OPENAI, stream=True
    ),
    "chat, stream, no space, comments, other fields": Shape(
        events(*SAID, USAGE_CHUNK).replace(b"data: ", b": ping\n\nid: 1\ndata:"), OPENAI, stream=True
    ),
    "chat, stream, usage over several data lines": Shape(
        events(*SAID, end=b"")
        + b"".join(b"data: %b\n" % line for line in json.dumps(USAGE_CHUNK, indent=1).encode().split(b"\n"))
        + b"\ndata: [DONE]\n\n",
        OPENAI,
        stream=True,
    ),
    "DeepSeek": Shape(
        dump(
            {
                "usage": {
                    "prompt_tokens": 30,
                    "prompt_cache_hit_tokens": 20,
                    "prompt_cache_miss_tokens": 10,
                    "completion_tokens": 5,
                    "total_tokens": 35,
                },
            }
        ),
        {"prompt": "30", "completion": "5", "total": "35", "cached": "20", "usage": "reported"},
    ),
    "xAI, reasoning beside completion": Shape(
        dump(
            {
                "usage": {
                    "prompt_tokens": 10,
                    "completion_tokens": 2,
                    "total_tokens": 112,
                    "completion_tokens_details": {"reasoning_tokens": 100},
                }
            }
        ),
        {"prompt": "10", "completion": "102", "total": "112", "reasoning": "100", "usage": "reported"},
    ),
    "Groq, stream": Shape(
        events(
            chunk({"role": "assistant", "content": "Hi"}, x_groq={"id": "req_1"}),
            chunk({}, "stop", x_groq={"usage": {"prompt_tokens": 10, "completion_tokens": 2}}),
        ),
        {
            "prompt": "10",
            "completion": "2",
            "total": "12",
            "usage": "reported",
            "response_model": "gpt-4o-2024-08-06",
        },
        stream=True,
    ),
}
TOKENS = ("prompt", "completion", "total", "cached", "reasoning", "usage", "response_model")


def told(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key in TOKENS}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tokens_are_read_wherever_the_body_is_cut(world: World, shape: Shape) -> None:
    """And no byte of it changes: the client did not ask for a stream, so nothing was added for one."""
    names = {}
    for size in CUTS if len(shape.body) < 5_000 else BIG_CUTS:
        name, _, body = world.send(Script(cut(shape.body, size), headers=shape.headers), path=shape.path)
        assert body == shape.body
        names[name] = size
    log = world.all_logged(list(names))
    for name, size in names.items():
        assert told(log[name]) == shape.expected, size
        assert log[name]["stream"] == ("true" if shape.stream else "false")
        assert log[name]["model"] == "gpt-4o"


def test_pieces_over_http1(world: World) -> None:
    """HTTP/1.1 ends a body with a piece that is empty, HTTP/2 mostly with the last one that is not."""
    for shape in (SHAPES["chat"], SHAPES["Anthropic, stream"], SHAPES["Gemini, array"]):
        pieces = cut(shape.body, 50)
        name, _, body = world.send(
            Script(pieces, headers=shape.headers, pause=0.002), host="h1", path=shape.path
        )
        assert body == shape.body
        assert told(world.logged(name)) == shape.expected


def test_trailers_behind_the_body(world: World) -> None:
    shape = SHAPES["Gemini, stream"]
    script = Script(cut(shape.body, 99), headers=shape.headers, trailers=(("x-checksum", "1"),))
    name, _, body = world.send(script, path=shape.path)
    assert body == shape.body
    assert told(world.logged(name)) == shape.expected


@pytest.mark.parametrize(
    ("path", "operation"),
    [
        ("/", "chat"),
        ("/v1/chat/completions", "chat"),
        ("/v1/responses", "chat"),
        ("/v1/completions", "text_completion"),
        ("/v1/embeddings", "embeddings"),
        ("/v1/messages", "chat"),
        ("/v1beta/gemini-2.0:streamGenerateContent", "generate_content"),
    ],
)
def test_the_operation_is_told(world: World, path: str, operation: str) -> None:
    name, _, _ = world.send(Script([b"{}"]), path=path)
    assert world.logged(name)["operation"] == operation


def test_what_is_no_llm_operation_is_not_read(world: World) -> None:
    answer = Script([dump({"data": [], "model": "x", "usage": OPENAI_USAGE})])
    for path, body in (("/v1/models", None), ("/v1/audio/transcriptions", b"RIFF")):
        name, _, received = world.send(answer, path=path, body=body)
        assert received == answer.pieces[0]
        assert not world.logged(name).keys() & STATE.keys()


NOT_READ = {
    "no usage": Script([dump(CHAT)]),
    "usage null": Script([dump({**CHAT, "usage": None})]),
    "usage of another kind": Script([dump({**CHAT, "usage": {"type": "duration", "seconds": 9}})]),
    "another encoding": Script([b"\x1f\x8b\x08", b"\0"], headers=(*EVENTS, ("content-encoding", "br"))),
    "two encodings": Script([b"\x1f\x8b\x08", b"\0"], headers=(*JSON, ("content-encoding", "gzip, gzip"))),
    "not JSON": Script([b'"usage": {"prompt_tokens": 1, '], headers=(("content-type", "text/plain"),)),
    "events without content": Script([events({"error": {"message": "overloaded"}})], headers=EVENTS),
}


@pytest.mark.parametrize("script", NOT_READ.values(), ids=NOT_READ)
def test_tokens_may_be_unknown(world: World, script: Script) -> None:
    name, _, body = world.send(script, body=b'{"stream": true}')
    assert body == b"".join(script.pieces)
    assert told(world.logged(name)) == {"usage": "unknown"}


def test_an_error_has_no_tokens(world: World) -> None:
    name, _, _ = world.send(Script([b'{"error":{"message":"no"}}'], status=400))
    assert not told(world.logged(name))


def test_an_error_that_cost_tokens(world: World) -> None:
    name, _, _ = world.send(Script([dump({"error": {}, "usage": {"prompt_tokens": 3}})], status=400))
    assert told(world.logged(name)) == {"prompt": "3", "completion": "0", "total": "3", "usage": "reported"}


@pytest.mark.parametrize("count", ["-1", "1.5", "1e3", '"3"', "null", "{}", "9007199254740993", "1e400"])
def test_odd_counts(world: World, count: str) -> None:
    """A count is a number that is not negative; what stands behind the dot of one does not matter."""
    body = b'{"usage": {"prompt_tokens": %b, "completion_tokens": 7}}' % count.encode()
    name, _, _ = world.send(Script([body]), body=b'{"model":"12345"}')
    expected = {"1.5": "1", "1e3": "1000"}.get(count, "5")  # 5: the request has 17 bytes
    assert world.logged(name)["prompt"] == expected


# --------------------------------------------------------------------------------------------------
# include_usage: asked for on behalf of the client, and taken out of the answer

ASK = b'"stream_options":{"include_usage":true}'
ASKED = {
    "a stream": (b'{"stream":true}', b"{" + ASK + b',"stream":true}'),
    "options without it": (
        b'{"stream_options": { "a": 1 }, "stream" : true}',
        b'{"stream_options": {"include_usage":true, "a": 1 }, "stream" : true}',
    ),
    "empty options": (
        b'{"stream": true, "stream_options": {}}',
        b'{"stream": true, "stream_options": {"include_usage":true}}',
    ),
    "the last stream": (
        b'{"stream":false,"stream":true}',
        b"{" + ASK + b',"stream":false,"stream":true}',
    ),
    "an escaped key": (b'{"str\\u0065am":true}', b"{" + ASK + b',"str\\u0065am":true}'),
}
NOT_ASKED = {
    "no stream": b'{"messages": []}',
    "stream false": b'{"stream": false, "stream_options": {"a": 1}}',
    "stream null": b'{"stream": null}',
    "stream of another type": b'{"stream": "true"}',
    "a stream inside": b'{"a": {"stream": true}}',
    "the last stream counts": b'{"stream": true, "stream": false}',
    "the client asks": b'{"stream": true, "stream_options": {"include_usage": true}}',
    "the client does not want it": b'{"stream": true, "stream_options": {"include_usage": false}}',
    "null": b'{"stream": true, "stream_options": {"include_usage": null}}',
    "null options": b'{"stream": true, "stream_options": null}',
}
WITH_USAGE = events(*({**said, "usage": None} for said in SAID), USAGE_CHUNK)
WITHOUT_USAGE = events(*({**said, "usage": None} for said in SAID))


@pytest.mark.parametrize(("body", "sent"), ASKED.values(), ids=ASKED)
def test_usage_is_asked_for_and_kept_from_the_client(world: World, body: bytes, sent: bytes) -> None:
    name, _, received = world.send(Script([WITH_USAGE], headers=EVENTS), host="h1", body=body)
    assert world.provider.bodies == [sent]
    assert received == WITHOUT_USAGE
    assert told(world.logged(name)) == OPENAI


@pytest.mark.parametrize("body", NOT_ASKED.values(), ids=NOT_ASKED)
def test_nothing_is_added_and_nothing_removed(world: World, body: bytes) -> None:
    name, _, received = world.send(Script([WITH_USAGE], headers=EVENTS), host="h1", body=body)
    assert world.provider.bodies == [body]
    assert received == WITH_USAGE
    assert told(world.logged(name)) == OPENAI


@pytest.mark.parametrize(
    ("host", "path"),
    [("h1-plain", "/"), ("h1", "/v1/responses"), ("h1", "/v1/embeddings"), ("h1", "/v1/messages")],
)
def test_not_where_it_does_not_exist_or_is_switched_off(world: World, host: str, path: str) -> None:
    body = b'{"stream": true}'
    _, _, received = world.send(Script([WITH_USAGE], headers=EVENTS), host=host, path=path, body=body)
    assert world.provider.bodies == [body]
    assert received == WITH_USAGE


STREAMS = {
    "as OpenAI": (WITH_USAGE, WITHOUT_USAGE),
    "CRLF": (WITH_USAGE.replace(b"\n", b"\r\n"), WITHOUT_USAGE.replace(b"\n", b"\r\n")),
    "CR": (WITH_USAGE.replace(b"\n", b"\r"), WITHOUT_USAGE.replace(b"\n", b"\r")),
    "no [DONE]": (events(*SAID, USAGE_CHUNK, end=b""), events(*SAID, end=b"")),
    "no blank line at the end": (events(*SAID, USAGE_CHUNK, end=b"")[:-1], events(*SAID, end=b"")),
    "no line end at the end": (events(*SAID, USAGE_CHUNK, end=b"")[:-2], events(*SAID, end=b"")),
    "comments, ids": (
        events(*SAID, end=b": ping\n\nid: 7\n") + events(USAGE_CHUNK, end=b": ping\n\n"),
        events(*SAID, end=b": ping\n\n") + b": ping\n\n",
    ),
    "no choices, but no usage either": (
        events({**CHUNK, "choices": [], "usage": None}, *SAID, USAGE_CHUNK),
        events({**CHUNK, "choices": [], "usage": None}, *SAID),
    ),
    "usage with a choice": (events(*SAID[:-1], chunk({}, "stop", usage=OPENAI_USAGE)),) * 2,
    "usage without choices": (events(*SAID, {"usage": OPENAI_USAGE}),) * 2,
    "the end of an event that is none": (events(*SAID, end=b'data: {"choices": [], "usa'),) * 2,
    "a usage chunk that is longer than what is held back": (
        events(*SAID, {**USAGE_CHUNK, "x": "x" * 5000}),
        None,
    ),
}


@pytest.mark.parametrize(("stream", "expected"), STREAMS.values(), ids=STREAMS)
def test_the_usage_chunk_is_taken_out_wherever_it_is_cut(
    world: World, stream: bytes, expected: bytes | None
) -> None:
    """Only that chunk, whole: no half event reaches the client, and nothing else is missing."""
    for size in (0, *range(1, 40, 3), 64, 100, 255, 1000):
        name, _, received = world.send(Script(cut(stream, size), headers=EVENTS), body=b'{"stream":true}')
        assert received in ((expected,) if expected else (stream, events(*SAID))), size
    assert world.logged(name)["stream"] == "true"


def test_events_with_a_length(world: World) -> None:
    """The length of a stream of events is not known any more, when a chunk may be taken out."""
    headers = (*EVENTS, ("content-length", str(len(WITH_USAGE))))
    for host in ("h1", "h2"):
        _, answer, received = world.send(
            Script([WITH_USAGE], headers=headers), host=host, body=b'{"stream":true}'
        )
        assert received == WITHOUT_USAGE
        assert answer["content-length"] is None
        _, answer, received = world.send(Script([WITH_USAGE], headers=headers), host=host)
        assert answer["content-length"] == str(len(WITH_USAGE))
        assert received == WITH_USAGE


def test_trailers_behind_the_usage_chunk(world: World) -> None:
    script = Script(cut(WITH_USAGE, 99), headers=EVENTS, trailers=(("x-checksum", "1"),))
    _, _, received = world.send(script, body=b'{"stream":true}')
    assert received == WITHOUT_USAGE


def test_nothing_is_held_back_but_what_may_be_the_usage_chunk(world: World) -> None:
    """Half an event with a choice passes at once; half a usage chunk does not."""
    start, end = WITH_USAGE.split(b'"content":"Hello')
    half = WITH_USAGE.index(b'"choices":[],') + 20
    pieces = [start + b'"content":"Hel', b"lo" + end[: half - len(start) - len(b'"content":"Hello')]]
    first_arrived = threading.Event()

    def apart() -> Iterator[bytes]:
        yield pieces[0]
        first_arrived.wait()
        yield pieces[1]

    world.provider.answer(Script(apart(), headers=EVENTS, end="wait"))
    connection = world.connect()
    connection.request("POST", "/", b'{"stream":true}', {"host": "h1", "x-test": "held"})
    response = connection.getresponse()
    received = b""
    while not received.endswith(pieces[0]):
        received += response.read1()
    first_arrived.set()
    shown = WITHOUT_USAGE.removesuffix(b"data: [DONE]\n\n")
    while received != shown:
        received += response.read1()
        assert len(received) <= len(shown)
    response.close()
    connection.close()


# --------------------------------------------------------------------------------------------------
# What breaks off


def test_the_client_goes_away(world: World) -> None:
    """The tokens are estimated: the events with content so far, or a quarter of its bytes if that is more."""
    said = [chunk({"role": "assistant", "content": ""}), *(chunk({"content": "word"}) for _ in range(40))]
    world.provider.answer(Script([events(*said, end=b"")], headers=EVENTS, end="wait"))
    connection = world.connect()
    body = b'{"stream":true,"messages":"' + b"x" * 400 + b'"}'
    connection.request("POST", "/", body, {"host": "h1", "x-test": "gone"})
    response = connection.getresponse()
    received = b""
    while received.count(b"word") < 40:
        received += response.read1()
    response.close()
    connection.close()
    line = world.logged("gone")
    assert line["flags"] == "DC"
    assert told(line) == {
        "prompt": str(-(-(len(body) + len(ASK) + 1) // 4)),
        "completion": "40",
        "total": str(-(-(len(body) + len(ASK) + 1) // 4) + 40),
        "usage": "estimated",
        "response_model": "gpt-4o-2024-08-06",
    }
    assert "first" in line


def test_the_provider_breaks_off(world: World) -> None:
    """What it said of the tokens before counts: here the input, by Anthropic's first event."""
    broken = typed(*ANTHROPIC_STREAM[:5])
    for host in ("h1", "h2"):
        script = Script(cut(broken, 100), headers=EVENTS, end="reset", pause=0.002 if host == "h1" else 0)
        world.provider.answer(script)
        connection = world.connect()
        connection.request("POST", "/messages", b"{}", {"host": host, "x-test": f"broken-{host}"})
        response = connection.getresponse()
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
        connection.close()
        line = world.logged(f"broken-{host}")
        completion = -(-len(json.dumps("Hello" + FOOL)[1:-1]) // 4)
        assert line["prompt"] == "117"
        assert line["usage"] == "estimated"
        assert completion * 0.8 <= int(line["completion"]) <= completion


def test_the_client_goes_away_behind_the_usage(world: World) -> None:
    """As SDKs do, which do not wait for the end: the usage was reported."""
    world.provider.answer(Script([WITH_USAGE], headers=EVENTS, end="wait"))
    connection = world.connect()
    connection.request("POST", "/", b'{"stream":true}', {"host": "h1", "x-test": "early"})
    response = connection.getresponse()
    received = b""
    while not received.endswith(b"[DONE]\n\n"):
        received += response.read1()
    response.close()
    connection.close()
    assert told(world.logged("early")) == OPENAI


def test_a_stream_without_usage_is_estimated(world: World) -> None:
    name, _, _ = world.send(Script([events(*SAID[:2], SAID[-1])], headers=EVENTS))
    line = world.logged(name)
    assert (line["usage"], line["prompt"], line["completion"], line["total"]) == ("estimated", "5", "2", "7")


def test_a_failed_attempt_leaves_an_estimate_of_its_prompt(world: World) -> None:
    """Envoy's router drops an attempt that it repeats before its body: what it cost is not to be seen."""
    cost = {"prompt_tokens": 50, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 40}}
    failed = Script([dump({"model": "other", "usage": cost})], status=503)
    good = Script([dump({"usage": {"prompt_tokens": 3, "completion_tokens": 72}})])
    for host in ("h1", "h2"):
        world.provider.answer(failed, good)
        name, _, _ = world.request(host, "/", b'{"model":"gpt-4o"}')
        line = world.logged(name)
        assert line["attempts"] == 2
        assert told(line) == {"prompt": "3", "completion": "72", "total": "75", "usage": "reported"}
        assert line["retried"] == "5", "a token for four bytes"


# --------------------------------------------------------------------------------------------------
# Compressed answers. Nobody asks for them, and some providers send them all the same

GZIP, ZLIB, DEFLATE = 31, 15, -15
"""What zlib calls the container: RFC 1952, RFC 1950, none (RFC 1951)."""


def compressed(
    *parts: bytes, container: int = GZIP, level: int = 6, strategy: int = zlib.Z_DEFAULT_STRATEGY
) -> bytes:
    """Compress; behind each part the compressor is flushed, as servers do with events."""
    made = zlib.compressobj(level, zlib.DEFLATED, container, strategy=strategy)
    return b"".join(made.compress(part) + made.flush(zlib.Z_SYNC_FLUSH) for part in parts) + made.flush()


def encoded(headers: Sequence[tuple[str, str]], encoding: str = "gzip") -> Sequence[tuple[str, str]]:
    return (*headers, ("content-encoding", encoding))


def split(stream: bytes) -> list[bytes]:
    return [event + b"\n\n" for event in stream.removesuffix(b"\n\n").split(b"\n\n")]


WAYS = {
    "gzip": ("gzip", {}),
    "x-gzip": ("X-Gzip", {"level": 1}),
    "best": ("gzip", {"level": 9}),
    "fixed codes": ("gzip", {"strategy": zlib.Z_FIXED}),
    "no copies": ("gzip", {"strategy": zlib.Z_HUFFMAN_ONLY}),
    "stored": ("gzip", {"level": 0}),
    "deflate": ("deflate", {"container": ZLIB}),
    "bare deflate": ("deflate", {"container": DEFLATE}),
}


@pytest.mark.parametrize(("encoding", "how"), WAYS.values(), ids=WAYS)
def test_tokens_of_compressed_answers(world: World, encoding: str, how: dict[str, int]) -> None:
    """Where nothing is to be taken out, the client gets the provider's bytes."""
    names = {}
    for shape in (SHAPES["chat"], SHAPES["embeddings"], SHAPES["Anthropic, stream"]):
        body = compressed(*(split(shape.body) if shape.stream else [shape.body]), **how)
        for size in (0, 1, 7, 100):
            headers = (*encoded(shape.headers, encoding), ("content-length", str(len(body))))
            name, answer, received = world.send(Script(cut(body, size), headers=headers), path=shape.path)
            assert received == body
            assert answer["content-encoding"] == encoding
            assert answer["content-length"] == str(len(body))
            names[name] = shape
    log = world.all_logged(list(names))
    for name, shape in names.items():
        assert told(log[name]) == shape.expected


@pytest.mark.parametrize(("encoding", "how"), WAYS.values(), ids=WAYS)
def test_the_usage_chunk_is_taken_out_of_a_compressed_stream(
    world: World, encoding: str, how: dict[str, int]
) -> None:
    """The rest is what the client gets, no longer compressed."""
    for body in (compressed(*split(WITH_USAGE), **how), compressed(WITH_USAGE, **how)):
        for size in (0, 1, 100) if len(body) < 5000 else (0, 1000):
            name, answer, received = world.send(
                Script(cut(body, size), headers=encoded(EVENTS, encoding)), body=b'{"stream":true}'
            )
            assert received == WITHOUT_USAGE
            assert answer["content-encoding"] is None
            assert told(world.logged(name)) == OPENAI


def test_a_long_compressed_answer(world: World) -> None:
    """Copies reach back by up to 32 KB; and gzip may consist of several members."""
    words = b" ".join(b"%x" % zlib.crc32(b"%d" % number) for number in range(3600)).decode()
    body = dump({"id": words * 12, "usage": {"prompt_tokens": 3, "completion_tokens": 72}})
    half = len(body) // 2
    for sent in (compressed(body, level=9), compressed(body[:half]) + compressed(body[half:]) + b"garbage"):
        for size in (0, 999):
            name, _, received = world.send(Script(cut(sent, size), headers=encoded(JSON)))
            assert received == sent
            assert told(world.logged(name)) == {
                "prompt": "3",
                "completion": "72",
                "total": "75",
                "usage": "reported",
            }


def test_compressed_events_are_passed_on_as_they_come(world: World) -> None:
    """And a client that goes away has its tokens estimated, also in what stays compressed."""
    said = [chunk({"role": "assistant", "content": ""}), *(chunk({"content": "word"}) for _ in range(40))]
    made = zlib.compressobj(wbits=GZIP)
    pieces = [made.compress(events(one, end=b"")) + made.flush(zlib.Z_SYNC_FLUSH) for one in said]
    world.provider.answer(Script(pieces, headers=encoded(EVENTS), end="wait"))
    for name, body in (("gone-decoded", b'{"stream":true}'), ("gone-gzip", b'{"messages":[]}')):
        connection = world.connect()
        connection.request("POST", "/", body, {"host": "h1", "x-test": name})
        response = connection.getresponse()
        received, decoder = b"", zlib.decompressobj(wbits=GZIP)
        while received != events(*said, end=b""):
            piece = response.read1()
            received += piece if name == "gone-decoded" else decoder.decompress(piece)
        response.close()
        connection.close()
        line = world.logged(name)
        assert line["flags"] == "DC"
        assert line["usage"] == "estimated"
        assert 32 <= int(line["completion"]) <= 40  # an estimate is told when it grew by an eighth


def test_what_is_no_gzip(world: World) -> None:
    """It harms nobody: what stays compressed passes as it is, what does not ends where the fault is."""
    for sent in (b"{}", b"plain text", compressed(b"x" * 100)[:-20] + b"\xff" * 40):
        name, _, received = world.send(Script(cut(sent, 9), headers=encoded(JSON)))
        assert received == sent
        assert told(world.logged(name)) == {"usage": "unknown"}
    good = compressed(WITHOUT_USAGE)
    faulty = good[: len(good) // 2] + b"\xff" * 400
    _, _, received = world.send(Script([faulty], headers=encoded(EVENTS)), body=b'{"stream":true}')
    assert WITHOUT_USAGE.startswith(received[:100])


def test_a_decompression_bomb(world: World) -> None:
    """What is beyond a hundred times the input, and a megabyte, is neither read nor passed on."""
    bomb = compressed(b" " * 50_000_000 + SHAPES["chat"].body)
    name, _, received = world.send(Script([bomb], headers=encoded(JSON)))
    assert received == bomb
    assert told(world.logged(name)) == {"usage": "unknown"}
    _, _, received = world.send(Script([bomb], headers=encoded(EVENTS)), body=b'{"stream":true}')
    assert 1_000_000 < len(received) < 200 * len(bomb) < 12_000_000


# --------------------------------------------------------------------------------------------------
# Time


def test_the_times_of_a_stream(world: World) -> None:
    """The first content has one; between tokens there is one from the second on. A role is no content."""

    def times(*said: dict[str, Any], tokens: int) -> set[str]:
        usage = {**CHUNK, "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": tokens}}
        name, _, _ = world.send(Script([events(*said, usage)], headers=EVENTS), body=b'{"stream":true}')
        shown = {key: text for key, text in world.logged(name).items() if key in {"first", "each"}}
        assert all(re.fullmatch(r"\d+\.\d{6}", text) for text in shown.values())
        return set(shown)

    assert times(*SAID[:3], tokens=3) == {"first", "each"}
    assert times(*SAID[:2], tokens=1) == {"first"}
    assert times(SAID[0], tokens=1) == set()


def test_an_answer_at_once_has_no_times(world: World) -> None:
    name, _, _ = world.send(Script([SHAPES["chat"].body]))
    assert not world.logged(name).keys() & {"first", "each"}


# --------------------------------------------------------------------------------------------------
# The script itself


@pytest.mark.parametrize("size", [0, 1, 10, 100])
def test_a_fault_of_the_script_does_no_harm_to_the_body(world: World, size: int) -> None:
    """Here it fails at the end of the first event. Not even what it held back is lost."""
    name, _, received = world.send(
        Script(cut(WITH_USAGE, size), headers=EVENTS), host="h2-broken", body=b'{"stream":true}'
    )
    assert received == WITH_USAGE
    assert "prompt" not in world.logged(name)
    assert "llm_provider:" in world.envoy.log.read_text()
    script = Script(cut(compressed(WITH_USAGE), size), headers=encoded(EVENTS))
    assert world.send(script, host="h2-broken", body=b'{"stream":true}')[2] == WITH_USAGE
