"""The fake LLM: what a client of a provider sees of it, what it tells about its clients, and how it fails."""

import asyncio
import contextlib
import gzip
import hashlib
import json
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from click.testing import CliRunner

from llmplane import fakellm
from llmplane.certificates import CertificateAuthority
from llmplane.fakellm import FakeLLM, Fault, Host, fingerprint, running_in_thread

DASHSCOPE = "dashscope.aliyuncs.com"
MOONSHOT = "api.moonshot.cn"
CHAT_PATH = "/compatible-mode/v1/chat/completions"
QUESTION = {"model": "qwen-turbo", "messages": [{"role": "user", "content": "Please introduce yourself"}]}


class Client:
    """A client that reaches the hosts of a plaintext fake LLM at its address."""

    def __init__(self, fake: FakeLLM, session: aiohttp.ClientSession) -> None:
        self.fake = fake
        self.session = session

    async def request(
        self,
        method: str,
        path: str,
        *,
        host: str = DASHSCOPE,
        key: str | None = "sk-1",
        body: object = None,
        headers: dict[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        headers = {"Host": host, "Content-Type": "application/json", **(headers or {})}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        data = None if body is None else BytesIO(content)
        response = await self.session.request(
            method, f"http://{self.fake.address}{path}", data=data, headers=headers
        )
        await response.read()
        return response

    async def chat(self, *, host: str = DASHSCOPE, **members: object) -> aiohttp.ClientResponse:
        return await self.request("POST", CHAT_PATH, host=host, body={**QUESTION, **members})

    async def admin(self, method: str, path: str, fault: object = None) -> aiohttp.ClientResponse:
        response = await self.session.request(method, f"http://{self.fake.admin_address}{path}", json=fault)
        await response.read()
        return response


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    hosts = {DASHSCOPE: Host(key="sk-1"), MOONSHOT: Host()}
    async with (
        FakeLLM(hosts, admin=("127.0.0.1", 0), maxlen=3) as fake,
        aiohttp.ClientSession(trust_env=False) as session,
    ):
        yield Client(fake, session)


def events(text: str) -> list[Any]:
    """Return the data of server-sent events, without the closing [DONE]."""
    *data, done = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    return [json.loads(each) for each in data]


# Answers


async def test_a_chat_completion_looks_like_those_of_the_documentation(client: Client) -> None:
    response = await client.chat()
    assert (response.status, response.content_type) == (200, "application/json")
    answer = await response.json()
    message = answer["choices"][0].pop("message")
    assert message["role"] == "assistant"
    assert message["content"].startswith("I am qwen-turbo, answering for dashscope.aliyuncs.com.")
    assert re.fullmatch("chatcmpl-[0-9a-f-]{36}", answer.pop("id"))
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "choices": [{"finish_reason": "stop", "index": 0, "logprobs": None}],
        "object": "chat.completion",
        "usage": {"prompt_tokens": 3, "completion_tokens": 72, "total_tokens": 75},
        "system_fingerprint": None,
        "model": "qwen-turbo",
    }


async def test_a_stream_says_the_same_in_pieces(client: Client) -> None:
    whole = (await (await client.chat()).json())["choices"][0]["message"]["content"]
    response = await client.chat(stream=True)
    assert (response.status, response.content_type) == (200, "text/event-stream")
    chunks = events(await response.text())
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["model"] for chunk in chunks} == {"qwen-turbo"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == whole
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


async def test_a_stream_tells_its_usage_only_when_asked(client: Client) -> None:
    without = events(await (await client.chat(stream=True)).text())
    assert not any("usage" in chunk for chunk in without)
    with_usage = events(await (await client.chat(stream=True, stream_options={"include_usage": True})).text())
    assert with_usage[-1]["choices"] == []
    assert with_usage[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 72, "total_tokens": 75}
    assert {json.dumps(chunk["usage"]) for chunk in with_usage[:-1]} == {"null"}


async def test_other_operations(client: Client) -> None:
    """Only the end of the path decides."""
    completion = await client.request("POST", "/v1/completions", body={"model": "m", "prompt": "Hello"})
    assert (await completion.json())["choices"][0]["text"].startswith("I am m,")
    embeddings = await client.request("POST", "/a/b/embeddings", body={"model": "m", "input": ["a", "b"]})
    assert [each["embedding"] for each in (await embeddings.json())["data"]] == [[0.25, -0.5, 0.75, 1.0]] * 2
    response = await client.request("POST", "/responses?beta=1", body={"model": "m", "input": "Hello"})
    assert (await response.json())["output"][0]["content"][0]["text"].startswith("I am m,")
    models = await client.request("GET", "/api/v3/models")
    assert [model["id"] for model in (await models.json())["data"]] == ["model-of-dashscope.aliyuncs.com"]


# Refusals


async def test_anthropics_messages(client: Client) -> None:
    """What came from the cache is not part of the input there, and the stream tells the output at its end."""
    client.fake.set_fault(DASHSCOPE, Fault(cached_tokens=2))
    whole = await (await client.request("POST", "/v1/messages", body=QUESTION)).json()
    assert whole["usage"] == {
        "input_tokens": 1,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 2,
        "output_tokens": 72,
    }
    response = await client.request("POST", "/v1/messages", body=QUESTION | {"stream": True})
    events = [json.loads(line[6:]) for line in (await response.text()).splitlines() if line[:5] == "data:"]
    assert [event["type"] for event in events if event["type"] != "content_block_delta"] == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    said = "".join(event["delta"].get("text", "") for event in events if "delta" in event)
    assert said == whole["content"][0]["text"]
    assert events[-2]["usage"] == {"output_tokens": 72}


async def test_geminis_content(client: Client) -> None:
    """The model is in the path; a stream is an array, or events where they are asked for."""
    client.fake.set_fault(DASHSCOPE, Fault(reasoning_tokens=9))
    path, body = "/v1beta/models/gemini-2.0:", {"contents": [{"parts": [{"text": "Hi"}]}]}
    whole = await (await client.request("POST", path + "generateContent", body=body)).json()
    assert whole["modelVersion"] == "gemini-2.0"
    assert whole["usageMetadata"] == {
        "promptTokenCount": 3,
        "candidatesTokenCount": 63,
        "totalTokenCount": 75,
        "thoughtsTokenCount": 9,
    }
    array = await (await client.request("POST", path + "streamGenerateContent", body=body)).json()
    assert array == [whole]
    response = await client.request("POST", path + "streamGenerateContent?alt=sse", body=body)
    events = [json.loads(line[6:]) for line in (await response.text()).splitlines() if line]
    assert events[-1]["usageMetadata"] == whole["usageMetadata"]
    texts = [event["candidates"][0]["content"]["parts"][0]["text"] for event in events]
    assert "".join(texts) == whole["candidates"][0]["content"]["parts"][0]["text"]


async def test_details_of_the_usage(client: Client) -> None:
    client.fake.set_fault(DASHSCOPE, Fault(cached_tokens=2, reasoning_tokens=64))
    answer = await (await client.request("POST", CHAT_PATH, body=QUESTION)).json()
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 64}


