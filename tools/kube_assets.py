"""Build kube-apiserver and etcd, for the tests on a real API server (`make kube-assets`).

They are built once, from Go modules, into $XDG_CACHE_HOME/llmplane/kube/VERSION (~/.cache): some ten minutes,
2 GB of memory, and 3 GB of Go's caches. Whoever has them already names their folder, as for envtest:
KUBEBUILDER_ASSETS=/usr/local/kubebuilder/bin (`setup-envtest use 1.36.x -p path` downloads them). kubectl is
taken from PATH.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

KUBERNETES = "1.36.2"
ETCD = "3.6.16"
PROGRAMS = ("kube-apiserver", "etcd")


def folder() -> Path:
    """Return where the programs are, or will be."""
    if given := os.environ.get("KUBEBUILDER_ASSETS"):
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "llmplane" / "kube" / f"v{KUBERNETES}"


def missing() -> list[str]:
    """Return what is not there of the programs that the tests need."""
    lacking = [name for name in PROGRAMS if not (folder() / name).exists()]
    return lacking if _kubectl() else [*lacking, "kubectl"]


def _kubectl() -> str | None:
    return shutil.which("kubectl", path=f"{folder()}{os.pathsep}{os.environ.get('PATH', '')}")


def build() -> None:
    """Build what is missing. Raises CalledProcessError."""
    target = folder()
    target.mkdir(parents=True, exist_ok=True)
    if not (target / "etcd").exists():
        _build(target / "etcd", "go.etcd.io/etcd/server/v3", f"v{ETCD}", "go.etcd.io/etcd/server/v3")
    if not (target / "kube-apiserver").exists():
        module, version = "k8s.io/kubernetes", f"v{KUBERNETES}"
        major, minor, _ = KUBERNETES.split(".")
        package = "k8s.io/component-base/version"
        flags = (
            f"-X {package}.gitVersion={version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
        )
        _build(target / "kube-apiserver", module, version, f"{module}/cmd/kube-apiserver", flags)


def _build(target: Path, module: str, version: str, package: str, flags: str = "") -> None:
    """Build one program in a module of its own."""
    print(f"building {target.name} {version} ...", flush=True)
    work = target.parent / f"build-{target.name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=mod -trimpath"}

    def go(*arguments: str) -> str:
        command = [shutil.which("go") or "/usr/local/go/bin/go", *arguments]
        return subprocess.run(  # noqa: S603 - Go
            command, cwd=work, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    (work / "go.mod").write_text(f"module llmplane.test/{target.name}\n\ngo 1.26.0\n", encoding="utf-8")
    info = json.loads(go("mod", "download", "-json", f"{module}@{version}"))
    # Kubernetes requires its own parts as v0.0.0: what they really are stands in its repository only.
    own = re.findall(r"^\s(k8s\.io/[a-z-]+) v0\.0\.0$", Path(info["GoMod"]).read_text("utf-8"), re.MULTILINE)
    parts = version.replace("v1.", "v0.")
    lines = [f"require {module} {version}", *(f"replace {name} => {name} {parts}" for name in own)]
    with (work / "go.mod").open("a", encoding="utf-8") as file:
        file.write("\n" + "\n".join(lines) + "\n")
    # What debuggers need is not made: it costs a tenth of the time.
    go(
        "build",
        "-p=1",
        "-gcflags=all=-dwarf=false",
        "-ldflags",
        f"-s -w {flags}",
        "-o",
        f"{target}.new",
        package,
    )
    Path(f"{target}.new").rename(target)
    shutil.rmtree(work)


def main() -> None:
    """Build what is missing."""
    if "kubectl" in missing():
        sys.exit(
            "kubectl is missing: https://kubernetes.io/docs/tasks/tools/ (apt install kubernetes-client)"
        )
    build()
    print(folder())


if __name__ == "__main__":
    main()
