"""The Lua script of the provider clusters, in a real Envoy: what reaches the provider, byte for byte."""

import hashlib
import http.client
import json
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.support.envoy import Envoy, running_envoy
from tests.support.upstream import Received, Upstream, running_upstream
from translator.lua import CREDENTIAL_HEADER, SCRIPT, Member, Operation, filter_context
from translator.operations import STREAM_USAGE

pytestmark = pytest.mark.envoy

MODEL = "wasm.asm.llmproxy.request_model"
API = "type.googleapis.com/envoy."
EXTENSIONS = f"{API}extensions."

# --------------------------------------------------------------------------------------------------
# The providers


def force(*path: str, value: str) -> Member:
    return Member(path, value, "force")


def fill(*path: str, value: str) -> Member:
    return Member(path, value, "fill")


@dataclass(frozen=True)
class Provider:
    """A provider: a cluster of this name, and a virtual host of this name that leads to it."""

    host: str
    operations: tuple[Operation, ...]
    key: str | None = None


def chat(*members: Member, path: str = "/v1/chat/completions") -> tuple[Operation, ...]:
    return (Operation("POST", "/chat/completions", path, members),)


MERGES = {
    "checked": (),
    "model": (force("model", value='"qwen-turbo"'),),
    "flat": (
        force("model", value='"qwen-turbo"'),
        fill("stream", value="false"),
        fill("temperature", value="0.30"),
        force("seed", value="12345678901234567890"),
    ),
    "nested": (
        fill("stream_options", "include_usage", value="true"),
        force("metadata", "tenant", value='"t-1"'),
        fill("metadata", "tier", value='{"level": [1, 2]}'),
        fill("model", value='"qwen-plus"'),
    ),
    "streams": (fill("temperature", value="0.30"), STREAM_USAGE),
    "streams-by-default": (
        fill("stream", value="true"),
        Member(("stream_options", "include_usage"), "true", "fill_stream"),
    ),
    "streams-only": (
        force("stream", value="true"),
        Member(("priority",), '"high"', "fill_stream"),
    ),
}

QWEN = Provider(
    host="dashscope.example",
    key="key-of-qwen",
    operations=(
        Operation(
            "POST",
            "/chat/completions",
            "/compatible-mode/v1/chat/completions?api-version=2",
            (force("model", value='"qwen-turbo"'), fill("stream", value="false")),
        ),
        Operation("POST", "/completions", "/compatible-mode/v1/completions", ()),
        Operation(
            "POST", "/embeddings", "/compatible-mode/v1/embeddings", (force("model", value='"embed-1"'),)
        ),
        Operation("POST", "/audio/transcriptions", "/compatible-mode/v1/audio/transcriptions"),
        Operation("GET", "/models", "/compatible-mode/v1/models"),
    ),
)
MOON = Provider(
    host="moonshot.example",
    operations=(
        Operation("POST", "/v2/generate", "/openai/v2/generate", (force("model", value='"moonshot-v1"'),)),
        Operation("POST", "/chat/completions", "/openai/v1/chat/completions", (fill("top_p", value="0.5"),)),
        Operation("POST", "/audio/transcriptions", "/openai/v1/audio/transcriptions"),
        Operation("POST", "/embeddings", "/openai/v1/embeddings"),
        Operation("GET", "/models", "/openai/v1/models?api-version=1"),
    ),
)
PROVIDERS = {
    "qwen": QWEN,
    "moon": MOON,
    "unicode": Provider(
        "unicode.example", chat(force("模型 😀", value='"\\u4f60"'), force('a"b\\', value="1"))
    ),
    "keyless": Provider("keyless.example", MOON.operations),
    "broken": Provider("broken.example", (), key="key-of-broken"),
    **{f"evicted-{n}": Provider("evicted.example", chat(force("model", value=str(n)))) for n in (1, 2, 3)},
    **{f"merge-{name}": Provider("merge.example", chat(*members)) for name, members in MERGES.items()},
}
FALLBACKS = {
    "qwen-then-moon": ("qwen", "moon"),
    "moon-then-qwen": ("moon", "qwen"),
}

# --------------------------------------------------------------------------------------------------
# Their Envoy


