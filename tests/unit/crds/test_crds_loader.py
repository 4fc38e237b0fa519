"""Files: documents, lines, problems, and what is known of broken documents."""

import json
from textwrap import dedent

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crds.llmprovider import LLMProvider
from crds.llmroute import LLMRoute
from crds.loader import Loaded, combine, load, load_object
from crds.problems import ObjectKey

PROVIDER = """\
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata:
  name: dashscope-qwen
spec:
  host: dashscope.aliyuncs.com # a comment
  path: /compatible-mode/v1/chat/completions
  configs:
    defaultConfig:
      openAIConfig:
        apiKey: ${ API_KEY of dashscope}
"""
ROUTE = """\
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMRoute
metadata:
  name: demo
spec:
  host: demo
  rules:
  - backendRefs:
    - providerHost: dashscope.aliyuncs.com
"""
VARIABLES = {"API_KEY_OF_DASHSCOPE": "sk-1"}
PROVIDER_KEY = ObjectKey("LLMProvider", "default", "dashscope-qwen")
ROUTE_KEY = ObjectKey("LLMRoute", "default", "demo")


def read(text: str) -> Loaded:
    return load(dedent(text), "x.yaml", VARIABLES)


def texts(loaded: Loaded) -> list[str]:
    return [str(problem) for problem in loaded.problems]


def test_objects_know_their_place() -> None:
    loaded = read(f"# first\n{PROVIDER}---\n{ROUTE}")
    assert texts(loaded) == []
    assert [(found.key, found.file, found.line) for found in loaded.objects] == [
        (PROVIDER_KEY, "x.yaml", 2),
        (ROUTE_KEY, "x.yaml", 14),
    ]


def test_the_text_of_an_object_keeps_its_placeholders_and_comments() -> None:
    (found,) = read(PROVIDER).objects
    assert found.text == PROVIDER
    assert isinstance(found.object, LLMProvider)
    key = found.object.spec.config_for(None).api_key
    assert key
    assert key.get_secret_value() == "sk-1"
    assert "sk-1" not in repr(found)


def test_the_digest_is_that_of_the_content() -> None:
    (found,) = read(PROVIDER).objects
    (moved,) = read(f"---\n\n{PROVIDER.replace('# a comment', '')}status: {{status: Ready}}\n").objects
    (other_key,) = load(PROVIDER, "x.yaml", {"API_KEY_OF_DASHSCOPE": "sk-2"}).objects
    assert found.digest == moved.digest
    assert found.digest != other_key.digest


def test_a_problem_names_file_line_object_and_field() -> None:
    broken = ROUTE.replace("    - providerHost", "    - wieght: 1\n      providerHost")
    assert texts(read(f"{PROVIDER}---\n{broken}")) == [
        (
            "x.yaml:21: LLMRoute default/demo: spec.rules[0].backendRefs[0].wieght: unknown field,"
            " did you mean 'weight'?"
        )
    ]


def test_a_warning_says_so() -> None:
    loaded = read(ROUTE + "  - backendRefs: [{providerHost: a.b}]\n")
    assert texts(loaded) == [
        (
            "x.yaml:10: warning: LLMRoute default/demo: spec.rules[1]:"
            " is never reached: rules[0] takes all requests"
        ),
    ]
    assert len(loaded.objects) == 1


def test_a_placeholder_without_a_value_names_its_variable() -> None:
    loaded = load(PROVIDER, "examples/x.yaml", {})
    assert texts(loaded) == [
        (
            "examples/x.yaml:11: LLMProvider default/dashscope-qwen:"
            " spec.configs.defaultConfig.openAIConfig.apiKey: the variable API_KEY_OF_DASHSCOPE is not set:"
            " export it, or give --set 'API_KEY_OF_DASHSCOPE=...'"
        )
    ]
    assert loaded.objects == ()


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    broken = ROUTE.replace("host: demo", "host: demo:80\n  host: demo\n  port: 1")
    assert [problem.line for problem in read(broken).problems] == [6, 7, 8]


