"""FLoRA-NA as a method: what the next global row is for the uploads of a round."""

import math
from dataclasses import replace

import pytest
import torch

from fedcore.data.cohort import Cohort
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
