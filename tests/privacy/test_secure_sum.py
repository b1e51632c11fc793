from __future__ import annotations

from dataclasses import replace
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.validation import identical_rows
from fedcore.errors import FedcoreError
from fedcore.methods import Broadcast, create_method
from fedcore.methods.requirements import EXCHANGES, methods_meeting
from fedcore.privacy import SecureSum
from fedcore.privacy.fixed_point import FixedPoint
from fedcore_kernels import nystrom_step, whitened_basis, whitened_step, whitened_upload
from fedcore_kernels.layout import FactorLayout
from tests.property.lora_rounds import make_lora_round
from tests.property.method_rounds import make_method_round
from tests.reference.updates import mean_update, update

STEP = 2 * 8.0 / 2**22
FLAT = FactorLayout.build([("m", "A", 2, 40)], [("head", (5,))])
EXCHANGING = methods_meeting((EXCHANGES,))


def secure(layout, rows, weights, *, round=0, seed=0, **grid):
    """The mean of ``rows`` as a server behind secure aggregation learns it."""
    clients = [f"c{n:03d}" for n in range(len(rows))]
    total = SecureSum(layout, clients, round, seed, **grid)
    for client, row, weight in zip(clients, rows, weights, strict=True):
        total.add(client, total.mask(client, row, weight))
    return total.result()


def drawn(clients, seed=0, size=FLAT.size):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(clients, size, generator=random, dtype=torch.float64)


def as_bytes(masked):
    return torch.bincount(masked.view(torch.uint8).long(), minlength=256).double()


@given(
    st.lists(st.integers(1, 10**6), min_size=2, max_size=6),
    st.integers(0, 2**31),
    st.sampled_from(((8.0, 2**22), (4.0, 2**10), (5.5, 2**32), (1e4, 100))),
)
def test_the_mean_is_within_a_step_and_the_weight_exact(weights, seed, grid):
    clip, levels = grid
    rows = drawn(len(weights), seed).clamp(-clip, clip)
    found = secure(FLAT, rows, weights, seed=seed, clip=clip, levels=levels)
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    assert float((found.row - shares @ rows).abs().max()) < 2 * clip / levels * (1 + 1e-9)
    assert found.weight == sum(weights)
    assert found.clipped == 0
    assert found.row.dtype == torch.float64


def test_numbers_of_the_grid_are_summed_without_error():
    random = torch.Generator().manual_seed(0)
    points = torch.randint(-(2**21), 2**21 + 1, (4, FLAT.size), generator=random)
    found = secure(FLAT, points * STEP, [1, 2, 4, 1])
    expected = (points * torch.tensor([1, 2, 4, 1])[:, None]).sum(0) / 8 * STEP
    assert torch.equal(found.row, expected.double())
    same = secure(FLAT, points[:1].expand(3, -1) * STEP, [3, 5, 10**6])
    assert torch.equal(same.row, points[0] * STEP)


def test_the_order_of_arrival_does_not_show():
    rows, clients = drawn(4), ["d", "a", "c", "b"]
    totals = []
    for order in (range(4), reversed(range(4))):
        total = SecureSum(FLAT, clients, 3, 1)
        for n in order:
            total.add(clients[n], total.mask(clients[n], rows[n], n + 1))
        totals.append(total.result())
    assert torch.equal(totals[0].row, totals[1].row)


def test_rounding_is_unbiased_and_drawn_anew():
    third = torch.full((FLAT.size,), STEP / 3, dtype=torch.float64)
    sums = []
    for round in range(40):
        total = SecureSum(FLAT, ["a", "b"], round, 0)
        for client in "ab":
            total.add(client, total.mask(client, third, 1))
        sums.append(total.result().row)
    values = torch.stack(sums) / STEP
    assert set(values.unique().tolist()) == {0.0, 0.5, 1.0}
    # 2 x 40 x P draws of probability 1/3: five standard deviations.
    draws = 2 * values.numel()
    assert float(values.mean()) == pytest.approx(1 / 3, abs=5 * (2 / 9 / draws) ** 0.5)
    assert not torch.equal(sums[0], sums[1])


