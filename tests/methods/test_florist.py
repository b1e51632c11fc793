from itertools import pairwise
from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.methods import create_method
from fedcore.methods.shared.factor_pairs import fresh_adapter
from fedcore_kernels.product_svd import energy_rank
from tests.property.lora_rounds import LoraRound, lora_rounds, make_lora_round
from tests.reference.residuals import residual
from tests.reference.updates import factors, mean_update

SHAPES = ((33, 7), (64, 33), (7, 33), (64, 33))
TAUS = (0.3, 0.8, 0.9, 0.99, 1.0)


def method(**options):
    return create_method("florist", **options)


def with_spectrum(values, noise=0.0):
    """One client whose modules have the singular values ``values``, and ``noise`` besides."""
    case = make_lora_round("random", [1.0], ((64, 33), (33, 64)), len(values) + 1)
    layout = case.cohort.layout
    updates = case.cohort.updates.clone()
    spectrum = torch.tensor([*values, noise], dtype=torch.float64)
    for module in layout.modules:
        for factor in "AB":
            rows = layout.view(updates[0], layout.by_name[f"{module}.{factor}"])
            basis = torch.eye(*rows.shape, dtype=torch.float64)
            rows.copy_(basis * spectrum[:, None] if factor == "B" else basis.flip(-1))
    return case, case.with_updates(updates)


@given(lora_rounds(), st.sampled_from(TAUS))
def test_the_fewest_directions_that_hold_the_energy(case: LoraRound, tau):
    layout = case.cohort.layout
    result = method(tau=tau).aggregate(case.cohort, case.previous)
    for module in layout.modules:
        target = mean_update(case.cohort, module)
        values = torch.linalg.svdvals(target)
        size, energies = float(values[0]), values.square()
        step = result.steps[module]
        if size == 0:
            assert module not in result.residual
            assert step.rank == 0
            continue
        got = residual(layout, result, module)
        assert result.residual[module].rank == step.rank >= 1
        rest = float(energies[step.rank :].sum())
        more = float(energies[step.rank - 1 :].sum())
        total = float(energies.sum())
        assert rest <= (1 - tau) * total + 1e-12 * total
        assert more >= (1 - tau) * total - 1e-12 * total
        # The best of its rank: the error is the tail.
        assert abs(float((target - got).norm()) - rest**0.5) <= 1e-11 * size
        assert step.condition == pytest.approx(size / float(values[step.rank - 1]), rel=1e-3)
        outer, inner = result.residual[module]
        eye = torch.eye(step.rank, dtype=torch.float64)
        assert float((inner @ inner.T - eye).abs().max()) <= 1e-11
        kept = torch.diag(energies[: step.rank])
        assert float((outer @ outer.T - kept).abs().max()) <= 1e-11 * size**2
    assert result.flags == ()


@given(lora_rounds(kinds=("random", "near", "mixed_ranks")))
def test_more_energy_never_keeps_fewer_directions(case: LoraRound):
    ranks = [
        {m: s.rank for m, s in method(tau=tau).aggregate(case.cohort, case.previous).steps.items()}
        for tau in TAUS
    ]
    for few, many in pairwise(ranks):
        assert all(few[module] <= many[module] for module in few)


@given(lora_rounds())
def test_all_of_the_energy_is_the_stacked_product_at_the_rank_of_the_mean(case: LoraRound):
    layout = case.cohort.layout
    result = method(tau=1.0).aggregate(case.cohort, case.previous)
    stacked = create_method("flora").aggregate(case.cohort, case.previous)
    for module in layout.modules:
        expected = residual(layout, stacked, module)
        gap = residual(layout, result, module) - expected
        assert float(gap.norm()) <= 1e-11 * float(expected.norm())
        values = torch.linalg.svdvals(expected)
        assert result.steps[module].rank == int((values > 1e-12 * values[0]).sum())


@pytest.mark.parametrize(
    ("tau", "rank"),
    [(1e-300, 1), (0.2, 1), (0.21, 2), (0.4, 2), (0.6, 3), (0.8, 4), (0.81, 5), (1.0, 5)],
)
def test_equal_singular_values_share_the_energy_equally(tau, rank):
    case, cohort = with_spectrum([2.0] * 5)
    result = method(tau=tau).aggregate(cohort, case.previous)
    assert {step.rank for step in result.steps.values()} == {rank}


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_the_energy_rule_does_not_depend_on_the_scale(scale):
    values = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1e-3, 1e-6], [0.0, 0.0, 0.0]]).double() * scale
    assert energy_rank(values, 0.9).tolist() == [2, 1, 0]
    assert energy_rank(values, 1 - 1e-9).tolist() == [3, 2, 0]
    assert energy_rank(values, 1.0).tolist() == [3, 3, 0]


