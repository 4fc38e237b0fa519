"""The bootstrap of a proxy, and where it is laid down (tests/envoy/test_proxy.py: what Envoy makes of it)."""

import json
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llmplane.envoy
from llmplane.bootstrap import ProxySettings, XdsCredentials, bootstrap
from llmplane.envoy import EnvoyNotFoundError, find_envoy, lay_down, runtime_directory
from translator import lua
from translator.proxy import Proxy, ProxyType, WorkloadCertificate


def settings(**more: Any) -> ProxySettings:
    given: dict[str, Any] = {
        "type": ProxyType.SIDECAR,
        "xds_host": "127.0.0.1",
        "xds_port": 18000,
        "namespace": "team-a",
        "workload": "sleep",
        "admin_socket": Path("/run/admin.sock"),
        **more,
    }
    return ProxySettings(**given)


def test_the_translator_reads_back_who_the_proxy_is() -> None:
    made = settings(labels={"app": "sleep"}, bind_address="127.0.0.3", scripts={"digest": Path("/a.lua")})
    node = bootstrap(made)["node"]
    assert Proxy.from_node(node["id"], node["metadata"]) == Proxy(
        ProxyType.SIDECAR,
        "team-a",
        "sleep",
        frozenset({("app", "sleep")}),
        "127.0.0.3",
        frozenset({("digest", "/a.lua")}),
    )


def test_the_translator_reads_back_what_is_captured() -> None:
    made = bootstrap(settings(capture=True, capture_dns=True, instance_ips=["10.0.0.7", "fd00::7"]))
    proxy = Proxy.from_node(made["node"]["id"], made["node"]["metadata"])
    assert (proxy.captures, proxy.captures_dns, proxy.has_ipv6) == (True, True, True)


def test_of_the_workloads_certificate_only_the_paths_are_told() -> None:
    files = WorkloadCertificate("/certs/cert.pem", "/certs/key.pem", "/certs/ca.pem")
    node = bootstrap(settings(certificate=files))["node"]
    told = {name: value for name, value in node["metadata"].items() if name.startswith("TLS_")}
    assert told == {
        "TLS_CLIENT_CERT_CHAIN": "/certs/cert.pem",
        "TLS_CLIENT_KEY": "/certs/key.pem",
        "TLS_CLIENT_ROOT_CERT": "/certs/ca.pem",
    }
    assert Proxy.from_node(node["id"], node["metadata"]).certificate == files


def test_half_a_certificate_is_none() -> None:
    node = bootstrap(settings())["node"]
    metadata = {**node["metadata"], "TLS_CLIENT_CERT_CHAIN": "/certs/cert.pem"}
    assert Proxy.from_node(node["id"], metadata).certificate is None


def test_each_proxy_has_an_id_of_its_own() -> None:
    assert bootstrap(settings())["node"]["id"] != bootstrap(settings())["node"]["id"]
    assert bootstrap(settings(type=ProxyType.ROUTER))["node"]["id"].startswith("router~")


def test_the_admin_interface_is_a_socket_of_this_user_or_a_port_of_this_machine() -> None:
    assert bootstrap(settings())["admin"]["address"] == {"pipe": {"path": "/run/admin.sock", "mode": 0o600}}
    assert bootstrap(settings(admin_port=9901))["admin"]["address"] == {
        "socket_address": {"address": "127.0.0.1", "port_value": 9901}
    }


def test_metrics_and_health_can_be_asked_for_elsewhere() -> None:
    """A Prometheus of another machine reads a sidecar that nobody else can send requests to."""
    made = bootstrap(settings(status_address="10.0.0.7"))
    addresses = [each["address"]["socket_address"] for each in made["static_resources"]["listeners"]]
    assert {each["address"] for each in addresses} == {"10.0.0.7"}
    assert made["node"]["metadata"]["BIND_ADDRESS"] == "127.0.0.1"


def test_every_listener_is_at_the_bind_address() -> None:
    made = bootstrap(settings(bind_address="127.0.0.3"))
    addresses = [each["address"]["socket_address"] for each in made["static_resources"]["listeners"]]
    assert addresses == [
        {"address": "127.0.0.3", "port_value": 15090},
        {"address": "127.0.0.3", "port_value": 15021},
    ]


def test_bootstrap_and_script_are_laid_down_for_this_user_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    directory = runtime_directory("a")
    for each in (directory, directory.parent):
        assert stat.S_IMODE(each.stat().st_mode) == 0o700
    file = lay_down(settings(admin_socket=directory / "admin.sock"), directory)
    scripts = json.loads(file.read_text())["node"]["metadata"]["LUA_SCRIPTS"]
    assert Path(scripts[lua.SCRIPT_SHA256]).read_text() == lua.SCRIPT
    assert lay_down(settings(), runtime_directory("a")) == file, "again, as after a restart"


