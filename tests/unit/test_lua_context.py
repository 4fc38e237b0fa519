"""What the provider script is told: the filter_context, and what cannot be said in it."""

import json

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.struct_pb2 import Struct

from translator.lua import SCRIPT, SCRIPT_SHA256, Member, Operation, filter_context

CHAT = Operation(
    "POST",
    "/chat/completions",
    "/v1/chat/completions",
    (
        Member(("model",), '"qwen-turbo"', "force"),
        Member(("temperature",), "0.30", "fill"),
        Member(("stream_options", "include_usage"), "true", "fill_stream"),
    ),
)
MODELS = Operation("GET", "/models", "/v1/models")


def test_the_context_of_a_provider() -> None:
    context = filter_context("dashscope.aliyuncs.com", [CHAT, MODELS])
    assert context == {
        "id": context["id"],
        "host": "dashscope.aliyuncs.com",
        "data": "/v1\x1f100\x1f"
        "\x1ePOST /chat/completions\x1f"
        'force\x1f"qwen-turbo"\x1f"model"\x1f\x1f'
        'fill\x1f0.30\x1f"temperature"\x1f\x1f'
        'fill_stream\x1ftrue\x1f"stream_options"\x1f"include_usage"\x1f'
        "\x1eGET /models",
    }


def test_what_the_data_begin_with() -> None:
    """The prefix of paths, how many models of clients metrics show, and how many bytes a body may have."""
    context = filter_context("a.example", [CHAT], models=7, max_bytes=1000)
    assert context["data"].startswith("/v1\x1f7\x1f1000\x1e")


def test_what_separates_is_in_no_part() -> None:
    """Keys of users may hold anything."""
    member = Member(("a\x1e\x1f\n", "\u4f60"), "1", "fill")
    context = filter_context("a.example", [Operation("POST", "/chat", "/chat", (member,))])
    assert context["data"].endswith('\x1ePOST /chat\x1ffill\x1f1\x1f"a\\u001e\\u001f\\n"\x1f"\\u4f60"\x1f')


def test_the_context_survives_a_protobuf_struct() -> None:
    context = filter_context("dashscope.aliyuncs.com", [CHAT, MODELS])
    assert MessageToDict(ParseDict(context, Struct())) == context


def test_a_path_is_written_only_where_it_is_not_prefix_and_suffix() -> None:
    chat = Operation("POST", "/chat/completions", "/x/chat/completions?api-version=1", ())
    context = filter_context("a.example", [chat, MODELS])
    assert context["data"] == (
        "\x1f100\x1f"
        "\x1ePOST /chat/completions /x/chat/completions?api-version=1\x1f"
        "\x1eGET /models /v1/models"
    )


def test_no_members_and_no_splice_differ() -> None:
    """With no members the body must still be a JSON object; without a place for them it passes unseen."""
    checked = filter_context("a.example", [Operation("POST", "/embeddings", "/embeddings", ())])
    unseen = filter_context("a.example", [Operation("POST", "/embeddings", "/embeddings")])
    assert checked["data"].endswith("\x1ePOST /embeddings\x1f")
    assert unseen["data"].endswith("\x1ePOST /embeddings")


def test_the_id_stands_for_the_content() -> None:
    """The same content has the same id everywhere, and any change another one: the script caches under it."""
    contexts = [
        filter_context("a.example", [CHAT, MODELS]),
        filter_context("b.example", [CHAT, MODELS]),
        filter_context("a.example", [CHAT, MODELS], max_bytes=1000),
        filter_context("a.example", [CHAT]),
        filter_context("a.example", [Operation("POST", CHAT.suffix, CHAT.path, (CHAT.members or ())[::-1])]),
        filter_context("a.example", [Operation("POST", CHAT.suffix, "/v2/chat/completions", CHAT.members)]),
    ]
    assert len({context["id"] for context in contexts}) == len(contexts)
    assert filter_context("a.example", (CHAT, MODELS)) == contexts[0]


@pytest.mark.parametrize(
    "value", ["", "qwen", "{", "1,2", "'a'", "NaN", "-Infinity", "[" * 100_000, "01", '"\n"']
)
def test_a_value_must_be_json(value: str) -> None:
    with pytest.raises(ValueError, match=r"member 'a\.b': the value is not JSON"):
        Member(("a", "b"), value, "force")


@pytest.mark.parametrize("path", [(), ("a", "b", "c")])
def test_a_path_has_one_or_two_keys(path: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="one or two keys"):
        Member(path, "1", "fill")


@pytest.mark.parametrize(
    ("suffix", "path", "message"),
    [
        ("chat", "/v1/chat", "suffix 'chat': must begin with /"),
        ("/chat/", "/v1/chat", "must not end with /"),
        ("/chat?a", "/v1/chat", "must not end with / or hold a query"),
        ("/chat", "v1/chat", "path 'v1/chat': must begin with /"),
        ("/chat", "/v1/chat HTTP/1.1\r\nx: y", "visible ASCII"),
        ("/chat", "/v1/你", "visible ASCII"),
    ],
)
def test_a_path_must_be_a_path(suffix: str, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Operation("POST", suffix, path)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([("model",), ("model",)], "member 'model' is given twice"),
        ([("a", "b"), ("a", "b")], "member 'a.b' is given twice"),
        ([("a",), ("a", "b")], "members 'a' and 'a.b' contradict each other"),
    ],
)
def test_members_must_not_contradict_each_other(paths: list[tuple[str, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Operation("POST", "/chat", "/chat", tuple(Member(path, "1", "fill") for path in paths))


def test_a_member_for_streams_has_its_object_for_itself() -> None:
    members = (Member(("a", "b"), "1", "fill"), Member(("a", "c"), "1", "fill_stream"))
    with pytest.raises(ValueError, match="'a' has a fill_stream member, and another"):
        Operation("POST", "/chat", "/chat", members)


def test_there_is_one_member_for_streams() -> None:
    members = tuple(Member((key,), "1", "fill_stream") for key in "ab")
    with pytest.raises(ValueError, match="more than one fill_stream member"):
        Operation("POST", "/chat", "/chat", members)


def test_get_has_no_members() -> None:
    with pytest.raises(ValueError, match="no body"):
        Operation("GET", "/models", "/models", ())


@pytest.mark.parametrize("host", ["", "a b", "a\r\nx: y", "bücher.example"])
def test_a_host_must_be_a_header_value(host: str) -> None:
    with pytest.raises(ValueError, match="visible ASCII"):
        filter_context(host, [CHAT])


@pytest.mark.parametrize("operations", [[], [MODELS], [MODELS, CHAT]])
def test_the_first_operation_is_the_own_one(operations: list[Operation]) -> None:
    with pytest.raises(ValueError, match="must be a POST"):
        filter_context("a.example", operations)


def test_an_operation_is_given_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        filter_context("a.example", [CHAT, Operation("POST", CHAT.suffix, "/other")])


def test_what_a_provider_costs_on_the_wire() -> None:
    """The whole filter, without the script, is a small part of the 2 KB that a provider may have."""
    encoded = ParseDict(filter_context("dashscope.aliyuncs.com", [CHAT, MODELS]), Struct())
    assert encoded.ByteSize() < 512


def test_the_script_is_shipped() -> None:
    assert "function envoy_on_request" in SCRIPT
    assert "function envoy_on_response" in SCRIPT
    assert len(SCRIPT_SHA256) == len(json.loads(f'"{SCRIPT_SHA256}"')) == 64
