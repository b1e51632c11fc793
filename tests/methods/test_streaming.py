from __future__ import annotations

import gc
import itertools
import weakref
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import FedcoreError
from fedcore.methods import METHODS, Broadcast, create_method
from fedcore.methods.registry import default_methods
from fedcore.methods.shared.exact_sum import WeightedSum
from fedcore.methods.shared.linear import LinearMethod
from fedcore_kernels import KernelInputError
from tests.property.method_rounds import family_layout, make_method_round, random_row

LINEAR = [method.name for method in METHODS if issubclass(method, LinearMethod)]
WEIGHTS = st.lists(st.floats(0.01, 1e9), min_size=1, max_size=6)


def fed(method, cohort, previous, order=None):
    """An accumulator that was given the uploads one by one."""
    total = method.accumulator(cohort.layout, previous)
    for n in range(len(cohort)) if order is None else order:
        total.add(cohort.updates[n], float(cohort.weights[n]))
    return total


def summed(rows, weights, order):
    total = WeightedSum()
    for n in order:
        total.add(rows[n], weights[n])
    return total


def test_what_is_linear_has_an_accumulator():
    for method in default_methods():
        able = method.capabilities
        if able.population != "alone":
            assert able.linear == isinstance(method, LinearMethod), method.name


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("round", [0, 1, 2])
def test_a_stream_is_the_batch(name, round):
    method = create_method(name)
    cohort, previous = make_method_round(method, [3.0, 0.25, 100.0, 1.0, 7.0], round=round)
    batch = method.aggregate(cohort, previous)
    stream = fed(method, cohort, previous).result()
    torch.testing.assert_close(stream.row, batch.row, rtol=0, atol=1e-13)
    assert (stream.changed, stream.flags) == (batch.changed, batch.flags)
    assert {m: s.rank for m, s in stream.steps.items()} == {
        m: s.rank for m, s in batch.steps.items()
    }


@pytest.mark.parametrize("name", LINEAR)
def test_every_order_and_tree_gives_the_same_bits(name):
    method = create_method(name)
    for dtype in (torch.float32, torch.float64):
        cohort, previous = make_method_round(method, [3.0, 0.3, 1e4, 1.7], dtype=dtype)
        first = fed(method, cohort, previous).result().row
        assert first.dtype == dtype
        for order in itertools.permutations(range(4)):
            assert torch.equal(fed(method, cohort, previous, order).result().row, first)
        for split in ([[0], [1, 2, 3]], [[3, 1], [0], [2]], [[], [2, 0, 1, 3]]):
            root = method.accumulator(cohort.layout, previous)
            for leaf in split:
                root.merge(fed(method, cohort, previous, leaf))
            assert len(root) == 4
            assert torch.equal(root.result().row, first)


@given(WEIGHTS, st.integers(0, 6), st.integers(0, 2**31))
def test_sums_merge_in_any_tree_to_the_batch_mean(weights, cut, seed):
    method = create_method("fedit")
    cohort, previous = make_method_round(method, weights, seed=seed)
    left = fed(method, cohort, previous, range(min(cut, len(weights))))
    right = fed(method, cohort, previous, range(min(cut, len(weights)), len(weights)))
    right.merge(left)
    batch = method.aggregate(cohort, previous).row
    torch.testing.assert_close(right.result().row, batch, rtol=1e-12, atol=1e-12)


@given(
    st.lists(
        st.tuples(
            st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(1, 2**28)
        ),
        min_size=1,
        max_size=8,
    )
)
def test_whole_weights_on_fp32_rows_lose_only_the_last_roundings(terms):
    """However much cancels: the products are exact, and so is the sum to 106 bits."""
    total = WeightedSum()
    for value, weight in terms:
        total.add(torch.tensor([value], dtype=torch.float32), weight)
    exact = sum(Fraction(value) * weight for value, weight in terms)
    largest = max(abs(Fraction(value)) * weight for value, weight in terms)
    exact, largest = (number / sum(weight for _, weight in terms) for number in (exact, largest))
    gap = abs(Fraction(total.mean(torch.float64).item()) - exact)
    # The last term is the smallest positive fp64.
    assert gap <= abs(exact) / 2**51 + largest / 2**100 + Fraction(2) ** -1074


def test_orders_that_move_a_plain_fp64_sum_do_not_move_this_one():
    values = [1.0, 2.0**53, 2.0**-30, -(2.0**53), 3.0]
    plain, ours = set(), set()
    for order in itertools.permutations(range(5)):
        rows = [torch.tensor([v], dtype=torch.float64) for v in values]
        naive = torch.zeros(1, dtype=torch.float64)
        for n in order:
            naive = naive + rows[n]
        plain.add(naive.item())
        ours.add(summed(rows, [1.0] * 5, order).mean(torch.float64).item())
    assert len(plain) > 3
    assert ours == {(4.0 + 2.0**-30) / 5}


@given(st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=9), st.integers(0, 2**31))
def test_the_mean_of_identical_rows_is_that_row(weights, seed):
    random = torch.Generator().manual_seed(seed)
    wide = torch.randn(50, generator=random, dtype=torch.float64) * 10
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        row = wide.to(dtype)
        total = summed([row] * len(weights), weights, range(len(weights)))
        assert torch.equal(total.mean(torch.float32), row.float())
        assert torch.equal(total.mean(dtype), row)
    mean = summed([wide] * len(weights), weights, range(len(weights))).mean(torch.float64)
    assert float(((mean - wide) / wide).abs().max()) <= 2.0**-51


def test_counts_near_the_end_of_fp16_do_not_overflow():
    row = torch.tensor([65504.0, -65504.0, 50.0], dtype=torch.float16)
    assert torch.equal(summed([row, row], [1e9, 2000.0], (0, 1)).mean(), row.float())


