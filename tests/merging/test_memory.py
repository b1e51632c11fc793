"""Memory is the result and one group of modules, however many adapters and modules there are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.property.folders import lora_folder

ROOT = Path(__file__).parents[2]

SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from fedcore import aggregate

def peak():
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

small, *folders = sys.argv[3:]
def run(folders):
    aggregate(folders, method=sys.argv[1], on_invalid=sys.argv[2], compare=False,
              group_bytes=4 << 20)
run([small])
before = peak()
run(folders)
print(peak() - before)
"""

ADAPTERS, MODULES, WIDTH, RANK = 12, 24, 1024, 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("adapters")
    modules = [(f"block.{n:02}.q", WIDTH, WIDTH) for n in range(MODULES)]
    found = [lora_folder(home / "small", 0, 2, modules=modules[:1])]
    for n in range(ADAPTERS):
        head = home / f"{n:02}"
        found.append(lora_folder(head, n, RANK, modules=modules, dtype=torch.float32))
    return [str(folder) for folder in found]


@pytest.mark.parametrize(
    ("method", "on_invalid", "groups"),
    [
        ("fedit", "raise", 1),
        ("fedit", "drop", 1),
        ("product_svd", "raise", 1),
        # Beside what was read, what the rule made of it.
        ("robust_clip", "raise", 2),
    ],
)
def test_peak_memory_does_not_grow_with_the_adapters(folders, method, on_invalid, groups):
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, method, on_invalid, *folders],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        # Freed blocks go back to the system, so that the peak is what was needed at once.
        env={
            **os.environ,
            "PYTHONPATH": paths,
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
    )
    adapter = 4 * MODULES * RANK * 2 * WIDTH
    # The result, a group of 4 MiB, and its working copies, some of them in fp64: 25 or 29 MiB.
    # The tensors of all adapters are 36 MiB, and as much again while they are made a matrix.
    assert ADAPTERS * adapter == 36 << 20
    assert int(done.stdout) < adapter + groups * (4 << 20) + (18 << 20)
