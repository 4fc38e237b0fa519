"""Real clients: OpenAI's own SDK, and curl as the ASM documentation writes it."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator

import openai
import pytest

from llmplane.fakellm import Fault
from tests.envoy.conftest import DASHSCOPE, KEYS, Lab
from tests.support.objects import provider, route

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
NOT_A_KEY = "the sidecar has the key"


@pytest.fixture
def client(lab: Lab) -> Iterator[openai.OpenAI]:
    """Make the SDK as an application has it: the provider's host over plain HTTP, through the sidecar."""
    lab.apply(provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], model="qwen-turbo"))
    with (
        openai.DefaultHttpxClient(proxy=lab.mesh.http_proxy, trust_env=False) as http_client,
        openai.OpenAI(
            api_key=NOT_A_KEY, base_url=f"http://{DASHSCOPE}/v1", http_client=http_client, max_retries=0
        ) as made,
    ):
        yield made


def test_chat(lab: Lab, client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    text = completion.choices[0].message.content
    assert text
    assert text.startswith(f"I am qwen-turbo, answering for {DASHSCOPE}.")
    assert completion.usage
    assert completion.usage.total_tokens == 75
    seen = lab.seen()
    assert json.loads(seen.body) == {"model": "qwen-turbo", "messages": MESSAGES}


def test_stream(lab: Lab, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="gpt-4o", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.startswith(f"I am qwen-turbo, answering for {DASHSCOPE}.")
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert [usage.total_tokens for usage in usages] == [75]


def test_the_list_of_models(lab: Lab, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [f"model-of-{DASHSCOPE}"]


def test_embeddings(lab: Lab, client: openai.OpenAI) -> None:
    found = client.embeddings.create(model="text-embedding-3-small", input="Hi")
    assert found.data[0].embedding
    assert lab.seen().model == "text-embedding-3-small"


def test_responses(lab: Lab, client: openai.OpenAI) -> None:
    assert client.responses.create(model="gpt-4o", input="Hi").output_text.startswith("I am gpt-4o")


async def test_the_asynchronous_client(lab: Lab) -> None:
    lab.apply(provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE], model="qwen-turbo"))
    async with (
        openai.DefaultAsyncHttpxClient(proxy=lab.mesh.http_proxy, trust_env=False) as http_client,
        openai.AsyncOpenAI(
            api_key=NOT_A_KEY, base_url=f"http://{DASHSCOPE}/v1", http_client=http_client, max_retries=0
        ) as client,
    ):
        stream = await client.chat.completions.create(model="gpt-4o", messages=MESSAGES, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    assert text.startswith("I am qwen-turbo")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
def test_errors_of_the_provider(
    lab: Lab, client: openai.OpenAI, status: int, error: type[openai.APIStatusError]
) -> None:
    lab.fake.set_fault(DASHSCOPE, Fault(status=status))
    with pytest.raises(error) as raised:
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert f"A fault that was asked for: {status}." in str(raised.value)


def test_errors_of_the_proxy(lab: Lab, client: openai.OpenAI) -> None:
    """They look like OpenAI's: the SDK finds message, type and code in them."""
    with pytest.raises(openai.NotFoundError) as no_such_path:
        client.files.list()
    assert (no_such_path.value.code, no_such_path.value.type) == ("unknown_url", "invalid_request_error")
    assert "Served here: POST /chat/completions" in str(no_such_path.value)

    with pytest.raises(openai.NotFoundError) as no_such_host:
        client.with_options(base_url="http://unknown.example.com/v1").models.list()
    assert no_such_host.value.code == "route_not_found"

    lab.fake.set_fault(DASHSCOPE, Fault(reset=True))
    with pytest.raises(openai.InternalServerError) as unreachable:
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert unreachable.value.code == "provider_unreachable"


def test_a_missing_key(lab: Lab, client: openai.OpenAI) -> None:
    config = {"apiKeySecretRef": {"name": "nowhere", "key": "api-key"}}
    lab.apply(provider("dashscope", DASHSCOPE, configs={"defaultConfig": {"openAIConfig": config}}))
    with pytest.raises(openai.AuthenticationError) as raised:
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert raised.value.code == "provider_key_missing"


def test_a_time_limit(lab: Lab, client: openai.OpenAI) -> None:
    rule = {"backendRefs": [{"providerHost": DASHSCOPE}], "timeout": "200ms"}
    lab.apply(provider("dashscope", DASHSCOPE, KEYS[DASHSCOPE]), route("slow", DASHSCOPE, rule))
    lab.fake.set_fault(DASHSCOPE, Fault(delay=5))
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert (raised.value.status_code, raised.value.code) == (504, "timeout")


# As the ASM documentation writes it.
CURL = r"""
curl --location 'http://dashscope.aliyuncs.com' \
--header 'Content-Type: application/json' \
--data '{
    "messages": [
        {"role": "user", "content": "Please introduce yourself"}
    ]
}'
"""


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(lab: Lab) -> None:
    lab.apply(provider("dashscope", DASHSCOPE, "${ API_KEY of dashscope}", model="qwen-1.8b-chat"))
    environment = {"PATH": os.environ["PATH"], "http_proxy": lab.mesh.http_proxy}
    done = subprocess.run(
        ["sh", "-c", CURL], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "qwen-1.8b-chat"
    assert (lab.seen().host, lab.fake.seen) == (DASHSCOPE, ())
