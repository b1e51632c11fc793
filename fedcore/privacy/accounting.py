"""What DP-SGD has spent: epsilon from Opacus' accountants."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from fedcore.errors import FedcoreError, missing_extra, unknown_name

AccountantName = Literal["rdp", "prv"]

LARGEST_PRV_EPSILON = 50.0
"""Above this, by the bound of Renyi DP, the numeric accountant's grid outgrows memory."""

NOISE_RANGE = (1e-9, 100.0)
"""Noise multipliers that can be accounted for: Opacus' series of fractional Renyi orders takes time
like the square of large ones, and does not end where the inverse square of small ones overflows."""


@dataclass(frozen=True)
class Spending:
    """Steps of the Poisson-subsampled Gaussian mechanism, all alike.

    A step takes every record with probability ``sample_rate``, clips its vector to norm C, adds up
    and adds noise of standard deviation ``noise_multiplier x C`` to every number. Two data sets are
    neighbours if one has a record more.

    Raises:
        FedcoreError: a noise multiplier outside of :data:`NOISE_RANGE`, a rate outside (0, 1], or a
            negative number of steps.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        least, most = NOISE_RANGE
        if not least <= self.noise_multiplier <= most:
            raise FedcoreError(
                f"noise_multiplier is {self.noise_multiplier}; an epsilon can be computed from "
                f"{least:g} to {most:g}"
            )
        if not 0 < self.sample_rate <= 1:
            raise FedcoreError(f"sample_rate is {self.sample_rate}; pass a number in (0, 1]")
        if self.steps < 0:
            raise FedcoreError(f"steps is {self.steps}; pass 0 or more")


def epsilon(
    spending: Spending | Sequence[Spending], delta: float, accountant: AccountantName = "rdp"
) -> float:
    """The epsilon of (epsilon, ``delta``)-differential privacy of all of ``spending`` together.

    ``"rdp"`` composes Renyi divergences (arXiv:1702.07476, subsampled as in arXiv:1908.10530) and
    converts at the best order: a bound, milliseconds. ``"prv"`` composes privacy-loss distributions
    numerically (arXiv:2106.02848) and returns the upper end of its error interval, 0.01 wide:
    tighter, up to a second, for an epsilon of at most ``LARGEST_PRV_EPSILON``.

    Args:
        spending: steps that are all alike, or several kinds of them, one after the other.
        delta: in (0, 1), well below one over the number of records.

    Raises:
        FedcoreError: ``delta`` outside (0, 1), an unknown accountant, or too little noise for
            ``"prv"``.
        MissingExtraError: Opacus is not installed.

    Example:
        >>> epsilon(Spending(noise_multiplier=4.0, sample_rate=0.01, steps=0), 1e-5)
        0.0
    """
    if not 0 < delta < 1:
        raise FedcoreError(f"delta is {delta}; pass a number in (0, 1)")
    if accountant not in ("rdp", "prv"):
        raise unknown_name("accountant", accountant, ("rdp", "prv"))
    kinds = (spending,) if isinstance(spending, Spending) else spending
    made = tuple(kind for kind in kinds if kind.steps)
    if not made:
        return 0.0
    bound = _spent(made, delta, "rdp")
    if accountant == "rdp":
        return bound
    if bound > LARGEST_PRV_EPSILON:
        raise FedcoreError(
            f"epsilon is about {bound:.3g}; the accountant 'prv' goes up to "
            f"{LARGEST_PRV_EPSILON:g}, pass 'rdp' or raise the noise"
        )
    return _spent(made, delta, "prv")


def _spent(made: Sequence[Spending], delta: float, accountant: AccountantName) -> float:
    try:
        from opacus.accountants import PRVAccountant, RDPAccountant
        from opacus.accountants.analysis.rdp import get_privacy_spent
    except ImportError as error:
        raise missing_extra("opacus", "privacy") from error
    with warnings.catch_warnings():
        # An order at the end of the table gives a looser bound, which is a bound still; the
        # distributions' logarithms are taken of zeros that are masked out.
        warnings.filterwarnings("ignore", "Optimal order is", UserWarning)
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        if accountant == "rdp":
            # Divergences of independent steps add up.
            total = sum(
                kind.steps * np.array(_divergences(kind.noise_multiplier, kind.sample_rate))
                for kind in made
            )
            spent, _ = get_privacy_spent(
                orders=RDPAccountant.DEFAULT_ALPHAS, rdp=total, delta=delta
            )
            return float(spent)
        counted = PRVAccountant()
        counted.history = [(k.noise_multiplier, k.sample_rate, k.steps) for k in made]
        return float(counted.get_epsilon(delta=delta))


@lru_cache(maxsize=1024)
def _divergences(noise_multiplier: float, sample_rate: float) -> tuple[float, ...]:
    """The Renyi divergence of one step at each of Opacus' orders, a tenth of a second's work."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    divergences = compute_rdp(
        q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=orders
    )
    return tuple(divergences.tolist())
