"""Differential privacy of whole clients: what it rules out, its rounds, and what they spend."""

from __future__ import annotations

from secrets import randbits

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.federation.records import CentralPrivacySpent
from fedcore.methods import METHODS
from fedcore.methods.base import Aggregate, Broadcast, Method
from fedcore.privacy.accounting import Spending, epsilon
from fedcore.privacy.central import noisy_mean
from fedcore.privacy.keyed_stream import SECRET_BITS, KeyedStream
from fedcore.recipes import Recipe


def check_central(recipe: Recipe, method: Method, mixed_ranks: bool) -> None:
    """Refuse a recipe whose rounds the accountant's mechanism does not describe.

    Raises:
        FedcoreError: a method that needs more than the mean of what was trained; secure sums, of
            which no single upload can be cut; weights that are a client's own; clients of lower
            rank; a delta that allows to give a client away; an epsilon that the accountant cannot
            compute.
        MissingExtraError: Opacus is not installed.
    """
    central = recipe.privacy.central
    if central.noise_multiplier is None:
        return
    if not _means_of_factors(method):
        able = [m.name for m in METHODS if _means_of_factors(m)]
        raise FedcoreError(
            f"{method.name} does not follow from the mean of what its clients trained, to which "
            f"privacy.central adds its noise; these do: {', '.join(able)}"
        )
    if recipe.round.secure_sum:
        raise FedcoreError(
            "round.secure_sum hides the single uploads that privacy.central has to cut; use one"
        )
    if recipe.round.weighting != "uniform":
        raise FedcoreError(
            f"round.weighting is {recipe.round.weighting!r} with privacy.central, whose noise is "
            "for clients that count alike; pass 'uniform'"
        )
    if mixed_ranks:
        raise FedcoreError(
            "adapter.client_ranks differ with privacy.central: a row that a client does not hold "
            "has no update to cut; give all clients one rank"
        )
    if recipe.privacy.delta >= 1 / recipe.clients:
        raise FedcoreError(
            f"privacy.delta is {recipe.privacy.delta:g} for {recipe.clients} clients: such a delta "
            f"allows to give one of them away; pass less than {1 / recipe.clients:.2g}"
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


def _means_of_factors(method: Method | type[Method]) -> bool:
    return (
        method.traits.linear
        and method.uploads == "factors"
        and method.population == "clients"
        and not method.wants_features
    )


def _epsilon(recipe: Recipe, rounds: int) -> float:
    privacy = recipe.privacy
    assert privacy.central.noise_multiplier is not None, "the caller has looked"
    spending = Spending(privacy.central.noise_multiplier, recipe.round.participation, rounds)
    return epsilon(spending, privacy.delta, privacy.accountant)
