"""The solver of FLoRA-NA against dense algebra, general-purpose minimisers and known minima."""

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings

from fedcore.methods.lora.flora_na.method import align_clients, rotated_blocks
from fedcore.methods.lora.flora_na.objective import PairObjective, exact_objective
from fedcore.methods.lora.flora_na.solver import alternate, nearest_combination, starts
from fedcore_kernels import block_grams, mean_pair_gram, product_gram, rotate
from tests.property.families import FAMILIES, make_family
from tests.property.pairs import PAIR_KINDS, pairs
from tests.reference import nearest
from tests.reference.products import mean_product

DTYPE = torch.float64


def problem(left, right, shares):
    return PairObjective.build(block_grams(left), block_grams(right), shares)


def solve(left, right, shares, **options):
    return nearest_combination(problem(left, right, shares), **options)


def relative(left, right, shares, p, q):
    """``f / ||M||^2`` by dense algebra, (L,)."""
    found = nearest.objective(left, right, shares, p, q)
    return found / nearest.target(left, right, shares)


def means(left, shares):
    return shares.expand(left.shape[1], -1)


def random_coefficients(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def test_the_gram_form_is_the_dense_objective():
    left, right, shares = make_family("indep", 5, 4, (23, 31), 0, modules=3)
    found = problem(left, right, shares)
    torch.testing.assert_close(found.cross, mean_pair_gram(left, right, shares))
    torch.testing.assert_close(found.gram, product_gram(left, right))
    p, q = random_coefficients(3, 2, 5), random_coefficients(3, 2, 5, seed=1)
    for s in range(2):
        expected = nearest.objective(left, right, shares, p[:, s], q[:, s])
        torch.testing.assert_close(found.value(p, q)[:, s], expected, rtol=1e-10, atol=0)
        exact = exact_objective(left, right, shares, p[:, s], q[:, s])
        torch.testing.assert_close(exact, expected, rtol=1e-10, atol=0)
    # As one form of the pairs' own inner products K_{is,jt} = <left_i^T right_j, left_s^T right_t>.
    left_blocks, right_blocks = block_grams(left), block_grams(right)
    inner = torch.einsum("lisab,ljtab->lijst", left_blocks, right_blocks)
    delta = torch.diag(shares) - p[:, 0, :, None] * q[:, 0, None, :]
    quadratic = torch.einsum("lij,lst,lijst->l", delta, delta, inner)
    torch.testing.assert_close(found.value(p, q)[:, 0], quadratic, rtol=1e-10, atol=0)


def test_the_half_steps_descend_along_the_true_gradients():
    left, right, shares = make_family("indep", 5, 4, (23, 31), 0, modules=2)
    found = problem(left, right, shares)
    p = random_coefficients(2, 5).requires_grad_()
    q = random_coefficients(2, 5, seed=1).requires_grad_()
    nearest.objective(left, right, shares, p, q).sum().backward()
    p0, q0 = p.detach()[:, None], q.detach()[:, None]
    in_p = 2 * (found.left_curvature(q0) @ p0[..., None] - (found.cross @ q0.mT)[:, None])
    in_q = 2 * (found.right_curvature(p0) @ q0[..., None] - (found.cross.mT @ p0.mT)[:, None])
    torch.testing.assert_close(in_p[:, 0, :, 0], p.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(in_q[:, 0, :, 0], q.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("clients", "rank"), [(3, 4), (5, 16), (10, 8)])
def test_sweeps_are_exact_least_squares_and_stay_between_the_bounds(family, clients, rank):
    left, right, shares = make_family(family, clients, rank, (48, 56), 0, modules=2)
    found, size = problem(left, right, shares), nearest.target(left, right, shares)
    p = q = means(left, shares)
    value = found.value(p[:, None], q[:, None])[:, 0]
    for _ in range(6):
        expected = nearest.sweep(left, right, shares, p, q)
        step = alternate(found, p[:, None], q[:, None], sweeps=1, tolerance=0.0)
        # Compared by what they reach: with tolerance 0 a step that gains nothing is not taken.
        best = nearest.objective(left, right, shares, *expected)
        p, q, after = step.p[:, 0], step.q[:, 0], step.value[:, 0]
        assert bool((after <= value).all())
        torch.testing.assert_close(after, best, rtol=1e-9, atol=1e-12 * float(size.max()))
        value = after
    fit = nearest_combination(found)
    slack = 1e-12 * size
    assert bool((fit.value <= found.value(*starts(found)).amin(-1) + slack).all())
    assert bool((fit.value >= nearest.tail(left, right, shares) - slack).all())
    torch.testing.assert_close(
        fit.value, nearest.objective(left, right, shares, fit.p, fit.q), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_isotropic_start_keeps_its_bound(family):
    left, right, shares = make_family(family, 6, 4, (30, 25), 3, modules=3)
    found = problem(left, right, shares)
    p, q = starts(found)
    rows = left.transpose(0, 1).flatten(2), right.transpose(0, 1).flatten(2)
    flat = rows[0].mT * shares @ rows[1]
    rest = torch.linalg.svdvals(flat)[:, 1:].square().sum(-1)
    value = nearest.objective(left, right, shares, p[:, 1], q[:, 1])
    assert bool((value <= 4 * rest * (1 + 1e-9)).all())
    # It is the best rank one of sum_n w_n vec(left_n) vec(right_n)^T.
    fitted = nearest.combined(p[:, 1], left).flatten(1)[:, :, None]
    fitted = fitted * nearest.combined(q[:, 1], right).flatten(1)[:, None, :]
    torch.testing.assert_close((flat - fitted).square().sum((1, 2)), rest)


@pytest.mark.parametrize("family", ["indep", "consensus", "round1", "rot"])
def test_rank_one_is_the_leading_singular_triplet(family):
    left, right, shares = make_family(family, 6, 1, (40, 50), 0)
    found = problem(left, right, shares)
    best = nearest.tail(left, right, shares)
    torch.testing.assert_close(nearest_combination(found).value, best, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.value(*starts(found))[:, 1], best, rtol=1e-9, atol=0)


def _exact_case(name):
    left, right, shares = make_family("indep", 4, 3, (20, 25), 0)
    if name == "one client":
        left, right, shares = left[:1], right[:1], torch.ones(1, dtype=DTYPE)
    elif name == "equal clients":
        left, right = left[:1].expand_as(left), right[:1].expand_as(right)
    elif name == "common A":
        right = right[:1].expand_as(right)
    elif name == "common B":
        left = left[:1].expand_as(left)
    elif name == "A up to scale":
        right = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=DTYPE)[:, None, None, None] * right[:1]
    elif name == "equal products in other gauges":
        turn = torch.linalg.qr(random_coefficients(4, 1, 3, 3)).Q
        left, right = turn.mT @ left[:1], turn.mT @ right[:1]
    return left, right, shares


EXACT = ("one client", "equal clients", "common A", "common B", "A up to scale")


@pytest.mark.parametrize("name", [*EXACT, "equal products in other gauges"])
def test_the_exact_cases_are_exact(name):
    left, right, shares = _exact_case(name)
    fit = solve(left, right, shares)
    assert float(relative(left, right, shares, fit.p, fit.q)) < 1e-12
    assert float(exact_objective(left, right, shares, fit.p, fit.q)) < 1e-26
    assert bool(fit.converged.all())
    before = float(relative(left, right, shares, shares[None], shares[None]))
    if name in ("one client", "equal clients"):
        # The correction form leaves directions alone in which nothing changes.
        torch.testing.assert_close(fit.p[0], shares, rtol=1e-9, atol=0)
        torch.testing.assert_close(fit.q[0], shares, rtol=1e-9, atol=0)
    elif name in ("A up to scale", "equal products in other gauges"):
        assert before > 0.05
    else:
        assert before < 1e-12


def test_a_mean_of_low_rank_alone_is_not_exact():
    # Two clients whose products share both spaces, so that rank M <= r.
    left, right, shares = make_family("indep", 3, 3, (20, 25), 0)
    mix = random_coefficients(3, 1, 3, 3)
    right = mix @ right[:1]
    left = random_coefficients(3, 1, 3, 3, seed=1) @ left[:1]
    assert float(nearest.tail(left, right, shares)) < 1e-24
    fit = solve(left, right, shares)
    assert float(relative(left, right, shares, fit.p, fit.q)) > 1e-3


def test_the_three_starts_find_the_best_of_many_and_the_means_alone_do_not():
    generator = torch.Generator().manual_seed(5)
    missed = missed_from_the_means = 0
    for case in range(60):
        clients = int(torch.randint(2, 12, (), generator=generator))
        rank = int(torch.randint(1, 9, (), generator=generator))
        family = FAMILIES[case % len(FAMILIES)]
        left, right, shares = make_family(family, clients, rank, (48, 40), case)
        found = problem(left, right, shares)
        p, q = (torch.randn(1, 20, clients, generator=generator, dtype=DTYPE) for _ in "pq")
        many = alternate(found, p, q, sweeps=300, tolerance=1e-9).value.min()
        ours = alternate(found, *starts(found), sweeps=300, tolerance=1e-9).value
        slack = 1e-6 * found.target[0]
        missed += int(ours.min() > many + slack)
        missed_from_the_means += int(ours[0, 0] > many + slack)
    assert missed == 0
    assert missed_from_the_means >= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_no_general_minimiser_from_the_same_start_ends_lower(family):
    left, right, shares = make_family(family, 5, 3, (24, 20), 2)
    size = float(nearest.target(left, right, shares))
    n = len(shares)

    def value_and_gradient(point):
        point = torch.tensor(point, dtype=DTYPE, requires_grad=True)
        value = nearest.objective(left, right, shares, point[None, :n], point[None, n:]) / size
        value.sum().backward()
        return float(value.detach()), point.grad.numpy()

    start = torch.cat([shares, shares]).numpy()
    options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10}
    found = scipy.optimize.minimize(
        value_and_gradient, start, jac=True, method="L-BFGS-B", options=options
    )
    fit = solve(left, right, shares, sweeps=500, tolerance=1e-12)
    assert float(fit.value) / size <= found.fun + 1e-8


@pytest.mark.parametrize(("family", "most"), [("consensus", 3), ("round1", 3), ("scalar", 3)])
@pytest.mark.parametrize(("clients", "rank"), [(5, 16), (10, 8), (30, 8)])
def test_few_sweeps_suffice_near_a_common_start(family, most, clients, rank):
    left, right, shares = make_family(family, clients, rank, (96, 96), 1)
    found = problem(left, right, shares)
    w = means(left, shares)[:, None]
    before = found.value(w, w)
    end = alternate(found, w, w, sweeps=500, tolerance=1e-13).value
    after = alternate(found, w, w, sweeps=most, tolerance=0.0).value
    assert float(after - end) <= 1e-3 * float(before - end)


def test_the_gauge_of_the_result():
    left, right, shares = make_family("corr", 5, 3, (24, 20), 0, modules=4)
    fit = solve(left, right, shares)
    assert bool(((fit.p * shares).sum(-1) >= 0).all())
    wanted = nearest.combined(means(right, shares), right).norm(dim=(1, 2))
    got = nearest.combined(fit.q, right).norm(dim=(1, 2))
    torch.testing.assert_close(got, wanted)
    # The same with the signs of both factors turned, which no product shows.
    turned = solve(-left, -right, shares)
    torch.testing.assert_close(turned.p, fit.p)


def test_the_sign_is_fixed_where_the_clients_leave_it_open():
    left, right, shares = make_family("scalar", 5, 3, (24, 20), 0, modules=12)
    fit = solve(left, right, shares)
    assert bool(((fit.p * shares).sum(-1) > 0).all())


@pytest.mark.parametrize("affine", [False, True])
def test_directions_in_which_nothing_changes_keep_their_start(affine):
    left, right, _ = make_family("corr", 4, 3, (24, 20), 0, modules=16)
    shares = torch.tensor([0.3, 0.3, 0.1, 0.3], dtype=DTYPE)
    w = means(left, shares)[:, None]
    options = {"sweeps": 5, "tolerance": 0.0, "affine": affine}
    equal = alternate(problem(left[[0] * 4], right[[0] * 4], shares), w, w, **options)
    torch.testing.assert_close(equal.p, w, rtol=1e-9, atol=0)
    torch.testing.assert_close(equal.q, w, rtol=1e-9, atol=0)
    # Two equal clients of equal weight: only the sum of their coefficients matters.
    twins = [0, 0, 1, 2]
    fit = alternate(problem(left[twins], right[twins], shares), w, w, **options)
    torch.testing.assert_close(fit.p[..., 0], fit.p[..., 1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fit.q[..., 0], fit.q[..., 1], rtol=1e-9, atol=1e-9)
    assert float((fit.p - w).abs().max()) > 0.01


def test_factors_whose_mean_cancels_get_equal_norms():
    left, right, shares = make_family("indep", 2, 3, (12, 10), 0)
    shares = torch.full((2,), 0.5, dtype=DTYPE)
    right = torch.stack([right[0], -right[0]])
    fit = solve(left, right, shares)
    b, a = nearest.combined(fit.p, left), nearest.combined(fit.q, right)
    torch.testing.assert_close(b.norm(), a.norm())
    # A is common up to sign, so that the fit is exact where the means give nothing at all.
    assert float(relative(left, right, shares, fit.p, fit.q)) < 1e-12


def test_what_a_common_or_a_scalar_gauge_changes():
    left, right, shares = make_family("consensus", 5, 4, (24, 20), 2)
    fit = solve(left, right, shares)
    # Far from a multiple of an orthogonal matrix, which the norms would not notice.
    x = torch.linalg.qr(random_coefficients(4, 4)).Q + torch.diag(torch.tensor([0.0, 1, 2, 3]))
    common = solve(x.mT @ left, torch.linalg.inv(x) @ right, shares)
    torch.testing.assert_close(common.value, fit.value, rtol=1e-9, atol=0)
    product = nearest.combined(fit.p, left).mT @ nearest.combined(fit.q, right)
    other = nearest.combined(common.p, x.mT @ left).mT
    other = other @ nearest.combined(common.q, torch.linalg.inv(x) @ right)
    torch.testing.assert_close(other, product, rtol=1e-9, atol=1e-9)

    scale = torch.tensor([2.0, -0.3, 5.0, -1.0, 0.1], dtype=DTYPE)[:, None, None, None]
    scaled = solve(left * scale, right / scale, shares)
    torch.testing.assert_close(scaled.value, fit.value, rtol=1e-6, atol=0)
    before, after = (
        float(relative(b, a, shares, shares[None], shares[None]))
        for b, a in ((left, right), (left * scale, right / scale))
    )
    assert after > 5 * before

    torch.testing.assert_close(solve(2 * left, 3 * right, shares).p, fit.p, rtol=1e-9, atol=1e-12)

    order = [3, 1, 4, 0, 2]
    moved = solve(left[order], right[order], shares[order])
    torch.testing.assert_close(moved.p, fit.p[:, order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moved.q, fit.q[:, order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("clients", "rank"), [(5, 16), (30, 8)])
def test_rotations_hurt_and_a_common_gauge_cures_them(clients, rank):
    left, right, _ = make_family("rot", clients, rank, (256, 256), 2, level=0.1)
    shares = torch.full((clients,), 1 / clients, dtype=DTYPE)
    best = float(nearest.tail(left, right, shares)) ** 0.5
    plain = float(solve(left, right, shares).value) ** 0.5
    assert plain > 5 * best
    blocks = block_grams(left), block_grams(right)
    turns = align_clients(*blocks, shares)
    torch.testing.assert_close(
        turns.mT @ turns, torch.eye(rank, dtype=DTYPE).expand(1, clients, rank, rank)
    )
    turned = [rotate(side, turns.transpose(0, 1)) for side in (left, right)]
    for side, block in zip(turned, blocks, strict=True):
        torch.testing.assert_close(block_grams(side), rotated_blocks(block, turns))
    torch.testing.assert_close(
        mean_product(*turned, shares), mean_product(left, right, shares), rtol=0, atol=1e-12
    )
    aligned = float(solve(*turned, shares).value) ** 0.5
    assert aligned < 1.1 * best


def test_a_client_without_direction_is_turned_but_not_changed():
    left, right, shares = make_family("rot", 3, 3, (12, 10), 0)
    left[1] = right[1] = 0
    left[2, :, 2] = right[2, :, 2] = 0
    turns = align_clients(block_grams(left), block_grams(right), shares)
    eye = torch.eye(3, dtype=DTYPE).expand(1, 3, 3, 3)
    torch.testing.assert_close(turns.mT @ turns, eye)


@pytest.mark.parametrize("family", FAMILIES)
def test_affine_steps_keep_the_sums_and_never_lose(family):
    left, right, shares = make_family(family, 6, 4, (64, 64), 5)
    found = problem(left, right, shares)
    value = torch.full((1, 1), torch.inf, dtype=DTYPE)
    for sweeps in range(1, 6):
        w = means(left, shares)[:, None]
        step = alternate(found, w, w, sweeps=sweeps, tolerance=0.0, affine=True)
        assert bool((step.value <= value).all())
        value = step.value
    fit = nearest_combination(found, affine=True)
    for coefficients in (fit.p, fit.q):
        torch.testing.assert_close(coefficients.sum(-1), torch.ones(1, dtype=DTYPE))
    free = float(nearest_combination(found).value) ** 0.5
    bound = float(fit.value) ** 0.5
    assert bound >= free * (1 - 1e-9)
    assert float(fit.value) <= float(found.value(w, w)) * (1 + 1e-12)
    if family == "scalar":
        assert bound > 1.5 * free
    # Optimal among sums of one: the gradient is a multiple of the vector of ones.
    long = alternate(found, w, w, sweeps=2000, tolerance=1e-14, affine=True)
    gradient = found.left_curvature(long.q) @ long.p[..., None] - found.cross @ long.q[..., None]
    rest = gradient - gradient.mean(-2, keepdim=True)
    assert float(rest.norm()) <= 1e-5 * float((found.cross @ long.q[..., None]).norm())


def test_the_gain_near_a_common_start_is_bounded_by_the_tangent_space():
    left, right, _ = make_family("consensus", 5, 16, (300, 300), 2)
    shares = torch.full((5,), 0.2, dtype=DTYPE)
    mean = mean_product(left, right, shares)[0]
    b, a = (side.mean(0)[0] for side in (left, right))
    outside = [torch.linalg.qr(side.mT).Q for side in (b, a)]
    covariance = mean - b.mT @ a
    covariance = covariance - outside[0] @ (outside[0].mT @ covariance)
    covariance = covariance - (covariance @ outside[1]) @ outside[1].mT
    predicted = float(covariance.norm())
    best = float(nearest.tail(left, right, shares)) ** 0.5
    fitted = float(solve(left, right, shares).value) ** 0.5
    fedavg = float((mean - b.mT @ a).norm())
    assert predicted == pytest.approx(best, rel=0.01)
    assert best <= fitted <= fedavg
    assert fitted > 0.98 * fedavg


def test_small_objectives_keep_their_digits():
    for level, digits in ((0.02, 0.01), (1e-4, 0.01), (1e-6, 0.01)):
        left, right, shares = make_family("consensus", 8, 8, (96, 96), 2, level=level)
        fit = solve(left, right, shares)
        size = nearest.target(left, right, shares)
        wide = [side.to(torch.float64) for side in (left, right)]
        found = exact_objective(*wide, shares, fit.p, fit.q)
        # M - B^ A^ in fp64 is good to 1e-16 ||M||, which squared is below all of these.
        expected = nearest.objective(left, right, shares, fit.p, fit.q)
        torch.testing.assert_close(found, expected, rtol=digits, atol=0)
        assert float(expected / size) < level**3
        if level > 1e-3:
            torch.testing.assert_close(fit.value, expected, rtol=1e-6, atol=0)


def test_which_families_it_repairs():
    for family, clients, rank in (("corr", 3, 4), ("scalar", 30, 8)):
        left, right, shares = make_family(family, clients, rank, (256, 256), 0, level=0.05)
        fedavg = float(nearest.objective(left, right, shares, shares[None], shares[None])) ** 0.5
        fitted = float(solve(left, right, shares).value) ** 0.5
        best = float(nearest.tail(left, right, shares)) ** 0.5
        assert fitted < 0.4 * fedavg
        assert fitted < 1.2 * best
    left, right, shares = make_family("round1", 5, 16, (256, 256), 2)
    fedavg = float(nearest.objective(left, right, shares, shares[None], shares[None])) ** 0.5
    assert 0.9 * fedavg < float(solve(left, right, shares).value) ** 0.5 <= fedavg


def test_a_duplicate_with_half_the_weight_leaves_the_product():
    left, right, shares = make_family("corr", 4, 3, (24, 20), 7)
    fit = solve(left, right, shares, sweeps=300, tolerance=1e-13)
    twice = [0, 0, 1, 2, 3]
    halves = shares[twice] * torch.tensor([0.5, 0.5, 1, 1, 1], dtype=DTYPE)
    other = solve(left[:, :][twice], right[twice], halves, sweeps=300, tolerance=1e-13)
    one = nearest.combined(fit.p, left).mT @ nearest.combined(fit.q, right)
    two = nearest.combined(other.p, left[twice]).mT @ nearest.combined(other.q, right[twice])
    torch.testing.assert_close(other.value, fit.value, rtol=1e-9, atol=0)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-6 * float(one.norm()))


def test_modules_do_not_hear_of_each_other():
    parts = [make_family(f, 5, 3, (24, 20), i) for i, f in enumerate(FAMILIES)]
    left, right = (torch.cat([part[i] for part in parts], 1) for i in range(2))
    shares = parts[0][2]
    batch = solve(left, right, shares)
    assert int(batch.sweeps.max()) > 2 * int(batch.sweeps.min())
    for i in range(len(parts)):
        alone = solve(left[:, i : i + 1], right[:, i : i + 1], shares)
        assert int(alone.sweeps) == int(batch.sweeps[i])
        torch.testing.assert_close(alone.p[0], batch.p[i], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(alone.value[0], batch.value[i], rtol=1e-9, atol=1e-14)


def test_too_few_sweeps_return_the_best_so_far_and_say_so():
    left, right, shares = make_family("indep", 8, 4, (48, 40), 1)
    short = solve(left, right, shares, sweeps=1)
    assert not bool(short.converged)
    assert int(short.sweeps) == 1
    assert float(short.value) <= float(short.start_value)
    assert bool(solve(left, right, shares, sweeps=2000).converged)


@pytest.mark.parametrize("affine", [False, True])
def test_a_mean_that_is_zero(affine):
    left, right, shares = make_family("indep", 2, 2, (9, 7), 0, modules=3)
    shares = torch.full((2,), 0.5, dtype=DTYPE)
    left[:, 0] = 0
    right[1, 1], left[1, 1] = right[0, 1], -left[0, 1]
    # M = 0, and yet the means have a product: (b, a) and (2 b, -a / 2).
    left[1, 2], right[1, 2] = 2 * left[0, 2], -0.5 * right[0, 2]
    fit = solve(left, right, shares, affine=affine)
    assert bool(fit.converged.all())
    product = nearest.combined(fit.p, left).mT @ nearest.combined(fit.q, right)
    for module in (0, 1):
        assert torch.equal(fit.p[module], shares)
        assert torch.equal(fit.q[module], shares)
        assert float(product[module].norm()) < 1e-15
    if affine:
        assert torch.equal(fit.p[2], shares)
    else:
        assert float(product[2].norm()) == 0
        assert torch.equal(fit.q[2], shares)


@settings(max_examples=150)
@given(pairs(kinds=PAIR_KINDS))
def test_trouble_never_gives_nan_nor_a_worse_fit_than_the_means(pair):
    counted = pair.weights > 0
    left, right = pair.left[counted], pair.right[counted]
    shares = pair.shares[counted]
    for affine in (False, True):
        found = problem(left, right, shares)
        fit = nearest_combination(found, affine=affine)
        assert bool(torch.isfinite(torch.cat([fit.p, fit.q], -1)).all())
        value = nearest.objective(left, right, shares, fit.p, fit.q)
        fedavg = nearest.objective(left, right, shares, *[means(left, shares)] * 2)
        assert bool((value <= fedavg + 1e-12 * found.scale).all())
        assert bool((value >= nearest.tail(left, right, shares) - 1e-12 * found.scale).all())
