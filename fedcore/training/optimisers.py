"""The clients' optimisers, and carrying their state across rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fedcore.training.schedules import Schedule


@dataclass(frozen=True)
class OptimiserSettings:
    """How a client steps.

    ``state = "reset"`` starts every round afresh; ``"keep"`` carries moments and step counts of
    each client from one of its rounds to the next. ``head_rate`` is the learning rate of dense
    tensors (the head); the adapter's if None. ``schedule`` is what both follow over all rounds.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    rate: float = 1e-3
    head_rate: float | None = None
    weight_decay: float = 0.0
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    state: Literal["reset", "keep"] = "reset"
    schedule: Schedule = field(default_factory=Schedule)


def build_optimiser(
    parameters: Mapping[str, nn.Parameter],
    dense: frozenset[str],
    settings: OptimiserSettings,
    state: Mapping[str, Tensor] | None = None,
) -> torch.optim.Optimizer:
    """An optimiser over the named ``parameters``, continuing from ``state`` where it has any.

    Frozen factors are not among the parameters, so their moments are not advanced.
    """
    names = sorted(parameters)
    groups = [
        {"params": [parameters[n] for n in names if n not in dense], "lr": settings.rate},
        {
            "params": [parameters[n] for n in names if n in dense],
            "lr": settings.rate if settings.head_rate is None else settings.head_rate,
        },
    ]
    groups = [group for group in groups if group["params"]]
    optimiser: torch.optim.Optimizer
    if settings.name == "adamw":
        betas = (settings.beta1, settings.beta2)
        optimiser = torch.optim.AdamW(groups, betas=betas, weight_decay=settings.weight_decay)
    else:
        optimiser = torch.optim.SGD(
            groups, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    load_optimiser_state(optimiser, parameters, state or {})
    return optimiser


def load_optimiser_state(
    optimiser: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor],
) -> None:
    """Give ``parameters`` what :func:`optimiser_state` saved of them; other entries are left out.

    Moments go to a parameter's device; step counts stay where they were saved, on the CPU, as
    torch's optimisers have them.
    """
    for key, tensor in state.items():
        name, _, part = key.rpartition("/")
        if name in parameters:
            moved = tensor if part == "step" else tensor.to(parameters[name].device)
            optimiser.state[parameters[name]][part] = moved.clone()


def optimiser_state(
    optimiser: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    before: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The optimiser's tensors as ``name/field``; entries of ``before`` that did not train stay."""
    state = dict(before or {})
    for name, parameter in parameters.items():
        for part, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"{name}/{part}"] = value.detach().cpu().clone()
    return state
