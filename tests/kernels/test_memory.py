"""A round needs the uploads, two rows and a small working copy: no k x k Gram, no second copy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ONE_THREAD

SCRIPT = """
import resource
import torch
from pathlib import Path
from fedcore_kernels import FactorLayout, florg_round, weighted_mean

def peak():
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

modules, k, r, n = {modules}, 4096, 8, 20
def call(layout, updates, previous):
    if "{op}" == "mean":
        return weighted_mean(updates, torch.ones(n))
    return florg_round(updates, torch.ones(n), previous, layout, "{op}").row

def data(modules, k):
    layout = FactorLayout.build([(f"m{{i:02}}", "A", r, k) for i in range(modules)])
    previous = torch.empty(layout.size).normal_()
    updates = torch.empty(n, layout.size, dtype=torch.{dtype})
    for row in updates:
        row.copy_(previous).add_(0.1)
    return layout, updates, previous

call(*data(1, 256))
arguments = data(modules, k)
before = peak()
call(*arguments)
print(before, peak() - before, arguments[0].size)
"""


CASES = [
    ("mean", "float32"),
    ("mean", "bfloat16"),
    ("sketched", "float32"),
    ("sketched", "bfloat16"),
    ("truncated", "float32"),
]


@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_extra_memory_is_a_few_rows(op: str, dtype: str) -> None:
    script = SCRIPT.format(op=op, dtype=dtype, modules=32)
    kernels = Path(__file__).parents[2] / "kernels"
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        # Freed blocks go back to the system, so that the peak is what was needed at once.
        env={
            "PYTHONPATH": str(kernels),
            **ONE_THREAD,
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
    )
    _, extra, size = (int(word) for word in result.stdout.split())
    # Three fp32 rows and 32 MiB, together 44 MiB: an fp32 copy of the uploads would be 80 MiB, one
    # k x k Gram in fp64 128 MiB.
    assert extra < 3 * 4 * size + (32 << 20)
