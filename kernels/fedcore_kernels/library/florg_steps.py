"""``fedcore::nystrom_step`` and ``truncated_step``, without gradients.

What they keep depends on the values: a direction at the cut-off appears or goes at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels.capture import capturing
from fedcore_kernels.checks import accumulator
from fedcore_kernels.client_weights import root_shares
from fedcore_kernels.dispatch import run
from fedcore_kernels.errors import KernelInputError
from fedcore_kernels.library.operation import Promise, define

Step = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""The fields of a ``FactorStep``."""

STEP = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
"""The same in a schema."""


def step_promise(dtype: torch.dtype, modules: int, rank: int, width: int) -> list[Promise]:
    """Shapes and dtypes of a step on uploads of ``dtype`` with factors (modules, rank, width)."""
    reports = (torch.int64, torch.float64, torch.float64, torch.float64, torch.int64)
    factors: Promise = ((modules, rank, width), accumulator(dtype))
    return [factors, *(((modules,), report) for report in reports)]


def check_gauge(previous: Tensor) -> None:
    """Raise if a factor of ``previous`` (L, q, k) is all zero; not checked during a capture.

    Raises:
        KernelInputError: naming the module.
    """
    if capturing(previous):
        return
    zero = ~previous.flatten(1).any(1)
    if zero.any():
        raise KernelInputError(
            f"previous[{int(zero.nonzero()[0])}] is all zero and fixes no gauge; "
            "pass the factor broadcast at the start of the round"
        )


def _nystrom(
    stack: Tensor,
    weights: Tensor,
    previous: Tensor,
    eps_rel: float,
    align: bool,
    on_rank_loss: str,
) -> Step:
    check_gauge(previous)
    root = root_shares(weights, stack)
    step: Step = run("nystrom_step", (stack, root, previous), eps_rel, align, on_rank_loss)
    return step


def _nystrom_promise(
    stack: Tensor, weights: Tensor, previous: Tensor, *_options: object
) -> list[Promise]:
    modules, rank, width = previous.shape
    return step_promise(stack.dtype, modules, rank, width)


def _truncated(
    stack: Tensor,
    weights: Tensor,
    previous: Tensor | None,
    rank: int,
    eps_rel: float,
    align: bool,
) -> Step:
    if previous is None:
        before = stack.new_empty(0)
    else:
        check_gauge(previous)
        before = previous
    root = root_shares(weights, stack)
    step: Step = run("truncated_step", (stack, root, before), rank, eps_rel, align)
    return step


def _truncated_promise(
    stack: Tensor,
    weights: Tensor,
    previous: Tensor | None,
    rank: int,
    eps_rel: float,
    align: bool,
) -> list[Promise]:
    rows = previous.shape[1] if align and previous is not None else rank
    return step_promise(stack.dtype, stack.shape[1], rows, stack.shape[3])


define(
    "nystrom_step(Tensor stack, Tensor weights, Tensor previous, float eps_rel, bool align, "
    f"str on_rank_loss) -> {STEP}",
    _nystrom,
    _nystrom_promise,
)
define(
    "truncated_step(Tensor stack, Tensor weights, Tensor? previous, int rank, float eps_rel, "
    f"bool align) -> {STEP}",
    _truncated,
    _truncated_promise,
)
