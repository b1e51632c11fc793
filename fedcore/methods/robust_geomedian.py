"""Weights of the geometric median of the clients' products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from fedcore.methods.decisions import Decision
from fedcore.methods.product_distances import norms
from fedcore.methods.robust_hosts import RobustMethod, check_count, check_number, median

# The largest change of a weight at which the fit has settled.
_SETTLED = 1e-9


class _Fit(NamedTuple):
    weights: Tensor
    settled: bool


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
    half of what it reported is flagged; so is a round whose weights have not settled to 1e-9
    within ``sweeps``, which uses the last ones.

    Source: Robust Aggregation for Federated Learning, arXiv 1912.13445; products are ours.

    Raises:
        FedcoreError: ``smoothing`` is no finite number above 0, or ``sweeps`` no integer from 1.
    """

    smoothing: float = 1e-6
    sweeps: int = 1000

    name: ClassVar[str] = "robust_geomedian"
    summary: ClassVar[str] = "weights of the geometric median, then the host's rule"
    paper: ClassVar[str] = "arXiv 1912.13445"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.name, "smoothing", self.smoothing)
        check_count(self.name, "sweeps", self.sweeps, 1)

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
        if not fit.settled:
            flags.append(f"the weights have not settled after {self.sweeps} sweeps")
        return Decision(fit.weights, flags=tuple(flags))


def _weiszfeld(gram: Tensor, shares: Tensor, nu: float, sweeps: int) -> _Fit:
    """``beta (N,)``, which sums to 1, from the Gram matrix ``(N, N)`` and ``w (N,)``."""
    beta, squares = shares, gram.diagonal()
    for _ in range(sweeps):
        pull = gram @ beta
        gaps = (squares - 2 * pull + beta @ pull).clamp(min=0).sqrt()
        found = shares / gaps.clamp(min=nu)
        found = found / found.sum()
        change = float((found - beta).abs().max())
        beta = found
        if change <= _SETTLED:
            return _Fit(beta, True)
    return _Fit(beta, False)
