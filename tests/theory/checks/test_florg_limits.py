"""Wrong implementations that the checks of Gram adapters' ranks and precision are to notice."""

from dataclasses import replace

import numpy as np
import pytest

from fedcore_kernels import whitened_basis, whitened_step, whitened_upload
from fedcore_theory.checks.florg import g14_positive_restriction as g14
from fedcore_theory.checks.florg import g15_starts_and_ranks as g15
from fedcore_theory.checks.florg import g16_eigenvalue_floor as g16
from fedcore_theory.checks.florg import g17_single_precision as g17
from fedcore_theory.checks.florg import g18_mixed_ranks as g18
from fedcore_theory.checks.florg import g19_streaming_forms as g19
from fedcore_theory.models.graded_rounds import best_gram, sketched_gram
from fedcore_theory.models.gram_training import GramProblem, step


def red(outcome):
    """What came out wrong, in one text."""
    return "; ".join(one.what for one in outcome.measured if not one.holds)


# G14 to G16: what a Gram can be


def largest_modulus(update, rank):
    values = np.linalg.eigvalsh((update + update.T) / 2)
    return float(np.sort(values**2)[::-1][:rank].sum())


def symmetrises_without_halving(update, rank):
    return g14.positive_part(2 * update, rank)


def any_singular_value(update, rank):
    return float((np.linalg.svd(update, compute_uv=False)[:rank] ** 2).sum())


@pytest.mark.parametrize("kept", [largest_modulus, symmetrises_without_halving, any_singular_value])
def test_g14_rejects(kept):
    failed = red(g14.CHECK.run(1, kept=kept))
    assert "full rank" in failed
    assert "descent" in failed


def signs_of_gradients(A, gradient, moments, optimiser):
    return A - optimiser.rate * np.sign(gradient), moments


def test_g15_rejects():
    assert "under SGD" in red(g15.CHECK.run(1, stepper=signs_of_gradients))

    def offset(problem, A):
        return GramProblem.gradient(problem, A + 1e-3)

    assert "A = 0" in red(g15.CHECK.run(1, gradient=offset))

    def disabled(A, gradient, moments, optimiser):
        return step(A, gradient, moments, replace(optimiser, rule="sgd"))

    assert "AdamW" in red(g15.CHECK.run(1, stepper=disabled))
    # Rank does come back under `truncated`, and under nothing that keeps A_prev's.
    assert "truncated" in red(g15.CHECK.run(1, servers=lambda _: g15.shipped("florg.avg_a")))


def adds_under_the_root(case):
    values, vectors = np.linalg.eigh(case.gram)
    kept = np.maximum(values[::-1][:4], 0) + 1e-8
    return np.sqrt(kept)[:, None] * vectors.T[::-1][:4]


@pytest.mark.parametrize("wrong", [g16.floored, adds_under_the_root])
def test_g16_rejects(wrong):
    failed = red(g16.CHECK.run(1, step=wrong))
    assert "row in a null direction, zeroing" in failed
    assert "added by zeroing" in failed


def test_g16_notices_a_control_that_has_no_floor():
    assert "with the floor" in red(g16.CHECK.run(1, control=g16.shipped))


# G17 to G19: precision and ranks


def test_g17_rejects_single_precision_and_a_table_that_is_not_of_it():
    squares = g17.SINGLE["truncated, Gram Q"]
    double = {name: best_gram if "tru" in name else sketched_gram for name in g17.SINGLE}
    failed = red(
        g17.CHECK.run(1, truncated=squares, sketched=g17.SINGLE["sketched, batch"], single=double)
    )
    assert "truncated, shipped" in failed
    assert "sketched, shipped" in failed
    assert "table" in failed


def leading_rows(case, rank):
    return g18.shipped(case, 6)[:rank]


def one_rank_short(case, rank):
    found = g18.shipped(case, rank)
    return found * (np.linalg.norm(found, axis=1) > np.linalg.norm(found, axis=1).min())[:, None]


def not_turned(case, rank):
    values, vectors = np.linalg.eigh(case.gram)
    return np.sqrt(values[::-1][:rank])[:, None] * vectors.T[::-1][:rank]


def ignores_the_weights(case, rank):
    return g18.shipped(replace(case, weights=np.full(6, 1 / 6)), rank)


@pytest.mark.parametrize("receive", [leading_rows, one_rank_short, ignores_the_weights])
def test_g18_rejects_a_gram(receive):
    assert "error against the tail" in red(g18.CHECK.run(2, receive=receive))


def test_g18_rejects_a_gauge():
    failed = red(g18.CHECK.run(2, receive=not_turned))
    assert "asymmetry" in failed
    assert "error against" not in failed


def streamed(T, V, uploads, case, eps_rel=1e-12):
    total = sum(weight * Z for weight, Z in zip(case.weights, uploads, strict=True))
    return whitened_step(total, T, V, eps_rel).factor[0].numpy()


def casts_the_basis_alone(case, wire):
    T, V = whitened_basis(case.previous[None])
    V = V.half().double()
    return streamed(T, V, [whitened_upload(A[None], V).numpy() for A in case.A], case)


def mixes_two_factorisations(case, wire):
    T, V = whitened_basis(case.previous[None])
    other = np.linalg.qr(case.previous.T)[0].T[None]
    return streamed(T, V, [whitened_upload(A[None], other).numpy() for A in case.A], case)


def keeps_null_directions(case, wire):
    T, V = whitened_basis(case.previous[None])
    return streamed(T, V, [whitened_upload(A[None], V).numpy() for A in case.A], case, 0.0)


def halves_the_wire(case, wire):
    return g19.shipped(case, np.float16 if wire == np.float32 else wire)


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (casts_the_basis_alone, "largest error"),
        (mixes_two_factorisations, "condition 1"),
        (keeps_null_directions, "directions of A_prev lost"),
        (halves_the_wire, "largest error"),
    ],
)
def test_g19_rejects_a_stream(wrong, where):
    assert where in red(g19.CHECK.run(1, whitened=wrong))


def test_g19_rejects_plain_uploads_without_the_root():
    def inverse(case, wire):
        K = case.previous @ case.gram @ case.previous.T
        return np.linalg.solve(K, case.previous @ case.gram)

    assert "condition 1" in red(g19.CHECK.run(1, plain=inverse))


def test_g19_rejects_plain_uploads_in_place_of_whitened_ones():
    assert "largest error" in red(g19.CHECK.run(1, whitened=g19.plain_stream))