def test_a_broken_object_is_known_by_its_key() -> None:
    loaded = read(f"{PROVIDER}---\n{ROUTE.replace('providerHost', 'provider')}")
    assert [found.key for found in loaded.objects] == [PROVIDER_KEY]
    assert {key: str(place) for key, place in loaded.invalid.items()} == {ROUTE_KEY: "x.yaml:13"}
    assert not loaded.broken


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: b: c\n", "x.yaml:1:5: is not valid YAML: mapping values are not allowed in this context"),
        ("a:\n\tb: c\n", "x.yaml:2:1: indented with a tab: YAML takes spaces only"),
        ("a: 'b\n", "x.yaml:2:1: is not valid YAML: found unexpected end of stream"),
        ("a: {b: c\n", "x.yaml:2:1: is not valid YAML: did not find expected ',' or '}'"),
        ("a: @b\n", "x.yaml:1:4: is not valid YAML: found character that cannot start any token"),
        ("a: *b\n", "x.yaml:1: '*b' refers to nothing before it"),
        ("a: &b {c: *b}\n", "x.yaml:1: '*b' refers to nothing before it"),
        ("a: b\x07\n", "x.yaml:1:5: is not valid YAML: it holds U+0007"),
        ("a: b\n...\nc: d\n", "x.yaml:3:1: is not valid YAML: did not find expected <document start>"),
        ("- a\n", "x.yaml:1: must be an object (with apiVersion, kind, metadata, spec), but is a list"),
        ("text\n", "x.yaml:1: must be an object (with apiVersion, kind, metadata, spec), but is a string"),
        ("{}\n", "x.yaml:1: apiVersion: is missing"),
        ("apiVersion: v1\n", "x.yaml:1: kind: is missing"),
        ("apiVersion: 1\nkind: Secret\n", "x.yaml:1: apiVersion: must be a string"),
        ("apiVersion: v1\nkind: Secret\n", "x.yaml:1: metadata: is missing"),
        ("apiVersion: v1\nkind: Secret\nmetadata: {}\n", "x.yaml:3: metadata.name: is missing"),
        (
            "apiVersion: v1\nkind: Secret\nmetadata: {name: My_Secret}\n",
            "x.yaml:3: metadata.name: must be a Kubernetes name (lower-case letters, digits, '-' and '.')",
        ),
        (
            "apiVersion: v1\nkind: Secret\nmetadata:\n  name: a\n  name: b\n",
            "x.yaml:5: Secret default/a: metadata.name: is set twice, first on line 4",
        ),
        (
            "apiVersion: istio.alibabacloud.com/v1beta1\nkind: LLMRoutes\nmetadata: {name: a}\n",
            (
                "x.yaml:2: LLMRoutes default/a: kind: unknown kind 'LLMRoutes' of istio.alibabacloud.com,"
                " did you mean 'LLMRoute'?"
            ),
        ),
        (
            "apiVersion: istio.alibabacloud.com/v1\nkind: LLMRoute\nmetadata:\nname: a\nspec:\nhost: b\n",
            "x.yaml:3: metadata: is empty: is the indentation of this document lost?",
        ),
    ],
)
def test_a_document_of_which_it_is_not_known_what_object_it_is(text: str, problem: str) -> None:
    """It spoils no other document, but nothing may be removed because of the file."""
    loaded = read(text)
    assert texts(loaded) == [problem]
    assert loaded.broken
    assert loaded.invalid == {}
    together = read(f"{text}---\n{ROUTE}")
    assert texts(together)[:1] == texts(loaded)
    assert [found.key for found in together.objects] == [ROUTE_KEY]


