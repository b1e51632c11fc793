"""FedEx-LoRA: FedAvg of the factors, and what it misses as an exact low-rank residual."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fedcore.checks import count
from fedcore.data.cohort import Cohort
from fedcore.data.low_rank import LowRank
from fedcore.methods.base import (
    EMPTY_ROUND,
    Aggregate,
    Broadcast,
    Capabilities,
    Description,
    Family,
    Method,
    StepReport,
    unchanged,
)
from fedcore.methods.shared.factor_pairs import pair_groups
from fedcore.methods.shared.uploads import check_whole_upload
from fedcore_kernels import EPS_REL, joint_copies, product_svd, spread, weighted_mean


def weighted_deviations(rows: Tensor, shares: Tensor) -> Tensor:
    """All rows but one of ``H diag(sqrt(w))`` applied to the clients, for an orthogonal H.

    The row left out, ``sqrt(w)`` in H, would give the weighted mean. For two stacks ``X_n`` and
    ``Y_n`` of the same clients

        sum_n X~_n^T Y~_n = sum_n w_n (X_n - Xbar)^T (Y_n - Ybar)

    with one term less on the left. H is the Householder reflection that takes ``sqrt(w)`` to
    ``e_p``, where p is the client of the largest weight. Written in ``D_n = X_n - X_p`` and the
    weighted mean ``Dbar`` of the clients but p,

        X~_n = sqrt(w_n) (D_n - (1 + sqrt(w_p)) Dbar),    n other than p

    where nothing is divided by ``1 - sqrt(w_p)``. Rounding is relative to the deviations, however
    close the clients and however unequal the weights are (``sqrt(w_p)`` is at least
    ``1 / sqrt(N)``, so the difference does not cancel), and equal clients give exact zeros.

    Args:
        rows: ``(L, N r, k)`` floating point, client-major; not written to.
        shares: ``(N,)`` positive, sum 1, of the dtype and on the device of ``rows``; N >= 2.

    Returns:
        ``(L, (N - 1) r, k)``, clients in their order without p.

    Cost: 5 N r k flops per module. Source: Helmert's contrasts; this weighted form is ours.
    """
    clients = rows.unflatten(1, (len(shares), -1))
    pivot = shares.argmax()
    rest = (torch.arange(len(shares), device=shares.device) != pivot).nonzero()[:, 0]
    others = shares[rest]
    gaps = clients.index_select(1, rest)
    gaps -= clients[:, pivot, None]
    centre = (others / others.sum()) @ gaps.transpose(1, 2)
    gaps -= (1 + shares[pivot].sqrt()) * centre[:, None]
    gaps *= others.sqrt()[:, None, None]
    return gaps.flatten(1, 2)


class _Residual(NamedTuple):
    """Factors ``(L, p, d_out)`` and ``(L, p, d_in)`` of L modules and, for each, what is known.

    ``lost`` is the share of the norm that was left out.
    """

    outer: Tensor
    inner: Tensor
    condition: list[float]
    gap: list[float]
    lost: list[float]


def _without_zero_rows(outer: Tensor, inner: Tensor) -> LowRank:
    """The rows that contribute to ``outer^T inner``."""
    contributes = outer.any(-1) & inner.any(-1)
    return LowRank(outer[contributes], inner[contributes])


def _whole(outer: Tensor, inner: Tensor) -> _Residual:
    """All of ``outer^T inner``."""
    unknown = [nan] * len(outer)
    return _Residual(outer, inner, unknown, unknown, [0.0] * len(outer))


def _best(outer: Tensor, inner: Tensor, rank: int) -> _Residual:
    """The best approximation of ``outer^T inner`` by products of ``rank``."""
    one = torch.ones(1, dtype=torch.float64)
    best = product_svd(outer[None], inner[None], one, rank)
    norms = torch.linalg.vector_norm(best.values, dim=-1)
    return _Residual(
        best.left,
        best.right,
        spread(best.values, best.rank).tolist(),
        best.gap.tolist(),
        torch.where(norms > 0, best.tail / norms, 0.0).tolist(),
    )


@dataclass(frozen=True)
class FedEx(Method):
    """Average the factors, and add their covariance to the base weights.

        M = sum_n w_n B_n A_n = Bbar Abar + sum_n w_n (B_n - Bbar)(A_n - Abar)

    The sum on the right, ``Cov``, is the error of :class:`~fedcore.methods.lora.fedit.FedIT`. Its N
    terms are linearly dependent; ``weighted_deviations`` gives N - 1 pairs of weighted deviations
    with the same sum, ``Cov = sum B~_n A~_n`` of rank (N - 1) r, for any weights and without
    a matrix of the size of a weight. Each is rounded relative to itself: clients that agree in
    ``A`` or in ``B`` leave exactly nothing, and rows that are zero are not sent. The residual is an
    increment; the next uploads are updates of base weights that hold it.

    ``residual_rank`` (for many clients) sends the best residual of that rank instead. The round is
    then exact only where ``rank Cov <= residual_rank``; what was left out is flagged.

    Failure modes: the covariance is seen only in separate uploads. Behind a sum-only aggregator,
    which replaces each upload by the mean, it would vanish without a trace and leave FedIT. Clients
    can recover each other's uploads from the residual. Rotating one client's factors, which
    leaves its model as it is, moves parts of M between adapter and residual.

    Source: FedEx-LoRA, arXiv 2410.09432; the reflection in place of Gram-Schmidt and unequal
    weights are ours.

    Raises:
        FedcoreError: ``residual_rank`` is not a positive integer.
    """

    residual_rank: int | None = None

    name: ClassVar[str] = "fedex"
    aliases: ClassVar[tuple[str, ...]] = ("FedEx-LoRA", "fedex-lora")
    family: ClassVar[Family] = "lora"
    capabilities: ClassVar[Capabilities] = Capabilities(updates_base=True, history="none")
    description: ClassVar[Description] = Description(
        summary="FedAvg, with its error added to the base weights",
        paper="arXiv 2410.09432",
        exact="yes; with residual_rank when the covariance has no higher rank",
        uplink="r (d_in + d_out)",
        downlink="N r (d_in + d_out)",
        server_cost="7 N r (d_in + d_out)",
        privacy_note="the residual is an invertible function of the uploads: clients can recover "
        "each other's factors",
    )

    def __post_init__(self) -> None:
        if self.residual_rank is not None:
            remedy = ", or None for all of it"
            count(self.name, "residual_rank", self.residual_rank, least=1, otherwise=remedy)

    def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
        """The mean of everything, and the covariance of the factors as the residual.

        Raises:
            FedcoreError: clients of different ranks, or uploads that do not hold every tensor of
                the broadcast.
        """
        self.check_cohort(cohort)
        if not len(cohort):
            return unchanged(previous, EMPTY_ROUND)
        check_whole_upload(cohort, previous, self.name)
        row = weighted_mean(cohort.updates, cohort.weights).to(previous.row.dtype)
        shares = cohort.shares.to(cohort.updates.device)
        present = shares > 0
        updates, shares = cohort.updates, shares[present]
        if not bool(present.all()):
            updates = updates[present]
        residual: dict[str, LowRank] = {}
        steps = {module: StepReport(0, nan, nan) for module in cohort.layout.modules}
        lost = dict.fromkeys(cohort.layout.modules, 0.0)
        for group in pair_groups(cohort.layout) if len(shares) > 1 else ():
            for part, rows in joint_copies(*group.stacks(updates)):
                outer, inner = (weighted_deviations(side, shares) for side in rows)
                cut = self.residual_rank
                covariance = _whole(outer, inner) if cut is None else _best(outer, inner, cut)
                for j, module in enumerate(group.modules[part]):
                    sides = covariance.outer[j].to(row), covariance.inner[j].to(row)
                    update = _without_zero_rows(*sides)
                    report = update.rank, covariance.condition[j], covariance.gap[j]
                    steps[module] = StepReport(*report)
                    lost[module] = covariance.lost[j]
                    if update.rank:
                        residual[module] = update
        return Aggregate(row, cohort.layout, steps, self._flags(lost), residual)

    def _flags(self, lost: dict[str, float]) -> tuple[str, ...]:
        worst = max(lost, key=lambda module: lost[module], default=None)
        if worst is None or lost[worst] <= EPS_REL:
            return ()
        share = f"{100 * lost[worst]:.3g}%"
        return (
            f"residual_rank {self.residual_rank} leaves out up to {share} of the residual, most in "
            f"{worst}",
        )