@given(st.floats(-8.0, 8.0), st.floats(0.0, 1.0, exclude_max=True))
def test_a_value_becomes_one_of_its_two_neighbours(value, draw):
    grid = FixedPoint()
    values = torch.tensor([value], dtype=torch.float64)
    point, clipped = grid.encode(values, torch.tensor([draw], dtype=torch.float64))
    place = value / grid.step
    assert abs(point.item() - place) <= 1
    assert (point.item() > place) == (place % 1 > draw)
    assert clipped == 0


def test_a_masked_upload_is_uniform_whatever_was_sent():
    size = 40_000
    layout = FactorLayout.build([], [("head", (size,))])
    histograms = []
    for row in (torch.zeros(layout.size), torch.full((layout.size,), 7.9)):
        total = SecureSum(layout, ["a", "b", "c"], 0, 0)
        masked = total.mask("a", row, 3)
        counts = as_bytes(masked)
        expected = counts.sum() / 256
        # 255 degrees of freedom: mean 255, standard deviation 22.6.
        assert float(((counts - expected).square() / expected).sum()) < 255 + 5 * 22.6
        for place in range(8):
            one = as_bytes(masked.view(torch.uint8).view(-1, 8)[:, place].contiguous())
            mean = one.sum() / 256
            assert float(((one - mean).square() / mean).sum()) < 255 + 5 * 22.6
        histograms.append(counts)
    # The same mask hides both: their difference is that of the inputs and says nothing alone.
    assert not torch.equal(histograms[0], histograms[1])


def test_all_masked_uploads_but_one_are_still_noise():
    rows = drawn(3, size=8000)
    layout = FactorLayout.build([], [("head", (8000,))])
    total = SecureSum(layout, ["a", "b", "c"], 0, 0)
    uploads = [total.mask(client, row, 1) for client, row in zip("abc", rows, strict=True)]
    for client, upload in zip("ab", uploads, strict=False):
        total.add(client, upload)
    held = [value for value in vars(total).values() if isinstance(value, torch.Tensor)]
    assert len(held) == 1
    counts = as_bytes(held[0])
    expected = counts.sum() / 256
    assert float(((counts - expected).square() / expected).sum()) < 255 + 5 * 22.6
    # Correlation with what was sent: 1 / sqrt(P) by chance.
    for row in (*rows, rows.sum(0), rows[0] + rows[1]):
        pair = torch.stack([held[0][:-2].double(), row])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / 8000**0.5
    total.add("c", uploads[2])
    torch.testing.assert_close(total.result().row, rows.mean(0), rtol=0, atol=STEP)


def test_masks_of_two_rounds_seeds_or_pairs_are_unrelated():
    zero = torch.zeros(FLAT.size)
    found = [
        SecureSum(FLAT, ["a", "b", "c"], round, seed).mask(client, zero, 1)
        for round, seed, client in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, 0, "c"))
    ]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert not (one == other).any()
            assert not (one == -other).any()
    again = SecureSum(FLAT, ["c", "b", "a"], 0, 0).mask("a", zero, 1)
    assert torch.equal(again, found[0])


def test_what_is_beyond_the_clip_is_clipped_and_counted_for_all_together():
    rows = torch.zeros(3, FLAT.size)
    rows[0, :5] = torch.tensor([8.0, -8.0, 8.5, -9.0, 1e30])
    rows[2, :2] = torch.tensor([-100.0, 7.9])
    found = secure(FLAT, rows, [1, 1, 2])
    assert found.clipped == 4
    expected = torch.tensor([(8 - 2 * 8) / 4, (-8 + 2 * 7.9) / 4, 2.0, -2.0, 2.0]).double()
    torch.testing.assert_close(found.row[:5], expected, rtol=0, atol=STEP)


def test_nothing_comes_out_until_everyone_has_reported():
    rows = drawn(3)
    total = SecureSum(FLAT, ["a", "b", "c"], 4, 0)
    with pytest.raises(FedcoreError, match=r"round 4: a, b, c did not report"):
        total.result()
    total.add("b", total.mask("b", rows[1], 1))
    with pytest.raises(FedcoreError, match=r"round 4: a, c did not report, so their masks remain"):
        total.result()
    again = SecureSum(FLAT, ["b", "c"], 4, 0)
    for n, client in ((1, "b"), (2, "c")):
        again.add(client, again.mask(client, rows[n], 1))
    torch.testing.assert_close(again.result().row, rows[1:].mean(0), rtol=0, atol=STEP)


