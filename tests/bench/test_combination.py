"""FLoRA-NA's coefficients against Adam: the same objective, and never a worse one of ours."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench import server
from bench.baselines.adam_combination import (
    RATES,
    adam_combination,
    best_rate,
    factor_loss,
    gram_loss,
)
from bench.combination import CLOSENESS, FAMILIES, REST, client_pairs, combination_case, goal
from bench.workloads import Setting
from fedcore.methods.lora.flora_na.objective import PairObjective
from fedcore.methods.lora.flora_na.solver import nearest_combination
from fedcore_kernels import block_grams

CPU = torch.device("cpu")


def problem(family, clients=4, modules=3, rank=2, width=24):
    left, right, shares = client_pairs(family, clients, modules, rank, width, CPU)
    objective = PairObjective.build(block_grams(left), block_grams(right), shares)
    return left, right, shares, objective


def dense(left, right, shares, p, q):
    """``||M - B^ A^||^2`` of every module, with the matrices written out."""
    products = left.double().mT @ right.double()
    mean = torch.einsum("n,nlij->lij", shares, products)
    b = torch.einsum("ln,nlri->lri", p, left.double())
    a = torch.einsum("ln,nlri->lri", q, right.double())
    return (mean - b.mT @ a).square().sum((1, 2)), mean.square().sum((1, 2))


def adam_values(loss, start, rate, steps):
    return loss(*adam_combination(loss, start, rate, steps))


def coefficients(modules, clients):
    random = torch.Generator().manual_seed(1)
    return torch.randn(2, modules, clients, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_through_the_factors_is_the_dense_one(family):
    left, right, shares, objective = problem(family)
    p, q = coefficients(3, 4)
    value, target = dense(left, right, shares, p, q)
    found = factor_loss(left.double(), right.double(), shares)(p, q)
    torch.testing.assert_close(found, value / target, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(objective.value(p[:, None], q[:, None])[:, 0], value)


def test_a_step_of_adam_is_its_formula():
    start = torch.full((2, 3), 0.5, dtype=torch.float64)
    weights = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    p, q = adam_combination(lambda p, q: (p * weights).sum(1) - 3 * q.sum(1), start, 0.1, 2)
    # The first steps along a constant gradient are the rate times its sign.
    torch.testing.assert_close(p, start - 0.2 * weights.sign(), rtol=0, atol=1e-7)
    torch.testing.assert_close(q, start + 0.2, rtol=0, atol=1e-7)
    assert start.eq(0.5).all()


def test_both_forms_of_the_loss_take_adam_the_same_way():
    left, right, shares, objective = problem("first round")
    start = shares.expand(3, -1)

    through_factors = factor_loss(left.double(), right.double(), shares)
    one = adam_combination(through_factors, start, 0.01, 40)
    other = adam_combination(partial(gram_loss, objective), start, 0.01, 40)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert (one[0] - start).norm() > 0.01
    narrow = adam_combination(factor_loss(left, right, shares), start.float(), 0.01, 40)
    torch.testing.assert_close(narrow[0].double(), other[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_is_never_worse_than_adam_at_any_rate(family):
    _, _, _, objective = problem(family, clients=5, modules=6)
    ours = nearest_combination(objective)
    search = best_rate(objective, goal(objective, ours), 300)
    assert (ours.value <= search.lowest + 1e-6 * objective.target).all()
    assert (search.lowest <= search.value).all()
    assert search.rate in RATES


@pytest.mark.parametrize("family", ["common start", "first round"])
def test_adam_gets_to_our_objective_and_not_a_step_sooner(family):
    _, _, shares, objective = problem(family)
    wanted = goal(objective, nearest_combination(objective))
    search = best_rate(objective, wanted, 1000)
    assert search.arrived.all()
    assert search.rate in RATES
    loss, start = partial(gram_loss, objective), shares.expand(3, -1)
    before = torch.stack([adam_values(loss, start, search.rate, k) for k in range(search.steps)])
    assert not (before * objective.target <= wanted).any(0).all()
    value = adam_values(loss, start, search.rate, search.steps) * objective.target
    torch.testing.assert_close(value, search.value, rtol=1e-12, atol=0)
    assert (torch.minimum(before.amin(0) * objective.target, value) <= wanted).all()
    for rate in RATES:
        history = torch.stack(
            [adam_values(loss, start, rate, k) for k in range(0, search.steps, 7)]
        )
        assert not (history * objective.target <= wanted).any(0).all()


def test_the_goal_is_ours_up_to_both_margins():
    _, _, shares, objective = problem("common start")
    ours = nearest_combination(objective)
    means = shares.expand(3, 1, -1)
    gain = objective.value(means, means)[:, 0] - ours.value
    assert (gain > 0).all()
    margin = goal(objective, ours) - ours.value
    expected = torch.minimum(REST * gain, CLOSENESS * objective.target)
    torch.testing.assert_close(margin, expected, rtol=1e-6, atol=0)


def test_an_objective_out_of_reach_ends_at_the_cap():
    _, _, _, objective = problem("unrelated")
    search = best_rate(objective, torch.zeros(3, dtype=torch.float64), 5)
    assert search.steps == 5
    assert not search.arrived.any()
    # Of rates that arrive nowhere the one with the lowest objective.
    loss, start = partial(gram_loss, objective), objective.shares.expand(3, -1)
    means = [float(adam_values(loss, start, rate, 5).mean()) for rate in RATES]
    assert search.rate == RATES[means.index(min(means))]


def test_families_differ_as_they_say():
    def sides(family):
        return client_pairs(family, 6, 2, 2, 400, CPU)[:2]

    def spread(side):
        """The clients' own part over all of it."""
        return float((side - side.mean(0)).norm() / side.norm())

    found = {family: tuple(map(spread, sides(family))) for family in FAMILIES}
    assert all(0.2 < s < 0.35 for s in found["common start"])
    assert found["first round"][0] > 0.8 > 0.4 > found["first round"][1]
    assert all(s > 0.8 for s in found["unrelated"])
    # A line and a little noise: the second singular value of what is left is small.
    left, _ = sides("one direction")
    values = torch.linalg.svdvals((left - left.mean(0))[:, 0].flatten(1))
    assert values[1] < 0.3 * values[0]
    # Scales and rotations change the factors and no product.
    for family in ("own scales", "own rotations"):
        assert min(found[family]) > 0.4
        left, right = sides(family)
        products = left.mT @ right
        start = [side.double() for side in sides("common start")]
        torch.testing.assert_close(products.double(), start[0].mT @ start[1], rtol=0, atol=1e-5)


