"""One round of a shipped method on NumPy factors, in double precision.

The factors go through the same cohort, validation and server half as a federation's uploads do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedcore.data.cohort import CohortBuilder
from fedcore.methods import Aggregate, Broadcast, Method, create_method
from fedcore_kernels.layout import FactorLayout

Array = NDArray[np.float64]

MODULE = "w"
"""The one module of a toy model."""


@dataclass(frozen=True)
class Round:
    """What a method made of a round.

    Attributes:
        factors: factor name to the next global value: ``A (r, d_in)``, ``B (d_out, r)``,
            ``R (r, r)``.
        personal: client number to its own values, by factor name, where the method has them.
        residual: ``(d_out, d_in)`` what is added to the base weight; zero for most methods.
        aggregate: everything else that the method said.
    """

    factors: Mapping[str, Array]
    personal: Mapping[int, Mapping[str, Array]]
    residual: Array
    aggregate: Aggregate

    @property
    def product(self) -> Array:
        """``B A`` or ``B R A``, and the residual; of a Gram adapter ``A^T A``."""
        factors = self.factors
        if "B" not in factors:
            return np.asarray(factors["A"].T @ factors["A"])
        core = factors["R"] if "R" in factors else np.eye(len(factors["A"]))
        return np.asarray(factors["B"] @ core @ factors["A"] + self.residual)


def server_round(
    method: str | Method,
    uploads: Mapping[str, ArrayLike],
    weights: ArrayLike | None = None,
    previous: Mapping[str, ArrayLike] | None = None,
    *,
    round: int = 0,
    ranks: Sequence[int] | None = None,
    statistics: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> Round:
    """Aggregate N clients' factors of one weight by ``method``.

    Args:
        method: a method, or its name for its default options.
        uploads: factor name to the clients' values: ``A (N, r, d_in)``, ``B (N, d_out, r)``, Gram
            adapters ``A (N, r, k)`` alone, tri-factor ones ``R (N, r, r)`` too, scalings absorbed.
            What the method's clients do not send is used for their frozen or private state only.
        weights: ``(N,)``, equal by default.
        previous: the global factors that the clients started from; zeros by default.
        round: the server's round, by which alternating methods decide what is trained.
        ranks: ``(N,)`` the clients' ranks; rows of their factors beyond them must be zero.
        statistics: client number to the statistics of its data.

    Raises:
        FedcoreError: the method refuses the uploads.
    """
    chosen = create_method(method) if isinstance(method, str) else method
    stacks = {name: np.asarray(value, dtype=np.float64) for name, value in uploads.items()}
    count = len(next(iter(stacks.values())))
    layout = _layout(stacks)
    start = {name: np.zeros(stack.shape[1:]) for name, stack in stacks.items()}
    start |= {} if previous is None else {n: np.asarray(v, float) for n, v in previous.items()}
    broadcast = Broadcast(layout, _row(layout, start))
    names = [f"{n:06d}" for n in range(count)]
    builder = CohortBuilder(
        chosen.upload_layout(layout, round), names, round=round, dtype=torch.float64
    )
    read = chosen.read_layout(layout, round)
    shares = np.ones(count) if weights is None else np.asarray(weights, float)
    for n, name in enumerate(names):
        client_row = layout.gather(
            _row(layout, {key: stack[n] for key, stack in stacks.items()}), read
        )
        builder.row(name).copy_(chosen.prepare_upload(client_row, read, broadcast, round).row)
        own_rank = None if ranks is None else {MODULE: ranks[n]}
        builder.receive(name, float(shares[n]), ranks=own_rank)
    metadata = {names[n]: values for n, values in (statistics or {}).items()}
    cohort = replace(builder.finish(), statistics=metadata)
    result = chosen.aggregate(cohort, broadcast)
    return Round(
        factors=_factors(layout, result.row),
        personal={int(name): _factors(cohort.layout, row) for name, row in result.personal.items()},
        residual=_residual(result, stacks),
        aggregate=result,
    )


def _layout(stacks: Mapping[str, Array]) -> FactorLayout:
    """Factors stand as rank x width: A and R as they are, B transposed."""
    slots = []
    for name, stack in sorted(stacks.items()):
        _, rows, columns = stack.shape
        slots.append((MODULE, name, *((columns, rows) if name == "B" else (rows, columns))))
    return FactorLayout.build(slots)


def _row(layout: FactorLayout, factors: Mapping[str, Array]) -> Tensor:
    row = torch.zeros(layout.size, dtype=torch.float64)
    for slot in layout.factor_slots:
        value = torch.from_numpy(np.array(factors[slot.factor]))
        layout.view(row, slot).copy_(value.T if slot.factor == "B" else value)
    return row


def _factors(layout: FactorLayout, row: Tensor) -> dict[str, Array]:
    factors = {slot.factor: layout.view(row, slot).numpy().copy() for slot in layout.factor_slots}
    return {name: value.T if name == "B" else value for name, value in factors.items()}


def _residual(result: Aggregate, stacks: Mapping[str, Array]) -> Array:
    shape = (stacks["B"].shape[1], stacks["A"].shape[2]) if "B" in stacks else (0, 0)
    pair = result.residual.get(MODULE)
    return np.zeros(shape) if pair is None else (pair.outer.T @ pair.inner).double().numpy()
