"""What a Trainer draws in a round: its seed and its examples.

A Trainer seeds itself by ``args.seed`` each time it is made, and every round has a Trainer of its
own. Under one seed, few steps see the same examples in every round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore.checks import count
from fedcore.data.seeding import derive_seed

_SEEDS = 2**31
"""NumPy, which a Trainer seeds too, takes 32 bits; configurations are signed."""


def row_order(count: int, taken: int, skipped: int, *, seed: int, client: str) -> Tensor:
    """Which rows a client trains on, ``(taken,)``, after ``skipped`` of earlier rounds.

    Shuffled passes over its ``count`` rows, one after another through all rounds: no row comes
    again before all others came, and nothing has to be remembered from round to round.
    """
    passes = range(skipped // count, (skipped + taken - 1) // count + 1)
    orders = []
    for number in passes:
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", client, number))
        orders.append(torch.randperm(count, generator=generator))
    start = skipped - passes.start * count
    return torch.cat(orders)[start : start + taken]


@dataclass(frozen=True)
class RoundDraws:
    """The draws of one client in one round.

    Attributes:
        seed: of the federation.
        client: its name.
        round: counted from 0.
    """

    seed: int
    client: str
    round: int

    @property
    def trainer_seed(self) -> int:
        """A seed of this round and client alone, below 2^31."""
        return derive_seed(self.seed, "train", self.round, self.client) % _SEEDS

    def examples(self, available: int, wanted: int) -> list[int]:
        """The ``wanted`` examples of this round out of ``available``.

        Rounds of one size follow each other through shuffled passes: no example comes again before
        all others have come.

        Raises:
            FedcoreError: a number below 1.
        """
        count("round_examples", "available", available, least=1)
        count("round_examples", "wanted", wanted, least=1)
        skipped = self.round * wanted
        order = row_order(available, wanted, skipped, seed=self.seed, client=self.client)
        places: list[int] = order.tolist()
        return places

    def flag(self, seed: int, before: Mapping[int, int]) -> str | None:
        """What to say of a Trainer that is seeded by ``seed``, if anything.

        Args:
            before: round to the seed that the same client object trained it with.
        """
        others = {used for round, used in before.items() if round != self.round}
        if self.round == 0 or seed == self.trainer_seed or (others and seed not in others):
            return None
        known = "is that of an earlier round" if others else "may be that of every round"
        return (
            f"the Trainer's seed {seed} {known}, so that the same examples are drawn again; pass "
            "seed=client.round_seed() to its arguments, or train on client.round_examples(...)"
        )
