"""FLoRA-NA's coefficients in the norm that HiRA's base weights give, against dense algebra."""

from dataclasses import replace

import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.methods import Broadcast, create_method
from fedcore.methods.lora.flora_na.hadamard import HadamardObjective, hadamard_combination
from fedcore.methods.lora.flora_na.objective import PairObjective
from fedcore.methods.lora.flora_na.solver import alternate, nearest_combination
from fedcore_kernels import block_grams
from tests.property.adapters import MODULES, lora_state
from tests.property.families import FAMILIES, make_family
from tests.reference import hadamard

DTYPE = torch.float64
LONG = {"sweeps": 2000, "tolerance": 1e-14}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def base_of(d_out, d_in, seed=0):
    """Weights of a spread that matters: some rows and columns are ten times the others."""
    rows, columns = drawn(d_out, 1, seed=seed).exp(), drawn(1, d_in, seed=seed + 1).exp()
    return drawn(d_out, d_in, seed=seed + 2) * rows * columns


def problem(family="indep", clients=5, rank=3, widths=(24, 20), seed=0):
    left, right, shares = make_family(family, clients, rank, widths, seed)
    return left[:, 0], right[:, 0], shares, base_of(*widths, seed=100 + seed)


def plain_objective(left, right, shares):
    blocks = block_grams(left[:, None]), block_grams(right[:, None])
    return PairObjective.build(*blocks, shares)


def plain_fit(left, right, shares, **options):
    return nearest_combination(plain_objective(left, right, shares), **options)


def weighted(left, right, shares, base, rows=7):
    plain = plain_objective(left, right, shares)
    return HadamardObjective.weighted(plain, left, right, base, rows=rows)


def value(left, right, shares, base, fit):
    return hadamard.objective(left, right, shares, base, fit.p, fit.q)


@pytest.mark.parametrize("rows", [1, 7, 24, 500])
def test_the_quadratic_form_is_the_dense_objective(rows):
    left, right, shares, base = problem()
    found = weighted(left, right, shares, base, rows)
    p, q = drawn(1, 2, 5, seed=3), drawn(1, 2, 5, seed=4)
    for s in range(2):
        here = (left, right, shares, base, p[0, s], q[0, s])
        expected = hadamard.objective(*here)
        torch.testing.assert_close(found.value(p, q)[0, s], expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(found.error(p[0, s], q[0, s]), expected, rtol=1e-12, atol=0)
        in_p, in_q = hadamard.curvatures(left, right, base, p[0, s], q[0, s])
        torch.testing.assert_close(found.left_curvature(q)[0, s], in_p, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.right_curvature(p)[0, s], in_q, rtol=1e-10, atol=1e-12)
    size = hadamard.target(left, right, shares, base)
    torch.testing.assert_close(found.target[0], size, rtol=1e-12, atol=0)
    own = [(base * (b.mT @ a)).norm() for b, a in zip(left, right, strict=True)]
    torch.testing.assert_close(found.scale[0], (torch.stack(own) @ shares).square())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_is_stationary_and_below_both_starts(family):
    left, right, shares, base = problem(family, seed=1)
    fit = hadamard_combination(left, right, shares, base, **LONG)
    assert fit.converged
    assert 1 <= fit.sweeps <= 2000
    torch.testing.assert_close(fit.objective, value(left, right, shares, base, fit))
    torch.testing.assert_close(fit.target, hadamard.target(left, right, shares, base))
    near = plain_fit(left, right, shares, **LONG)
    for p, q in ((shares, shares), (near.p[0], near.q[0])):
        start = hadamard.objective(left, right, shares, base, p, q)
        assert float(fit.objective) < float(start)
    p, q = (c.clone().requires_grad_() for c in (fit.p, fit.q))
    hadamard.objective(left, right, shares, base, p, q).backward()
    for c in (p, q):
        assert float((c.grad * c.detach().norm()).norm()) < 1e-5 * float(fit.target)
    again = hadamard.sweep(left, right, shares, base, fit.q)
    after = hadamard.objective(left, right, shares, base, *again)
    assert float(fit.objective - after) <= 1e-10 * float(fit.target)


def test_one_sweep_is_exact_least_squares():
    left, right, shares, base = problem(seed=2)
    near = plain_fit(left, right, shares, sweeps=1, tolerance=0.0)
    ends = [
        hadamard.objective(left, right, shares, base, *hadamard.sweep(left, right, shares, base, q))
        for q in (near.q[0], shares)
    ]
    fit = hadamard_combination(left, right, shares, base, sweeps=1, tolerance=0.0)
    torch.testing.assert_close(fit.objective, min(ends), rtol=1e-9, atol=0)
    assert fit.sweeps == 1
    assert not fit.converged


@pytest.mark.parametrize("family", ["indep", "corr", "scalar"])
def test_no_general_minimiser_from_the_same_start_ends_lower(family):
    left, right, shares, base = problem(family, clients=4, widths=(12, 10), seed=4)
    size = float(hadamard.target(left, right, shares, base))

    def value_and_gradient(point):
        point = torch.tensor(point, dtype=DTYPE, requires_grad=True)
        found = hadamard.objective(left, right, shares, base, point[:4], point[4:]) / size
        found.backward()
        return float(found.detach()), point.grad.numpy()

    options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10}
    start = torch.cat([shares, shares]).numpy()
    found = scipy.optimize.minimize(
        value_and_gradient, start, jac=True, method="L-BFGS-B", options=options
    )
    fit = hadamard_combination(left, right, shares, base, **LONG)
    assert float(fit.objective) / size <= found.fun + 1e-8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("constant", [1.0, -0.02])
