"""``llmplane demo``: the documents' scenarios with a real Envoy and a fake LLM, on this machine alone.

It starts what a user would start (``llmplane serve``, ``llmplane proxy sidecar``), applies the documents'
YAML unchanged, and runs their curl commands; keys, certificate authority and provider are made up.
"""

import json
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import urllib.request
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import FrameType

import click

from llmplane.certificates import CertificateAuthority
from llmplane.fakellm import FakeLLM, Host, SeenRequest, running_in_thread
from llmplane.local import LocalMesh, LocalMeshError

DASHSCOPE = "dashscope.aliyuncs.com"
MOONSHOT = "api.moonshot.cn"
_PATHS = {DASHSCOPE: "/compatible-mode/v1/chat/completions", MOONSHOT: "/v1/chat/completions"}
_BODY = """{
    "messages": [
        {"role": "user", "content": "Please introduce yourself"}
    ]
}"""
_SPLIT_REQUESTS = 20


class DemoFailedError(RuntimeError):
    """A step did not show what it should; the text says what was seen instead."""


@dataclass(frozen=True, slots=True)
class Call:
    """A curl command of the documents, and the providers and models that may answer it."""

    host: str
    expected: frozenset[tuple[str, str]]
    headers: tuple[str, ...] = ()
    times: int = 1

    def curl(self) -> list[str]:
        """Return the command as the documents have it."""
        headers = ("Content-Type: application/json", *self.headers)
        options = [part for header in headers for part in ("--header", header)]
        return ["curl", "--location", f"http://{self.host}", *options, "--data", _BODY]


@dataclass(frozen=True, slots=True)
class Step:
    """A section of the documents: what it applies (a folder of examples/), and the commands that it runs."""

    title: str
    folder: str
    calls: tuple[Call, ...]


_DEFAULT = frozenset({(DASHSCOPE, "qwen-1.8b-chat")})
STEPS = (
    Step(
        "A provider: plain HTTP in, model, path, key and TLS out",
        "000-traffic-routing/step-2",
        (Call(DASHSCOPE, _DEFAULT),),
    ),
    Step(
        "Subscribers get a better model",
        "000-traffic-routing/step-3",
        (
            Call(DASHSCOPE, _DEFAULT),
            Call(DASHSCOPE, frozenset({(DASHSCOPE, "qwen-turbo")}), headers=("user-type: subscriber",)),
        ),
    ),
    Step(
        "Half of the requests go to another provider",
        "000-traffic-routing/step-4",
        (Call("demo-llm-server", _DEFAULT | {(MOONSHOT, "moonshot-v1-8k")}, times=_SPLIT_REQUESTS),),
    ),
)