def test_a_document_that_is_broken_behind_its_name_is_known() -> None:
    loaded = read(PROVIDER + "  tls: {mode: SIMPLE\n")
    assert texts(loaded) == [
        "x.yaml:13:1: LLMProvider default/dashscope-qwen: is not valid YAML: did not find expected ',' or '}'"
    ]
    assert list(loaded.invalid) == [PROVIDER_KEY]
    assert not loaded.broken


def test_a_document_that_is_broken_within_its_metadata_is_not() -> None:
    """Its namespace may come behind the place where reading ended."""
    loaded = read("apiVersion: v1\nkind: Secret\nmetadata:\n  name: a\n  labels: {\n")
    assert loaded.broken
    assert loaded.invalid == {}


def test_a_kind_of_istio_that_is_not_supported_is_known() -> None:
    loaded = read(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: deny, namespace: a}\n"
    )
    assert texts(loaded) == [
        (
            "x.yaml:1: PeerAuthentication a/deny: 'PeerAuthentication' of security.istio.io"
            " is not supported by this version of llmplane; it has no effect"
        )
    ]
    assert not loaded.broken


def test_one_broken_document_does_not_spoil_the_others() -> None:
    loaded = read(f"{PROVIDER}--- # route\na: [\n--- \n{ROUTE}---\n")
    assert [found.key for found in loaded.objects] == [PROVIDER_KEY, ROUTE_KEY]
    assert loaded.broken


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "# nothing\n",
        "---\n---\n",
        "%YAML 1.1\n---\n# nothing\n...\n",
        "--- ~\n",
        "\ufeff# nothing\n",
    ],
)
def test_nothing(text: str) -> None:
    assert read(text) == Loaded((), (), {}, broken=False)


def test_a_file_may_have_directives_a_byte_order_mark_and_the_line_ends_of_windows() -> None:
    text = f"\ufeff%YAML 1.1\n---\n{PROVIDER}---\n{ROUTE}".replace("\n", "\r\n")
    loaded = read(text)
    assert texts(loaded) == []
    assert [found.line for found in loaded.objects] == [3, 15]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\u2028"])
def test_every_line_end_of_yaml_ends_a_line(end: str) -> None:
    loaded = read(f"{PROVIDER}---\n{ROUTE}".replace("\n", end))
    assert texts(loaded) == []
    assert [found.line for found in loaded.objects] == [1, 13]


def test_kinds_that_are_not_needed_are_passed_over() -> None:
    text = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: sleep}\nspec: {a: 1, a: 2, on: 3}\n"
    assert read(text) == Loaded((), (), {}, broken=False)


def test_an_object_that_is_there_twice() -> None:
    loaded = read(f"{ROUTE}---\n{ROUTE.replace('host: demo', 'host: other')}")
    assert texts(loaded) == [
        "x.yaml:11: LLMRoute default/demo: is the same object as in x.yaml:1, which counts"
    ]
    (found,) = loaded.objects
    assert isinstance(found.object, LLMRoute)
    assert found.object.spec.host == "demo"


def test_an_object_that_is_there_twice_and_broken_first() -> None:
    """The second one does not take the place of the first: nobody knows which one is meant."""
    loaded = read(f"{ROUTE.replace('host:', 'hosts:')}---\n{ROUTE}")
    assert texts(loaded)[-1:] == [
        "x.yaml:11: LLMRoute default/demo: is the same object as in x.yaml:1, which counts"
    ]
    assert loaded.objects == ()
    assert list(loaded.invalid) == [ROUTE_KEY]


def test_an_object_that_two_files_have() -> None:
    loaded = combine([load(ROUTE, "a.yaml", {}), load("# nothing", "b.yaml", {}), load(ROUTE, "c.yaml", {})])
    assert texts(loaded) == [
        "c.yaml:1: LLMRoute default/demo: is the same object as in a.yaml:1, which counts"
    ]
    assert [found.file for found in loaded.objects] == ["a.yaml"]
    assert combine([loaded]) == loaded