def test_a_case_runs_and_says_both_objectives():
    case = combination_case("first round", 2, CPU, width=32, cap=400)
    fit = case.ours["flora_na p and q"].call()
    given = case.ours["nearest_combination"].call()
    torch.testing.assert_close((fit.p, fit.q), (given.p, given.q))
    left, right, shares = client_pairs("first round", 10, 2, 4, 32, CPU)
    value, target = dense(left, right, shares, fit.p, fit.q)
    said = f"ours {float((value / target).mean()):.4g}"
    for ours in case.ours.values():
        (name,) = ours.against
        assert name.endswith(said)
        assert "modules there" not in name
        steps = int(name.split(", ")[1].split()[0])
        p, _ = case.others[name].call()
        assert case.others[name].share == min(1, 25 / steps)
        assert p.shape == (2, 10)
        assert (p.double() - shares).abs().max() > 1e-3


def test_a_case_says_where_adam_did_not_get():
    case = combination_case("own scales", 2, CPU, width=32, cap=3)
    for name in case.others:
        assert "0 of 2 modules there in 3 steps of " in name


def test_families_are_measured_where_adam_is():
    small = Setting(CPU, small=True)
    names = [plan.name for plan in server.plans(small, ("adam",))]
    assert names == [f"FLoRA-NA, {family}" for family in FAMILIES]
    assert not any("FLoRA-NA" in plan.name for plan in server.plans(small, ("eager", "mean")))
