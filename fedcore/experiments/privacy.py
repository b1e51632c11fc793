"""Differential privacy in a run: what it rules out, and what every client has spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from secrets import randbits

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.federation.records import CentralPrivacySpent, NoisySteps, PrivacySpent, Round
from fedcore.methods.base import Aggregate, Broadcast, Method
from fedcore.methods.requirements import (
    NOISY_MEAN,
    PART_OF_MODEL,
    SENDS_NO_STATISTICS,
    of_family,
    refuse,
)
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
        FedcoreError: the method releases something besides what DP-SGD trained, or trains the whole
            model; bf16 autocast;
            clients of lower rank; a delta that permits publishing a whole example; an epsilon that
            the accountant cannot compute.
        MissingExtraError: Opacus is not installed.
    """
    privacy = recipe.privacy
    if privacy.noise_multiplier is None:
        return
    needs = (SENDS_NO_STATISTICS, PART_OF_MODEL, of_family(method.family))
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
    for client, steps in sorted(planned.items()):
        if steps:
            _epsilon(recipe, [_steps(recipe, held[client], steps)])


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


def check_continued(recipe: Recipe, last: Round) -> None:
    """Refuse to continue a run whose rounds so far were private in another way than those to come.

    Args:
        last: the record of the last round.

    Raises:
        FedcoreError: a kind of noise was switched on or off, so no epsilon would cover the run.
    """
    privacy = recipe.privacy
    for key, was, now in (
        ("privacy.noise_multiplier", last.privacy, privacy.noise_multiplier),
        (
            "privacy.central.noise_multiplier",
            last.central_privacy,
            privacy.central.noise_multiplier,
        ),
    ):
        if last.done and (was is None) != (now is None):
            change = "lacks" if now is None else "has"
            raise FedcoreError(
                f"the recipe {change} {key}, and the rounds so far were run "
                f"{'without' if was is None else 'with'} it: no epsilon covers both; restore it"
            )


def privacy_record(
    recipe: Recipe,
    held: Mapping[str, int],
    private: Mapping[str, Mapping[str, Tensor]],
    before: PrivacySpent | None = None,
) -> PrivacySpent | None:
    """What a round's record says of privacy; None where clients train without it.

    ``epsilon`` maps each client to what it has spent since the run began, for any one of its
    examples; a client that never trained has spent 0.

    Args:
        before: what the record of the round before says.

    Raises:
        FedcoreError: a client has made fewer steps than were recorded before.
    """
    privacy = recipe.privacy
    if privacy.noise_multiplier is None:
        return None
    zero = torch.zeros((), dtype=torch.int64)
    steps = {client: int(private.get(client, {}).get(SPENT, zero)) for client in sorted(held)}
    history = {}
    for client, total in steps.items():
        earlier = _recorded(before, client, held[client], recipe)
        new = total - sum(kind.steps for kind in earlier)
        if new < 0:
            raise FedcoreError(
                f"{client} has made {total} noisy steps, fewer than were recorded before: its "
                "state is of an earlier round"
            )
        history[client] = _continued(earlier, _steps(recipe, held[client], new) if new else None)
    epsilons = {spent: _epsilon(recipe, spent) for spent in set(history.values())}
    return PrivacySpent(
        accountant=privacy.accountant,
        delta=privacy.delta,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        noise=privacy.noise,
        steps=steps,
        history=history,
        epsilon={client: epsilons[spent] for client, spent in history.items()},
    )


def _recorded(
    before: PrivacySpent | None, client: str, examples: int, recipe: Recipe
) -> tuple[NoisySteps, ...]:
    """What ``client`` had spent before the round."""
    if before is None:
        return ()
    count = before.steps.get(client, 0)
    if client in before.history or not count:
        return before.history.get(client, ())
    # Version 0.1 kept the sum of the steps alone.
    noise = before.noise_multiplier
    assert noise is not None, "a private round has noise"
    return (_steps(recipe, examples, count).model_copy(update={"noise_multiplier": noise}),)


