"""Differential privacy in a run: what it rules out, and what every client has spent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedcore.errors import FedcoreError
from fedcore.federation.records import PrivacySpent
from fedcore.methods import METHODS, Method
from fedcore.privacy.accounting import Spending, epsilon
from fedcore.recipes import Recipe
from fedcore.training.private_training import sampling_rate

SPENT = "private-steps"
"""The private tensor that holds how many noisy steps a client has made, int64 ``()``."""


def check_private(
    recipe: Recipe, method: Method, held: Mapping[str, int], mixed_ranks: bool
) -> None:
    """Refuse a private run whose epsilon would not say what it seems to say.

    Args:
        held: client id to the number of its training examples.
        mixed_ranks: whether clients differ in rank.

    Raises:
        FedcoreError: the method releases something besides what DP-SGD trained; bf16 autocast;
            clients of lower rank; a delta that allows to give an example away; an epsilon that the
            accountant cannot compute.
        MissingExtraError: Opacus is not installed.
    """
    privacy = recipe.privacy
    if privacy.noise_multiplier is None:
        return
    if method.wants_features:
        able = [m.name for m in METHODS if not m.wants_features and m.family == method.family]
        raise FedcoreError(
            f"{method.name} sends statistics of the clients' examples, to which privacy adds no "
            f"noise, so no epsilon would hold; these send what was trained alone: {', '.join(able)}"
        )
    if recipe.training.autocast:
        raise FedcoreError(
            "training.autocast is true with privacy.noise_multiplier: per-sample gradients are "
            "checked in fp32 alone; leave it at false"
        )
    if mixed_ranks:
        raise FedcoreError(
            "adapter.client_ranks differ with privacy.noise_multiplier: noise would fill the rows "
            "beyond a client's rank, which have to stay zero; give all clients one rank"
        )
    for client, examples in sorted(held.items()):
        if examples and privacy.delta >= 1 / examples:
            raise FedcoreError(
                f"privacy.delta is {privacy.delta:g} and {client} holds {examples} examples: such "
                f"a delta allows to publish one of them as it is; pass less than {1 / examples:.2g}"
            )
    # What the accountant cannot compute should be known before the run, not at its end.
    local = recipe.local_settings(method)
    planned = {c: recipe.rounds * local.count_steps(count) for c, count in held.items()}
    _epsilons(recipe, held, planned)


def check_local(recipe: Recipe, engine: str) -> None:
    """Refuse privacy in an engine whose clients tell their server more than noisy uploads.

    Raises:
        FedcoreError: the recipe asks for either kind of privacy.
    """
    privacy = recipe.privacy
    if privacy.noise_multiplier is not None or privacy.central.noise_multiplier is not None:
        raise FedcoreError(
            f"privacy needs engine = 'local': clients of {engine} report their training loss "
            "without noise, and its server neither counts their steps nor adds noise of its own"
        )


def steps_after(own: Mapping[str, Tensor], steps: int) -> Tensor:
    """What a client that kept ``own`` holds under :data:`SPENT` after so many steps more."""
    return own.get(SPENT, torch.zeros((), dtype=torch.int64)) + steps


def privacy_record(
    recipe: Recipe, held: Mapping[str, int], private: Mapping[str, Mapping[str, Tensor]]
) -> PrivacySpent | None:
    """What a round's record says of privacy; None where clients train without it.

    ``epsilon`` maps each client to what it has spent since the run began, for any one of its
    examples; a client that never trained has spent 0.
    """
    privacy = recipe.privacy
    if privacy.noise_multiplier is None:
        return None
    zero = torch.zeros((), dtype=torch.int64)
    steps = {client: int(private.get(client, {}).get(SPENT, zero)) for client in held}
    return PrivacySpent(
        accountant=privacy.accountant,
        delta=privacy.delta,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        noise=privacy.noise,
        steps=steps,
        epsilon=_epsilons(recipe, held, steps),
    )


def _epsilons(
    recipe: Recipe, held: Mapping[str, int], steps: Mapping[str, int]
) -> dict[str, float]:
    privacy, size = recipe.privacy, recipe.training.batch_size
    assert privacy.noise_multiplier is not None, "the caller has looked"
    found, known = {}, {}
    for client, count in sorted(steps.items()):
        if not count:
            found[client] = 0.0
            continue
        rate = sampling_rate(size, held[client])
        spending = Spending(privacy.noise_multiplier, rate, count)
        if spending not in known:
            known[spending] = epsilon(spending, privacy.delta, privacy.accountant)
        found[client] = known[spending]
    return found
