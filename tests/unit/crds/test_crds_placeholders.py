"""Placeholders: `apiKey: ${ API_KEY of dashscope}`."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crds.placeholders import FIELDS, expand, normalise, variables


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (" API_KEY of dashscope", "API_KEY_OF_DASHSCOPE"),
        ("API_KEY of Moonshot", "API_KEY_OF_MOONSHOT"),
        ("YOUR_DASHSCOPE_API_KEY", "YOUR_DASHSCOPE_API_KEY"),
        ("本机IP", "本机IP"),
        ("my-key.1 / 2", "MY_KEY_1_2"),
        ("straße", "STRAßE"),
        (" ", ""),
    ],
)
def test_the_variable_of_a_placeholder(written: str, name: str) -> None:
    assert normalise(written) == name


@given(st.text())
def test_a_normalised_name_is_its_own(name: str) -> None:
    assert normalise(normalise(name)) == normalise(name)


def test_settings_win_over_the_environment_and_exact_names_over_others() -> None:
    environment = {"api_key": "lower", "API_KEY": "exact", "A": "environment", "b": "only"}
    settings = {"a": "set", "API_KEY of dashscope": "sk-1"}
    assert variables(environment, settings) == {
        "API_KEY": "exact",
        "A": "set",
        "B": "only",
        "API_KEY_OF_DASHSCOPE": "sk-1",
    }


def test_placeholders_are_read_in_keys_and_addresses() -> None:
    document = {
        "apiKey": "${ API_KEY of dashscope}",
        "rules": [{"ipBlocks": ["${本机IP}", "${a}/${b}"]}],
        "host": "${A}",
        "defaults": {"apiKey": "${A}"},
        "overrides": {"apiKey": "${A}"},
    }
    values = {"API_KEY_OF_DASHSCOPE": "sk-1", "本机IP": "192.0.2.1", "A": "192.0.2.0", "B": "24"}
    assert expand(document, values) == (
        document | {"apiKey": "sk-1", "rules": [{"ipBlocks": ["192.0.2.1", "192.0.2.0/24"]}]},
        [],
    )


def test_what_was_expanded_is_not_expanded_again() -> None:
    assert expand({"apiKey": "${A}"}, {"A": "${B}", "B": "b"}) == ({"apiKey": "${B}"}, [])


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("${a key}", "the variable A_KEY is not set: export it, or give --set 'A_KEY=...'"),
        ("x${empty}", "the variable EMPTY is empty"),
        ("${ }", "the placeholder '${ }' names no variable"),
    ],
)
def test_a_placeholder_without_a_value_stays_and_is_told(written: str, message: str) -> None:
    assert expand({"spec": {"apiKey": written}}, {"EMPTY": " \n"}) == (
        {"spec": {"apiKey": written}},
        [(("spec", "apiKey"), message)],
    )


documents: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers() | st.text() | st.sampled_from(["${A}", "${B}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "apiKey", "ipBlocks", "defaults"]), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(documents)
def test_a_document_without_variables_stays_as_it_is(document: Any) -> None:
    assert expand(document, {})[0] == document


@given(documents)
def test_nothing_but_keys_and_addresses_changes(document: Any) -> None:
    """What differs afterwards stands below one of the two fields."""

    def check(before: Any, after: Any, *, within: bool) -> None:
        if isinstance(before, dict):
            assert before.keys() == after.keys()
            for name in before:
                check(before[name], after[name], within=name in FIELDS)
        elif isinstance(before, list):
            for one, other in zip(before, after, strict=True):
                check(one, other, within=within)
        else:
            assert before == after or within

    check(document, expand(document, {"A": "a", "B": "b"})[0], within=False)
