"""Differential privacy in a run: what it rules out, and what every client has spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from secrets import randbits

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.federation.records import CentralPrivacySpent, PrivacySpent
from fedcore.methods.base import Aggregate, Broadcast, Method
from fedcore.methods.requirements import NOISY_MEAN, SENDS_NO_STATISTICS, of_family, refuse
from fedcore.privacy import SecureSum
from fedcore.privacy.accounting import Spending, epsilon
from fedcore.privacy.central import noisy_mean
from fedcore.privacy.keyed_stream import SECRET_BITS, KeyedStream
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
            clients of lower rank; a delta that permits publishing a whole example; an epsilon that
            the accountant cannot compute.
        MissingExtraError: Opacus is not installed.
    """
    privacy = recipe.privacy
    if privacy.noise_multiplier is None:
        return
    needs = (SENDS_NO_STATISTICS, of_family(method.family))
    refuse(method, needs, "privacy.noise_multiplier, which adds noise to what was trained alone")
    if recipe.training.autocast:
        raise FedcoreError(
            "training.autocast is true with privacy.noise_multiplier: per-sample gradients are "
            "checked only in fp32; leave it at false"
        )
    if mixed_ranks:
        raise FedcoreError(
            "adapter.client_ranks differ with privacy.noise_multiplier: noise would fill the rows "
            "beyond a client's rank, which have to stay zero; give all clients one rank"
        )
    for client, examples in sorted(held.items()):
        if examples and privacy.delta >= 1 / examples:
            raise FedcoreError(
                f"privacy.delta is {privacy.delta:g} and {client} holds {examples} examples: "
                "such a delta permits publishing one of them unchanged; pass less than "
                f"{1 / examples:.2g}"
            )
    # What the accountant cannot compute should be known before the run, not at its end.
    local = recipe.local_settings(method)
    planned = {c: recipe.rounds * local.count_steps(count) for c, count in held.items()}
    _epsilons(recipe, held, planned)


def check_local(recipe: Recipe, engine: str) -> None:
    """Refuse privacy in an engine whose clients send their server more than noisy uploads.

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
    epsilons, known = {}, {}
    for client, count in sorted(steps.items()):
        if not count:
            epsilons[client] = 0.0
            continue
        rate = sampling_rate(size, held[client])
        spending = Spending(privacy.noise_multiplier, rate, count)
        if spending not in known:
            known[spending] = epsilon(spending, privacy.delta, privacy.accountant)
        epsilons[client] = known[spending]
    return epsilons


def check_central(recipe: Recipe, method: Method, mixed_ranks: bool) -> None:
    """Refuse a recipe whose rounds the accountant's mechanism does not describe.

    Raises:
        FedcoreError: a method that needs more than the mean of what was trained; secure sums, in
            which no single upload can be clipped; weights that differ between clients; clients of
            lower rank; a delta that permits revealing a client; an epsilon that the accountant
            cannot compute.
        MissingExtraError: Opacus is not installed.
    """
    central = recipe.privacy.central
    if central.noise_multiplier is None:
        return
    refuse(method, NOISY_MEAN, "privacy.central, which adds noise to the mean of what was trained")
    if recipe.round.secure_sum:
        raise FedcoreError(
            "round.secure_sum hides the single uploads that privacy.central has to clip; use "
            "one of the two"
        )
    if recipe.round.weighting != "uniform":
        raise FedcoreError(
            f"round.weighting is {recipe.round.weighting!r} with privacy.central, whose noise is "
            "for clients of equal weight; pass 'uniform'"
        )
    if mixed_ranks:
        raise FedcoreError(
            "adapter.client_ranks differ with privacy.central: a row that a client does not hold "
            "has no update to clip; give all clients one rank"
        )
    if recipe.privacy.delta >= 1 / recipe.clients:
        raise FedcoreError(
            f"privacy.delta is {recipe.privacy.delta:g} for {recipe.clients} clients: such a delta "
            f"permits revealing one of them; pass less than {1 / recipe.clients:.2g}"
        )
    _epsilon(recipe, recipe.rounds)


def aggregate_centrally(
    recipe: Recipe, method: Method, cohort: Cohort, previous: Broadcast
) -> Aggregate:
    """The method's result from the noisy mean of the uploads, also where there are none."""
    central, layout = recipe.privacy.central, cohort.layout
    assert central.noise_multiplier is not None, "the caller has looked"
    mean = noisy_mean(
        cohort.updates,
        previous.layout.gather(previous.row, layout),
        layout,
        max_norm=central.max_norm,
        noise_multiplier=central.noise_multiplier,
        expected=recipe.round.participation * recipe.clients,
        stream=_stream(recipe, "central noise", cohort.round),
    )
    return method.from_mean(mean, layout, previous)


def poisson_sample(recipe: Recipe, clients: tuple[str, ...], round: int) -> tuple[str, ...]:
    """The clients of ``round``, each drawn on its own, as the accountant assumes; maybe nobody."""
    draws = _stream(recipe, "central sample", round).uniform((len(clients),)).tolist()
    rate = recipe.round.participation
    return tuple(c for c, draw in zip(sorted(clients), draws, strict=True) if draw < rate)


def central_record(recipe: Recipe, rounds: int) -> CentralPrivacySpent | None:
    """What a record says after so many rounds; None without central privacy."""
    privacy = recipe.privacy
    if privacy.central.noise_multiplier is None:
        return None
    return CentralPrivacySpent(
        accountant=privacy.accountant,
        delta=privacy.delta,
        noise_multiplier=privacy.central.noise_multiplier,
        max_norm=privacy.central.max_norm,
        noise=privacy.noise,
        sampling_rate=recipe.round.participation,
        rounds=rounds,
        epsilon=_epsilon(recipe, rounds),
    )


def _stream(recipe: Recipe, purpose: str, round: int) -> KeyedStream:
    seed = randbits(SECRET_BITS) if recipe.privacy.noise == "secret" else recipe.seed
    return KeyedStream(seed, purpose, round)


def _epsilon(recipe: Recipe, rounds: int) -> float:
    privacy = recipe.privacy
    assert privacy.central.noise_multiplier is not None, "the caller has looked"
    spending = Spending(privacy.central.noise_multiplier, recipe.round.participation, rounds)
    return epsilon(spending, privacy.delta, privacy.accountant)


def aggregate_securely(method: Method, cohort: Cohort, previous: Broadcast, seed: int) -> Aggregate:
    """The method's result from masked uploads.

    Every client masks its row, the server adds up what arrives, and :meth:`Method.from_mean` is all
    that sees the outcome. Clients that did not report are not in the cohort: the round is that of
    the others, and one without any keeps the global state.

    Args:
        seed: of masks and stochastic rounding.

    Raises:
        FedcoreError: fewer than two clients, whose sum would hide nothing; weights that are not
            whole numbers; a method that needs more than the mean.
    """
    if not len(cohort):
        return method.aggregate(cohort, previous)
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
