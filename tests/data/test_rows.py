"""Tensors and rows: there and back, at the ranks of clients, with scalings absorbed."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.adapter_state import AdapterState, adapter_from_row
from fedcore.data.rows import (
    absorb_scalings,
    layout_at_ranks,
    rank_and_width,
    row_from_tensors,
    slot_name,
    tensor_in_row,
    tensors_from_row,
    widest_layout,
)
from fedcore.data.validation import check_state
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout

PARTS = {"lora": ("lora_A", "lora_B"), "gram": ("gram_A",), "tri": ("tri_A", "tri_R", "tri_B")}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MODULES = ("encoder.0.query", "encoder.1.value")


def layout_of(rank=4):
    widths = {"A": 6, "B": 5, "R": rank}
    factors = [(m, f, rank, widths[f]) for m in MODULES for f in widths]
    return FactorLayout.build(factors, [("head.weight", (3, 5)), ("head.bias", (3,))])


@st.composite
def shapes(draw):
    """A family, its modules with their input and output widths, and the shape of a head."""
    family = draw(st.sampled_from(sorted(PARTS)))
    names = draw(st.lists(st.sampled_from("qkvo"), min_size=1, max_size=3, unique=True))
    widths = {name: draw(st.tuples(st.integers(1, 6), st.integers(1, 6))) for name in names}
    head = draw(st.none() | st.tuples(st.integers(1, 3)) | st.tuples(*[st.integers(1, 3)] * 2))
    return family, widths, head


@st.composite
def adapters(draw, shape=None, dtype=None):
    """An adapter of ``shape``, with ranks, scalings, dtype and values of its own."""
    family, widths, head = draw(shapes()) if shape is None else shape
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def values(*size):
        return torch.randn(*size, generator=random, dtype=torch.float64).to(dtype)

    tensors, ranks, alphas = {}, {}, {}
    for name, (d_in, d_out) in widths.items():
        rank = ranks[name] = draw(st.integers(1, 5))
        alphas[name] = draw(st.sampled_from([0.5, 1.0, 3.0, 7.0]))
        sizes = {"A": (rank, d_in), "R": (rank, rank), "B": (d_out, rank)}
        for part in PARTS[family]:
            tensors[f"base_model.model.{name}.{part}"] = values(*sizes[part[-1]])
    if head is not None:
        tensors["base_model.model.head.weight"] = values(*head)
    config = {"r": 1, "lora_alpha": 1.0, "rank_pattern": ranks, "alpha_pattern": alphas}
    return AdapterState.from_peft(tensors, config)


@st.composite
def cohorts(draw, dtype=None):
    """Adapters of the same modules."""
    shape = draw(shapes())
    return draw(st.lists(adapters(shape, dtype), min_size=1, max_size=4))


def same_bits(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one, other))


def update(state, module):
    """What the adapter adds to the base weight; of a Gram adapter, between its frames."""
    named = {factor: tensor.double() for factor, tensor in state.factors[module].items()}
    left = named["B"] if "B" in named else named["A"].T
    core = named.get("R", torch.eye(left.shape[1], dtype=torch.float64))
    return state.scaling[module] * left @ core @ named["A"]


def without_scaling(state):
    return {module: update(state, module) / state.scaling[module] for module in state.factors}


@given(cohorts())
def test_an_adapter_comes_back_from_its_row_and_from_a_wider_one_to_the_bit(states):
    layout = widest_layout(states[0].layout(), [state.ranks for state in states])
    for state in states:
        empty = AdapterState.from_peft(
            {key: torch.zeros_like(tensor) for key, tensor in state.to_peft().items()}, state.config
        )
        for where in (state.layout(), layout):
            row = state.to_row(where)
            assert row.dtype == (torch.float64 if state.dtype == torch.float64 else torch.float32)
            back = empty.with_row(row, where).to_peft()
            for key, tensor in state.to_peft().items():
                assert same_bits(back[key], tensor)
                assert back[key].is_contiguous()


@given(cohorts())
def test_a_row_holds_each_tensor_where_its_layout_says_and_zeros_beyond(states):
    layout = widest_layout(states[0].layout(), [state.ranks for state in states])
    for state in states:
        row = state.to_row(layout)
        used = torch.zeros(layout.size, dtype=torch.bool)
        for slot in layout:
            if slot.dense:
                expected = state.dense[slot.module].reshape(1, -1)
            else:
                tensor = state.factors[slot.module][slot.factor]
                expected = tensor.transpose(0, 1) if slot.factor == "B" else tensor
            for i, values in enumerate(expected):
                start = slot.offset + i * slot.width
                assert torch.equal(row[start : start + len(values)], values.to(row.dtype))
                used[start : start + len(values)] = True
        assert not row[~used].any()


@given(cohorts())
def test_tensors_by_their_keys_and_an_adapter_give_the_same_row(states):
    layout = widest_layout(states[0].layout(), [state.ranks for state in states])
    for state in states:
        row = state.to_row(layout)
        assert same_bits(row_from_tensors(state.to_peft(), layout, state.ranks), row)
        tensors = tensors_from_row(row, layout, state.ranks)
        assert list(tensors) == [slot.name for slot in state.layout()]
        for key, tensor in state.to_peft().items():
            assert same_bits(tensors[slot_name(key)], tensor.to(row.dtype))
            assert tensors[slot_name(key)].is_contiguous()


@given(cohorts())
def test_the_widest_layout_has_room_for_every_adapter_and_no_more(states):
    ranks = [state.ranks for state in states]
    layout = widest_layout(states[0].layout(), ranks)
    assert layout == widest_layout(states[-1].layout(), reversed(ranks))
    for slot in layout.factor_slots:
        largest = max(own[slot.module] for own in ranks)
        width = rank_and_width(slot.factor, states[0].factors[slot.module][slot.factor])[1]
        assert (slot.rows, slot.width) == (largest, largest if slot.factor == "R" else width)
    for state in states:
        assert check_state(state, layout, mixed_ranks=True) is None
        assert layout_at_ranks(layout, state.ranks) == state.layout()


def test_the_widest_layout_never_has_less_than_the_layout_itself():
    layout = layout_of(rank=3)
    assert widest_layout(layout, []) == layout
    assert widest_layout(layout, [{MODULES[0]: 2}]) == layout
    wider = widest_layout(layout, [{MODULES[0]: 5}])
    assert [wider.by_name[f"{module}.A"].rows for module in MODULES] == [5, 3]


@given(cohorts(torch.float64))
def test_rows_with_scalings_absorbed_hold_the_updates(states):
    layout = widest_layout(states[0].layout(), [state.ranks for state in states])
    for state in states:
        before = state.to_row(layout)
        row = before.clone()
        absorb_scalings(row, layout, state.family, state.scaling)
        for module, product in without_scaling(state.with_row(row, layout)).items():
            torch.testing.assert_close(product, update(state, module), rtol=1e-13, atol=1e-13)
        absorb_scalings(row, layout, state.family, state.scaling, inverse=True)
        torch.testing.assert_close(row, before, rtol=1e-15, atol=0)


@given(cohorts(torch.float64))
def test_an_adapter_from_a_row_has_the_rows_update_whatever_its_own_scaling(states):
    sender, receiver = states[0], states[-1]
    layout = widest_layout(sender.layout(), [state.ranks for state in states])
    row = receiver.to_row(layout)
    absorb_scalings(row, layout, sender.family, sender.scaling)
    before = row.clone()
    adapter = adapter_from_row(row, layout, receiver)
    assert torch.equal(row, before)
    assert adapter.config == receiver.config
    for module, product in without_scaling(receiver.with_row(row, layout)).items():
        torch.testing.assert_close(update(adapter, module), product, rtol=1e-13, atol=1e-13)


@given(scales=st.tuples(*[st.sampled_from([1.0, 2.0, 0.3])] * 2), seed=st.integers(0, 2**16))
def test_one_scaling_for_all_modules_gives_the_bits_of_one_for_each(scales, seed):
    layout = layout_of(rank=2)
    row = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    scaling = dict(zip(MODULES, scales, strict=True))
    absorbed = row.clone()
    absorb_scalings(absorbed, layout, "tri", scaling)
    for slot in layout:
        expected = tensor_in_row(row, layout, slot.name)
        if slot.factor == "R":
            expected = expected * scaling[slot.module]
        assert torch.equal(tensor_in_row(absorbed, layout, slot.name), expected)


def test_a_tensor_in_a_row_is_a_view():
    layout = layout_of()
    row = torch.zeros(layout.size)
    for slot in layout:
        tensor_in_row(row, layout, slot.name).fill_(1)
    assert row.sum() == layout.numel
    tensor_in_row(row, layout, f"{MODULES[0]}.B", 2).fill_(2)
    assert tensor_in_row(row, layout, f"{MODULES[0]}.B")[:, :2].min() == 2
    assert int((row == 2).sum()) == prod((5, 2))


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
    assert layout_at_ranks(layout, dict.fromkeys(MODULES, 9)) == layout
    assert layout_at_ranks(layout, None) is layout


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
        (lambda t: {**t, A: t[A][:1]}, r"A has shape \(1, 6\), expected \(4, 6\)"),
        (lambda t: {**t, A: t[A].T}, r"A has shape \(6, 4\), expected \(4, 6\)"),
        (lambda t: {**t, A: t[A].long()}, r"A has dtype torch\.int64"),
        (lambda t: {**t, "more": t[A]}, "unexpected tensor more"),
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
