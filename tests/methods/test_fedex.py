from math import inf, isnan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.validation import identical_rows
from fedcore.errors import FedcoreError
from fedcore.methods import create_method
from fedcore.methods.lora.fedex import weighted_deviations
from tests.property.lora_rounds import LoraRound, lora_rounds, make_lora_round, pick
from tests.reference.residuals import covariance, received, residual
from tests.reference.updates import factors, mean_update

SHAPES = ((33, 7), (64, 33), (7, 33), (64, 33))
KINDS = ("random", "near", "identical", "shared_a", "repeated_row", "zero")


def method(**options):
    return create_method("fedex", **options)


def reflection(shares):
    """``I - 2 u u^T / u^T u`` with ``u = sqrt(w) - e_p``, p the client of the largest weight."""
    u = shares.sqrt()
    u[shares.argmax()] -= 1
    return torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u) / (u @ u)


@given(
    st.lists(st.floats(0.01, 100), min_size=2, max_size=7),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_deviations_are_the_rows_of_the_householder_reflection(weights, rank, width, seed):
    shares = torch.tensor(weights, dtype=torch.float64)
    shares /= shares.sum()
    random = torch.Generator().manual_seed(seed)
    clients = torch.randn(2, len(shares), rank, width, generator=random, dtype=torch.float64)
    before = clients.clone()
    got = weighted_deviations(clients.flatten(1, 2), shares)
    mixed = torch.einsum("jn,n,lnrk->ljrk", reflection(shares), shares.sqrt(), clients)
    pivot = int(shares.argmax())
    rest = [n for n in range(len(shares)) if n != pivot]
    torch.testing.assert_close(got, mixed[:, rest].flatten(1, 2), rtol=1e-11, atol=1e-11)
    mean = (shares[:, None, None] * clients).sum(1)
    torch.testing.assert_close(mixed[:, pivot], mean, rtol=1e-11, atol=1e-11)
    assert torch.equal(clients, before)


@given(lora_rounds(kinds=KINDS))
def test_fedit_and_the_residual_are_the_dense_mean(case: LoraRound):
    cohort, layout = case.cohort, case.cohort.layout
    result = method().aggregate(cohort, case.previous)
    assert torch.equal(result.row, create_method("fedit").aggregate(cohort, case.previous).row)
    assert result.changed == layout
    size = float(cohort.updates.square().sum())
    present = int((cohort.weights > 0).sum())
    for module in layout.modules:
        target = mean_update(cohort, module)
        assert float((received(layout, result, module) - target).norm()) <= 1e-14 * size
        gap = residual(layout, result, module) - covariance(cohort, module)
        assert float(gap.norm()) <= 1e-14 * size
        part, step = result.residual.get(module), result.steps[module]
        assert step.rank == (part.rank if part else 0)
        assert step.rank <= (present - 1) * layout.by_name[f"{module}.A"].rows
        assert isnan(step.condition)
    assert result.flags == ()


def test_far_apart_clients_need_every_one_of_the_rows():
    case = make_lora_round("random", [1.0, 2.0, 0.5, 3.0], ((64, 64),), 3)
    part = method().aggregate(case.cohort, case.previous).residual["m0"]
    assert part.rank == 9
    assert int(torch.linalg.matrix_rank(part.outer.T @ part.inner)) == 9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["identical", "shared_a", "zero"])
@pytest.mark.parametrize("options", [{}, {"residual_rank": 2}])
@pytest.mark.parametrize("weights", [[1.0, 2.0, 7.0], [0.3, 0.3, 0.3], [1e-9, 1.0, 1e9], [5.0]])
def test_clients_of_one_factor_leave_nothing_at_all(weights, options, kind, dtype):
    case = make_lora_round(kind, weights, SHAPES, 3, dtype=dtype)
    result = method(**options).aggregate(case.cohort, case.previous)
    assert result.residual == {}
    assert result.flags == ()
    assert {step.rank for step in result.steps.values()} == {0}


def test_clients_that_differ_in_one_bit_leave_that_bit():
    case = make_lora_round("identical", [1.0, 1.0, 2.0], ((33, 7),), 2, dtype=torch.float32)
    layout = case.cohort.layout
    updates = case.cohort.updates.clone()
    for factor in "AB":
        entry = layout.view(updates[2], layout.by_name[f"m0.{factor}"])
        entry[1, 3] = torch.nextafter(entry[1, 3], torch.tensor(inf))
    cohort = case.with_updates(updates)
    result = method().aggregate(cohort, case.previous)
    assert result.residual["m0"].rank == 2
    got, step = residual(layout, result, "m0"), updates.double() - updates[0].double()
    b, a = factors(layout, step[2], "m0")
    # Half of the weight is on either side: a quarter of the product of the differences.
    expected = b @ a / 4
    assert float((got - expected).norm()) < 1e-6 * float(expected.norm())
    assert int((got != 0).sum()) == 1


