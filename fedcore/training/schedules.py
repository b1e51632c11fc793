"""Learning rates that change over all rounds of a run: transformers' schedules, entered midway.

A client makes S steps in each of T rounds, and one curve spans all T S of them: step k of round t
(both from 0) has the learning rate

    rate * factor(t S + k),    progress = (t S + k) / (T S).

The last rate of a round and the first of the next one are neighbours on the curve. Rounds count
whether or not a client takes part in them, so nothing has to be remembered. Where S differs between
clients (epochs), each follows the same curve in steps of its own size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

from fedcore.checks import choice, count, number
from fedcore.errors import FedcoreError, missing_extra, unknown_name

ScheduleName = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "warmup_stable_decay",
]
"""Transformers' names, without those that follow a measured loss or know no end of training."""

Option = int | float | str

_ABOVE_ZERO = partial(number, "", above=0)
_SHARE = partial(number, "", least=0, most=1)
_RATE = partial(number, "", least=0)
_SHAPE = partial(choice, "", valid=("linear", "cosine", "1-sqrt"))
_FLOOR = {"num_cycles": _ABOVE_ZERO, "min_lr": _RATE, "min_lr_rate": _SHARE}

OPTIONS: Mapping[str, Mapping[str, Callable[[str, object], object]]] = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {"num_cycles": _ABOVE_ZERO},
    "cosine_with_restarts": {"num_cycles": partial(count, "", least=1)},
    "cosine_with_min_lr": _FLOOR,
    "cosine_warmup_with_min_lr": {**_FLOOR, "warmup_lr_rate": _SHARE},
    "polynomial": {"lr_end": _RATE, "power": _ABOVE_ZERO},
    "warmup_stable_decay": {
        # In rounds, as the warm-up: clients differ in their number of steps.
        "decay_rounds": _ABOVE_ZERO,
        "warmup_type": _SHAPE,
        "decay_type": _SHAPE,
        "min_lr_ratio": _SHARE,
        "num_cycles": _ABOVE_ZERO,
    },
}
"""Schedule to the options that it takes, each with its check."""


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes over a run.

    Attributes:
        name: one of :data:`ScheduleName`.
        warmup_rounds: rounds over which the rate rises first, fractions of one too. The first step
            of a warm-up has rate 0, except in ``"cosine_warmup_with_min_lr"``.
        options: further arguments of transformers' schedule; ``"warmup_stable_decay"`` takes
            ``decay_rounds`` in place of its numbers of steps.

    Raises:
        FedcoreError: an unknown name or option, a value out of range, an option that the schedule
            needs, or a warm-up of a schedule without one.

    Example:
        >>> Schedule("cosine", warmup_rounds=0.5).factors(rate=1.0, rounds=2, steps=4)(5)
        0.5
    """

    name: str = "constant"
    warmup_rounds: float = 0.0
    options: Mapping[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choice("", "schedule", self.name, OPTIONS)
        number("", "warmup_rounds", self.warmup_rounds, least=0)
        if self.name == "constant" and self.warmup_rounds:
            raise FedcoreError(
                f"warmup_rounds is {self.warmup_rounds:g} with schedule 'constant'; pass schedule "
                "'constant_with_warmup'"
            )
        known = OPTIONS[self.name]
        for option, value in self.options.items():
            if option not in known:
                if not known:
                    raise FedcoreError(
                        f"schedule {self.name!r} takes no schedule_options, and {option!r} is set"
                    )
                raise unknown_name(f"key of schedule_options for {self.name!r}", option, known)
            known[option](f"schedule_options.{option}", value)
        if "min_lr" in known and len({"min_lr", "min_lr_rate"} & set(self.options)) != 1:
            raise FedcoreError(
                f"schedule {self.name!r} needs schedule_options.min_lr, a learning rate, or "
                "schedule_options.min_lr_rate, a fraction of the first one, and not both"
            )
        if "decay_rounds" in known and "decay_rounds" not in self.options:
            raise FedcoreError(f"schedule {self.name!r} needs schedule_options.decay_rounds")

    def check(self, rate: float, rounds: int) -> None:
        """Whether the schedule fits a learning rate and a number of rounds.

        Raises:
            FedcoreError: its warm-up, or warm-up and decay, are longer than the run, or its last
                rate is above the first.
        """
        decay = float(self.options.get("decay_rounds", 0))
        if self.warmup_rounds and self.warmup_rounds >= rounds:
            raise FedcoreError(
                f"warmup_rounds is {self.warmup_rounds:g} of {rounds} rounds; the rate would never "
                "be reached: pass fewer"
            )
        if self.warmup_rounds + decay > rounds:
            raise FedcoreError(
                f"warmup_rounds and schedule_options.decay_rounds are {self.warmup_rounds:g} and "
                f"{decay:g}, more than the {rounds} rounds; pass fewer"
            )
        for option in ("min_lr", "lr_end"):
            last = float(self.options.get(option, 0))
            if last > rate or (option == "lr_end" and option in self.options and last == rate):
                raise FedcoreError(
                    f"schedule_options.{option} is {last:g}, and the learning rate is {rate:g}; "
                    "pass a smaller one"
                )

    def factors(self, rate: float, rounds: int, steps: int) -> Callable[[int], float]:
        """Step of the run, from 0, to the number that learning rates are multiplied by.

        Args:
            rate: the adapter's learning rate; what options give as a rate is relative to it, also
                for parameters that train at another one.
            steps: steps of the client in a round, S.

        Raises:
            FedcoreError: as :meth:`check`.
            MissingExtraError: transformers is not installed.
        """
        self.check(rate, rounds)
        if self.name == "constant":
            return _one
        try:
            from transformers import get_scheduler
        except ImportError as error:
            raise missing_extra("transformers", "peft") from error
        options: dict[str, Any] = dict(self.options)
        if "decay_rounds" in options:
            options["num_decay_steps"] = int(options.pop("decay_rounds") * steps)
        if self.name == "polynomial":
            # Transformers ends at 1e-7 otherwise, which may be above the rate.
            options.setdefault("lr_end", 0.0)
        # Transformers reads the rate from an optimiser's defaults, which groups do not change.
        stand_in = torch.optim.SGD([torch.zeros(1)], lr=rate)
        made = get_scheduler(
            self.name,
            stand_in,
            num_warmup_steps=int(self.warmup_rounds * steps),
            num_training_steps=rounds * steps,
            scheduler_specific_kwargs=options,
        )
        factors: Callable[[int], float] = made.lr_lambdas[0]
        return factors


def enter_schedule(
    optimiser: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    rate: float,
    round: int,
    rounds: int,
    steps: int,
) -> LambdaLR:
    """A scheduler at the first step of ``round``; its ``step`` follows each of the optimiser's.

    It multiplies the learning rate that each parameter group has now. A constant schedule leaves
    every rate the bits it has.

    Args:
        optimiser: new, or with moments of an earlier round, at its full learning rates.
        rate: the adapter's learning rate.
        round: from 0.
        rounds: of the whole run.
        steps: of this client in this round; without any, the scheduler has nothing to follow.

    Raises:
        FedcoreError: a ``round`` that is not one of ``rounds`` where rates change with them, or as
            :meth:`Schedule.check`.
    """
    count("", "rounds", rounds, least=1)
    # Without a curve there is no end of it.
    count("", "round", round, least=0, most=None if schedule.name == "constant" else rounds - 1)
    steps = max(steps, 1)
    factors = schedule.factors(rate, rounds, steps)
    for group in optimiser.param_groups:
        group["initial_lr"] = group["lr"]
    return LambdaLR(optimiser, factors, last_epoch=round * steps - 1)


def _one(_: int) -> float:
    return 1.0