def live_bytes():
    gc.collect()
    return sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor)


def test_a_hundred_thousand_clients_need_no_more_memory_than_one():
    """Client n sends ``u + n v`` with weight n: the mean is ``u + v sum n^2 / sum n``."""
    clients, method = 100_000, create_method("fedit")
    layout = family_layout("lora")
    previous = Broadcast(layout, random_row(layout, 0).float())
    # Multiples of 2^-6, so that every upload is exact in fp32.
    u, v = ((random_row(layout, s) * 16).round().div(64).float() for s in (1, 2))
    total, sizes = method.accumulator(layout, previous), []
    for n in range(1, clients + 1):
        row = u + n * v
        total.add(row, n)
        if n in (2, clients):
            last = weakref.ref(row)
            del row
            assert last() is None
            sizes.append(live_bytes())
    assert sizes[0] == sizes[1]
    assert len(total) == clients
    # sum n^2 / sum n = (2 N + 1) / 3
    expected = u.double() + v.double() * (2 * clients + 1) / 3
    torch.testing.assert_close(total.result().row.double(), expected, rtol=2**-23, atol=0)


def test_ten_thousand_grams_stream_into_one_factor():
    """Client n holds ``(n / N) A_prev``: ``Q = A_prev^T A_prev sum w_n (n / N)^2``."""
    clients, method = 10_000, create_method("florg.whitened")
    layout = family_layout("gram")
    previous = Broadcast(layout, random_row(layout, 3))
    one = method.prepare_upload(previous.row, layout, previous, 0).row
    total = method.accumulator(layout, previous)
    for n in range(1, clients + 1):
        total.add(one * (n / clients) ** 2, 2.0)
    moment = (clients + 1) * (2 * clients + 1) / (6 * clients**2)
    result = total.result()
    assert result.flags == ()
    for slot in layout.factor_slots:
        expected = layout.view(previous.row, slot) * moment**0.5
        torch.testing.assert_close(layout.view(result.row, slot), expected, rtol=0, atol=1e-12)


def test_an_empty_stream_keeps_the_state_and_one_without_weight_is_refused():
    method = create_method("fedit")
    cohort, previous = make_method_round(method, [1.0])
    total = method.accumulator(cohort.layout, previous)
    kept = total.result()
    assert torch.equal(kept.row, previous.row)
    assert kept.flags == ("no valid upload: the global state is kept",)
    assert len(kept.changed) == 0
    total.add(cohort.updates[0], 0.0)
    with pytest.raises(FedcoreError, match="the weights of all uploads are zero"):
        total.result()
    total.add(cohort.updates[0], 2.0)
    assert torch.equal(total.result().row, cohort.updates[0])
    with pytest.raises(ValueError, match="positive weight"):
        WeightedSum().mean()


@pytest.mark.parametrize(
    ("value", "weight", "message"),
    [
        (float("nan"), 1.0, r"m1\.B holds 1 values that are not finite, such as nan"),
        (float("inf"), 0.0, r"m1\.B holds 1 values"),
        (1.0, -1.0, "its weight is -1.0"),
        (1.0, float("inf"), "its weight is inf"),
        (1.0, float("nan"), "its weight is nan"),
    ],
)
def test_what_is_refused_leaves_the_sum_as_it_was(value, weight, message):
    method = create_method("fedit")
    cohort, previous = make_method_round(method, [1.0, 3.0])
    total = fed(method, cohort, previous)
    before = total.result().row
    bad = cohort.updates[0].clone()
    cohort.layout.view(bad, cohort.layout.by_name["m1.B"])[1, 2] = value
    with pytest.raises(FedcoreError, match=message):
        total.add(bad, weight)
    with pytest.raises(FedcoreError, match=r"row has shape \(2, 224\); pass \(224,\)"):
        total.add(cohort.updates, 1.0)
    with pytest.raises(KernelInputError, match="mean has shape"):
        method.from_mean(bad[:-1], cohort.layout, previous)
    assert torch.equal(total.result().row, before)
    assert len(total) == 2


def test_bare_sums_look_at_weights_and_shapes():
    total = summed([torch.ones(3)], [2.0], (0,))
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and not negative"):
            total.add(torch.ones(3), weight)
    with pytest.raises(ValueError, match=r"row has shape \(2,\), those before it \(3,\)"):
        total.add(torch.ones(2), 1.0)
    with pytest.raises(ValueError, match=r"other has rows of shape \(2,\), this sum of \(3,\)"):
        total.merge(summed([torch.ones(2)], [1.0], (0,)))
    total.add(torch.full((3,), float("nan")), 0.0)
    assert total.weight == 2.0
    assert torch.equal(total.mean(), torch.ones(3))


def test_adding_changes_neither_the_row_nor_the_sum_that_was_merged():
    row = torch.ones(3, dtype=torch.float64)
    one, other = summed([row], [1.0], (0,)), summed([row * 2], [1.0], (0,))
    one.merge(other)
    one.add(row, 5.0)
    empty = WeightedSum()
    empty.merge(other)
    empty.add(row, 1.0)
    assert torch.equal(row, torch.ones(3, dtype=torch.float64))
    assert other.weight == 1.0
    assert torch.equal(other.mean(torch.float64), row * 2)


def test_accumulators_of_different_rounds_do_not_merge():
    cohort, previous = make_method_round(create_method("fedit"), [1.0])
    one = fed(create_method("fedit"), cohort, previous)
    part = cohort.layout.select("B")
    for method, layout in (("ffa", cohort.layout), ("fedit", part)):
        other = create_method(method).accumulator(layout, previous)
        with pytest.raises(FedcoreError, match=r"an accumulator of .* cannot be merged"):
            one.merge(other)
