"""LLMProvider -> cluster and secrets: what is sent where (design decisions 8, 9, 16)."""

from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from crds.loader import load
from tests.support.objects import provider, route, secret, world
from translator import secrets
from translator.clusters import Destination, cluster
from translator.lua import Operation
from translator.operations import STREAM_USAGE, operations
from translator.proxy import Proxy, ProxyType
from translator.translate import Translator
from translator.world import MeshSettings, World
from xds import protos
from xds.resources import CDS, SDS, Resource

HOST = "llm.example.com"
SIDECAR = Proxy(ProxyType.SIDECAR, "default", "sleep")


def only_provider(objects: World) -> Any:
    (found,) = objects.providers["default"]
    return found


# Operations


def operations_of(path: str, *listed: dict[str, Any], **config: Any) -> dict[str, Operation]:
    """Return the operations of a provider, by method and suffix; its own one is the first."""
    configs = {"defaultConfig": {"openAIConfig": config}}
    spec = only_provider(
        world(provider("llm", HOST, path=path, operations=list(listed), configs=configs))
    ).spec
    return {f"{o.method} {o.suffix}": o for o in operations(spec, spec.config_for(None))}


@pytest.mark.parametrize(
    ("path", "own", "embeddings"),
    [
        ("/v1/chat/completions", "POST /chat/completions", "/v1/embeddings"),
        ("/compatible-mode/v1/chat/completions", "POST /chat/completions", "/compatible-mode/v1/embeddings"),
        ("/v1/chat/completions/", "POST /chat/completions", "/v1/embeddings"),
        ("/v1/chat/completions?api-version=1", "POST /chat/completions", "/v1/embeddings?api-version=1"),
        ("/v1/completions", "POST /completions", "/v1/embeddings"),
        ("/api/generation", "POST /generation", "/api/embeddings"),
        ("/", "POST /chat/completions", "/embeddings"),
    ],
)
def test_the_path_says_which_operation_is_the_providers_own(path: str, own: str, embeddings: str) -> None:
    made = operations_of(path, model="m")
    first = next(iter(made))
    assert (first, made[first].path) == (own, path)
    assert made[first].members, "the model goes into this one"
    members = [member for key in made if key != own for member in made[key].members or ()]
    assert ("model",) not in [member.path for member in members], "the others keep the client's model"
    assert made["POST /embeddings"].path == embeddings
    assert "GET /models" in made


ASKS = {"POST /chat/completions", "POST /completions"}


@pytest.mark.parametrize(
    ("config", "asking"),
    [
        ({}, ASKS),
        ({"streamUsage": True}, ASKS),
        ({"streamUsage": False}, set()),
        ({"defaults": {"stream_options": {"include_usage": True}}}, {"POST /completions"}),
        ({"overrides": {"stream_options": {}}}, {"POST /completions"}),
    ],
)
def test_which_operations_ask_for_the_usage_of_streams(config: dict[str, Any], asking: set[str]) -> None:
    """Those that have `stream_options`, if it is not switched off and not configured otherwise."""
    listed = {"path": "/completions", "model": "m"}
    made = operations_of("/v1/chat/completions", listed, **config)
    assert {key for key, operation in made.items() if STREAM_USAGE in (operation.members or ())} == asking


def test_stream_usage_of_a_rule() -> None:
    """What a rule does not say of it, the default config says."""
    configs = {
        "defaultConfig": {"openAIConfig": {"streamUsage": False}},
        "routeSpecificConfigs": {
            "on": {"openAIConfig": {"streamUsage": True}},
            "silent": {"openAIConfig": {"model": "m"}},
        },
    }
    spec = only_provider(world(provider("llm", HOST, configs=configs))).spec
    said = {rule: spec.config_for(rule).stream_usage for rule in (None, "on", "silent")}
    assert said == {None: False, "on": True, "silent": False}


def test_a_listed_operation_may_name_its_model() -> None:
    made = operations_of("/v1/chat/completions", {"path": "/embeddings", "model": "e"}, {"path": "/rerank"})
    (member,) = made["POST /embeddings"].members or ()
    assert (member.path, member.value, member.mode) == (("model",), '"e"', "force")
    assert (made["POST /rerank"].path, made["POST /rerank"].members) == ("/v1/rerank", None)


@pytest.mark.parametrize("path", ["/", "/images/", "/images?size=1"])
def test_what_cannot_be_an_operation_is_refused_beforehand(path: str) -> None:
    loaded = load(provider("llm", HOST, operations=[{"path": path}]), "f.yaml", {})
    assert "spec.operations[0].path" in str(loaded.problems[0])
    assert loaded.objects == ()


