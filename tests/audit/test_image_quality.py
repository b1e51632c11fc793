from __future__ import annotations

from itertools import permutations
from math import log10

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.audit.image_quality import compare_pictures
from fedcore.errors import FedcoreError


def pictures(count: int, seed: int, pixels: int = 9):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, pixels, generator=generator, dtype=torch.float64)


def test_identity_is_perfect_in_any_order():
    truth = (pictures(4, 0) * 16).round() / 16
    found = compare_pictures(truth, truth[[2, 0, 3, 1]], 16)
    assert torch.equal(found.pictures, truth)
    assert (found.mse, found.psnr, found.exact) == (0.0, 60.0, 1.0)
    assert found.ssim == pytest.approx(1.0, abs=1e-12)


@given(st.integers(0, 1000), st.integers(1, 4))
def test_the_order_is_the_best_of_all(seed, count):
    truth, guess = pictures(count, seed), pictures(count, seed + 10_000)
    found = compare_pictures(truth, guess, 16)
    best = min(
        float((truth - guess[list(order)]).square().mean()) for order in permutations(range(count))
    )
    assert found.mse == pytest.approx(best, rel=1e-12)
    assert sorted(found.pictures.tolist()) == sorted(guess.tolist())


def test_known_errors():
    truth = torch.zeros(1, 16, dtype=torch.float64)
    found = compare_pictures(truth, truth + 0.1, 16)
    assert found.mse == pytest.approx(0.01)
    assert found.psnr == pytest.approx(20.0)
    assert found.exact == 0.0
    # No variance on either side: light alone counts.
    assert found.ssim == pytest.approx(1e-4 / (0.01 + 1e-4))
    assert compare_pictures(truth, truth + 0.03, 16).exact == 1.0
    assert compare_pictures(truth, truth + 0.032, 16).exact == 0.0
    one_pixel = truth.clone()
    one_pixel[0, 3] = 0.1
    found = compare_pictures(truth, one_pixel, 16)
    assert found.exact == 0.0
    assert found.psnr == pytest.approx(-10 * log10(0.01 / 16))


def test_similarity_follows_structure():
    truth = pictures(1, 1, 64)
    negative = compare_pictures(truth, 1 - truth, 16)
    noisy = compare_pictures(truth, (truth + 0.05 * pictures(1, 2, 64)).clamp(0, 1), 16)
    assert negative.ssim < -0.5 < 0.9 < noisy.ssim < 1


def test_psnr_is_a_mean_of_pictures_and_stops_at_sixty():
    truth = torch.zeros(2, 4, dtype=torch.float64)
    guess = torch.stack([torch.full((4,), 1e-5), torch.full((4,), 0.1)]).double()
    assert compare_pictures(truth, guess, 16).psnr == pytest.approx((60 + 20) / 2, rel=1e-6)


def test_other_shapes_are_refused():
    with pytest.raises(FedcoreError, match=r"truth has shape \(2, 9\) and found \(3, 9\)"):
        compare_pictures(pictures(2, 0), pictures(3, 0), 16)