def test_a_constant_base_is_the_unweighted_problem(family, constant):
    left, right, shares, base = problem(family, seed=5)
    fit = hadamard_combination(left, right, shares, torch.full_like(base, constant), **LONG)
    near = plain_fit(left, right, shares, **LONG)
    torch.testing.assert_close(
        fit.objective, near.value[0] * constant**2, rtol=1e-9, atol=1e-14 * float(fit.target)
    )
    torch.testing.assert_close(fit.p, near.p[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fit.q, near.q[0], rtol=1e-5, atol=1e-6)


@given(st.sampled_from(FAMILIES), st.integers(1, 6), st.integers(1, 4), st.integers(0, 999))
def test_it_is_never_above_the_means_or_the_unweighted_coefficients(family, clients, rank, seed):
    left, right, shares, base = problem(family, clients, rank, (9, 13), seed)
    fit = hadamard_combination(left, right, shares, base)
    near = plain_fit(left, right, shares)
    slack = 1e-12 * float(weighted(left, right, shares, base).scale)
    for p, q in ((shares, shares), (near.p[0], near.q[0])):
        start = hadamard.objective(left, right, shares, base, p, q)
        assert float(fit.objective) <= float(start) + slack
    torch.testing.assert_close(
        fit.objective, value(left, right, shares, base, fit), rtol=1e-9, atol=slack
    )


def test_the_unweighted_coefficients_lose_where_the_weights_are_uneven():
    gains = []
    for seed in range(8):
        left, right, shares, base = problem("indep", seed=seed)
        near = plain_fit(left, right, shares)
        fit = hadamard_combination(left, right, shares, base)
        start = hadamard.objective(left, right, shares, base, near.p[0], near.q[0])
        gains.append(1 - float(fit.objective / start))
    assert min(gains) > 0.005
    assert max(gains) > 0.1


def test_the_means_are_a_start_too_for_the_unweighted_coefficients_may_mislead():
    left, right, shares, base = problem(clients=6, rank=2, widths=(9, 13), seed=40)
    near = plain_fit(left, right, shares)
    found = weighted(left, right, shares, base)
    ends = alternate(
        found,
        torch.stack([near.p, shares[None]], 1),
        torch.stack([near.q, shares[None]], 1),
        **LONG,
    )
    first, second = ends.value[0].tolist()
    assert second < 0.6 * first
    fit = hadamard_combination(left, right, shares, base, **LONG)
    assert float(fit.objective) == pytest.approx(second, rel=1e-9)
    assert fit.sweeps == int(ends.sweeps[0, 1])


def _exact_case(name):
    left, right, shares, base = problem(clients=4, widths=(20, 25))
    if name == "one client":
        left, right, shares = left[:1], right[:1], torch.ones(1, dtype=DTYPE)
    elif name == "equal clients":
        left, right = left[:1].expand_as(left), right[:1].expand_as(right)
    elif name == "common A":
        right = right[:1].expand_as(right)
    elif name == "common B":
        left = left[:1].expand_as(left)
    elif name == "A up to scale":
        right = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=DTYPE)[:, None, None] * right[:1]
    elif name == "equal products in other gauges":
        turn = torch.linalg.qr(drawn(4, 3, 3)).Q
        left, right = turn.mT @ left[:1], turn.mT @ right[:1]
    return left, right, shares, base


