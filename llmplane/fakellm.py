"""A fake LLM: an OpenAI-compatible server that plays several providers, for `llmplane demo` and the tests.

It behaves like a provider where a client or a proxy can tell: TLS with a certificate of each host's own
name, 401 for a wrong key, 400 for a body without a model, streams as server-sent events. The wire format is
that of OpenAI's API reference (https://platform.openai.com/docs/api-reference), the look of an answer
DashScope's as the ASM documentation prints it; Anthropic's Messages and Gemini's generateContent are played
with theirs. Beyond that it records what really arrived (`SeenRequest`),
and it fails on demand (`Fault`).

What it sees of credentials is never kept: a key is known by its `fingerprint` only.
"""

import asyncio
import base64
import hashlib
import json
import re
import signal
import socket
import ssl
import struct
import threading
import time
import uuid
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import click
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmplane.certificates import CertificateAuthority

# Seconds to wait for answers under way when the server stops; aiohttp takes 0 for "for ever".
_SHUTDOWN_TIMEOUT = 0.05
_CREDENTIAL_HEADERS = frozenset({"authorization", "proxy-authorization", "x-api-key", "api-key", "cookie"})
# The numbers of the seed documents' answers. Constant, so that tests of quotas and metrics can count.
_PROMPT_TOKENS = 3
_COMPLETION_TOKENS = 72


def fingerprint(key: str) -> str:
    """Return the first 8 hexadecimal digits of the key's SHA-256: enough to tell keys apart."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:8]


@dataclass(frozen=True)
class Host:
    """A provider host that is played.

    `key` is the API key that it wants as a bearer token; several ones while a key is being rotated; None
    means that it wants none.
    """

    key: str | tuple[str, ...] | None = field(default=None, repr=False)

    def accepts(self, authorizations: Sequence[str]) -> bool:
        """Tell whether the values of the request's Authorization headers let it in."""
        if self.key is None:
            return True
        keys = (self.key,) if isinstance(self.key, str) else self.key
        return len(authorizations) == 1 and authorizations[0] in {f"Bearer {key}" for key in keys}


class Fault(BaseModel):
    """How a host answers otherwise than at once and well. Times are in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: int | None = Field(default=None, ge=400, le=599)
    """Answer with this status and an OpenAI-style error."""
    retry_after: int | None = Field(default=None, ge=0)
    """The Retry-After header that goes with `status`, in seconds."""
    reset: bool = False
    """Reset the connection (TCP RST) instead of answering."""
    delay: float = Field(default=0, ge=0)
    """Wait before anything of the answer is sent."""
    chunks: int | None = Field(default=None, ge=1)
    """Cut the text of a stream into so many chunks. Without it: one a word."""
    chunk_delay: float = Field(default=0, ge=0)
    """Wait before each event of a stream but the first."""
    close_after_chunks: int | None = Field(default=None, ge=1)
    """Close the connection in the middle of a stream, after so many events."""
    answer_size: int | None = Field(default=None, ge=0)
    """The length of the assistant's text in characters."""
    cached_tokens: int | None = Field(default=None, ge=0, le=_PROMPT_TOKENS)
    """How many of the prompt's tokens came from a cache. Without it: nothing is said of them."""
    reasoning_tokens: int | None = Field(default=None, ge=0, le=_COMPLETION_TOKENS)
    """How many of the answer's tokens are reasoning. Without it: nothing is said of them."""
    no_usage: bool = False
    """Say nothing of tokens in the answers of chats and completions, as some servers do."""
    rejects: frozenset[str] = frozenset()
    """Answer 400 to requests whose body has one of these members, as some servers do to `stream_options`."""
    times: int | None = Field(default=None, ge=1)
    """Apply to the next so many requests only. Without it: until it is changed."""