@pytest.mark.parametrize("weights", [[1.0, 2.0, 0.5], [1e12, 1.0, 3.0], [1.0, 1e12, 3.0]])
@pytest.mark.parametrize("deviation", [2.0**-40, 2.0**-20, 1.0])
def test_the_residual_is_right_relative_to_itself(deviation, weights):
    """However close the clients are, and even if one holds all of the weight but 1e-12."""
    case = make_lora_round("random", weights, SHAPES, 3)
    layout = case.cohort.layout
    random = torch.Generator().manual_seed(3)
    steps = torch.randint(-9, 9, case.cohort.updates.shape, generator=random).double()
    # Exact in fp64, so that the deviations are the same around zero.
    near = case.with_updates(case.previous.row.round() + deviation * steps)
    zero = case.with_updates(deviation * steps)
    result = method().aggregate(near, case.previous)
    for module in layout.modules:
        expected = covariance(zero, module)
        gap = residual(layout, result, module) - expected
        assert float(gap.norm()) <= 1e-14 * float(expected.norm())


@given(lora_rounds(kinds=("random", "near")), st.integers(1, 30))
def test_a_residual_of_lower_rank_is_the_best_of_its_rank(case: LoraRound, rank):
    layout = case.cohort.layout
    result = method(residual_rank=rank).aggregate(case.cohort, case.previous)
    shares = []
    for module in layout.modules:
        expected = covariance(case.cohort, module)
        values = torch.linalg.svdvals(expected)
        size = float(values[0])
        step = result.steps[module]
        assert step.rank <= rank
        if case.cohort.weights.count_nonzero() == 1:
            assert step.rank == 0
            continue
        gap = residual(layout, result, module) - expected
        assert abs(float(gap.norm()) - float(values[rank:].norm())) <= 1e-11 * size
        assert step.condition == pytest.approx(size / float(values[step.rank - 1]), rel=1e-3)
        shares.append(float(values[rank:].norm() / values.norm()))
    if max(shares, default=0.0) > 1e-6:
        (flag,) = result.flags
        share = f"{100 * max(shares):.3g}%"
        assert flag.startswith(f"residual_rank {rank} leaves out up to {share} of the residual")
        assert flag.endswith(f"most in {layout.modules[shares.index(max(shares))]}")
    elif max(shares, default=0.0) < 1e-13:
        assert result.flags == ()


def test_what_a_cut_costs_is_in_its_traits_and_not_called_exact():
    case = make_lora_round("random", [1.0, 2.0, 0.5], ((64, 33), (33, 64)), 3)
    whole = method().aggregate(case.cohort, case.previous)
    enough = method(residual_rank=6).aggregate(case.cohort, case.previous)
    cut = method(residual_rank=5).aggregate(case.cohort, case.previous)
    assert (len(whole.flags), len(enough.flags), len(cut.flags)) == (0, 0, 1)
    assert "residual_rank" in method().description.exact
    for module in case.cohort.layout.modules:
        target = mean_update(case.cohort, module)
        for result, low, high in ((whole, 0, 1e-14), (enough, 0, 1e-14), (cut, 1e-3, 1)):
            gap = received(case.cohort.layout, result, module) - target
            assert low <= float(gap.norm() / target.norm()) <= high


def test_behind_a_sum_only_aggregator_the_residual_would_vanish():
    """So uploads that are all the same bits are refused, and no mean is accepted in their place."""
    case = make_lora_round("random", [1.0, 2.0, 0.5], SHAPES, 3)
    layout = case.cohort.layout
    plain = create_method("fedit").aggregate(case.cohort, case.previous)
    overwritten = case.with_updates(plain.row.expand_as(case.cohort.updates).clone())
    result = method().aggregate(overwritten, case.previous)
    assert result.residual == {}
    for module in layout.modules:
        target = mean_update(case.cohort, module)
        missing = (target - received(layout, result, module)).norm()
        torch.testing.assert_close(missing, covariance(case.cohort, module).norm())
        assert float(missing) > 0.3 * float(target.norm())
    assert identical_rows(overwritten.updates)
    assert not method().capabilities.linear
    with pytest.raises(FedcoreError, match="fedex needs every upload"):
        method().from_mean(plain.row, layout, case.previous)


def test_every_client_can_recover_every_upload():
    """Which is what the privacy note says: the reflection can be undone."""
    case = make_lora_round("random", [1.0, 2.0, 0.5], SHAPES, 3)
    layout, shares = case.cohort.layout, case.cohort.shares
    result = method().aggregate(case.cohort, case.previous)
    for module in layout.modules:
        _, mean = factors(layout, result.row, module)
        first, last = result.residual[module].inner.split(3)
        mixed = torch.stack([first, mean, last])
        found = torch.einsum("jn,jrk->nrk", reflection(shares), mixed)
        for n in range(3):
            sent = factors(layout, case.cohort.updates[n], module)[1]
            torch.testing.assert_close(found[n] / shares[n].sqrt(), sent)
    assert "recover" in method().description.privacy_note


def test_a_client_without_weight_is_not_part_of_the_residual():
    case = make_lora_round("random", [0.0, 1.0, 0.0, 2.0], SHAPES, 3)
    one = method().aggregate(case.cohort, case.previous)
    other = method().aggregate(pick(case.cohort, [1, 3]), case.previous)
    for module, part in one.residual.items():
        assert part.rank == 3
        assert torch.equal(part.outer, other.residual[module].outer)
        assert torch.equal(part.inner, other.residual[module].inner)
