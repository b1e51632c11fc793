"""Wrong implementations that the checks of FFA-LoRA are to notice."""

import numpy as np
import pytest

from fedcore_theory.checks.ffa import a01_expected_loss as a1
from fedcore_theory.checks.ffa import a02_floor as a2
from fedcore_theory.checks.ffa import a03_smoothness as a3
from fedcore_theory.checks.ffa import a04_large_alpha as a4


def red(outcome):
    """What failed, in words; nothing that failed may be NaN."""
    assert all(np.isfinite(one.value) for one in outcome.measured)
    return [one.what for one in outcome.measured if not one.holds]


def pooled_least_squares(frozen, wanted):
    return (frozen * wanted).sum((1, 2)) / (frozen**2).sum((1, 2))


def summed_solutions(frozen, wanted):
    return frozen.shape[1] * a1.shipped(frozen, wanted)


def first_client_only(frozen, wanted):
    return a1.shipped(frozen[:, :1], wanted[:, :1])


@pytest.mark.parametrize("heads", [pooled_least_squares, summed_solutions, first_client_only])
def test_a1_rejects_other_aggregates(heads):
    assert red(a1.CHECK.run(1, heads=heads))[0].startswith("standard errors between mean")


@pytest.mark.parametrize(
    "excess",
    [
        lambda n, m: (n * (4 - m) - 2) / (n**2 * m * (m - 1)),
        lambda n, m: (n * (4 - m) - 2) / (n**2 * (m - 2)),
        lambda n, m: 0.0,
    ],
)
def test_a1_rejects_other_constants(excess):
    found = red(a1.CHECK.run(1, excess=excess))
    assert found == ["standard errors between mean and formula"]


def test_a2_rejects_a_projector_of_rows_that_are_not_orthonormal():
    def floor(wanted, frozen):
        return ((wanted - wanted @ frozen.transpose(0, 2, 1) @ frozen) ** 2).sum((1, 2))

    assert len(red(a2.CHECK.run(1, floor=floor))) == 2


def test_a2_rejects_the_other_side_s_width():
    found = red(a2.CHECK.run(1, share=lambda rank, d_out, d_in: 1 - rank / d_out))
    assert found == ["standard errors between mean floor and 1 - r/d_in"]


@pytest.mark.parametrize("weights", [lambda w: np.ones(len(w)), lambda w: np.sqrt(w)])
def test_a2_rejects_other_weights(weights):
    def product(wanted, shares, frozen):
        return a2.shipped(wanted, weights(shares), frozen)

    found = red(a2.CHECK.run(1, product=product))
    assert found == ["relative gap of the federation's loss to the floor"]


@pytest.mark.parametrize(
    "constant",
    [
        lambda A, s: s * 2 * np.linalg.norm(A, 2) ** 2,
        lambda A, s: s**2 * 2 * np.linalg.norm(A, 2),
        lambda A, s: s**2 * 2 * np.linalg.norm(A) ** 2,
        lambda A, s: s**2 * np.linalg.norm(A, 2) ** 2,
    ],
)
def test_a3_rejects_other_constants(constant):
    assert "distance from equality along the top direction" in red(
        a3.CHECK.run(1, constant=constant)
    )


def test_a3_rejects_a_gradient_that_forgets_the_scaling():
    def gradients(A, B, target, s):
        slope_A, slope_B = a3.gradients(A, B, target, s)
        return slope_A, slope_B / s

    assert red(a3.CHECK.run(1, gradients=gradients))


def test_a4_rejects_training_a():
    assert red(a4.CHECK.run(1, method="fedit"))[0].startswith("relative spread")


@pytest.mark.parametrize("power", [1, 1.9])
def test_a4_rejects_other_steps(power):
    found = red(a4.CHECK.run(1, step=lambda alpha: 0.02 / 100 * (10 / alpha) ** power))
    assert found[0].startswith("relative spread")


def test_a4_rejects_a_gradient_that_forgets_the_scaling():
    def gradients(A, B, targets, s):
        slope_A, slope_B = a4.gradients(A, B, targets, s)
        return slope_A / s, slope_B / s

    assert red(a4.CHECK.run(1, gradients=gradients))[0].startswith("relative spread")


def test_a4_rejects_a_scaling_with_the_root_of_alpha():
    def gradients(A, B, targets, s):
        return a4.gradients(A, B, targets, np.sqrt(s))

    assert red(a4.CHECK.run(1, gradients=gradients))