@dataclass(frozen=True)
class SeenRequest:
    """One request as it arrived, with credentials replaced by their fingerprints."""

    time: float
    """When its body was complete, Unix time in seconds."""
    sni: str | None
    """The server name of the TLS handshake; None without TLS, and for a client that sent none."""
    host: str
    """The Host header as sent, '' without one."""
    method: str
    path: str
    """The request target as sent, with the query."""
    headers: tuple[tuple[str, str], ...]
    """Order and case as sent. A credential is replaced by 'sha256:' and its fingerprint ('Bearer ' stays)."""
    body: bytes = field(repr=False)
    model: str | None
    """The member `model` of the body, if that is a JSON object and the member a string."""
    key_fingerprint: str | None
    """Of the bearer token, or of the whole value if the Authorization header holds something else."""

    @property
    def provider(self) -> str:
        """The host without port, in lower case; '' if it is not a host at all."""
        try:
            return urlsplit(f"//{self.host}").hostname or ""
        except ValueError:
            return ""

    @property
    def sha256(self) -> str:
        """The SHA-256 of the body, in hexadecimal."""
        return hashlib.sha256(self.body).hexdigest()

    def header(self, name: str) -> list[str]:
        """Return the values of all headers of this name, whose case does not matter."""
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def to_json(self) -> dict[str, Any]:
        """Return everything but the body as plain values."""
        return {
            "time": self.time,
            "provider": self.provider,
            "sni": self.sni,
            "host": self.host,
            "method": self.method,
            "path": self.path,
            "model": self.model,
            "key_fingerprint": self.key_fingerprint,
            "headers": self.headers,
            "body_size": len(self.body),
            "body_sha256": self.sha256,
        }


