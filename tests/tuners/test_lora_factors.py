from __future__ import annotations

import pytest
import torch

from fedcore.tuners import FrameRecipe, StructuredFrame, lora_factors

SCALING = 4.0


def problem(out_features: int, in_features: int, rank: int = 3):
    frame = StructuredFrame(FrameRecipe("structured", 1, "m", out_features, in_features))
    k = min(out_features, in_features)
    generator = torch.Generator().manual_seed(2)
    factor = torch.randn(rank, k, generator=generator, dtype=torch.float64)
    initial = torch.randn(rank, k, generator=generator, dtype=torch.float64)
    identity = torch.eye(k, dtype=torch.float64)
    return factor, initial, frame, frame.times_left_t(identity).T, frame.times_right(identity)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (33, 1), (4, 1000)])
@pytest.mark.parametrize("offset", [True, False])
def test_pair_is_the_update(shape, offset):
    factor, initial, frame, left, right = problem(*shape)
    lora_A, lora_B = lora_factors(factor, initial if offset else None, frame, SCALING)
    gram = factor.T @ factor - (initial.T @ initial if offset else 0)
    assert lora_A.shape == (6 if offset else 3, shape[1])
    assert lora_B.shape == (shape[0], 6 if offset else 3)
    torch.testing.assert_close(lora_B @ lora_A, SCALING * left @ gram @ right, atol=1e-12, rtol=0)


def test_exactly_zero_at_the_start_and_accurate_near_it():
    factor, _, frame, left, right = problem(40, 30)
    start = factor.float()
    lora_A, lora_B = lora_factors(start, start.clone(), frame, SCALING)
    assert torch.equal(lora_B @ lora_A, torch.zeros(40, 30))
    # A difference of two products would be right to 1e-7 of A0^T A0 only, here 1e-3 of the update.
    moved = start + 1e-4 * torch.randn(3, 30, generator=torch.Generator().manual_seed(3))
    lora_A, lora_B = lora_factors(moved, start, frame, SCALING)
    gram = moved.double().T @ moved.double() - start.double().T @ start.double()
    exact = SCALING * left @ gram @ right
    assert (lora_B @ lora_A - exact).norm() <= 2e-6 * exact.norm()


def test_gradient_is_the_formula_and_passes_finite_differences():
    factor, initial, frame, left, right = problem(7, 5)
    target = torch.randn(7, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def loss(rows):
        lora_A, lora_B = lora_factors(rows, initial, frame, SCALING)
        return 0.5 * (lora_B @ lora_A - target).square().sum()

    factor.requires_grad_(True)
    assert torch.autograd.gradcheck(loss, (factor,), atol=1e-8, rtol=1e-6)
    (found,) = torch.autograd.grad(loss(factor), factor)
    with torch.no_grad():
        gram = factor.T @ factor - initial.T @ initial
        dense = SCALING * left @ gram @ right - target
        pulled = left.T @ dense @ right.T
        expected = SCALING * factor @ (pulled + pulled.T)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_autocast_and_half_factors_do_not_lower_the_precision():
    factor, initial, frame, _, _ = problem(40, 30)
    plain = lora_factors(factor.float(), initial.float(), frame, SCALING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = lora_factors(factor.float(), initial.float(), frame, SCALING)
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])
    half = lora_factors(factor.bfloat16(), initial.bfloat16(), frame, SCALING)
    assert half[0].dtype == half[1].dtype == torch.float32


def test_arguments_are_left_alone():
    factor, initial, frame, _, _ = problem(7, 5)
    before = factor.clone(), initial.clone()
    lora_factors(factor, initial, frame, SCALING)
    assert torch.equal(factor, before[0])
    assert torch.equal(initial, before[1])
