from __future__ import annotations

import pytest
import torch

from fedcore_kernels import florg_round, nystrom_step, truncated_step
from fedcore_kernels.layout import FactorLayout
from tests.property.graded import graded_clients
from tests.reference import exact

KAPPAS = (1e1, 1e2, 1e3, 1e4)


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_weakest_direction_against_sixty_digits(kappa: float, noise: float) -> None:
    clients, weights, previous = graded_clients(kappa, noise, seed=int(kappa))
    stack, before = clients[:, None], previous[None]
    sketched = nystrom_step(stack, weights, before)
    wanted = exact.sketched(clients, weights, previous)
    assert exact.weakest_direction_error(sketched.factor[0], wanted) < 1e-10
    truncated = truncated_step(stack, weights, before, 4)
    wanted = exact.truncated(clients, weights, previous, 4)
    assert exact.weakest_direction_error(truncated.factor[0], wanted) < 1e-10
    assert sketched.condition.item() == pytest.approx(kappa**2, rel=0.9)
    assert truncated.condition.item() == pytest.approx(kappa, rel=0.9)


def test_fp32_uploads_carry_only_their_own_rounding() -> None:
    """The step of fp32 uploads equals the fp64 step of the same numbers, rounded once."""
    for kappa in KAPPAS:
        clients, weights, previous = graded_clients(kappa, 0.1, seed=1)
        stack, before = clients[:, None].float(), previous[None].float()
        single = nystrom_step(stack, weights, before).factor
        double = nystrom_step(stack.double(), weights, before.double()).factor
        assert torch.equal(single, double.float())
        single = truncated_step(stack, weights, before, 4).factor
        double = truncated_step(stack.double(), weights, before.double(), 4).factor
        assert torch.equal(single, double.float())


@pytest.mark.parametrize("variant", ["truncated", "sketched"])
def test_no_setting_of_matrix_products_changes_the_bits(variant: str) -> None:
    layout = FactorLayout.build([("q", "A", 3, 65), ("v", "A", 3, 65)], [("bias", (9,))])
    random = torch.Generator().manual_seed(0)
    previous = torch.randn(layout.size, generator=random)
    updates = previous + 0.1 * torch.randn(5, layout.size, generator=random)
    before = florg_round(updates, torch.ones(5), previous, layout, variant).row  # type: ignore[arg-type]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            after = florg_round(updates, torch.ones(5), previous, layout, variant).row  # type: ignore[arg-type]
    finally:
        torch.set_float32_matmul_precision(precision)
    assert torch.equal(before, after)


def test_arguments_are_left_as_they_came() -> None:
    clients, weights, previous = graded_clients(1e2, 0.1, seed=2)
    copies = clients.clone(), weights.clone(), previous.clone()
    truncated_step(clients[:, None], weights, previous[None], 4)
    nystrom_step(clients[:, None], weights, previous[None])
    for now, then in zip((clients, weights, previous), copies, strict=True):
        assert torch.equal(now, then)
