"""Wrong implementations that FLoRA-NA's checks are to notice, and a few that they cannot."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcore.methods.lora.flora_na.method import FloraNA, align_clients, rotated_blocks
from fedcore.methods.lora.flora_na.objective import PairObjective, apply
from fedcore.methods.lora.flora_na.solver import alternate, nearest_combination, starts
from fedcore_kernels import block_grams
from fedcore_theory.checks.flora_na import n01_gram_form as n1
from fedcore_theory.checks.flora_na import n02_gradients as n2
from fedcore_theory.checks.flora_na import n03_monotone_sweeps as n3
from fedcore_theory.checks.flora_na import n04_rank_one as n4
from fedcore_theory.checks.flora_na import n05_exact_cases as n5
from fedcore_theory.checks.flora_na import n06_starts as n6
from fedcore_theory.checks.flora_na import n07_gauges as n7
from fedcore_theory.checks.flora_na import n08_speed as n8
from fedcore_theory.checks.flora_na import n09_affine as n9
from fedcore_theory.checks.flora_na import n10_tangent_ceiling as n10
from fedcore_theory.checks.flora_na import n11_cancellation as n11
from fedcore_theory.checks.flora_na import n12_reference_errors as n12
from fedcore_theory.models.coefficient_descents import gradients
from fedcore_theory.models.combinations import (
    Coefficients,
    combined,
    nearest,
    pair_objective,
    squared_error,
    start,
)
from fedcore_theory.models.factors import ClientFactors, random_factors
from fedcore_theory.rounds import MODULE, server_round


def red(check, repetitions, **implementations):
    """What is not as it should be."""
    outcome = check.run(repetitions, **implementations)
    return [one.what for one in outcome.measured if not one.holds]


def with_transposed_h(clients):
    objective = pair_objective(clients)
    return replace(objective, cross=objective.cross.mT)


def with_unweighted_h(clients):
    objective = pair_objective(clients)
    equal = ClientFactors(clients.A, clients.B, np.ones(len(clients.A)))
    return replace(objective, cross=pair_objective(equal).cross)


def with_traces_for_blocks(clients):
    left, right = pair_objective(clients).traces
    weights = torch.from_numpy(clients.weights)
    return PairObjective.build(left[..., None, None], right[..., None, None], weights)


@pytest.mark.parametrize("build", [with_transposed_h, with_unweighted_h, with_traces_for_blocks])
def test_n1_and_n2_reject_a_wrong_objective(build):
    assert red(n1.CHECK, 1, build=build) == ["relative difference, Gram form against dense"]
    assert red(n2.CHECK, 1, build=build)


def test_n1_rejects_base_weights_that_are_not_squared():
    def plain_weights(clients, base):
        return n1.weighted_form(clients, np.sqrt(np.abs(base)))

    failed = red(n2.CHECK, 1, build_weighted=plain_weights)
    assert len(failed) == 2
    assert all(what.endswith("weighted by W0") for what in failed)
    assert red(n1.CHECK, 1, build_weighted=plain_weights) == ["relative difference, weighted by W0"]


def test_n1_cannot_see_traces_for_blocks_at_rank_one():
    random = np.random.default_rng(0)
    at = Coefficients(random.standard_normal(5), random.standard_normal(5))
    case = n1.Point(random_factors(random, 5, 23, 31, 1), at, random.standard_normal((23, 31)))
    assert n1.measure([case], build=with_traces_for_blocks).holds


def test_n1_cannot_see_a_transposed_h_of_symmetric_products():
    random = np.random.default_rng(0)
    clients = random_factors(random, 5, 23, 23, 4)
    clients = ClientFactors(clients.A, clients.A.transpose(0, 2, 1), clients.weights)
    at = Coefficients(random.standard_normal(5), random.standard_normal(5))
    case = n1.Point(clients, at, random.standard_normal((23, 23)))
    assert n1.measure([case], build=with_transposed_h).holds


def without_the_factor_two(objective, at):
    return Coefficients(*(side / 2 for side in n2.from_blocks(objective, at)))


def with_the_wrong_side_s_curvature(objective, at):
    p, q = start(objective, at)
    left = apply(objective.left_curvature(p), p) - q @ objective.cross.mT
    right = apply(objective.right_curvature(q), q) - p @ objective.cross
    return Coefficients(2 * left[0, 0].numpy(), 2 * right[0, 0].numpy())


@pytest.mark.parametrize("slopes", [without_the_factor_two, with_the_wrong_side_s_curvature])
def test_n2_rejects(slopes):
    assert len(red(n2.CHECK, 1, slopes=slopes)) == 4


def solved(curvature, side):
    # Unlike others, does not raise on what a wrong sweep ends in.
    return apply(torch.linalg.inv_ex(curvature).inverse, side)


def with_a_stale_curvature(objective, at):
    p, q = start(objective, at)
    new_p = solved(objective.left_curvature(q), q @ objective.cross.mT)
    new_q = solved(objective.right_curvature(p), new_p @ objective.cross)
    return Coefficients(new_p[0, 0].numpy(), new_q[0, 0].numpy())


def with_the_wrong_right_side(objective, at):
    p, q = start(objective, at)
    p = solved(objective.left_curvature(q), q @ objective.cross)
    q = solved(objective.right_curvature(p), p @ objective.cross.mT)
    return Coefficients(p[0, 0].numpy(), q[0, 0].numpy())


@pytest.fixture(scope="module")
def small_n3():
    """The shapes with few clients, to be quick."""
    return [[one for one in n3.draw(0) if one.clients.A.shape[0] <= 5]]


@pytest.mark.parametrize("sweep", [with_a_stale_curvature, with_the_wrong_right_side])
def test_n3_rejects_a_wrong_sweep(sweep, small_n3):
    outcome = n3.measure(small_n3, sweep=sweep)
    assert not outcome.measured[0].holds


def test_n3_rejects_a_sweep_that_does_nothing(small_n3):
    outcome = n3.measure(small_n3, sweep=lambda objective, at: at)
    failed = [one.what for one in outcome.measured if not one.holds]
    assert failed == ["residual of q's normal equations, relative"]


def test_n3_rejects_a_wrong_end_and_a_wrong_report(small_n3):
    def doubled(clients):
        found = n3.shipped_fit(clients)
        return replace(found, factors={**found.factors, "A": 2 * found.factors["A"]})

    def with_the_root_reported(clients):
        found = n3.shipped_fit(clients)
        report = found.aggregate.steps[MODULE]
        steps = {MODULE: replace(report, objective=report.objective**0.5)}
        return replace(found, aggregate=replace(found.aggregate, steps=steps))

    failed = {one.what for one in n3.measure(small_n3, fit=doubled).measured if not one.holds}
    assert "end above the means / ||M||^2" in failed
    outcome = n3.measure(small_n3, fit=with_the_root_reported)
    assert [one.what for one in outcome.measured if not one.holds] == [
        "reported error off the dense one / ||M||^2"
    ]


def fitted_to(build):
    def fit(clients):
        found = nearest_combination(build(clients))
        return combined(clients, Coefficients(found.p[0].numpy(), found.q[0].numpy()))

    return fit


@pytest.mark.parametrize("build", [with_transposed_h, with_unweighted_h])
def test_n4_rejects_a_fit_of_a_wrong_objective(build):
    assert red(n4.CHECK, 1, fit=fitted_to(build))[0].endswith("fit against SVD")


def test_n4_rejects_the_means_for_the_fit_and_for_the_closed_form():
    def means(clients):
        return Coefficients(clients.weights, clients.weights)

    failed = red(n4.CHECK, 1, fit=lambda clients: combined(clients, means(clients)))
    assert failed[0].endswith("fit against SVD")
    assert red(n4.CHECK, 1, closed_form=means)[0].endswith("closed form")


def descended(half_step):
    """Alternating half-steps ``half_step(curvature, wanted, old)`` from the means."""

    def solve(clients):
        objective = pair_objective(clients)
        p, q = start(objective, Coefficients(clients.weights, clients.weights))
        for _ in range(60):
            p = half_step(objective.left_curvature(q), q @ objective.cross.mT, p)
            q = half_step(objective.right_curvature(p), p @ objective.cross, q)
        return Coefficients(p[0, 0].numpy(), q[0, 0].numpy())

    return solve


def pseudo_inverse(curvature):
    return torch.linalg.pinv(curvature, hermitian=True, rtol=1e-10)


def test_n5_rejects_half_steps_that_forget_where_they_started():
    solve = descended(lambda R, wanted, old: apply(pseudo_inverse(R), wanted))
    assert "equal clients: |p - w|, |q - w|" in red(n5.CHECK, 1, solve=solve)
    clients = n5.draw(0)["equal clients"]
    found = solve(clients)
    # The product is right all the same, and the clients' weights are lost.
    assert squared_error(clients, found) < 1e-20
    assert np.ptp(found.p) < 1e-12


def test_n5_rejects_a_ridge():
    def half_step(R, wanted, old):
        ridge = 1e-3 * R.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        return torch.linalg.solve(R + ridge * torch.eye(R.shape[-1]), wanted)

    assert "f / ||M||^2, cases said to be exact" in red(n5.CHECK, 1, solve=descended(half_step))


def test_n5_s_common_factor_leaves_nothing_to_a_plain_solve():
    clients = n5.draw(0)["common A"]
    objective = pair_objective(clients)
    p, _ = start(objective, Coefficients(clients.weights, clients.weights))
    assert float(torch.linalg.cond(objective.right_curvature(p))) > 1e14


def without_any_sweep(objective):
    return objective.value(*starts(objective)).amin(-1)


@pytest.mark.parametrize("fit", [n6.from_the_means, without_any_sweep])
def test_n6_rejects(fit):
    assert red(n6.CHECK, 1, fit=fit)


def in_another_gauge(clients):
    p, q = nearest(clients)
    return Coefficients(2 * p, q / 2)


def with_the_other_sign(clients):
    p, q = nearest(clients)
    return Coefficients(-p, -q)


def with_a_ridge_of_its_own(clients):
    objective = pair_objective(clients)
    R = objective.left_curvature(torch.from_numpy(clients.weights)[None, None])[0, 0]
    wanted = objective.cross[0] @ objective.shares
    p = torch.linalg.solve(R + 0.1 * torch.eye(len(R)), wanted)
    return Coefficients(p.numpy(), clients.weights)


@pytest.mark.parametrize(
    ("solve", "what"),
    [
        (in_another_gauge, "change: size of A^ against Abar's"),
        (with_the_other_sign, "least p^T w"),
        (with_a_ridge_of_its_own, "change: p and q, stretch"),
        (lambda c: Coefficients(c.weights, c.weights), "change: f, scales"),
    ],
)
def test_n7_rejects(solve, what):
    assert what in red(n7.CHECK, 1, solve=solve)


def turns_the_grams_alone(clients):
    left, right = (
        torch.from_numpy(np.ascontiguousarray(side))[:, None]
        for side in (clients.B.transpose(0, 2, 1), clients.A)
    )
    shares = torch.from_numpy(clients.weights)
    blocks = block_grams(left), block_grams(right)
    turns = align_clients(*blocks, shares)
    objective = PairObjective.build(*(rotated_blocks(side, turns) for side in blocks), shares)
    fit = nearest_combination(objective)
    return combined(clients, Coefficients(fit.p[0].numpy(), fit.q[0].numpy()))


def does_not_turn(clients):
    uploads = {"A": clients.A, "B": clients.B}
    return server_round(FloraNA(), uploads, clients.weights).product


@pytest.mark.parametrize("align", [turns_the_grams_alone, does_not_turn])
def test_n7_rejects_an_alignment(align):
    assert red(n7.CHECK, 1, align=align) == ["error of rotated clients, aligned / SVD's"]


@pytest.fixture(scope="module")
def small_n8():
    return [n8.draw(1)[:1]]


def damped(objective, p, q):
    new_p, new_q = n8.shipped_sweep(objective, p, q)
    return (p + new_p) / 2, (q + new_q) / 2


def of_one_gradient_step(objective, p, q):
    size = 1 / (4 * objective.target[:, None, None])
    slope_p, slope_q = gradients(objective, p, q)
    return p - size * slope_p, q - size * slope_q


@pytest.mark.parametrize("sweep", [damped, of_one_gradient_step])
def test_n8_rejects_a_sweep_that_solves_nothing_exactly(sweep, small_n8):
    assert not n8.measure(small_n8, sweep=sweep).measured[0].holds


def test_n9_rejects_sums_that_are_restored_after_the_step():
    def sweep(objective, at):
        fit = alternate(objective, *start(objective, at), sweeps=1, tolerance=0.0)
        p, q = fit.p[0, 0].numpy(), fit.q[0, 0].numpy()
        return Coefficients(p + (1 - p.sum()) / len(p), q + (1 - q.sum()) / len(q))

    assert "largest rise of a sweep / ||M||^2" in red(n9.CHECK, 1, sweep=sweep)


def test_n9_rejects_the_free_fit_and_one_that_stays_at_the_means():
    failed = red(n9.CHECK, 1, solve=nearest)
    assert "sums of p and q off 1" in failed

    def means(clients):
        return Coefficients(clients.weights, clients.weights)

    assert "error, FedAvg / affine, scales" in red(n9.CHECK, 1, solve=means)


def covariance(clients):
    means = Coefficients(clients.weights, clients.weights)
    return squared_error(clients, means) ** 0.5


def off_one_range_only(clients):
    mean_B = np.tensordot(clients.weights, clients.B, 1)
    mean_A = np.tensordot(clients.weights, clients.A, 1)
    left = np.linalg.qr(mean_B)[0]
    Cov = clients.mean_product - mean_B @ mean_A
    return float(np.linalg.norm(Cov - left @ (left.T @ Cov)))


@pytest.mark.parametrize("predict", [covariance, off_one_range_only])
def test_n10_rejects_a_prediction(predict):
    assert red(n10.CHECK, 1, predict=predict) == ["best rank r off the prediction"]


def averaged(clients):
    uploads = {"A": clients.A, "B": clients.B}
    return server_round("fedit", uploads, clients.weights).product


def averaged_without_weights(clients):
    return server_round("fedit", {"A": clients.A, "B": clients.B}).product


def test_n10_rejects_a_sum_for_a_mean():
    assert red(n10.CHECK, 1, fit=lambda clients: 25 * averaged(clients))


def test_n10_cannot_tell_the_fit_from_fedavg():
    """Which is its message: near a common start there is next to nothing to gain."""
    assert n10.CHECK.run(1, fit=averaged).holds


def test_n11_rejects_single_precision_and_a_root():
    def single(clients):
        return n11.in_fp32(clients, nearest(clients))

    def root(clients):
        return n11.shipped_report(clients) ** 0.5

    for report in (single, root):
        assert red(n11.CHECK, 1, report=report) == ["reported f off the entries, relative"]


def test_n11_rejects_the_gram_form_where_double_precision_cancels_too():
    def grams(clients):
        return float(nearest_combination(pair_objective(clients)).value)

    assert red(n11.CHECK, 1, report=grams) == ["reported f off the entries, relative"]


@pytest.mark.parametrize("fit", [averaged, averaged_without_weights])
def test_n12_rejects(fit):
    assert "scales: FedAvg / FLoRA-NA" in red(n12.CHECK, 1, fit=fit)
