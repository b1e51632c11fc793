from math import isnan, sqrt

import pytest
import torch
from hypothesis import given

from fedcore.data.adapter_state import AdapterState
from fedcore.data.cohort import Cohort
from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError
from fedcore.methods import Broadcast, create_method
from fedcore.methods.shared.factor_pairs import fresh_adapter
from fedcore_kernels.layout import FactorLayout
from tests.property.lora_rounds import LoraRound, lora_rounds, make_lora_round, pick
from tests.reference.residuals import residual
from tests.reference.updates import factors, mean_update

SHAPES = ((33, 7), (64, 33), (7, 33), (64, 33))


def method(**options):
    return create_method("flora", **options)


def adapter(seed, rank, alpha=None, pattern=None):
    """A client's adapter on ``k`` and ``q``, of rank ``rank`` but where ``pattern`` says."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, d_out, d_in in (("k", 4, 9), ("q", 7, 33)):
        r = (pattern or {}).get(name, rank)
        tensors[f"{name}.lora_A.weight"] = torch.randn(r, d_in, generator=random).double()
        tensors[f"{name}.lora_B.weight"] = torch.randn(d_out, r, generator=random).double()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha or rank}
    return AdapterState.from_peft(tensors, {**config, "rank_pattern": pattern or {}})


def from_zero(cohort):
    return Broadcast(cohort.layout, torch.zeros(cohort.layout.size).double())


@given(lora_rounds())
def test_the_stacked_product_is_the_dense_mean(case: LoraRound):
    layout = case.cohort.layout
    result = method().aggregate(case.cohort, case.previous)
    for module in layout.modules:
        target = mean_update(case.cohort, module)
        size = float(target.norm()) + float(case.cohort.updates.square().sum())
        assert float((residual(layout, result, module) - target).norm()) <= 1e-15 * size
    assert set(result.residual) == set(layout.modules)


def test_whole_numbers_add_up_without_any_rounding():
    case = make_lora_round("random", [1.0, 2.0, 1.0], SHAPES, 3, dtype=torch.float32)
    cohort = case.with_updates(case.cohort.updates.round())
    result = method().aggregate(cohort, case.previous)
    for module in cohort.layout.modules:
        assert torch.equal(residual(cohort.layout, result, module), mean_update(cohort, module))


def test_the_rows_are_the_uploads_with_weights_on_one_side():
    """Which is why the method says that every client sees the others' factors."""
    case = make_lora_round("random", [1.0, 3.0], SHAPES, 3, dtype=torch.float32)
    result = method().aggregate(case.cohort, case.previous)
    layout = case.cohort.layout
    for module, (outer, inner) in result.residual.items():
        b, a = (layout.view(case.cohort.updates, layout.by_name[f"{module}.{f}"]) for f in "BA")
        assert torch.equal(inner, a.flatten(0, 1))
        assert torch.equal(outer, torch.cat([b[0] * 0.25, b[1] * 0.75]))
    assert "verbatim" in method().description.privacy_note


def test_ranks_add_up_over_the_clients_of_the_round():
    """3 of 10 clients with ranks 2, 4 and 4: rank 10, whatever the others would have."""
    states = {f"c{n}": adapter(n, 2 if n == 1 else 4, alpha=16 * (n + 1)) for n in range(10)}
    chosen = {name: states[name] for name in ("c1", "c4", "c7")}
    weights = {"c1": 5.0, "c4": 1.0, "c7": 2.0}
    cohort = Cohort.from_states(chosen, weights)
    result = method().aggregate(cohort, from_zero(cohort))
    for module in ("k", "q"):
        assert result.residual[module].rank == result.steps[module].rank == 10
        assert result.residual[module].outer.any(-1).all()
        products = {
            name: s.scaling[module] * s.factors[module]["B"] @ s.factors[module]["A"]
            for name, s in chosen.items()
        }
        target = sum(weights[name] / 8 * product for name, product in products.items())
        got = residual(cohort.layout, result, module)
        assert float((got - target).norm()) < 1e-14 * float(target.norm())


def test_ranks_may_differ_by_module():
    states = {"a": adapter(0, 2, pattern={"k": 3}), "b": adapter(1, 4, pattern={"k": 1})}
    cohort = Cohort.from_states(states)
    result = method().aggregate(cohort, from_zero(cohort))
    assert {name: part.rank for name, part in result.residual.items()} == {"k": 4, "q": 6}
    for module in ("k", "q"):
        target = mean_update(cohort, module)
        gap = residual(cohort.layout, result, module) - target
        assert float(gap.norm()) < 1e-14 * float(target.norm())


