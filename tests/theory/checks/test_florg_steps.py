"""Wrong implementations that the checks of FLoRG's server steps are to notice."""

from dataclasses import replace

import numpy as np
import pytest

from fedcore.methods.gram.florg import FlorgTruncated
from fedcore_kernels import procrustes
from fedcore_theory.checks.florg import g00_gradient as g0
from fedcore_theory.checks.florg import g01_four_forms as g1
from fedcore_theory.checks.florg import g02_stated_optimality as g2
from fedcore_theory.checks.florg import g03_truncated_step as g3
from fedcore_theory.checks.florg import g04_low_rank_gram as g4
from fedcore_theory.checks.florg import g05_bures_wasserstein as g5
from fedcore_theory.checks.florg import g06_drift_bounds as g6
from fedcore_theory.checks.florg import g07_sketched_drift as g7
from fedcore_theory.checks.florg import g08_covariance_split as g8
from fedcore_theory.models.gram_rounds import (
    gram_step,
    mean_factor,
    sketched,
    truncated,
    whitened,
)


def failed(outcome):
    return [one.what for one in outcome.measured if not one.holds]


def without_weights(case):
    return replace(case, weights=np.full(len(case.A), 1 / len(case.A)))


def doubled(case):
    """The round with weights that sum to 2; the shipped methods would normalise them."""
    return replace(case, weights=2 * case.weights)


def unaligned(case):
    return gram_step(FlorgTruncated(align=False), case)


def transposed(case):
    Til = unaligned(case)
    return (truncated(case) @ np.linalg.pinv(Til)).T @ Til


def rotation_only(case):
    Til = unaligned(case)
    return procrustes(Til, case.previous, rotation_only=True).numpy() @ Til


# G0


def misses_the_transpose(problem, A):
    return 2 * problem.scale * A @ (problem.left.T @ problem.residual(A) @ problem.right.T)


def squares_the_scale(problem, A):
    return problem.scale * problem.gradient(A)


def misses_half_of_the_batch(problem, A, inputs, output_gradients):
    X, V = inputs @ problem.right.T, output_gradients @ problem.left
    return 2 * problem.scale * (V @ A.T).T @ X


@pytest.mark.parametrize("gradient", [misses_the_transpose, squares_the_scale])
def test_g0_rejects(gradient):
    assert failed(g0.CHECK.run(1, gradient=gradient)) == [
        "relative error of s A (H + H^T)",
    ]


def test_g0_rejects_half_of_the_batch_form():
    assert not g0.CHECK.run(1, batch_gradient=misses_half_of_the_batch).holds


# G1


def stacks_weights_for_their_roots(case):
    F = (case.weights[:, None, None] * case.A).reshape(-1, case.width)
    left, _, right = np.linalg.svd(case.previous @ F.T, full_matrices=False)
    return left @ right @ F


def inverts_instead_of_the_root(case):
    product = case.previous @ case.gram
    return np.linalg.solve(product @ case.previous.T, product)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": stacks_weights_for_their_roots},
        {"batch": lambda case: sketched(without_weights(case))},
        {"batch": mean_factor},
        {"batch": truncated},
        {"whitened": lambda case: whitened(without_weights(case))},
        {"closed": inverts_instead_of_the_root},
        {"plain_stream": lambda case: g1.plain_stream(without_weights(case))},
        {"plain_stream": lambda case: g1.plain_stream(doubled(case))},
    ],
    ids=[
        "w for sqrt(w)",
        "equal weights",
        "mean of A",
        "truncated",
        "equal weights in Z",
        "K^-1",
        "equal weights in Y",
        "weights that sum to 2",
    ],
)
def test_g1_rejects(wrong):
    assert any("from the rule" in what for what in failed(g1.CHECK.run(2, **wrong)))


# G2


def nearest(Til, previous):
    return g2.descend(g2.stated(Til, previous), Til, previous, 100)[0]


def turns_the_leading_rows(Til, previous):
    turn = np.zeros((len(previous), len(Til)))
    turn[:, : len(previous)] = procrustes(Til[: len(previous)], previous).numpy()
    return turn


