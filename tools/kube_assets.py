"""Build kube-apiserver and etcd, for the tests on a real API server (`make kube-assets`).

They are built once, from Go modules, into $XDG_CACHE_HOME/llmplane/kube/VERSION (~/.cache): some ten minutes,
2 GB of memory, and 3 GB of Go's caches. Whoever has them already names their folder, as for envtest:
KUBEBUILDER_ASSETS=/usr/local/kubebuilder/bin (`setup-envtest use 1.36.x -p path` downloads them). kubectl is
built too where PATH has none.
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


def go_program() -> str | None:
    """Return where Go is."""
    return shutil.which("go", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/go/bin")


def build(go: str) -> None:
    """Build what is missing, with Go. Raises CalledProcessError."""
    target = folder()
    target.mkdir(parents=True, exist_ok=True)
    lacking = missing()
    if "etcd" in lacking:
        _build(go, target / "etcd", "go.etcd.io/etcd/server/v3", f"v{ETCD}", "go.etcd.io/etcd/server/v3")
    major, minor, _ = KUBERNETES.split(".")
    at = "k8s.io/component-base/version"
    flags = f"-X {at}.gitVersion=v{KUBERNETES} -X {at}.gitMajor={major} -X {at}.gitMinor={minor}"
    for name in ("kube-apiserver", "kubectl"):
        if name in lacking:
            package = f"k8s.io/kubernetes/cmd/{name}"
            _build(go, target / name, "k8s.io/kubernetes", f"v{KUBERNETES}", package, flags)


def _build(  # noqa: PLR0917 - as `go build` has them
    program: str, target: Path, module: str, version: str, package: str, flags: str = ""
) -> None:
    """Build one program in a module of its own."""
    print(f"building {target.name} {version} ...", flush=True)
    work = target.parent / f"build-{target.name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=mod -trimpath"}

    def go(*arguments: str) -> str:
        command = [program, *arguments]
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
    if lacking := missing():
        go = go_program()
        if go is None:
            sys.exit(
                f"{' and '.join(lacking)}: not there, and no Go that could build them (https://go.dev/dl/). "
                "If you have the programs, name their folder: KUBEBUILDER_ASSETS"
            )
        build(go)
    print(folder())


if __name__ == "__main__":
    main()