@given(st.integers(1, 10**6), st.integers(0, 4), st.integers(2, 5))
def test_beside_clients_without_weight_no_sum_shows_one_upload(weight, place, clients):
    weights = [0] * clients
    weights[place % clients] = weight
    with pytest.raises(FedcoreError, match=r"client c00\d: its weight is 0, so it has no part"):
        secure(FLAT, drawn(clients), weights)


def test_fewer_clients_than_the_smallest_cohort_are_refused():
    rows = drawn(4)
    assert secure(FLAT, rows, [1] * 4, min_cohort=4).weight == 4
    with pytest.raises(FedcoreError, match="from min_cohort = 5 clients up"):
        secure(FLAT, rows, [1] * 4, min_cohort=5)
    for least in (1, 0, -1, 2.0, True):
        with pytest.raises(FedcoreError, match=r"min_cohort is .*; pass an integer of 2 or more"):
            SecureSum(FLAT, ["a", "b"], 0, 0, min_cohort=least)


@given(
    st.integers(2, 50),
    st.integers(0, 2**31),
    st.sampled_from(["zeros", "small", "largest", "negative", "negative largest"]),
)
def test_an_upload_without_a_mask_is_refused_by_client(clients, seed, what):
    names = [f"c{n}" for n in range(clients)]
    total = SecureSum(FLAT, names, 0, seed)
    largest = total.largest_weight
    plain = {
        "zeros": torch.zeros(FLAT.size),
        "small": (drawn(1, seed)[0] * 1000).round(),
        "largest": torch.full((FLAT.size,), float(2**21)),
        "negative": torch.full((FLAT.size,), -5.0),
        "negative largest": torch.full((FLAT.size,), -float(2**21)),
    }[what].long() * (largest if "largest" in what else 30)
    plain = torch.cat([plain, torch.tensor([30, 0])])
    with pytest.raises(FedcoreError, match="client c0: its upload is not masked; send what mask"):
        total.add("c0", plain)
    total.add("c0", total.mask("c0", torch.zeros(FLAT.size), 30))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.__setitem__(-2, -(10**9)), r"total weight of the sum is -\d+, outside of \["),
        (lambda p: p.__setitem__(-2, -4), r"total weight of the sum is 0, outside of \[2, "),
        (lambda p: p.__setitem__(-2, -3), r"total weight of the sum is 1, outside of \[2, "),
        (lambda p: p.__setitem__(-2, 2**62), r"total weight of the sum is \d+, outside of \[2, "),
        (lambda p: p.__setitem__(3, 2**40), r"largest number of the sum is \d+, outside of \[0, "),
        (lambda p: p.__setitem__(3, -(2**40)), r"largest number of the sum is \d+, outside of"),
        (lambda p: p.__setitem__(3, -(2**63)), r"largest number of the sum is \d+, outside of"),
        (lambda p: p.__setitem__(-1, -1), r"count of clipped numbers of the sum is -1, outside of"),
        (lambda p: p.__setitem__(-1, 10**6), r"count of clipped numbers .* outside of \[0, 192\]"),
    ],
)
def test_a_sum_that_no_valid_uploads_give_is_refused(change, message):
    """Behind a right mask, what one client may add to the sum shows in the sum alone."""
    total = SecureSum(FLAT, ["a", "b"], 4, 0)
    total.add("a", total.mask("a", torch.ones(FLAT.size), 4))
    # What b sends in place of [w q(x), w, clipped], under its own mask.
    wrong = torch.zeros(FLAT.size + 2, dtype=torch.int64)
    change(wrong)
    mask = total._masks(1, wrong.numel())
    upload = (wrong.numpy().view("u8") + mask.numpy().view("u8")).view("i8")
    total.add("b", torch.from_numpy(upload))
    with pytest.raises(FedcoreError, match=rf"round 4: the {message}.*run the round again"):
        total.result()


def test_a_mask_of_another_round_does_not_pass():
    total, stale = SecureSum(FLAT, ["a", "b"], 4, 0), SecureSum(FLAT, ["a", "b"], 3, 0)
    total.add("a", total.mask("a", torch.ones(FLAT.size), 4))
    total.add("b", stale.mask("b", torch.ones(FLAT.size), 4))
    with pytest.raises(FedcoreError, match="outside of"):
        total.result()