def cluster(name: str, provider: Provider, port: int, script: str) -> dict[str, Any]:
    if name.startswith("evicted"):
        script = script.replace("MAX_PLANS = 1024", "MAX_PLANS = 2")
        assert script != SCRIPT
    lua = {
        "@type": f"{EXTENSIONS}filters.http.lua.v3.Lua",
        "shared_vm_id": "llm",
        "default_source_code": {"inline_string": script},
        "filter_context": filter_context(provider.host, provider.operations) if provider.operations else {},
    }
    injector = {
        "@type": f"{EXTENSIONS}filters.http.credential_injector.v3.CredentialInjector",
        "overwrite": True,
        "credential": {
            "name": "envoy.http.injected_credentials.generic",
            "typed_config": {
                "@type": f"{EXTENSIONS}http.injected_credentials.generic.v3.Generic",
                "credential": {"name": name},
                "header": CREDENTIAL_HEADER,
            },
        },
    }
    codec = {"@type": f"{EXTENSIONS}filters.http.upstream_codec.v3.UpstreamCodec"}
    options = f"{EXTENSIONS}upstreams.http.v3.HttpProtocolOptions"
    filters = [{"name": "llm.provider", "typed_config": lua}]
    if provider.key:
        filters.append({"name": "envoy.filters.http.credential_injector", "typed_config": injector})
    filters.append({"name": "envoy.filters.http.upstream_codec", "typed_config": codec})
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    return {
        "name": name,
        "type": "STATIC",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
        "typed_extension_protocol_options": {
            options.removeprefix("type.googleapis.com/"): {
                "@type": options,
                "explicit_http_config": {"http_protocol_options": {}},
                "http_filters": filters,
            }
        },
    }


def virtual_host(name: str, action: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "domains": [name],
        "request_body_buffer_limit": 33554432,
        "routes": [{"match": {"prefix": "/"}, "route": {"timeout": "0s", **action}}],
        # the model that access logs and metrics see
        "response_headers_to_add": [
            {"header": {"key": "x-model", "value": f"%FILTER_STATE({MODEL}:PLAIN)%"}},
            {"header": {"key": "x-client-path", "value": "%FILTER_STATE(llm.path:PLAIN)%"}},
        ],
    }


def fallback(first: str, second: str) -> dict[str, Any]:
    groups = [{"name": name, "clusters": [{"cluster_name": name, "weight": 1}]} for name in (first, second)]
    specifier = {
        "@type": f"{EXTENSIONS}router.cluster_specifiers.priority_group.v3.PriorityGroupClusterSpecifier",
        "priority_groups": groups,
    }
    return {
        "inline_cluster_specifier_plugin": {
            "extension": {"name": "priority_group", "typed_config": specifier}
        },
        "retry_policy": {
            "retry_on": "retriable-status-codes",
            "retriable_status_codes": [503],
            "num_retries": 1,
            "refresh_cluster_on_retry": True,
        },
    }


def bootstrap(ports: dict[str, int], script: str = SCRIPT) -> dict[str, Any]:
    hosts = [virtual_host(name, {"cluster": name}) for name in PROVIDERS]
    hosts += [virtual_host(name, fallback(*names)) for name, names in FALLBACKS.items()]
    keep_json = {
        "filter": {
            "metadata_filter": {
                "matcher": {"filter": "llm", "path": [{"key": "error"}], "value": {"bool_match": True}},
                "match_if_key_not_found": False,
            }
        },
        "body_format_override": {
            "text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"},
            "content_type": "application/json",
        },
    }
    manager = {
        "@type": f"{EXTENSIONS}filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "test",
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{EXTENSIONS}filters.http.router.v3.Router"},
            }
        ],
        "local_reply_config": {
            "body_format": {"text_format_source": {"inline_string": "from envoy: %LOCAL_REPLY_BODY%"}},
            "mappers": [keep_json],
        },
        "route_config": {"name": "test", "virtual_hosts": hosts},
    }
    listener = {
        "name": "test",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
        "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}],
    }
    secrets = [
        {"name": name, "generic_secret": {"secret": {"inline_string": provider.key}}}
        for name, provider in PROVIDERS.items()
        if provider.key
    ]
    return {
        "static_resources": {
            "listeners": [listener],
            "clusters": [
                cluster(name, provider, ports[name], script) for name, provider in PROVIDERS.items()
            ],
            "secrets": secrets,
        }
    }


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The OpenAI-style error object."""
        assert self.headers["content-type"] == "application/json", self.body
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error, dict)
        return error


class World:
    """The client's side, and what each provider received."""

    def __init__(self, envoy: Envoy, upstreams: dict[str, Upstream]) -> None:
        self.envoy = envoy
        self.upstreams = upstreams
        self._client = http.client.HTTPConnection("127.0.0.1", envoy.port("test"), timeout=30)

    def send(
        self,
        host: str,
        body: bytes | None = b"{}",
        *,
        path: str = "/v1/chat/completions",
        method: str = "POST",
        headers: Sequence[tuple[str, str]] = (("content-type", "application/json"),),
    ) -> Answer:
        """Send a request on the one connection to Envoy."""
        client = self._client
        client.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        client.putheader("host", host)
        for name, value in headers:
            client.putheader(name, value)
        if body is not None:
            client.putheader("content-length", str(len(body)))
        client.endheaders(body)
        response = client.getresponse()
        return Answer(response.status, response.headers, response.read())

    def received(self, name: str) -> Received:
        """Return the one request that a provider received."""
        (request,) = self.upstreams[name].received
        return request

    def reset(self) -> None:
        for upstream in self.upstreams.values():
            upstream.reset()

    def close(self) -> None:
        self._client.close()


