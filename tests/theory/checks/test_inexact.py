"""Wrong bounds and steps that the checks of inexact descent are to notice."""

import numpy as np
import pytest

from fedcore_theory.checks.inexact import i01_gradient_norms as i1
from fedcore_theory.checks.inexact import i03_optimality_gap as i3


def red(check, **implementations):
    """What is not as it should be."""
    outcome = check.run(1, **implementations)
    return [one.what for one in outcome.measured if not one.holds]


def without_rho(setting, rho):
    return i1.inexact_bound(setting, 0.0)


def with_a_rho_that_fades(setting, rho):
    return i1.inexact_bound(setting, rho / np.sqrt(setting.steps))


def with_rho_for_a_gradient_error(setting, rho):
    """As if the error came before the step size."""
    return i1.inexact_bound(setting, rho * setting.eta)


@pytest.mark.parametrize(
    "bound", [without_rho, with_a_rho_that_fades, with_rho_for_a_gradient_error]
)
def test_i1_rejects_a_bound(bound):
    assert red(i1.CHECK, bound=bound) == ["mean squared gradient / bound"]


def adds_the_error_twice(x, gradient, noise, error, eta):
    return x - eta * (gradient + noise) + 2 * error


def drops_the_error(x, gradient, noise, error, eta):
    return x - eta * (gradient + noise)


def adds_the_error_to_the_gradient(x, gradient, noise, error, eta):
    return x - eta * (gradient + noise - error)


@pytest.mark.parametrize(
    ("advance", "what"),
    [
        (adds_the_error_twice, "mean squared gradient / bound"),
        (drops_the_error, "least growth from one rho to the next"),
        (adds_the_error_to_the_gradient, "late squared gradient / (rho/eta)^2, rho = 0.2"),
    ],
)
def test_i1_rejects_a_step(advance, what):
    assert what in red(i1.CHECK, advance=advance)


def test_i1_s_slack_hides_a_gradient_without_its_noise():
    def quiet(x, gradient, noise, error, eta):
        return x - eta * gradient + error

    assert i1.CHECK.run(1, advance=quiet).holds


def without_eta(setting, t):
    return i3.ball(setting._replace(rho=setting.rho * setting.eta), t)


def with_half_the_radius(setting, t):
    return i3.ball(setting._replace(rho=setting.rho / np.sqrt(2)), t)


def twice_as_fast(setting, t):
    return i3.ball(setting, 2 * t)


@pytest.mark.parametrize("bound", [without_eta, with_half_the_radius, twice_as_fast])
def test_i3_rejects_a_bound_that_is_too_small(bound):
    assert "largest gap / bound, no noise" in red(i3.CHECK, bound=bound)


def test_i3_rejects_a_bound_that_is_too_large():
    """The bound of any loss with the same mu is right, and 2 (1 + eta L) times too large here."""
    failed = red(i3.CHECK, bound=i3.general_ball)
    assert failed == ["last gap / bound, slowest axis, nearest to 1"]


def test_i3_rejects_a_general_bound_without_rho():
    def general(setting, t):
        return i3.general_ball(setting._replace(rho=0.0), t)

    assert red(i3.CHECK, general=general) == ["largest mean gap / general bound, noise"]


@pytest.mark.parametrize(
    "advance", [adds_the_error_twice, drops_the_error, adds_the_error_to_the_gradient]
)
def test_i3_rejects_a_step(advance):
    assert red(i3.CHECK, advance=advance)
