"""What stands in the way of a Triton body, and that everything runs where triton is missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcore_kernels import (
    BackendError,
    FactorLayout,
    apply_cores,
    backend,
    chosen_backend,
    cross_gram,
    cuda,
    florg_round,
    gram,
    nystrom_step,
    truncated_step,
    weighted_mean,
)
from fedcore_kernels import dispatch as table

STACK = torch.randn(2, 1, 3, 8, generator=torch.Generator().manual_seed(0))
TURNED = STACK.mT.contiguous().mT
TALL = torch.randn(2, 1, 129, 8, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.ones(2)
LAYOUT = FactorLayout.build([("q", "A", 129, 16), ("v", "A", 2, 16)])


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The real bodies, registered as if tensors on the CPU were on a card."""
    monkeypatch.setattr(table, "_bodies", {op: {**found} for op, found in table._bodies.items()})
    monkeypatch.setattr(cuda, "needs_cuda", lambda *_: None)
    cuda._triton_is_missing.cache_clear()
    cuda.register_bodies()
    yield
    cuda._triton_is_missing.cache_clear()


CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "weighted_mean": (weighted_mean, (torch.ones(8, 2).T, WEIGHTS), "last axis"),
    "gram": (gram, (TURNED,), "last axis"),
    "cross_gram": (cross_gram, (TURNED, STACK[0]), "last axis"),
    "apply_cores": (apply_cores, (torch.ones(1, 3, 2, 3), TURNED), "last axis"),
    "nystrom_step": (nystrom_step, (TURNED, WEIGHTS, STACK[0]), "last axis"),
    "truncated_step": (truncated_step, (TURNED, WEIGHTS, STACK[0], 2), "last axis"),
    "florg_round": (
        florg_round,
        (torch.ones(LAYOUT.size, 2).T, WEIGHTS, torch.ones(LAYOUT.size), LAYOUT),
        "last axis",
    ),
    "gram of high rank": (gram, (TALL,), "129 rows, more than 128"),
    "cross_gram with a tall reference": (cross_gram, (STACK, TALL[0]), "129 rows"),
    "apply_cores to many rows": (apply_cores, (torch.ones(1, 129, 2, 3), STACK), "129 rows"),
    "nystrom_step of high rank": (nystrom_step, (STACK, WEIGHTS, TALL[0]), "129 rows"),
    "truncated_step of high rank": (truncated_step, (TALL, WEIGHTS, TALL[0], 2), "129 rows"),
}


def rows_of(result: Any) -> Tensor:
    found: Tensor = result if isinstance(result, Tensor) else result[0]
    return found


@pytest.mark.usefixtures("on_card")
@pytest.mark.parametrize("name", list(CALLS))
def test_auto_runs_on_torch_and_a_named_backend_says_why_it_cannot(name: str) -> None:
    function, arguments, reason = CALLS[name]
    with backend("torch"):
        expected = rows_of(function(*arguments))
    assert torch.equal(rows_of(function(*arguments)), expected)
    with backend("triton"), pytest.raises(BackendError, match=f"triton: .*{reason}"):
        function(*arguments)


@pytest.mark.usefixtures("on_card")
def test_a_round_with_one_factor_of_high_rank() -> None:
    """Its group takes torch; the kernels take the other."""
    random = torch.Generator().manual_seed(0)
    previous = torch.randn(LAYOUT.size, generator=random)
    updates = previous + 0.1 * torch.randn(2, LAYOUT.size, generator=random)
    assert chosen_backend("florg_round", updates, previous) == "triton"
    with backend("torch"):
        expected = florg_round(updates, WEIGHTS, previous, LAYOUT)
    ranks = []

    def torch_body(stack: Tensor, *rest: Any) -> Any:
        ranks.append(stack.shape[2])
        with backend("torch"):
            return table._bodies["truncated_step"]["torch"].function(stack, *rest)

    obstacle = table._bodies["truncated_step"]["triton"].obstacle
    table.register("truncated_step", "triton", torch_body, obstacle)
    assert torch.equal(florg_round(updates, WEIGHTS, previous, LAYOUT).row, expected.row)
    assert ranks == [2]
    with backend("triton"), pytest.raises(BackendError, match="129 rows, more than 128"):
        florg_round(updates, WEIGHTS, previous, LAYOUT)


@pytest.mark.usefixtures("on_card")
def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_backend("gram", STACK) == "triton"
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    cuda._triton_is_missing.cache_clear()
    assert chosen_backend("gram", STACK) == "torch"
    with backend("triton"), pytest.raises(BackendError, match="triton: triton is not installed"):
        gram(STACK)


def test_tensors_on_the_cpu_never_ask_for_triton() -> None:
    for op in cuda.LIMITS:
        with backend("triton"), pytest.raises(BackendError, match="on cpu, not on a CUDA device"):
            chosen_backend(op, STACK, STACK)


def test_a_machine_without_triton_runs_everything() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
import fedcore_kernels as fk
from fedcore_kernels import cuda
for op in cuda.LIMITS:
    assert fk.chosen_backend(op, torch.ones(2, 2), torch.ones(2, 2)) == "torch", op
stack, weights = torch.randn(3, 2, 2, 9), [1, 2, 3]
assert fk.gram(stack, weights).shape == (2, 6, 6)
assert fk.cross_gram(stack, stack[0]).shape == (2, 2, 3, 2)
assert fk.apply_cores(torch.ones(2, 2, 3, 2), stack).shape == (2, 2, 9)
assert fk.weighted_mean(stack.flatten(1), weights).shape == (36,)
assert fk.nystrom_step(stack, weights, stack[0]).rank.tolist() == [2, 2]
assert fk.truncated_step(stack, weights, stack[0], 2).rank.tolist() == [2, 2]
layout = fk.FactorLayout.build([("q", "A", 2, 16)], [("bias", (3,))])
rows = torch.randn(3, layout.size)
assert fk.florg_round(rows, weights, rows[0], layout).row.shape == (layout.size,)
cuda.needs_cuda = lambda *_: None
try:
    with fk.backend("triton"):
        fk.gram(stack)
except fk.BackendError as error:
    assert "triton is not installed" in str(error)
else:
    raise AssertionError("ran without triton")
print(sorted(m for m in sys.modules if m.startswith("fedcore_kernels.jit")))
"""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
