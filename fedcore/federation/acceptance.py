"""What a round's result may be: finite, and no larger than what came in explains.

Uploads are checked one by one before they are aggregated; what is computed from them is checked
here, in one place for all transports. A weighted mean is no longer than the longest upload. Any
other result, what a method moves into the base weights and the rows of single clients may be
``max_growth`` times as long as the previous state and the longest upload together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt

import torch
from torch import Tensor

from fedcore.checks import number
from fedcore.data.cohort import Cohort
from fedcore.methods.base import Aggregate, Broadcast, Method
from fedcore_kernels import product_norm

MAX_GROWTH = 10.0
"""How many times as long as what it came from a result may be, by default."""

# Elements that are in fp64 at a time.
_BLOCK = 1 << 18

# Rounding of a mean in fp32, over any number of clients.
_SLACK = 1e-4

_MOST_NAMES = 3


@dataclass(frozen=True)
class Limits:
    """What a server accepts of a round.

    Attributes:
        max_growth: as above, from 1.
        largest_share: of the total weight, that one client may have; None leaves weights as they
            are reported.

    Raises:
        FedcoreError: a number out of its range.
    """

    max_growth: float = MAX_GROWTH
    largest_share: float | None = None

    def __post_init__(self) -> None:
        number("", "max_growth", self.max_growth, least=1)
        if self.largest_share is not None:
            number("", "largest_share", self.largest_share, above=0, most=1, otherwise=", or None")


def norm(row: Tensor) -> float:
    """``||row||`` in fp64, wherever its square overflows or vanishes too; NaN where a value is."""
    blocks = row.reshape(-1).split(_BLOCK) if row.numel() else ()
    total = sum(float(block.double().square().sum()) for block in blocks)
    if not blocks or (isfinite(total) and total > 0):
        return sqrt(total)
    largest = float(row.abs().max())
    if largest == 0 or not isfinite(largest):
        return largest
    return largest * sqrt(sum(float((b.double() / largest).square().sum()) for b in blocks))


def client_norms(cohort: Cohort) -> dict[str, float]:
    """Client id to the norm of its upload."""
    return {c: norm(row) for c, row in zip(cohort.client_ids, cohort.updates, strict=True)}


def capped(cohort: Cohort, largest_share: float | None) -> tuple[Tensor, list[str]]:
    """The cohort's weights ``(N,)``, none above its largest share, and a flag per client that had
    more.
    """
    if largest_share is None or not len(cohort):
        return cohort.weights, []
    lowered = capped_weights(cohort.weights, largest_share)
    counted = (lowered / lowered.sum()).tolist()
    flags = [
        f"{client}: its share of the weight is {share:.3g}, above largest_share "
        f"{largest_share:g}; it counts {count:.3g}"
        for client, share, count in zip(
            cohort.client_ids, cohort.shares.tolist(), counted, strict=True
        )
        if share > largest_share
    ]
    return lowered, flags


def capped_weights(weights: Tensor, largest_share: float) -> Tensor:
    """``(N,)`` weights of which none is more than ``largest_share`` of their sum.

    The largest are lowered to one common weight and the others stay. N clients of equal weight
    have 1/N each, which is what all of them get where ``largest_share`` is below that.

    Example:
        >>> capped_weights(torch.tensor([97.0, 2.0, 1.0]), 0.5)
        tensor([3., 2., 1.])
    """
    ordered = weights.sort(descending=True).values
    for count in range(len(ordered)):
        rest = float(ordered[count:].sum())
        if count * largest_share >= 1:
            break
        most = largest_share * rest / (1 - count * largest_share)
        if float(ordered[count]) <= most:
            return weights.clamp(max=most) if count else weights
    return weights.clamp(max=float(ordered[-1]))


def result_problem(
    result: Aggregate,
    previous: Broadcast,
    method: Method,
    cohort: Cohort,
    norms: Mapping[str, float],
    limits: Limits,
) -> str | None:
    """Why a round's result cannot be accepted, if so.

    Args:
        cohort: what it was made of.
        norms: upload by name to its norm; where there is none, only finite values are required.
    """
    if (problem := _not_finite(result)) or not norms:
        return problem
    before, largest = norm(previous.row), max(norms.values())
    most = limits.max_growth * (before + largest)
    changed = norm(previous.layout.gather(result.row, result.changed))
    if _is_mean(method, cohort, result):
        # Clients of lower rank leave the rows that they lack as they were.
        most = largest + (before if cohort.mixed_ranks else 0.0)
    if changed > most * (1 + _SLACK):
        return _too_large("the new state", changed, most)
    # A residual is a product: of factors of norm n it is n^2 / 2 at most.
    products = limits.max_growth * sum(max(n, n * n / 2) for n in (before, largest))
    residual = _product_norm(result)
    if residual > products * (1 + _SLACK):
        return _too_large("the update of the base weights", residual, products)
    most = limits.max_growth * (before + largest)
    for client, row in result.personal.items():
        if (length := norm(row)) > most * (1 + _SLACK):
            return _too_large(f"the row of client {client}", length, most)
    return None


def largest_uploads(norms: Mapping[str, float]) -> str:
    """The clients of the largest norms, as a flag names them."""
    ordered = sorted(norms, key=lambda client: (-norms[client], client))
    return ", ".join(f"{client} (norm {norms[client]:.3g})" for client in ordered[:_MOST_NAMES])


def _is_mean(method: Method, cohort: Cohort, result: Aggregate) -> bool:
    able = method.capabilities
    return able.linear and able.uploads == "factors" and result.changed == cohort.layout


def _not_finite(result: Aggregate) -> str | None:
    pieces: dict[str, tuple[Tensor, ...]] = {"the new state": (result.row,)}
    pieces |= {f"the update of {module}": tuple(part) for module, part in result.residual.items()}
    pieces |= {f"the row of client {client}": (row,) for client, row in result.personal.items()}
    for what, tensors in pieces.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return f"{what} holds values that are not finite"
    return None


def _product_norm(result: Aggregate) -> float:
    parts = [part for part in result.residual.values() if part.rank]
    return sqrt(sum(float(product_norm(part.outer, part.inner)) ** 2 for part in parts))


def _too_large(what: str, length: float, most: float) -> str:
    return f"{what} has norm {length:.3g}, and the uploads explain at most {most:.3g}"
