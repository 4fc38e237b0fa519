"""AuthorizationPolicies as Envoy's filters: every rule of Istio's translation, a test each."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from crds.loader import load
from crds.meshconfig import MeshConfig
from crds.problems import ObjectKey
from crds.unreadable import UnreadablePolicy
from tests.support.objects import world
from translator import authorization
from translator.conditions import Condition, conditions
from translator.proxy import Proxy, ProxyType
from translator.world import MeshSettings, World
from xds import protos, validation

ANY: dict[str, Any] = {"any": True}
ALL_PERMISSIONS = [{"and_rules": {"rules": [ANY]}}]
ALL_PRINCIPALS = [{"and_ids": {"ids": [ANY]}}]
ANY_VALUE = {"safe_regex": {"regex": ".+"}}
EXT_AUTHZ = {"name": "ext", "envoyExtAuthzHttp": {"service": "authz.example.com", "port": 8000}}


def gateway(namespace: str = "ns", **labels: str) -> Proxy:
    return Proxy(ProxyType.ROUTER, namespace, "gateway", frozenset((labels or {"istio": "gw"}).items()))


def policy(name: str = "ns/p", *, dry_run: bool = False, created: str | None = None, **spec: Any) -> str:
    """Write a policy NAMESPACE/NAME."""
    namespace, _, own = name.partition("/")
    metadata: dict[str, Any] = {"name": own, "namespace": namespace}
    if dry_run:
        metadata["annotations"] = {"istio.io/dry-run": "true"}
    if created:
        metadata["creationTimestamp"] = created
    of = {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata}
    return json.dumps({**of, "spec": spec})


def custom(name: str = "ns/p", provider: str = "ext", **spec: Any) -> str:
    return policy(name, action="CUSTOM", provider={"name": provider}, **({"rules": [{}]} | spec))


def mesh(*providers: Any, **config: Any) -> MeshSettings:
    return MeshSettings(config=MeshConfig.model_validate({"extensionProviders": list(providers), **config}))


def filters(of: World, proxy: Proxy | None = None) -> list[dict[str, Any]]:
    """Return the configurations of all filters in their order."""
    proxy = proxy or gateway()
    made = [*authorization.custom_filters(of, proxy), *authorization.rbac_filters(of, proxy)]
    return [protos.to_dict(protos.HttpFilter(**one))["typed_config"] for one in made]


def enforced(*documents: str, proxy: Proxy | None = None) -> list[dict[str, Any]]:
    """Return the rules that the filters enforce."""
    return [one["rules"] for one in filters(world(*documents), proxy)]


def only_policy(rule: Any, *, action: str = "ALLOW", mesh: MeshSettings | None = None) -> dict[str, Any]:
    """Return what one rule becomes."""
    (rbac,) = filters(world(policy(action=action, rules=[rule]), mesh=mesh))
    (made,) = rbac["rules"]["policies"].values()
    assert isinstance(made, dict)
    return made


def permission(operation: Any, action: str = "ALLOW") -> list[Any]:
    """Return the parts of the permission of one operation."""
    made = only_policy({"to": [{"operation": operation}]}, action=action)
    assert made["principals"] == ALL_PRINCIPALS
    (one,) = made["permissions"]
    return list(one["and_rules"]["rules"])


def principal(source: Any, mesh: MeshSettings | None = None) -> list[Any]:
    """Return the parts of the principal of one source."""
    made = only_policy({"from": [{"source": source}]}, mesh=mesh)
    assert made["permissions"] == ALL_PERMISSIONS
    (one,) = made["principals"]
    return list(one["and_ids"]["ids"])


def one_of(key: str, values: list[str], **source: Any) -> Any:
    """Return what one list of a source becomes."""
    (made,) = principal({key: values, **source})
    return made


# Which policies a workload has


def test_a_sidecar_has_none() -> None:
    """They are about requests that come in, and a sidecar here takes only those that go out."""
    sidecar = Proxy(ProxyType.SIDECAR, "ns", "sleep", frozenset({("istio", "gw")}))
    of = world(policy(rules=[{}], action="DENY"), custom("ns/c"), mesh=mesh(EXT_AUTHZ))
    assert filters(of, sidecar) == []
    assert list(authorization.services(of, sidecar)) == []
    assert list(authorization.objects(of, sidecar)) == []


@pytest.mark.parametrize(
    ("name", "spec", "applies"),
    [
        ("ns/p", {}, True),
        ("ns/p", {"selector": {"matchLabels": {"istio": "gw"}}}, True),
        ("ns/p", {"selector": {"matchLabels": {"istio": "other"}}}, False),
        ("ns/p", {"selector": {"matchLabels": {"istio": "gw", "version": "v2"}}}, False),
        ("ns/p", {"selector": {"matchLabels": {}}}, True),
        ("other/p", {}, False),
        ("istio-system/p", {}, True),
        ("istio-system/p", {"selector": {"matchLabels": {"istio": "gw"}}}, True),
        ("istio-system/p", {"selector": {"matchLabels": {"istio": "other"}}}, False),
        (
            "ns/p",
            {"targetRefs": [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "g"}]},
            False,
        ),
    ],
)
def test_namespace_and_selector(name: str, spec: dict[str, Any], applies: bool) -> None:
    of = world(policy(name, **spec))
    assert bool(filters(of)) is applies
    assert [key.name for key in authorization.objects(of, gateway())] == (["p"] if applies else [])


def test_policies_of_the_root_namespace_and_of_the_workloads_come_together() -> None:
    (rules,) = enforced(policy("istio-system/root", rules=[{}]), policy("ns/own", rules=[{}, {}]))
    assert set(rules["policies"]) == {
        "ns[istio-system]-policy[root]-rule[0]",
        "ns[ns]-policy[own]-rule[0]",
        "ns[ns]-policy[own]-rule[1]",
    }


# Actions


def test_the_order_of_the_actions() -> None:
    """CUSTOM comes first (the filters of tokens and keys are behind it), then AUDIT, DENY, ALLOW."""
    of = world(
        policy("ns/allow", rules=[{}]),
        policy("ns/deny", action="DENY", rules=[{}]),
        policy("ns/audit", action="AUDIT", rules=[{}]),
        custom("ns/custom"),
        mesh=mesh(EXT_AUTHZ),
    )
    shadow, ext_authz, *others = filters(of)
    assert set(shadow) == {"@type", "shadow_rules", "shadow_rules_stat_prefix"}
    assert ext_authz["@type"].endswith("ext_authz.v3.ExtAuthz")
    assert [one["rules"].get("action", "ALLOW") for one in others] == ["LOG", "DENY", "ALLOW"]


def test_no_policy_no_filter() -> None:
    assert filters(world()) == []


def test_an_allow_policy_without_rules_denies_all() -> None:
    """A filter with ALLOW denies what no policy matches."""
    assert enforced(policy()) == [
        {
            "policies": {
                "ns[ns]-policy[p]-rule[0]": {
                    "permissions": [{"not_rule": ANY}],
                    "principals": [{"not_id": ANY}],
                }
            }
        }
    ]


@pytest.mark.parametrize("action", ["ALLOW", "DENY", "AUDIT"])
def test_an_empty_rule_matches_all(action: str) -> None:
    made = only_policy({}, action=action)
    assert made == {"permissions": ALL_PERMISSIONS, "principals": ALL_PRINCIPALS}


# Operations


def test_operations_are_alternatives_and_so_are_sources() -> None:
    made = only_policy(
        {
            "from": [{"source": {"namespaces": ["a"]}}, {"source": {"namespaces": ["b"]}}],
            "to": [{"operation": {"ports": ["1"]}}, {"operation": {"ports": ["2"]}}],
        }
    )
    assert len(made["principals"]) == 2
    assert made["permissions"] == [
        {"and_rules": {"rules": [{"or_rules": {"rules": [{"destination_port": port}]}}]}} for port in (1, 2)
    ]


def test_the_lists_of_an_operation_all_count_in_istios_order() -> None:
    parts = permission({"ports": ["80"], "paths": ["/"], "methods": ["GET"], "hosts": ["a"]})
    assert [next(iter(part["or_rules"]["rules"][0])) for part in parts] == [
        "header",
        "header",
        "url_path",
        "destination_port",
    ]


def test_values_are_alternatives() -> None:
    assert permission({"ports": ["80", "443"]}) == [
        {"or_rules": {"rules": [{"destination_port": 80}, {"destination_port": 443}]}}
    ]


def test_not_values_are_none_of_them() -> None:
    assert permission({"notPorts": ["80", "443"]}) == [
        {"not_rule": {"or_rules": {"rules": [{"destination_port": 80}, {"destination_port": 443}]}}}
    ]


@pytest.mark.parametrize(
    ("host", "match"),
    [
        ("test.com", {"string_match": {"exact": "test.com", "ignore_case": True}}),
        ("*.test.com", {"string_match": {"suffix": ".test.com", "ignore_case": True}}),
        ("test.*", {"string_match": {"prefix": "test.", "ignore_case": True}}),
        ("*", {"present_match": True}),
    ],
)
def test_hosts_have_no_case(host: str, match: Any) -> None:
    expected = [{"or_rules": {"rules": [{"header": {"name": ":authority", **match}}]}}]
    assert permission({"hosts": [host]}) == expected


@pytest.mark.parametrize(
    ("action", "member", "expected"),
    [
        ("DENY", "hosts", "test.com"),
        ("AUDIT", "hosts", "test.com"),
        ("ALLOW", "hosts", "test.com:80"),
        ("DENY", "notHosts", "test.com:80"),
        ("ALLOW", "notHosts", "test.com"),
    ],
)
def test_a_port_in_a_host_never_opens_anything(action: str, member: str, expected: str) -> None:
    """Requests come to the filter without it, so a value with a port matches no request, or all ports."""
    (part,) = permission({member: ["test.com:80"]}, action)
    (rule,) = part.get("not_rule", part)["or_rules"]["rules"]
    assert rule["header"]["string_match"]["exact"] == expected


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("GET", {"string_match": {"exact": "GET"}}),
        ("GE*", {"string_match": {"prefix": "GE"}}),
        ("*ET", {"string_match": {"suffix": "ET"}}),
        ("*", {"present_match": True}),
    ],
)
def test_methods(method: str, match: Any) -> None:
    expected = [{"or_rules": {"rules": [{"header": {"name": ":method", **match}}]}}]
    assert permission({"methods": [method]}) == expected


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("/info", {"exact": "/info"}),
        ("/info/*", {"prefix": "/info/"}),
        ("*/info", {"suffix": "/info"}),
        ("*", ANY_VALUE),
    ],
)
def test_paths_are_compared_without_their_query(path: str, match: Any) -> None:
    assert permission({"paths": [path]}) == [{"or_rules": {"rules": [{"url_path": {"path": match}}]}}]


@pytest.mark.parametrize(
    ("path", "template"),
    [("/a/{*}/b", "/a/*/b"), ("/a/{**}", "/a/**"), ("/{**}/b/", "/**/b/")],
)
def test_path_templates(path: str, template: str) -> None:
    (part,) = permission({"notPaths": [path]})
    (rule,) = part["not_rule"]["or_rules"]["rules"]
    assert rule["uri_template"]["name"] == "uri-template"
    assert rule["uri_template"]["typed_config"]["path_template"] == template


# Sources


def test_the_lists_of_a_source_all_count_in_istios_order() -> None:
    parts = principal(
        {
            "ipBlocks": ["1.1.1.1"],
            "remoteIpBlocks": ["1.1.1.1"],
            "namespaces": ["a"],
            "trustDomains": ["a"],
            "requestPrincipals": ["a/b"],
            "principals": ["a"],
        }
    )
    assert [next(iter(part.get("or_ids", {"ids": [part]})["ids"][0])) for part in parts] == [
        "authenticated",
        "and_ids",
        "authenticated",
        "authenticated",
        "remote_ip",
        "direct_remote_ip",
    ]
    assert "/ns/a/" in str(parts[3])


@pytest.mark.parametrize(
    ("member", "matcher"), [("ipBlocks", "direct_remote_ip"), ("remoteIpBlocks", "remote_ip")]
)
@pytest.mark.parametrize(
    ("value", "address", "length"),
    [("10.1.2.3", "10.1.2.3", 32), ("10.0.0.0/8", "10.0.0.0", 8), ("::1", "::1", 128)],
)
def test_addresses(member: str, matcher: str, value: str, address: str, length: int) -> None:
    """The ipBlocks are about the TCP peer, remoteIpBlocks about X-Forwarded-For, as far as it is trusted."""
    expected = {matcher: {"address_prefix": address, "prefix_len": length}}
    assert one_of(member, [value]) == {"or_ids": {"ids": [expected]}}


def test_none_of_the_addresses() -> None:
    blocks = [{"direct_remote_ip": {"address_prefix": f"10.0.0.{n}", "prefix_len": 32}} for n in (1, 2)]
    assert one_of("notIpBlocks", ["10.0.0.1", "10.0.0.2"]) == {"not_id": {"or_ids": {"ids": blocks}}}


def name_of_peer(member: str, value: str, **config: Any) -> list[Any]:
    (part,) = principal({member: [value]}, mesh(**config))
    return [one["authenticated"]["principal_name"] for one in part["or_ids"]["ids"]]


@pytest.mark.parametrize(
    ("member", "value", "name"),
    [
        ("principals", "cluster.local/ns/a/sa/b", {"exact": "spiffe://cluster.local/ns/a/sa/b"}),
        ("principals", "cluster.local/*", {"prefix": "spiffe://cluster.local/"}),
        ("principals", "*/sa/b.c", {"safe_regex": {"regex": r"spiffe://.*/sa/b\.c"}}),
        ("principals", "*", ANY_VALUE),
        ("namespaces", "a.b", {"safe_regex": {"regex": r".*/ns/a\.b/.*"}}),
        ("namespaces", "a-*", {"safe_regex": {"regex": ".*/ns/a-.*/.*"}}),
        ("serviceAccounts", "b", {"safe_regex": {"regex": "spiffe://.+/ns/ns/(.+/|)sa/b(/.+)?"}}),
        ("serviceAccounts", "a/b", {"safe_regex": {"regex": "spiffe://.+/ns/a/(.+/|)sa/b(/.+)?"}}),
        ("trustDomains", "td", {"prefix": "spiffe://td/"}),
        ("trustDomains", "*", {"prefix": "spiffe://"}),
        ("trustDomains", "*.td", {"safe_regex": {"regex": r"spiffe://[^/]*\.td/.*"}}),
        ("trustDomains", "td-*", {"safe_regex": {"regex": "spiffe://td-[^/]*/.*"}}),
    ],
)
def test_names_of_the_peers_certificate(member: str, value: str, name: Any) -> None:
    assert name_of_peer(member, value) == [name]


@pytest.mark.parametrize(
    ("principal", "expected"),
    [
        ("new/ns/a/sa/b", ["new/ns/a/sa/b", "old/ns/a/sa/b"]),
        ("old/ns/a/sa/b", ["new/ns/a/sa/b", "old/ns/a/sa/b"]),
        ("cluster.local/ns/a/sa/b", ["new/ns/a/sa/b", "old/ns/a/sa/b"]),
        ("other/ns/a/sa/b", ["other/ns/a/sa/b"]),
        ("cluster.local/ns/a", ["cluster.local/ns/a"]),
        ("old*/ns/a/sa/b", ["new/ns/a/sa/b", "old/ns/a/sa/b"]),
    ],
)
def test_aliases_of_the_trust_domain_are_the_same_identity(principal: str, expected: list[str]) -> None:
    names = name_of_peer("principals", principal, trustDomain="new", trustDomainAliases=["old"])
    assert names == [{"exact": f"spiffe://{name}"} for name in expected]


def test_a_wildcard_that_matches_the_aliases_stays() -> None:
    config = {"trustDomain": "new-td", "trustDomainAliases": ["old-td", "other"]}
    assert name_of_peer("principals", "*-td/ns/a/sa/b", **config) == [
        {"safe_regex": {"regex": "spiffe://.*-td/ns/a/sa/b"}},
        {"exact": "spiffe://other/ns/a/sa/b"},
    ]
    assert name_of_peer("principals", "*/ns/a/sa/b", **config) == [
        {"safe_regex": {"regex": "spiffe://.*/ns/a/sa/b"}}
    ]


def test_aliases_of_trust_domains() -> None:
    names = name_of_peer("trustDomains", "old", trustDomain="new", trustDomainAliases=["old"])
    assert names == [{"prefix": "spiffe://new/"}, {"prefix": "spiffe://old/"}]


def claim(name: str, match: Any) -> Any:
    path = [{"key": "payload"}, {"key": name}]
    return {
        "metadata": {
            "filter": "envoy.filters.http.jwt_authn",
            "path": path,
            "value": {"string_match": match},
        }
    }


@pytest.mark.parametrize(
    ("value", "issuer", "subject"),
    [
        ("iss/sub", {"exact": "iss"}, {"exact": "sub"}),
        ("https://accounts.example.com/me", {"exact": "https://accounts.example.com"}, {"exact": "me"}),
        ("*", ANY_VALUE, ANY_VALUE),
        ("iss/*", {"exact": "iss"}, ANY_VALUE),
        ("iss/sub-*", {"exact": "iss"}, {"prefix": "sub-"}),
        ("*/sub", ANY_VALUE, {"exact": "sub"}),
        ("*.com/sub", {"suffix": ".com"}, {"exact": "sub"}),
        ("*-sub", ANY_VALUE, {"suffix": "-sub"}),
        ("iss-*", {"prefix": "iss-"}, ANY_VALUE),
        ("iss", {"exact": "iss"}, {"exact": ""}),
    ],
)
def test_issuer_and_subject_of_a_token(value: str, issuer: Any, subject: Any) -> None:
    expected = {"and_ids": {"ids": [claim("iss", issuer), claim("sub", subject)]}}
    assert one_of("requestPrincipals", [value]) == expected


def test_several_subjects_of_tokens() -> None:
    made = one_of("notRequestPrincipals", ["a/b", "c/d"])
    assert made == {
        "not_id": {
            "or_ids": {
                "ids": [
                    {"and_ids": {"ids": [claim("iss", {"exact": iss}), claim("sub", {"exact": sub})]}}
                    for iss, sub in (("a", "b"), ("c", "d"))
                ]
            }
        }
    }


# Conditions


def condition(key: str, *values: str, **rest: Any) -> tuple[Any, Any]:
    """Return what a condition adds to the permission and to the principal."""
    made = only_policy({"when": [{"key": key, "values": list(values), **rest}]})
    (one_permission,), (one_principal,) = made["permissions"], made["principals"]
    return one_permission["and_rules"]["rules"], one_principal["and_ids"]["ids"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("destination.ip", "10.0.0.0/8", {"destination_ip": {"address_prefix": "10.0.0.0", "prefix_len": 8}}),
        ("destination.port", "8080", {"destination_port": 8080}),
        ("connection.sni", "*.test.com", {"requested_server_name": {"suffix": ".test.com"}}),
    ],
)
def test_conditions_on_the_destination(key: str, value: str, expected: Any) -> None:
    assert condition(key, value) == ([{"or_rules": {"rules": [expected]}}], [ANY])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("source.ip", "10.0.0.1", {"direct_remote_ip": {"address_prefix": "10.0.0.1", "prefix_len": 32}}),
        ("remote.ip", "10.0.0.1", {"remote_ip": {"address_prefix": "10.0.0.1", "prefix_len": 32}}),
        (
            "request.headers[X-Tier]",
            "gold",
            {"header": {"name": "X-Tier", "string_match": {"exact": "gold"}}},
        ),
        ("request.headers[x-tier]", "*", {"header": {"name": "x-tier", "present_match": True}}),
        (
            "source.namespace",
            "a",
            {"authenticated": {"principal_name": {"safe_regex": {"regex": ".*/ns/a/.*"}}}},
        ),
        ("source.principal", "td/*", {"authenticated": {"principal_name": {"prefix": "spiffe://td/"}}}),
        ("source.trustDomain", "td", {"authenticated": {"principal_name": {"prefix": "spiffe://td/"}}}),
        (
            "source.serviceAccount",
            "b",
            {
                "authenticated": {
                    "principal_name": {"safe_regex": {"regex": "spiffe://.+/ns/ns/(.+/|)sa/b(/.+)?"}}
                }
            },
        ),
    ],
)
def test_conditions_on_the_source(key: str, value: str, expected: Any) -> None:
    assert condition(key, value) == ([ANY], [{"or_ids": {"ids": [expected]}}])
    assert condition(key, notValues=[value]) == ([ANY], [{"not_id": {"or_ids": {"ids": [expected]}}}])


def test_the_condition_request_auth_principal() -> None:
    expected = {"and_ids": {"ids": [claim("iss", {"exact": "a"}), claim("sub", {"exact": "b"})]}}
    assert condition("request.auth.principal", "a/b") == ([ANY], [expected])


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("request.auth.audiences", ["payload", "aud"]),
        ("request.auth.presenter", ["payload", "azp"]),
        ("request.auth.claims[groups]", ["payload", "groups"]),
        ("request.auth.claims[realm][roles]", ["payload", "realm", "roles"]),
    ],
)
def test_a_claim_is_a_string_or_a_list(key: str, path: list[str]) -> None:
    value = {"string_match": {"exact": "a"}}
    expected = {
        "filter": "envoy.filters.http.jwt_authn",
        "path": [{"key": part} for part in path],
        "value": {"or_match": {"value_matchers": [{"list_match": {"one_of": value}}, value]}},
    }
    assert condition(key, "a") == ([ANY], [{"metadata": expected}])
    assert condition(key, notValues=["a"]) == ([ANY], [{"not_id": {"metadata": expected}}])


def test_one_of_several_values_of_a_claim() -> None:
    (made,) = condition("request.auth.claims[groups]", "a", "b-*")[1]
    values = [{"string_match": {"exact": "a"}}, {"string_match": {"prefix": "b-"}}]
    alternative = {"or_match": {"value_matchers": values}}
    expected = {"or_match": {"value_matchers": [{"list_match": {"one_of": alternative}}, alternative]}}
    assert made["metadata"]["value"] == expected


def test_metadata_of_other_filters() -> None:
    (made,) = condition("experimental.envoy.filters.a.b[c]", "plain", "[in-list]")[0]
    assert made == {
        "metadata": {
            "filter": "envoy.filters.a.b",
            "path": [{"key": "c"}],
            "value": {
                "or_match": {
                    "value_matchers": [
                        {"string_match": {"exact": "plain"}},
                        {"list_match": {"one_of": {"string_match": {"exact": "in-list"}}}},
                    ]
                }
            },
        }
    }


def test_conditions_come_behind_and_all_of_them_count() -> None:
    made = only_policy(
        {
            "from": [{"source": {"ipBlocks": ["1.1.1.1"]}}, {"source": {"ipBlocks": ["2.2.2.2"]}}],
            "to": [{"operation": {"methods": ["GET"]}}],
            "when": [
                {"key": "request.headers[a]", "values": ["b"]},
                {"key": "destination.port", "values": ["80"]},
                {"key": "remote.ip", "values": ["3.3.3.3"]},
            ],
        }
    )
    for one in made["principals"]:
        parts = [next(iter(part["or_ids"]["ids"][0])) for part in one["and_ids"]["ids"]]
        assert parts == ["direct_remote_ip", "header", "remote_ip"]
    (only,) = made["permissions"]
    parts = [next(iter(part["or_rules"]["rules"][0])) for part in only["and_rules"]["rules"]]
    assert parts == ["header", "destination_port"]


# Dry run


@pytest.mark.parametrize("action", ["ALLOW", "DENY"])
def test_a_policy_that_is_only_tried_enforces_nothing(action: str) -> None:
    (rbac,) = filters(world(policy(dry_run=True, action=action, rules=[{}])))
    assert "rules" not in rbac
    assert rbac["shadow_rules_stat_prefix"] == f"istio_dry_run_{action.lower()}_"
    assert set(rbac["shadow_rules"]["policies"]) == {"ns[ns]-policy[p]-rule[0]"}
    assert rbac["shadow_rules"].get("action", "ALLOW") == action


def test_tried_and_enforced_policies_share_a_filter() -> None:
    (rbac,) = filters(world(policy("ns/tried", dry_run=True, rules=[{}]), policy("ns/real", rules=[{}])))
    assert set(rbac["rules"]["policies"]) == {"ns[ns]-policy[real]-rule[0]"}
    assert set(rbac["shadow_rules"]["policies"]) == {"ns[ns]-policy[tried]-rule[0]"}


# CUSTOM


def test_custom_notes_what_matched_and_asks_about_that_only() -> None:
    of = world(custom(rules=[{"to": [{"operation": {"paths": ["/admin/*"]}}]}]), mesh=mesh(EXT_AUTHZ))
    shadow, ext_authz = filters(of)
    assert shadow["shadow_rules_stat_prefix"] == "istio_ext_authz_"
    assert shadow["shadow_rules"]["action"] == "DENY"
    assert set(shadow["shadow_rules"]["policies"]) == {"istio-ext-authz-ext-ns[ns]-policy[p]-rule[0]"}
    assert ext_authz["filter_enabled_metadata"] == {
        "filter": "envoy.filters.http.rbac",
        "path": [{"key": "istio_ext_authz_shadow_effective_policy_id"}],
        "value": {"string_match": {"prefix": "istio-ext-authz-ext"}},
    }


def ext_authz(kind: str, **fields: Any) -> dict[str, Any]:
    """Return the ext_authz filter of a provider."""
    service = {"name": "ext", kind: {"service": "foo/authz.foo.svc.cluster.local", "port": 9000, **fields}}
    return filters(world(custom(), mesh=mesh(service)))[1]


def test_an_http_service_with_defaults() -> None:
    made = ext_authz("envoyExtAuthzHttp")
    assert made["http_service"] == {
        "server_uri": {
            "uri": "http://authz.foo.svc.cluster.local:9000",
            "cluster": "service|9000|http|authz.foo.svc.cluster.local",
            "timeout": "600s",
        }
    }
    assert set(made) == {"@type", "http_service", "filter_enabled_metadata", "transport_api_version"}


def test_an_http_service_with_all_fields() -> None:
    made = ext_authz(
        "envoyExtAuthzHttp",
        timeout="2s",
        pathPrefix="/check",
        failOpen=True,
        clearRouteCache=True,
        statusOnError="503",
        includeRequestHeadersInCheck=["X-Tier", "x-team-*", "*-id"],
        includeHeadersInCheck=["not-used"],
        includeAdditionalHeadersInCheck={"x-b": "2", "x-a": "1"},
        includeRequestBodyInCheck={"maxRequestBytes": 4096, "allowPartialMessage": True},
        headersToUpstreamOnAllow=["x-user"],
        headersToDownstreamOnDeny=["x-reason"],
        headersToDownstreamOnAllow=["x-quota"],
    )

    def headers(*matches: Any) -> dict[str, Any]:
        return {"patterns": [{**match, "ignore_case": True} for match in matches]}

    del made["@type"], made["filter_enabled_metadata"]
    assert made == {
        "transport_api_version": "V3",
        "failure_mode_allow": True,
        "clear_route_cache": True,
        "status_on_error": {"code": "ServiceUnavailable"},
        "with_request_body": {"max_request_bytes": 4096, "allow_partial_message": True},
        "allowed_headers": headers({"exact": "X-Tier"}, {"prefix": "x-team-"}, {"suffix": "-id"}),
        "http_service": {
            "server_uri": {
                "uri": "http://authz.foo.svc.cluster.local:9000",
                "cluster": "service|9000|http|authz.foo.svc.cluster.local",
                "timeout": "2s",
            },
            "path_prefix": "/check",
            "authorization_request": {
                "headers_to_add": [{"key": "x-a", "value": "1"}, {"key": "x-b", "value": "2"}]
            },
            "authorization_response": {
                "allowed_upstream_headers": headers({"exact": "x-user"}),
                "allowed_client_headers": headers({"exact": "x-reason"}),
                "allowed_client_headers_on_success": headers({"exact": "x-quota"}),
            },
        },
    }


def test_the_former_name_of_the_headers() -> None:
    made = ext_authz("envoyExtAuthzHttp", includeHeadersInCheck=["x-tier"])
    assert made["allowed_headers"] == {"patterns": [{"exact": "x-tier", "ignore_case": True}]}


def test_a_grpc_service() -> None:
    made = ext_authz(
        "envoyExtAuthzGrpc",
        timeout="1s",
        includeRequestBodyInCheck={"maxRequestBytes": 10, "packAsBytes": True},
    )
    assert made["grpc_service"] == {
        "envoy_grpc": {
            "cluster_name": "service|9000|grpc|authz.foo.svc.cluster.local",
            "authority": "authz.foo.svc.cluster.local",
        },
        "timeout": "1s",
    }
    assert made["with_request_body"] == {"max_request_bytes": 10, "pack_as_bytes": True}
    assert "allowed_headers" not in made, "it gets them all"


def test_the_service_gets_a_cluster() -> None:
    grpc = {"name": "ext", "envoyExtAuthzGrpc": {"service": "authz.example.com", "port": 9000}}
    (service,) = authorization.services(world(custom(), mesh=mesh(grpc)), gateway())
    assert (service.host, service.port, service.http2, service.tls) == (
        "authz.example.com",
        9000,
        True,
        False,
    )


@pytest.mark.parametrize("provider", ["other", "Bad-Name", "metrics"])
def test_a_service_that_is_not_known_denies_what_it_would_be_asked_about(provider: str) -> None:
    of = world(
        custom(provider=provider, rules=[{"to": [{"operation": {"methods": ["POST"]}}]}]),
        mesh=mesh(EXT_AUTHZ, {**EXT_AUTHZ, "name": "Bad-Name"}, {"name": "metrics", "prometheus": {}}),
    )
    (rbac,) = filters(of)
    assert rbac["rules"]["action"] == "DENY"
    ((name, made),) = rbac["rules"]["policies"].items()
    assert name == f"istio-ext-authz-{provider}-ns[ns]-policy[p]-rule[0]-deny-due-to-bad-CUSTOM-action"
    assert ":method" in str(made["permissions"])
    assert list(authorization.services(of, gateway())) == []


def test_two_services_for_one_workload_deny() -> None:
    """Istio without PILOT_ENABLE_MULTIPLE_CUSTOM_AUTHZ_PROVIDERS."""
    second = {**EXT_AUTHZ, "name": "second"}
    of = world(custom("ns/a"), custom("ns/b", "second"), mesh=mesh(EXT_AUTHZ, second))
    assert [set(one["rules"]["policies"]) for one in filters(of)] == [
        {"istio-ext-authz-ext-ns[ns]-policy[a]-rule[0]-deny-due-to-bad-CUSTOM-action"},
        {"istio-ext-authz-second-ns[ns]-policy[b]-rule[0]-deny-due-to-bad-CUSTOM-action"},
    ]
    assert list(authorization.services(of, gateway())) == []


def test_the_example() -> None:
    folder = Path(__file__).parents[3] / "examples" / "authorization-custom"
    config = yaml.safe_load((folder / "mesh.yaml").read_text(encoding="utf-8"))
    (file,) = folder.glob("objects/*.yaml")
    of = world(file.read_text(encoding="utf-8"), mesh=mesh(*config["extensionProviders"]))
    shadow, made = filters(of, gateway("istio-system", istio="ingressgateway"))
    assert set(shadow["shadow_rules"]["policies"]) == {
        "istio-ext-authz-my-ext-authz-ns[istio-system]-policy[ask-the-authorization-service]-rule[0]"
    }
    assert made["http_service"]["server_uri"]["uri"] == "http://ext-authz.foo.svc.cluster.local:8000"


# What is broken denies


def broken(name: str, labels: dict[str, str] | None, proxy: Proxy) -> list[dict[str, Any]]:
    namespace, _, own = name.partition("/")
    key = ObjectKey("AuthorizationPolicy", namespace, own)
    return filters(World.of([], unreadable=[UnreadablePolicy(key, labels)]), proxy)


@pytest.mark.parametrize(
    ("name", "labels", "denies"),
    [
        ("ns/p", {"istio": "gw"}, True),
        ("ns/p", {"istio": "other"}, False),
        ("ns/p", None, True),
        ("other/p", None, False),
        ("istio-system/p", None, True),
        ("istio-system/p", {"istio": "other"}, False),
    ],
)
def test_a_policy_that_cannot_be_read_denies_all(
    name: str, labels: dict[str, str] | None, denies: bool
) -> None:
    made = broken(name, labels, gateway())
    assert bool(made) is denies
    for one in made:
        namespace = name.partition("/")[0]
        assert one["rules"] == {
            "action": "DENY",
            "policies": {f"ns[{namespace}]-policy[p]-invalid": {"permissions": [ANY], "principals": [ANY]}},
        }


# What a policy may say, an Envoy takes: one value that breaks Envoy's rules would hold all policies back.

ODD = [
    "*",
    "**",
    "/",
    "a",
    "b.c",
    "{*}",
    "{**}",
    "{",
    "[",
    "]",
    "(",
    "\\",
    "+",
    "$",
    "%2f",
    "中",
    "\0",
    "\n",
    ":80",
]
VALUES = st.lists(st.lists(st.sampled_from(ODD), min_size=1, max_size=5).map("".join), min_size=1, max_size=2)
SOURCE = st.fixed_dictionaries(
    {"notNamespaces": VALUES}, optional={"principals": VALUES, "requestPrincipals": VALUES}
)
OPERATION = st.fixed_dictionaries({"notHosts": VALUES}, optional={"paths": VALUES, "methods": VALUES})
NAME = st.sampled_from(ODD)
CONDITION = st.fixed_dictionaries(
    {
        "key": st.one_of(
            st.builds("request.headers[{}{}]".format, NAME, NAME),
            st.builds("request.auth.claims[{}][{}]".format, NAME, NAME),
            st.builds("experimental.envoy.filters.{}[{}]".format, NAME, NAME),
            st.sampled_from(["source.principal", "source.trustDomain", "connection.sni"]),
        ),
        "values": VALUES,
    }
)


@given(source=SOURCE, operation=OPERATION, condition=CONDITION)
def test_nothing_that_is_taken_breaks_the_rules_of_envoy(source: Any, operation: Any, condition: Any) -> None:
    rules = [{"from": [{"source": source}]}, {"to": [{"operation": operation}]}, {"when": [condition]}]
    taken = [text for rule in rules if load(text := policy(rules=[rule]), "f.yaml", {}).objects]
    for text in taken:
        for made in authorization.rbac_filters(world(text), gateway()):
            assert validation.violations(protos.HttpFilter(**made)) == []


# What is said of them


def said(of: World, name: str = "p") -> tuple[Condition, Condition]:
    accepted, resolved = conditions(of)[ObjectKey("AuthorizationPolicy", "ns", name)]
    return accepted, resolved


def test_a_policy_without_a_flaw() -> None:
    accepted, resolved = said(world(custom(), mesh=mesh(EXT_AUTHZ)))
    assert (accepted.status, accepted.message) == (True, "")
    assert (resolved.status, resolved.message) == (True, "")


def test_a_missing_service_is_told() -> None:
    _, resolved = said(world(custom(provider="exd"), mesh=mesh(EXT_AUTHZ)))
    assert (resolved.status, resolved.reason) == (False, "ProviderNotFound")
    assert resolved.message == (
        "spec.provider.name: the mesh configuration has no extensionProvider 'exd' for authorization,"
        " did you mean 'ext'?; requests that its rules match are denied"
    )


def test_a_name_that_istio_does_not_take_is_told() -> None:
    _, resolved = said(world(custom(provider="My_Ext"), mesh=mesh({**EXT_AUTHZ, "name": "My_Ext"})))
    assert "only lowercase letters, digits, and hyphens allowed" in resolved.message


@pytest.mark.parametrize(
    ("other", "labels", "conflict"),
    [
        ("ns/b", {}, True),
        ("istio-system/b", {}, True),
        ("other/b", {}, False),
        ("ns/b", {"istio": "gw"}, True),
        ("ns/b", {"istio": "other"}, False),
        ("ns/b", {"app": "a"}, True),
    ],
)
def test_two_services_for_one_workload_are_told(other: str, labels: dict[str, str], conflict: bool) -> None:
    of = world(
        custom(selector={"matchLabels": {"istio": "gw"}}),
        custom(other, "second", selector={"matchLabels": labels}),
        mesh=mesh(EXT_AUTHZ, {**EXT_AUTHZ, "name": "second"}),
    )
    accepted, _ = said(of)
    assert accepted.status is not conflict
    assert (f"AuthorizationPolicy {other} asks another provider" in accepted.message) is conflict


@pytest.mark.parametrize(
    ("spec", "note"),
    [
        (
            {"rules": [{"from": [{"source": {"ipBlocks": ["1.1.1.1"]}}]}]},
            "spec.rules[0].from[0].source.ipBlocks: compares the address of the TCP peer; behind",
        ),
        (
            {"rules": [{"from": [{"source": {"notIpBlocks": ["1.1.1.1"]}}]}]},
            "spec.rules[0].from[0].source.notIpBlocks: compares the address of the TCP peer",
        ),
        ({"selector": {"matchLabels": {"app": "sleep"}}}, "spec.selector: no Gateway selects such workloads"),
        (
            {"targetRefs": [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "g"}]},
            "spec.targetRefs: has effect on gateways of the Gateway API only",
        ),
    ],
)
def test_what_may_not_be_meant_is_told(spec: dict[str, Any], note: str) -> None:
    accepted, _ = said(world(policy(**spec)))
    assert accepted.status
    assert accepted.message.startswith(note)


def test_a_policy_for_the_workloads_of_a_gateway_needs_no_note() -> None:
    server = {"hosts": ["*"], "port": {"name": "http", "number": 80, "protocol": "HTTP"}}
    of = {"selector": {"istio": "gw"}, "servers": [server]}
    api = {"apiVersion": "networking.istio.io/v1", "kind": "Gateway", "metadata": {"name": "g"}, "spec": of}
    accepted, _ = said(world(policy(selector={"matchLabels": {"istio": "gw"}}), json.dumps(api)))
    assert accepted.message == ""
