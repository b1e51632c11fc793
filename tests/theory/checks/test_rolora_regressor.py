"""Wrong iterations on the linear regressor that RoLoRA's checks are to notice."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from fedcore_theory.checks.rolora import (
    r02_one_step,
    r03_contraction,
    r03x_step_size,
    r04_tangent_recursion,
    r06_recovery,
    r07_head_noise,
    r08_gradient_lemma,
    r09_heterogeneous_heads,
    r10_blind_spot,
)
from fedcore_theory.models.regressor import (
    Regression,
    alternate,
    averaged_heads,
    client_gradients,
    client_heads,
    covariances,
    next_tangent,
)

R2, R3, R3X, R4 = (
    module.CHECK
    for module in (r02_one_step, r03_contraction, r03x_step_size, r04_tangent_recursion)
)
R6, R7, R8, R9, R10 = (
    module.CHECK
    for module in (
        r06_recovery,
        r07_head_noise,
        r08_gradient_lemma,
        r09_heterogeneous_heads,
        r10_blind_spot,
    )
)


def red(check, repetitions=1, **implementations):
    """What a check holds against an implementation."""
    outcome = check.run(repetitions, **implementations)
    return [one.what for one in outcome.measured if not one.holds]


def half_gradients(problem, a, b):
    return client_gradients(problem, a, b) / 2


def summed_gradients(problem, a, b):
    return len(problem.heads) * client_gradients(problem, a, b)


def ascent(problem, a, b):
    return -client_gradients(problem, a, b)


def no_gradients(problem, a, b):
    return 0 * client_gradients(problem, a, b)


def ridge_gradients(problem, a, b):
    return client_gradients(problem, a, b) + 0.3 * (b @ b) * (a - 2 * problem.truth @ a * a)


def own_heads_gradients(problem, a, b):
    """Every client with its own solution instead of the broadcast."""
    own = client_heads(problem, a)
    every = [client_gradients(problem, a, head)[n] for n, head in enumerate(own)]
    return np.stack(every)


def summed_heads(problem, a):
    return len(problem.heads) * client_heads(problem, a)


def ridge_heads(problem, a):
    return client_heads(problem, a) / 1.3


half_gradient = partial(alternate, gradients=half_gradients)
summed_gradient = partial(alternate, gradients=summed_gradients)
wrong_sign = partial(alternate, gradients=ascent)
freezes_a = partial(alternate, gradients=no_gradients)
summed_head = partial(alternate, heads=summed_heads)
ridge_head = partial(alternate, heads=ridge_heads)
own_head = partial(alternate, gradients=own_heads_gradients)
not_scaled = partial(alternate, scaled=lambda moved: moved)


def scales_after_the_head(problem, a, eta):
    """Solves for b at an ``a`` of any length and steps from its direction."""
    solved = client_heads(problem, a)
    found = alternate(problem, a / np.linalg.norm(a), eta, heads=lambda problem, a: solved)
    return replace(found, a=found.moved)


class HeadOfThePreviousDirection:
    """Solves for b at the a before, from the second iteration of a run on."""

    def __init__(self):
        self.before = self.expected = None

    def __call__(self, problem, a, eta):
        continues = self.expected is not None and np.array_equal(a, self.expected)
        at = self.before if continues else a
        found = alternate(problem, a, eta, heads=lambda problem, _: client_heads(problem, at))
        self.before, self.expected = a, found.a
        return found


ABOVE = "iterations whose sine is above the bound"


@pytest.mark.parametrize(
    "iteration",
    [half_gradient, summed_gradient, wrong_sign, freezes_a, summed_head, ridge_head, not_scaled],
)
def test_r2_rejects(iteration):
    assert ABOVE in red(R2, iteration=iteration)


def test_r2_rejects_the_head_of_the_previous_direction():
    below = "iterations whose ||bbar||^2 is below its bound"
    assert below in red(R2, iteration=HeadOfThePreviousDirection())


@pytest.mark.parametrize("iteration", [summed_gradient, wrong_sign, freezes_a, summed_head])
def test_r3_rejects(iteration):
    assert "iterations above the bound" in red(R3, iteration=iteration)


@pytest.mark.parametrize("iteration", [half_gradient, not_scaled, HeadOfThePreviousDirection()])
def test_r3_has_too_much_room_to_notice_what_r4_does(iteration):
    assert R3.run(1, iteration=iteration).holds


def test_r3x_would_notice_if_the_printed_step_size_worked():
    share = "least share of iterations above the bound"
    assert share in red(R3X, iteration=half_gradient)
    assert "delta_t sqrt(8 t) at u = 1, t = 2,000" in red(
        R3X, recursion=lambda tangent, u: next_tangent(tangent, u / 2)
    )


@pytest.mark.parametrize(
    "iteration",
    [
        half_gradient,
        summed_gradient,
        summed_head,
        ridge_head,
        not_scaled,
        scales_after_the_head,
        HeadOfThePreviousDirection(),
    ],
)
def test_r4_rejects(iteration):
    assert "worst relative error of the tangent" in red(R4, iteration=iteration)


@pytest.mark.parametrize("iteration", [half_gradient, freezes_a])
def test_r6_rejects_too_slow(iteration):
    assert "iterations to 1e-3, less the upper bound" in red(R6, iteration=iteration)


def test_r6_rejects_too_fast():
    fast = partial(alternate, gradients=lambda p, a, b: 2 * client_gradients(p, a, b))
    assert "iterations to 1e-3, less the lower bound" in red(R6, iteration=fast)


def test_r6_rejects_the_head_of_the_iteration_before():
    assert "largest error of b a^T / (delta ||b*||)" in red(R6, head=lambda move: move.result.b)


@pytest.mark.parametrize(
    "wrong",
    [
        {"average": lambda heads, a: len(heads) * averaged_heads(heads, a)},
        {"average": lambda heads, a: averaged_heads(heads[:1], a)},
        {"heads": ridge_heads},
    ],
)
def test_r7_rejects(wrong):
    assert "std(Rbar) sqrt(N (m - 2))" in red(R7, **wrong)


@pytest.mark.parametrize("gradients", [half_gradients, summed_gradients, ascent])
def test_r8_rejects(gradients):
    what = "worst deviation / repaired right side at bbar = g"
    assert what in red(R8, gradients=gradients)


def test_r8_would_notice_a_gradient_without_noise():
    def population(problem, a, b):
        exact = np.broadcast_to(np.eye(a.size), problem.covariances.shape)
        return client_gradients(replace(problem, covariances=exact), a, b)

    assert "least deviation at bbar = g" in red(R8, gradients=population)


@pytest.mark.parametrize("iteration", [own_head, half_gradient, not_scaled])
def test_r9_rejects(iteration):
    assert "largest error of a sine against the exact one" in red(R9, iteration=iteration)


@pytest.mark.parametrize("factor", [7, 7 / 6], ids=["summed", "N - 1"])
def test_r9_rejects_another_spread(factor):
    def spread(heads):
        return factor * r09_heterogeneous_heads.head_spread(heads)

    assert red(R9, spread=spread) == [
        f"relative error of {name}'s loss" for name in ("FFA-LoRA", "RoLoRA")
    ]


def leaves_a_client_out(problem, a, eta):
    present = slice(max(1, len(problem.heads) - 1))
    heads, seen = problem.heads[present], problem.covariances[present]
    return alternate(replace(problem, heads=heads, covariances=seen), a, eta)


@pytest.mark.parametrize("iteration", [own_head, leaves_a_client_out])
def test_r10_rejects(iteration):
    assert "largest ||grad_a||" in red(R10, iteration=iteration)


def test_the_closed_forms_are_those_of_the_losses():
    random = np.random.default_rng(0)
    clients, rows, width, outputs = 3, 11, 4, 2
    X = random.standard_normal((clients, rows, width))
    truth = np.eye(width)[1]
    heads = random.standard_normal((clients, outputs))
    problem = Regression(truth, heads, X.swapaxes(1, 2) @ X / rows)
    a, b = random.standard_normal(width), random.standard_normal(outputs)

    def loss(n, a, b):
        return np.sum((X[n] @ (np.outer(truth, heads[n]) - np.outer(a, b))) ** 2) / rows

    for n in range(clients):
        solved = np.linalg.lstsq((X[n] @ a)[:, None], X[n] @ np.outer(truth, heads[n]))[0]
        np.testing.assert_allclose(client_heads(problem, a)[n], solved[0], rtol=1e-12)
        # A quadratic's central differences are exact.
        slopes = [(loss(n, a + e, b) - loss(n, a - e, b)) / 2 for e in np.eye(width)]
        np.testing.assert_allclose(client_gradients(problem, a, b)[n], slopes, rtol=1e-11)


def test_drawn_covariances_have_the_moments_of_normal_rows():
    rows, width, draws = 5, 3, 40_000
    found = covariances(np.random.default_rng(0), draws, rows, width)
    # Five standard errors: entries have variance 2/m on the diagonal, 1/m off it, and kurtosis < 9.
    variance = (1 + np.eye(width)) / rows
    assert (np.abs(found.mean(axis=0) - np.eye(width)) < 5 * np.sqrt(variance / draws)).all()
    assert (np.abs(found.var(axis=0) / variance - 1) < 5 * np.sqrt(8 / draws)).all()
