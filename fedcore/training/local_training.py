"""One client's local training: some steps of an optimiser on the client's own examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcore.training.encoding import Examples
from fedcore.training.evaluation import prediction_loss
from fedcore.training.forward import Forward
from fedcore.training.optimisers import OptimiserSettings, build_optimiser, optimiser_state
from fedcore.training.schedules import enter_schedule


@dataclass(frozen=True)
class LocalSettings:
    """How much and how a client trains in a round.

    ``steps`` optimiser steps, or ``epochs`` passes over the client's examples if ``steps`` is None.
    ``clip_norm`` bounds the gradient's global norm. ``autocast`` computes in bf16 where the device
    supports it.
    """

    batch_size: int = 16
    steps: int | None = None
    epochs: int = 1
    clip_norm: float | None = 1.0
    autocast: bool = False

    def count_steps(self, examples: int) -> int:
        """Optimiser steps of a client that holds so many examples; none without any."""
        if examples == 0:
            return 0
        if self.steps is not None:
            return self.steps
        return self.epochs * -(-examples // self.batch_size)


@dataclass(frozen=True)
class LocalResult:
    """What a client's round of training left: mean loss, examples seen, and optimiser state."""

    loss: float
    steps: int
    state: Mapping[str, Tensor]


def train_client(
    forward: Forward,
    examples: Examples,
    indices: Tensor,
    parameters: Mapping[str, nn.Parameter],
    dense: frozenset[str],
    settings: LocalSettings,
    optimiser_settings: OptimiserSettings,
    *,
    seed: int,
    round: int = 0,
    rounds: int = 1,
    state: Mapping[str, Tensor] | None = None,
    on_step: Callable[[float], None] | None = None,
) -> LocalResult:
    """Train ``parameters`` on ``examples[indices]``.

    Batches are drawn by shuffled passes over the client's examples, seeded by ``seed`` as dropout
    is; nothing is left in the global generator. A client without examples makes no step.

    Args:
        forward: computes logits for example indices; puts the model into training mode.
        parameters: slot name to parameter; exactly these are stepped.
        dense: names of those that are not factors.
        round, rounds: which round of how many this is, from 0; where the schedule is entered.
        state: the client's optimiser state of an earlier round, to be continued.
        on_step: called with the loss after every step.

    Returns:
        The mean loss over the steps (``nan`` without any), the steps made, and the optimiser state
        if it is to be kept.
    """
    keep = optimiser_settings.state == "keep"
    optimiser = build_optimiser(parameters, dense, optimiser_settings, state if keep else None)
    steps = settings.count_steps(len(indices))
    schedule, rate = optimiser_settings.schedule, optimiser_settings.rate
    scheduler = enter_schedule(
        optimiser, schedule, rate=rate, round=round, rounds=rounds, steps=steps
    )
    losses = []
    forward.train()
    with torch.random.fork_rng(devices=forward.random_devices()):
        torch.manual_seed(seed)
        batches = _batches(indices, settings.batch_size, steps, seed)
        for batch in batches:
            with forward.autocast() if settings.autocast else nullcontext():
                logits = forward(batch)
            loss = prediction_loss(logits, examples.targets(batch))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if settings.clip_norm is not None:
                nn.utils.clip_grad_norm_(list(parameters.values()), settings.clip_norm)
            optimiser.step()
            scheduler.step()
            losses.append(loss.detach())
            if on_step is not None:
                on_step(float(losses[-1]))
    mean = float(torch.stack(losses).mean()) if losses else float("nan")
    after = optimiser_state(optimiser, parameters, state) if keep else {}
    return LocalResult(mean, len(losses), after)


def _batches(indices: Tensor, size: int, steps: int, seed: int) -> list[Tensor]:
    """``steps`` batches from shuffled passes over ``indices``; a pass's last batch may be short."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    while len(batches) < steps:
        order = indices[torch.randperm(len(indices), generator=generator)]
        batches.extend(order.split(size))
    return batches[:steps]
