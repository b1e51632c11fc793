from __future__ import annotations

import pytest
import torch

from fedcore_kernels import (
    FactorLayout,
    backend,
    florg_round,
    nystrom_step,
    truncated_step,
    weighted_mean,
)
from tests.reference.tolerance import relative_error

LAYOUT = FactorLayout.build(
    [(f"m{i}", "A", 3, 33) for i in range(5)] + [("wide", "A", 3, 70), ("thin", "A", 1, 5)],
    [("head.weight", (4, 7)), ("head.bias", (4,))],
)


def rows(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    previous = torch.randn(LAYOUT.size, generator=random)
    updates = previous + 0.3 * torch.randn(6, LAYOUT.size, generator=random)
    # Whatever stands between the slots must not reach the result.
    gaps = torch.ones(LAYOUT.size, dtype=torch.bool)
    for slot in LAYOUT:
        gaps[slot.offset : slot.offset + slot.numel] = False
    updates[:, gaps] = float("nan")
    return updates.to(dtype), torch.rand(6, generator=random), previous.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["truncated", "sketched"])
@pytest.mark.parametrize("align", [True, False])
def test_every_slot_by_its_own_rule(dtype: torch.dtype, variant: str, align: bool) -> None:
    updates, weights, previous = rows(dtype)
    row, steps = florg_round(updates, weights, previous, LAYOUT, variant, align)  # type: ignore[arg-type]
    assert row.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for group in LAYOUT.groups:
        stack, factors = group.view(updates), group.view(previous)
        if variant == "truncated":
            expected = truncated_step(stack, weights, factors, group.rows, align=align)
        else:
            expected = nystrom_step(stack, weights, factors, align=align)
        assert torch.equal(group.view(row), expected.factor)
        assert torch.equal(steps[group].rank, expected.rank)
        assert torch.equal(steps[group].condition, expected.condition)
        assert steps[group].factor.data_ptr() == group.view(row).data_ptr()
    for slot in LAYOUT.dense_slots:
        columns = slice(slot.offset, slot.offset + slot.numel)
        assert torch.equal(row[columns], weighted_mean(updates[:, columns], weights))
    filled = torch.zeros_like(row)
    for slot in LAYOUT:
        columns = slice(slot.offset, slot.offset + slot.numel)
        filled[columns] = row[columns]
    assert torch.equal(row, filled)


@pytest.mark.parametrize("variant", ["truncated", "sketched"])
def test_equals_the_definition_and_repeats_to_the_bit(variant: str) -> None:
    updates, weights, previous = rows(torch.float64)
    found = florg_round(updates, weights, previous, LAYOUT, variant).row  # type: ignore[arg-type]
    with backend("reference"):
        expected = florg_round(updates, weights, previous, LAYOUT, variant).row  # type: ignore[arg-type]
    assert relative_error(found, expected) < 1e-10
    again = florg_round(updates, weights, previous, LAYOUT, variant).row  # type: ignore[arg-type]
    assert torch.equal(found, again)


def test_the_reports_name_their_modules() -> None:
    _, steps = florg_round(*rows(torch.float32), LAYOUT)
    modules = [name for group in steps for name in group.modules]
    assert modules == ["thin", "m0", "m1", "m2", "m3", "m4", "wide"]
    assert [step.rank.tolist() for step in steps.values()] == [[1], [3] * 5, [3]]
