"""Epsilons against Opacus itself, closed forms and published numbers."""

import math
import sys

import numpy as np
import pytest
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.optimize import brentq
from scipy.stats import norm

from fedcore.errors import FedcoreError, MissingExtraError
from fedcore.privacy.accounting import LARGEST_PRV_EPSILON, NOISE_RANGE, Spending, epsilon
from tests.reference.privacy_loss import epsilon_from_renyi, exact_epsilon, renyi

ABADI = Spending(noise_multiplier=4.0, sample_rate=0.01, steps=10_000)
"""The example of "Deep Learning with Differential Privacy" (arXiv:1607.00133, section 3.2)."""

MNIST = Spending(noise_multiplier=1.3, sample_rate=250 / 60_000, steps=3600)
"""15 epochs on 60 000 digits in lots of 250, the tutorial of TensorFlow Privacy."""


def exact_gaussian(noise_multiplier: float, steps: int, delta: float) -> float:
    """Epsilon of ``steps`` Gaussian mechanisms without sampling, arXiv:1805.06530, theorem 8."""
    mu = math.sqrt(steps) / noise_multiplier

    def excess(e: float) -> float:
        return norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - delta

    return float(brentq(excess, 0, 100))


@pytest.mark.parametrize(
    "spending", [ABADI, MNIST, Spending(1.1, 0.2, 60), Spending(0.8, 0.05, 7)], ids=str
)
def test_it_is_what_opacus_says_step_by_step(spending):
    rdp, prv = RDPAccountant(), PRVAccountant()
    for accountant in (rdp, prv):
        for _ in range(spending.steps):
            accountant.step(
                noise_multiplier=spending.noise_multiplier, sample_rate=spending.sample_rate
            )
    assert epsilon(spending, 1e-5) == rdp.get_epsilon(1e-5)
    assert epsilon(spending, 1e-5, "prv") == prv.get_epsilon(1e-5)


@pytest.mark.parametrize(("spending", "published"), [(ABADI, 1.26), (MNIST, 1.18)])
def test_published_numbers(spending, published):
    # Both used min over orders of  rdp + log(1 / delta) / (order - 1).
    orders = np.array([1 + x / 10 for x in range(1, 100)] + list(range(11, 64)))
    rdp = compute_rdp(
        q=spending.sample_rate,
        noise_multiplier=spending.noise_multiplier,
        steps=spending.steps,
        orders=list(orders),
    )
    classical = float(np.min(rdp + math.log(1e5) / (orders - 1)))
    assert classical == pytest.approx(published, abs=0.005)
    # Today's conversion and composition are tighter, and not by magic.
    assert 0.7 * published < epsilon(spending, 1e-5, "prv") < epsilon(spending, 1e-5) < classical


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (5.0, 40), (2.0, 9), (20.0, 100)])
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_without_sampling_the_answer_is_known(noise, steps, delta):
    truth = exact_gaussian(noise, steps, delta)
    whole = Spending(noise, 1.0, steps)
    assert truth <= epsilon(whole, delta, "prv") <= truth + 0.03
    assert truth <= epsilon(whole, delta) <= 1.3 * truth + 0.02


def test_more_of_anything_costs_more():
    start = epsilon(Spending(1.0, 0.1, 50), 1e-5)
    assert epsilon(Spending(1.0, 0.1, 51), 1e-5) > start
    assert epsilon(Spending(1.0, 0.11, 50), 1e-5) > start
    assert epsilon(Spending(0.9, 0.1, 50), 1e-5) > start
    assert epsilon(Spending(1.0, 0.1, 50), 1e-6) > start
    assert epsilon(Spending(1.0, 0.1, 0), 1e-5) == 0