def test_bad_input_is_refused_by_client_and_value():
    total = SecureSum(FLAT, ["a", "b"], 4, 0)
    row = torch.zeros(FLAT.size)
    broken = row.clone()
    broken[3] = nan
    refused = [
        (lambda: total.mask("x", row, 1), "client x was not asked to take part"),
        (lambda: total.add("x", row), "client x was not asked to take part"),
        (lambda: total.mask("a", row[1:], 1), r"client a: row has shape \(95,\), expected \(96,\)"),
        (lambda: total.mask("a", broken, 1), r"client a: m\.A holds 1 values .* such as nan"),
        (lambda: total.mask("a", row, -1), "client a: its weight is -1"),
        (lambda: total.mask("a", row, nan), "client a: its weight is nan"),
        (lambda: total.mask("a", row, 0.5), "client a: its weight is 0.5; pass a whole number"),
        (lambda: total.mask("a", row, 2**62), "its weight is too large"),
        (lambda: total.add("a", row), r"client a: a masked upload is int64 \(98,\); .*float32"),
        (lambda: SecureSum(FLAT, ["a"], 0, 0), r"client_ids is \['a'\]; .* two clients up"),
        (lambda: SecureSum(FLAT, ["a", "b", "a"], 0, 0), "client a appears twice"),
    ]
    refused += [
        (lambda clip=clip: FixedPoint(clip=clip), "clip is .*; pass a finite number above 0")
        for clip in (0, -1.0, inf, nan, True)
    ]
    refused += [
        (lambda levels=levels: FixedPoint(levels=levels), "levels is .*; pass an even number")
        for levels in (0, 3, 2**33, 4.0, True)
    ]
    for act, message in refused:
        with pytest.raises(FedcoreError, match=message):
            act()
    masked = total.mask("a", row, 1)
    total.add("a", masked)
    with pytest.raises(FedcoreError, match="round 4: client a reported twice"):
        total.add("a", masked)


def test_the_largest_weights_do_not_overflow():
    rows = torch.stack([torch.full((FLAT.size,), 8.0), torch.full((FLAT.size,), 8.0)])
    largest = SecureSum(FLAT, ["a", "b"], 0, 0).largest_weight
    assert largest > 10**12
    found = secure(FLAT, rows, [largest, largest])
    assert torch.equal(found.row, rows[0].double())
    assert found.weight == 2 * largest


@pytest.mark.parametrize("name", [m.name for m in EXCHANGING if m.capabilities.linear])
@pytest.mark.parametrize("round", [1, 2])
def test_linear_methods_get_their_batch_result_from_the_sum(name, round):
    method = create_method(name)
    weights = [3.0, 1.0, 12.0, 7.0]
    cohort, previous = make_method_round(method, weights, round=round)
    batch = method.aggregate(cohort, previous)
    found = secure(cohort.layout, cohort.updates, weights, round=round)
    assert found.clipped == 0
    result = method.from_mean(found.row, cohort.layout, previous)
    # A statistic is not the result itself: its step is amplified by the inverse root.
    allowed = STEP if method.capabilities.uploads == "factors" else 50 * STEP
    assert float((result.row - batch.row).abs().max()) <= allowed
    assert (result.changed, result.flags) == (batch.changed, batch.flags)
    ones = [1.0] * 4
    uniform = replace(cohort, weights=torch.ones(4, dtype=torch.float64))
    result = method.from_mean(
        secure(cohort.layout, cohort.updates, ones).row, cohort.layout, previous
    )
    gap = (result.row - method.aggregate(uniform, previous).row).abs().max()
    assert float(gap) <= allowed


@pytest.mark.parametrize("name", [m.name for m in EXCHANGING if not m.capabilities.linear])
def test_all_other_methods_refuse_a_sum(name):
    method = create_method(name)
    layout = FactorLayout.build([("m", "A", 2, 8), ("m", "B", 2, 8)])
    row = torch.ones(layout.size)
    with pytest.raises(FedcoreError, match=rf"{name} needs every upload, a sum-only aggregator"):
        method.from_mean(row, layout, Broadcast(layout, row))