async def test_a_member_can_be_rejected(client: Client) -> None:
    client.fake.set_fault(DASHSCOPE, Fault(rejects=frozenset({"stream_options"})))
    body = QUESTION | {"stream": True, "stream_options": {"include_usage": True}}
    response = await client.request("POST", CHAT_PATH, body=body)
    assert response.status == 400
    assert (await response.json())["error"]["param"] == "stream_options"
    assert (await client.request("POST", CHAT_PATH, body=QUESTION)).status == 200


@pytest.mark.parametrize("key", [None, "sk-2", "sk-12", ""])
async def test_a_wrong_key_is_refused(client: Client, key: str | None) -> None:
    response = await client.request("POST", CHAT_PATH, key=key, body=QUESTION)
    assert response.status == 401
    assert (await response.json())["error"]["code"] == "invalid_api_key"


async def test_keys_can_be_rotated(client: Client) -> None:
    client.fake.hosts[DASHSCOPE] = Host(key=("sk-1", "sk-2"))
    assert (await client.request("GET", "/v1/models", key="sk-1")).status == 200
    assert (await client.request("GET", "/v1/models", key="sk-2")).status == 200
    client.fake.hosts[DASHSCOPE] = Host(key="sk-2")
    assert (await client.request("GET", "/v1/models", key="sk-1")).status == 401
    assert "sk-2" not in repr(client.fake.hosts)


