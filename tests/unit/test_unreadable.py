"""Security policies that cannot be read: whom they deny, and what is known of them over time."""

import errno
import json
import os
from pathlib import Path

import pytest

from crds.loader import load
from crds.unreadable import UnreadablePolicy
from llmplane.sources.files import FileSource
from llmplane.sources.lastgood import LastGood
from llmplane.sources.state import world_of
from tests.support.policies import authorization_policy, request_authentication
from translator.world import MeshSettings

EGRESS = {"matchLabels": {"istio": "egressgateway"}}
GOOD = authorization_policy()
BROKEN = authorization_policy(action="PERMIT")


def unreadable(text: str) -> list[tuple[tuple[str, ...], dict[str, str] | None]]:
    """Return kind, namespace and name, and the labels, of each policy that a text makes deny."""
    found = load(text, "x.yaml", {}).unreadable
    return [(tuple(policy.key), dict(policy.labels) if policy.labels else None) for policy, _ in found]


KEY = ("AuthorizationPolicy", "istio-system", "rules")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, []),
        (BROKEN, [(KEY, {"istio": "ingressgateway"})]),
        (authorization_policy(action="PERMIT", selector=EGRESS), [(KEY, {"istio": "egressgateway"})]),
        # Whom it selects is not sure.
        (authorization_policy(selector={"matchLabels": {"a": "*"}}), [(KEY, None)]),
        (authorization_policy(selector={"matchLabel": {"a": "b"}}), [(KEY, None)]),
        (BROKEN.replace('"selector"', '"selecter"'), [(KEY, None)]),
        (BROKEN.replace('"spec": {', '"spec": {"selector": {}, '), [(KEY, None)]),
        (BROKEN[:-2], [(KEY, None)]),
        # Its name is not readable, or its namespace neither.
        (
            BROKEN.replace('"rules", "namespace"', '"A_B", "namespace"'),
            [((*KEY[:2], ""), {"istio": "ingressgateway"})],
        ),
        (BROKEN.replace("istio-system", "A_B"), [((KEY[0], "", ""), None)]),
        (GOOD.replace("/v1", "/v0"), [(KEY, {"istio": "ingressgateway"})]),
        (
            request_authentication({}),
            [(("RequestAuthentication", "istio-system", "tokens"), {"istio": "ingressgateway"})],
        ),
        ("kind: [\n# some AuthorizationPolicy", [((KEY[0], "", ""), None)]),
        # Its kind is a slip of the pen.
        (GOOD.replace("AuthorizationPolicy", "AuthorisationPolicy"), [(KEY, {"istio": "ingressgateway"})]),
        (GOOD.replace("AuthorizationPolicy", "authorizationpolicy"), [(KEY, {"istio": "ingressgateway"})]),
        (
            GOOD.replace('"kind": "AuthorizationPolicy", ', ""),
            [((*KEY[:2], ""), {"istio": "ingressgateway"})],
        ),
        # Other kinds are just left out.
        (GOOD.replace("AuthorizationPolicy", "PeerAuthentication"), []),
        ("kind: LLMProvider\nmetadata: {name: a}\nspec: {}\napiVersion: istio.alibabacloud.com/v1", []),
    ],
)
def test_whom_a_broken_policy_denies(
    text: str, expected: list[tuple[tuple[str, ...], dict[str, str] | None]]
) -> None:
    assert unreadable(text) == expected


def test_it_is_said_in_words() -> None:
    policy = UnreadablePolicy(load(BROKEN, "x.yaml", {}).unreadable[0][0].key, {"b": "2", "a": "1"})
    assert policy.scope == "the gateways of namespace istio-system with a=1, b=2"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "config"
    folder.mkdir()
    return folder


def write(config: Path, *documents: str) -> None:
    (config / "a.yaml").write_text("\n---\n".join(documents))


def denying(source: FileSource) -> list[str]:
    return [str(policy.key) for policy in source.read().unreadable]


def test_a_policy_denies_until_it_was_good_once(config: Path) -> None:
    source = FileSource([config], {})
    write(config, BROKEN)
    state = source.read()
    assert [str(policy.key) for policy in state.unreadable] == ["AuthorizationPolicy istio-system/rules"]
    assert [problem.message for problem in state.problems if problem.message.startswith("no good")] == [
        (
            "no good version of this policy is known: the gateways of namespace istio-system with "
            "istio=ingressgateway refuse every request until it can be read"
        )
    ]
    write(config, GOOD)
    assert denying(source) == []
    write(config, BROKEN)
    assert denying(source) == []
    # Deleted, it is forgotten.
    write(config, "# nothing")
    assert denying(source) == []
    write(config, BROKEN)
    assert denying(source) == ["AuthorizationPolicy istio-system/rules"]


def test_a_good_version_of_before_a_restart_counts(config: Path, tmp_path: Path) -> None:
    good = LastGood(tmp_path / "state.json")
    write(config, GOOD)
    good.put(FileSource([config], {}, good).read().objects)
    write(config, BROKEN)
    assert denying(FileSource([config], {}, LastGood(tmp_path / "state.json"))) == []
    assert len(denying(FileSource([config], {}))) == 1


def test_a_document_without_name_is_taken_for_the_policy_of_its_file_that_is_missing(config: Path) -> None:
    source = FileSource([config], {})
    write(config, GOOD)
    source.read()
    write(config, "kind: AuthorizationPolicy\nmetadata: {name: ")
    assert denying(source) == []
    assert [item.name for item in source.read().objects] == ["rules"]
    write(config, GOOD, "kind: AuthorizationPolicy\nmetadata: {name: ")
    assert len(denying(source)) == 1


def test_a_slip_of_the_pen_in_the_kind_leaves_the_good_version(config: Path) -> None:
    source = FileSource([config], {})
    write(config, GOOD)
    source.read()
    for kind in ("AuthorisationPolicy", "authorizationpolicy"):
        write(config, GOOD.replace("AuthorizationPolicy", kind))
        assert denying(source) == []
        assert [str(item.key) for item in source.read().objects] == ["AuthorizationPolicy istio-system/rules"]


def test_a_file_that_was_never_readable_may_hold_a_policy(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everywhere = "all gateways of every namespace refuse every request"

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    write(config, GOOD)
    source = FileSource([config], {})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert denying(source) == ["AuthorizationPolicy /"]
        assert [problem.message for problem in source.read().problems] == [
            "cannot be read: Permission denied",
            f"no good version of this policy is known: {everywhere} until it can be read",
        ]
    assert denying(source) == []
    (config / "a.yaml").touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert denying(source) == [], "what was in it is known"


def test_a_policy_of_whatever_namespace_is_put_into_the_root_namespace(config: Path) -> None:
    write(config, json.dumps({"kind": "AuthorizationPolicy"}))
    world = world_of(FileSource([config], {}).read(), MeshSettings())
    assert [policy.key.namespace for policy in world.unreadable] == ["istio-system"]
