"""LoRA-FAIR: the mean A, and the B that makes up for it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from fedcore.checks import number
from fedcore.data.cohort import Cohort
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
from fedcore.methods.shared.reports import rank_flags, steps_of
from fedcore.methods.shared.uploads import check_whole_upload
from fedcore_kernels import EPS_REL, apply_cores, cross_gram, eigh_small, weighted_mean


@dataclass(frozen=True)
class LoRAFair(Method):
    """Broadcast the mean ``Abar`` with the ``B`` that brings ``B Abar`` back towards ``M``.

    ``Bbar Abar`` misses the covariance of the factors. Among all corrections of ``Bbar`` the
    server takes

        dB = argmin ||M - (Bbar + dB) Abar||_F^2 + mu ||dB||_F^2,    mu = lam tr(G) / r
           = C (G + mu I)^{-1},    G = Abar Abar^T,    C = sum w_n B_n (A_n Abar^T) - Bbar G

    and, because ``C = sum w_n B_n (A_n Abar^T - G)``, gets ``Bbar + dB`` from one pass over the
    uploads, ``sum w_n B_n (I + (A_n Abar^T - G)(G + mu I)^{-1})``, in which nothing is subtracted
    after rounding. The error is never above that of FedIT, which is the limit of a large ``lam``;
    at ``lam = 0`` it is ``||M (I - P)||_F`` with ``P`` the projector on the rows of ``Abar``, the
    least that any ``B`` can reach. What lies outside of those rows is lost.

    ``lam = 0`` lets ``B`` grow as ``Abar`` loses directions (clients that cancel), round after
    round. Eigenvalues of ``G + mu I`` below 1e-12 of the largest are left out, which at
    ``lam = 0`` is the pseudo-inverse; the rank of ``Abar`` is reported, and flagged below r.
    Rotating one client's factors, which leaves its model as it is, changes the result.

    Source: LoRA-FAIR, arXiv 2411.14961, which minimises a cosine dissimilarity by gradient descent;
    the Frobenius norm and its closed form are ours. Dense tensors are averaged.
    """

    lam: float = 0.01

    name: ClassVar[str] = "lora_fair"
    aliases: ClassVar[tuple[str, ...]] = ("LoRA-FAIR",)
    family: ClassVar[Family] = "lora"
    capabilities: ClassVar[Capabilities] = Capabilities(history="none")
    description: ClassVar[Description] = Description(
        summary="FedAvg of A, and the least-squares B for it",
        paper="arXiv 2411.14961",
        exact="no: the least-squares B for the mean A",
        uplink="r (d_in + d_out)",
        downlink="r (d_in + d_out)",
        server_cost="2 N r (r + 1) (d_in + d_out)",
    )

    def __post_init__(self) -> None:
        number(self.name, "lam", self.lam, least=0)

    def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
        """The mean of everything, and of ``B`` the corrected one.

        Raises:
            FedcoreError: clients of different ranks, or uploads that do not hold every tensor of
                the broadcast.
        """
        self.check_cohort(cohort)
        if not len(cohort):
            return unchanged(previous, EMPTY_ROUND)
        check_whole_upload(cohort, previous, self.name)
        layout, shares = cohort.layout, cohort.shares.to(cohort.updates.device)
        row = weighted_mean(cohort.updates, cohort.weights)
        steps: dict[str, StepReport] = {}
        for group in pair_groups(layout):
            outer, inner = group.stacks(cohort.updates)
            # What the clients will hold: B is fitted to the rounded mean.
            mean = group.stacks(row)[1].to(previous.row.dtype)
            gram = mean.double() @ mean.double().mT
            inverse, rank, condition = _ridge_inverse(gram, self.lam)
            # Abar A_n^T - G of every client, (L, N, r, r).
            gaps = cross_gram(inner, mean).transpose(1, 2) - gram[:, None]
            eye = torch.eye(group.rank, dtype=gram.dtype, device=gram.device)
            cores = shares[:, None, None] * (eye + inverse[:, None] @ gaps)
            group.write(row, apply_cores(cores.transpose(1, 2), outer), mean)
            steps |= steps_of(group.modules, rank, condition)
        flags = rank_flags(layout, steps, "the mean A has rank {} of {}")
        return Aggregate(row.to(previous.row.dtype), layout, steps, flags)


def _ridge_inverse(gram: Tensor, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(G + mu I)^{-1}`` of ``gram (L, r, r)`` on its kept directions, its rank and condition.

    ``rank (L,)`` counts the directions of G itself, whatever ``mu = lam tr(G) / r``; the condition
    ``(L,)`` is that of what was inverted, inf for a zero G.
    """
    values, vectors = eigh_small(gram)
    shifted = values + lam * gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    usable = (shifted > EPS_REL * shifted[:, :1]) & (shifted > 0)
    inverse = torch.where(usable, shifted.reciprocal(), 0.0)
    rank = ((values > EPS_REL * values[:, :1]) & (values > 0)).sum(-1)
    smallest = torch.where(usable, shifted, inf).amin(-1)
    condition = torch.where(usable[:, 0], shifted[:, 0] / smallest, inf)
    return (vectors * inverse[:, None, :]) @ vectors.mT, rank, condition