def test_what_kubectl_prints_is_read() -> None:
    text = "apiVersion: v1\nkind: List\nitems:\n" + "".join(
        "- " + document.replace("\n", "\n  ").rstrip() + "\n" for document in (PROVIDER, ROUTE)
    )
    loaded = read(text)
    assert texts(loaded) == []
    assert [(found.key, found.line) for found in loaded.objects] == [(PROVIDER_KEY, 4), (ROUTE_KEY, 15)]
    alone = [load(found.text, "y.yaml", VARIABLES).objects for found in loaded.objects]
    assert [again.digest for (again,) in alone] == [found.digest for found in loaded.objects]


def test_problems_of_a_list() -> None:
    text = """\
        apiVersion: v1
        kind: List
        items:
        - apiVersion: v1
          kind: Secret
          metadata: {name: a}
          data: {a: YQ==, a: YQ==}
        - 1
        - apiVersion: v1
          kind: List
          items: []
        """
    loaded = read(text)
    assert texts(loaded) == [
        "x.yaml:7: Secret default/a: data.a: is set twice, first on line 7",
        "x.yaml:8: must be an object (with apiVersion, kind, metadata, spec), but is a number",
    ]
    assert loaded.broken
    assert read("apiVersion: v1\nkind: List\nitems: []\nitems: []\n").broken


def test_json_is_yaml() -> None:
    (found,) = read(ROUTE).objects
    document = found.object.model_dump(by_alias=True, mode="json", exclude_none=True)
    document["metadata"]["annotations"] = {"emoji": "\U0001f600 \\ud83d"}
    for text in (
        json.dumps(document),
        json.dumps(document, indent="\t"),
        json.dumps(document, ensure_ascii=False),
    ):
        (again,) = read(text).objects
        assert again.object.metadata.annotations == {"emoji": "\U0001f600 \\ud83d"}


def test_numbers_are_read_as_kubernetes_reads_them() -> None:
    config = "{defaults: {a: 1e-3, b: 0x10, c: 010, d: 1_000, e: 22:22, f: 'no', g: no, h: 1.0, i: !!str 1}}"
    (found,) = read(PROVIDER.replace("\n        apiKey: ${ API_KEY of dashscope}", f" {config}")).objects
    assert isinstance(found.object, LLMProvider)
    assert found.object.spec.config_for(None).defaults == {
        "a": 0.001,
        "b": 16,
        "c": 8,
        "d": 1000,
        "e": "22:22",
        "f": "no",
        "g": False,
        "h": 1.0,
        "i": "1",
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("!!binary YQ==", "has the tag 'tag:yaml.org,2002:binary', which is not supported"),
        ("!python/object:os.system []", "has the tag '!python/object:os.system', which is not supported"),
        ("!!int x", "is no int: write it in quotes"),
        ("2024-13-41", "is no timestamp: write it in quotes"),
        ("9" * 5000, "is no int: write it in quotes"),
        ("0x" + "f" * 17, "is too large for a whole number: write it in quotes"),
        ("{? [a] : b}", "has a member whose name is not a string"),
        ("{1: b}", "has a member whose name is a number: write it in quotes"),
        ("{<<: b}", "'<<' takes a mapping, or a list of mappings"),
    ],
)
def test_values_that_yaml_may_hold_but_no_object(value: str, message: str) -> None:
    text = PROVIDER.replace("apiKey: ${ API_KEY of dashscope}", f"defaults: {{a: {value}}}")
    found = texts(read(text))
    assert found[:1] == [
        (
            "x.yaml:11: LLMProvider default/dashscope-qwen:"
            f" spec.configs.defaultConfig.openAIConfig.defaults.a: {message}"
        )
    ]