def run_demo(*, keep: bool) -> int:
    """Run all steps; return the exit code: 0, 1 if a step failed, 130 after Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with ExitStack() as stack:
            _run(stack, keep=keep)
    except (DemoFailedError, LocalMeshError) as error:
        click.secho(f"\nfailed: {error}", fg="red", err=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(stack: ExitStack, *, keep: bool) -> None:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmplane-demo-")))
    authority = CertificateAuthority.create()
    keys = {host: f"sk-{secrets.token_hex(16)}" for host in (DASHSCOPE, MOONSHOT)}
    fake = FakeLLM({host: Host(key) for host, key in keys.items()}, ca=authority)
    stack.enter_context(running_in_thread(fake))
    ca_file = authority.write(directory / "ca")
    options = ["--ca-file", str(ca_file)]
    for host in keys:
        options += ["--connect-to", f"{host}:443:{fake.address}"]
    environment = {"API_KEY_OF_DASHSCOPE": keys[DASHSCOPE], "API_KEY_OF_MOONSHOT": keys[MOONSHOT]}
    mesh = stack.enter_context(LocalMesh(directory, serve_options=options, environment=environment))
    click.echo(f"control plane   xDS {mesh.xds}, admin {mesh.admin}")
    click.echo(f"sidecar         HTTP proxy {mesh.http_proxy}")
    click.echo(f"fake LLM        {', '.join(keys)} at {fake.address} (TLS)")
    for number, step in enumerate(STEPS, 1):
        _show(number, step, mesh, fake)
    click.secho("\nEverything was as the documents say.", fg="green")
    if keep:
        _wait(mesh)


def _show(number: int, step: Step, mesh: LocalMesh, fake: FakeLLM) -> None:
    click.secho(f"\n== Step {number}: {step.title}", bold=True)
    folder = files("llmplane").joinpath("examples", step.folder)
    documents = sorted(folder.iterdir(), key=lambda item: item.name)
    for document in documents:
        click.echo(f"   apply examples/{step.folder}/{document.name}")
    texts = [document.read_text(encoding="utf-8") for document in documents]
    mesh.apply("objects.yaml", "\n---\n".join(texts))
    for call in step.calls:
        _call(call, mesh, fake)


def _call(call: Call, mesh: LocalMesh, fake: FakeLLM) -> None:
    repeated = f"   # {call.times} times" if call.times > 1 else ""
    click.secho(f"\n$ http_proxy={mesh.http_proxy} {shlex.join(call.curl())}{repeated}", fg="cyan")
    counts: Counter[tuple[str, str]] = Counter()
    for turn in range(call.times):
        answer = _send(call, mesh)
        if not turn:
            click.echo(answer)
        seen = fake.seen[-1] if fake.seen else None
        fake.forget()
        _check(call, answer, seen)
        if seen is not None:
            counts[seen.provider, str(seen.model)] += 1
            if call.times == 1:
                click.echo(
                    f"   the provider saw: {seen.provider}, {seen.method} {seen.path}, "
                    f"model {seen.model}, key {seen.key_fingerprint}"
                )
    if call.times > 1:
        for (provider, model), count in sorted(counts.items()):
            click.echo(f"   {count:3} of {call.times} went to {provider}, model {model}")
        if counts.keys() != call.expected:
            raise DemoFailedError(f"expected requests at {sorted(call.expected)}, seen {dict(counts)}")


def _send(call: Call, mesh: LocalMesh) -> str:
    if shutil.which("curl"):
        command = [*call.curl(), "--silent", "--show-error", "--max-time", "30"]
        environment = {"http_proxy": mesh.http_proxy}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise DemoFailedError(f"curl exits with {done.returncode}: {done.stderr.strip()}")
        return done.stdout
    headers = dict(header.split(": ") for header in ("Content-Type: application/json", *call.headers))
    request = urllib.request.Request(f"http://{call.host}", _BODY.encode(), headers)
    proxy = urllib.request.ProxyHandler({"http": mesh.http_proxy})
    try:
        with urllib.request.build_opener(proxy).open(request, timeout=30) as answer:
            return str(answer.read().decode())
    except OSError as error:
        raise DemoFailedError(f"no answer: {error}") from None


def _check(call: Call, answer: str, seen: SeenRequest | None) -> None:
    """Compare an answer and what the provider saw with what the document promises."""
    try:
        model = json.loads(answer)["model"]
    except (ValueError, KeyError, TypeError):
        raise DemoFailedError(f"this is no chat completion: {answer[:500]}") from None
    if seen is None:
        raise DemoFailedError("the provider saw no request")
    if (seen.provider, model) not in call.expected or model != seen.model:
        raise DemoFailedError(f"expected {sorted(call.expected)}, seen {seen.provider} with {seen.model}")
    if seen.path != _PATHS[seen.provider]:
        raise DemoFailedError(f"{seen.provider} was asked for {seen.path}")


def _wait(mesh: LocalMesh) -> None:
    body = '{"messages": [{"role": "user", "content": "Hi"}]}'
    click.echo(
        f"""
Still running; Ctrl-C ends it. In another terminal:
    http_proxy={mesh.http_proxy} curl http://{DASHSCOPE} -d {shlex.quote(body)}
    .venv/bin/llmplane status --admin-address {mesh.admin}
Edit {mesh.config / "objects.yaml"} and ask again."""
    )
    while True:
        signal.pause()
