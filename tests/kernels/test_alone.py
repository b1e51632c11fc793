"""The kernels in an environment that holds torch, what torch requires, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fedcore_kernels

PROGRAM = """
import sys
import torch
import fedcore_kernels as ops

random = torch.Generator().manual_seed(0)
stack = torch.randn(20, 2, 3, 17, generator=random)
weights = list(range(1, 21))
assert ops.weighted_mean(stack.flatten(1), weights).shape == (102,)
assert ops.nystrom_step(stack, weights, stack[0]).rank.tolist() == [3, 3]
assert ops.truncated_step(stack, weights, stack[0], 2).rank.tolist() == [2, 2]
assert ops.product_svd(stack, stack, weights, 2).rank.tolist() == [2, 2]
assert ops.polar(stack[:, 0]).rank.tolist() == [3] * 20
assert ops.align_and_average([stack], [stack[0]], weights).factors[0].shape == (2, 3, 17)
compiled = torch.compile(ops.gram, backend="eager", fullgraph=True)
assert torch.equal(compiled(stack, torch.ones(20)), ops.gram(stack, torch.ones(20)))
for name in ("numpy", "triton", "scipy", "transformers"):
    assert name not in sys.modules, name
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(f"{name} is in the environment")
print("alone")
"""


def required(name: str, found: dict[str, Distribution]) -> dict[str, Distribution]:
    """``name`` and all that it requires here, by name."""
    if name not in found:
        found[name] = distribution(name)
        for line in found[name].requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                required(requirement.name, found)
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to torch and what it requires."""
    site = tmp_path_factory.mktemp("site")
    for name, member in required("torch", {}).items():
        if name in ("numpy", "triton"):
            continue
        for top in {file.parts[0] for file in member.files or []} - {"..", "__pycache__"}:
            source = Path(str(member.locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    return site


def test_operations_run_where_only_torch_is_installed(environment: Path) -> None:
    kernels = Path(fedcore_kernels.__file__).parents[1]
    start = f"import sys; sys.path[:0] = [{str(environment)!r}, {str(kernels)!r}]\n"
    # Neither site-packages nor the current folder nor PYTHONPATH are searched.
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", start + PROGRAM],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "alone"