def test_anchors_and_merge_keys() -> None:
    text = """\
        apiVersion: istio.alibabacloud.com/v1
        kind: LLMProvider
        metadata: {name: &name p, labels: {name: *name}}
        spec:
          host: a.b
          path: /c
          configs:
            defaultConfig:
              openAIConfig: &config {model: m, stream: false, apiKey: sk-1}
            routeSpecificConfigs:
              one: {openAIConfig: {<<: *config, model: n}}
              two: {openAIConfig: {model: o, <<: [*config, {model: p}]}}
        """
    (found,) = read(text).objects
    assert isinstance(found.object, LLMProvider)
    assert found.object.metadata.labels == {"name": "p"}
    configs = found.object.spec.configs.route_specific_configs
    assert [(one.open_ai_config.model, one.open_ai_config.stream) for one in configs.values()] == [
        ("n", False),
        ("o", False),
    ]


def test_aliases_do_not_grow_without_bounds() -> None:
    bomb = "".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    loaded = read(f"{ROUTE}x:\n  a0: &a0 [x]\n{bomb}")
    assert texts(loaded) == ["x.yaml:15: LLMRoute default/demo: grows out of bounds by its aliases"]
    assert list(loaded.invalid) == [ROUTE_KEY]


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 100_000, "- " * 5000, "? " * 5000])
def test_nesting_is_bounded(text: str) -> None:
    *_, problem = read(f"{ROUTE}---\n{text}").problems
    assert "nested deeper than 64 levels" in problem.message or "is not valid YAML" in problem.message


def test_nesting_by_aliases_is_bounded() -> None:
    chain = "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 80))
    assert texts(read(f"a0: &a0 x\n{chain}")) == ["x.yaml:65: is nested deeper than 64 levels"]


fragments = st.sampled_from(
    [
        *PROVIDER.splitlines(keepends=True),
        *ROUTE.splitlines(keepends=True),
        "---\n", "--- ", "...\n", "- ", "? ", ": ", "  ", "\t", "\n", "[", "]", "{", "}", ",", "'", '"',
        "|\n", ">-\n", "&a ", "*a ", "<<: ", "!!int ", "!x ", "%YAML 1.1\n", "#", "~", "apiKey: ", "${A}",
        "${", "\\ud83d\\ude00", "kind: List\n", "items:\n", "apiVersion: v1\n", "kind: Secret\n",
        "metadata: ", "1e5", "0x", ".nan", "2024-01-01", "\r", "\x85", "\u2028", "\ufeff", "\x00", "é",
    ]
)  # fmt: skip


@given(st.text() | st.lists(fragments | st.text(max_size=3), max_size=40).map("".join))
@example("\ud800")
@example("- !!timestamp 1")
@example("!!bool x: y")
def test_no_text_makes_it_raise(text: str) -> None:
    loaded = load(text, "x.yaml", {})
    for problem in loaded.problems:
        assert str(problem).startswith("x.yaml:")
        assert 1 <= problem.line <= len(text.splitlines()) + 1
    if not loaded.problems:
        assert not loaded.broken
        assert not loaded.invalid


@given(st.data())
def test_no_damage_to_a_document_takes_another_ones_place(data: st.DataObject) -> None:
    """Whatever is cut out of a document: it is read, or known as broken, or the file is known as broken."""
    start = data.draw(st.integers(0, len(PROVIDER)))
    end = data.draw(st.integers(start, len(PROVIDER)))
    loaded = read(f"{PROVIDER[:start]}{PROVIDER[end:]}\n---\n{ROUTE}")
    assert [found.key for found in loaded.objects][-1:] == [ROUTE_KEY]
    keys = {found.key for found in loaded.objects} | set(loaded.invalid)
    assert loaded.broken or len(keys) == 2 or not loaded.problems


