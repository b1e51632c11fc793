from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.cohort import CohortBuilder
from fedcore.errors import FedcoreError
from fedcore.methods import Broadcast, create_method
from tests.property.tri_rounds import SHAPES, normal_row, tri_layout, tri_product

METHOD = create_method("ce_lora.projected")
MODULES = [name for name, _, _ in SHAPES]


def start(seed=0, rank=4, dtype=torch.float64):
    layout = tri_layout(rank)
    return Broadcast(layout, normal_row(layout, seed).to(dtype))


def trained(previous, clients, drift, seed=1):
    """Rows ``(N, P)`` of clients whose bases moved by ``drift`` and whose cores are their own."""
    layout = previous.layout
    rows = []
    for n in range(clients):
        row = normal_row(layout, seed + n)
        for slot in layout.factor_slots:
            if slot.factor != "R":
                layout.view(row, slot).mul_(drift).add_(layout.view(previous.row, slot))
        rows.append(row.to(previous.row.dtype))
    return torch.stack(rows)


def within_spans(previous, clients, seed=1):
    """Rows whose bases are the common ones in other coordinates."""
    layout, random = previous.layout, torch.Generator().manual_seed(seed)
    rows = torch.stack([normal_row(layout, seed + n) for n in range(clients)])
    for row in rows:
        for slot in layout.factor_slots:
            if slot.factor != "R":
                turn = torch.randn(slot.rows, slot.rows, generator=random, dtype=torch.float64)
                layout.view(row, slot).copy_(turn @ layout.view(previous.row, slot))
    return rows


def regauged(layout, row, seed):
    """``(B X, X^-1 R Y, Y^-1 A)`` with random invertible ``X`` and ``Y``: the same model."""
    random = torch.Generator().manual_seed(seed)
    found = row.clone()
    for module in layout.modules:
        b, r, a = (layout.view(found, layout.by_name[f"{module}.{f}"]) for f in "BRA")
        x, y = (torch.randn(len(r), len(r), generator=random, dtype=torch.float64) for _ in "XY")
        b.copy_(x.T @ b)
        r.copy_(torch.linalg.solve(x, r) @ y)
        a.copy_(torch.linalg.solve(y, a))
    return found


def cohort_of(previous, rows, weights):
    layout = previous.layout
    sent = METHOD.upload_layout(layout, 0)
    builder = CohortBuilder(sent, [f"c{n}" for n in range(len(rows))], round=0, dtype=rows.dtype)
    for n, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        upload = METHOD.prepare_upload(row, layout, previous, 0)
        builder.row(f"c{n}").copy_(upload.row)
        builder.receive(f"c{n}", weight)
    return builder.finish()


def run(previous, rows, weights):
    return METHOD.aggregate(cohort_of(previous, rows, weights), previous)


def mean_product(layout, rows, weights, module):
    total = sum(weights)
    return sum(
        w / total * tri_product(layout, row, module) for w, row in zip(weights, rows, strict=True)
    )


def test_what_travels_is_a_core_and_the_head():
    previous = start()
    sent = METHOD.upload_layout(previous.layout, 3)
    assert [slot.name for slot in sent] == ["m0.R", "m1.R", "m2.R", "head"]
    assert METHOD.read_layout(previous.layout, 3) == previous.layout
    assert len(METHOD.private_layout(previous.layout, 3)) == 0
    assert len(METHOD.frozen_layout(previous.layout, 3)) == 0


@given(st.integers(0, 2**31), st.floats(0.0, 3.0))
def test_the_core_is_the_least_squares_one(seed, drift):
    previous = start(seed)
    layout, (row,) = previous.layout, trained(previous, 1, drift, seed + 1)
    upload = METHOD.prepare_upload(row, layout, previous, 0).row
    sent = METHOD.upload_layout(layout, 0)
    for module in MODULES:
        b, a = (layout.view(previous.row, layout.by_name[f"{module}.{f}"]) for f in "BA")
        target = tri_product(layout, row, module)
        core = sent.view(upload, sent.by_name[f"{module}.R"])
        expected = torch.linalg.pinv(b.T) @ target @ torch.linalg.pinv(a)
        torch.testing.assert_close(core, expected, rtol=1e-8, atol=1e-8 * float(expected.norm()))
        # No other core between these bases is nearer: the gradient vanishes.
        residual = target - b.T @ core @ a
        size = float(target.norm() * b.norm() * a.norm()) or 1.0
        assert float((b @ residual @ a.T).norm()) < 1e-11 * size
    torch.testing.assert_close(
        sent.view(upload, sent.by_name["head"]), layout.view(row, layout.by_name["head"])
    )