@pytest.fixture(scope="module")
def one_world() -> Iterator[World]:
    with ExitStack() as stack:
        upstreams = {name: stack.enter_context(running_upstream()) for name in PROVIDERS}
        envoy = stack.enter_context(
            running_envoy(bootstrap({name: up.port for name, up in upstreams.items()}))
        )
        world = World(envoy, upstreams)
        stack.callback(world.close)
        yield world


@pytest.fixture
def world(one_world: World) -> World:
    one_world.reset()
    return one_world


# --------------------------------------------------------------------------------------------------
# The body: what is accepted, and which bytes leave


def sent(world: World, merge: str, body: bytes) -> bytes | None:
    """Return the body that a provider gets when the client sends this one, None if it is refused."""
    upstream = world.upstreams[f"merge-{merge}"]
    upstream.reset()
    answer = world.send(f"merge-{merge}", body)
    if answer.status == 200:
        (request,) = upstream.received
        return request.body
    assert answer.status == 400
    assert answer.error["code"] == ("invalid_json" if body else "empty_body")
    assert not upstream.received
    return None


DECODER = json.JSONDecoder(parse_constant=pytest.fail)
SPACE = re.compile(r"[ \t\n\r]*")


def skip(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    assert match
    return match.end()


def accepted(body: bytes) -> bool:
    """Whether Python's json takes the body for an object. Bytes are characters here: UTF-8 is not checked."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        return isinstance(json.loads(body.decode("latin-1"), parse_constant=refuse), dict)
    except ValueError:
        return False


def merged_text(text: str, start: int, members: Sequence[Member], level: int = 0) -> tuple[str, int]:
    """Return the object that begins at `start` with the members merged in, and where it ended.

    The rule told once more: Python's own scanner says where keys and values begin and end.
    """
    parts: list[str] = []
    seen = set()
    at = skip(text, start + 1)
    copied = start + 1
    empty = text[at] == "}"
    while not empty:
        key, at = json.decoder.scanstring(text, at + 1)  # type: ignore[attr-defined]
        seen.add(key)
        value = skip(text, skip(text, at) + 1)
        own = [member for member in members if member.path[level] == key]
        inner = [member for member in own if len(member.path) > level + 1]
        if inner and text[value] == "{":
            new, at = merged_text(text, value, inner, level + 1)
            parts += [text[copied:value], new]
            copied = at
        else:
            _, at = DECODER.raw_decode(text, value)
            if any(member.mode == "force" for member in own):
                parts += [text[copied:value], object_of(inner, 1) if inner else own[0].value]
                copied = at
        at = skip(text, at)
        if text[at] == "}":
            break
        at = skip(text, at + 1)
    missing = object_of([member for member in members if member.path[level] not in seen], level)[1:-1]
    comma = "," if missing and not empty else ""
    return "{" + missing + comma + "".join(parts) + text[copied : at + 1], at + 1


def object_of(members: Sequence[Member], level: int) -> str:
    texts = []
    for key in dict.fromkeys(member.path[level] for member in members):
        own = [member for member in members if member.path[level] == key]
        value = object_of(own, level + 1) if len(own[0].path) > level + 1 else own[0].value
        texts.append(f'"{key}":{value}')
    return "{" + ",".join(texts) + "}"


def for_this_stream(text: str, members: Sequence[Member]) -> Sequence[Member]:
    """Return the members without those for streams, or with them filled in, as the final `stream` says."""
    rest = [member for member in members if member.mode != "fill_stream"]
    if merged_value(json.loads(text), rest).get("stream") is not True:
        return rest
    return rest + [replace(member, mode="fill") for member in members if member.mode == "fill_stream"]


def merged_bytes(body: bytes, members: Sequence[Member]) -> bytes:
    text = body.decode("latin-1")
    start = skip(text, 0)
    new, end = merged_text(text, start, for_this_stream(text, members))
    return (text[:start] + new + text[end:]).encode("latin-1")


def merged_value(value: dict[str, Any], members: Sequence[Member]) -> dict[str, Any]:
    """Return what the provider shall understand: the merge, told in terms of Python's dict."""
    result = dict(value)
    for key in {member.path[0] for member in members}:
        own = [member for member in members if member.path[0] == key]
        if len(own[0].path) == 1:
            if own[0].mode == "force" or key not in result:
                result[key] = json.loads(own[0].value)
            continue
        if key in result and not isinstance(result[key], dict):
            if all(member.mode == "fill" for member in own):
                continue
            result[key] = {}
        inner = result[key] = dict(result.get(key, {}))
        for member in own:
            if member.mode == "force" or member.path[1] not in inner:
                inner[member.path[1]] = json.loads(member.value)
    return result


class Bodies:
    """Random bodies: valid objects in every notation, and damaged ones."""

    KEYS = (
        '"model"',
        '"mod\\u0065l"',
        '"stream"',
        '"seed"',
        '"temperature"',
        '"stream_options"',
        '"metadata"',
        '"priority"',
    )
    INNER = ('"include_usage"', '"tenant"', '"ti\\u0065r"', '"tier"', '"model"', '""', '"x"')
    NUMBERS = ("0", "-0", "-0.0e-0", "1.0", "1e308", "1E+2", "12345678901234567890", "0.1e-7", "-12", "9e9")
    STRINGS = (
        '"你好"',
        '"😀"',
        r'"\u4f60"',
        r'"\ud800"',
        r'"\ud83d\ude00"',
        r'"a\"b\\"',
        r'"\/\b\f\n\r\t"',
        '"\x7f"',
        '""',
    )
    NOISE = (
        *'{}[]",:\\/ \t\n\r+-.0123456789eEtrufalsn\x00\x01\x1f\x7f',
        "\ufeff",
        "\u2028",
        "NaN",
        "Infinity",
        '\\"',
        "\\u",
    )

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 # test data, not cryptography

    def space(self) -> str:
        return self.random.choice(("", "", "", " ", "\n", "\t\r\n  "))

    def value(self, depth: int) -> str:
        kind = self.random.randrange(8 if depth < 4 else 5)
        if kind == 0:
            return self.random.choice(("true", "false", "null"))
        if kind <= 2:
            return self.random.choice(self.NUMBERS)
        if kind <= 4:
            return self.random.choice(self.STRINGS)
        if kind == 5:
            items = [self.value(depth + 1) for _ in range(self.random.randrange(4))]
            return "[" + self.space() + (self.space() + "," + self.space()).join(items) + self.space() + "]"
        return self.object(depth + 1)

    def object(self, depth: int = 0) -> str:
        keys = (*self.KEYS, *self.STRINGS) if depth == 0 else (*self.INNER, *self.STRINGS)
        members = [
            self.random.choice(keys) + self.space() + ":" + self.space() + self.value(depth)
            for _ in range(self.random.randrange(6))
        ]
        if depth == 0 and self.random.random() < 0.4:
            members.insert(self.random.randrange(len(members) + 1), '"stream":true')
        return "{" + self.space() + (self.space() + "," + self.space()).join(members) + self.space() + "}"

    def valid(self) -> bytes:
        body = (self.space() + self.object() + self.space()).encode()
        if self.random.random() < 0.1:
            return body.replace("你".encode(), b"\xff\xc0")  # not UTF-8
        return body

    def damaged(self) -> bytes:
        body = self.valid()
        for _ in range(self.random.choice((1, 1, 1, 2, 5))):
            at = self.random.randrange(len(body) + 1)
            noise = self.random.choice(self.NOISE).encode()
            body = self.random.choice(
                (
                    body[:at] + body[at + 1 :],
                    body[:at] + noise + body[at:],
                    body[:at] + noise + body[at + 1 :],
                    body[:at],
                    body[at:],
                    body[: at + 5] + body[at:],
                )
            )
        return body


@pytest.mark.parametrize("merge", MERGES)
def test_any_body_is_merged_or_refused_as_python_would(world: World, merge: str) -> None:
    """Valid bodies get the members and keep all other bytes; what Python's json refuses is refused."""
    members = MERGES[merge]
    bodies = Bodies(random.randrange(2**32))  # noqa: S311 # pytest-randomly prints the seed
    verdicts = set()
    for number in range(2000):
        body = bodies.damaged() if number % 2 else bodies.valid()
        result = sent(world, merge, body)
        verdicts.add(result is not None)
        assert (result is not None) == accepted(body), body
        if result is None:
            continue
        assert result == merged_bytes(body, members), body
        text = result.decode("latin-1")
        before = body.decode("latin-1")
        assert json.loads(text) == merged_value(json.loads(before), for_this_stream(before, members)), body
    assert verdicts == {True, False}


KEPT = {
    "big integers": '{"n": [12345678901234567890, -9007199254740993]}',
    "number notation": '{"n": [1e308, 1.0, -0.0e-0, 1E+2, 0.30]}',
    "emoji and escapes": r'{"messages": [{"content": "😀 \u4f60\u597D 你好 \/ \u0000"}]}',
    "lone surrogates": r'{"user": "\ud800", "\udfff": "\uDC00\uD800"}',
    "other members twice": '{"a": 1, "a": 2, "a": {"model": "inner"}}',
    "white space": ' \t\r\n{ "a"\n:\t[ 1 , { } , [ ] ] , "b" : { "c" : null } \r\n}\n ',
    "delete character": '{"a": "\x7f"}',
    "empty keys": '{"": {"": []}}',
}


@pytest.mark.parametrize("body", [*KEPT.values(), b'{"a": "\xff\xfe\xc0"}'], ids=[*KEPT, "invalid UTF-8"])
def test_other_bytes_stay(world: World, body: str | bytes) -> None:
    data = body.encode() if isinstance(body, str) else body
    before, brace, after = data.partition(b"{")
    assert sent(world, "checked", data) == data
    assert sent(world, "model", data) == before + brace + b'"model":"qwen-turbo",' + after


METADATA = '{"tenant":"t-1","tier":{"level": [1, 2]}}'

MERGED = {
    "an empty object": ("model", "{}", '{"model":"qwen-turbo"}'),
    "an empty object with space": ("model", " { } ", ' {"model":"qwen-turbo" } '),
    "a forced member is replaced in place": (
        "model",
        '{"a": 1, "model" : "gpt-4" , "b": 2}',
        '{"a": 1, "model" : "qwen-turbo" , "b": 2}',
    ),
    "a forced member may have any type": ("model", '{"model":{"a":[1]}}', '{"model":"qwen-turbo"}'),
    "each of two equal keys": (
        "model",
        '{"model":1,"model":2}',
        '{"model":"qwen-turbo","model":"qwen-turbo"}',
    ),
    "an escaped key": ("model", r'{"mod\u0065l":1}', r'{"mod\u0065l":"qwen-turbo"}'),
    "a fully escaped key": (
        "model",
        r'{"\u006D\u006f\u0064\u0065\u006c":1}',
        r'{"\u006D\u006f\u0064\u0065\u006c":"qwen-turbo"}',
    ),
    "an inner object's key is another one": (
        "model",
        '{"a":{"model":1}}',
        '{"model":"qwen-turbo","a":{"model":1}}',
    ),
    "a key that only begins alike": ("model", '{"models":1}', '{"model":"qwen-turbo","models":1}'),
    "configured order": (
        "flat",
        "{}",
        '{"model":"qwen-turbo","stream":false,"temperature":0.30,"seed":12345678901234567890}',
    ),
    "what is missing goes in front": (
        "flat",
        '{"stream":true,"seed":1}',
        '{"model":"qwen-turbo","temperature":0.30,"stream":true,"seed":12345678901234567890}',
    ),
    "null is given": (
        "flat",
        '{"model":null,"stream":null}',
        '{"temperature":0.30,"seed":12345678901234567890,"model":"qwen-turbo","stream":null}',
    ),
    "an object is made for inner members": (
        "nested",
        "{}",
        '{"stream_options":{"include_usage":true},"metadata":' + METADATA + ',"model":"qwen-plus"}',
    ),
    "inner members go into the client's object": (
        "nested",
        '{"model":1,"stream_options":{"a":1},"metadata":{ }}',
        '{"model":1,"stream_options":{"include_usage":true,"a":1},"metadata":' + METADATA[:-1] + " }}",
    ),
    "the client's inner member": (
        "nested",
        '{"model":1,"stream_options":{"include_usage":null},"metadata":{"tier":0,"tenant":0}}',
        '{"model":1,"stream_options":{"include_usage":null},"metadata":{"tier":0,"tenant":"t-1"}}',
    ),
    "no object where one is needed": (
        "nested",
        '{"model":1,"stream_options":null,"metadata":[{}]}',
        '{"model":1,"stream_options":null,"metadata":' + METADATA + "}",
    ),
    "each of two equal objects": (
        "nested",
        '{"model":1,"stream_options":0,"metadata":{"tenant":1,"tier":1},"metadata":{"tier":2}}',
        '{"model":1,"stream_options":0,"metadata":{"tenant":"t-1","tier":1},"metadata":{"tenant":"t-1","tier":2}}',
    ),
}


@pytest.mark.parametrize(("merge", "body", "expected"), MERGED.values(), ids=MERGED)
def test_members_are_merged(world: World, merge: str, body: str, expected: str) -> None:
    result = sent(world, merge, body.encode())
    assert result is not None
    assert result.decode() == expected


def test_a_configured_key_may_hold_any_character(world: World) -> None:
    body = r'{"\u6a21\u578b \ud83d\uDE00": 0, "模型 😀": 0, "a\"b\\": 0, "\u0061\u0022b\u005C": 0}'
    world.send("unicode", body.encode())
    assert world.received("unicode").body.decode() == body.replace(": 0", r': "\u4f60"', 2).replace(
        ": 0", ": 1"
    )
    world.reset()
    world.send("unicode", b"{}")
    assert json.loads(world.received("unicode").body) == {"模型 😀": "你", 'a"b\\': 1}


REFUSED = {
    "empty": ("", None),
    "space": ("  ", 2),
    "an array": (' [{"a": 1}]', 1),
    "a string": ('"a"', 0),
    "a number": ("1", 0),
    "null": ("null", 0),
    "a form": ("model=qwen&stream=true", 0),
    "a byte order mark": ("\ufeff{}", 0),
    "a second object": ("{} {}", 3),
    "trailing garbage": ('{"a": 1}x', 8),
    "a trailing NUL": ("{}\0", 2),
    "a NUL in a string": ('{"a": "\0"}', 7),
    "a line feed in a string": ('{"a": "\n"}', 7),
    "a control character in a key": ('{"\x1f": 1}', 2),
    "an open object": ("{", 1),
    "an open string": ('{"a": "b', 8),
    "an open escape": ('{"a": "\\', 7),
    "an unknown escape": (r'{"a": "\x41"}', 7),
    "a short \\u escape": (r'{"a": "\u00e"}', 7),
    "a comma too many": ('{"a": 1,}', 8),
    "a comma too many, inside": ('{"a": [1,]}', 9),
    "a missing comma": ('{"a": 1 "b": 2}', 8),
    "a missing colon": ('{"a" 1}', 5),
    "a key without quotes": ("{a: 1}", 1),
    "brackets that do not match": ('{"a": [1}}', 8),
    "NaN": ('{"a": NaN}', 6),
    "Infinity": ('{"a": -Infinity}', 7),
    "a leading zero": ('{"a": 01}', 7),
    "a leading plus": ('{"a": +1}', 6),
    "a number that ends in a dot": ('{"a": 1.}', 8),
    "an exponent without digits": ('{"a": 1e+}', 9),
    "a literal in capitals": ('{"a": True}', 6),
    "a longer literal": ('{"a": nulls}', 10),
    "a comment": ('{"a": 1 /* b */}', 8),
    "513 levels": ('{"a":' + "[" * 512 + "]" * 512 + "}", 5 + 511),
}


@pytest.mark.parametrize(("body", "position"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_json_object_is_refused(world: World, body: str, position: int | None) -> None:
    """The answer is OpenAI's error object, with the place of the fault; nothing leaves."""
    answer = world.send("merge-nested", body.encode())
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    if position is not None:
        assert answer.error["message"].endswith(f" at byte {position}.")
    assert not world.upstreams["merge-nested"].received


def test_512_levels_are_accepted(world: World) -> None:
    arrays = b'{"a":' + b"[" * 511 + b"]" * 511 + b"}"
    objects = b'{"metadata":{"a":' * 255 + b'{"metadata":1}' + b"}" * 510
    assert sent(world, "checked", arrays) == arrays
    assert sent(world, "checked", objects) == objects
    assert sent(world, "nested", objects) is not None


@pytest.mark.parametrize("member", [b'"model":0', b'"metadata":{}'])
def test_a_key_a_million_times_does_not_multiply_its_value(world: World, member: bytes) -> None:
    merge = "model" if member.startswith(b'"model"') else "nested"
    few, many = (b"{" + b",".join([member] * count) + b"}" for count in (900, 700_000))
    assert sent(world, merge, few) == merged_bytes(few, MERGES[merge])
    answer = world.send(f"merge-{merge}", many)
    assert answer.status == 400
    assert "too many equal keys" in answer.error["message"]


def test_a_10_mb_body_keeps_its_bytes(world: World) -> None:
    text = "".join(random.choices('abc你 \n\t"\\😀', k=6_000_000))  # noqa: S311 # not cryptography
    body = json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=False).encode()
    assert len(body) > 10_000_000
    result = sent(world, "model", body)
    assert result is not None
    assert hashlib.sha256(result).digest() == hashlib.sha256(b'{"model":"qwen-turbo",' + body[1:]).digest()


def test_a_chunked_body(world: World) -> None:
    with_length = world.send("qwen", b'{"a": 1}')
    connection = http.client.HTTPConnection("127.0.0.1", world.envoy.port("test"), timeout=60)
    connection.request(
        "POST",
        "/",
        iter((b'{"a"', b": ", b"1}")),
        {"Host": "qwen", "Transfer-Encoding": "chunked"},
        encode_chunked=True,
    )
    assert connection.getresponse().status == with_length.status == 200
    connection.close()
    one, two = world.upstreams["qwen"].received
    assert one.body == two.body == b'{"model":"qwen-turbo","stream":false,"a": 1}'
    assert two.header("content-length") == str(len(two.body))


# --------------------------------------------------------------------------------------------------
# The operation

OWN = "/compatible-mode/v1/chat/completions?api-version=2"


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("POST", "/", OWN),
        ("POST", "/?stream=true", OWN),
        ("POST", "/chat/completions", OWN),
        ("POST", "/v1/chat/completions", OWN),
        ("POST", "/any/other/prefix/chat/completions?key=1", OWN),
        ("POST", "/v1/completions", "/compatible-mode/v1/completions"),
        ("POST", "/v1/embeddings", "/compatible-mode/v1/embeddings"),
        ("GET", "/v1/models", "/compatible-mode/v1/models"),
        ("GET", "/v1/models?limit=2", "/compatible-mode/v1/models?limit=2"),
    ],
)
def test_the_path_names_the_operation(world: World, method: str, path: str, expected: str) -> None:
    """The end of the client's path counts; the provider gets its own path, and the query only with GET."""
    answer = world.send("qwen", b"{}" if method == "POST" else None, method=method, path=path)
    assert answer.status == 200
    assert answer.headers["x-client-path"] == path
    request = world.received("qwen")
    assert (request.method, request.path) == (method, expected)
    assert request.header("host") == "dashscope.example"
    assert request.header("authorization") == "key-of-qwen"


