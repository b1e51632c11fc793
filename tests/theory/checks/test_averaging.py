"""Wrong implementations that the checks of FedAvg are to notice."""

import numpy as np
import pytest

from fedcore_theory.checks.averaging import v01_covariance as v1
from fedcore_theory.checks.averaging import v02_error_order as v2
from fedcore_theory.checks.averaging import v03_ranking as v3
from fedcore_theory.checks.averaging import v04_gauge as v4
from fedcore_theory.checks.averaging import v05_helmert as v5
from fedcore_theory.models.factors import ClientFactors
from fedcore_theory.models.local_training import Pairs, fit_slopes, local_steps
from fedcore_theory.rounds import server_round


def red(outcome):
    """What failed, in words."""
    return [one.what for one in outcome.measured if not one.holds]


def weights_forgotten(clients):
    return v1.shipped(ClientFactors(clients.A, clients.B, np.ones(len(clients.A))))


def roots_of_weights(clients):
    return v1.shipped(ClientFactors(clients.A, clients.B, np.sqrt(clients.weights)))


def summed(clients):
    return len(clients.A) * v1.shipped(clients)


def clients_shuffled(clients):
    return v1.shipped(ClientFactors(clients.A, clients.B, clients.weights[::-1]))


def mean_of_products(clients):
    return clients.mean_product


@pytest.mark.parametrize(
    "product",
    [weights_forgotten, roots_of_weights, summed, clients_shuffled, mean_of_products],
)
def test_v1_rejects(product):
    assert red(v1.CHECK.run(1, product=product))[0] == "largest entry off the centred form"


def with_kept_momentum(start, targets, step, steps):
    """Every client still has the velocity of an earlier round."""
    random = np.random.default_rng(1)
    velocity = Pairs(random.standard_normal(start.A.shape), random.standard_normal(start.B.shape))
    A, B = start
    for _ in range(steps):
        slopes = fit_slopes(A, B, targets)
        velocity = Pairs(0.9 * velocity.A + slopes.A, 0.9 * velocity.B + slopes.B)
        A, B = A - step * velocity.A, B - step * velocity.B
    return Pairs(A, B)


def test_v2_rejects_momentum_left_on():
    found = red(v2.CHECK.run(1, at_once=with_kept_momentum))
    assert "error at B = 0 after one step on both" in found
    assert "distance of the slope from 3: B = 0, 2 steps" in found


def test_v2_rejects_steps_in_turn_where_they_are_to_be_at_once():
    found = red(v2.CHECK.run(1, at_once=v2.sequential))
    assert found == ["error at B = 0 after one step on both"]


def test_v2_rejects_steps_at_once_where_they_are_to_be_in_turn():
    found = red(v2.CHECK.run(1, in_turn=v2.simultaneous))
    assert found == ["distance of the slope from 3: B = 0, 1 step on B, then A"]


def test_v2_rejects_a_frozen_a():
    def frozen(start, targets, step, steps):
        return Pairs(start.A, v2.simultaneous(start, targets, step, steps).B)

    assert "distance of the slope from 2: B not 0, 1 step" in red(v2.CHECK.run(1, at_once=frozen))


@pytest.fixture
def few_rounds(monkeypatch):
    """As many as alternation with several local steps needs; those with one step need more."""
    monkeypatch.setattr(v3, "_ROUNDS", 150)


def test_v3_rejects_averaging_both_factors_in_place_of_alternation(few_rounds):
    assert "RoLoRA, excess loss" in red(v3.CHECK.run(1, alternating="fedit"))


def test_v3_rejects_a_frozen_factor_in_place_of_alternation(few_rounds):
    assert "RoLoRA, excess loss" in red(v3.CHECK.run(1, alternating="ffa"))


def test_v3_rejects_an_exact_method_in_place_of_fedavg(few_rounds):
    found = red(v3.CHECK.run(1, averaging="fedex"))
    assert "FedAvg of both, aggregation error" in found


def test_v3_rejects_one_client_s_labels_for_all(few_rounds):
    def local(clients, start, trains, step, steps):
        first = np.broadcast_to(clients.heads[:1], clients.heads.shape)
        mistaken = type(clients)(clients.direction, first, clients.start)
        return local_steps(mistaken, start, trains, step, steps)

    assert "RoLoRA, excess loss" in red(v3.CHECK.run(1, local=local))


def test_v4_rejects_a_rule_that_turns_do_not_touch():
    def product(clients):
        uploads = {"A": clients.A, "B": clients.B}
        return server_round("product_svd", uploads, clients.weights).product

    assert red(v4.CHECK.run(1, product=product)) == ["growth of the relative error"]


def no_residual(clients):
    return server_round("fedit", {"A": clients.A, "B": clients.B}, clients.weights)


def forgets_the_weights(clients):
    return server_round("fedex", {"A": clients.A, "B": clients.B})


def identical_uploads(clients):
    mean = {
        name: np.tensordot(clients.weights, side, 1)
        for name, side in vars(clients).items()
        if name in "AB"
    }
    same = {name: np.repeat(side[None], len(clients.A), 0) for name, side in mean.items()}
    return server_round("fedex", same, clients.weights)


@pytest.mark.parametrize("step", [no_residual, forgets_the_weights, identical_uploads])
def test_v5_rejects_other_residuals(step):
    assert red(v5.CHECK.run(1, step=step))[0] == "shipped residual off the covariance"


def first_row_of_weights(weights):
    u = weights - np.eye(len(weights))[0]
    return np.eye(len(u)) - (2 * np.outer(u, u) / (u @ u) if u @ u else 0)


def half_of_the_reflection(weights):
    return (v5.reflection(weights) + np.eye(len(weights))) / 2


@pytest.mark.parametrize("reflection", [first_row_of_weights, half_of_the_reflection])
def test_v5_rejects_other_contrasts(reflection):
    assert "first contrast off the means" in red(v5.CHECK.run(1, reflection=reflection))


def test_v5_notices_a_division_by_zero_where_one_client_has_all_the_weight():
    def unguarded(weights):
        u = np.sqrt(weights) - np.eye(len(weights))[0]
        with np.errstate(invalid="ignore"):
            return np.eye(len(u)) - 2 * np.outer(u, u) / np.float64(u @ u)

    outcome = v5.CHECK.run(1, reflection=unguarded)
    assert "reflection off orthogonal" in red(outcome)
    assert np.isnan(outcome.measured[4].value)
