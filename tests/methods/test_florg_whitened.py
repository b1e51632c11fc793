from __future__ import annotations

import json
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.experiments.run import start
from fedcore.methods import Broadcast, create_method
from fedcore_kernels.layout import FactorLayout
from tests.experiments.jobs import tiny_recipe
from tests.property.graded import graded_clients

MODULES = {"m0": 20, "m1": 9, "m2": 20}
LAYOUT = FactorLayout.build(
    [(module, "A", 4, width) for module, width in MODULES.items()], [("head", (2, 3))]
)


def factor(row, module, layout=LAYOUT):
    return layout.view(row, layout.by_name[f"{module}.A"])


def cohort_of(rows, weights, ranks=None):
    clients = len(rows)
    return Cohort(
        layout=LAYOUT,
        updates=rows,
        weights=torch.tensor(weights, dtype=torch.float64),
        client_ids=tuple(f"c{n:03d}" for n in range(clients)),
        round=2,
        ranks=torch.full((clients, 3), 4) if ranks is None else ranks,
        scalings=torch.ones(clients, 3, dtype=torch.float64),
    )


def graded_round(kappa=10.0, noise=0.3, seed=0, clients=5):
    """Trained rows (N, P) around a broadcast whose factors have condition ``kappa``."""
    start = torch.zeros(LAYOUT.size, dtype=torch.float64)
    rows = torch.zeros(clients, LAYOUT.size, dtype=torch.float64)
    for j, (module, width) in enumerate(MODULES.items()):
        drawn, _, previous = graded_clients(kappa, noise, seed + 100 * j)
        # A narrower module keeps the spectrum: its columns are turned into the first ones.
        turn = torch.linalg.qr(previous.mT, mode="complete").Q[:, :width]
        for n in range(clients):
            factor(rows[n], module).copy_(drawn[n] @ turn)
        factor(start, module).copy_(previous @ turn)
    random = torch.Generator().manual_seed(seed)
    head = LAYOUT.view(rows, LAYOUT.by_name["head"])
    head.copy_(torch.randn(head.shape, generator=random, dtype=torch.float64))
    return rows, Broadcast(LAYOUT, start)


def sent(method, rows, previous):
    return torch.stack([method.prepare_upload(row, LAYOUT, previous, 2).row for row in rows])


def served(rows, weights, previous, **options):
    method = create_method("florg.whitened", **options)
    return method.aggregate(cohort_of(sent(method, rows, previous), weights), previous)


def sketched(rows, weights, previous, ranks=None):
    method = create_method("florg.sketched")
    return method.aggregate(cohort_of(rows, weights, ranks), previous)


WEIGHTS = st.lists(st.floats(0.05, 100.0), min_size=1, max_size=5)


@given(
    WEIGHTS, st.sampled_from((1.0, 3.0, 10.0)), st.floats(1e-3, 0.5), st.integers(0, 10**6),
    st.sampled_from((1.0, 1e-3, 700.0)),
)  # fmt: skip
def test_it_is_the_batch_form_of_the_sketched_step(weights, kappa, noise, seed, scale):
    rows, previous = graded_round(kappa, noise, seed, len(weights))
    batch = sketched(rows, weights, previous)
    found = served(rows, weights, previous, scale=scale)
    assert float((found.row - batch.row).norm() / batch.row.norm()) < 1e-10
    assert (found.changed, found.flags) == (batch.changed, batch.flags)
    for module in MODULES:
        one, other = found.steps[module], batch.steps[module]
        assert one.rank == other.rank == 4
        assert one.condition == pytest.approx(other.condition, rel=1e-6)


def test_the_upload_is_the_statistic_of_its_definition():
    rows, previous = graded_round()
    upload = sent(create_method("florg.whitened", scale=3.0), rows[:1], previous)[0]
    for module in MODULES:
        own, before = factor(rows[0], module), factor(previous.row, module)
        statistic = factor(upload, module) / 3
        # V orders the rows by A_prev's singular values, largest entries positive.
        _, _, basis = torch.linalg.svd(before, full_matrices=False)
        basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
        torch.testing.assert_close(statistic, basis @ own.T @ own, rtol=0, atol=1e-12)
    head = LAYOUT.by_name["head"]
    assert torch.equal(LAYOUT.view(upload, head), LAYOUT.view(rows[0], head))


@pytest.mark.parametrize(("kappa", "allowed"), [(1e1, 2e-7), (1e2, 1e-6), (1e3, 1e-5)])
def test_fp32_on_the_wire_costs_its_own_rounding_alone(kappa, allowed):
    for seed in range(3):
        rows, previous = graded_round(kappa, 0.1, seed)
        previous = Broadcast(LAYOUT, previous.row.float())
        expected = sketched(rows, [1.0] * 5, Broadcast(LAYOUT, previous.row.double())).row
        method = create_method("florg.whitened")
        total = method.accumulator(LAYOUT, previous)
        for row in rows.float():
            total.add(method.prepare_upload(row, LAYOUT, previous, 2).row, 1.0)
        found = total.result().row
        assert found.dtype == torch.float32
        for module in MODULES:
            u, s, _ = torch.linalg.svd(factor(expected, module), full_matrices=False)
            gap = factor(found, module).double() - factor(expected, module)
            # What rounding the broadcast to fp32 does to its weakest direction is not counted.
            assert float((u[:, -1] @ gap).norm() / s[-1]) < allowed + 1e-7 * kappa