def test_a_query_is_added_to_a_path_that_has_one(world: World) -> None:
    world.send("moon", None, method="GET", path="/models?limit=2")
    assert world.received("moon").path == "/openai/v1/models?api-version=1&limit=2"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files",
        "/chat/completions/",
        "/v1/chatcompletions",
        "/xchat/completion",
        "/v1/models/gpt-4",
        "//",
        "/v1/mycompletions",
    ],
)
def test_an_unknown_path_is_404(world: World, path: str) -> None:
    answer = world.send("qwen", path=path)
    assert answer.status == 404
    assert answer.error["code"] == "unknown_url"
    assert "POST /chat/completions" in answer.error["message"]
    assert not world.upstreams["qwen"].received


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/", "POST"),
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/embeddings", "POST"),
        ("OPTIONS", "/v1/models", "GET"),
        ("POST", "/v1/models", "GET"),
    ],
)
def test_another_method_is_405(world: World, method: str, path: str, allow: str) -> None:
    answer = world.send("qwen", None if method == "GET" else b"{}", method=method, path=path)
    assert answer.status == 405
    assert answer.headers["allow"] == allow
    assert answer.error["code"] == "method_not_allowed"
    assert not world.upstreams["qwen"].received


def test_head_is_405(world: World) -> None:
    answer = world.send("qwen", None, method="HEAD", path="/v1/models")
    assert (answer.status, answer.headers["allow"]) == (405, "GET")


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (("content-type", "multipart/form-data; boundary=x"), "unsupported_media_type"),
        (("content-type", "Multipart/Mixed"), "unsupported_media_type"),
        (("content-encoding", "gzip"), "unsupported_content_encoding"),
        (("content-encoding", "identity, br"), "unsupported_content_encoding"),
    ],
)
def test_a_body_that_cannot_be_spliced_is_415(world: World, header: tuple[str, str], code: str) -> None:
    answer = world.send("qwen", headers=[header])
    assert answer.status == 415
    assert answer.error["code"] == code
    assert not world.upstreams["qwen"].received


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("content-type", "application/x-www-form-urlencoded")],
        [("content-type", "text/plain; charset=utf-8"), ("content-encoding", "Identity")],
    ],
    ids=["no content-type", "curl -d", "identity"],
)
def test_what_leaves_is_application_json(world: World, headers: list[tuple[str, str]]) -> None:
    assert world.send("qwen", headers=headers).status == 200
    assert world.received("qwen").header("content-type") == "application/json"


