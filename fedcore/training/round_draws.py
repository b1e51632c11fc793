"""What a Trainer script draws in a round: its seed, its examples, its place in the schedule.

A Trainer seeds itself by ``args.seed`` each time it is made, and every round has a Trainer of its
own. Under one seed, few steps see the same examples in every round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fedcore.checks import count
from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError

_SEEDS = 2**31
"""NumPy, which a Trainer seeds too, takes 32 bits; configurations are signed."""


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
        first = self.round * wanted
        passes = range(first // available, (first + wanted - 1) // available + 1)
        order = [place for index in passes for place in self._pass(index, available)]
        start = first - passes.start * available
        return order[start : start + wanted]

    def _pass(self, index: int, available: int) -> list[int]:
        seed = derive_seed(self.seed, "order", index, self.client)
        generator = torch.Generator().manual_seed(seed)
        places: list[int] = torch.randperm(available, generator=generator).tolist()
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


def schedule_over_rounds(
    optimiser: Optimizer,
    name: str,
    *,
    round: int,
    total_rounds: int,
    steps: int,
    warmup_rounds: float,
    options: Mapping[str, Any],
) -> LambdaLR:
    """One of transformers' schedules over all rounds, entered where ``round`` begins.

    Step k of round t of S steps has the rate of step ``t S + k`` of ``total_rounds S``.

    Raises:
        FedcoreError: a number out of range, or a schedule that is unknown or not a function of the
            step alone.
    """
    from transformers import get_scheduler

    count("scheduler", "steps", steps, least=1)
    if round >= total_rounds:
        raise FedcoreError(
            f"scheduler: round {round} is beyond the {total_rounds} rounds of the federation, "
            "counted from 0; start the server with more rounds"
        )
    if not 0 <= warmup_rounds <= total_rounds:
        raise FedcoreError(
            f"scheduler: warmup_rounds is {warmup_rounds}; pass a number from 0 to {total_rounds}"
        )
    # A schedule writes into the groups of the optimiser that it is made for.
    spare = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        whole = get_scheduler(
            name,
            spare,
            num_warmup_steps=int(warmup_rounds * steps),
            num_training_steps=total_rounds * steps,
            scheduler_specific_kwargs=dict(options),
        )
    except (ValueError, TypeError) as error:
        raise FedcoreError(f"scheduler: {name!r} cannot be made: {error}") from None
    if not isinstance(whole, LambdaLR):
        raise FedcoreError(
            f"scheduler: {name!r} does not follow from the step alone; pass 'cosine', 'linear' or "
            "another schedule of transformers that does"
        )
    for group in optimiser.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return LambdaLR(optimiser, whole.lr_lambdas[0], last_epoch=round * steps - 1)
