"""What a rule decides about the clients of a round, and how a cohort follows the decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort

if TYPE_CHECKING:
    from fedcore.methods.base import Method


@dataclass(frozen=True)
class Decision:
    """How much each of N clients counts, with its whole adapter.

    Attributes:
        weights: ``(N,)`` fp64, not negative; a client of weight 0 is left out.
        scales: ``(N,)`` fp64, what a client's update is multiplied by; None where all keep theirs.
        flags: one for every client that is treated otherwise than it reported.
    """

    weights: Tensor
    scales: Tensor | None = None
    flags: tuple[str, ...] = ()

    @property
    def kept(self) -> Tensor:
        """``(N,)`` boolean, the clients that are not left out."""
        return self.weights > 0


class Rule(Protocol):
    """Decides about clients before another method, the host, aggregates those that stay.

    It sees whole adapters, through the inner products of their updates alone; its host may then be
    given their modules all at once or some at a time.
    """

    def inner(self) -> Method:
        """The host."""

    def check_clients(self, clients: int) -> None:
        """Refuse a number of clients that is too small, before anything is computed.

        Raises:
            FedcoreError: with the number that is needed.
        """

    def decide(self, clients: Sequence[str], weights: Tensor, gram: Tensor) -> Decision:
        """Who counts for how much.

        Args:
            clients: N ids in ascending order.
            weights: ``(N,)`` fp64, positive, as reported.
            gram: ``(N, N)`` fp64, ``K_ij = sum over modules of <B_i A_i, B_j A_j>``.

        Raises:
            FedcoreError: the rule cannot judge these clients.
        """


def follow(cohort: Cohort, decision: Decision) -> Cohort:
    """The clients that stay, with the weights and scales of the decision.

    ``cohort`` may hold any of the modules and dense tensors; only ``B`` is scaled.

    Args:
        cohort: the N clients of the decision, in its order.
    """
    kept = decision.kept
    left = replace(chosen(cohort, kept), weights=decision.weights[kept])
    if decision.scales is None:
        return left
    # A product with a scale is not of bf16's or fp16's precision any more.
    wide = torch.promote_types(left.updates.dtype, torch.float32)
    updates, scales = left.updates.to(wide, copy=True), decision.scales[kept]
    for slot in left.layout.factor_slots:
        if slot.factor == "B":
            left.layout.view(updates, slot).mul_(scales.to(updates)[:, None, None])
    return replace(left, updates=updates)


def chosen(cohort: Cohort, kept: Tensor) -> Cohort:
    """The clients that ``kept (N,)``, boolean, names; ``cohort`` itself where it names all."""
    if bool(kept.all()):
        return cohort
    places = kept.nonzero()[:, 0]
    on_device = places.to(cohort.updates.device)
    return replace(
        cohort,
        updates=cohort.updates[on_device],
        weights=cohort.weights[places],
        client_ids=tuple(cohort.client_ids[n] for n in places.tolist()),
        ranks=cohort.ranks[places],
        scalings=cohort.scalings[places],
    )
