"""The sidecar in a pod: a pod in, the pod with an Envoy out. Pure; for the webhook and for `llmplane inject`.

Names are Istio's: the containers `istio-init` and `istio-proxy`, volumes, labels and annotations
(https://istio.io/latest/docs/reference/config/annotations/), and the templates `sidecar` and `gateway`
(manifests/charts/istio-control/istio-discovery/files/injection-template.yaml and gateway-injection-template).
The Envoy is a native sidecar: an init container that goes on, started before all others of the pod and ended
after them.
"""

import json
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import yaml

from llmplane.address import Address
from llmplane.bootstrap import HEALTH_PORT, STATS_PORT, ProxySettings, XdsCredentials, common_part, own_part
from llmplane.pods import workload_name
from translator import lua
from translator.proxy import ProxyType, WorkloadCertificate

PROXY = "istio-proxy"
INIT = "istio-init"
AUDIENCE = "llmplane"
"""Of the token with which the proxy proves to the control plane who it is."""
USER = 1337
"""Istio's user and group of the proxy: what it sends is not captured."""

_INJECT = "sidecar.istio.io/inject"
_STATUS = "sidecar.istio.io/status"
_TEMPLATES = "inject.istio.io/templates"
_MODE = "sidecar.istio.io/interceptionMode"
_MODES = ("REDIRECT", "NONE")
_CONFIG = "proxy.istio.io/config"
_IMAGE = "sidecar.istio.io/proxyImage"
_LOG_LEVEL = "sidecar.istio.io/logLevel"
_LOG_LEVELS = ("trace", "debug", "info", "warning", "error", "critical", "off")
_YES = frozenset({"y", "yes", "true", "on"})
_AUTO = "auto"
"""The image of a container `istio-proxy` that stands for the one to be injected (as in Istio)."""

_IN_IMAGE = Path("/etc/llmplane")
"""What the image of the proxy has: see `image_files`."""
_BOOTSTRAP = _IN_IMAGE / "bootstrap.json"
_SCRIPT = _IN_IMAGE / "llm_provider.lua"
_OWN_DIRECTORY = "/etc/istio/proxy"
_TOKENS = "/var/run/secrets/tokens"
_CERTIFICATE = "workload-certs"
_CERTIFICATES = "/var/run/secrets/workload-spiffe-credentials"
"""Where Istio, too, has the certificate that somebody else gives a workload: the volume of this name."""
_TOKEN_LIFETIME = 43_200
"""Seconds (Istio's); the kubelet renews the token after 80 % of them."""

# Istio's defaults of global.proxy.resources.
_RESOURCES = {
    ("requests", "cpu"): ("sidecar.istio.io/proxyCPU", "100m"),
    ("requests", "memory"): ("sidecar.istio.io/proxyMemory", "128Mi"),
    ("limits", "cpu"): ("sidecar.istio.io/proxyCPULimit", "2"),
    ("limits", "memory"): ("sidecar.istio.io/proxyMemoryLimit", "1Gi"),
}
_HIGHEST_PORT = 65535
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_CONCURRENCY = 2
"""Threads of an Envoy (Istio's default); its own default is the number of the machine's processors."""


class InjectionError(ValueError):
    """An annotation of a pod cannot be followed; the text names it."""


@dataclass(frozen=True, slots=True)
class InjectionSettings:
    """What is the same for all pods: the image, and the control plane's address and its CAs (PEM)."""

    image: str
    xds: Address
    ca: str


