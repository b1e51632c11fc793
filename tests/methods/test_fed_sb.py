from __future__ import annotations

from dataclasses import replace
from math import isnan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.cohort import Cohort, CohortBuilder
from fedcore.data.validation import digest
from fedcore.errors import FedcoreError
from fedcore.federation.diagnostics import diagnose
from fedcore.methods import Broadcast, create_method
from fedcore_kernels.layout import FactorLayout
from tests.property.adapters import tri_state
from tests.property.method_rounds import make_method_round

METHOD = create_method("fed_sb")
WEIGHTS = st.lists(st.floats(0.01, 1e6), min_size=1, max_size=6)


def update(layout, row, module):
    A, R, B = (layout.view(row, layout.by_name[f"{module}.{f}"]).double() for f in "ARB")
    return B.T @ R @ A


def client_update(cohort, n, previous, module):
    return update(
        previous.layout,
        previous.layout.scatter(previous.row, cohort.layout, cohort.updates[n]),
        module,
    )


def mean_update(cohort, previous, module):
    return sum(
        share * client_update(cohort, n, previous, module)
        for n, share in enumerate(cohort.shares.tolist())
    )


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@given(WEIGHTS, st.integers(0, 2**20))
def test_the_mean_of_the_cores_is_the_mean_of_the_updates(weights, seed):
    cohort, previous = make_method_round(METHOD, weights, seed=seed)
    result = METHOD.aggregate(cohort, previous)
    for module in previous.layout.modules:
        expected = mean_update(cohort, previous, module)
        assert relative(update(previous.layout, result.row, module), expected) <= 1e-14
    for slot in previous.layout:
        before, after = (previous.layout.view(r, slot) for r in (previous.row, result.row))
        assert torch.equal(before, after) == (slot.factor in ("A", "B"))
    for found in diagnose(cohort, result, previous, "tri"):
        assert found.aggregation_error <= 1e-14
        assert found.factor_drift > 0


def test_only_cores_and_the_head_travel():
    _, previous = make_method_round(METHOD, [1.0])
    for round in range(3):
        layout = METHOD.upload_layout(previous.layout, round)
        assert {slot.factor for slot in layout.factor_slots} == {"R"}
        assert sum(slot.numel for slot in layout.factor_slots) == 3 * 3**2
        assert [slot.name for slot in layout.dense_slots] == ["head"]
        frozen = METHOD.frozen_layout(previous.layout, round)
        assert {slot.name for slot in frozen} == {
            f"{module}.{factor}" for module in ("m0", "m1", "m2") for factor in "AB"
        }
        assert METHOD.plan(round).trains == {"R"}
        assert METHOD.plan(round).keeps == frozenset()


def test_a_client_with_other_bases_is_refused():
    _, previous = make_method_round(METHOD, [1.0])
    sent = METHOD.upload_layout(previous.layout, 0)
    frozen = METHOD.frozen_layout(previous.layout, 0)
    expected = digest(previous.layout.gather(previous.row, frozen), frozen)
    for factor in "AB":
        held = previous.row.clone()
        view = previous.layout.view(held, previous.layout.by_name[f"m1.{factor}"])
        view[0, 0] = torch.nextafter(view[0, 0], torch.tensor(9.0).double())
        builder = CohortBuilder(sent, ["a"], round=0, dtype=torch.float64)
        builder.row("a").copy_(previous.layout.gather(held, sent))
        mine = digest(previous.layout.gather(held, frozen), frozen)
        builder.receive("a", 1.0, round=0, frozen=mine, expected_frozen=expected)
        with pytest.raises(FedcoreError, match=r"client a: a frozen factor or frame differs"):
            builder.finish()


def test_the_diagnosis_is_the_dense_error():
    cohort, previous = make_method_round(METHOD, [3.0, 1.0, 2.0])
    wrong = METHOD.aggregate(cohort, previous)
    slot = previous.layout.by_name["m1.R"]
    damaged = wrong.row.clone()
    previous.layout.view(damaged, slot)[0, 1] += 0.25
    for found in diagnose(cohort, replace(wrong, row=damaged), previous, "tri"):
        expected = mean_update(cohort, previous, found.module)
        error = relative(update(previous.layout, damaged, found.module), expected)
        assert found.aggregation_error == pytest.approx(error, rel=1e-9, abs=1e-14)
        assert (found.aggregation_error > 1e-3) == (found.module == "m1")