async def test_a_host_without_a_key_asks_for_none(client: Client) -> None:
    assert (await client.request("GET", "/v1/models", host=MOONSHOT, key=None)).status == 200
    assert (await client.request("GET", "/v1/models", host=MOONSHOT, key="any")).status == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'{"model": NaN}', None),
        (b"[" * 100_000, None),
        ({"messages": QUESTION["messages"]}, "model"),
        ({"model": "qwen-turbo"}, "messages"),
        ({"model": "qwen-turbo", "messages": []}, "messages"),
    ],
)
async def test_what_nobody_filled_in_is_missed(client: Client, body: object, param: str | None) -> None:
    response = await client.request("POST", CHAT_PATH, body=body)
    assert response.status == 400
    error = (await response.json())["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize(
    ("method", "path", "host", "headers", "status"),
    [
        ("POST", "/", DASHSCOPE, {}, 404),
        ("POST", "/v1/images/generations", DASHSCOPE, {}, 404),
        ("GET", CHAT_PATH, DASHSCOPE, {}, 405),
        ("POST", "/v1/models", DASHSCOPE, {}, 405),
        ("POST", CHAT_PATH, DASHSCOPE, {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ("POST", CHAT_PATH, "api.openai.com", {}, 421),
        ("POST", CHAT_PATH, "dashscope.aliyuncs.com:443", {}, 200),
    ],
)
async def test_other_requests_are_refused_as_by_a_provider(
    client: Client, *, method: str, path: str, host: str, headers: dict[str, str], status: int
) -> None:
    body = QUESTION if method == "POST" else None
    response = await client.request(method, path, host=host, headers=headers, body=body)
    assert response.status == status
    assert ("error" in await response.json()) == (status != 200)


# What it saw


async def test_it_tells_what_really_arrived(client: Client) -> None:
    body = b'{"model": "qwen-turbo",  "messages": [{}], "n": 9007199254740993}'
    path = f"{CHAT_PATH}?a=%20b"
    await client.request("POST", path, body=body, headers={"X-lower-UPPER": "1", "Host": f"{DASHSCOPE}:443"})
    (seen,) = client.fake.seen
    assert (seen.method, seen.path, seen.body) == ("POST", path, body)
    assert (seen.host, seen.provider, seen.sni) == ("dashscope.aliyuncs.com:443", DASHSCOPE, None)
    assert (seen.model, seen.key_fingerprint) == ("qwen-turbo", fingerprint("sk-1"))
    assert seen.sha256 == hashlib.sha256(body).hexdigest()
    assert ("X-lower-UPPER", "1") in seen.headers
    assert seen.header("x-lower-upper") == ["1"]


async def test_it_keeps_no_credential(client: Client) -> None:
    await client.request("GET", "/v1/models", headers={"X-Api-Key": "sk-secret", "Cookie": "sk-secret"})
    (seen,) = client.fake.seen
    assert seen.header("authorization") == [f"Bearer sha256:{fingerprint('sk-1')}"]
    assert seen.header("x-api-key") == seen.header("cookie") == [f"sha256:{fingerprint('sk-secret')}"]
    told = await (await client.admin("GET", "/__seen")).text()
    for text in (repr(seen), told):
        assert "sk-" not in text


async def test_the_admin_address_tells_the_same(client: Client) -> None:
    await client.chat()
    (seen,) = client.fake.seen
    told = await (await client.admin("GET", "/__seen")).json()
    assert told["total"] == 1
    (request,) = told["requests"]
    assert request == json.loads(json.dumps(seen.to_json()))
    assert request["provider"] == DASHSCOPE
    assert request["key_fingerprint"] == fingerprint("sk-1")
    assert request["body_sha256"] == seen.sha256
    assert "Please introduce yourself" not in json.dumps(request)


async def test_it_remembers_the_last_requests_only(client: Client) -> None:
    for number in range(5):
        await client.request("GET", f"/{number}")
    assert [seen.path for seen in client.fake.seen] == ["/2", "/3", "/4"]
    assert client.fake.total == 5
    assert (await client.admin("DELETE", "/__seen")).status == 204
    assert (client.fake.seen, client.fake.total) == ((), 0)


async def test_a_large_body_arrives_whole(client: Client) -> None:
    content = "x" * 10_000_000
    response = await client.chat(messages=[{"role": "user", "content": content}])
    assert response.status == 200
    assert json.loads(client.fake.seen[0].body)["messages"][0]["content"] == content


async def test_a_compressed_body_arrives_as_sent(client: Client) -> None:
    """A provider does not decompress either."""
    body = gzip.compress(json.dumps(QUESTION).encode())
    response = await client.request("POST", CHAT_PATH, body=body, headers={"Content-Encoding": "gzip"})
    assert response.status == 400
    assert client.fake.seen[0].body == body


async def test_a_body_that_breaks_off_is_nobodys_request(client: Client) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", client.fake.port)
    writer.write(f"POST {CHAT_PATH} HTTP/1.1\r\nHost: {DASHSCOPE}\r\nContent-Length: 99\r\n\r\n{{".encode())
    writer.write_eof()
    await reader.read()
    writer.close()
    await writer.wait_closed()
    assert client.fake.seen == ()


# Faults


@pytest.mark.parametrize(
    ("status", "kind"), [(429, "rate_limit_error"), (503, "server_error"), (400, "invalid_request_error")]
)
async def test_a_host_answers_an_error_as_often_as_asked(client: Client, status: int, kind: str) -> None:
    client.fake.set_fault(DASHSCOPE, Fault(status=status, retry_after=7, times=2))
    for _ in range(2):
        response = await client.chat()
        assert (response.status, response.headers["Retry-After"]) == (status, "7")
        assert (await response.json())["error"]["type"] == kind
        assert (await client.chat(host=MOONSHOT)).status == 200
    assert (await client.chat()).status == 200


async def test_a_fault_stays_until_it_is_taken_away(client: Client) -> None:
    assert (await client.admin("PUT", f"/__faults/{DASHSCOPE}", {"status": 500})).status == 204
    assert [(await client.chat()).status for _ in range(3)] == [500] * 3
    assert (await client.admin("DELETE", f"/__faults/{DASHSCOPE}")).status == 204
    assert (await client.chat()).status == 200


@pytest.mark.parametrize(
    ("host", "fault", "status"),
    [
        (DASHSCOPE, {"stauts": 500}, 400),
        (DASHSCOPE, {"status": 200}, 400),
        (DASHSCOPE, ["status"], 400),
        ("api.openai.com", {"status": 500}, 404),
    ],
)
async def test_a_fault_that_makes_no_sense_is_refused(
    client: Client, host: str, fault: object, status: int
) -> None:
    assert (await client.admin("PUT", f"/__faults/{host}", fault)).status == status


async def test_a_connection_is_reset_before_the_answer(client: Client) -> None:
    client.fake.set_fault(DASHSCOPE, Fault(reset=True))
    reader, writer = await asyncio.open_connection("127.0.0.1", client.fake.port)
    writer.write(f"GET /v1/models HTTP/1.1\r\nHost: {DASHSCOPE}\r\n\r\n".encode())
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    with contextlib.suppress(ConnectionResetError):
        await writer.wait_closed()
    assert len(client.fake.seen) == 1


async def test_a_stream_breaks_off_in_the_middle(client: Client) -> None:
    client.fake.set_fault(DASHSCOPE, Fault(close_after_chunks=4))
    reader, writer = await asyncio.open_connection("127.0.0.1", client.fake.port)
    body = json.dumps({**QUESTION, "stream": True})
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: {DASHSCOPE}\r\nAuthorization: Bearer sk-1\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write((head + body).encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"data: ") == 4
    assert not answer.endswith(b"0\r\n\r\n"), "the last chunk of the encoding would make it a whole answer"


async def test_the_size_of_an_answer_is_chosen(client: Client) -> None:
    client.fake.set_fault(DASHSCOPE, Fault(answer_size=100_000, chunks=40, delay=0.001, chunk_delay=0.001))
    answer = await (await client.chat()).json()
    assert len(answer["choices"][0]["message"]["content"]) == 100_000
    chunks = events(await (await client.chat(stream=True)).text())
    assert len(chunks) == 1 + 40 + 1, "role, text, finish reason"
    assert {len(chunk["choices"][0]["delta"]["content"]) for chunk in chunks[1:-1]} == {2500}


async def test_a_client_that_goes_away_does_no_harm(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    client.fake.set_fault(DASHSCOPE, Fault(answer_size=1_000_000, chunks=1000, times=1))
    url = f"http://{client.fake.address}{CHAT_PATH}"
    headers = {"Host": DASHSCOPE, "Authorization": "Bearer sk-1"}
    async with client.session.post(url, json={**QUESTION, "stream": True}, headers=headers) as response:
        await response.content.readany()
        response.close()
    assert (await client.chat()).status == 200
    assert caplog.records == []


async def test_it_stops_at_once_and_can_start_again(client: Client) -> None:
    fake = FakeLLM({MOONSHOT: Host()})
    fake.set_fault(MOONSHOT, Fault(delay=3600))
    async with fake:
        request = asyncio.create_task(Client(fake, client.session).chat(host=MOONSHOT))
        while not fake.seen:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await request
    fake.set_fault(MOONSHOT, None)
    async with fake:
        assert (await Client(fake, client.session).chat(host=MOONSHOT)).status == 200


# TLS


async def test_each_host_has_a_certificate_of_its_own_name() -> None:
    authority = CertificateAuthority.create()
    tls = authority.client_context()
    async with (
        FakeLLM({DASHSCOPE: Host(), MOONSHOT: Host(), "127.0.0.1": Host()}, ca=authority) as fake,
        aiohttp.ClientSession(trust_env=False) as session,
    ):
        url = f"https://{fake.address}/v1/models"
        for host in (DASHSCOPE, MOONSHOT):
            async with session.get(url, ssl=tls, server_hostname=host, headers={"Host": host}) as response:
                assert response.status == 200
            assert (fake.seen[-1].sni, fake.seen[-1].host) == (host, host)

        async with session.get(url, ssl=tls) as response:
            assert response.status == 200
        assert fake.seen[-1].sni is None, "there is no server name for an IP address"

        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await session.get(url, ssl=tls, server_hostname="api.openai.com")
        assert len(fake.seen) == 3


async def test_it_serves_at_several_addresses() -> None:
    hosts = {DASHSCOPE: Host()}
    async with (
        FakeLLM(hosts, listen=[("127.0.0.1", 0), ("127.0.0.2", 0)]) as fake,
        aiohttp.ClientSession(trust_env=False) as session,
    ):
        assert [host for host, _ in fake.addresses] == ["127.0.0.1", "127.0.0.2"]
        for host, port in fake.addresses:
            async with session.get(
                f"http://{host}:{port}/v1/models", headers={"Host": DASHSCOPE}
            ) as response:
                assert response.status == 200


async def test_an_address_in_use_is_an_error(client: Client) -> None:
    taken = ("127.0.0.1", client.fake.port)
    with pytest.raises(OSError, match="in use"):
        await FakeLLM({}, listen=[taken]).__aenter__()
    with pytest.raises(OSError, match="in use"), running_in_thread(FakeLLM({}, listen=[taken])):
        pass


# The official SDK, over TLS


@pytest.fixture
def tls_fake() -> Iterator[tuple[FakeLLM, ssl.SSLContext]]:
    authority = CertificateAuthority.create()
    with running_in_thread(FakeLLM({"localhost": Host(key="sk-1")}, ca=authority)) as fake:
        yield fake, authority.client_context()


@pytest.fixture
def sdk(tls_fake: tuple[FakeLLM, ssl.SSLContext]) -> Iterator[openai.OpenAI]:
    fake, tls = tls_fake
    with (
        openai.DefaultHttpxClient(verify=tls, trust_env=False) as http,
        openai.OpenAI(
            base_url=f"https://localhost:{fake.port}/v1", api_key="sk-1", http_client=http, max_retries=0
        ) as client,
    ):
        yield client


def test_sdk_chat(sdk: openai.OpenAI, tls_fake: tuple[FakeLLM, ssl.SSLContext]) -> None:
    answer = sdk.chat.completions.create(model="qwen-turbo", messages=[{"role": "user", "content": "Hello"}])
    assert answer.model == "qwen-turbo"
    assert (answer.choices[0].message.content or "").startswith("I am qwen-turbo")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 75
    fake, _ = tls_fake
    assert (fake.seen[0].sni, fake.seen[0].path) == ("localhost", "/v1/chat/completions")


def test_sdk_stream(sdk: openai.OpenAI) -> None:
    chunks = list(
        sdk.chat.completions.create(
            model="qwen-turbo",
            messages=[{"role": "user", "content": "Hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.startswith("I am qwen-turbo")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 75


def test_sdk_other_operations(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["model-of-localhost"]
    assert sdk.completions.create(model="m", prompt="Hello").choices[0].text.startswith("I am m")
    pieces = sdk.completions.create(model="m", prompt="Hello", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces).startswith("I am m")
    assert sdk.embeddings.create(model="m", input="Hello").data[0].embedding == [0.25, -0.5, 0.75, 1.0]
    assert sdk.responses.create(model="m", input="Hello").output_text.startswith("I am m")
    deltas = [
        event.delta
        for event in sdk.responses.create(model="m", input="Hello", stream=True)
        if event.type == "response.output_text.delta"
    ]
    assert "".join(deltas).startswith("I am m")


def test_sdk_errors(sdk: openai.OpenAI, tls_fake: tuple[FakeLLM, ssl.SSLContext]) -> None:
    fake, _ = tls_fake
    with pytest.raises(openai.AuthenticationError, match="correct API key"):
        sdk.with_options(api_key="sk-2").models.list()
    fake.set_fault("localhost", Fault(status=429, times=1))
    with pytest.raises(openai.RateLimitError):
        sdk.models.list()
    fake.set_fault("localhost", Fault(status=503, times=1))
    with pytest.raises(openai.InternalServerError):
        sdk.models.list()
    fake.set_fault("localhost", Fault(reset=True, times=1))
    with pytest.raises(openai.APIConnectionError):
        sdk.models.list()
    assert fake.total == 4


# The process


def test_it_runs_as_a_process_until_sigterm(tmp_path: Path) -> None:
    arguments = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--ca-dir", str(tmp_path), "--verbose"]
    arguments += ["--host", "localhost", "--key", "localhost=sk-1", "--key", "localhost=sk-2"]
    with subprocess.Popen(
        [sys.executable, "-m", "llmplane.fakellm", *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            started = re.fullmatch(
                r"fake LLM at 127\.0\.0\.1:(\d+), admin at 127\.0\.0\.1:\d+\n", process.stdout.readline()
            )
            assert started is not None
            tls = ssl.create_default_context(cafile=tmp_path / "ca.pem")
            for key in ("sk-1", "sk-2"):
                with (
                    openai.DefaultHttpxClient(verify=tls, trust_env=False) as http,
                    openai.OpenAI(
                        base_url=f"https://localhost:{started[1]}/v1", api_key=key, http_client=http
                    ) as client,
                ):
                    client.completions.create(model="qwen-turbo", prompt="Hello")
                assert process.stdout.readline() == (
                    f"localhost model=qwen-turbo POST /v1/completions key={fingerprint(key)}\n"
                )
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--host", "a", "--key", "b=sk-secret"], "HOST=KEY"),
        (["--host", "a", "--key", "sk-secret"], "HOST=KEY"),
        (["--host", "a", "--listen", "8443"], "'8443' is not ADDRESS:PORT"),
        ([], "Missing option '--host'"),
    ],
)
def test_wrong_arguments_are_named_without_the_key(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(fakellm.command, arguments)
    assert result.exit_code == 2
    assert complaint in result.output
    assert "sk-secret" not in result.output


def test_a_directory_with_something_else_in_it_is_named(tmp_path: Path) -> None:
    CertificateAuthority.create().write(tmp_path)
    (tmp_path / "ca-key.pem").write_text("something else")
    result = CliRunner().invoke(fakellm.command, ["--host", "a", "--ca-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert str(tmp_path) in result.output
