"""A whole round on flat rows: factors of several ranks and widths, dense tensors, and launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedcore_kernels import FactorLayout, FlorgRound, backend, florg_round
from fedcore_kernels.florg_round import Variant
from fedcore_kernels.jit.grams import cross_gram_kernel
from tests.reference.placement import placed
from tests.reference.tolerance import assert_close

MIXED = FactorLayout.build(
    [
        *(("a", "A", 2, 33), ("b", "A", 2, 33), ("a", "B", 2, 200), ("b", "B", 3, 48)),
        *(("wide", "A", 3, 1100), ("thin", "A", 1, 5), ("thin", "B", 1, 1000)),
    ],
    [("head.weight", (4, 7)), ("head.bias", (4,)), ("norm", (33,))],
)
VARIANTS: tuple[Variant, ...] = ("sketched", "truncated")


def uploads_of(
    layout: FactorLayout, dtype: torch.dtype, clients: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights and the row before; whatever stands between slots or beside the rows is NaN."""
    random = torch.Generator().manual_seed(0)
    previous = torch.randn(layout.size, generator=random)
    updates = previous + 0.3 * torch.randn(clients, layout.size, generator=random)
    gaps = torch.ones(layout.size, dtype=torch.bool)
    for slot in layout:
        gaps[slot.offset : slot.offset + slot.numel] = False
    updates[:, gaps] = previous[gaps] = float("nan")
    whole = torch.full((clients, 16 + layout.size + 32), float("nan"), dtype=dtype)
    rows = whole[:, 16 : 16 + layout.size]
    rows.copy_(updates)
    return rows, torch.rand(clients, generator=random) + 0.1, previous.to(dtype)


def on_triton(
    case: tuple[Tensor, Tensor, Tensor],
    layout: FactorLayout,
    variant: Variant,
    device: torch.device,
    align: bool = True,
) -> FlorgRound:
    updates, weights, previous = case
    with backend("triton"):
        arguments = placed(updates, device), weights, placed(previous, device)
        return florg_round(*arguments, layout, variant, align)


def check(found: FlorgRound, expected: FlorgRound, layout: FactorLayout) -> None:
    row = found.row.cpu()
    between = row.clone()
    for slot in layout:
        between[slot.offset : slot.offset + slot.numel] = 0
    assert not between.any()
    for group in layout.groups:
        step, wanted = found.steps[group], expected.steps[group]
        sure = wanted.condition.max().item()
        condition = sure**2 if row.dtype == torch.float64 else sure
        factors = group.view(row)
        assert step.factor.data_ptr() == group.view(found.row).data_ptr()
        assert_close(factors, group.view(expected.row), group.width, condition=condition)
        assert torch.equal(step.rank.cpu(), wanted.rank)
        spread = step.condition.cpu().to(row.dtype)
        assert_close(spread, wanted.condition, group.width, condition=condition)
        assert torch.equal(step.tail.isnan().cpu(), wanted.tail.isnan())
        assert step.aligned.tolist() == wanted.aligned.tolist()
    for slot in layout.dense_slots:
        assert_close(layout.view(row, slot), layout.view(expected.row, slot), len(layout))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_slot_by_its_own_rule(
    variant: Variant, dtype: torch.dtype, device: torch.device
) -> None:
    case = uploads_of(MIXED, dtype)
    with backend("torch"):
        expected = florg_round(case[0].double(), case[1], case[2].double(), MIXED, variant)
    found = on_triton(case, MIXED, variant, device)
    assert found.row.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(found, expected, MIXED)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_alignment_every_factor_in_its_own_gauge(
    variant: Variant, device: torch.device
) -> None:
    case = uploads_of(MIXED, torch.float32)
    with backend("torch"):
        expected = florg_round(*case, MIXED, variant, align=False)
    check(on_triton(case, MIXED, variant, device, align=False), expected, MIXED)


def test_a_layout_of_dense_slots_alone_is_a_mean(device: torch.device) -> None:
    layout = FactorLayout.build([], [("bias", (40,)), ("head", (3, 5))])
    case = uploads_of(layout, torch.float32, clients=5)
    with backend("reference"):
        expected = florg_round(*case, layout)
    found = on_triton(case, layout, "truncated", device)
    assert found.steps == {}
    check(found, expected, layout)


def test_dense_slots_among_factors(device: torch.device) -> None:
    """A layout need not come from ``build``: factors may stand behind a dense slot."""
    built = FactorLayout.build([("q", "A", 2, 24)], [("bias", (10,))])
    factor, bias = built.slots
    layout = FactorLayout(
        (
            type(bias)("", 1, 10, "bias", 0, (10,)),
            type(factor)("A", 2, 24, "q", 16),
            type(bias)("", 1, 3, "norm", 64, (3,)),
        )
    )
    case = uploads_of(layout, torch.float32)
    with backend("torch"):
        expected = florg_round(*case, layout, "sketched")
    check(on_triton(case, layout, "sketched", device), expected, layout)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_runs_are_equal_to_the_bit(variant: Variant, device: torch.device) -> None:
    case = uploads_of(MIXED, torch.float32)
    one, two = (on_triton(case, MIXED, variant, device).row for _ in range(2))
    assert torch.equal(one, two)


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched from here on."""
    names: list[str] = []
    interface = type(cross_gram_kernel)
    run = interface.run

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(interface, "run", counted)
    return names


def test_launches_count_ranks_and_not_modules_widths_or_clients(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = FactorLayout.build([("m", "A", 2, 32)])
    many = FactorLayout.build([(f"m{i}", "A", 2, 32 + 100 * i) for i in range(9)])
    several = FactorLayout.build([(f"m{i}", "A", 1 + i, 32) for i in range(3)])
    names = launches(monkeypatch)
    counts = []
    for layout, clients in ((one, 2), (many, 2), (one, 9), (several, 2)):
        names.clear()
        on_triton(uploads_of(layout, torch.float32, clients), layout, "sketched", device)
        counts.append(len(names))
    assert counts == [counts[0], counts[0], counts[0], 3 * counts[0]]
