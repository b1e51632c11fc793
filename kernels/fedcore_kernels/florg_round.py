"""A whole FLoRG server round on flat rows: all modules of all widths in one call."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.client_weights import client_weights
from fedcore_kernels.dispatch import register, run
from fedcore_kernels.errors import KernelInputError
from fedcore_kernels.layout import FactorLayout, SlotGroup
from fedcore_kernels.library.operation import without_gradient
from fedcore_kernels.nystrom import nystrom_step
from fedcore_kernels.steps import FactorStep
from fedcore_kernels.truncated import truncated_step
from fedcore_kernels.weighted_mean import weighted_mean

Variant = Literal["truncated", "sketched"]


class FlorgRound(NamedTuple):
    """The next global row and what each group's step reports.

    Attributes:
        row: (P,) the new factors and dense tensors; alignment gaps between slots are zero.
        steps: the report of every group of factors; ``factor`` is a view of ``row``.
    """

    row: Tensor
    steps: dict[SlotGroup, FactorStep]


def by_group(
    uploads: Tensor,
    before: Tensor,
    weights: Tensor,
    layout: FactorLayout,
    variant: Variant,
    align: bool,
) -> FlorgRound:
    """The round as one step per group of factors and one mean per dense slot."""
    row = uploads.new_zeros(layout.size, dtype=checks.accumulator(uploads.dtype))
    steps = {}
    for group in layout.groups:
        stack, factors = group.view(uploads), group.view(before)
        if variant == "truncated":
            step = truncated_step(stack, weights, factors, group.rows, align=align)
        else:
            step = nystrom_step(stack, weights, factors, align=align)
        factor = group.view(row)
        factor.copy_(step.factor)
        steps[group] = step._replace(factor=factor)
    for slot in layout.dense_slots:
        columns = slice(slot.offset, slot.offset + slot.numel)
        row[columns] = weighted_mean(uploads[:, columns], weights)
    return FlorgRound(row, steps)


register("florg_round", "torch", by_group)


def florg_round(
    updates: checks.ArrayLike,
    weights: checks.ArrayLike,
    previous: checks.ArrayLike,
    layout: FactorLayout,
    variant: Variant = "truncated",
    align: bool = True,
) -> FlorgRound:
    """Aggregate one round: every factor by FLoRG's step, every dense slot by the weighted mean.

    Args:
        updates: (N, P) floating point, rows of ``layout``.
        weights: (N,) real numbers, normalised in fp64.
        previous: (P,) the row broadcast at the start of the round.
        layout: where the factors stand in a row.
        variant: ``"truncated"`` (:func:`truncated_step` at each factor's own rank) or
            ``"sketched"`` (:func:`nystrom_step`).
        align: keep the gauge of ``previous``, or return every factor in its principal gauge.

    Returns:
        :class:`FlorgRound`; the row is fp32 unless ``updates`` is fp64.

    Raises:
        KernelInputError: a wrong shape, dtype, device or variant, unusable weights, a row that does
            not fit ``layout``, or a module whose previous factor is all zero.

    Cost: reads N P numbers once; memory of two rows and a working copy of one or a few modules.

    Example:
        >>> import torch
        >>> layout = FactorLayout.build([("q", "A", 1, 16)], [("bias", (16,))])
        >>> updates = torch.stack([torch.ones(32), 3 * torch.ones(32)])
        >>> florg_round(updates, [1, 1], torch.ones(32), layout).row[[0, 16]]
        tensor([2.2361, 2.0000])
    """
    uploads = checks.tensor("updates", updates, ("N", "P"))
    before = checks.tensor("previous", previous, ("P",))
    without_gradient("florg_round", updates=uploads, previous=before)
    layout.check(uploads)
    layout.check(before, "previous")
    checks.same_device("previous", before, "updates", uploads)
    if variant not in ("truncated", "sketched"):
        raise KernelInputError(f"variant is {variant!r}; pass 'truncated' or 'sketched'")
    counts = client_weights(weights, uploads.shape[0])
    arguments = (counts, layout, variant, align)
    if torch.compiler.is_compiling():
        # Each group's operations are known to the compiler, a layout is not.
        return by_group(uploads, before, *arguments)
    result: FlorgRound = run("florg_round", (uploads, before), *arguments)
    return result
