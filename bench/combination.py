"""FLoRA-NA's coefficients: alternating least squares, and Adam to the same objective.

Both find ``p`` and ``q`` of all modules at once. Ours is what the method runs: Gram blocks, three
starts, and sweeps until none gains; Adam has one start, the shares, and the best of three learning
rates, whose search is not counted. It is stopped where its objective is ours up to
:data:`CLOSENESS` of ``||M||^2`` and all but :data:`REST` of what ours took off the means' product:
around a common start the means alone would pass the first.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.baselines.adam_combination import (
    Search,
    adam_combination,
    best_rate,
    factor_loss,
    gram_loss,
)
from bench.case import Case, Other, Ours
from fedcore.methods.lora.flora_na.objective import PairObjective
from fedcore.methods.lora.flora_na.solver import Combination, nearest_combination
from fedcore_kernels import block_grams

FAMILIES = (
    "common start",
    "first round",
    "one direction",
    "unrelated",
    "own scales",
    "own rotations",
)
"""How the clients differ: around a common pair; B from zero; along one direction of both factors;
in everything; around a common pair and in scale and sign, or in rotation.
"""

CLIENTS, RANK, WIDTH = 10, 4, 1024
"""Of a round: of RoBERTa-large's size, with B and A alike."""

DRIFT = 0.3
"""Size of what is a client's own, relative to what is common."""

CLOSENESS, REST = 1e-6, 1e-3

CAP = 500
"""Steps after which Adam is stopped."""

TIMED = 25
"""Steps of Adam that are timed; all cost the same."""


def combination_case(
    family: str,
    modules: int,
    device: torch.device,
    *,
    width: int = WIDTH,
    cap: int = CAP,
) -> Case:
    """Factors of one of :data:`FAMILIES`, fp32; from the factors on, and from Gram blocks on."""
    left, right, shares = client_pairs(family, CLIENTS, modules, RANK, width, device)
    objective = PairObjective.build(block_grams(left), block_grams(right), shares)
    ours = nearest_combination(objective)
    search = best_rate(objective, goal(objective, ours), cap)
    start = shares.expand(modules, -1)
    steps = min(search.steps, TIMED)
    named = {
        f"Adam on {form}, {_outcome(objective, ours, search)}": Other(
            partial(adam_combination, loss, first, search.rate, steps), steps / search.steps
        )
        for form, loss, first in (
            ("factors", factor_loss(left, right, shares), start.to(left)),
            ("Gram blocks", partial(gram_loss, objective), start),
        )
    }
    on_factors, on_grams = named
    rows = CLIENTS * RANK
    # A sweep forms two curvatures and solves with each, from three starts; five are nominal.
    fitting = 5.0 * 3 * 2 * modules * (4 * CLIENTS**2 * RANK**2 + CLIENTS**3)
    operations = {
        "flora_na p and q": Ours(
            lambda: nearest_combination(
                PairObjective.build(block_grams(left), block_grams(right), shares)
            ),
            bytes=left.nbytes + right.nbytes,
            flops=fitting + 4 * modules * rows**2 * width,
            against=(on_factors,),
            backend="torch",
        ),
        "nearest_combination": Ours(
            lambda: nearest_combination(objective),
            bytes=objective.left.nbytes + objective.right.nbytes,
            flops=fitting,
            against=(on_grams,),
            backend="torch",
        ),
    }
    sizes = f"N={CLIENTS} L={modules} r={RANK} k={width}"
    return Case(f"FLoRA-NA, {family}, {sizes}", left.dtype, operations, named)


def goal(objective: PairObjective, ours: Combination) -> Tensor:
    """``f`` below which Adam has reached ``ours``, (L,)."""
    means = objective.shares.expand(len(objective.cross), 1, -1)
    gain = objective.value(means, means)[:, 0] - ours.value
    return ours.value + torch.minimum(CLOSENESS * objective.target, REST * gain)


def client_pairs(
    family: str, clients: int, modules: int, rank: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Left and right ``(N, L, r, k)`` in fp32 and shares ``(N,)`` in fp64, the same on every call.

    Args:
        family: one of :data:`FAMILIES`.
        clients, modules, rank, width: ``N, L, r, k``.
        device: of everything that is returned.
    """
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    along = normal(clients, modules, 1, 1)
    sides = []
    for is_left in (True, False):
        private = normal(clients, modules, rank, width)
        common, direction = normal(modules, rank, width), normal(modules, rank, width)
        if family == "unrelated" or (family == "first round" and is_left):
            side = private
        elif family == "one direction":
            side = common + along * direction + 0.1 * private
        else:
            side = common + DRIFT * private
        sides.append(side / width**0.5)
    left, right = sides
    if family == "own scales":
        scale = normal(clients, modules, 1, 1).exp() * normal(clients, modules, 1, 1).sign()
        left, right = left * scale, right / scale
    elif family == "own rotations":
        rotation = torch.linalg.qr(normal(clients, modules, rank, rank)).Q
        left, right = rotation.mT @ left, rotation.mT @ right
    shares = torch.linspace(0.5, 1.5, clients, dtype=torch.float64, device=device)
    return left, right, shares / shares.sum()


def _outcome(objective: PairObjective, ours: Combination, search: Search) -> str:
    """What Adam did and both objectives, mean over the modules and relative to ``||M||^2``.

    Modules in which Adam has been lower, at any rate, are counted too.
    """
    arrived, modules = int(search.arrived.sum()), len(search.arrived)
    steps = f"{search.steps:,} steps of {search.rate:g}"
    if arrived < modules:
        steps = f"{arrived} of {modules} modules there in {steps}"
    lower = int((search.lowest < ours.value - CLOSENESS * objective.target).sum())
    steps += f", lower than ours in {lower}" if lower else ""
    adam, solver = (float((f / objective.target).mean()) for f in (search.value, ours.value))
    return f"{steps}: f {adam:.4g}, ours {solver:.4g}"