def image_files() -> dict[str, str]:
    """Return what the image of the proxy has in /etc/llmplane beside the Lua script, by name.

    It is the same for all pods; what only one has is in the pod, as Envoy's option `--config-yaml`.
    """
    proxy = _envoy(InjectionSettings("", Address("", 0), ""), ProxyType.SIDECAR, "", {})
    token = {"name": "xds-token", "generic_secret": {"secret": {"filename": f"{_TOKENS}/istio-token"}}}
    resource = {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", **token}
    return {
        _BOOTSTRAP.name: json.dumps(common_part(proxy), indent=2) + "\n",
        "xds-token.json": json.dumps({"resources": [resource]}, indent=2) + "\n",
    }


def inject(
    pod: Mapping[str, Any], settings: InjectionSettings, workload: str | None = None
) -> dict[str, Any] | None:
    """Return a pod with its proxy, or None if it shall have none, or has one.

    `pod` is a Pod, or the template of one; then `workload` is the name of what it is the template of. Raises
    InjectionError.
    """
    metadata, spec = pod.get("metadata") or {}, pod.get("spec") or {}
    labels, annotations = _strings(metadata, "label"), _strings(metadata, "annotation")
    if not _is_wanted(labels, annotations, spec):
        return None
    kind = _kind(annotations)
    name = workload if workload is not None else workload_name(metadata)
    envoy = _envoy(settings, kind, name, labels)
    envoy = replace(envoy, certificate=_certificate(spec), **_capture(kind, annotations))
    given = next((each for each in spec["containers"] if each["name"] == PROXY), None)
    proxy = _merged(_proxy(envoy, annotations.get(_IMAGE, settings.image), annotations), given)
    made: dict[str, Any] = deepcopy(dict(pod))
    to = made["spec"]
    to["containers"] = [each for each in to["containers"] if each["name"] != PROXY]
    if kind is ProxyType.ROUTER:
        to["containers"].insert(0, proxy)
        added = [PROXY]
    else:
        first = [{**proxy, "restartPolicy": "Always"}]
        if envoy.capture:
            first.insert(0, _init(proxy["image"], annotations))
        to["initContainers"] = [*first, *(to.get("initContainers") or ())]
        added = [each["name"] for each in first]
    volumes = _volumes()
    to["volumes"] = [*(to.get("volumes") or ()), *volumes]
    made.setdefault("metadata", {})
    made["metadata"]["annotations"] = {**annotations, _STATUS: _status(kind, added, volumes)}
    return made


def inject_documents(text: str, settings: InjectionSettings) -> str:
    """Return YAML with the pods of its Deployments, Jobs, Pods ... injected; all else stays as it means.

    Raises InjectionError, naming the object, and yaml.YAMLError.
    """
    documents = [each for each in yaml.load_all(text, Loader=_Loader) if each is not None]
    made = [_injected(document, settings) for document in documents]
    return yaml.dump_all(made, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)


def _injected(document: Any, settings: InjectionSettings) -> Any:
    if not isinstance(document, Mapping):
        return document
    if document.get("kind") == "List":
        return {**document, "items": [_injected(item, settings) for item in document.get("items") or ()]}
    name = (document.get("metadata") or {}).get("name", "")
    path = _POD_PATHS.get(str(document.get("kind")))
    if path is None:
        return document
    made = deepcopy(dict(document))
    parent: Any = made
    try:
        for step in path[:-1]:
            parent = parent[step]
        pod = parent[path[-1]] if path else made
        result = inject(pod, settings, name if path else None)
    except InjectionError as error:
        raise InjectionError(f"{document['kind']} {name}: {error}") from None
    except (KeyError, TypeError):
        raise InjectionError(f"{document['kind']} {name}: has no {'.'.join((*path, 'spec'))}") from None
    if result is None:
        return document
    if not path:
        return result
    parent[path[-1]] = result
    return made


_POD_PATHS: Mapping[str, tuple[str, ...]] = {
    "Pod": (),
    **dict.fromkeys(
        ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "ReplicationController", "Job"),
        ("spec", "template"),
    ),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}
"""Where the pod is, by kind."""


def _is_wanted(labels: Mapping[str, str], annotations: Mapping[str, str], spec: Mapping[str, Any]) -> bool:
    """Whether a pod may have a proxy, by Istio's rules; that it is asked for say the webhook's selectors."""
    if _STATUS in annotations or spec.get("hostNetwork") or (spec.get("os") or {}).get("name") == "windows":
        return False
    containers = [*spec["containers"], *(spec.get("initContainers") or ())]
    if any(each["name"] in (PROXY, INIT) and each.get("image") != _AUTO for each in containers):
        return False
    said = labels.get(_INJECT, annotations.get(_INJECT, ""))
    return not said or said.lower() in _YES


def _strings(metadata: Mapping[str, Any], noun: str) -> Mapping[str, str]:
    """Return labels or annotations; in a file they may be none, which counts as empty, or no strings."""
    found = {name: "" if it is None else it for name, it in (metadata.get(f"{noun}s") or {}).items()}
    for name, value in found.items():
        if not isinstance(value, str):
            raise InjectionError(f"{noun} {name}: must be a string, in quotes")
    return found


def _kind(annotations: Mapping[str, str]) -> ProxyType:
    kinds = {"sidecar": ProxyType.SIDECAR, "gateway": ProxyType.ROUTER}
    return kinds[_one_of(annotations, _TEMPLATES, kinds, "sidecar")]


def _one_of(annotations: Mapping[str, str], name: str, known: Iterable[str], default: str) -> str:
    value = annotations.get(name, default)
    if value not in known:
        raise InjectionError(f"annotation {name}: {value!r} is not one of {', '.join(known)}")
    return value


