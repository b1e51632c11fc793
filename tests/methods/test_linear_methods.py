import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.cohort import Cohort, CohortBuilder
from fedcore.federation.diagnostics import diagnose
from fedcore.methods import Broadcast, create_method
from tests.property.adapters import lora_state

MODULES = ("encoder.layer.0.query", "encoder.layer.0.value")


def lora_cohort(weights, *, seed=0, same=()):
    """A cohort of LoRA rows in fp64; the factors named in ``same`` are the broadcast's."""
    states = {f"c{n:03d}": lora_state(seed + n, dtype=torch.float64) for n in range(len(weights))}
    shared = lora_state(seed + 1000, dtype=torch.float64)
    layout = shared.layout()
    previous = Broadcast(layout, shared.to_row(layout))
    cohort = Cohort.from_states(states, dict(zip(states, weights, strict=True)))
    for slot in layout.factor_slots:
        if slot.factor in same:
            layout.view(cohort.updates, slot).copy_(layout.view(previous.row, slot))
    return cohort, previous


def part(cohort, method, previous, round):
    """The cohort as the method's upload layout of ``round`` has it."""
    layout = method.upload_layout(previous.layout, round)
    builder = CohortBuilder(layout, cohort.client_ids, round=round, dtype=torch.float64)
    for n, client in enumerate(cohort.client_ids):
        builder.row(client).copy_(cohort.layout.gather(cohort.updates[n], layout))
        builder.receive(client, float(cohort.weights[n]), round=round)
    return builder.finish()


def product(layout, row, module):
    b = layout.view(row, layout.by_name[f"{module}.B"])
    return b.T @ layout.view(row, layout.by_name[f"{module}.A"])


def mean_of_products(cohort, module, layout=None):
    layout = layout or cohort.layout
    return sum(
        share * product(layout, row, module)
        for share, row in zip(cohort.shares.tolist(), cohort.updates, strict=True)
    )


WEIGHTS = st.lists(st.floats(0.01, 1e6), min_size=1, max_size=6)


@given(WEIGHTS)
def test_fedit_is_the_hand_computed_mean_and_misses_the_covariance(weights):
    cohort, previous = lora_cohort(weights)
    result = create_method("fedit").aggregate(cohort, previous)
    for module in MODULES:
        views = {
            f: cohort.layout.view(cohort.updates, cohort.layout.by_name[f"{module}.{f}"])
            for f in "AB"
        }
        shares = cohort.shares[:, None, None]
        mean = {f: (shares * v).sum(0) for f, v in views.items()}
        for f in "AB":
            got = cohort.layout.view(result.row, cohort.layout.by_name[f"{module}.{f}"])
            torch.testing.assert_close(got, mean[f])
        deviation = {f: v - mean[f] for f, v in views.items()}
        covariance = (shares * (deviation["B"].transpose(1, 2) @ deviation["A"])).sum(0)
        gap = mean_of_products(cohort, module) - product(cohort.layout, result.row, module)
        torch.testing.assert_close(gap, covariance, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "round", "same"),
    [("ffa", 0, "A"), ("ffa", 3, "A"), ("rolora", 0, "A"), ("rolora", 1, "B"), ("rolora", 8, "A")],
)
def test_one_trained_factor_aggregates_exactly(name, round, same):
    method = create_method(name)
    cohort, previous = lora_cohort([3.0, 1.0, 5.0], same=same)
    result = method.aggregate(part(cohort, method, previous, round), previous)
    for module in MODULES:
        expected = mean_of_products(cohort, module)
        got = product(previous.layout, result.row, module)
        assert float((got - expected).norm() / expected.norm()) < 1e-14
    for slot in previous.layout.factor_slots:
        if slot.factor == same:
            untouched = previous.layout.view(previous.row, slot)
            assert torch.equal(previous.layout.view(result.row, slot), untouched)


def test_rolora_takes_turns_by_the_server_round_alone():
    method = create_method("rolora")
    assert [sorted(method.plan(t).trains) for t in range(4)] == [["B"], ["A"], ["B"], ["A"]]
    assert method.plan(5) == create_method("rolora").plan(5)
    layout = lora_state(0).layout()
    frozen = {s.factor for s in method.frozen_layout(layout, 0)}
    assert frozen == {"A"}
    assert {s.factor for s in method.upload_layout(layout, 1).factor_slots} == {"A"}


@given(WEIGHTS)
def test_the_diagnosis_is_the_dense_error(weights):
    cohort, previous = lora_cohort(weights)
    result = create_method("fedit").aggregate(cohort, previous)
    for found in diagnose(cohort, result, previous, "lora"):
        target = mean_of_products(cohort, found.module)
        gap = target - product(cohort.layout, result.row, found.module)
        expected = float(gap.norm() / target.norm())
        assert found.aggregation_error == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_the_diagnosis_of_an_exact_method_does_not_cancel():
    method = create_method("rolora")
    cohort, previous = lora_cohort([1.0, 2.0, 3.0], same="A")
    uploads = part(cohort, method, previous, 0)
    found = diagnose(uploads, method.aggregate(uploads, previous), previous, "lora")
    assert all(d.aggregation_error < 1e-14 for d in found)
    assert all(d.factor_drift > 0 for d in found)