def test_all_proxies_of_a_user_name_the_same_script(tmp_path: Path) -> None:
    """What one of them acknowledged can stand in at another one for what that refuses: they are the same."""
    named = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        bootstrap = json.loads(lay_down(settings(), tmp_path / name, tmp_path).read_text())
        named.add(bootstrap["node"]["metadata"]["LUA_SCRIPTS"][lua.SCRIPT_SHA256])
    (script,) = named
    assert Path(script).read_text() == lua.SCRIPT
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b", Path(script).name]


def test_a_socket_whose_path_is_too_long_is_refused_before_envoy_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long for a Unix socket"):
        lay_down(settings(admin_socket=Path("/" + "a" * 107)), tmp_path)
    lay_down(settings(admin_socket=Path("/" + "a" * 106)), tmp_path)
    lay_down(settings(admin_socket=Path("/" + "a" * 107), admin_port=9901), tmp_path)


# Credentials (tests/envoy/test_auth_envoy.py: what Envoy does with them)


def xds_cluster(made: dict[str, Any]) -> dict[str, Any]:
    (cluster,) = (each for each in made["static_resources"]["clusters"] if each["name"] == "xds-grpc")
    return dict(cluster)


def validated_name(host: str) -> tuple[str | None, Any]:
    """Return the SNI of the xDS connection, and which name the control plane's certificate must have."""
    made = bootstrap(settings(xds_host=host, credentials=XdsCredentials(ca_file=Path("/ca.pem"))))
    tls = xds_cluster(made)["transport_socket"]["typed_config"]
    validation = tls["common_tls_context"]["combined_validation_context"]["default_validation_context"]
    return tls.get("sni"), validation["match_typed_subject_alt_names"]


def test_without_credentials_there_is_neither_tls_nor_a_token() -> None:
    made = bootstrap(settings())
    assert "transport_socket" not in xds_cluster(made)
    assert "credential_injector" not in json.dumps(made)
    assert "secrets" not in made["static_resources"]


def test_the_control_plane_is_verified_by_ca_and_name() -> None:
    assert validated_name("llmplane.example.com") == (
        "llmplane.example.com",
        [{"san_type": "DNS", "matcher": {"exact": "llmplane.example.com"}}],
    )
    for address in ("10.0.0.1", "::1"):  # SNI is for names only (RFC 6066)
        assert validated_name(address) == (None, [{"san_type": "IP_ADDRESS", "matcher": {"exact": address}}])


def test_what_is_laid_down_names_files_that_envoy_watches_and_holds_no_secret(tmp_path: Path) -> None:
    files = {name: tmp_path / f"their-{name}" for name in ("ca", "cert", "key", "token")}
    for name, file in files.items():
        file.write_text(f"content of {name}")
    credentials = XdsCredentials(*files.values())
    directory = tmp_path / "run"
    directory.mkdir()
    lay_down(settings(credentials=credentials), directory)
    texts = {file.name: file.read_text() for file in directory.glob("*.json")}
    assert set(texts) == {"bootstrap.json", "xds-ca.json", "xds-client.json", "xds-token.json"}
    assert "content of" not in "".join(texts.values())
    for name in ("xds-ca.json", "xds-client.json", "xds-token.json"):
        assert str(directory / name) in texts["bootstrap.json"]
        assert str(tmp_path / "their-") in texts[name]


# Which Envoy


def executable(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o755)
    return file


def test_the_envoy_in_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    envoy = executable(tmp_path / "bin" / "envoy")
    monkeypatch.setenv("PATH", f"{tmp_path}/other{os.pathsep}{tmp_path}/bin")
    assert find_envoy() == envoy


def test_the_start_script_of_the_wheel_is_no_envoy_but_the_wheel_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "venv" / "bin" / "envoy")
    monkeypatch.setattr(llmplane.envoy.sysconfig, "get_path", lambda _: str(tmp_path / "venv" / "bin"))
    monkeypatch.setenv("PATH", str(tmp_path / "venv" / "bin"))
    package = tmp_path / "site-packages" / "envoy"
    found = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(llmplane.envoy, "find_spec", lambda _: found)
    with pytest.raises(EnvoyNotFoundError, match=sys.executable):
        find_envoy()
    envoy = executable(package / "_bin" / "envoy")
    assert find_envoy() == envoy