@pytest.mark.parametrize("name", ["product_svd", "fedex", "flora", "florist", "lora_fair"])
def test_uploads_overwritten_by_their_mean_lose_the_correction_without_a_word(name):
    """What a sum-only framework does to a method that needs more: an error of FedIT's size.

    The aggregation itself cannot notice. Engines refuse uploads that are the same bits.
    """
    case = make_lora_round("random", [1.0, 2.0, 4.0], ((33, 7), (7, 33)), 3)
    mean = create_method("fedit").aggregate(case.cohort, case.previous).row
    replaced = case.with_updates(mean.expand(3, -1).clone())
    assert identical_rows(replaced.updates)
    assert not identical_rows(case.cohort.updates)
    method = create_method(name)
    for module in case.cohort.layout.modules:
        target = mean_update(case.cohort, module)
        errors = []
        for cohort in (case.cohort, replaced):
            result = method.aggregate(cohort, case.previous)
            got = update(case.cohort.layout, result.row, module)
            if module in result.residual:
                outer, inner = result.residual[module]
                got = got + outer.double().T @ inner.double()
            errors.append(float((target - got).norm() / target.norm()))
        lost = target - update(case.cohort.layout, mean, module)
        assert errors[1] == pytest.approx(float(lost.norm() / target.norm()), rel=1e-6)
        assert errors[0] < 0.999 * errors[1]
        if name in ("fedex", "flora"):
            assert errors[0] < 1e-12


@pytest.mark.parametrize(("kappa", "most", "least"), [(10, 1.2e-4, 6e-4), (100, 1.2e-3, 6e-2)])
def test_whitened_statistics_survive_the_grid_where_plain_ones_do_not(kappa, most, least):
    """``Z_n`` is quadratic in the factor, ``Y_n = A_prev A_n^T A_n`` cubic; r = 8, k = 768."""
    plain_errors, whitened_errors = [], []
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)

        def normal(*shape, random=random):
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        left, right = torch.linalg.qr(normal(8, 8)).Q, torch.linalg.qr(normal(768, 8)).Q
        values = torch.logspace(0, -torch.tensor(float(kappa)).log10().item(), 8).double()
        previous = (left * values @ right.mT)[None]
        stack = previous + 0.1 * values[-1] * normal(20, 1, 8, 768) / 768**0.5
        expected = nystrom_step(stack, torch.ones(20), previous).factor
        layout = FactorLayout.build([("m", "A", 8, 768)])
        mixing, basis = whitened_basis(previous)
        uploads = whitened_upload(stack[:, 0], basis.expand(20, -1, -1))
        cubic = previous @ stack[:, 0].mT @ stack[:, 0]

        def through(rows, layout=layout, seed=seed):
            mean = secure(layout, rows.flatten(1), [1] * 20, seed=seed).row
            return mean.view(1, 8, 768)

        found = whitened_step(through(uploads), mixing, basis).factor
        whitened_errors.append(float((found - expected).norm() / expected.norm()))
        total = through(cubic)
        core = total @ previous.mT
        energies, vectors = torch.linalg.eigh((core + core.mT) / 2)
        kept = energies > 1e-14 * energies[:, -1:]
        root = torch.where(kept, energies.abs().rsqrt(), 0.0)
        plain = (vectors * root[:, None, :]) @ vectors.mT @ total
        plain_errors.append(float((plain - expected).norm() / expected.norm()))
    assert max(whitened_errors) < most
    assert min(plain_errors) > least


def test_a_public_constant_brings_small_statistics_into_the_range_of_the_grid():
    errors = []
    for scale in (1.0, 2.0**7):
        method = create_method("florg.whitened", scale=scale)
        cohort, start = make_method_round(method, [1.0] * 4)
        small = Broadcast(start.layout, start.row / 8)
        rows = [
            method.prepare_upload((start.row + 0.03 * row) / 8, start.layout, small, 1).row
            for row in drawn(4, size=start.layout.size)
        ]
        exact = method.from_mean(torch.stack(rows).mean(0), cohort.layout, small).row
        found = secure(cohort.layout, rows, [1] * 4)
        assert found.clipped == 0
        result = method.from_mean(found.row, cohort.layout, small).row
        factors = [
            start.layout.gather(r, start.layout.select("A", dense=False)) for r in (result, exact)
        ]
        errors.append(float((factors[0] - factors[1]).norm() / factors[1].norm()))
    assert errors[1] < errors[0] / 50