@given(st.integers(0, 2**31))
def test_an_upload_is_a_function_of_the_model_alone(seed):
    previous = start(seed)
    layout, (row,) = previous.layout, trained(previous, 1, 0.5, seed + 1)
    other = regauged(layout, row, seed)
    one, two = (METHOD.prepare_upload(r, layout, previous, 0).row for r in (row, other))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6 * float(one.norm()))


def test_bases_within_the_common_spans_are_met_exactly():
    previous, weights = start(), [1.0, 2.0, 5.0]
    rows = within_spans(previous, 3)
    result = run(previous, rows, weights)
    for module in MODULES:
        expected = mean_product(previous.layout, rows, weights, module)
        got = tri_product(previous.layout, result.row, module)
        assert float((got - expected).norm()) < 1e-10 * float(expected.norm())
    # And so does a client that kept its bases: its core travels as it is.
    kept = trained(previous, 1, 0.0)
    alone = run(previous, kept, [1.0]).row
    torch.testing.assert_close(alone, kept[0], rtol=1e-10, atol=1e-10)


def test_elsewhere_the_result_is_the_projected_mean():
    previous, weights = start(), [1.0, 2.0, 5.0]
    layout, rows = previous.layout, trained(previous, 3, 0.4)
    result = run(previous, rows, weights)
    for module in MODULES:
        b, a = (layout.view(previous.row, layout.by_name[f"{module}.{f}"]) for f in "BA")
        mean = mean_product(layout, rows, weights, module)
        expected = torch.linalg.pinv(b) @ b @ mean @ torch.linalg.pinv(a) @ a
        got = tri_product(layout, result.row, module)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        assert float((got - mean).norm()) > 1e-2 * float(mean.norm()) or module == "m2"
    for slot in layout.factor_slots:
        if slot.factor != "R":
            untouched = layout.view(previous.row, slot)
            assert torch.equal(layout.view(result.row, slot), untouched)


def test_the_error_with_drift_is_that_of_the_theory_and_gauge_free():
    """64 x 64, r = 4, N = 6, bases common + drift x noise, cores I + 0.3 noise.

    The result against each client's own mean in its bases: 0, 0.06, 0.19, 0.63 in the theory,
    below the plain mean of cores in private bases (0, 0.13, 0.39, 1.29), which per-client
    rotations bring near 1 while they leave this one as it is.
    """
    random = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    layout = tri_layout(4, [("m", 64, 64)])
    previous = Broadcast(layout, torch.zeros(layout.size, dtype=torch.float64))
    slots = {factor: layout.by_name[f"m.{factor}"] for factor in "ABR"}
    for factor in "AB":
        layout.view(previous.row, slots[factor]).copy_(noise(4, 64) / 8)
    plain, projected = [], []
    for drift in (0.0, 0.1, 0.3, 1.0):
        rows = previous.row.repeat(6, 1)
        for row in rows:
            for factor in "AB":
                layout.view(row, slots[factor]).add_(drift * noise(4, 64) / 8)
            layout.view(row, slots["R"]).copy_(torch.eye(4) + 0.3 * noise(4, 4))
        turned = torch.stack([regauged(layout, row, n) for n, row in enumerate(rows)])
        target = mean_product(layout, rows, [1.0] * 6, "m")
        result = tri_product(layout, run(previous, rows, [1.0] * 6).row, "m")
        again = tri_product(layout, run(previous, turned, [1.0] * 6).row, "m")
        torch.testing.assert_close(again, result, rtol=1e-8, atol=1e-8)
        projected.append(float((result - target).norm() / target.norm()))
        mean = rows.mean(0)
        errors = []
        for row in rows:
            own = row.clone()
            layout.view(own, slots["R"]).copy_(layout.view(mean, slots["R"]))
            errors.append(float((tri_product(layout, own, "m") - target).norm() / target.norm()))
        plain.append(sum(errors) / 6)
    assert plain[0] < 1e-12
    assert projected[0] < 1e-12
    assert all(a < b for a, b in pairwise(plain))
    assert all(ours < theirs for ours, theirs in zip(projected[1:], plain[1:], strict=True))
    assert projected[1] == pytest.approx(0.06, abs=0.02)
    assert projected[2] == pytest.approx(0.19, abs=0.06)


