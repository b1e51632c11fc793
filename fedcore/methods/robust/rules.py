"""The robust rules: norm clipping, Multi-Krum, distance from the medoid, geometric median.

Each judges the clients by the inner products of their updates alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fedcore.checks import count, number
from fedcore.errors import FedcoreError
from fedcore.methods.robust.base import (
    Decision,
    RobustMethod,
    distances,
    median,
    norms,
)

# Distances that differ by less are equal: rounding of the Gram matrix reaches that far.
_EQUAL = 1e-6

# The largest change of a weight at which the geometric median has converged.
_CONVERGED = 1e-9


def medoid(gaps: Tensor) -> int:
    """The first client ``i`` whose distances ``gaps[i]`` have the lowest median."""
    middles = median(gaps)
    return int((middles <= middles.min() * (1 + _EQUAL)).nonzero()[0])


class _Fit(NamedTuple):
    weights: Tensor
    converged: bool


def _weiszfeld(gram: Tensor, shares: Tensor, nu: float, sweeps: int) -> _Fit:
    """``beta (N,)``, which sums to 1, from the Gram matrix ``(N, N)`` and ``w (N,)``."""
    beta, squares = shares, gram.diagonal()
    for _ in range(sweeps):
        pull = gram @ beta
        gaps = (squares - 2 * pull + beta @ pull).clamp(min=0).sqrt()
        weighted = shares / gaps.clamp(min=nu)
        updated = weighted / weighted.sum()
        change = float((updated - beta).abs().max())
        beta = updated
        if change <= _CONVERGED:
            return _Fit(beta, True)
    return _Fit(beta, False)


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
        FedcoreError: ``limit`` is not a finite number above 0.
    """

    limit: float | None = None

    name: ClassVar[str] = "robust_clip"
    summary: ClassVar[str] = "updates scaled down to a norm, then the host's rule"
    paper: ClassVar[str] = "arXiv 1911.07963"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None:
            number(self.name, "limit", self.limit, above=0, otherwise=", or None")

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
        FedcoreError: ``faulty`` is not an integer from 0, or ``keep`` not one from 1.
    """

    faulty: int = 1
    keep: int | None = None

    name: ClassVar[str] = "robust_krum"
    summary: ClassVar[str] = "clients nearest to their neighbours, then the host's rule"
    paper: ClassVar[str] = "arXiv 1703.02757"

    def __post_init__(self) -> None:
        super().__post_init__()
        count(self.name, "faulty", self.faulty, least=0)
        if self.keep is not None:
            count(self.name, "keep", self.keep, least=1, otherwise=", or None")

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
        remaining = torch.zeros_like(weights)
        remaining[order[:keep]] = weights[order[:keep]]
        worst = float(scores[order[keep - 1]])
        flags = tuple(
            f"{clients[n]}: left out, its score {scores[n]:.3g} is not among the "
            f"{keep} lowest, up to {worst:.3g}"
            for n in sorted(order[keep:].tolist())
        )
        return Decision(remaining, flags=flags)


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
        FedcoreError: ``cutoff`` is not a finite number above 0.
    """

    cutoff: float = 3.0

    name: ClassVar[str] = "robust_median"
    summary: ClassVar[str] = "clients near the medoid, then the host's rule"
    paper: ClassVar[str] = "ours"

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self.name, "cutoff", self.cutoff, above=0)

    def judge(self, clients: Sequence[str], weights: Tensor, gram: Tensor) -> Decision:
        """The clients within the threshold."""
        total = len(clients)
        if total < 3:
            return Decision(weights)
        gaps = distances(gram)
        others = gaps[~torch.eye(total, dtype=torch.bool)].view(total, total - 1)
        centre = medoid(others)
        middle = float(median(others[centre]))
        deviation = float(median((others[centre] - middle).abs()))
        threshold = middle + self.cutoff * deviation
        near = gaps[centre] <= threshold * (1 + _EQUAL)
        flags = tuple(
            f"{clients[n]}: left out, {gaps[centre, n]:.3g} from the most central client "
            f"{clients[centre]}, more than {threshold:.3g}"
            for n in (~near).nonzero()[:, 0].tolist()
        )
        return Decision(weights * near, flags=flags)


@dataclass(frozen=True)
class RobustGeomedian(RobustMethod):
    """Weigh the clients as their geometric median does, then let the host aggregate.

        argmin_M sum_n w_n ||B_n A_n - M||_F = sum_n beta_n B_n A_n

    with ``beta`` from Weiszfeld's iteration over the inner products alone,

        beta_n  proportional to  w_n / max(||B_n A_n - sum_j beta_j B_j A_j||_F, nu)

    where ``nu`` is ``smoothing`` times the median of the norms. No one is left out; a client far
    away counts as the inverse of its distance. The median is bounded as long as less than half
    of the weight is faulty: reported weights matter here, and ``weight_cap`` bounds them.

    Clients that all stand at one distance keep their weights. A client whose share falls below
    half of what it reported is flagged; so is a round whose weights have not converged to
    1e-9 within ``sweeps``, which uses the last ones.

    Source: Robust Aggregation for Federated Learning, arXiv 1912.13445; products are ours.

    Raises:
        FedcoreError: ``smoothing`` is not a finite number above 0, or ``sweeps`` not an integer
            from 1.
    """

    smoothing: float = 1e-6
    sweeps: int = 1000

    name: ClassVar[str] = "robust_geomedian"
    summary: ClassVar[str] = "weights of the geometric median, then the host's rule"
    paper: ClassVar[str] = "arXiv 1912.13445"

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self.name, "smoothing", self.smoothing, above=0)
        count(self.name, "sweeps", self.sweeps, least=1)

    def judge(self, clients: Sequence[str], weights: Tensor, gram: Tensor) -> Decision:
        """Everyone, with the weights of the median."""
        shares = weights / weights.sum()
        nu = self.smoothing * float(median(norms(gram)))
        if len(clients) < 2 or nu == 0:
            return Decision(weights)
        fit = _weiszfeld(gram, shares, nu, self.sweeps)
        flags = [
            f"{client}: counts {new:.3g} in place of {old:.3g}"
            for client, new, old in zip(clients, fit.weights.tolist(), shares.tolist(), strict=True)
            if new < 0.5 * old
        ]
        if not fit.converged:
            flags.append(f"the weights have not converged after {self.sweeps} sweeps")
        return Decision(fit.weights, flags=tuple(flags))