def test_rotations_of_a_client_change_nothing_and_of_the_broadcast_turn_the_result():
    rows, previous = graded_round(3.0)
    turned, moved = rows.clone(), previous.row.clone()
    random = torch.Generator().manual_seed(1)
    turns = torch.linalg.qr(torch.randn(5, 3, 4, 4, generator=random, dtype=torch.float64)).Q
    for j, module in enumerate(MODULES):
        for n in range(5):
            factor(turned[n], module).copy_(turns[n, j] @ factor(rows[n], module))
        factor(moved, module).copy_(turns[0, j] @ factor(previous.row, module))
    base = served(rows, [1.0] * 5, previous).row
    torch.testing.assert_close(served(turned, [1.0] * 5, previous).row, base, rtol=0, atol=1e-12)
    other = served(rows, [1.0] * 5, Broadcast(LAYOUT, moved)).row
    for j, module in enumerate(MODULES):
        expected = turns[0, j] @ factor(base, module)
        torch.testing.assert_close(factor(other, module), expected, rtol=0, atol=1e-12)


def test_modules_together_are_modules_one_by_one():
    rows, previous = graded_round()
    method = create_method("florg.whitened")
    uploads = sent(method, rows, previous)
    mean = uploads.mean(0)
    together = method.from_mean(mean, LAYOUT, previous)
    for module, width in MODULES.items():
        alone = FactorLayout.build([(module, "A", 4, width)])
        part = method.from_mean(LAYOUT.gather(mean, alone), alone, previous)
        torch.testing.assert_close(factor(part.row, module), factor(together.row, module))
        assert set(part.steps) == {module}
        # What was not sent stands as it was.
        others = [m for m in MODULES if m != module]
        assert all(torch.equal(factor(part.row, m), factor(previous.row, m)) for m in others)


def test_clients_of_lower_rank_are_the_batch_form_too():
    rows, previous = graded_round(3.0, 0.5)
    ranks = torch.full((5, 3), 4)
    for n, kept in ((0, 1), (2, 2), (3, 3)):
        ranks[n] = kept
        for module in MODULES:
            factor(rows[n], module)[kept:] = 0
    batch = sketched(rows, [1.0] * 5, previous, ranks)
    method = create_method("florg.whitened")
    cohort = cohort_of(sent(method, rows, previous), [1.0] * 5, ranks)
    torch.testing.assert_close(
        method.aggregate(cohort, previous).row, batch.row, rtol=0, atol=1e-11
    )


def test_lost_rank_is_flagged_and_does_no_harm():
    rows, previous = graded_round(3.0)
    poor, lame = rows.clone(), previous.row.clone()
    for n in range(5):
        factor(poor[n], "m0")[2:] = 0
        factor(poor[n], "m0")[:2] = (n + 1) * factor(rows[0], "m0")[:2]
    factor(lame, "m2")[3] = factor(lame, "m2")[0]
    previous = Broadcast(LAYOUT, lame)
    batch = sketched(poor, [1.0] * 5, previous)
    found = served(poor, [1.0] * 5, previous)
    assert found.flags == ("m0: rank 2 of 4 kept", "m2: rank 3 of 4 kept")
    assert sorted(found.flags) == sorted(batch.flags)
    torch.testing.assert_close(found.row, batch.row, rtol=0, atol=1e-9)
    zero = served(torch.zeros_like(rows), [1.0] * 5, previous)
    assert not zero.row.any()
    assert zero.flags == tuple(f"{m}: rank 0 of 4 kept" for m in ("m1", "m0", "m2"))
    assert {step.condition for step in zero.steps.values()} == {inf}


def test_a_coarser_cut_drops_what_the_noise_of_the_wire_left():
    rows, previous = graded_round(1.0, 0.0)
    for n in range(5):
        factor(rows[n], "m0")[3:] = 0
    method = create_method("florg.whitened")
    # As if the wire had left a millionth of the energy in every direction.
    noise = 1e-6 * method.prepare_upload(previous.row, LAYOUT, previous, 2).row
    mean = sent(method, rows, previous).mean(0) + noise
    assert method.from_mean(mean, LAYOUT, previous).steps["m0"].rank == 4
    coarse = create_method("florg.whitened", eps_rel=1e-4).from_mean(mean, LAYOUT, previous)
    assert coarse.steps["m0"].rank == 3
    assert coarse.steps["m1"].rank == 4