def _steps(recipe: Recipe, examples: int, count: int) -> NoisySteps:
    """So many steps of a client by the recipe."""
    noise = recipe.privacy.noise_multiplier
    assert noise is not None, "the caller has looked"
    rate = sampling_rate(recipe.training.batch_size, examples)
    return NoisySteps(noise_multiplier=noise, sampling_rate=rate, steps=count)


def _continued(earlier: tuple[NoisySteps, ...], new: NoisySteps | None) -> tuple[NoisySteps, ...]:
    """``earlier`` and ``new``, as one where they are of one kind."""
    if new is None:
        return earlier
    if earlier:
        last = earlier[-1]
        if last.model_copy(update={"steps": new.steps}) == new:
            return (*earlier[:-1], new.model_copy(update={"steps": last.steps + new.steps}))
    return (*earlier, new)


def _epsilon(recipe: Recipe, spent: Sequence[NoisySteps]) -> float:
    kinds = [Spending(kind.noise_multiplier, kind.sampling_rate, kind.steps) for kind in spent]
    return epsilon(kinds, recipe.privacy.delta, recipe.privacy.accountant)


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
    _epsilon(recipe, [_rounds(recipe, recipe.rounds)])


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


def central_record(
    recipe: Recipe, rounds: int, before: CentralPrivacySpent | None = None
) -> CentralPrivacySpent | None:
    """What a record says after so many rounds; None without central privacy.

    Args:
        before: what the record of the round before says.
    """
    privacy = recipe.privacy
    if privacy.central.noise_multiplier is None:
        return None
    earlier = _recorded_rounds(before)
    new = rounds - sum(kind.steps for kind in earlier)
    history = _continued(earlier, _rounds(recipe, new) if new > 0 else None)
    return CentralPrivacySpent(
        accountant=privacy.accountant,
        delta=privacy.delta,
        noise_multiplier=privacy.central.noise_multiplier,
        max_norm=privacy.central.max_norm,
        noise=privacy.noise,
        sampling_rate=recipe.round.participation,
        rounds=rounds,
        history=history,
        epsilon=_epsilon(recipe, history),
    )


def _recorded_rounds(before: CentralPrivacySpent | None) -> tuple[NoisySteps, ...]:
    """What every client had spent before the round."""
    if before is None or before.history or not before.rounds:
        return () if before is None else before.history
    # Version 0.1 kept the number of the rounds alone.
    noise, rate = before.noise_multiplier, before.sampling_rate
    assert noise is not None, "a private round has noise"
    assert rate is not None, "a private round has a rate"
    return (NoisySteps(noise_multiplier=noise, sampling_rate=rate, steps=before.rounds),)


def _rounds(recipe: Recipe, count: int) -> NoisySteps:
    """So many rounds by the recipe."""
    noise = recipe.privacy.central.noise_multiplier
    assert noise is not None, "the caller has looked"
    return NoisySteps(noise_multiplier=noise, sampling_rate=recipe.round.participation, steps=count)


def _stream(recipe: Recipe, purpose: str, round: int) -> KeyedStream:
    seed = randbits(SECRET_BITS) if recipe.privacy.noise == "secret" else recipe.seed
    return KeyedStream(seed, purpose, round)


def aggregate_securely(
    method: Method, cohort: Cohort, previous: Broadcast, seed: int, min_cohort: int = 2
) -> Aggregate:
    """The method's result from masked uploads.

    Every client masks its row, the server adds up what arrives, and :meth:`Method.from_mean` is all
    that sees the outcome. Clients that did not report are not in the cohort: the round is that of
    the others, and one without any keeps the global state.

    Args:
        seed: of masks and stochastic rounding.
        min_cohort: the fewest clients of a sum.

    Raises:
        FedcoreError: fewer clients, whose sum would hide too little; weights that are not whole
            numbers; a method that needs more than the mean.
    """
    if not len(cohort):
        return method.aggregate(cohort, previous)
    # What a client of lower rank lacks it fills in itself: it holds the broadcast.
    full = method.completed(cohort, previous)
    total = SecureSum(full.layout, full.client_ids, cohort.round, seed, min_cohort=min_cohort)
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
