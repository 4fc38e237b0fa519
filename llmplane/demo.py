"""``llmplane demo``: the documents' scenarios with a real Envoy and a fake LLM, on this machine alone.

It starts what a user would start (``llmplane serve``, ``llmplane proxy sidecar`` and ``gateway``), applies
the documents' YAML unchanged, and runs their curl commands; keys, certificate authority and provider are made
up.
"""

import json
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import urllib.error
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
from llmplane.local import LocalGateway, LocalMesh, LocalMeshError, free_port

DASHSCOPE = "dashscope.aliyuncs.com"
MOONSHOT = "api.moonshot.cn"
_PATHS = {DASHSCOPE: "/compatible-mode/v1/chat/completions", MOONSHOT: "/v1/chat/completions"}
_BODY = """{
    "messages": [
        {"role": "user", "content": "Please introduce yourself"}
    ]
}"""
_SPLIT_REQUESTS = 20
_DENIED = "RBAC: access denied"
_OWN_ADDRESS = "127.0.0.1"
"""What curl comes from when it calls another address of 127.0.0.0/8."""
_SERVICE = """apiVersion: v1
kind: Service
metadata: {name: istio-ingressgateway, namespace: istio-system}
spec:
  selector: {istio: ingressgateway}
  ports: [{port: 80, targetPort: %d}]
"""
"""As in front of Istio's gateways: only root may open port 80 itself."""


class DemoFailedError(RuntimeError):
    """A step did not show what it should; the text says what was seen instead."""


@dataclass(frozen=True, slots=True)
class _Lab:
    """What the demo runs on."""

    mesh: LocalMesh
    fake: FakeLLM
    gateway: LocalGateway
    port: int
    """Of the gateway."""


@dataclass(frozen=True, slots=True)
class Call:
    """A curl command of the documents, and the providers and models that may answer; none: it is denied."""

    host: str
    expected: frozenset[tuple[str, str]]
    headers: tuple[str, ...] = ()
    times: int = 1
    by_gateway: bool = False

    def url(self, lab: _Lab) -> str:
        """Return what is called: the host by way of the sidecar, or the gateway."""
        return f"http://{lab.gateway.bind_address}:{lab.port}" if self.by_gateway else f"http://{self.host}"

    @property
    def all_headers(self) -> tuple[str, ...]:
        """The headers that the command has."""
        host = (f"host: {self.host}",) if self.by_gateway else ()
        return ("Content-Type: application/json", *host, *self.headers)

    def curl(self, lab: _Lab) -> list[str]:
        """Return the command as the documents have it."""
        options = [part for header in self.all_headers for part in ("--header", header)]
        return ["curl", "--location", self.url(lab), *options, "--data", _BODY]

    def environment(self, lab: _Lab) -> dict[str, str]:
        """Return what the command's environment has for it."""
        return {} if self.by_gateway else {"http_proxy": lab.mesh.http_proxy}


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
    Step(
        "Clients from outside, by an ingress gateway",
        "004-ingress-gateway/step-3",
        (Call("test.com", _DEFAULT, by_gateway=True),),
    ),
    Step(
        "The gateway denies an address",
        "004-ingress-gateway/step-5",
        (Call("test.com", frozenset(), by_gateway=True),),
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
    environment |= {"API_KEY": keys[DASHSCOPE], "本机IP": _OWN_ADDRESS}
    mesh = stack.enter_context(LocalMesh(directory, serve_options=options, environment=environment))
    click.echo(f"control plane   xDS {mesh.xds}, admin {mesh.admin}")
    click.echo(f"sidecar         HTTP proxy {mesh.http_proxy}")
    gateway = mesh.start_gateway()
    lab = _Lab(mesh, fake, gateway, free_port(gateway.bind_address))
    click.echo(f"gateway         port 80 as {gateway.bind_address}:{lab.port}")
    click.echo(f"fake LLM        {', '.join(keys)} at {fake.address} (TLS)")
    for number, step in enumerate(STEPS, 1):
        _show(number, step, lab)
    click.secho("\nEverything was as the documents say.", fg="green")
    if keep:
        _apply(STEPS[2], lab)
        _wait(mesh)


def _show(number: int, step: Step, lab: _Lab) -> None:
    click.secho(f"\n== Step {number}: {step.title}", bold=True)
    for name in _apply(step, lab):
        click.echo(f"   apply {name}")
    for call in step.calls:
        _call(call, lab)


def _apply(step: Step, lab: _Lab) -> list[str]:
    """Make the objects of a step all that there are; return what they are called."""
    folder = files("llmplane").joinpath("examples", step.folder)
    documents = sorted(folder.iterdir(), key=lambda item: item.name)
    names = [f"examples/{step.folder}/{document.name}" for document in documents]
    texts = [document.read_text(encoding="utf-8") for document in documents]
    if any(call.by_gateway for call in step.calls):
        names.append(f"a Service that maps port 80 of the gateway to {lab.port}")
        texts.append(_SERVICE % lab.port)
    lab.mesh.apply("objects.yaml", "\n---\n".join(texts))
    return names


def _call(call: Call, lab: _Lab) -> None:
    fake = lab.fake
    repeated = f"   # {call.times} times" if call.times > 1 else ""
    settings = "".join(f"{name}={value} " for name, value in call.environment(lab).items())
    click.secho(f"\n$ {settings}{shlex.join(call.curl(lab))}{repeated}", fg="cyan")
    counts: Counter[tuple[str, str]] = Counter()
    for turn in range(call.times):
        answer = _send(call, lab)
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


def _send(call: Call, lab: _Lab) -> str:
    environment = call.environment(lab)
    if shutil.which("curl"):
        command = [*call.curl(lab), "--silent", "--show-error", "--max-time", "30"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise DemoFailedError(f"curl exits with {done.returncode}: {done.stderr.strip()}")
        return done.stdout
    headers = dict(header.split(": ") for header in call.all_headers)
    request = urllib.request.Request(call.url(lab), _BODY.encode(), headers)  # noqa: S310 - it is http
    proxy = urllib.request.ProxyHandler({"http": lab.mesh.http_proxy} if environment else {})
    try:
        with urllib.request.build_opener(proxy).open(request, timeout=30) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        return error.read().decode()
    except OSError as error:
        raise DemoFailedError(f"no answer: {error}") from None


def _check(call: Call, answer: str, seen: SeenRequest | None) -> None:
    """Compare an answer and what the provider saw with what the document promises."""
    if not call.expected:
        if answer != _DENIED or seen is not None:
            raise DemoFailedError(f"expected {_DENIED!r}, seen {answer[:500]}")
        return
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