def test_a_module_as_wide_as_its_rank_keeps_its_factors_apart():
    case = make_lora_round("random", [1.0, 2.0], ((7, 7), (7, 33), (33, 7)), 7)
    result = method().aggregate(case.cohort, case.previous)
    for module in case.cohort.layout.modules:
        target = mean_update(case.cohort, module)
        gap = residual(case.cohort.layout, result, module) - target
        assert float(gap.norm()) < 1e-15 * float(target.norm())


def test_a_client_without_weight_is_not_shown_to_anybody():
    case = make_lora_round("random", [1.0, 0.0, 2.0], SHAPES, 3)
    with_it = method().aggregate(case.cohort, case.previous)
    without = method().aggregate(pick(case.cohort, [0, 2]), case.previous)
    for module, part in with_it.residual.items():
        assert part.rank == 6
        assert torch.equal(part.outer, without.residual[module].outer)
        assert torch.equal(part.inner, without.residual[module].inner)


def test_the_next_adapter_is_fresh_and_costs_no_traffic():
    case = make_lora_round("random", [1.0, 2.0], SHAPES, 3, dtype=torch.float32)
    result = method(seed=4).aggregate(case.cohort, case.previous)
    layout = case.cohort.layout
    assert [slot.name for slot in result.changed] == ["head"]
    for module in layout.modules:
        b, a = factors(layout, result.row, module)
        assert not b.any()
        random = torch.Generator().manual_seed(derive_seed(4, "flora", 1, module))
        peft = torch.nn.init.kaiming_uniform_(torch.empty(a.shape), a=sqrt(5), generator=random)
        torch.testing.assert_close(a.float(), peft, rtol=1e-6, atol=0)
    heads = layout.view(case.cohort.updates, layout.by_name["head"])
    expected = (heads[0] + 2 * heads[1]) / 3
    torch.testing.assert_close(layout.view(result.row, layout.by_name["head"]), expected)
    assert isnan(result.steps["m0"].condition)
    assert method().capabilities.restarts


def test_a_fresh_adapter_follows_from_seed_purpose_and_module_alone():
    layout = FactorLayout.build(
        [(m, f, 4, 400) for m in ("k", "q") for f in "AB"], [("head", (3,))]
    )
    row = torch.arange(layout.size, dtype=torch.float64)
    before = row.clone()
    draws = {
        key: fresh_adapter(row, layout, *key)
        for key in [(0, "flora", 1), (0, "flora", 2), (1, "flora", 1), (0, "florist", 1)]
    }
    assert torch.equal(row, before)
    firsts = []
    for fresh in draws.values():
        _, a = factors(layout, fresh, "q")
        assert float(a.abs().max()) <= 0.05
        assert float(a.std()) == pytest.approx(0.05 / sqrt(3), rel=0.05)
        assert torch.equal(layout.view(fresh, layout.by_name["head"]), row[-16:-13])
        assert not torch.equal(a, factors(layout, fresh, "k")[1])
        firsts.append(float(a[0, 0]))
    assert len(set(firsts)) == 4
    again = fresh_adapter(row.float(), layout, 0, "flora", 1)
    assert torch.equal(again[:-16], draws[0, "flora", 1][:-16].float())


def test_a_client_of_lower_rank_draws_the_leading_rows():
    case = make_lora_round("random", [1.0], SHAPES, 3)
    layout = case.cohort.layout
    row = method().aggregate(case.cohort, case.previous).row
    mine = method().for_client(Broadcast(layout, row), case.previous, [1, 2, 3, 2])
    for module, rank, (d_out, d_in) in zip(layout.modules, [1, 2, 3, 2], SHAPES, strict=True):
        own = FactorLayout.build([(module, "A", rank, d_in), (module, "B", rank, d_out)])
        drawn = fresh_adapter(torch.zeros(own.size).double(), own, 0, "flora", 1)
        _, a = factors(layout, mine, module)
        assert torch.equal(a[:rank], factors(own, drawn, module)[1])
        assert not a[rank:].any()


def test_a_stack_above_the_limit_is_refused_before_anything_is_formed():
    case = make_lora_round("mixed_ranks", [1.0, 2.0, 4.0], SHAPES, 3)
    assert method(max_rank=6).aggregate(case.cohort, case.previous).residual["m0"].rank == 6
    message = r"round 1: the clients' factors of m0 stack to rank 6, above max_rank 5 .* florist"
    with pytest.raises(FedcoreError, match=message):
        method(max_rank=5).aggregate(case.cohort, case.previous)
