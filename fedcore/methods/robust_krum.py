"""Multi-Krum on the clients' products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from fedcore.errors import FedcoreError
from fedcore.methods.decisions import Decision
from fedcore.methods.product_distances import distances
from fedcore.methods.robust_hosts import RobustMethod, check_count


@dataclass(frozen=True)
class RobustKrum(RobustMethod):
    """Keep the ``keep`` clients whose nearest neighbours are nearest.

        score_i = sum of the N - faulty - 2 smallest ||B_i A_i - B_j A_j||_F^2,  j != i

    over all modules together. Of N clients, ``faulty`` may send anything, alone or in agreement, as
    long as ``N >= 2 faulty + 3``. Every client counts once in the scores, whatever weight it
    reports; those kept share by their weights. Ties go to the lower client id. ``keep`` is
    ``N - faulty`` by default; 1 is Krum as published.

    Costs honest clients too: ``faulty`` clients are left out of every round whether or not anyone
    is faulty, and under skewed data they are those with the rarest data. A client that splits
    itself in two gains a neighbour, so ids must be hard to get.

    Source: Machine Learning with Adversaries, arXiv 1703.02757; taking it on products is ours.

    Raises:
        FedcoreError: ``faulty`` is no integer from 0, or ``keep`` none from 1.
    """

    faulty: int = 1
    keep: int | None = None

    name: ClassVar[str] = "robust_krum"
    summary: ClassVar[str] = "clients nearest to their neighbours, then the host's rule"
    paper: ClassVar[str] = "arXiv 1703.02757"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.name, "faulty", self.faulty, 0)
        if self.keep is not None:
            check_count(self.name, "keep", self.keep, 1, or_none=True)

    def check_clients(self, clients: int) -> None:
        """Refuse a number of clients of which the rule promises nothing.

        Raises:
            FedcoreError: fewer than ``2 faulty + 3`` clients, or ``keep`` above ``N - faulty``.
        """
        least, most = 2 * self.faulty + 3, clients - self.faulty
        if clients < least:
            raise FedcoreError(
                f"robust_krum with faulty = {self.faulty} needs {least} clients or more, it has "
                f"{clients}"
            )
        if self.keep is not None and self.keep > most:
            raise FedcoreError(
                f"robust_krum cannot keep {self.keep} of {clients} clients, {self.faulty} of "
                f"which may be faulty; pass keep up to {most}"
            )

    def judge(self, clients: Sequence[str], weights: Tensor, gram: Tensor) -> Decision:
        """The clients of lowest score."""
        most = len(clients) - self.faulty
        keep = most if self.keep is None else self.keep
        squares = distances(gram).square().fill_diagonal_(inf)
        nearest = squares.sort(dim=1).values[:, : most - 2]
        scores = nearest.sum(1)
        # Rows stand in the order of client ids, which a stable sort keeps among equals.
        order = scores.argsort(stable=True)
        kept = torch.zeros_like(weights)
        kept[order[:keep]] = weights[order[:keep]]
        worst = float(scores[order[keep - 1]])
        flags = tuple(
            f"{clients[n]}: left out, its score {scores[n]:.3g} is not among the "
            f"{keep} lowest, up to {worst:.3g}"
            for n in sorted(order[keep:].tolist())
        )
        return Decision(kept, flags=flags)