def test_an_operation_without_members_passes_as_it_is(world: World) -> None:
    """No JSON, compressed, of another content type: only host, path, key and headers are set."""
    headers = [
        ("content-type", "multipart/form-data; boundary=x"),
        ("content-encoding", "gzip"),
    ]
    assert (
        world.send("qwen", b"\x1f\x8b\0", path="/v1/audio/transcriptions?a=b", headers=headers).status == 200
    )
    request = world.received("qwen")
    assert request.path == "/compatible-mode/v1/audio/transcriptions?a=b"
    assert request.body == b"\x1f\x8b\0"
    assert request.header("content-type") == "multipart/form-data; boundary=x"
    assert request.header("authorization") == "key-of-qwen"


# --------------------------------------------------------------------------------------------------
# The headers


def test_a_keyless_provider_gets_no_key_of_the_client(world: World) -> None:
    assert world.send("keyless", headers=[("authorization", "Bearer secret")]).status == 200
    assert world.received("keyless").header("authorization") is None


# --------------------------------------------------------------------------------------------------
# The model that logs and metrics see


@pytest.mark.parametrize(
    ("host", "body", "model"),
    [
        ("merge-model", b"{}", "qwen-turbo"),
        ("merge-model", b'{"model": "gpt-4"}', "qwen-turbo"),
        ("merge-nested", b"{}", "qwen-plus"),
        ("merge-nested", b'{"model": "gpt-4"}', "gpt-4"),
        ("merge-nested", b'{"model": null}', None),
        ("merge-checked", b"{}", None),
        ("merge-checked", b'{"model": ""}', None),
        ("merge-checked", b'{"model": 4, "a": {"model": "b"}}', None),
        ("merge-checked", b'{"model": "first", "mod\\u0065l": "last"}', "last"),
        ("merge-checked", rb'{"model": "g\u0070t\/\"4\\"}', 'gpt/"4\\'),
        ("merge-checked", rb'{"model": "a\r\nb\u0000\u00e9\ud83d"}', "a??b??????"),
        ("merge-checked", '{"model": "é\x7f"}'.encode(), "???"),
        ("merge-checked", b'{"model": "' + b"m" * 500 + b'"}', "m" * 128),
        ("merge-checked", b'{"model": "' + rb"\u006d" * 500 + b'"}', "m" * 128),
    ],
)
def test_the_model_is_told(world: World, host: str, body: bytes, model: str | None) -> None:
    """The model that was sent, cut and made printable."""
    answer = world.send(host, body)
    assert answer.status == 200
    assert answer.headers.get("x-model") == model


