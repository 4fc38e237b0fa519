"""Several replicas serve byte-identical resources: Python's hashes, which differ by process, do not show."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import hashlib, sys
from llmplane.sources.files import FileSource
from llmplane.sources.state import world_of
from tests.golden.test_golden import VARIABLES, inputs, mesh_of, proxy_of
from translator.translate import Translator

for case in inputs():
    world = world_of(FileSource([case], VARIABLES).read(), mesh_of(case))
    for resource in Translator().translate(world, proxy_of(case)).resources:
        print(case.stem, resource.type_url, resource.name, resource.version)
        print(hashlib.sha256(resource.delta_frame).hexdigest())
"""


def test_two_processes_make_the_same_bytes_of_the_same_objects() -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    one, other = (process.communicate(timeout=120)[0].splitlines() for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert len(one) > 300
    assert one == other