@pytest.mark.parametrize(
    "name",
    [
        *("one client", "equal clients", "common A", "common B", "A up to scale"),
        "equal products in other gauges",
    ],
)
def test_what_is_exact_without_weights_is_exact_with_them(name):
    left, right, shares, base = _exact_case(name)
    fit = hadamard_combination(left, right, shares, base)
    assert float(fit.objective) < 1e-24 * float(fit.target)
    assert fit.converged
    if name in ("one client", "equal clients"):
        torch.testing.assert_close(fit.p, shares, rtol=1e-9, atol=0)
        torch.testing.assert_close(fit.q, shares, rtol=1e-9, atol=0)


def test_rows_and_columns_of_zeros_are_not_there():
    left, right, shares, base = problem()
    base[[2, 5, 23]] = 0
    base[:, [0, 11]] = 0
    fit = hadamard_combination(left, right, shares, base, **LONG)
    rows = [o for o in range(24) if o not in (2, 5, 23)]
    columns = [c for c in range(20) if c not in (0, 11)]
    loud = left.clone()
    # Where W0 is zero an update does nothing, however large.
    loud[:, :, [2, 5, 23]] = 1e3 * drawn(5, 3, 3)
    other = hadamard_combination(loud, right, shares, base, **LONG)
    less = hadamard_combination(
        left[..., rows], right[..., columns], shares, base[rows][:, columns], **LONG
    )
    assert float(fit.objective) == pytest.approx(float(less.objective), rel=1e-8)
    assert float(other.objective) == pytest.approx(float(less.objective), rel=1e-8)


def test_a_zero_base_keeps_the_unweighted_coefficients():
    left, right, shares, base = problem()
    fit = hadamard_combination(left, right, shares, torch.zeros_like(base))
    near = plain_fit(left, right, shares)
    torch.testing.assert_close(fit.p, near.p[0])
    torch.testing.assert_close(fit.q, near.q[0])
    assert float(fit.objective) == float(fit.target) == 0
    assert fit.converged


def test_a_first_round_without_an_update_keeps_the_means():
    left, right, shares, base = problem()
    fit = hadamard_combination(torch.zeros_like(left), right, shares, base)
    assert torch.equal(fit.p, shares)
    torch.testing.assert_close(fit.q, shares)
    assert float(fit.objective) == float(fit.target) == 0
    nothing = hadamard_combination(torch.zeros_like(left), 0 * right, shares, base)
    assert torch.equal(nothing.p, shares)
    assert torch.equal(nothing.q, shares)


def test_clients_that_cancel_get_a_zero_product():
    left, right, _, base = problem(clients=2)
    left = torch.stack([left[0], -left[0]])
    right = torch.stack([right[0], right[0]])
    fit = hadamard_combination(left, right, torch.full((2,), 0.5, dtype=DTYPE), base)
    assert float(value(left, right, torch.full((2,), 0.5, dtype=DTYPE), base, fit)) < 1e-24
    assert bool(torch.isfinite(fit.p).all() and torch.isfinite(fit.q).all())


def test_the_gauge_is_that_of_the_unweighted_fit():
    for seed in range(6):
        left, right, shares, base = problem("corr", seed=seed)
        fit = hadamard_combination(left, right, shares, base)
        assert float(fit.p @ shares) > 0
        torch.testing.assert_close(
            hadamard.combined(fit.q, right).norm(), hadamard.combined(shares, right).norm()
        )


def test_the_sign_is_fixed_where_the_descent_turned_it():
    for seed in (44, 54, 65, 128):
        left, right, shares, base = problem("scalar", rank=2, widths=(9, 13), seed=seed)
        near = plain_fit(left, right, shares)
        found = weighted(left, right, shares, base)
        end = alternate(found, near.p[:, None], near.q[:, None], **LONG)
        assert float(end.p[0, 0] @ shares) < 0
        fit = hadamard_combination(left, right, shares, base, **LONG)
        assert float(fit.p @ shares) > 0
        assert float(fit.objective) == pytest.approx(float(end.value), rel=1e-9)


