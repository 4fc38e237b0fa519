"""LLMTokenRateLimits of mode Global as Envoy's ratelimit filters, and the clusters of the services."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf.json_format import MessageToDict

from crds.meshconfig import MeshConfig, load_mesh_config
from tests.support.objects import world
from tests.support.policies import istio_object
from translator import global_rate_limits
from translator.conditions import conditions
from translator.proxy import Proxy, ProxyType, WorkloadCertificate
from translator.translate import Translator
from translator.world import MeshSettings, World
from xds import protos
from xds.resources import CDS

MINUTE = {"tokens": 1000, "unit": "Minute"}
CERTIFICATE = WorkloadCertificate("/chain.pem", "/key.pem", "/root.pem")


def limit(name: str = "shop/per-user", *rules: dict[str, Any], **spec: Any) -> str:
    default = {
        "mode": "Global",
        "provider": {"name": "counts"},
        "rules": list(rules) or [{"limits": [MINUTE]}],
    }
    given = {field: value for field, value in {**default, **spec}.items() if value is not None}
    return istio_object("istio.alibabacloud.com/v1beta1", "LLMTokenRateLimit", name, given)


def mesh(**service: Any) -> MeshSettings:
    counts = {"service": "infra/limits.example.com", "port": 18081, **service}
    upward = {"service": "10.0.0.7", "port": 8081}
    providers = [{"name": "counts", "envoyRateLimit": counts}, {"name": "upward", "envoyRateLimit": upward}]
    config = MeshConfig.model_validate({"extensionProviders": providers})
    return MeshSettings(config=config, trusted_ca=b"PEM")


def proxy(version: tuple[int, int] | None = None, certificate: WorkloadCertificate | None = None) -> Proxy:
    return Proxy(ProxyType.SIDECAR, "shop", "cart", version=version, certificate=certificate)


def filters(of: World, version: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    policies = [policy for policies in of.token_rate_limits.values() for policy in policies]
    made = []
    for each in global_rate_limits.filters(of, proxy(version), policies):
        config = protos.RateLimitFilter.FromString(each["typed_config"].value)
        made.append(MessageToDict(config, preserving_proto_field_name=True, descriptor_pool=protos.POOL))
    return made


def texts(descriptor: dict[str, Any]) -> list[str]:
    """Return the entries of a descriptor as text; what comes from metadata as its path."""
    found = []
    for action in descriptor["actions"]:
        if "generic_key" in action:
            of = action["generic_key"]
            found.append(f"{of['descriptor_key']}={of['descriptor_value']}")
        else:
            of = action["metadata"]
            found.append(f"{of['descriptor_key']}={path(of['metadata_key'])}")
    return found


def path(key: dict[str, Any]) -> str:
    return " ".join([key["key"], *(segment["key"] for segment in key["path"])])


def test_a_limit_is_reserved_when_a_request_begins_and_settled_when_its_answer_ends() -> None:
    (made,) = filters(world(limit(), mesh=mesh(refunds=True)))
    assert made["domain"] == "llmplane"
    reserve, settle, release = made["rate_limits"]
    entry = "shop/per-user/total/minute"
    for descriptor, namespace in (
        (reserve, "llm.rate_limit"),
        (settle, "llm.rate_limit.settle"),
        (release, "llm.rate_limit.release"),
    ):
        assert texts(descriptor) == [
            "policy=shop/per-user",
            f"rule={namespace} {entry} rule",
            f"key={namespace} {entry} key",
            "tokens=total",
            "unit=minute",
        ]
        assert path(descriptor["limit"]["dynamic_metadata"]["metadata_key"]) == f"{namespace} {entry} limit"
        assert descriptor["hits_addend"]["format"] == f"%DYNAMIC_METADATA({namespace}:{entry}:hits)%"
    assert [of.get("apply_on_stream_done", False) for of in (reserve, settle, release)] == [False, True, True]
    assert [of["hits_addend"].get("is_negative_hits", False) for of in (reserve, settle, release)] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(("refunds", "version"), [(False, None), (True, (1, 39))])
def test_nothing_is_given_back_by_what_would_add_it(refunds: bool, version: tuple[int, int] | None) -> None:
    """Neither a service without is_negative_hits nor an Envoy without it."""
    (made,) = filters(world(limit(), mesh=mesh(refunds=refunds)), version)
    assert not any("is_negative_hits" in of["hits_addend"] for of in made["rate_limits"])


def test_a_policy_has_the_limits_of_all_its_rules_once() -> None:
    gold = {"match": [{"exact": "gold"}], "limits": [MINUTE, {"tokens": 9, "unit": "Day", "type": "Prompt"}]}
    (made,) = filters(world(limit("shop/a", gold, {"limits": [MINUTE]}, keys=[{"header": "x"}]), mesh=mesh()))
    assert [texts(of)[-2:] for of in made["rate_limits"][::2]] == [
        ["tokens=prompt", "unit=day"],
        ["tokens=total", "unit=minute"],
    ]


def test_policies_that_ask_one_service_in_one_way_are_asked_about_in_one_call() -> None:
    objects = [
        limit("shop/a"),
        limit("shop/b"),
        limit("shop/c", failOpen=True),
        limit("shop/d", shadow=True),
        limit("shop/e", provider={"name": "upward"}),
        limit("shop/local", mode="Local", provider=None),
    ]
    made = filters(world(*objects, mesh=mesh()))
    assert [sorted({texts(of)[0] for of in each["rate_limits"]}) for each in made] == [
        ["policy=shop/a", "policy=shop/b"],
        ["policy=shop/e"],
        ["policy=shop/c"],
        ["policy=shop/d"],  # what only looks comes last: what is refused does not count there
    ]
    assert [each.get("failure_mode_deny", False) for each in made] == [True, True, False, False]


def test_a_shadow_is_enforced_for_no_request_and_says_that_it_is_one() -> None:
    (made,) = filters(world(limit(shadow=True), mesh=mesh()))
    assert made["filter_enforced"] == {"default_value": {}}
    assert "enable_x_ratelimit_headers" not in made
    assert all(texts(of)[-1] == "shadow=true" for of in made["rate_limits"])


def clusters(of: World, asking: Proxy) -> dict[str, dict[str, Any]]:
    found = {}
    for resource in Translator().translate(of, asking).resources:
        if resource.type_url == CDS:
            made = protos.Cluster.FromString(protos.Any.FromString(resource.body).value)
            as_dict = MessageToDict(made, preserving_proto_field_name=True, descriptor_pool=protos.POOL)
            found[resource.name] = as_dict
    return found


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("DISABLE", "service|18081|grpc|limits.example.com"),
        ("SIMPLE", "service|18081|grpcs|limits.example.com"),
        ("MUTUAL", "service|18081|grpcs-mutual|limits.example.com"),
    ],
)
def test_the_service_is_spoken_to_as_the_mesh_configuration_says(mode: str, name: str) -> None:
    of = world(limit(), mesh=mesh(tls={"mode": mode}))
    found = clusters(of, proxy(certificate=CERTIFICATE))[name]
    (made,) = filters(of)
    assert made["rate_limit_service"]["grpc_service"]["envoy_grpc"]["cluster_name"] == name
    if mode == "DISABLE":
        assert "transport_socket" not in found
        return
    context = found["transport_socket"]["typed_config"]
    assert context["sni"] == "limits.example.com"
    shown = context["common_tls_context"].get("tls_certificate_sds_secret_configs", [])
    assert [of["name"] for of in shown] == (["file-cert:/chain.pem~/key.pem"] if mode == "MUTUAL" else [])


def test_a_proxy_without_a_certificate_shows_none() -> None:
    found = clusters(world(limit(), mesh=mesh(tls={"mode": "MUTUAL"})), proxy())
    context = found["service|18081|grpcs-mutual|limits.example.com"]["transport_socket"]["typed_config"]
    assert "tls_certificate_sds_secret_configs" not in context["common_tls_context"]


@pytest.mark.parametrize("mode", ["SIMPLE", "MUTUAL"])
def test_a_policy_whose_service_wants_a_certificate_that_a_proxy_lacks_says_so(mode: str) -> None:
    of = world(limit(), mesh=mesh(tls={"mode": mode}))
    (policy,) = of.token_rate_limits["shop"]
    lacking = (policy.key,) if mode == "MUTUAL" else ()
    assert Translator().translate(of, proxy()).uncertified == lacking
    assert Translator().translate(of, proxy(certificate=CERTIFICATE)).uncertified == ()


def of_policy(of: World) -> dict[str, Any]:
    (found,) = conditions(of).values()
    return {condition.type: condition for condition in found}


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ({}, "are answered 503"),
        ({"failOpen": True}, "pass without a limit"),
        ({"shadow": True}, "pass without a limit"),
    ],
)
def test_a_service_that_the_mesh_configuration_lacks_is_told(spec: dict[str, Any], what: str) -> None:
    of = world(limit(provider={"name": "count"}, **spec), mesh=mesh())
    resolved = of_policy(of)["ResolvedRefs"]
    assert (resolved.status, resolved.reason) == (False, "ProviderNotFound")
    (finding,) = resolved.findings
    assert finding.message == (
        "the mesh configuration has no extensionProvider 'count' for rate limits (envoyRateLimit), did you "
        f"mean 'counts'?; requests that it limits {what}"
    )
    # Nothing listens there: so failOpen decides.
    assert "service|1|grpc|127.0.0.1" in clusters(of, proxy())


def test_the_example_is_complete_and_the_deployed_service_knows_the_domain() -> None:
    root = Path(__file__).parents[3]
    folder = root / "examples" / "token-rate-limits-shared"
    config, problems = load_mesh_config((folder / "mesh.yaml").read_text(), "mesh.yaml")
    assert config
    assert not problems
    text = (folder / "objects" / "1-llmtokenratelimit.yaml").read_text()
    of = world(text, mesh=MeshSettings(config=config))
    assert all(condition.status and not condition.findings for condition in of_policy(of).values())
    deployed = yaml.safe_load((root / "deploy" / "ratelimit" / "config" / "llmplane.yaml").read_text())
    assert deployed == {"domain": global_rate_limits.DOMAIN}


def test_what_a_service_cannot_do_is_told() -> None:
    (finding,) = of_policy(world(limit(), mesh=mesh()))["Accepted"].findings
    assert "its service gives nothing back" in finding.message
    assert not of_policy(world(limit()))["Accepted"].findings, "nothing is known of no service"
    assert not of_policy(world(limit(), mesh=mesh(refunds=True)))["Accepted"].findings