def test_g2_sees_that_a_nearest_factor_is_nearest():
    found = failed(g2.CHECK.run(2, alignment=nearest))
    assert "squared distance after descent / of the rule" in found


def test_g2_rejects_another_rule():
    assert "florg.sketched against O Til, relative" in failed(
        g2.CHECK.run(1, alignment=turns_the_leading_rows)
    )


# G3


@pytest.mark.parametrize("step", [unaligned, transposed, rotation_only])
def test_g3_rejects_although_the_gram_is_right(step):
    # Half of the optimal alignments are reflections: some round of eight has one.
    found = failed(g3.CHECK.run(8, step=step))
    assert "rounds whose A A_prev^T is not symmetric and positive" in found
    assert "||Q - A^T A||_F against the tail, relative to Q" not in found


@pytest.mark.parametrize("step", [sketched, mean_factor])
def test_g3_rejects_another_gram(step):
    assert "||Q - A^T A||_F against the tail, relative to Q" in failed(g3.CHECK.run(1, step=step))


# G4


def inverts_a_singular_matrix(case):
    uploads = (case.previous @ case.A.transpose(0, 2, 1)) @ case.A
    Y = np.einsum("n,nrk->rk", case.weights, uploads)
    values, vectors = np.linalg.eigh(Y @ case.previous.T)
    return (vectors / np.sqrt(np.abs(values))) @ vectors.T @ Y


def raises_eigenvalues_to_a_floor(case):
    values, vectors = np.linalg.eigh(case.gram)
    floored = np.maximum(values[-case.rank :], 1e-8 * values[-1])
    Til = np.sqrt(floored)[:, None] * vectors[:, -case.rank :].T
    return procrustes(Til, case.previous).numpy() @ Til


@pytest.mark.parametrize(
    "wrong",
    [
        {"plain_stream": inverts_a_singular_matrix},
        {"truncated": raises_eigenvalues_to_a_floor},
        {"truncated": unaligned},
        {"sketched": mean_factor},
        {"whitened": lambda case: whitened(without_weights(case))},
    ],
    ids=["inverse of singular K", "eigenvalue floor", "unaligned", "mean of A", "equal weights"],
)
def test_g4_rejects(wrong):
    assert not g4.CHECK.run(2, **wrong).holds


# G5


@pytest.mark.parametrize("step", [unaligned, transposed, rotation_only, mean_factor])
def test_g5_rejects(step):
    assert "drift^2 of truncated - d_BW^2, relative" in failed(g5.CHECK.run(6, truncated=step))


def test_g5_rejects_a_mean_as_the_sketched_step():
    assert "drift^2 of sketched - d_BW^2, relative" in failed(g5.CHECK.run(1, sketched=mean_factor))


# G6


@pytest.mark.parametrize("step", [unaligned, transposed, rotation_only])
def test_g6_rejects(step):
    found = failed(g6.CHECK.run(20, truncated=step))
    assert "cases against drift^2 <= 4 rms^2, truncated" in found


def test_g6_rejects_truncated_as_the_sketched_step():
    found = failed(g6.CHECK.run(40, sketched=truncated))
    assert "cases against drift^2 <= rms^2, sketched" in found


def test_a_mean_keeps_every_drift_bound():
    # It moves less than its clients, so that only the examples know it from a Gram step.
    found = failed(g6.CHECK.run(40, sketched=mean_factor))
    assert found == ["sketched, A_n at (0, 1), (1.0001, 0): drift^2 / rms^2"]


# G7 and G8


@pytest.mark.parametrize(
    "step", [truncated, mean_factor, lambda case: sketched(without_weights(case))]
)
def test_g7_rejects(step):
    assert not g7.CHECK.run(1, step=step).holds


@pytest.mark.parametrize(
    "step", [truncated, sketched, lambda case: mean_factor(without_weights(case))]
)
def test_g8_rejects(step):
    found = failed(g8.CHECK.run(1, step=step))
    assert "Q - A^T A - sum w dA^T dA, relative to Q" in found