def test_of_two_equal_ends_that_from_the_unweighted_coefficients_is_taken():
    left, right, shares, base = problem()
    # A single entry of W0 is fitted exactly from either start.
    base = base.index_fill(0, torch.arange(1, 24), 0).index_fill(1, torch.arange(1, 20), 0)
    near = plain_fit(left, right, shares)
    end = alternate(
        weighted(left, right, shares, base),
        near.p[:, None],
        near.q[:, None],
        sweeps=50,
        tolerance=1e-10,
    )
    assert float(end.value.abs()) < 1e-14
    fit = hadamard_combination(left, right, shares, base)
    torch.testing.assert_close(fit.p / fit.p[0], end.p[0, 0] / end.p[0, 0, 0])
    torch.testing.assert_close(fit.q / fit.q[0], end.q[0, 0] / end.q[0, 0, 0])


def test_what_changes_nothing():
    left, right, shares, base = problem("consensus", clients=5, rank=4)
    fit = hadamard_combination(left, right, shares, base, **LONG)

    def reached(*arguments):
        return float(hadamard_combination(*arguments, **LONG).objective)

    best = float(fit.objective)
    # One invertible matrix for all clients.
    x = torch.linalg.qr(drawn(4, 4)).Q + torch.diag(torch.tensor([0.0, 1, 2, 3]))
    common = reached(x.mT @ left, torch.linalg.inv(x) @ right, shares, base)
    assert common == pytest.approx(best, rel=1e-8)
    # A scale and sign for each.
    scale = torch.tensor([2.0, -0.3, 5.0, -1.0, 0.1], dtype=DTYPE)[:, None, None]
    assert reached(left * scale, right / scale, shares, base) == pytest.approx(best, rel=1e-5)
    # Signs of W0, and its size but for the square of it.
    assert reached(left, right, shares, -base.abs()) == pytest.approx(best, rel=1e-8)
    assert reached(left, right, shares, 3 * base) == pytest.approx(9 * best, rel=1e-8)
    # Diagonal matrices may stand in W0 or in the factors.
    d_out, d_in = drawn(24, seed=8).exp(), drawn(20, seed=9).exp()
    moved = base / d_out[:, None] / d_in
    absorbed = hadamard.objective(left * d_out, right * d_in, shares, moved, fit.p, fit.q)
    assert float(absorbed) == pytest.approx(best, rel=1e-9)
    # Order of the clients.
    order = [3, 1, 4, 0, 2]
    other = hadamard_combination(left[order], right[order], shares[order], base, **LONG)
    torch.testing.assert_close(other.p, fit.p[order], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(other.q, fit.q[order], rtol=1e-6, atol=1e-8)


def test_a_duplicate_with_half_the_weight_leaves_the_product():
    left, right, shares, base = problem("corr", clients=4)
    fit = hadamard_combination(left, right, shares, base, **LONG)
    twice = [0, 0, 1, 2, 3]
    halves = shares[twice] * torch.tensor([0.5, 0.5, 1, 1, 1], dtype=DTYPE)
    other = hadamard_combination(left[twice], right[twice], halves, base, **LONG)
    one = hadamard.combined(fit.p, left).mT @ hadamard.combined(fit.q, right)
    two = hadamard.combined(other.p, left[twice]).mT @ hadamard.combined(other.q, right[twice])
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5 * float(one.norm()))