def test_modules_at_once_are_modules_one_by_one():
    previous = start()
    layout, rows = previous.layout, trained(previous, 2, 0.3)
    whole = run(previous, rows, [1.0, 3.0]).row
    for name, d_out, d_in in SHAPES:
        part = tri_layout(4, [(name, d_out, d_in)])
        alone = Broadcast(part, layout.gather(previous.row, part))
        row = run(alone, layout.gather(rows, part), [1.0, 3.0]).row
        got, expected = tri_product(part, row, name), tri_product(layout, whole, name)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_zero_core_gives_a_zero_update():
    previous = start()
    rows = trained(previous, 2, 0.3)
    for slot in previous.layout.factor_slots:
        if slot.factor == "R":
            previous.layout.view(rows, slot).zero_()
    result = run(previous, rows, [1.0, 1.0])
    for module in MODULES:
        assert not tri_product(previous.layout, result.row, module).any()


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize(("change", "rank"), [("zero", 0), ("repeat", 3), ("nearly", 3)])
def test_bases_without_full_rank_are_refused(factor, change, rank):
    previous = start(dtype=torch.float32)
    layout, rows = previous.layout, trained(previous, 1, 0.3)
    cohort = cohort_of(previous, rows, [1.0])
    base = layout.view(previous.row, layout.by_name[f"m1.{factor}"])
    if change == "zero":
        base.zero_()
    else:
        base[3] = base[0] + base[1] / 3
    with pytest.raises(FedcoreError, match=rf"m1\.{factor} .* has rank {rank} of 4; .* 'random'"):
        METHOD.prepare_upload(rows[0], layout, previous, 0)
    with pytest.raises(FedcoreError, match=rf"m1\.{factor} of the broadcast has rank {rank}"):
        METHOD.aggregate(cohort, previous)


def test_bases_that_are_wider_than_a_layer_are_refused():
    layout = tri_layout(5, [("m", 9, 4)])
    previous = Broadcast(layout, normal_row(layout, 0))
    with pytest.raises(FedcoreError, match=r"m\.A of the broadcast has rank 4 of 5"):
        METHOD.prepare_upload(previous.row, layout, previous, 0)


def test_an_upload_with_bases_and_other_ranks_are_refused():
    previous = start()
    layout = previous.layout
    cohort = cohort_of(previous, trained(previous, 2, 0.3), [1.0, 1.0])
    rows = normal_row(layout, 1).repeat(2, 1)
    whole = replace(cohort, layout=layout, updates=rows)
    with pytest.raises(FedcoreError, match=r"needs exactly the core R .* and the head.*m0\.A is"):
        METHOD.aggregate(whole, previous)
    cohort.ranks[0, 1] = 2
    with pytest.raises(FedcoreError, match=r"client c0 has rank 2 in m1.*ce_lora.projected needs"):
        METHOD.aggregate(cohort, previous)
    sent = METHOD.upload_layout(layout, 0)
    with pytest.raises(FedcoreError, match="layout is not the one that read_layout gives"):
        METHOD.prepare_upload(torch.zeros(sent.size), sent, previous, 0)


def test_values_that_are_not_finite_reach_the_server_to_be_refused():
    previous = start()
    layout, (row,) = previous.layout, trained(previous, 1, 0.3)
    layout.view(row, layout.by_name["m0.A"])[0, 0] = torch.nan
    upload = METHOD.prepare_upload(row, layout, previous, 0).row
    sent = METHOD.upload_layout(layout, 0)
    assert sent.view(upload, sent.by_name["m0.R"]).isnan().any()
    assert sent.view(upload, sent.by_name["m1.R"]).isfinite().all()


def test_the_start_must_be_a_known_one():
    assert create_method("ce_lora.projected", init="random").adapter_options == {"init": "random"}
    with pytest.raises(
        FedcoreError, match=r"unknown init of ce_lora\.projected 'ce'; valid: random"
    ):
        create_method("ce_lora.projected", init="ce")