def test_the_numeric_accountant_is_not_asked_for_what_it_cannot_hold():
    little = Spending(0.3, 0.1, 100)
    assert epsilon(little, 1e-5) > LARGEST_PRV_EPSILON
    with pytest.raises(FedcoreError, match=r"epsilon is about 118; .* pass 'rdp'"):
        epsilon(little, 1e-5, "prv")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 0.1, 1), "noise_multiplier is 0.0"),
        ((math.nan, 0.1, 1), "noise_multiplier is nan"),
        ((1.0, 0.0, 1), "sample_rate is 0.0"),
        ((1.0, 1.5, 1), "sample_rate is 1.5"),
        ((1.0, 0.1, -1), "steps is -1"),
    ],
)
def test_settings_that_mean_nothing(values, message):
    with pytest.raises(FedcoreError, match=message):
        Spending(*values)


def test_deltas_and_names_that_mean_nothing():
    with pytest.raises(FedcoreError, match="delta is 1"):
        epsilon(ABADI, 1.0)
    with pytest.raises(FedcoreError, match="unknown accountant 'gdp'"):
        epsilon(ABADI, 1e-5, "gdp")


def test_without_opacus_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(MissingExtraError, match=r"fedcore-lora\[privacy\]"):
        epsilon(ABADI, 1e-5)


@pytest.mark.parametrize(
    ("order", "noise", "rate"),
    [(1.5, 1.1, 0.2), (2, 1.0, 0.05), (4.3, 0.8, 0.1), (12, 2.0, 0.01), (3, 1.5, 1.0)],
)
def test_renyi_divergences_are_those_of_their_definition(order, noise, rate):
    (found,) = compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=[order])
    assert found == pytest.approx(renyi(order, noise, rate), rel=1e-9)


def test_the_bound_is_the_best_order_of_the_integrals():
    orders = [2.5, 4.0, 6.0, 8.0, 10.0]
    divergences = [7 * renyi(order, 0.8, 0.05) for order in orders]
    mine = epsilon_from_renyi(orders, divergences, 1e-5)
    found = epsilon(Spending(0.8, 0.05, 7), 1e-5)
    # A few orders give a bound a little above that of the whole table.
    assert 0.97 * mine < found <= mine * (1 + 1e-9)


@pytest.mark.parametrize(
    ("spending", "delta"),
    [
        (Spending(1.1, 0.2, 60), 1e-5),
        (Spending(0.8, 0.05, 7), 1e-5),
        (Spending(1.5, 0.3, 4), 1e-3),
        (Spending(2.0, 1.0, 9), 1e-5),
    ],
    ids=str,
)
def test_epsilon_is_what_the_distribution_of_losses_gives(spending, delta):
    low, high = exact_epsilon(
        spending.noise_multiplier, spending.sample_rate, spending.steps, delta
    )
    assert 0 < low < high < 1.02 * low
    numeric, bound = epsilon(spending, delta, "prv"), epsilon(spending, delta)
    # The upper end of an error interval 0.01 to either side.
    assert low <= numeric <= high + 0.02
    assert high < bound < 1.3 * high


@pytest.mark.parametrize("noise", [1e-10, 1e-160, 101.0, math.inf])
def test_noise_beyond_what_the_series_can_take_is_refused(noise):
    with pytest.raises(FedcoreError, match=r"can be computed from 1e-09 to 100"):
        Spending(noise, 0.3, 1)
    for edge in NOISE_RANGE:
        assert math.isfinite(epsilon(Spending(edge, 0.3, 1), 1e-5))


def test_steps_of_several_kinds_compose():
    parts = [Spending(1.0, 0.1, 3), Spending(2.0, 0.1, 5), Spending(1.0, 0.1, 4)]
    whole = epsilon(parts, 1e-5)
    assert whole == pytest.approx(epsilon([Spending(1.0, 0.1, 7), Spending(2.0, 0.1, 5)], 1e-5))
    assert whole == epsilon([*parts, Spending(9.0, 0.5, 0)], 1e-5)
    assert max(epsilon(part, 1e-5) for part in parts) < whole
    assert epsilon([], 1e-5) == 0.0
    assert epsilon(parts[:1], 1e-5, "prv") < epsilon(parts, 1e-5, "prv") < whole