def test_what_the_provider_says_of_members() -> None:
    own = next(
        iter(
            operations_of(
                "/v1/chat/completions", model="m", stream=True, defaults={"a": 1}, overrides={"b": [2.5]}
            ).values()
        )
    )
    assert [(member.path, member.value, member.mode) for member in own.members or ()] == [
        (("model",), '"m"', "force"),
        (("b",), "[2.5]", "force"),
        (("stream",), "true", "fill"),
        (("a",), "1", "fill"),
        (STREAM_USAGE.path, "true", "fill_stream"),
    ]


# Clusters


def cluster_of(host: str = HOST, mesh: MeshSettings | None = None, **spec: Any) -> dict[str, Any]:
    """Make the cluster of a provider, in proto field names."""
    found = only_provider(world(provider("llm", host, **spec)))
    made = cluster(
        Destination.of(found, found.spec.host), mesh or MeshSettings(), SIDECAR, client_certificate=False
    )
    return dict(MessageToDict(made, preserving_proto_field_name=True, descriptor_pool=protos.POOL))


def options_of(made: dict[str, Any]) -> dict[str, Any]:
    (options,) = made["typed_extension_protocol_options"].values()
    return dict(options)


def addresses_of(made: dict[str, Any], priority: int = 0) -> list[tuple[str, int]]:
    sockets = [
        host["endpoint"]["address"]["socket_address"]
        for host in made["load_assignment"]["endpoints"][priority]["lb_endpoints"]
    ]
    return [(socket["address"], socket["port_value"]) for socket in sockets]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, [(HOST, 443)]),
        ({"port": 8443}, [(HOST, 8443)]),
        ({"tls": {"mode": "DISABLE"}}, [(HOST, 80)]),
        (
            {"endpoints": [{"address": "10.0.0.1"}, {"address": "b.example.com", "port": 1}]},
            [("10.0.0.1", 443), ("b.example.com", 1)],
        ),
    ],
)
def test_where_to_connect(spec: dict[str, Any], expected: list[tuple[str, int]]) -> None:
    assert addresses_of(cluster_of(**spec)) == expected


def test_connect_to_moves_addresses_and_leaves_names() -> None:
    mesh = MeshSettings(connect_to={(HOST, 443): ("127.0.0.1", 8443)})
    made = cluster_of(mesh=mesh)
    assert addresses_of(made) == [("127.0.0.1", 8443)]
    assert made["transport_socket"]["typed_config"]["sni"] == HOST


def test_names_are_resolved_and_addresses_are_not() -> None:
    assert cluster_of()["cluster_type"]["typed_config"]["dns_lookup_family"] == "V4_PREFERRED"
    assert "cluster_type" not in cluster_of(endpoints=[{"address": "10.0.0.1"}])


def test_each_cluster_has_a_guard_that_is_never_ejected() -> None:
    """Without a host Envoy answers 503 at once, and no other provider is asked."""
    made = cluster_of(trafficPolicy={"outlierDetection": {"maxEjectionPercent": 100}})
    assert addresses_of(made, priority=1) == [("127.0.0.1", 1)]
    assert made["outlier_detection"]["max_ejection_percent"] == 99, "the guard is the last host of them"
    made = cluster_of(trafficPolicy={"outlierDetection": {"maxEjectionPercent": 30}})
    assert made["outlier_detection"]["max_ejection_percent"] == 30


def test_without_limits_nothing_is_limited() -> None:
    """Not even by Envoy's own defaults: 1024 connections and requests, 3 retries."""
    (thresholds,) = cluster_of()["circuit_breakers"]["thresholds"]
    names = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    assert thresholds == dict.fromkeys(names, 2**32 - 1)


def test_limits_of_the_connection_pool() -> None:
    pool = {
        "tcp": {"maxConnections": 1, "connectTimeout": "3s"},
        "http": {"http1MaxPendingRequests": 2, "http2MaxRequests": 3, "maxRetries": 4, "idleTimeout": "9s"},
    }
    made = cluster_of(trafficPolicy={"connectionPool": pool})
    (thresholds,) = made["circuit_breakers"]["thresholds"]
    expected = {"max_connections": 1, "max_pending_requests": 2, "max_requests": 3, "max_retries": 4}
    assert thresholds == expected
    assert made["connect_timeout"] == "3s"
    assert options_of(made)["common_http_protocol_options"] == {"idle_timeout": "9s"}