def _envoy(
    settings: InjectionSettings, kind: ProxyType, workload: str, labels: Mapping[str, str]
) -> ProxySettings:
    """Return what the Envoy is; what only the kubelet knows it fills in where `$(...)` stands."""
    return ProxySettings(
        type=kind,
        xds_host=settings.xds.host,
        xds_port=settings.xds.port,
        namespace="$(POD_NAMESPACE)",
        workload=workload,
        labels=labels,
        bind_address="0.0.0.0" if kind is ProxyType.ROUTER else "127.0.0.1",  # noqa: S104 - in the pod
        status_address="0.0.0.0",  # noqa: S104 - for the kubelet and Prometheus
        admin_socket=Path(_OWN_DIRECTORY) / "admin.sock",
        scripts={lua.SCRIPT_SHA256: _SCRIPT},
        credentials=XdsCredentials(token_file=Path(_TOKENS) / "istio-token"),
        xds_ca=settings.ca,
        sds_directory=_IN_IMAGE,
    )


def _proxy(envoy: ProxySettings, image: str, annotations: Mapping[str, str]) -> dict[str, Any]:
    own = own_part(envoy)
    own["node"]["id"] = (
        f"{envoy.type}~$(POD_IP)~$(POD_NAME).$(POD_NAMESPACE)~$(POD_NAMESPACE).svc.cluster.local"
    )
    arguments = ["-c", str(_BOOTSTRAP), "--config-yaml", json.dumps(own, separators=(",", ":"))]
    arguments += ["--disable-hot-restart"]
    if concurrency := _config(annotations).get("concurrency", _CONCURRENCY):
        arguments += ["--concurrency", str(concurrency)]
    arguments += ["--log-level", _one_of(annotations, _LOG_LEVEL, _LOG_LEVELS, "warning")]
    arguments += ["--file-flush-interval-msec", "1000"]
    if envoy.type is ProxyType.ROUTER:
        # From the beginning of drain.sh on, each answer asks the client for another connection.
        arguments += ["--drain-strategy", "immediate"]
    ready = {"httpGet": {"path": "/healthz/ready", "port": HEALTH_PORT}, "timeoutSeconds": 3}
    container: dict[str, Any] = {
        "name": PROXY,
        "image": image,
        "command": ["envoy"],
        "args": arguments,
        "env": [
            _field("POD_NAME", "metadata.name"),
            _field("POD_NAMESPACE", "metadata.namespace"),
            _field("POD_IP", "status.podIP"),
            _field("INSTANCE_IPS", "status.podIPs"),
        ],
        "ports": [{"containerPort": STATS_PORT, "protocol": "TCP", "name": "http-envoy-prom"}],
        "startupProbe": {**ready, "periodSeconds": 1, "failureThreshold": 600},
        "readinessProbe": {**ready, "periodSeconds": 15, "failureThreshold": 4},
        "resources": _resources(annotations),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "runAsGroup": USER,
            "runAsNonRoot": True,
            "runAsUser": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [
            {"name": "istio-envoy", "mountPath": _OWN_DIRECTORY},
            {"name": "istio-token", "mountPath": _TOKENS, "readOnly": True},
        ],
    }
    if envoy.certificate:
        container["volumeMounts"].append({"name": _CERTIFICATE, "mountPath": _CERTIFICATES, "readOnly": True})
    if envoy.type is ProxyType.ROUTER:
        container["lifecycle"] = {"preStop": {"exec": {"command": ["/usr/local/bin/drain.sh"]}}}
    return container


def _capture(kind: ProxyType, annotations: Mapping[str, str]) -> dict[str, Any]:
    """Return what the Envoy's settings say of the capture."""
    is_on = kind is ProxyType.SIDECAR and _one_of(annotations, _MODE, _MODES, "REDIRECT") == "REDIRECT"
    return {
        "capture": is_on,
        "capture_dns": is_on and _captures_dns(annotations),
        "instance_ips": ("$(INSTANCE_IPS)",),
    }


def _init(image: str, annotations: Mapping[str, str]) -> dict[str, Any]:
    """Make the container that has the kernel send what the pod's containers send to Envoy."""
    environment = [{"name": "PROXY_UID", "value": str(USER)}, {"name": "PROXY_GID", "value": str(USER)}]
    for variable, (annotation, is_valid, noun) in _LISTS.items():
        name = f"traffic.sidecar.istio.io/{annotation}"
        if name in annotations:
            items = [item.strip() for item in annotations[name].split(",") if item.strip()]
            is_all = items == ["*"] and variable == "INCLUDE_OUTBOUND_IP_RANGES"
            wrong = [] if is_all else [item for item in items if not is_valid(item)]
            if wrong:
                raise InjectionError(f"annotation {name}: {wrong[0]!r} is no {noun}")
            environment.append({"name": variable, "value": ",".join(items)})
    if _captures_dns(annotations):
        environment.append({"name": "DNS_CAPTURE", "value": "true"})
    return {
        "name": INIT,
        "image": image,
        "command": ["/usr/local/bin/capture.sh"],
        "env": environment,
        "resources": _resources(annotations),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"add": ["NET_ADMIN", "NET_RAW"], "drop": ["ALL"]},
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "runAsGroup": 0,
            "runAsNonRoot": False,
            "runAsUser": 0,
        },
        "volumeMounts": [{"name": "istio-envoy", "mountPath": "/run"}],  # the lock of iptables
    }


