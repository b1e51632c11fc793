"""Rows to tensors by PEFT's keys and back, at the ranks of clients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.keyed_rows import at_ranks, row_from_tensors, slot_name, tensors_from_row
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout

MODULES = ("encoder.0.query", "encoder.1.value")


def layout_of(rank=4):
    widths = {"A": 6, "B": 5, "R": rank}
    factors = [(m, f, rank, widths[f]) for m in MODULES for f in widths]
    return FactorLayout.build(factors, [("head.weight", (3, 5)), ("head.bias", (3,))])


@given(ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=st.integers(0, 2**16))
def test_what_a_client_of_lower_rank_holds_comes_back_and_nothing_else(ranks, seed):
    layout = layout_of()
    own = dict(zip(MODULES, ranks, strict=True))
    row = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    tensors = tensors_from_row(row, layout, own)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for module, rank in own.items():
        assert shapes[f"{module}.A"] == (rank, 6)
        assert shapes[f"{module}.B"] == (5, rank)
        assert shapes[f"{module}.R"] == (rank, rank)
    assert shapes["head.weight"] == (3, 5)
    assert shapes["head.bias"] == (3,)
    back = row_from_tensors(tensors, layout, own)
    for slot in layout:
        there, here = layout.view(row, slot).clone(), layout.view(back, slot)
        if not slot.dense:
            there[own[slot.module] :] = 0
            if slot.factor == "R":
                there[:, own[slot.module] :] = 0
        assert torch.equal(here, there), slot.name


def test_tensors_share_no_memory_with_the_row():
    layout = layout_of()
    row = torch.ones(layout.size)
    for tensor in tensors_from_row(row, layout).values():
        tensor.zero_()
    assert row.min() == 1


def test_keys_of_peft_and_names_of_slots_mean_the_same():
    module = MODULES[0]
    for key in (
        f"base_model.model.{module}.lora_B.weight",
        f"base_model.model.{module}.lora_B.default.weight",
        f"{module}.B",
    ):
        assert slot_name(key) == f"{module}.B"
    assert slot_name("base_model.model.head.modules_to_save.default.bias") == "head.bias"


def test_ranks_beyond_the_layouts_change_nothing():
    layout = layout_of(rank=2)
    assert at_ranks(layout, dict.fromkeys(MODULES, 9)) == layout
    assert at_ranks(layout, None) is layout


def test_a_row_is_as_wide_as_its_widest_tensor():
    layout = FactorLayout.build([("m", "A", 2, 3)])
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        assert row_from_tensors({"m.A": torch.ones(2, 3, dtype=dtype)}, layout).dtype == expected


def tensors():
    return tensors_from_row(torch.ones(layout_of().size), layout_of())


A = f"{MODULES[0]}.A"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != A}, r"encoder\.0\.query\.A is missing"),
        (lambda t: {**t, A: t[A][:1]}, r"A has shape \(1, 6\), \(4, 6\) was asked for"),
        (lambda t: {**t, A: t[A].T}, r"A has shape \(6, 4\), \(4, 6\) was asked for"),
        (lambda t: {**t, A: t[A].long()}, r"A has dtype torch\.int64"),
        (lambda t: {**t, "more": t[A]}, "more was not asked for"),
        (
            lambda t: {**t, f"base_model.model.{MODULES[0]}.lora_A.weight": t[A]},
            r"lora_A\.weight names encoder\.0\.query\.A, which another key names too",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(FedcoreError, match=message):
        row_from_tensors(change(tensors()), layout_of())


def test_what_nobody_trained_may_come_along_unchanged():
    layout, held = layout_of(), {"frozen.A": torch.arange(6.0).reshape(2, 3)}
    given_ = {**tensors(), "base_model.model.frozen.lora_A.weight": held["frozen.A"].bfloat16()}
    assert torch.equal(
        row_from_tensors(given_, layout, held=held), row_from_tensors(tensors(), layout)
    )
    given_["base_model.model.frozen.lora_A.weight"] = held["frozen.A"] + 1
    with pytest.raises(FedcoreError, match=r"lora_A\.weight is frozen in this round and differs"):
        row_from_tensors(given_, layout, held=held)
