"""Norm clipping of the clients' products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedcore.methods.decisions import Decision
from fedcore.methods.product_distances import norms
from fedcore.methods.robust_hosts import RobustMethod, check_number, median


@dataclass(frozen=True)
class RobustClip(RobustMethod):
    """Scale a client's update down to norm ``limit`` before the host sees it.

        c_n = min(1, limit / ||B_n A_n||_F),    B_n <- c_n B_n

    with the norm over all modules, so that ``||M|| <= limit`` whatever anyone sends, and no client
    moves M by more than ``2 w_n limit``. Without a ``limit`` it is the median of the round's norms,
    in which every client counts once: half of the clients are then scaled in every round.

    It bounds how far a client can pull and not where to: use a distance rule against clients that
    agree on a direction. The norm is that of the whole product, which grows over the rounds where
    the adapter is carried on; a fixed ``limit`` is a bound on the model. Dense tensors are not
    clipped. Identical clients are clipped as any others.

    Source: norm bounding, arXiv 1911.07963; taking it on products is ours.

    Raises:
        FedcoreError: ``limit`` is no finite number above 0.
    """

    limit: float | None = None

    name: ClassVar[str] = "robust_clip"
    summary: ClassVar[str] = "updates scaled down to a norm, then the host's rule"
    paper: ClassVar[str] = "arXiv 1911.07963"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None:
            check_number(self.name, "limit", self.limit, or_none=True)

    def judge(self, clients: Sequence[str], weights: Tensor, gram: Tensor) -> Decision:
        """Everyone, those above the limit with a smaller ``B``."""
        sizes = norms(gram)
        limit = float(median(sizes)) if self.limit is None else self.limit
        above = sizes > limit
        if not bool(above.any()):
            return Decision(weights)
        scales = torch.where(above, limit / sizes, 1.0)
        flags = tuple(
            f"{clients[n]}: scaled by {scales[n]:.3g}, its norm {sizes[n]:.3g} is above {limit:.3g}"
            for n in above.nonzero()[:, 0].tolist()
        )
        return Decision(weights, scales, flags)