class FakeLLM:
    """The server. `async with` runs it, or `running_in_thread` where there is no event loop.

    `hosts` are the providers it plays, by lower-case host name; others get a 421. `ca` issues each one's
    certificate, chosen by SNI; a client with an unknown or no server name gets one for `unknown.invalid` and
    those hosts that are IP addresses. Without `ca` it talks plaintext. `listen` are the addresses to serve
    at (port 0 = any free one), each with all hosts. `admin` is the plaintext address of `/__seen` and
    `/__faults`. The last `maxlen` requests are kept, with their bodies. `on_request` is called with each one.

    Attributes and methods may be used from any thread.
    """

    def __init__(
        self,
        hosts: Mapping[str, Host],
        *,
        ca: CertificateAuthority | None = None,
        listen: Sequence[tuple[str, int]] = (("127.0.0.1", 0),),
        admin: tuple[str, int] | None = None,
        maxlen: int = 1000,
        on_request: Callable[[SeenRequest], None] | None = None,
    ) -> None:
        self.hosts = dict(hosts)
        """May be changed while running, as when a key is rotated."""
        self.addresses: list[tuple[str, int]] = []
        """The addresses it serves at, in the order of `listen`, once it runs."""
        self.admin_address: str | None = None
        """The admin address, '127.0.0.1:1234', once it runs."""
        self.total = 0
        """How many requests there were, also those that are no longer in `seen`."""
        self._ca = ca
        self._listen = listen
        self._admin = admin
        self._on_request = on_request
        self._seen: deque[SeenRequest] = deque(maxlen=maxlen)
        self._faults: dict[str, Fault] = {}
        self._lock = threading.Lock()
        self._server_names: WeakKeyDictionary[ssl.SSLObject, str] = WeakKeyDictionary()
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._running = AsyncExitStack()

    @property
    def port(self) -> int:
        """The port of the first address."""
        return self.addresses[0][1]

    @property
    def address(self) -> str:
        """The first address, as '127.0.0.1:1234'."""
        host, port = self.addresses[0]
        return f"{host}:{port}"

    @property
    def seen(self) -> tuple[SeenRequest, ...]:
        """What arrived, the newest last."""
        with self._lock:
            return tuple(self._seen)

    def forget(self) -> None:
        """Empty `seen` and set `total` to 0."""
        with self._lock:
            self._seen.clear()
            self.total = 0

    def set_fault(self, host: str, fault: Fault | None) -> None:
        """Let a host answer with this fault from now on; None makes it well again.

        Raises KeyError if the host is not played.
        """
        if host not in self.hosts:
            raise KeyError(host)
        with self._lock:
            if fault is None:
                self._faults.pop(host, None)
            else:
                self._faults[host] = fault

    async def __aenter__(self) -> Self:
        """Start. Raises OSError if an address cannot be had."""
        async with AsyncExitStack() as stack:
            # What Envoy sent is of interest, not what aiohttp makes of it: no decompression.
            server = web.Server(self._handle, access_log=None, auto_decompress=False)
            runner = web.ServerRunner(server, shutdown_timeout=_SHUTDOWN_TIMEOUT)
            await runner.setup()
            stack.push_async_callback(_stop, runner, server)
            tls = self._default_context()
            for host, port in self._listen:
                await web.TCPSite(runner, host, port, ssl_context=tls, backlog=1024).start()
            self.addresses = [address[:2] for address in runner.addresses]
            if self._admin:
                admin = web.AppRunner(self._admin_app(), access_log=None, shutdown_timeout=_SHUTDOWN_TIMEOUT)
                await admin.setup()
                stack.push_async_callback(admin.cleanup)
                await web.TCPSite(admin, *self._admin).start()
                host, port = admin.addresses[0][:2]
                self.admin_address = f"{host}:{port}"
            self._running = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stop at once: running answers are cut off."""
        await self._running.aclose()

    def _default_context(self) -> ssl.SSLContext | None:
        if self._ca is None:
            return None
        context = self._ca.server_context("unknown.invalid", *filter(_is_ip_address, self.hosts))
        context.sni_callback = self._choose_certificate
        return context

    def _choose_certificate(self, tls: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        if name is None:
            return
        self._server_names[tls] = name
        if name in self.hosts and self._ca is not None:
            if name not in self._contexts:
                self._contexts[name] = self._ca.server_context(name)
            tls.context = self._contexts[name]

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except _RefusedError as refusal:
            return refusal.response

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            # Not request.read(), which has a limit.
            body = await request.content.read()
        except (ConnectionError, web.RequestPayloadError):
            _refuse(400, "The body is not complete.")
        question = _parse(body)
        seen = self._record(request, body, question)
        provider = seen.provider
        host = self.hosts.get(provider)
        if host is None:
            _refuse(421, f"There is no {seen.host!r} here.")
        fault = self._next_fault(provider)
        await asyncio.sleep(fault.delay)
        if fault.reset:
            _reset(request)
            return web.Response()  # goes nowhere
        if fault.status is not None:
            return _fault_error(fault.status, fault.retry_after)
        path = seen.path.partition("?")[0]
        suffix = _find_suffix(seen.method, path)
        if not host.accepts(request.headers.getall("Authorization", [])):
            _refuse(401, "You did not provide a correct API key.", code="invalid_api_key")
        if suffix == _MODELS:
            return _json(_models(provider))
        return await _reply(request, suffix, seen, question, fault)

    def _record(self, request: web.BaseRequest, body: bytes, question: object) -> SeenRequest:
        tls = request.transport.get_extra_info("ssl_object") if request.transport else None
        authorization = request.headers.get("Authorization")
        model = question.get("model") if isinstance(question, dict) else None
        seen = SeenRequest(
            time=time.time(),
            sni=self._server_names.get(tls) if tls else None,
            host=request.headers.get("Host", ""),
            method=request.method,
            path=request.raw_path,
            headers=tuple(_without_credential(*header) for header in request.raw_headers),
            body=body,
            model=model if isinstance(model, str) else None,
            key_fingerprint=fingerprint(_split_bearer(authorization)[1]) if authorization else None,
        )
        with self._lock:
            self._seen.append(seen)
            self.total += 1
        if self._on_request:
            self._on_request(seen)
        return seen

    def _next_fault(self, host: str) -> Fault:
        with self._lock:
            fault = self._faults.get(host)
            if fault is None:
                return Fault()
            if fault.times == 1:
                del self._faults[host]
            elif fault.times is not None:
                self._faults[host] = fault.model_copy(update={"times": fault.times - 1})
            return fault

    def _admin_app(self) -> web.Application:
        async def get_seen(_: web.Request) -> web.Response:
            with self._lock:
                total, seen = self.total, tuple(self._seen)
            return _json({"total": total, "requests": [request.to_json() for request in seen]})

        async def delete_seen(_: web.Request) -> web.Response:
            self.forget()
            return web.Response(status=204)

        async def put_fault(request: web.Request) -> web.Response:
            try:
                fault = Fault.model_validate_json(await request.read())
            except ValidationError as error:
                return _error(400, str(error))
            return set_fault(request, fault)

        async def delete_fault(request: web.Request) -> web.Response:
            return set_fault(request, None)

        def set_fault(request: web.Request, fault: Fault | None) -> web.Response:
            host = request.match_info["host"]
            try:
                self.set_fault(host, fault)
            except KeyError:
                return _error(404, f"There is no {host!r} here.")
            return web.Response(status=204)

        app = web.Application()
        app.router.add_get("/__seen", get_seen)
        app.router.add_delete("/__seen", delete_seen)
        app.router.add_put("/__faults/{host}", put_fault)
        app.router.add_delete("/__faults/{host}", delete_fault)
        return app


@contextmanager
def running_in_thread(fake: FakeLLM) -> Iterator[FakeLLM]:
    """Run the fake LLM in a thread with an event loop of its own.

    Raises OSError if an address cannot be had.
    """
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        ended = asyncio.Event()
        async with fake:
            started.set_result((asyncio.get_running_loop(), ended))
            await ended.wait()

    with ThreadPoolExecutor(1, "fakellm") as pool:
        served = pool.submit(asyncio.run, serve())
        futures: list[Future[Any]] = [started, served]
        wait(futures, return_when=FIRST_COMPLETED)
        if not started.done():
            served.result()
        loop, ended = started.result()
        try:
            yield fake
        finally:
            loop.call_soon_threadsafe(ended.set)
            served.result()


# Reading a request


class _RefusedError(Exception):
    def __init__(self, response: web.Response) -> None:
        super().__init__(response.status)
        self.response = response


def _refuse(status: int, message: str, *, param: str | None = None, code: str | None = None) -> NoReturn:
    raise _RefusedError(_error(status, message, param=param, code=code))


def _parse(body: bytes) -> Any:
    """Return the value of a JSON body, None if it is not JSON."""

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(body, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return None


def _find_suffix(method: str, path: str) -> str:
    """Return the end of the path that says what is asked for; what stands before it does not matter."""
    suffix = next((suffix for suffix in (*_OPERATIONS, _MODELS) if path.endswith(suffix)), None)
    if suffix is None:
        _refuse(404, f"Unknown request URL: {method} {path}.", code="unknown_url")
    if method != ("GET" if suffix == _MODELS else "POST"):
        _refuse(405, f"Not allowed to {method} on {path}.", code="method_not_supported")
    return suffix


def _check(needed: str, content_type: str, question: Any) -> None:
    """Refuse a body that lacks a model or what its operation needs."""
    if content_type != "application/json":
        _refuse(415, f"Unsupported content type: {content_type!r}.", code="unsupported_content_type")
    if not isinstance(question, dict):
        _refuse(400, "We could not parse the JSON body of your request.")
    if not isinstance(question.get("model"), str):
        _refuse(400, "You must provide a model parameter.", param="model", code="missing_required_parameter")
    if not isinstance(question.get(needed), str | list) or not question[needed]:
        message = f"Missing required parameter: {needed!r}."
        _refuse(400, message, param=needed, code="missing_required_parameter")


def _split_bearer(authorization: str) -> tuple[str, str]:
    """Split the value of an Authorization header into 'Bearer ', or '', and the credential."""
    scheme, space, token = authorization.partition(" ")
    return (scheme + space, token) if scheme.lower() == "bearer" else ("", authorization)


def _without_credential(raw_name: bytes, raw_value: bytes) -> tuple[str, str]:
    name, value = (text.decode("utf-8", "surrogateescape") for text in (raw_name, raw_value))
    if name.lower() in _CREDENTIAL_HEADERS:
        scheme, credential = _split_bearer(value)
        value = f"{scheme}sha256:{fingerprint(credential)}"
    return name, value


def _is_ip_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


# Making an answer


class _Answer(NamedTuple):
    """What the answers of all operations are made of."""

    id: str
    created: int
    model: str
    text: str
    chunks: list[str]
    stream: bool
    no_usage: bool
    include_usage: bool
    cached: int | None
    reasoning: int | None
    question: dict[str, Any]

    @classmethod
    def to(cls, question: dict[str, Any], provider: str, fault: Fault, *, id_prefix: str) -> Self:
        model = question["model"]
        text = (
            f"I am {model}, answering for {provider}. I am not a real large language model: "
            "I always say the same, and I cost nothing."
        )
        if fault.answer_size is not None:
            text = (text * (fault.answer_size // len(text) + 1))[: fault.answer_size]
        stream_options = question.get("stream_options")
        return cls(
            id=f"{id_prefix}-{uuid.uuid4()}",
            created=int(time.time()),
            model=model,
            text=text,
            chunks=_cut(text, fault.chunks),
            stream=question.get("stream") is True,
            no_usage=fault.no_usage,
            include_usage=isinstance(stream_options, dict)
            and stream_options.get("include_usage") is True
            and not fault.no_usage,
            cached=fault.cached_tokens,
            reasoning=fault.reasoning_tokens,
            question=question,
        )


class _Operation(NamedTuple):
    """How an operation of OpenAI's API is answered."""

    needs: str
    """The member that its request must have, besides `model`."""
    id_prefix: str
    whole: Callable[[_Answer], dict[str, Any]]
    events: Callable[[_Answer], Iterator[bytes]]


