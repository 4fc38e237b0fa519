"""The official openai SDK reads what passed the Lua script, and the log says what it cost."""

from collections.abc import Iterator
from contextlib import ExitStack

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from llmplane.fakellm import FakeLLM, Fault, Host, running_in_thread
from tests.envoy.test_tokens import World, bootstrap, told
from tests.support.envoy import running_envoy
from tests.support.scripted import ScriptedServer

pytestmark = pytest.mark.envoy

PROVIDER = "provider.example"
"""The host of the providers in test_tokens."""
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
COST = {
    "prompt": "3",
    "completion": "72",
    "total": "75",
    "cached": "2",
    "reasoning": "64",
    "usage": "reported",
}


class Sdk:
    """The SDK, and what Envoy logs of the requests that it made."""

    def __init__(self, world: World, fake: FakeLLM) -> None:
        self.fake = fake
        self._world = world
        self._name = ""

    def client(self, name: str, host: str = "h1") -> openai.OpenAI:
        """Return a client; its one request is logged under the name."""
        self._name = name
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self._world.envoy.port('test')}/v1",
            api_key="sk-unused",
            default_headers={"host": host, "x-test": name},
            max_retries=0,
        )

    def told(self) -> dict[str, str]:
        """Return what the log says of the last client's request, without the model."""
        line = told(self._world.logged(self._name))
        line.pop("response_model", None)
        return line


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sdk]:
    log = tmp_path_factory.mktemp("envoy") / "access.log"
    log.touch()
    with ExitStack() as stack:
        fake = stack.enter_context(running_in_thread(FakeLLM({PROVIDER: Host()})))
        options = ("--file-flush-interval-msec", "5")
        envoy = stack.enter_context(running_envoy(bootstrap(fake.port, log), *options))
        yield Sdk(World(envoy, ScriptedServer(), log), fake)


@pytest.fixture(autouse=True)
def details(sdk: Sdk) -> None:
    sdk.fake.set_fault(PROVIDER, Fault(cached_tokens=2, reasoning_tokens=64))


def test_a_stream_that_did_not_ask_for_usage(sdk: Sdk) -> None:
    """Programs that take `chunk.choices[0]` of each chunk still run; the provider was asked all the same."""
    with sdk.client("chat") as client:
        stream = client.chat.completions.create(model="gpt-4o", messages=MESSAGES, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text.startswith("I am gpt-4o")
    assert b'"stream_options":{"include_usage":true}' in sdk.fake.seen[-1].body
    assert sdk.told() == COST


def test_a_stream_that_asked_for_usage(sdk: Sdk) -> None:
    with sdk.client("chat-usage") as client:
        *said, last = client.chat.completions.create(
            model="gpt-4o", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    assert all(chunk.usage is None for chunk in said)
    assert last.usage is not None
    assert last.usage.total_tokens == 75
    assert sdk.told() == COST


def test_a_client_that_stops_reading(sdk: Sdk) -> None:
    sdk.fake.set_fault(PROVIDER, Fault(chunks=50, chunk_delay=0.1))
    with sdk.client("stops") as client:
        stream = client.chat.completions.create(model="gpt-4o", messages=MESSAGES, stream=True)
        for number, _ in enumerate(stream):
            if number == 10:
                break
        stream.close()
    line = sdk.told()
    assert line["usage"] == "estimated"
    assert 8 <= int(line["completion"]) <= 50


def test_a_provider_that_rejects_stream_options(sdk: Sdk) -> None:
    sdk.fake.set_fault(PROVIDER, Fault(rejects=frozenset({"stream_options"})))
    with sdk.client("rejected") as client, pytest.raises(openai.BadRequestError, match="stream_options"):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES, stream=True)
    assert not sdk.told()
    with sdk.client("switched-off", "h1-plain") as client:
        for _ in client.chat.completions.create(model="gpt-4o", messages=MESSAGES, stream=True):
            pass
    assert sdk.told()["usage"] == "estimated"


def test_responses_and_embeddings(sdk: Sdk) -> None:
    with sdk.client("responses") as client:
        *_, last = client.responses.create(model="gpt-4o", input="Hi", stream=True)
    assert last.type == "response.completed"
    assert sdk.told() == COST
    with sdk.client("embeddings") as client:
        client.embeddings.create(model="embed", input=["a", "b"])
    assert sdk.told() == {"prompt": "3", "completion": "0", "total": "3", "usage": "reported"}