def test_the_diagnosis_sees_all_three_factors_of_an_upload():
    states = {c: tri_state(i, dtype=torch.float64) for i, c in enumerate("abc")}
    cohort = Cohort.from_states(states)
    previous = Broadcast(cohort.layout, tri_state(9, dtype=torch.float64).to_row(cohort.layout))
    mean = METHOD.from_mean(cohort.updates.mean(0), cohort.layout, previous)
    for found in diagnose(cohort, mean, previous, "tri"):
        expected = mean_update(cohort, previous, found.module)
        error = relative(update(cohort.layout, mean.row, found.module), expected)
        assert error > 0.1
        assert found.aggregation_error == pytest.approx(error, rel=1e-9)


def test_cores_that_cancel_leave_no_update_and_no_nan():
    cohort, previous = make_method_round(METHOD, [2.0, 2.0])
    opposed = replace(cohort, updates=torch.stack([cohort.updates[0], -cohort.updates[0]]))
    result = METHOD.aggregate(opposed, previous)
    for module in previous.layout.modules:
        assert update(previous.layout, result.row, module).abs().max() == 0
    zero = replace(cohort, updates=torch.zeros_like(cohort.updates))
    result = METHOD.aggregate(zero, previous)
    assert torch.isfinite(result.row).all()
    for module in previous.layout.modules:
        assert update(previous.layout, result.row, module).abs().max() == 0
    assert all(isnan(d.aggregation_error) for d in diagnose(zero, result, previous, "tri"))


def test_modules_at_once_are_modules_one_by_one():
    cohort, previous = make_method_round(METHOD, [2.0, 3.0, 1.0], dtype=torch.float32)
    whole = METHOD.aggregate(cohort, previous).row
    for module in previous.layout.modules:
        single = FactorLayout.build(
            [
                (s.module, s.factor, s.rows, s.width)
                for s in previous.layout.factor_slots
                if s.module == module
            ]
        )
        sent = METHOD.upload_layout(single, 1)
        part = replace(
            cohort,
            layout=sent,
            updates=cohort.layout.gather(cohort.updates, sent),
            ranks=cohort.ranks[:, :1],
            scalings=cohort.scalings[:, :1],
        )
        start = Broadcast(single, previous.layout.gather(previous.row, single))
        found = METHOD.aggregate(part, start).row
        assert torch.equal(found, previous.layout.gather(whole, single))


def test_equal_updates_at_different_scalings_give_equal_results():
    def cohort(alphas):
        states = {}
        for n, alpha in enumerate(alphas):
            state = tri_state(n, dtype=torch.float64)
            shared = tri_state(50, dtype=torch.float64)
            factors = {
                module: {**shared.factors[module], "R": named["R"] * 3.0 / alpha}
                for module, named in state.factors.items()
            }
            scaling = dict.fromkeys(factors, alpha / 3.0)
            states[f"c{n}"] = replace(state, factors=factors, scaling=scaling)
        return Cohort.from_states(states, {"c0": 1.0, "c1": 2.0})

    one, other = cohort([3.0, 3.0]), cohort([12.0, 0.5])
    previous = Broadcast(one.layout, tri_state(50, dtype=torch.float64).to_row(one.layout))
    found = [METHOD.aggregate(c, previous).row for c in (one, other)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-14, atol=1e-14)


def test_the_method_says_how_its_adapter_starts():
    assert METHOD.adapter_options == {"init": "xs"}
    assert create_method("fedsb", init="random").adapter_options == {"init": "random"}
    assert create_method("fedit").adapter_options == {}
    for wrong in ("lora", "ce", "sb", "", None):
        with pytest.raises(FedcoreError, match="unknown init of fed_sb"):
            create_method("fed_sb", init=wrong)
