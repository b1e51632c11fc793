import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.methods.tri.ce_lora.similarity import cka_similarity, cosine_similarity
from tests.property.tri_rounds import near_identity

EYE = torch.eye(8, dtype=torch.float64)


def normal(*shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def pair(one, other, similarity):
    return float(similarity([torch.stack([one, other])[:, None]])[0, 1])


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_cosine_is_the_mean_over_modules_of_the_definition(clients, modules, seed):
    small, large = normal(clients, modules, 2, 2, seed=seed), normal(clients, 2, 5, 5, seed=seed)
    found = cosine_similarity([small, large])
    for i in range(clients):
        for j in range(clients):
            each = [
                float((x[i, m] * x[j, m]).sum() / (x[i, m].norm() * x[j, m].norm()))
                for x in (small, large)
                for m in range(x.shape[1])
            ]
            assert float(found[i, j]) == pytest.approx(sum(each) / len(each), abs=1e-12)
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-15)
    assert (found.diagonal() == 1).all()


def test_a_module_that_did_not_move_is_like_its_like_alone():
    moves = normal(3, 2, 4, 4)
    moves[0, 0] = moves[1, 0] = 0
    found = cosine_similarity([moves])
    second = cosine_similarity([moves[:, 1:]])
    assert float(found[0, 1]) == pytest.approx((1 + float(second[0, 1])) / 2)
    assert float(found[0, 2]) == pytest.approx(float(second[0, 2]) / 2)
    assert torch.equal(cosine_similarity([0 * moves]), torch.ones(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_scale_does_not_matter_to_the_cosine_however_extreme(scale):
    moves = normal(3, 2, 4, 4)
    scaled = moves.clone()
    scaled[1] *= scale
    torch.testing.assert_close(cosine_similarity([scaled]), cosine_similarity([moves]))


def test_the_cosine_tells_a_move_from_its_mirror_and_cka_does_not():
    step = 0.05 * normal(8, 8)
    assert pair(step, -step, cosine_similarity) == pytest.approx(-1)
    assert pair(EYE + step, EYE - step, cka_similarity) > 0.85
    assert pair(step, -step, cka_similarity) == pytest.approx(1)


def test_cka_is_the_definition():
    cores = near_identity(3, modules=2, rank=5)
    found = cka_similarity([cores])
    for i in range(3):
        for j in range(3):
            each = [
                (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
                for x, y in zip(cores[i], cores[j], strict=True)
            ]
            assert float(found[i, j]) == pytest.approx(float(sum(each) / 2), abs=1e-12)
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-15)


def test_cka_is_blind_to_scale_sign_and_right_rotations_but_not_to_left_ones():
    x, y = normal(8, 8, seed=1), normal(8, 8, seed=2)
    turn = torch.linalg.qr(normal(8, 8, seed=3)).Q
    base = pair(x, y, cka_similarity)
    assert pair(x, x, cka_similarity) == pytest.approx(1)
    for same in (3.0 * x, -x, x @ turn):
        assert pair(same, y, cka_similarity) == pytest.approx(base, abs=1e-12)
    assert abs(pair(turn @ x, y, cka_similarity) - base) > 1e-3
    assert pair(turn, EYE, cka_similarity) == pytest.approx(1)


def test_cka_is_saturated_near_the_identity():
    noise = normal(200, 2, 8, 8)
    far = [pair(x, y, cka_similarity) for x, y in noise]
    near = [pair(EYE + 0.1 * x, EYE + 0.1 * y, cka_similarity) for x, y in noise]
    moved = [pair(x, y, cosine_similarity) for x, y in noise]
    assert sum(far) / 200 == pytest.approx(0.49, abs=0.02)
    assert sum(near) / 200 == pytest.approx(0.87, abs=0.01)
    assert sum(moved) / 200 == pytest.approx(0.0, abs=0.03)
