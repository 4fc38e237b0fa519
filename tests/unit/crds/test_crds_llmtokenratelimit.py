"""LLMTokenRateLimit: its defaults and its checks."""

from typing import Any

import pytest

from crds.llmtokenratelimit import LLMTokenRateLimit, Mode, TokenType
from crds.loader import load_object

LIMITS = [{"tokens": 1000, "unit": "Minute"}]
DEFAULT = {"limits": LIMITS}
USER = {"header": "x-user"}
ALICE = {"match": [{"exact": "alice"}], "limits": LIMITS}


def read(spec: Any) -> tuple[LLMTokenRateLimit | None, list[str]]:
    document = {
        "apiVersion": "istio.alibabacloud.com/v1beta1",
        "kind": "LLMTokenRateLimit",
        "metadata": {"name": "a", "namespace": "b"},
        "spec": {"rules": [DEFAULT], **spec},
    }
    found, problems = load_object(document)
    assert found is None or isinstance(found, LLMTokenRateLimit)
    return found, [f"{problem.field}: {problem.message}" for problem in problems]


def test_by_default_each_envoy_counts_all_tokens_of_all_requests() -> None:
    policy, problems = read({})
    assert problems == []
    assert policy
    spec = policy.spec
    assert (spec.mode, spec.keys, spec.shadow, spec.local.max_keys) == (Mode.LOCAL, (), False, 1000)
    assert spec.rules[0].limits[0].type is TokenType.TOTAL


def test_rules_without_a_name_get_one() -> None:
    named = {**ALICE, "name": "vip"}
    policy, _ = read({"keys": [USER], "rules": [named, ALICE, DEFAULT]})
    assert policy
    assert [policy.spec.rule_name(index) for index in range(3)] == ["vip", "rule-1", "default"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            {"keys": [{"header": "Authorization"}]},
            (
                "spec.keys[0].header: must not read the header 'authorization': "
                "it may hold a key or another credential"
            ),
        ),
        (
            {"keys": [{"header": "x-my-token"}]},
            (
                "spec.keys[0].header: must not read the header 'x-my-token': "
                "it may hold a key or another credential"
            ),
        ),
        (
            {"keys": [{"claim": "session"}]},
            "spec.keys[0].claim: must not read the claim 'session': it may hold a key or another credential",
        ),
        ({"keys": [{"header": "a b"}]}, "spec.keys[0].header: is not the name of a header"),
        ({"keys": [{}]}, "spec.keys[0]: must have exactly one of header, claim and attribute"),
        ({"keys": [USER, {"header": "X-User"}]}, "spec.keys[1]: is 'header x-user' again"),
        (
            {"keys": [USER], "rules": [ALICE]},
            (
                "spec.rules[0].match: the last rule must have no match: it is for all other requests, none "
                "is unlimited"
            ),
        ),
        (
            {"keys": [USER, {"claim": "sub"}], "rules": [ALICE, DEFAULT]},
            "spec.rules[0].match: must have 2 entries, one for each of keys",
        ),
        (
            {"keys": [USER], "rules": [{**ALICE, "match": [{}, {}]}, DEFAULT]},
            "spec.rules[0].match: must have 1 entry, one for each of keys",
        ),
        (
            {"keys": [USER], "rules": [{**DEFAULT, "name": "b"}, DEFAULT]},
            "spec.rules[0].match: is missing: only the last rule is for all other requests",
        ),
        ({"rules": []}, "spec.rules: must have 1 or more entries"),
        ({"rules": [{"limits": LIMITS * 9}]}, "spec.rules[0].limits: must have 8 entries at most, but has 9"),
        (
            {"rules": [DEFAULT, {**DEFAULT, "name": "b"}]},
            "spec.rules[0].match: is missing: only the last rule is for all other requests",
        ),
        (
            {"keys": [USER], "rules": [{**ALICE, "name": "default"}, DEFAULT]},
            "spec.rules[1].name: 'default' is the name of a rule before",
        ),
        (
            {"rules": [{"limits": [*LIMITS, *LIMITS]}]},
            "spec.rules[0].limits[1]: has type and unit of a limit before",
        ),
        (
            {"rules": [{"limits": [{"tokens": 1, "unit": "Day"}]}]},
            (
                "spec.rules[0].limits[0].unit: a Day in mode Local needs local.longWindows: true; each Envoy "
                "counts for itself and begins anew when it restarts"
            ),
        ),
        ({"mode": "Global"}, "spec.provider: is missing: mode Global needs the service that counts"),
        ({"provider": {"name": "a"}}, "spec.provider: is for mode Global only"),
        (
            {"selector": {}, "targetRefs": [{"kind": "LLMRoute", "name": "a"}]},
            "spec.targetRefs: only one of selector and targetRefs can be set",
        ),
        (
            {"targetRefs": [{"kind": "Gateway", "name": "a"}]},
            "spec.targetRefs[0].group: must be 'networking.istio.io' for a Gateway",
        ),
        (
            {"targetRefs": [{"kind": "LLMProvider", "name": "a", "sectionName": "b"}]},
            "spec.targetRefs[0].sectionName: is the rule of an LLMRoute",
        ),
        ({"keys": None}, "spec.keys: must not be null: give it a value or remove it"),
    ],
)
def test_what_is_wrong_is_said(spec: Any, expected: str) -> None:
    policy, problems = read(spec)
    assert policy is None
    assert expected in problems


def test_a_mistake_in_the_only_item_of_a_list_is_told_once() -> None:
    _, problems = read({"rules": [{"limits": [{"tokens": 1, "unit": "Week"}]}]})
    assert problems == [
        "spec.rules[0].limits[0].unit: must be 'Second', 'Minute', 'Hour', 'Day' or 'Month'",
    ]


def test_a_field_without_effect_is_told_of() -> None:
    _, problems = read({"failOpen": True})
    assert problems == ["spec.failOpen: has no effect in mode Local"]
