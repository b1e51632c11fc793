"""Wrong implementations that the checks of FLoRG's training and rounds are to notice."""

from dataclasses import replace

import numpy as np
import pytest

from fedcore.methods.gram.florg import FlorgTruncated
from fedcore_theory.checks.florg import g09_gauge_invariance as g9
from fedcore_theory.checks.florg import g10_one_local_step as g10
from fedcore_theory.checks.florg import g11_noise_inflation as g11
from fedcore_theory.checks.florg import g12_one_round_orders as g12
from fedcore_theory.checks.florg import g13_nystrom as g13
from fedcore_theory.checks.florg import g20_server_rules as g20
from fedcore_theory.models.graded_rounds import polar_factor
from fedcore_theory.models.gram_rounds import gram_of, gram_step, orthogonal
from fedcore_theory.models.gram_training import step


def red(outcome):
    """What came out wrong, in one text."""
    return "; ".join(one.what for one in outcome.measured if not one.holds)


def unturned(case):
    return gram_step(FlorgTruncated(align=False), case)


def turned_the_other_way(case):
    found = unturned(case)
    return polar_factor(case.previous @ found.T).T @ found


def inverse_for_inverse_root(case):
    K = case.previous @ case.gram @ case.previous.T
    return np.linalg.solve(K, case.previous @ case.gram)


def mean_of_factors(case):
    return gram_step("florg.avg_a", case)


# G9: training


def clips_entry_by_entry(A, gradient, moments, optimiser):
    limit = min(optimiser.clip, 0.2)
    return step(A, np.clip(gradient, -limit, limit), moments, optimiser)


class KeepsStateInSilence:
    def __init__(self):
        self.held = None

    def __call__(self, A, gradient, moments, optimiser):
        fresh = self.held is None or optimiser.momentum == 0
        A, self.held = step(A, gradient, moments if fresh else self.held, optimiser)
        return A, self.held


def rotates_the_columns(turn):
    right = g9.shipped(turn)

    def server(case):
        found = right(case)
        return found @ polar_factor(found.T @ case.previous) if turn == g9.ALIGNED else found

    return server


def rounds_its_entries(turn):
    right = g9.shipped(turn)
    return lambda case: right(case).astype(np.float16).astype(float)


@pytest.mark.parametrize("stepper", [clips_entry_by_entry, KeepsStateInSilence()])
def test_g9_rejects_the_training(stepper):
    assert "SGD and like it" in red(g9.CHECK.run(1, stepper=stepper, rounds=20))


@pytest.mark.parametrize("servers", [rotates_the_columns, rounds_its_entries])
def test_g9_rejects_the_server(servers):
    assert "SGD and like it" in red(g9.CHECK.run(1, servers=servers, rounds=20))


def test_g9_needs_an_optimiser_that_sees_the_turn():
    def disabled(A, gradient, moments, optimiser):
        plain = replace(optimiser, rule="sgd", momentum=0.0)
        return step(A, gradient, moments, plain)

    failed = red(g9.CHECK.run(1, stepper=disabled, rounds=20))
    assert "AdamW, reset" in failed
    assert "AdamW, kept" in failed
    assert "momentum, kept" in failed


def test_g9_cannot_tell_grams_from_means_nor_a_turn_from_its_inverse():
    # Both commute with turns, so SGD runs say nothing about either.
    def means(turn):
        random = np.random.default_rng(5)
        if turn == g9.ALIGNED:
            return mean_of_factors
        return lambda case: orthogonal(random, case.rank) @ mean_of_factors(case)

    def inverse(turn):
        return turned_the_other_way if turn == g9.ALIGNED else g9.shipped(turn)

    for servers in (means, inverse):
        outcome = g9.CHECK.run(1, servers=servers, rounds=20)
        assert outcome.measured[0].holds


# G10 to G13: one step, noise, orders, Nystrom


@pytest.mark.parametrize("server", [unturned, turned_the_other_way])
def test_g10_rejects_a_server(server):
    # One gradient step needs no turn, so a wrong one shows at once.
    assert "one step" in red(g10.CHECK.run(1, server=server))


def test_g10_rejects_a_gradient_without_its_transpose():
    def half(problem, A):
        return A @ (problem.left.T @ problem.residuals(A) @ problem.right.T)

    assert "asymmetry" in red(g10.CHECK.run(1, gradient=half))


def sums_over_clients(case):
    return case.gram * len(case.A)


def squares_the_weights(case):
    return np.einsum("n,nri,nrj->ij", case.weights**2, case.A, case.A)


def gram_of_the_mean(case):
    return gram_of(case.mean)


@pytest.mark.parametrize("gram", [sums_over_clients, squares_the_weights, gram_of_the_mean])
def test_g11_rejects_a_gram(gram):
    assert "tr Q" in red(g11.CHECK.run(10, gram=gram))


def test_g11_rejects_the_mean_of_factors_as_gram_aggregation():
    assert "truncated" in red(g11.CHECK.run(10, servers=lambda _: mean_of_factors))


@pytest.mark.parametrize("wrong", [mean_of_factors, inverse_for_inverse_root])
def test_g12_rejects(wrong):
    def servers(name):
        return wrong if name == "florg.sketched" else g12.shipped(name)

    assert "sketched" in red(g12.CHECK.run(1, servers=servers))


def gains_energy(case):
    return 1.01 * g13.sketched(case)


def sketches_with_the_first_factor(case):
    fixed = np.random.default_rng(0).standard_normal(case.previous.shape)
    return g13.sketched(replace(case, previous=fixed))


def test_g13_rejects():
    assert "gain of energy" in red(g13.CHECK.run(5, server=gains_energy))
    assert "||Q - A^T A||_2" in red(g13.CHECK.run(5, server=inverse_for_inverse_root))
    assert "factor of the angle" in red(g13.CHECK.run(1, server=sketches_with_the_first_factor))
    # The best Gram is no sketch: it finds the space in one round.
    best = g13.CHECK.run(1, server=lambda case: gram_step("florg.truncated", case))
    assert "largest factor of the angle" in red(best)


# G20: losses


def test_g20_rejects_rules_that_lose_the_model():
    def sums(case):
        return mean_of_factors(case) * 1.1

    def stays(case):
        return case.previous

    def servers(wrong):
        return lambda rule: wrong if rule == "avg_a" else g20.shipped(rule)

    for wrong in (sums, stays):
        assert "largest final loss" in red(g20.CHECK.run(1, servers=servers(wrong)))
