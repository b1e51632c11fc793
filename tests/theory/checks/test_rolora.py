"""Wrong implementations that RoLoRA's checks are to notice."""

from dataclasses import replace

import numpy as np
import pytest

from fedcore_theory.checks.rolora import r01_exact_alternation as r1
from fedcore_theory.checks.rolora import r05_rank_r as r5
from fedcore_theory.checks.rolora import r11_block_descent as r11
from fedcore_theory.checks.rolora import r12_local_drift as r12
from fedcore_theory.checks.rolora import r13_padded_ranks as r13
from fedcore_theory.models.factors import ClientFactors
from fedcore_theory.rounds import server_round


def averages_both(uploads, start, round):
    other = ClientFactors(
        uploads.A + np.arange(len(uploads.A))[:, None, None], uploads.B, uploads.weights
    )
    return server_round("fedit", {"A": other.A, "B": other.B}, uploads.weights)


def forgets_the_weights(uploads, start, round):
    return r1.shipped(ClientFactors(uploads.A, uploads.B, np.ones(len(uploads.A))), start, round)


def holds_a_stale_factor(uploads, start, round):
    stale = ClientFactors(start.A * (1 + 1e-3), start.B * (1 + 1e-3), start.weights)
    return r1.shipped(uploads, stale, round)


def halves_the_frozen_factor_s_precision(uploads, start, round):
    half = [values.astype(np.float16).astype(float) for values in (start.A, start.B)]
    return r1.shipped(uploads, ClientFactors(*half, start.weights), round)


@pytest.mark.parametrize(
    "step",
    [
        averages_both,
        forgets_the_weights,
        holds_a_stale_factor,
        halves_the_frozen_factor_s_precision,
    ],
)
def test_r1_rejects(step):
    assert not r1.CHECK.run(2, step=step).holds


def transposed_gram(targets, A):
    """``(A A^T)`` where its inverse belongs; the same while A's rows are orthonormal."""
    return np.einsum("noi,ri,rs->nos", targets, A, A @ A.T)


def wrong_inverse(A):
    """``R^-1 A`` for ``R^-T A``."""
    return np.linalg.solve(np.linalg.qr(A.T).R, A)


@pytest.mark.parametrize(
    ("wrong", "red"),
    [
        ({"orthonormal": lambda A: A}, "iterations above the bound"),
        ({"orthonormal": wrong_inverse}, "least singular value of A before QR"),
        ({"heads": lambda targets, A: targets @ A.T / 2}, "iterations above the bound"),
        (
            {"heads": lambda targets, A: 2 * r5.least_squares(targets, A)},
            "iterations above the bound",
        ),
    ],
)
def test_r5_rejects(wrong, red):
    failed = [one.what for one in r5.CHECK.run(1, **wrong).measured if not one.holds]
    assert red in failed


def test_r5_does_not_notice_a_gram_that_is_not_inverted():
    assert r5.CHECK.run(1, heads=transposed_gram).holds
    wrong = {"heads": transposed_gram, "orthonormal": lambda A: 1.1 * r5.orthonormal_rows(A)}
    assert not r5.CHECK.run(1, **wrong).holds


class StaleStep:
    """The step size that the frozen factor of two rounds ago would have."""

    def __init__(self):
        self.seen = []

    def __call__(self, scale, frozen):
        self.seen.append(frozen)
        return r11.inverse_smoothness(scale, self.seen[max(0, len(self.seen) - 3)])


@pytest.mark.parametrize(
    "step_size",
    [
        lambda scale, frozen: scale * r11.inverse_smoothness(scale, frozen),
        lambda scale, frozen: 1.5 * r11.inverse_smoothness(scale, frozen),
        lambda scale, frozen: 1 / (scale * np.linalg.norm(frozen, 2)) / scale,
        StaleStep(),
    ],
    ids=["s for s^2", "half as much again", "norm not squared", "stale"],
)
def test_r11_rejects(step_size):
    failed = [one.what for one in r11.CHECK.run(1, step_size=step_size).measured if not one.holds]
    assert "rounds that lower F by less than eta/2 ||grad||^2" in failed


@pytest.mark.parametrize(
    "steps",
    [
        lambda case: np.concatenate([r12.local_steps(case)[1:], r12.local_steps(case)[-1:]]),
        lambda case: r12.local_steps(case) * len(case.centres),
        lambda case: r12.local_steps(replace(case, eta=-case.eta)),
        lambda case: np.repeat(r12.local_steps(case)[:, :1], len(case.centres), axis=1),
    ],
    ids=["K off by one", "summed", "wrong sign", "one client for all"],
)
def test_r12_rejects(steps):
    failed = [one.what for one in r12.CHECK.run(2, steps=steps).measured if not one.holds]
    assert "largest drift at K = 1" in failed


def divides_by_holders(A, B, previous):
    """Means over the clients that hold a rank: right for idle ones, wrong as a mean of products."""
    coverage = np.array(r13.COVERAGE)
    return r13.padded(A, B / coverage, previous)


def test_r13_rejects():
    kept = "shipped: largest change of an idle column's length"
    exact = "largest entry of a round's error"

    def failed(**wrong):
        return [one.what for one in r13.CHECK.run(1, **wrong).measured if not one.holds]

    assert failed(step=r13.padded) == [exact, kept]
    assert failed(step=divides_by_holders) == [exact]
    assert failed(naive=r13.shipped)[0].startswith("padding as values")
