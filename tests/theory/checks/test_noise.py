"""Wrong formulas and wrong noise that the checks of noise are to notice."""

import numpy as np
import pytest

from fedcore_theory.checks.noise import d01_noise_power as d1
from fedcore_theory.checks.noise import d02_averaged_noise as d2
from fedcore_theory.models.noisy_factors import linear_power, noise_power, quadratic_power


def red(outcome):
    """What failed, in words."""
    return [one.what for one in outcome.measured if not one.holds]


def sides_swapped(A, B, sigma):
    linear = A.shape[1] * (A**2).sum() + len(B) * (B**2).sum()
    return sigma**2 * linear + quadratic_power(A, B, sigma)


def without_the_rank(A, B, sigma):
    return linear_power(A, B, sigma) + sigma**4 * A.shape[1] * len(B)


@pytest.mark.parametrize("power", [linear_power, sides_swapped, without_the_rank])
def test_d1_rejects_other_formulas(power):
    assert red(d1.CHECK.run(2, power=power))[0] == "standard errors, noise on both factors"


def test_d1_does_not_notice_a_forgotten_quadratic_term_at_little_noise():
    case = d1.draw(0)
    A, B = case.A[0], case.B[0]
    assert linear_power(A, B, 0.01) == pytest.approx(noise_power(A, B, 0.01), rel=1e-3)


def noise_on_the_product(case, sigma):
    random = np.random.default_rng(9)
    product = case.B[0] @ case.A[0]
    return product + sigma * random.standard_normal((len(case.noise_A), *product.shape))


def common_noise(case, sigma):
    return (1 + sigma * case.noise_A[:, 0, :1, :1]) * (case.B[0] @ case.A[0])


@pytest.mark.parametrize("wrong", [noise_on_the_product, common_noise, d1.B_noisy])
def test_d1_rejects_other_noise(wrong):
    assert "standard errors, noise on both factors" in red(d1.CHECK.run(1, both=wrong))


def test_d1_rejects_noise_on_both_where_one_is_frozen():
    assert "standard errors, noise on B alone" in red(d1.CHECK.run(1, one=d1.both_noisy))


def test_d1_rejects_the_wrong_side_for_one_factor():
    def power(A, B, sigma):
        return sigma**2 * A.shape[1] * (A**2).sum()

    assert red(d1.CHECK.run(1, power_one=power)) == ["standard errors, noise on B alone"]


def test_d2_rejects_averaged_products_for_averaged_factors():
    found = red(d2.CHECK.run(1, of_factors=d2.products_averaged))
    assert found == [
        "standard errors, noisy factors averaged",
        "factors against the formula of products",
    ]


def test_d2_rejects_averaged_factors_for_averaged_products():
    found = red(d2.CHECK.run(1, of_products=d2.factors_averaged))
    assert found[0] == "standard errors, noisy products averaged"
    assert "FedEx off the mean of products" in found


def test_d2_rejects_a_server_that_keeps_one_client():
    def first(A, B):
        return d2.factors_averaged(A[:, :1], B[:, :1])

    assert red(d2.CHECK.run(1, of_factors=first))[0] == "standard errors, noisy factors averaged"


def test_d2_rejects_a_sum_for_a_mean():
    def summed(A, B):
        return A.shape[1] * d2.B_averaged(A, B)

    assert red(d2.CHECK.run(1, of_one=summed)) == ["standard errors, noisy B averaged"]


def test_d2_rejects_the_previous_factors_returned_unchanged():
    def first_b(A, B):
        return B[:, 0] @ A[:, 0]

    assert red(d2.CHECK.run(1, of_one=first_b)) == ["standard errors, noisy B averaged"]
