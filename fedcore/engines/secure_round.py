"""A round in which the server learns the weighted mean of the uploads and nothing else."""

from __future__ import annotations

from dataclasses import replace

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.methods import METHODS
from fedcore.methods.base import Aggregate, Broadcast, Method
from fedcore.privacy import SecureSum


def check_sums_suffice(method: Method) -> None:
    """Refuse a method that needs more of its clients than the sum of what they send.

    Raises:
        FedcoreError: with the methods that can run behind secure aggregation.
    """
    if method.traits.linear and method.population == "clients":
        return
    able = [m.name for m in METHODS if m.traits.linear and m.population == "clients"]
    raise FedcoreError(
        f"{method.name} needs every upload and a secure sum shows the server their mean alone; "
        f"these need no more than that: {', '.join(able)}"
    )


def aggregate_securely(method: Method, cohort: Cohort, previous: Broadcast, seed: int) -> Aggregate:
    """The method's result from masked uploads.

    Every client masks its row, the server adds up what arrives, and :meth:`Method.from_mean` is all
    that sees the outcome. Clients that did not report are no part of the cohort: the round is that
    of the others.

    Args:
        seed: of masks and stochastic rounding.

    Raises:
        FedcoreError: fewer than two clients, whose sum would hide nothing; weights that are no
            whole numbers; a method that needs more than the mean.
    """
    # What a client of lower rank lacks it fills in itself: it holds the broadcast.
    full = method.completed(cohort, previous)
    total = SecureSum(full.layout, full.client_ids, cohort.round, seed)
    for client, row, weight in zip(
        full.client_ids, full.updates, full.weights.tolist(), strict=True
    ):
        total.add(client, total.mask(client, row, weight))
    mean = total.result()
    result = method.from_mean(mean.row, full.layout, previous)
    if not mean.clipped:
        return result
    flag = f"{mean.clipped} numbers were beyond the secure sum's clip of {total.grid.clip:g}"
    return replace(result, flags=(*result.flags, flag))