def test_uploads_of_another_basis_are_noticed():
    rows, previous = graded_round(3.0)
    method = create_method("florg.whitened")
    uploads = sent(method, rows, previous)
    assert method.aggregate(cohort_of(uploads, [1.0] * 5), previous).flags == ()
    stale = Broadcast(LAYOUT, graded_round(3.0, seed=50)[1].row)
    foreign = uploads.clone()
    foreign[4] = sent(method, rows[4:], stale)[0]
    flags = method.aggregate(cohort_of(foreign, [1.0] * 5), previous).flags
    assert [flag.split(" (")[0] for flag in flags] == [
        f"{m}: the uploads are not statistics of one basis" for m in ("m1", "m0", "m2")
    ]
    other_sign = uploads.clone()
    factor(other_sign, "m0")[:, 0] *= -1
    flags = method.aggregate(cohort_of(other_sign, [1.0] * 5), previous).flags
    assert any(flag.startswith("m0: the uploads are not statistics of one") for flag in flags)
    # Where no client moved, Z V^T is diagonal and a wrong sign leaves it symmetric.
    still = method.prepare_upload(previous.row, LAYOUT, previous, 2).row
    assert method.from_mean(still, LAYOUT, previous).flags == ()
    factor(still, "m1")[1] *= -1
    flags = method.from_mean(still, LAYOUT, previous).flags
    assert any(flag.startswith("m1: the uploads are not statistics of one") for flag in flags)


def test_the_basis_does_not_depend_on_the_last_bits():
    """Distinct singular values: rows of V move by rounding, and never flip."""
    rows, previous = graded_round(10.0)
    nudged = Broadcast(LAYOUT, previous.row * (1 + 2.0**-50))
    method = create_method("florg.whitened")
    one, other = (sent(method, rows, start) for start in (previous, nudged))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("half", ["client", "server"])
def test_a_broadcast_without_a_direction_is_refused_by_both_halves(half):
    rows, previous = graded_round()
    method = create_method("florg.whitened")

    def run(broadcast, layout=LAYOUT, row=rows[0]):
        if half == "client":
            return method.prepare_upload(row, layout, broadcast, 2)
        return method.from_mean(row, layout, broadcast)

    zero = previous.row.clone()
    factor(zero, "m1").zero_()
    with pytest.raises(FedcoreError, match=r"m1\.A of the previous state is zero"):
        run(Broadcast(LAYOUT, zero))
    tall = FactorLayout.build([("t", "A", 4, 3)])
    with pytest.raises(FedcoreError, match=r"t\.A is 4 x 3; its rank must not exceed its width"):
        run(Broadcast(tall, torch.ones(tall.size)), tall, torch.ones(tall.size))
    if half == "client":
        low = FactorLayout.build([("m0", "A", 2, 20)])
        with pytest.raises(FedcoreError, match=r"m0\.A of the upload is 2 x 20; it is 4 x 20 in"):
            run(previous, low, torch.ones(low.size))
        other = FactorLayout.build([("x", "A", 2, 20)])
        with pytest.raises(FedcoreError, match=r"x\.A of the upload .* it is missing from"):
            run(previous, other, torch.ones(other.size))


def test_a_layer_of_width_r_and_a_not_finite_row():
    square = FactorLayout.build([("s", "A", 3, 3)])
    random = torch.Generator().manual_seed(4)
    held, own = (torch.zeros(square.size, dtype=torch.float64) for _ in range(2))
    for row in (held, own):
        view = square.view(row, square.slots[0])
        view.copy_(torch.randn(3, 3, generator=random, dtype=torch.float64))
    method = create_method("florg.whitened")
    previous = Broadcast(square, held)
    upload = method.prepare_upload(own, square, previous, 0).row
    got = square.view(method.from_mean(upload, square, previous).row, square.slots[0])
    view = square.view(own, square.slots[0])
    torch.testing.assert_close(got.T @ got, view.T @ view, rtol=0, atol=1e-12)
    view[1, 1] = nan
    assert bool(method.prepare_upload(own, square, previous, 0).row.isnan().any())


def test_a_run_is_that_of_the_sketched_step(tmp_path):
    """Round 0 has the same trained factors; the errors are measured against them, not on Z."""
    found = []
    for name in ("florg.whitened", "florg.sketched"):
        settings = {"method.name": name, "rounds": 1, "training.steps": 4, "clients": 3}
        start(tiny_recipe(tmp_path / "home", **settings), tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found.append(json.loads(lines[-1]))
    ours, theirs = found
    assert ours["flags"] == theirs["flags"] == []
    assert ours["bytes_up"] == theirs["bytes_up"]
    for one, other in zip(ours["modules"], theirs["modules"], strict=True):
        assert one["aggregation_error"] == pytest.approx(other["aggregation_error"], rel=1e-4)
        assert one["kept_rank"] == other["kept_rank"] == 2