def _is_range(text: str) -> bool:
    try:
        ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and 0 < int(text) <= _HIGHEST_PORT


_LISTS = {
    "INCLUDE_OUTBOUND_IP_RANGES": ("includeOutboundIPRanges", _is_range, "IP address or range"),
    "EXCLUDE_OUTBOUND_IP_RANGES": ("excludeOutboundIPRanges", _is_range, "IP address or range"),
    "INCLUDE_OUTBOUND_PORTS": ("includeOutboundPorts", _is_port, "port number"),
    "EXCLUDE_OUTBOUND_PORTS": ("excludeOutboundPorts", _is_port, "port number"),
}
"""Variables of capture.sh, the annotation of each, and what its items are."""


def _captures_dns(annotations: Mapping[str, str]) -> bool:
    metadata = _config(annotations).get("proxyMetadata") or {}
    return isinstance(metadata, Mapping) and str(metadata.get("ISTIO_META_DNS_CAPTURE")).lower() == "true"


def _config(annotations: Mapping[str, str]) -> Mapping[str, Any]:
    """Return Istio's ProxyConfig of a pod; of it, `concurrency` and the capture of DNS are honoured."""
    try:
        config = yaml.safe_load(annotations.get(_CONFIG, "")) or {}
    except (yaml.YAMLError, ValueError):  # ValueError: a date that there is not
        raise InjectionError(f"annotation {_CONFIG}: is not valid YAML") from None
    if not isinstance(config, Mapping):
        raise InjectionError(f"annotation {_CONFIG}: must be an object")
    concurrency = config.get("concurrency", 0)
    if type(concurrency) is not int or concurrency < 0:
        raise InjectionError(f"annotation {_CONFIG}: concurrency must be a number from 0")
    return config


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _certificate(spec: Mapping[str, Any]) -> WorkloadCertificate | None:
    if all(each["name"] != _CERTIFICATE for each in spec.get("volumes") or ()):
        return None
    names = ("cert-chain.pem", "key.pem", "root-cert.pem")
    return WorkloadCertificate(*(f"{_CERTIFICATES}/{name}" for name in names))


def _resources(annotations: Mapping[str, str]) -> dict[str, dict[str, str]]:
    made: dict[str, dict[str, str]] = {}
    for (bound, resource), (annotation, default) in _RESOURCES.items():
        value = annotations.get(annotation, default)
        if not _QUANTITY.fullmatch(value):
            raise InjectionError(f"annotation {annotation}: {value!r} is no quantity, as 100m or 128Mi")
        made.setdefault(bound, {})[resource] = value
    return made


def _merged(ours: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return our container with what the pod's author wants different, in a container with image `auto`."""
    if given is None:
        return dict(ours)
    made = {**ours, **{name: value for name, value in given.items() if name != "image"}}
    for name in ("env", "ports", "volumeMounts"):
        made[name] = [*ours[name], *(given.get(name) or ())]
    for name in ("securityContext", "resources"):
        made[name] = {**ours[name], **(given.get(name) or {})}
    return made


def _volumes() -> list[dict[str, Any]]:
    token = {"audience": AUDIENCE, "expirationSeconds": _TOKEN_LIFETIME, "path": "istio-token"}
    return [
        {"name": "istio-envoy", "emptyDir": {"medium": "Memory"}},
        {"name": "istio-token", "projected": {"sources": [{"serviceAccountToken": token}]}},
    ]


def _status(kind: ProxyType, added: list[str], volumes: list[dict[str, Any]]) -> str:
    """Return Istio's annotation on what was injected; a pod that has it is left alone."""
    where = {"initContainers": None, "containers": None}
    where["containers" if kind is ProxyType.ROUTER else "initContainers"] = added  # type: ignore[assignment]
    return json.dumps({**where, "volumes": [each["name"] for each in volumes]}, separators=(",", ":"))


class _Loader(yaml.SafeLoader):
    """What kubectl reads of YAML: dates are strings there."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Writes strings so that no YAML reader takes them for anything else."""

    def ignore_aliases(self, _: Any) -> bool:
        return True


_SURE = re.compile(r"[A-Za-z/][\w./-]*")
_WORDS = frozenset(["y", "n", "yes", "no", "on", "off", "true", "false", "null"])


def _string(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if _SURE.fullmatch(value) and value.lower() not in _WORDS else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else style)


_Dumper.add_representer(str, _string)
