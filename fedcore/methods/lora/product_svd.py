"""FlexLoRA's server rule: the truncated SVD of the mean of the clients' products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from fedcore.checks import choice
from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.methods.base import (
    EMPTY_ROUND,
    Aggregate,
    Broadcast,
    Capabilities,
    Description,
    Family,
    Method,
    StepReport,
    checked_ranks,
    unchanged,
)
from fedcore.methods.shared.factor_pairs import PairGroup, pair_groups
from fedcore.methods.shared.reports import rank_flags, steps_of
from fedcore.methods.shared.uploads import check_whole_upload, with_dense_means
from fedcore_kernels import Split, procrustes, product_svd, spread


@dataclass(frozen=True)
class ProductSvd(Method):
    """The best rank-r approximation of ``M = sum w_n B_n A_n``, for clients of any rank.

    With ``M = U S V^T`` and singular values in descending order the server broadcasts

        left:      B = U_r S_r,        A = V_r^T
        balanced:  B = U_r S_r^{1/2},  A = S_r^{1/2} V_r^T

    The error is the Eckart-Young tail ``(sum_{i>r} sigma_i^2)^{1/2}``; it is zero when
    ``rank M <= r``. Only the products enter: ``(B_n X, X^{-1} A_n)`` in place of ``(B_n, A_n)``
    changes nothing. M itself is never formed. Dense tensors are averaged.

    A client of rank ``r_n < r`` takes the leading ``r_n`` rows, which are the best rank ``r_n``.

    ``align`` rotates the balanced factors towards those of the last round, ``B O`` and ``O^T A``
    with ``O = polar(B^T B_prev + A A_prev^T)``, so that the moments of a persistent optimiser keep
    their meaning; the model is the same. Leading rows of rotated factors are no longer the best of
    their rank: :meth:`for_client` truncates first and then rotates.

    Fails softly, with a flag, where M has a lower rank than the factors: directions without a
    singular value are zero in both factors, from where no gradient leads away, unless ``align``
    spreads the others over them; a zero M has zero factors. Where ``sigma_r = sigma_{r+1}`` (a gap
    of 0 in the report) the best subspace is not unique and rounding decides.

    Source: FlexLoRA, arXiv 2402.11505; the factored computation and the alignment are ours.
    """

    split: Split = "left"
    align: bool = False

    name: ClassVar[str] = "product_svd"
    aliases: ClassVar[tuple[str, ...]] = ("flexlora", "FlexLoRA")
    family: ClassVar[Family] = "lora"
    capabilities: ClassVar[Capabilities] = Capabilities(
        mixed_ranks=True, history="alignment", any_rank=True
    )
    description: ClassVar[Description] = Description(
        summary="best rank r of the mean product, any client ranks",
        paper="arXiv 2402.11505",
        exact="when rank M <= r, otherwise the best rank r",
        uplink="r (d_in + d_out)",
        downlink="r (d_in + d_out)",
        server_cost="4 (d_in + d_out) m^2 + 24 m^3 + 2 (d_in + d_out) m r, m = N r",
    )

    def __post_init__(self) -> None:
        choice(self.name, "split", self.split, get_args(Split))
        if self.align and self.split != "balanced":
            raise FedcoreError(
                f"{self.name}: align is true with split {self.split!r}, in which a rotation would "
                "move singular values from B to A; pass split='balanced'"
            )

    def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
        """One decomposition per group of modules of equal shape; dense tensors are averaged.

        Raises:
            FedcoreError: the uploads do not hold every tensor of the broadcast.
        """
        self.check_cohort(cohort)
        if not len(cohort):
            return unchanged(previous, EMPTY_ROUND)
        check_whole_upload(cohort, previous, self.name)
        row = with_dense_means(cohort, previous)
        steps: dict[str, StepReport] = {}
        for group in pair_groups(cohort.layout):
            outer, inner = group.stacks(cohort.updates)
            steps |= self._write(row, group, outer, inner, cohort.weights, previous.row)
        return Aggregate(row, cohort.layout, steps, rank_flags(cohort.layout, steps))

    def for_client(self, state: Broadcast, held: Broadcast, ranks: Sequence[int]) -> Tensor:
        """The global row as a client of lower ranks receives it: the best approximation of them.

        Args:
            state: the global state, as :meth:`aggregate` left it.
            held: what the client started the round from, for the alignment; of the same layout.
            ranks: L numbers in the order of ``layout.modules``, each from 1 to the layout's.

        Returns:
            ``(P,)`` rows beyond a module's rank are zero.

        Raises:
            FedcoreError: a rank out of its range, or another number of ranks than modules.
        """
        layout, rank_of = state.layout, checked_ranks(state.layout, ranks)
        row = state.row.clone()
        for group in pair_groups(layout, rank_of):
            outer, inner = group.stacks(state.row)
            self._write(row, group, outer[None], inner[None], torch.ones(1), held.row)
        return row

    def _write(
        self,
        row: Tensor,
        group: PairGroup,
        outer: Tensor,
        inner: Tensor,
        weights: Tensor,
        held: Tensor,
    ) -> dict[str, StepReport]:
        """Put the factors of one group into ``row`` and report its modules."""
        best = product_svd(outer, inner, weights, group.kept, split=self.split)
        factors = best.left, best.right
        if self.align:
            factors = _aligned(factors, group.stacks(held), group.kept)
        group.write(row, *factors)
        condition = spread(best.values, best.rank)
        return steps_of(group.modules, best.rank, condition, best.gap)


def _aligned(
    factors: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], rank: int
) -> tuple[Tensor, Tensor]:
    """``O^T`` times both factors ``(L, s, d)``, nearest to the leading ``rank`` rows of ``held``.

    Both are rotated by one isometry, the polar factor of the sum of their products with ``held``.
    """
    both = torch.cat(factors, dim=-1).double()
    widths = [factor.shape[-1] for factor in factors]
    rotation = procrustes(both, torch.cat(held, dim=-1)[:, :rank])
    outer, inner = (rotation @ both).to(factors[0].dtype).split(widths, dim=-1)
    return outer, inner
