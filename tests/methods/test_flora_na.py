"""FLoRA-NA as a method: what the next global row is for the uploads of a round."""

import math
from dataclasses import replace

import pytest
import torch

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.federation.diagnostics import diagnose
from fedcore.methods import Broadcast, create_method
from fedcore_kernels import weighted_mean
from tests.property.adapters import lora_state
from tests.property.families import FAMILIES, make_family

WIDTHS = {"deep.query": (12, 10), "deep.value": (12, 7), "flat.query": (12, 10), "out": (5, 9)}
"""Module to d_in and d_out: two of one shape, one that shares d_in only, and one by itself."""


def cohort_of(family, clients=4, rank=3, seed=0, weights=None):
    """A cohort in fp64 with a head, its factors drawn from a family, and the broadcast."""
    modules = [(name, *widths) for name, widths in WIDTHS.items()]
    states = {
        f"c{n:03d}": lora_state(seed + n, rank, float(rank), modules=modules, dtype=torch.float64)
        for n in range(clients)
    }
    weights = weights or [1.0 + n for n in range(clients)]
    cohort = Cohort.from_states(states, dict(zip(states, weights, strict=True)))
    for j, (name, widths) in enumerate(WIDTHS.items()):
        left, right, _ = make_family(family, clients, rank, widths[::-1], 10 * seed + j)
        view(cohort.layout, cohort.updates, f"{name}.B").copy_(left[:, 0])
        view(cohort.layout, cohort.updates, f"{name}.A").copy_(right[:, 0])
    return cohort, Broadcast(cohort.layout, torch.zeros_like(cohort.updates[0]))


def view(layout, row, name):
    return layout.view(row, layout.by_name[name])


def products(layout, row):
    return {m: view(layout, row, f"{m}.B").mT @ view(layout, row, f"{m}.A") for m in WIDTHS}


def mean_products(cohort):
    each = products(cohort.layout, cohort.updates)
    return {m: torch.einsum("n,npq->pq", cohort.shares, found) for m, found in each.items()}


def aggregate(cohort, previous, **options):
    return create_method("flora_na", **options).aggregate(cohort, previous)


def errors(cohort, row):
    """Squared error of every module's product."""
    target, found = mean_products(cohort), products(cohort.layout, row)
    return {m: float((target[m] - found[m]).square().sum()) for m in WIDTHS}


def assert_same_products(layout, one, other, tolerance):
    first, second = products(layout, one), products(layout, other)
    for module, expected in first.items():
        assert float((second[module] - expected).norm() / expected.norm()) < tolerance, module


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"align": True}, {"affine": True}])
def test_the_report_is_the_error_and_lies_between_its_bounds(family, options):
    cohort, previous = cohort_of(family)
    result = aggregate(cohort, previous, **options)
    fedavg = errors(cohort, create_method("fedit").aggregate(cohort, previous).row)
    found, target = errors(cohort, result.row), mean_products(cohort)
    assert set(result.steps) == set(WIDTHS)
    for module, step in result.steps.items():
        size = float(target[module].square().sum())
        assert step.target == pytest.approx(size, rel=1e-10)
        assert step.objective == pytest.approx(found[module], rel=1e-9, abs=1e-12 * size)
        values = torch.linalg.svdvals(target[module])
        assert step.floor == pytest.approx(float(values[3:].square().sum()), rel=1e-8)
        assert step.gap == pytest.approx(float(1 - values[3] / values[2]), rel=1e-6)
        assert step.floor <= step.objective + 1e-12 * size
        assert step.objective <= step.ceiling + 1e-12 * size
        if "align" not in options:
            assert step.ceiling <= fedavg[module] + 1e-12 * size
        own = torch.linalg.svdvals(products(cohort.layout, result.row)[module])
        assert step.rank == 3
        assert step.condition == pytest.approx(float(own[0] / own[2]), rel=1e-6)
    for diagnosis in diagnose(cohort, result, previous, "lora"):
        step = result.steps[diagnosis.module]
        error = (step.objective / step.target) ** 0.5
        assert diagnosis.aggregation_error == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_factors_are_combinations_of_the_clients(family):
    cohort, previous = cohort_of(family)
    row = aggregate(cohort, previous).row
    for module in WIDTHS:
        for factor in "AB":
            uploads = view(cohort.layout, cohort.updates, f"{module}.{factor}").flatten(1)
            got = view(cohort.layout, row, f"{module}.{factor}").flatten()
            fitted = torch.linalg.lstsq(uploads.mT, got[:, None], driver="gelsd").solution
            torch.testing.assert_close((uploads.mT @ fitted)[:, 0], got, rtol=0, atol=1e-10)


def test_the_head_is_averaged_and_the_rest_is_not():
    cohort, previous = cohort_of("corr")
    row = aggregate(cohort, previous).row
    mean = weighted_mean(cohort.updates, cohort.weights)
    for slot in cohort.layout:
        same = torch.equal(
            view(cohort.layout, row, slot.name), view(cohort.layout, mean, slot.name)
        )
        assert same == slot.dense