def _cut(text: str, chunks: int | None) -> list[str]:
    if chunks is None:
        return re.findall(r"\S+\s*", text)
    return [text[len(text) * i // chunks : len(text) * (i + 1) // chunks] for i in range(chunks)]


def _usage(answer: _Answer) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "prompt_tokens": _PROMPT_TOKENS,
        "completion_tokens": _COMPLETION_TOKENS,
        "total_tokens": _PROMPT_TOKENS + _COMPLETION_TOKENS,
    }
    if answer.cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": answer.cached}
    if answer.reasoning is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": answer.reasoning}
    return usage


def _chat(answer: _Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text}
    return _completion(answer, "chat.completion", {"message": message})


def _chat_events(answer: _Answer) -> Iterator[bytes]:
    deltas: list[dict[str, str]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": chunk} for chunk in answer.chunks]
    choices: list[dict[str, Any]] = [{"delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"delta": {}, "finish_reason": "stop"})
    return _completion_events(answer, "chat.completion.chunk", choices)


def _text_completion(answer: _Answer) -> dict[str, Any]:
    return _completion(answer, "text_completion", {"text": answer.text})


def _text_completion_events(answer: _Answer) -> Iterator[bytes]:
    choices: list[dict[str, Any]] = [{"text": chunk, "finish_reason": None} for chunk in answer.chunks]
    choices.append({"text": "", "finish_reason": "stop"})
    return _completion_events(answer, "text_completion", choices)


def _completion(answer: _Answer, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    return {
        "choices": [{**choice, "finish_reason": "stop", "index": 0, "logprobs": None}],
        "object": kind,
        **({} if answer.no_usage else {"usage": _usage(answer)}),
        "created": answer.created,
        "system_fingerprint": None,
        "model": answer.model,
        "id": answer.id,
    }


def _completion_events(answer: _Answer, kind: str, choices: list[dict[str, Any]]) -> Iterator[bytes]:
    head: dict[str, Any] = {
        "id": answer.id,
        "object": kind,
        "created": answer.created,
        "model": answer.model,
        "system_fingerprint": None,
    }
    # As OpenAI does: usage is null in all chunks but the last, and that one has no choice.
    null_usage: dict[str, Any] = {"usage": None} if answer.include_usage else {}
    for choice in choices:
        yield _event({**head, "choices": [{"index": 0, "logprobs": None, **choice}], **null_usage})
    if answer.include_usage:
        yield _event({**head, "choices": [], "usage": _usage(answer)})
    yield b"data: [DONE]\n\n"


def _embeddings(answer: _Answer) -> dict[str, Any]:
    inputs = answer.question["input"]
    vector = array("f", [0.25, -0.5, 0.75, 1.0])
    in_base64 = answer.question.get("encoding_format") == "base64"  # what the openai SDK asks for
    embedding = base64.b64encode(vector.tobytes()).decode() if in_base64 else vector.tolist()
    # One input is a text or a list of tokens.
    count = len(inputs) if isinstance(inputs, list) and not isinstance(inputs[0], int) else 1
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": embedding} for index in range(count)],
        "model": answer.model,
        "usage": {"prompt_tokens": _PROMPT_TOKENS, "total_tokens": _PROMPT_TOKENS},
    }


def _no_events(_: _Answer) -> NoReturn:
    _refuse(400, "This operation has no stream.", param="stream", code="unsupported_parameter")


def _response(answer: _Answer) -> dict[str, Any]:
    content = {"type": "output_text", "text": answer.text, "annotations": []}
    message = {"type": "message", "id": f"msg-{answer.id}", "status": "completed", "role": "assistant"}
    return {
        "id": answer.id,
        "object": "response",
        "created_at": answer.created,
        "status": "completed",
        "model": answer.model,
        "output": [{**message, "content": [content]}],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": _PROMPT_TOKENS,
            "input_tokens_details": {"cached_tokens": answer.cached or 0},
            "output_tokens": _COMPLETION_TOKENS,
            "output_tokens_details": {"reasoning_tokens": answer.reasoning or 0},
            "total_tokens": _PROMPT_TOKENS + _COMPLETION_TOKENS,
        },
    }


def _response_events(answer: _Answer) -> Iterator[bytes]:
    whole = _response(answer)
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    place = {"item_id": whole["output"][0]["id"], "output_index": 0, "content_index": 0, "logprobs": []}
    events: list[dict[str, Any]] = [{"type": "response.created", "response": begun}]
    events += [{"type": "response.output_text.delta", **place, "delta": chunk} for chunk in answer.chunks]
    events.append({"type": "response.completed", "response": whole})
    for number, event in enumerate(events):
        yield b"event: %b\n" % event["type"].encode() + _event({**event, "sequence_number": number})


def _message(answer: _Answer) -> dict[str, Any]:
    return {
        "id": answer.id,
        "type": "message",
        "role": "assistant",
        "model": answer.model,
        "content": [{"type": "text", "text": answer.text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {**_message_input(answer), "output_tokens": _COMPLETION_TOKENS},
    }


def _message_input(answer: _Answer) -> dict[str, int]:
    """Count as Anthropic does: what came from the cache is not part of `input_tokens`."""
    cached = answer.cached or 0
    return {
        "input_tokens": _PROMPT_TOKENS - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
    }


def _message_events(answer: _Answer) -> Iterator[bytes]:
    begun = {**_message(answer), "content": [], "stop_reason": None}
    begun["usage"] = {**_message_input(answer), "output_tokens": 1}
    stop = {"stop_reason": "end_turn", "stop_sequence": None}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": begun},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
        *(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": chunk}}
            for chunk in answer.chunks
        ),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": stop, "usage": {"output_tokens": _COMPLETION_TOKENS}},
        {"type": "message_stop"},
    ]
    for event in events:
        yield b"event: %b\n" % event["type"].encode() + _event(event)


def _candidate(answer: _Answer, text: str, usage: dict[str, int], **more: str) -> dict[str, Any]:
    content = {"parts": [{"text": text}], "role": "model"}
    return {
        "candidates": [{"content": content, "index": 0, **more}],
        "usageMetadata": usage,
        "modelVersion": answer.model,
    }


def _generated(answer: _Answer) -> dict[str, Any]:
    thoughts = answer.reasoning or 0
    usage = {
        "promptTokenCount": _PROMPT_TOKENS,
        "candidatesTokenCount": _COMPLETION_TOKENS - thoughts,
        "totalTokenCount": _PROMPT_TOKENS + _COMPLETION_TOKENS,
    }
    if answer.cached is not None:
        usage["cachedContentTokenCount"] = answer.cached
    if answer.reasoning is not None:
        usage["thoughtsTokenCount"] = thoughts
    return _candidate(answer, answer.text, usage, finishReason="STOP")


def _generated_events(answer: _Answer) -> Iterator[bytes]:
    begun = {"promptTokenCount": _PROMPT_TOKENS, "totalTokenCount": _PROMPT_TOKENS}
    for chunk in answer.chunks[:-1]:
        yield _event(_candidate(answer, chunk, begun))
    last = _generated(answer)
    last["candidates"][0]["content"]["parts"][0]["text"] = answer.chunks[-1]
    yield _event(last)


_MODELS = "/models"
_GEMINI = (":generateContent", ":streamGenerateContent")
_OPERATIONS = {  # by the end of the path; the first match counts
    "/chat/completions": _Operation("messages", "chatcmpl", _chat, _chat_events),
    "/completions": _Operation("prompt", "cmpl", _text_completion, _text_completion_events),
    "/embeddings": _Operation("input", "embd", _embeddings, _no_events),
    "/responses": _Operation("input", "resp", _response, _response_events),
    "/messages": _Operation("messages", "msg", _message, _message_events),
    **dict.fromkeys(_GEMINI, _Operation("contents", "gen", _generated, _generated_events)),
}


def _models(provider: str) -> dict[str, Any]:
    model = {"id": f"model-of-{provider}", "object": "model", "created": 1720680044, "owned_by": provider}
    return {"object": "list", "data": [model]}


# Sending an answer


def _encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _event(data: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % _encode(data)


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=_encode(value), status=status, content_type="application/json")


def _error(status: int, message: str, *, param: str | None = None, code: str | None = None) -> web.Response:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "rate_limit_error"
    elif status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        kind = "server_error"
    else:
        kind = "invalid_request_error"
    return _json({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


def _fault_error(status: int, retry_after: int | None) -> web.Response:
    response = _error(status, f"A fault that was asked for: {status}.")
    if retry_after is not None:
        response.headers["Retry-After"] = str(retry_after)
    return response


async def _stop(runner: web.ServerRunner, server: web.Server) -> None:
    transports = [connection.transport for connection in server.connections]
    await runner.cleanup()
    # TLS connections wait for the client's farewell, and the event loop may end before it comes.
    for transport in transports:
        if transport is not None:
            transport.abort()
    await asyncio.sleep(0)


def _reset(request: web.BaseRequest) -> None:
    if request.transport is not None:
        # To linger for 0 seconds makes close() send RST instead of FIN (socket(7)).
        linger = struct.pack("ii", 1, 0)
        request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        request.transport.abort()


async def _reply(
    request: web.BaseRequest, suffix: str, seen: SeenRequest, question: Any, fault: Fault
) -> web.StreamResponse:
    operation = _OPERATIONS[suffix]
    if isinstance(question, dict) and suffix in _GEMINI:
        # Its model is a part of the path, and which path it is says whether it streams.
        model = seen.path.partition("?")[0].removesuffix(suffix).rpartition("/")[2]
        question |= {"model": model, "stream": suffix == ":streamGenerateContent"}
    _check(operation.needs, request.content_type, question)
    for member in sorted(fault.rejects & question.keys()):
        _refuse(400, f"Unrecognized request argument supplied: {member}", param=member)
    answer = _Answer.to(question, seen.provider, fault, id_prefix=operation.id_prefix)
    if not answer.stream:
        return _json(operation.whole(answer))
    if suffix in _GEMINI and "alt=sse" not in seen.path:
        return _json([operation.whole(answer)])  # an array of what would be events
    return await _send_events(request, operation.events(answer), fault)


async def _send_events(request: web.BaseRequest, events: Iterator[bytes], fault: Fault) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    try:
        for count, event in enumerate(events):
            if count == fault.close_after_chunks and request.transport is not None:
                request.transport.close()  # flushes what was written
                break
            if count and fault.chunk_delay:
                await asyncio.sleep(fault.chunk_delay)
            await response.write(event)
    except ConnectionError:
        pass  # the client went away; aiohttp notices again when it ends the response
    return response


# The process


def _parse_address(_: click.Context, __: click.Parameter, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_parse_address(_, __, each) for each in value)
    if value is None:
        return None
    host, colon, port = value.rpartition(":")
    if not colon or not port.isdecimal():
        raise click.BadParameter(f"{value!r} is not ADDRESS:PORT")
    return host, int(port)


@click.command(short_help="Play LLM providers, for tests and the demo.")
@click.option(
    "--listen",
    metavar="ADDRESS:PORT",
    multiple=True,
    default=["127.0.0.1:8443"],
    show_default=True,
    callback=_parse_address,
    help="Where to serve; may be repeated.",
)
@click.option(
    "--admin",
    metavar="ADDRESS:PORT",
    callback=_parse_address,
    help="Where to serve /__seen and /__faults, in plaintext.",
)
@click.option(
    "--host", "hosts", metavar="HOST", multiple=True, required=True, help="A host to play; may be repeated."
)
@click.option(
    "--key",
    "keys",
    metavar="HOST=KEY",
    multiple=True,
    help="A key that a host accepts; may be repeated. A host without one accepts all requests.",
)
@click.option(
    "--ca-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of ca.pem and ca-key.pem, made if need be. Without it: no TLS.",
)
@click.option("--maxlen", default=1000, show_default=True, help="How many requests /__seen remembers.")
@click.option("--verbose", is_flag=True, help="Print a line for each request.")
def command(
    *,
    listen: tuple[tuple[str, int], ...],
    admin: tuple[str, int] | None,
    hosts: tuple[str, ...],
    keys: tuple[str, ...],
    ca_dir: Path | None,
    maxlen: int,
    verbose: bool,
) -> None:
    """Play LLM providers: an OpenAI-compatible server that answers the same to everything.

    For example: --host api.moonshot.cn --key api.moonshot.cn=sk-1 --ca-dir /tmp/ca --verbose
    """
    accepted: dict[str, tuple[str, ...]] = {}
    for host, _, key in (pair.partition("=") for pair in keys):
        if host not in hosts or not key:  # the text must not hold a key
            raise click.BadParameter("each --key has to be HOST=KEY, where HOST is the value of a --host")
        accepted[host] = (*accepted.get(host, ()), key)
    try:
        fake = FakeLLM(
            {host: Host(accepted.get(host)) for host in hosts},
            ca=CertificateAuthority.load_or_create(ca_dir) if ca_dir else None,
            listen=listen,
            admin=admin,
            maxlen=maxlen,
            on_request=_print_request if verbose else None,
        )
        asyncio.run(_serve_until_signal(fake))
    except (OSError, ValueError) as error:  # an address in use, a directory that holds something else
        raise click.ClickException(str(error)) from error


async def _serve_until_signal(fake: FakeLLM) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with fake:
        addresses = ", ".join(f"{host}:{port}" for host, port in fake.addresses)
        click.echo(f"fake LLM at {addresses}, admin at {fake.admin_address or 'no address'}")
        await ended.wait()


def _print_request(seen: SeenRequest) -> None:
    model, key = seen.model or "-", seen.key_fingerprint or "-"
    click.echo(f"{seen.provider} model={model} {seen.method} {seen.path} key={key}")


if __name__ == "__main__":
    command()
