"""Whatever format or expression we accept, a real Envoy accepts: a refused one would cost the listener."""

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crds.cel import cel
from crds.formats import _CHECKS, _PLAIN, check_format
from llmplane.envoy import find_envoy

_TYPES = "type.googleapis.com/envoy.extensions"
_ARGUMENTS = [
    *(
        "",
        "a",
        "X-A?B",
        ":PATH",
        "a:b",
        "a:b:c",
        "llm:host",
        "CLUSTER:a:b",
        "DYNAMIC:a:b",
        "ROUTE:a",
        "a:PLAIN",
    ),
    *(
        "a:FIELD:b",
        "a:TYPED",
        "WQ",
        "NQ:ORIG",
        "ORIG",
        "%Y-%m-%d",
        "%s.%3f",
        "NUMBER",
        "DS_RX_BEG:US_RX_BEG:ms",
    ),
    *(
        "POD_NAME",
        "SNI_FIRST:HOST",
        "request.path",
        "a b",
        "é",
        "(",
        "a)b",
        "?",
        "a?b?c",
        "::",
        "%E4Y",
        "\x01",
    ),
]
_COMMANDS = sorted({*_PLAIN, *_CHECKS, "NOPE", "STREAM_INFO_REQ", "req"})
_operators = st.builds(
    lambda command, argument, length: f"%{command}{argument}{length}%",
    st.sampled_from(_COMMANDS),
    st.sampled_from(["", *(f"({argument})" for argument in _ARGUMENTS)]),
    st.sampled_from(["", "", ":5", ":0", ":x"]),
)
_formats = st.lists(_operators | st.sampled_from(["%%", "a", " ", "%", "é", '"', "(", ":5"]), max_size=4).map(
    "".join
)

_atoms = st.sampled_from(
    [
        *(
            "request.path",
            "request.headers['a']",
            "request.headers.a",
            "response.code",
            "true",
            "1",
            "1.5",
            "'a'",
        ),
        *(
            "filter_state['a.b']",
            "metadata.filter_metadata['a']['b']",
            "xds.node",
            "2u",
            "null",
            '"b"',
            "[1, 2]",
        ),
        *("upstream.request_attempt_count", "request.time", "request.duration", "source.address", "0x1F"),
    ]
)
_expressions = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        st.builds(
            "{} {} {}".format, inner, st.sampled_from([*"+-*/%<>", "==", "!=", "&&", "||", "in"]), inner
        ),
        st.builds("({} ? {} : {})".format, inner, inner, inner),
        st.builds(
            "{}({})".format, st.sampled_from(["size", "int", "has", "string", "double", "!", "-"]), inner
        ),
        st.builds(
            "{}.{}".format, inner, st.sampled_from(["size()", "matches('a')", "getSeconds()", "a", "b()"])
        ),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("{}.contains({})".format, inner, inner),
    ),
    max_leaves=6,
)


def is_accepted(text: str) -> bool:
    try:
        check_format(text)
    except ValueError:
        return False
    return True


def envoys_refusal(formats: list[str], folder: Path) -> str:
    """Return what Envoy says of access logs with these formats; nothing if it takes them all."""
    logs = [
        {
            "name": "file",
            "typed_config": {
                "@type": f"{_TYPES}.access_loggers.file.v3.FileAccessLog",
                "path": "/dev/null",
                "log_format": {
                    "text_format_source": {"inline_string": text},
                    "formatters": [
                        {
                            "name": "req_without_query",
                            "typed_config": {
                                "@type": f"{_TYPES}.formatter.req_without_query.v3.ReqWithoutQuery"
                            },
                        }
                    ],
                },
            },
        }
        for text in formats
        if text
    ]
    config = folder / "bootstrap.json"
    config.write_text(json.dumps({"admin": {"access_log": logs}}))
    command = [find_envoy(), "--mode", "validate", "-c", config, "-l", "critical"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stderr if done.returncode else ""


@settings(
    max_examples=8,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.large_base_example],
)
@given(formats=st.lists(_formats, min_size=100, max_size=200))
def test_formats(formats: list[str], tmp_path: Path) -> None:
    assert envoys_refusal([text for text in formats if is_accepted(text)], tmp_path) == ""


@settings(
    max_examples=8,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.large_base_example],
)
@given(expressions=st.lists(_expressions, min_size=50, max_size=100))
def test_expressions(expressions: list[str], tmp_path: Path) -> None:
    formats = [f"%CEL({text})%" for text in expressions]
    assert envoys_refusal([text for text in formats if is_accepted(text)], tmp_path) == ""


@pytest.mark.parametrize("command", sorted(_PLAIN))
def test_operators_that_stand_alone(command: str) -> None:
    check_format(f"%{command}%")
    with pytest.raises(ValueError, match="takes neither"):
        check_format(f"%{command}:5%")


def test_every_operator_that_stands_alone_is_known_to_envoy(tmp_path: Path) -> None:
    assert envoys_refusal([f"%{command}%" for command in sorted(_PLAIN)], tmp_path) == ""


def test_deep_expressions_are_refused() -> None:
    with pytest.raises(ValueError, match="deeper"):
        cel("(" * 100 + "1" + ")" * 100)