def test_one_client_or_equal_clients_keep_their_model():
    cohort, previous = cohort_of("indep")
    equal = replace(cohort, updates=cohort.updates[:1].expand(4, -1).clone())
    single = replace(
        cohort,
        updates=cohort.updates[:1],
        weights=cohort.weights[:1],
        client_ids=cohort.client_ids[:1],
        ranks=cohort.ranks[:1],
        scalings=cohort.scalings[:1],
    )
    for one in (single, equal):
        for options in ({}, {"align": True}, {"affine": True}):
            result = aggregate(one, previous, **options)
            assert_same_products(cohort.layout, cohort.updates[0], result.row, 1e-12)
            assert not result.flags
            assert all(step.objective < 1e-24 * step.target for step in result.steps.values())


def test_alignment_makes_rotations_harmless():
    cohort, previous = cohort_of("rot", clients=6)
    plain = errors(cohort, aggregate(cohort, previous).row)
    result = aggregate(cohort, previous, align=True)
    aligned = errors(cohort, result.row)
    turned = cohort.updates.clone()
    generator = torch.Generator().manual_seed(1)
    for n in range(6):
        for module in WIDTHS:
            turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
            for factor in "AB":
                part = view(cohort.layout, turned[n], f"{module}.{factor}")
                part.copy_(turn @ part)
    again = aggregate(replace(cohort, updates=turned), previous, align=True)
    for module in WIDTHS:
        assert aligned[module] < 0.5 * plain[module]
        assert again.steps[module].objective == pytest.approx(aligned[module], rel=1e-6)
    unaligned = errors(cohort, aggregate(replace(cohort, updates=turned), previous).row)
    assert any(abs(unaligned[m] - plain[m]) > 0.05 * plain[m] for m in WIDTHS)


def test_the_cohort_decides_and_nothing_else():
    cohort, previous = cohort_of("corr")
    before = cohort.updates.clone()
    base = aggregate(cohort, previous).row
    assert torch.equal(cohort.updates, before)
    assert not bool(previous.row.any())
    scaled = aggregate(replace(cohort, weights=cohort.weights * 7), previous).row
    torch.testing.assert_close(scaled, base, rtol=1e-8, atol=1e-10)
    order = [2, 0, 3, 1]
    moved = replace(cohort, updates=cohort.updates[order], weights=cohort.weights[order])
    torch.testing.assert_close(aggregate(moved, previous).row, base, rtol=1e-8, atol=1e-10)


def test_splitting_a_client_leaves_the_products():
    cohort, previous = cohort_of("consensus")
    twice = [0, 0, 1, 2, 3]
    split = replace(
        cohort,
        updates=cohort.updates[twice],
        weights=cohort.weights[twice] * torch.tensor([0.5, 0.5, 1, 1, 1]),
        client_ids=("a", "b", "c", "d", "e"),
        ranks=cohort.ranks[twice],
        scalings=cohort.scalings[twice],
    )
    options = {"sweeps": 500, "tolerance": 1e-13}
    one, other = (aggregate(c, previous, **options).row for c in (cohort, split))
    assert_same_products(cohort.layout, one, other, 1e-5)
    torch.testing.assert_close(
        torch.tensor(list(errors(cohort, one).values())),
        torch.tensor(list(errors(cohort, other).values())),
        rtol=1e-6,
        atol=0,
    )


def test_a_client_of_weight_zero_has_no_influence():
    states = {f"c{n}": lora_state(n, dtype=torch.float64) for n in range(4)}
    weights = {"c0": 1.0, "c1": 0.0, "c2": 3.0, "c3": 2.0}
    cohort = Cohort.from_states(states, weights)
    absent = Cohort.from_states({c: s for c, s in states.items() if c != "c1"}, weights)
    previous = Broadcast(cohort.layout, torch.zeros_like(cohort.updates[0]))
    assert torch.equal(aggregate(cohort, previous).row, aggregate(absent, previous).row)


def test_equal_products_of_other_scalings_give_equal_results():
    states = {f"c{n}": lora_state(n, alpha=3.0) for n in range(3)}
    tensors = dict(states["c1"].factors)
    scaled = replace(
        states["c1"],
        factors={m: {"A": f["A"], "B": f["B"] / 4} for m, f in tensors.items()},
        scaling={m: 4 * s for m, s in states["c1"].scaling.items()},
    )
    one, other = Cohort.from_states(states), Cohort.from_states({**states, "c1": scaled})
    previous = Broadcast(one.layout, torch.zeros(one.layout.size))
    torch.testing.assert_close(aggregate(other, previous).row, aggregate(one, previous).row)