def test_blocks_of_rows_change_nothing_but_rounding():
    left, right, shares, base = problem()
    whole = hadamard_combination(left, right, shares, base, rows=24)
    for rows in (1, 5, 256):
        fit = hadamard_combination(left, right, shares, base, rows=rows)
        torch.testing.assert_close(fit.p, whole.p, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(fit.objective, whole.objective, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_input_is_computed_in_double(dtype):
    left, right, shares, base = problem()
    narrow = [tensor.to(dtype) for tensor in (left, right, base)]
    kept = [tensor.clone() for tensor in narrow]
    fit = hadamard_combination(*narrow[:2], shares, narrow[2])
    wide = hadamard_combination(*(t.double() for t in narrow[:2]), shares, narrow[2].double())
    assert fit.p.dtype == fit.q.dtype == fit.objective.dtype == DTYPE
    assert all(torch.equal(a, b) for a, b in zip(fit[:4], wide[:4], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(narrow, kept, strict=True))


def test_nothing_of_the_size_of_a_weight_is_held():
    left, right, shares, base = problem(clients=4, rank=2, widths=(64, 48))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype == DTYPE:
                largest = max(largest, found.numel())
            return found

    with Watch():
        hadamard_combination(left, right, shares, base.float(), rows=8)
    # Neither W0 nor the clients' products of a whole block at once.
    assert largest < base.numel() / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": torch.ones(5, 2, 24)}, r"right is \(5, 3, 20\); pass \(N, r, d_in\) with N = 5"),
        ({"right": torch.ones(4, 3, 20)}, r"right is \(4, 3, 20\)"),
        ({"shares": torch.ones(4) / 4}, r"shares is \(4,\)"),
        ({"base": torch.ones(20, 24)}, r"base is \(20, 24\); pass \(d_out, d_in\) .*d_out = 24"),
        ({"base": torch.ones(24)}, r"base is \(24,\)"),
        ({"base": torch.ones(24, 20, dtype=torch.int8)}, "base is torch.int8; pass floating"),
        ({"base": torch.ones(24, 20, device="meta")}, "base is on meta, left on cpu"),
        ({"base": torch.full((24, 20), float("nan"))}, "base holds NaN"),
        ({"left": torch.full((5, 3, 24), float("inf"))}, "left holds NaN or infinite"),
        ({"shares": torch.tensor([0.5, 0.5, 0.5, -0.5, 0.0])}, "shares are .* pass positive"),
        ({"shares": torch.full((5,), 0.3)}, "shares are .* sum to 1"),
        ({"sweeps": 0}, "sweeps is 0; pass an integer"),
        ({"sweeps": True}, "sweeps is True"),
        ({"rows": 2.0}, "rows is 2.0; pass an integer of 1 or more"),
        ({"tolerance": 1.0}, "tolerance is 1.0; pass a number in"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
    ],
)
def test_bad_input_is_named(change, message):
    left, right, shares, base = problem()
    arguments = {"left": left, "right": right, "shares": shares, "base": base, **change}
    with pytest.raises(FedcoreError, match=message):
        hadamard_combination(**arguments)


@pytest.mark.parametrize(
    ("name", "round", "common"), [("ffa", 0, "A"), ("rolora", 1, "B"), ("product_svd", 0, "")]
)
def test_what_is_exact_for_lora_is_exact_for_hira(name, round, common):
    states = {f"c{n}": lora_state(n, dtype=DTYPE) for n in range(4)}
    shared = lora_state(9, dtype=DTYPE)
    layout = shared.layout()
    previous = Broadcast(layout, shared.to_row(layout))
    cohort = Cohort.from_states(states, {"c0": 1.0, "c1": 5.0, "c2": 2.0, "c3": 0.5})
    for slot in layout.factor_slots:
        view, held = (layout.view(row, slot) for row in (cohort.updates, previous.row))
        if slot.factor == common:
            view.copy_(held.expand_as(view))
        elif not common and slot.factor == "A":
            # Products of one row space have a mean of rank r, which the SVD keeps whole.
            view.copy_(drawn(4, 3, 3, seed=slot.offset) @ held)

    method = create_method(name)
    sent = method.upload_layout(layout, round)
    uploads = replace(cohort, layout=sent, updates=layout.gather(cohort.updates, sent), round=round)
    row = method.aggregate(uploads, previous).row

    def product(flat, module):
        b, a = (layout.view(flat, layout.by_name[f"{module}.{f}"]) for f in "BA")
        return b.mT @ a

    for module, d_in, d_out in MODULES:
        base = base_of(d_out, d_in)
        models = base + base * product(cohort.updates, module)
        mean = torch.einsum("n,noc->oc", cohort.shares, models)
        error = base + base * product(row, module) - mean
        assert float(error.norm() / (mean - base).norm()) < 1e-12
