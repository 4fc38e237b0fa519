"""APIKeyAuthentication: its defaults and its checks."""

from typing import Any

import pytest

from crds.apikeyauthentication import APIKeyAuthentication
from crds.loader import load_object


def read(spec: Any) -> tuple[APIKeyAuthentication | None, list[str]]:
    document = {
        "apiVersion": "istio.alibabacloud.com/v1beta1",
        "kind": "APIKeyAuthentication",
        "metadata": {"name": "a", "namespace": "b"},
        "spec": spec,
    }
    found, problems = load_object(document)
    assert found is None or isinstance(found, APIKeyAuthentication)
    return found, [f"{problem.field}: {problem.message}" for problem in problems]


def test_by_default_keys_are_where_the_official_sdks_send_them() -> None:
    policy, problems = read({"credentialRefs": [{"name": "clients"}]})
    assert problems == []
    assert policy
    assert [header.name for header in policy.spec.from_headers] == ["x-api-key", "authorization"]


def test_names_of_headers_have_no_case() -> None:
    policy, _ = read({"credentialRefs": [{"name": "clients"}], "fromHeaders": [{"name": "X-Goog-Api-Key"}]})
    assert policy
    assert policy.spec.from_headers[0].name == "x-goog-api-key"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"credentialRefs": []}, "spec.credentialRefs: is empty"),
        ({"credentialRefs": None}, "spec.credentialRefs: must not be null: give it a value or remove it"),
        ({"credentialRefs": [{"name": "a"}, {"name": "a"}]}, "spec.credentialRefs[1].name: is named twice"),
        ({"fromHeaders": []}, "spec.fromHeaders: is empty"),
        ({"fromHeaders": [{"name": "a b"}]}, "spec.fromHeaders[0].name: is not the name of a header"),
        (
            {"fromHeaders": [{"name": "Content-Type"}]},
            "spec.fromHeaders[0].name: cannot be the header of a key: it has another meaning",
        ),
        (
            {"fromHeaders": [{"name": "x-llm-client"}]},
            "spec.fromHeaders[0].name: cannot be the header of a key: it has another meaning",
        ),
        ({"fromHeaders": [{"name": "a"}, {"name": "A"}]}, "spec.fromHeaders[1].name: is named twice"),
        ({"fromParams": ["key"]}, "spec.fromParams: unknown field, did you mean 'fromHeaders'?"),
        (
            {"selector": {"matchLabels": {"a": "b*"}}},
            'spec.selector.matchLabels.a: wildcard is not supported in selector: "a=b*"',
        ),
    ],
)
def test_invalid(members: Any, expected: str) -> None:
    policy, problems = read({"credentialRefs": [{"name": "clients"}], **members})
    assert policy is None
    assert problems == [expected]


def test_a_selector_without_labels_is_warned_of() -> None:
    _, problems = read({"credentialRefs": [{"name": "clients"}], "selector": {}})
    assert problems == ["spec.selector: workload selector specified without labels"]
