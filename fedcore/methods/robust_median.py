"""Distance to the medoid of the clients' products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedcore.methods.decisions import Decision
from fedcore.methods.product_distances import distances
from fedcore.methods.robust_hosts import RobustMethod, check_number, median

# Distances that differ by less are equal: rounding of the Gram matrix reaches that far.
_EQUAL = 1e-6


@dataclass(frozen=True)
class RobustMedian(RobustMethod):
    """Leave out clients that are unusually far from the most central one.

        medoid = argmin_i median_j d_ij,    d_ij = ||B_i A_i - B_j A_j||_F,  j != i
        left out: d_medoid,n > median + cutoff MAD    of the distances from the medoid

    over all modules together, with MAD the median absolute deviation. Every client counts once,
    whatever weight it reports; those kept share by their weights. Ties go to the lower client id,
    and distances are compared to a millionth. At least half of the others are always kept, and all
    of them where all are equally far: unlike Krum, the rule leaves out no one when no one stands
    out. It holds against less than half of the clients.

    Under skewed data the spread of honest clients is wide and so is the threshold; a faulty client
    that stays within it passes. Among few clients MAD may be small by chance, and honest ones are
    left out as well.

    Source: ours.

    Raises:
        FedcoreError: ``cutoff`` is no finite number above 0.
    """

    cutoff: float = 3.0

    name: ClassVar[str] = "robust_median"
    summary: ClassVar[str] = "clients near the medoid, then the host's rule"
    paper: ClassVar[str] = "ours"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.name, "cutoff", self.cutoff)

    def judge(self, clients: Sequence[str], weights: Tensor, gram: Tensor) -> Decision:
        """The clients within the threshold."""
        count = len(clients)
        if count < 3:
            return Decision(weights)
        gaps = distances(gram)
        others = gaps[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)
        centre = medoid(others)
        middle = float(median(others[centre]))
        deviation = float(median((others[centre] - middle).abs()))
        threshold = middle + self.cutoff * deviation
        kept = gaps[centre] <= threshold * (1 + _EQUAL)
        flags = tuple(
            f"{clients[n]}: left out, {gaps[centre, n]:.3g} from the most central client "
            f"{clients[centre]}, more than {threshold:.3g}"
            for n in (~kept).nonzero()[:, 0].tolist()
        )
        return Decision(weights * kept, flags=flags)


def medoid(gaps: Tensor) -> int:
    """The first client ``i`` whose distances ``gaps[i]`` have the lowest median."""
    middles = median(gaps)
    return int((middles <= middles.min() * (1 + _EQUAL)).nonzero()[0])