@pytest.mark.parametrize(("noise", "rank"), [(1e-11, 3), (1e-14, 2), (0.0, 2)])
def test_values_near_machine_precision_are_no_energy(noise, rank):
    """At ``tau = 1`` a direction counts from 1e-12 of the largest; below tau noise never does."""
    case, cohort = with_spectrum([3.0, 1.0], noise)
    result = method(tau=1.0).aggregate(cohort, case.previous)
    assert {part.rank for part in result.residual.values()} == {rank}
    result = method(tau=1 - 1e-15).aggregate(cohort, case.previous)
    assert {part.rank for part in result.residual.values()} == {2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_clients_that_agree_do_not_raise_the_rank(dtype):
    """The stack of seven has rank 21; the mean, and what is sent, has rank 3."""
    weights = [1.0, 2.0, 7.0, 0.1, 0.3, 5.0, 1e-3]
    case = make_lora_round("identical", weights, SHAPES, 3, dtype=dtype)
    result = method(tau=1.0).aggregate(case.cohort, case.previous)
    assert {part.rank for part in result.residual.values()} == {3}


def test_another_basis_of_a_client_changes_nothing():
    case = make_lora_round("random", [1.0, 2.0, 0.5], SHAPES, 3)
    layout = case.cohort.layout
    turned = case.cohort.updates.clone()
    random = torch.Generator().manual_seed(5)
    for n in range(3):
        for module in layout.modules:
            turn = torch.randn(3, 3, generator=random, dtype=torch.float64)
            turn += 3 * torch.eye(3, dtype=torch.float64)
            b, a = (layout.view(turned[n], layout.by_name[f"{module}.{f}"]) for f in "BA")
            b.copy_(turn.T @ b)
            a.copy_(torch.linalg.solve(turn, a))
    one = method().aggregate(case.cohort, case.previous)
    other = method().aggregate(case.with_updates(turned), case.previous)
    for module in layout.modules:
        expected = residual(layout, one, module)
        gap = residual(layout, other, module) - expected
        assert float(gap.norm()) < 1e-12 * float(expected.norm())


def test_modules_of_one_shape_are_cut_each_at_its_own_rank():
    case = make_lora_round("random", [1.0, 2.0], ((64, 33),) * 4, 3)
    layout = case.cohort.layout
    updates = case.cohort.updates.clone()
    for j, scale in enumerate([1.0, 1e-2, 1e-4, 0.0]):
        for factor in "AB":
            layout.view(updates, layout.by_name[f"m{j}.{factor}"])[:, 1:] *= scale
    layout.view(updates, layout.by_name["m3.B"]).zero_()
    result = method(tau=0.999).aggregate(case.with_updates(updates), case.previous)
    assert {name: part.rank for name, part in result.residual.items()} == {
        "m0": 6,
        "m1": 2,
        "m2": 2,
    }
    for module, part in result.residual.items():
        assert part.outer.any(-1).all(), module
    assert result.steps["m3"].rank == 0
    assert result.steps["m3"].condition == inf
    assert not any(torch.isnan(side).any() for part in result.residual.values() for side in part)
    assert result.flags == ()


def test_a_limit_that_cuts_energy_is_flagged():
    case, cohort = with_spectrum([3.0, 2.0, 1.0])
    cohort.layout.view(cohort.updates[0], cohort.layout.by_name["m1.B"])[1:] *= 0.9
    free = method().aggregate(cohort, case.previous)
    wide = method(max_rank=2).aggregate(cohort, case.previous)
    cut = method(max_rank=1).aggregate(cohort, case.previous)
    assert [r.steps["m0"].rank for r in (free, wide, cut)] == [2, 2, 1]
    # 1 - sigma_{p+1} / sigma_p at the cut itself.
    gaps = [r.steps["m0"].gap for r in (free, wide, cut)]
    assert gaps == pytest.approx([1 / 2, 1 / 2, 1 / 3])
    assert (free.flags, wide.flags) == ((), ())
    assert cut.flags == (
        "max_rank 1 truncates 2 of 2 modules below tau 0.9: m0 keeps 0.643 of its energy",
    )


def test_the_next_adapter_is_fresh_and_costs_no_traffic():
    case = make_lora_round("mixed_ranks", [1.0, 2.0], SHAPES, 3)
    layout = case.cohort.layout
    result = method(seed=2).aggregate(case.cohort, case.previous)
    assert [slot.name for slot in result.changed] == ["head"]
    drawn = fresh_adapter(case.previous.row, layout, 2, "florist", 1)
    for slot in layout.factor_slots:
        assert torch.equal(layout.view(result.row, slot), layout.view(drawn, slot))
        assert layout.view(result.row, slot).any() == (slot.factor == "A")
    heads = layout.view(case.cohort.updates, layout.by_name["head"])
    expected = (heads[0] + 2 * heads[1]) / 3
    torch.testing.assert_close(layout.view(result.row, layout.by_name["head"]), expected)
    assert method().capabilities.restarts
    mine = method().for_client(case.previous, case.previous, [1, 2, 3, 1])
    assert not factors(layout, mine, "m0")[1][1:].any()