def test_an_object_of_an_api_server() -> None:
    document = {
        "apiVersion": "istio.alibabacloud.com/v1beta1",
        "kind": "LLMProvider",
        "metadata": {
            "name": "p",
            "namespace": "ns",
            "uid": "0-1",
            "generation": 3,
            "resourceVersion": "12",
            "creationTimestamp": "2026-01-02T03:04:05Z",
            "managedFields": [{}],
        },
        "spec": {
            "host": "a.b",
            "path": "/",
            "configs": {"defaultConfig": {"openAIConfig": {"apiKey": "${HOME}"}}},
        },
        "status": {"conditions": []},
    }
    found, problems = load_object(document)
    assert isinstance(found, LLMProvider)
    assert problems == ()
    assert found.metadata.creation_timestamp
    assert found.metadata.creation_timestamp.isoformat() == "2026-01-02T03:04:05+00:00"
    assert (found.metadata.generation, found.metadata.resource_version) == (3, "12")
    # The environment of the control plane is not for objects of Kubernetes.
    assert found.spec.config_for(None).placeholder == "${HOME}"


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (
            {"apiVersion": "istio.alibabacloud.com/v1", "kind": "LLMRoute", "metadata": {"name": "a"}},
            ["LLMRoute default/a: spec: is missing"],
        ),
        (
            {
                "apiVersion": "networking.istio.io/v1",
                "kind": "Sidecar",
                "metadata": {"name": "a", "namespace": "b"},
            },
            [
                (
                    "Sidecar b/a: 'Sidecar' of networking.istio.io"
                    " is not supported by this version of llmplane; it has no effect"
                )
            ],
        ),
        ({"apiVersion": "v1", "kind": "ConfigMap"}, []),
        ({}, ["unknown apiVersion ''"]),
        ({"apiVersion": "v2", "kind": "Secret"}, ["Secret: unknown apiVersion 'v2'"]),
    ],
)
def test_problems_of_objects_of_an_api_server(document: dict[str, object], expected: list[str]) -> None:
    found, problems = load_object(document)
    assert found is None
    assert [str(problem) for problem in problems] == expected


def test_no_problem_shows_a_key() -> None:
    key = "sk-0123456789"
    for broken in (
        f"apiKey: {key} {key}",
        f"apiKey: [{key}]",
        f"apiKey: {{{key}: {key}}}",
        f"apiKey: {key}\n        apiKey: {key}",
        f"apiKeySecretRef: {key}",
        f"apiKey: {key}\n        {key}",
        f"apiKey: '{key}",
        f"apiKey: !x {key}",
    ):
        for problem in read(PROVIDER.replace("apiKey: ${ API_KEY of dashscope}", broken)).problems:
            assert key not in problem.message


def test_a_good_document_that_did_not_change_is_not_read_again() -> None:
    one, other = (
        f"""---
# {name}
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata: {{name: {name}}}
spec: {{host: {name}.example.com, path: /v1/chat/completions}}
"""
        for name in ("one", "other")
    )
    before = load(one + other, "f.yaml", {})
    after = load("# a new line\n" + one.replace("/v1/", "/v2/") + other, "f.yaml", {}, before)
    assert [item.object.spec.path for item in after.objects] == [
        "/v2/chat/completions",
        "/v1/chat/completions",
    ]
    assert after.objects[0].object is not before.objects[0].object
    assert after.objects[1].object is before.objects[1].object
    assert [item.line for item in before.objects] == [3, 9]
    assert [item.line for item in after.objects] == [4, 10]
    assert load("# a new line\n" + one + other, "f.yaml", {}).objects[1].line == 10


def test_a_document_with_a_warning_warns_each_time() -> None:
    text = """
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata: {name: one}
spec:
  host: one.example.com
  path: /v1/chat/completions
  tls: {mode: DISABLE}
  configs: {defaultConfig: {openAIConfig: {apiKey: sk-1}}}
"""
    before = load(text, "f.yaml", {})
    assert load(text, "f.yaml", {}, before).problems == before.problems
    assert before.problems


def test_bytes_that_are_no_utf8_are_told_as_such() -> None:
    text = b"kind: LLMRoute\nmetadata: {name: \xff}".decode(errors="surrogateescape")
    assert [str(problem) for problem in load(text, "f.yaml", {}).problems] == ["f.yaml:2:18: is not UTF-8"]
