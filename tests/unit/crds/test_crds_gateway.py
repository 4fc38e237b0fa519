"""What a Gateway may say, with Istio's rules and words (its TestValidateGateway and its neighbours)."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from crds.gateway import Gateway
from crds.loader import load

Problems = Callable[[str], list[str]]

FILES = {"serverCertificate": "/tls/cert.pem", "privateKey": "/tls/key.pem"}
CA = {"caCertificates": "/tls/ca.pem"}


def gateway(*servers: dict[str, Any], name: str = "gw", **spec: Any) -> str:
    return json.dumps(
        {
            "apiVersion": "networking.istio.io/v1",
            "kind": "Gateway",
            "metadata": {"name": name, "namespace": "istio-system"},
            "spec": {"selector": {"istio": "ingressgateway"}, "servers": list(servers), **spec},
        }
    )


def server(*hosts: str, protocol: str = "HTTP", number: int = 80, **more: Any) -> dict[str, Any]:
    port = {"name": "port", "number": number, "protocol": protocol}
    return {"hosts": list(hosts or ("foo.bar.com",)), "port": port, **more}


def https(**tls: Any) -> dict[str, Any]:
    return server(protocol="HTTPS", number=443, tls=tls)


def model(text: str) -> Gateway:
    loaded = load(text, "f.yaml", {})
    assert not loaded.problems, loaded.problems
    (found,) = loaded.objects
    assert isinstance(found.object, Gateway)
    return found.object


@pytest.mark.parametrize(
    "servers",
    [
        [server("foo.bar.com")],
        [server("1.1.1.1")],
        [server("ns1/foo.bar.com", "*/foo.bar.com", "./foo.bar.com", "*", "./*", "*.bar.com")],
        [server(protocol="grpc-web"), server(port={"name": "b", "number": 81, "protocol": "Http2"})],
        [server(bind="127.0.0.1")],
        [server(bind="unix://@foobar", number=0)],
        [server(tls={"httpsRedirect": True})],
        [server(protocol="TCP")],
        [https(mode="SIMPLE", **FILES)],
        [https(mode="SIMPLE", **FILES, **CA)],
        [https(mode="SIMPLE", credentialName="sds-name")],
        [https(mode="SIMPLE", credentialName="sds-name", privateKey="/tls/key.pem")],
        [https(mode="SIMPLE", credentialNames=["rsa", "ecdsa"])],
        [https(mode="SIMPLE", tlsCertificates=[FILES, FILES])],
        [https(mode="MUTUAL", **FILES, **CA)],
        [https(mode="MUTUAL", credentialName="sds-name", **CA)],
        [https(mode="MUTUAL", **FILES, caCertCredentialName="clients")],
        [https(mode="OPTIONAL_MUTUAL", credentialName="sds-name")],
        [https(mode="ISTIO_MUTUAL")],
        [https(mode="PASSTHROUGH")],
    ],
)
def test_valid(servers: list[dict[str, Any]], problems: Problems) -> None:
    assert problems(gateway(*servers)) == []


@pytest.mark.parametrize(
    ("servers", "expected"),
    [
        ([], ["spec.servers: gateway must have at least one server"]),
        ([server(hosts=[])], ["spec.servers[0].hosts: server config must contain at least one host"]),
        ([server("foo")], ["spec.servers[0].hosts[0]: short names (non FQDN) are not allowed"]),
        ([server("ns/foo")], ["spec.servers[0].hosts[0]: short names (non FQDN) are not allowed"]),
        ([server("*bar.com")], ["spec.servers[0].hosts[0]: partial wildcard '*bar.com' not allowed"]),
        (
            [server("foo.*.bar.com")],
            ["spec.servers[0].hosts[0]: domain name 'foo.*.bar.com' invalid: must not hold a wildcard"],
        ),
        ([server("~/foo.bar.com")], ["spec.servers[0].hosts[0]: invalid namespace value '~' in gateway"]),
        ([server("NS/foo.bar.com")], ["spec.servers[0].hosts[0]: invalid namespace value 'NS' in gateway"]),
        (
            [server("/foo.bar.com")],
            ["spec.servers[0].hosts[0]: config namespace and dnsName in host entry cannot be empty"],
        ),
        (
            [server(protocol="kafka")],
            [
                (
                    "spec.servers[0].port.protocol: invalid protocol 'kafka', supported protocols are HTTP, "
                    "HTTPS, HTTP2, GRPC, GRPC-WEB, TLS, MONGO, REDIS, MYSQL, TCP"
                )
            ],
        ),
        ([server(number=66000)], ["spec.servers[0].port.number: must be at most 65535"]),
        ([server(number=0)], ["spec.servers[0].port.number: port number 0 must be in the range 1..65535"]),
        (
            [server(port={"name": "", "number": 1, "protocol": "HTTP"})],
            ["spec.servers[0].port.name: port name must be set"],
        ),
        (
            [server(port={"name": "a", "number": 1, "protocol": "HTTP", "targetPort": 2})],
            ["spec.servers[0].port.targetPort: targetPort has no impact on Gateways"],
        ),
        (
            [server(), server()],
            ["spec.servers[1].port.name: port names in servers must be unique: duplicate name port"],
        ),
        ([server(bind="foo.bar")], ["spec.servers[0].bind: foo.bar is not a valid IP"]),
        (
            [server(bind="unix://@foobar")],
            ["spec.servers[0].port.number: port number must be 0 for unix domain socket"],
        ),
        (
            [server(protocol="HTTPS")],
            ["spec.servers[0]: server must have TLS settings for HTTPS/TLS protocols"],
        ),
        (
            [server(tls={"mode": "ISTIO_MUTUAL"})],
            ["spec.servers[0].tls: server cannot have TLS settings for plain text HTTP ports"],
        ),
        (
            [server(tls={"httpsRedirect": True, **CA})],
            ["spec.servers[0].tls: server cannot have TLS settings for plain text HTTP ports"],
        ),
        (
            [server(protocol="MONGO", tls={"mode": "ISTIO_MUTUAL"})],
            ["spec.servers[0].tls: server cannot have TLS settings for non HTTPS/TLS ports"],
        ),
    ],
)
def test_invalid(servers: list[dict[str, Any]], expected: list[str], problems: Problems) -> None:
    assert problems(gateway(*servers)) == [f"Gateway istio-system/gw: {text}" for text in expected]


ONE_SOURCE = (
    "only one of credentialName, credentialNames, serverCertificate/privateKey, tlsCertificates "
    "should be specified"
)


@pytest.mark.parametrize(
    ("tls", "expected"),
    [
        ({"mode": "SIMPLE", **FILES, "credentialName": "a"}, [f": {ONE_SOURCE}"]),
        ({"mode": "SIMPLE", **FILES, "credentialNames": ["a"]}, [f": {ONE_SOURCE}"]),
        ({"mode": "SIMPLE", **FILES, "tlsCertificates": [FILES]}, [f": {ONE_SOURCE}"]),
        ({"mode": "SIMPLE", "credentialName": "a", "credentialNames": ["a"]}, [f": {ONE_SOURCE}"]),
        ({"mode": "SIMPLE", "privateKey": "/k"}, [": SIMPLE TLS requires a server certificate"]),
        ({"mode": "SIMPLE", "serverCertificate": "/c"}, [": SIMPLE TLS requires a private key"]),
        (
            {"mode": "SIMPLE", "tlsCertificates": [{"privateKey": "/k"}, FILES]},
            [".tlsCertificates[0]: SIMPLE TLS requires a server certificate"],
        ),
        (
            {"mode": "MUTUAL", **CA, "tlsCertificates": [FILES, {"serverCertificate": "/c"}]},
            [".tlsCertificates[1]: MUTUAL TLS requires a private key"],
        ),
        ({"mode": "MUTUAL", **FILES}, [": MUTUAL TLS requires a client CA bundle"]),
        (
            {"mode": "OPTIONAL_MUTUAL"},
            [
                ": MUTUAL TLS requires a client CA bundle",
                ": MUTUAL TLS requires a server certificate",
                ": MUTUAL TLS requires a private key",
            ],
        ),
        (
            {"mode": "ISTIO_MUTUAL", **FILES, **CA},
            [
                ".serverCertificate: ISTIO_MUTUAL TLS cannot have associated server certificate",
                ".privateKey: ISTIO_MUTUAL TLS cannot have associated private key",
                ".caCertificates: ISTIO_MUTUAL TLS cannot have associated CA bundle",
            ],
        ),
        (
            {"mode": "ISTIO_MUTUAL", "credentialName": "a"},
            [".credentialName: ISTIO_MUTUAL TLS cannot have associated credentialName"],
        ),
        (
            {"mode": "MUTUAL", "credentialName": "a", "caCrl": "/crl"},
            [".caCrl: CRL is not supported with credentialName. CRL has to be specified in the credential"],
        ),
        ({"mode": "SIMPLE", **FILES, "caCrl": "/crl"}, [".caCrl: CRL is not supported with SIMPLE TLS"]),
        (
            {"mode": "BEST", **FILES},
            [
                (
                    ".mode: must be 'PASSTHROUGH', 'SIMPLE', 'MUTUAL', 'AUTO_PASSTHROUGH', "
                    "'ISTIO_MUTUAL' or 'OPTIONAL_MUTUAL'"
                )
            ],
        ),
        (
            {"mode": "SIMPLE", **FILES, "certificate": "/c"},
            [".certificate: unknown field, did you mean 'caCertificates'?"],
        ),
    ],
)
def test_invalid_tls(tls: dict[str, Any], expected: list[str], problems: Problems) -> None:
    found = problems(gateway(https(**tls)))
    assert [text.removeprefix("Gateway istio-system/gw: spec.servers[0].tls") for text in found] == expected


@pytest.mark.parametrize(
    ("tls", "expected"),
    [
        (
            {"mode": "SIMPLE", **FILES, "minProtocolVersion": "TLSV1_0"},
            (
                ".minProtocolVersion: TLS version below TLSV1_2 require setting compatible ciphers as by "
                "default they no longer include compatible ciphers."
            ),
        ),
        (
            {"mode": "SIMPLE", **FILES, "cipherSuites": ["AES128-SHA", "MADE-UP", "-AES256-SHA"]},
            ".cipherSuites: ignoring invalid cipher suites: MADE-UP",
        ),
        (
            {"mode": "SIMPLE", **FILES, "cipherSuites": ["AES128-SHA", "AES128-SHA"]},
            ".cipherSuites: ignoring duplicate cipher suites: AES128-SHA",
        ),
        (
            {"mode": "SIMPLE", **FILES, "ecdhCurves": ["P-256", "P-257"]},
            ".ecdhCurves: ignoring invalid ECDH curves: P-257",
        ),
        (
            {"mode": "SIMPLE", **FILES, "httpsRedirect": True},
            ".httpsRedirect: tls.httpsRedirect should only be used with http servers",
        ),
        (
            {"mode": "MUTUAL", "credentialName": "a", "insecureSkipVerify": True},
            (
                ".insecureSkipVerify: certificates of any CA are taken: a client is whoever its certificate "
                "says, for policies too"
            ),
        ),
        (
            {"credentialName": "a"},
            ": PASSTHROUGH mode does not use certificates, they will be ignored",
        ),
    ],
)
def test_what_is_ignored_or_open_is_a_warning(tls: dict[str, Any], expected: str, problems: Problems) -> None:
    start = "warning: Gateway istio-system/gw: spec.servers[0].tls"
    assert problems(gateway(https(**tls))) == [f"{start}{expected}"]


def test_a_name_is_a_dns_label(problems: Problems) -> None:
    assert problems(gateway(server(), name="my.gateway")) == [
        "Gateway istio-system/my.gateway: metadata.name: invalid gateway name: 'my.gateway'"
    ]


@pytest.mark.parametrize("version", ["v1", "v1beta1", "v1alpha3"])
def test_all_versions_of_istio_are_read(version: str, problems: Problems) -> None:
    assert problems(gateway(server()).replace("io/v1", f"io/{version}")) == []


def test_which_namespaces_a_host_is_for() -> None:
    (found,) = model(gateway(server("a.com", "*/b.com", "./C.com", "team-a/d.com"))).spec.servers
    assert found.hosts_for("team-a", "istio-system") == ("a.com", "b.com", "d.com")
    assert found.hosts_for("istio-system", "istio-system") == ("a.com", "b.com", "c.com")
    assert found.names == ("a.com", "b.com", "c.com", "d.com")


def test_only_what_envoy_knows_is_asked_of_it() -> None:
    suites = ["AES128-SHA", "MADE-UP", "AES128-SHA"]
    text = gateway(https(mode="SIMPLE", **FILES, cipherSuites=suites, ecdhCurves=["P-1", "X25519"]))
    (item,) = load(text, "f.yaml", {}).objects
    assert isinstance(item.object, Gateway)
    tls = item.object.spec.servers[0].tls
    assert tls is not None
    assert (tls.known_cipher_suites, tls.known_ecdh_curves) == (("AES128-SHA",), ("X25519",))
