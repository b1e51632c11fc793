"""Secure aggregation as its users meet it: the server learns a weighted mean and nothing else.

A simulation of pairwise masking (Bonawitz et al., Practical Secure Aggregation, 2017) with the
fixed point of Flower's SecAgg+. Every pair of clients shares a stream of uniform 64-bit numbers,
which one of them adds to its upload and the other subtracts. A masked upload is uniform; in the sum
the masks cancel. What is real is all arithmetic: clipping, stochastic rounding, weights, modular
sums. What is not is the cryptography: masks come from a seed that the caller holds and not from
key agreements, so nothing here protects anyone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedcore.checks import count
from fedcore.data.seeding import derive_seed
from fedcore.data.validation import check_row, check_weight
from fedcore.errors import FedcoreError
from fedcore.privacy.fixed_point import FixedPoint
from fedcore_kernels.layout import FactorLayout


class SecureMean(NamedTuple):
    """All that the server learns of a round.

    Attributes:
        row: ``(P,)`` fp64, the weighted mean, within one step of the grid; for
            :meth:`~fedcore.methods.Method.from_mean`.
        weight: the total weight.
        clipped: numbers of all uploads together that were beyond the clip; no one's in particular.
    """

    row: Tensor
    weight: int
    clipped: int


class SecureSum:
    """The weighted mean of one round's uploads under pairwise masks.

    :meth:`mask` is the client's half: it returns what is sent and keeps nothing. :meth:`add` and
    :meth:`result` are the server's: it holds one running sum of masked uploads, uniform noise until
    the last client has reported.

    A client with upload x and weight w sends, modulo 2^64 and masked,

        [w q(x), w, clipped],    q(x) = x / step, rounded up or down at random

    so that the mean is ``step sum w_n q(x_n) / sum w_n``: unbiased and less than a step
    (``2 clip / levels``, 3.8e-6 by default) from the mean of the clipped uploads, whatever the
    weights and the number of clients. Weights are whole numbers from 1, which a fixed point holds
    exactly; the server learns their sum. A client without weight takes no part: beside it the sum
    of two would be the upload of one.

    **What the server can see.** An upload that carries no mask is small where a masked one is
    uniform, and is refused; a sum whose weight or numbers no valid uploads add up to is refused as
    a whole. Who sends a wrong row behind a right mask is not seen by anyone.

    **Dropout.** Masks cancel only if every client of ``client_ids`` reports. :meth:`result` refuses
    otherwise and names those missing; run the round again without them. Protocols that recover the
    masks of lost clients do so through secret shares, which are not simulated.

    Costs ``N - 1`` streams of P numbers for a client, and 8 bytes per number on the wire; a
    protocol that knows its bounds needs ``log2(levels x total weight)`` bits.

    Args:
        layout: the upload layout of the round.
        client_ids: at least ``min_cohort`` distinct clients; a sum of one hides nothing.
        round: the server's round; masks and roundings of two rounds are unrelated.
        seed: of masks and roundings.
        clip: values beyond ``[-clip, clip]`` become its ends, and are counted.
        levels: steps in that range.
        min_cohort: the fewest clients that a sum may be of, two or more.

    Raises:
        FedcoreError: fewer clients, one of them twice, or a bad ``clip``, ``levels`` or
            ``min_cohort``.

    Example:
        >>> layout = FactorLayout.build([], [("bias", (2,))])
        >>> total = SecureSum(layout, ["a", "b"], round=0, seed=0)
        >>> for client, value, weight in (("a", 1.0, 3), ("b", -1.0, 1)):
        ...     total.add(client, total.mask(client, torch.full((layout.size,), value), weight))
        >>> total.result().row[:2], total.result().weight
        (tensor([0.5000, 0.5000], dtype=torch.float64), 4)
    """

    def __init__(
        self,
        layout: FactorLayout,
        client_ids: Sequence[str],
        round: int,
        seed: int,
        clip: float = 8.0,
        levels: int = 2**22,
        min_cohort: int = 2,
    ) -> None:
        self._order = sorted(client_ids)
        least = count("", "min_cohort", min_cohort, least=2)
        if len(self._order) < least:
            from_here = "two" if least == 2 else f"min_cohort = {least}"
            raise FedcoreError(
                f"client_ids is {self._order}; a sum hides its terms from {from_here} clients up"
            )
        if len(set(self._order)) < len(self._order):
            twice = next(c for i, c in enumerate(self._order) if c in self._order[:i])
            raise FedcoreError(f"client {twice} appears twice in client_ids")
        self.grid = FixedPoint(clip, levels)
        self._layout, self._round, self._seed = layout, round, seed
        self._total = torch.zeros(layout.size + 2, dtype=torch.int64)
        self._reported: set[str] = set()

    @property
    def largest_weight(self) -> int:
        """Above it, the sum of all clients could leave the 64 bits."""
        return 2**63 // (self.grid.levels // 2 * len(self._order)) - 1

    def mask(self, client_id: str, row: Tensor, weight: float) -> Tensor:
        """The client's half: what it sends in place of ``row (P,)``, int64 ``(P + 2,)``.

        Raises:
            FedcoreError: the client is not in the round; its row has another size or holds values
                that are not finite; its weight is not a whole number from 0 to ``largest_weight``.
        """
        place = self._place(client_id)
        if row.shape != (self._layout.size,):
            raise FedcoreError(
                f"client {client_id}: row has shape {tuple(row.shape)}, expected "
                f"({self._layout.size},)"
            )
        problem = check_weight(weight) or check_row(row, self._layout)
        if problem:
            raise FedcoreError(f"client {client_id}: {problem}")
        if not weight:
            raise FedcoreError(
                f"client {client_id}: its weight is 0, so it has no part in a sum; leave it out of "
                "client_ids"
            )
        if weight != int(weight) or weight > self.largest_weight:
            raise FedcoreError(
                f"client {client_id}: its weight is {weight}; pass a whole number up to "
                f"{self.largest_weight}"
            )
        draws = self._stream("rounding", place).random(row.numel())
        points, clipped = self.grid.encode(row, torch.from_numpy(draws))
        whole = int(weight)
        plain = torch.cat([points * whole, torch.tensor([whole, clipped])])
        return _modular_sum(plain, self._masks(place, plain.numel()))

    def add(self, client_id: str, masked: Tensor) -> None:
        """The server's half: add what a client sent.

        Raises:
            FedcoreError: the client is not in the round or reported before, or ``masked`` is not
                int64 ``(P + 2,)``; the sum is then what it was.
        """
        self._place(client_id)
        if client_id in self._reported:
            raise FedcoreError(f"round {self._round}: client {client_id} reported twice")
        if masked.dtype != torch.int64 or masked.shape != self._total.shape:
            raise FedcoreError(
                f"client {client_id}: a masked upload is int64 {tuple(self._total.shape)}; this is "
                f"{masked.dtype} {tuple(masked.shape)}"
            )
        # No number of a valid upload is larger before it is masked; half or more are once it is.
        largest = 2**63 // len(self._order)
        if not bool(((masked > largest) | (masked < -largest)).any()):
            raise FedcoreError(
                f"client {client_id}: its upload is not masked; send what mask(...) returns"
            )
        self._total = _modular_sum(self._total, masked)
        self._reported.add(client_id)

    def result(self) -> SecureMean:
        """The mean, once every client has reported.

        Raises:
            FedcoreError: naming the clients that did not report; or no valid uploads give this sum.
        """
        missing = [client for client in self._order if client not in self._reported]
        if missing:
            raise FedcoreError(
                f"round {self._round}: {', '.join(missing)} did not report, so their masks remain "
                "in the sum; run the round again without them"
            )
        weight, clipped = self._total[-2:].tolist()
        self._check_total(weight, clipped)
        row = self._total[:-2].to(torch.float64) / weight * self.grid.step
        return SecureMean(row, weight, clipped)

    def _check_total(self, weight: int, clipped: int) -> None:
        """Refuse a sum that is outside of what valid uploads add up to."""
        clients, numbers = len(self._order), self._total.numel() - 2
        # In exact integers: the bound of a number may be beyond 64 bits where the weight is wrong.
        largest = max(-int(self._total[:-2].min()), int(self._total[:-2].max()))
        for what, value, least, most in (
            ("total weight", weight, clients, clients * self.largest_weight),
            ("largest number", largest, 0, weight * self.grid.levels // 2),
            ("count of clipped numbers", clipped, 0, clients * numbers),
        ):
            if not least <= value <= most:
                raise FedcoreError(
                    f"round {self._round}: the {what} of the sum is {value}, outside of "
                    f"[{least}, {most}]: an upload was wrong or not masked for this round; run the "
                    "round again"
                )

    def _masks(self, place: int, count: int) -> Tensor:
        """The sum of the streams that the client shares with every other one, with their signs."""
        total = np.zeros(count, dtype=np.uint64)
        for other in range(len(self._order)):
            if other == place:
                continue
            first, second = sorted((place, other))
            stream = self._stream("mask", first, second).bit_generator.random_raw(count)
            total = total + stream if place == first else total - stream
        return torch.from_numpy(total.view(np.int64))

    def _stream(self, *purpose: str | int) -> np.random.Generator:
        seed = derive_seed(self._seed, "secure sum", self._round, *purpose)
        return np.random.Generator(np.random.Philox(seed))

    def _place(self, client_id: str) -> int:
        if client_id not in self._order:
            raise FedcoreError(
                f"round {self._round}: client {client_id} was not asked to take part"
            )
        return self._order.index(client_id)


def _modular_sum(one: Tensor, other: Tensor) -> Tensor:
    """``one + other`` modulo 2^64, int64."""
    # NumPy's unsigned integers wrap around by definition.
    total = one.numpy().view(np.uint64) + other.numpy().view(np.uint64)
    return torch.from_numpy(total.view(np.int64))