# --------------------------------------------------------------------------------------------------
# Another provider after a failure


def test_a_second_provider_gets_what_is_its_own(world: World) -> None:
    """Its path, model, host and members, made from the client's own request; and no key, as it has none."""
    world.upstreams["qwen"].status = 503
    answer = world.send(
        "qwen-then-moon", b'{"model": "gpt-4", "a": 1}', headers=[("authorization", "key of client")]
    )
    assert answer.status == 200
    assert answer.headers["x-model"] == "gpt-4"

    first = world.received("qwen")
    assert first.path == OWN
    assert first.body == b'{"stream":false,"model": "qwen-turbo", "a": 1}'
    assert first.header("authorization") == "key-of-qwen"

    second = world.received("moon")
    assert second.path == "/openai/v1/chat/completions"
    assert second.header("host") == "moonshot.example"
    assert second.body == b'{"top_p":0.5,"model": "gpt-4", "a": 1}'
    assert second.header("content-length") == str(len(second.body))
    assert "key" not in str(second.headers)


@pytest.mark.parametrize(
    ("first", "second", "first_path", "second_path"),
    [
        ("qwen", "moon", OWN, "/openai/v2/generate"),
        ("moon", "qwen", "/openai/v2/generate", OWN),
    ],
)
def test_the_own_operation_of_each(
    world: World, first: str, second: str, first_path: str, second_path: str
) -> None:
    """POST to `/` means what each provider calls its own: the first one's path says nothing to the second."""
    world.upstreams[first].status = 503
    assert world.send(f"{first}-then-{second}", path="/").status == 200
    assert world.received(first).path == first_path
    assert world.received(second).path == second_path