def test_single_precision_uploads_are_aggregated_in_double():
    cohort, previous = cohort_of("consensus")
    narrow = replace(cohort, updates=cohort.updates.float())
    single = Broadcast(previous.layout, previous.row.float())
    got = aggregate(narrow, single).row
    assert got.dtype == torch.float32
    wide = aggregate(replace(cohort, updates=cohort.updates.float().double()), previous).row
    torch.testing.assert_close(got, wide.float(), rtol=1e-6, atol=1e-7)


def test_modules_are_aggregated_alike_whatever_stands_beside_them(monkeypatch):
    cohort, previous = cohort_of("corr")
    together = aggregate(cohort, previous)
    monkeypatch.setattr("fedcore.methods.lora.flora_na.method._BLOCK_BYTES", 1)
    apart = aggregate(cohort, previous)
    torch.testing.assert_close(apart.row, together.row, rtol=1e-9, atol=1e-11)
    assert apart.steps.keys() == together.steps.keys()
    for module, step in together.steps.items():
        assert apart.steps[module].objective == pytest.approx(step.objective, rel=1e-9)


def test_a_first_round_without_an_update_stays_without_one():
    cohort, previous = cohort_of("indep")
    for module in WIDTHS:
        view(cohort.layout, cohort.updates, f"{module}.B").zero_()
    for options in ({}, {"align": True}, {"affine": True}, {"certify": False}):
        result = aggregate(cohort, previous, **options)
        assert bool(torch.isfinite(result.row).all())
        assert not result.flags
        for module in WIDTHS:
            assert not bool(view(cohort.layout, result.row, f"{module}.B").any())
            assert bool(view(cohort.layout, result.row, f"{module}.A").any())
            assert result.steps[module].objective == result.steps[module].target == 0


def test_a_fit_that_did_not_settle_is_used_and_flagged():
    cohort, previous = cohort_of("indep", clients=6)
    fedavg = errors(cohort, create_method("fedit").aggregate(cohort, previous).row)
    result = aggregate(cohort, previous, sweeps=1)
    assert len(result.flags) == 1
    assert result.flags[0].startswith(
        "4 of 4 modules have not converged after 1 sweeps, first deep.query"
    )
    assert all(error < fedavg[module] for module, error in errors(cohort, result.row).items())
    assert not aggregate(cohort, previous, sweeps=5000).flags


def test_without_a_certificate_the_rest_is_the_same():
    cohort, previous = cohort_of("corr")
    full, short = (aggregate(cohort, previous, certify=c) for c in (True, False))
    assert torch.equal(full.row, short.row)
    for module, step in short.steps.items():
        assert step.floor != step.floor
        assert step.gap != step.gap
        assert step.objective == full.steps[module].objective


def test_an_empty_round_keeps_the_state_and_says_so():
    cohort, previous = cohort_of("indep")
    empty = replace(
        cohort,
        updates=cohort.updates[:0],
        weights=cohort.weights[:0],
        client_ids=(),
        ranks=cohort.ranks[:0],
        scalings=cohort.scalings[:0],
    )
    result = aggregate(empty, previous)
    assert torch.equal(result.row, previous.row)
    assert result.flags


def test_mixed_ranks_and_partial_uploads_are_refused():
    states = {"a": lora_state(0, rank=2, alpha=2.0), "b": lora_state(1, rank=4, alpha=4.0)}
    mixed = Cohort.from_states(states)
    with pytest.raises(FedcoreError, match=r"client a has rank 2 .* flora_na needs equal ranks"):
        aggregate(mixed, Broadcast(mixed.layout, mixed.updates[0]))
    cohort, previous = cohort_of("indep")
    part = cohort.layout.select("A")
    partial = replace(cohort, layout=part, updates=cohort.layout.gather(cohort.updates, part))
    with pytest.raises(FedcoreError, match="flora_na needs every trained tensor"):
        aggregate(partial, previous)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sweeps": 0}, "sweeps is 0; pass an integer of 1 or more"),
        ({"sweeps": True}, "sweeps is True"),
        ({"sweeps": 2.5}, "sweeps is 2.5"),
        ({"tolerance": -1e-9}, "tolerance is -1e-09; pass a number in"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"align": 1}, "align is 1; pass true or false"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options, message):
    with pytest.raises(FedcoreError, match=message):
        create_method("flora_na", **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_diagnosis_holds_the_bounds_of_the_fit(family):
    cohort, previous = cohort_of(family)
    result = create_method("flora_na", certify=True).aggregate(cohort, previous)
    for found in diagnose(cohort, result, previous, "lora"):
        assert 0 < found.error_floor <= found.aggregation_error * (1 + 1e-9)
        assert found.aggregation_error <= found.error_ceiling * (1 + 1e-9)
    plain = create_method("product_svd").aggregate(cohort, previous)
    for found in diagnose(cohort, plain, previous, "lora"):
        assert math.isnan(found.error_floor)
        assert math.isnan(found.error_ceiling)