@pytest.mark.parametrize(("policy", "counts"), [({}, True), ({"count429": False}, False)])
def test_429_counts_as_an_error_unless_it_shall_not(policy: dict[str, Any], *, counts: bool) -> None:
    made = cluster_of(trafficPolicy={"outlierDetection": policy})
    assert ("outlier_detection" in options_of(made)) == counts
    assert "outlier_detection" not in options_of(cluster_of())


def test_tls_verifies_authority_and_name_by_default() -> None:
    tls = cluster_of()["transport_socket"]["typed_config"]
    assert tls["sni"] == HOST
    assert tls["auto_sni_san_validation"] is True
    (name,) = {
        tls["common_tls_context"]["combined_validation_context"]["validation_context_sds_secret_config"][
            "name"
        ]
    }
    assert name == secrets.ROOT_CA


def test_verification_is_off_only_where_it_was_asked_for() -> None:
    tls = cluster_of(tls={"insecureSkipVerify": True})["transport_socket"]["typed_config"]
    assert "auto_sni_san_validation" not in tls
    assert tls["common_tls_context"] == {}


def test_an_ipv6_address_as_host() -> None:
    made = cluster_of("2001:db8::1")
    options = made["typed_extension_protocol_options"][
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    ]
    assert options["http_filters"][0]["typed_config"]["filter_context"]["host"] == "[2001:db8::1]"
    tls = made["transport_socket"]["typed_config"]
    assert "sni" not in tls


# Secrets


def keys_of(*documents: str) -> dict[str, str]:
    """Return the API keys that go to the sidecar, by name of the SDS secret."""
    found = {}
    for resource in Translator().translate(world(*documents), SIDECAR).resources:
        if resource.name.startswith("api-key/"):
            message = protos.Secret()
            assert protos.Any.FromString(resource.body).Unpack(message)
            found[resource.name] = message.generic_secret.secret.inline_string
    return found


def test_each_key_is_sent_once() -> None:
    configs = {
        "defaultConfig": {"openAIConfig": {"apiKey": "sk-1"}},
        "routeSpecificConfigs": {
            "same": {"openAIConfig": {"apiKey": "sk-1"}},
            "model": {"openAIConfig": {"model": "m"}},
            "other": {"openAIConfig": {"apiKey": "sk-2"}},
        },
    }
    rules = [
        {
            "name": name,
            "matches": [{"headers": {"x": {"exact": name}}}],
            "backendRefs": [{"providerHost": HOST}],
        }
        for name in ("same", "model", "other", "none")
    ]
    assert keys_of(provider("llm", HOST, configs=configs), route("chat", "chat.example.com", *rules)) == {
        "api-key/default/llm": "sk-1",
        "api-key/default/llm/other": "sk-2",
    }


def test_a_keyless_provider_has_no_secret() -> None:
    assert keys_of(provider("llm", HOST)) == {}


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"key": "sk-1\n"}, "sk-1"),
        ({"key": " \n"}, ""),
        ({"key": "sk 1"}, ""),
        ({"key": "sk-1\r\nx-evil: 1"}, ""),
        ({"other": "sk-1"}, ""),
    ],
)
def test_a_key_that_cannot_be_sent_is_an_empty_one(values: dict[str, str], key: str) -> None:
    """Envoy answers 401 for an empty secret, and would wait 15 s for one that does not come at all."""
    config = {"apiKeySecretRef": {"name": "keys", "key": "key"}}
    configs = {"defaultConfig": {"openAIConfig": config}}
    found = keys_of(provider("llm", HOST, configs=configs), secret("keys", values))
    assert found == {"api-key/default/llm": key}


def test_a_secret_of_another_namespace_is_not_read() -> None:
    config = {"apiKeySecretRef": {"name": "keys", "key": "key"}}
    configs = {"defaultConfig": {"openAIConfig": config}}
    documents = (provider("llm", HOST, configs=configs), secret("istio-system/keys", {"key": "sk-1"}))
    assert keys_of(*documents) == {"api-key/default/llm": ""}


def test_a_certificate_that_may_be_in_an_unreadable_file_is_held() -> None:
    """The cluster goes on referring to it: a running Envoy keeps the certificate that it has."""
    objects = world(provider("llm", HOST, tls={"mode": "MUTUAL", "credentialName": "client"}))
    name = (SDS, "kubernetes://default/client")
    for incomplete in (False, True):
        made = Translator().translate(replace(objects, incomplete=incomplete), SIDECAR).resources
        resources = {(each.type_url, each.name): each for each in made}
        (body,) = (each.body for (type_url, _), each in resources.items() if type_url == CDS)
        assert (name in resources) == (name[1].encode() in body) == incomplete
    assert resources[name] == Resource.unknown(*name)