def test_an_operation_that_the_second_one_does_not_have_is_404(world: World) -> None:
    world.upstreams["qwen"].status = 503
    answer = world.send("qwen-then-moon", path="/v1/completions")
    assert answer.status == 404
    assert "POST /v2/generate" in answer.error["message"]
    assert not world.upstreams["moon"].received


def test_get_after_a_failure(world: World) -> None:
    world.upstreams["qwen"].status = 503
    assert world.send("qwen-then-moon", None, method="GET", path="/v1/models").status == 200
    assert world.received("moon").path == "/openai/v1/models?api-version=1"


def test_a_body_that_passes_after_one_that_was_spliced(world: World) -> None:
    """The length that the first attempt set is the length of the first attempt's body."""
    world.upstreams["qwen"].status = 503
    answer = world.send("qwen-then-moon", b'{"input": "a"}', path="/v1/embeddings")
    assert answer.status == 200
    assert answer.headers.get("x-model", "") == ""
    assert world.received("qwen").body == b'{"model":"embed-1","input": "a"}'
    second = world.received("moon")
    assert second.body == b'{"input": "a"}'
    assert second.header("content-length") == "14"


def test_a_form_that_passes_twice(world: World) -> None:
    world.upstreams["qwen"].status = 503
    headers = [("content-type", "multipart/form-data; boundary=x")]
    assert (
        world.send("qwen-then-moon", b"--x--", path="/v1/audio/transcriptions", headers=headers).status == 200
    )
    second = world.received("moon")
    assert (second.body, second.header("content-length")) == (b"--x--", "5")
    assert second.header("content-type") == "multipart/form-data; boundary=x"


# --------------------------------------------------------------------------------------------------
# The script itself


def test_a_fault_of_the_script_is_500(world: World) -> None:
    """Here it got no data. A request must never pass unchanged, least of all with the key."""
    answer = world.send("broken")
    assert answer.status == 500
    assert answer.error == {
        "message": "The proxy could not prepare the request.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert not world.upstreams["broken"].received


def test_more_providers_than_plans_are_kept(world: World) -> None:
    """The script keeps a bounded number of merge plans (here two), and makes those again that it dropped."""
    for number in [1, 2, 3, 1, 1, 3, 2]:
        world.reset()
        assert world.send(f"evicted-{number}").status == 200
        assert json.loads(world.received(f"evicted-{number}").body) == {"model": number}


def test_a_script_that_cannot_run_here_is_refused_with_the_configuration() -> None:
    """Without ffi there is no second way: Envoy does not take the cluster."""
    with (
        pytest.raises(RuntimeError, match="no ffi here"),
        running_envoy(
            bootstrap(
                dict.fromkeys(PROVIDERS, 1), script="require = function() error('no ffi here') end " + SCRIPT
            )
        ),
    ):
        pass
