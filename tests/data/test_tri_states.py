"""Adapters with a core: three factors a module, the middle one square."""

from __future__ import annotations

import pytest
import torch

from fedcore.data.adapter_state import AdapterState, adapter_from_row
from fedcore.data.cohort import Cohort
from fedcore.data.peft_files import read_adapter, write_adapter
from fedcore.data.validation import check_state
from fedcore.errors import FedcoreError
from fedcore.methods import Broadcast, Capabilities, Method
from tests.property.adapters import MODULES, tri_state

MODULE = "encoder.layer.0.query"


class Nested(Method):
    """Only what a client of lower rank receives."""

    family = "tri"
    name = "nested"

    capabilities = Capabilities(mixed_ranks=True)
    description = None

    def aggregate(self, cohort, previous):
        raise AssertionError("nothing is aggregated here")


def update(state: AdapterState, module: str = MODULE) -> torch.Tensor:
    named = {name: tensor.double() for name, tensor in state.factors[module].items()}
    return state.scaling[module] * named["B"] @ named["R"] @ named["A"]


def product(layout, row, module: str = MODULE) -> torch.Tensor:
    A, R, B = (layout.view(row, layout.by_name[f"{module}.{f}"]).double() for f in "ARB")
    return B.T @ R @ A


def tensors(rank: int = 3) -> dict[str, torch.Tensor]:
    return dict(tri_state(0, rank=rank).to_peft())


def test_keys_name_three_factors():
    state = tri_state(0)
    assert state.family == "tri"
    assert sorted(state.factors) == sorted(name for name, _, _ in MODULES)
    assert set(state.factors[MODULE]) == {"A", "B", "R"}
    assert {f: tuple(t.shape) for f, t in state.factors[MODULE].items()} == {
        "A": (3, 12),
        "R": (3, 3),
        "B": (10, 3),
    }
    assert state.rank(MODULE) == 3
    live = {
        key.replace(".tri_A", ".tri_A.default").removeprefix("base_model.model."): tensor
        for key, tensor in state.to_peft().items()
    }
    again = AdapterState.from_peft(live, state.config)
    assert torch.equal(again.to_row(again.layout()), state.to_row(state.layout()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_folders_and_rows_round_trip_to_the_bit(tmp_path, dtype):
    state = tri_state(1, dtype=dtype)
    back = read_adapter(write_adapter(state, tmp_path))
    layout = state.layout()
    row = state.to_row(layout)
    named = {slot.name: layout.view(row, slot) for slot in layout}
    factors = state.factors[MODULE]
    assert torch.equal(named[f"{MODULE}.B"], factors["B"].T.to(row.dtype))
    assert torch.equal(named[f"{MODULE}.R"], factors["R"].to(row.dtype))
    assert torch.equal(named[f"{MODULE}.A"], factors["A"].to(row.dtype))
    other = tri_state(2, dtype=dtype).with_row(row, layout)
    for key, tensor in state.to_peft().items():
        assert torch.equal(back.to_peft()[key], tensor)
        assert torch.equal(other.to_peft()[key], tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"base_model.model.{MODULE}.tri_A"), "lacks factor A"),
        (lambda t: t.pop(f"base_model.model.{MODULE}.tri_B"), "lacks factor B"),
        (lambda t: t.pop(f"base_model.model.{MODULE}.tri_R"), "lacks factor R"),
        (
            lambda t: t.update({f"base_model.model.{MODULE}.tri_R": torch.zeros(3, 4)}),
            r"has a core of shape \(3, 4\); it is square",
        ),
        (
            lambda t: t.update({f"base_model.model.{MODULE}.tri_R": torch.zeros(2, 2)}),
            "factors of different rank",
        ),
        (lambda t: t.update({"x.lora_A": torch.zeros(2, 3)}), "mixes adapter families"),
    ],
)
def test_malformed_adapters_are_named_and_refused(change, message):
    found = tensors()
    change(found)
    with pytest.raises(FedcoreError, match=message) as caught:
        AdapterState.from_peft(found, {"r": 3, "lora_alpha": 3}, name="client 7")
    assert str(caught.value).startswith("client 7")


def test_the_core_takes_up_the_scaling():
    double = torch.float64
    states = {"a": tri_state(0, 3, 12.0, dtype=double), "b": tri_state(1, 3, 5.0, dtype=double)}
    cohort = Cohort.from_states(states)
    for n, state in enumerate(states.values()):
        torch.testing.assert_close(product(cohort.layout, cohort.updates[n]), update(state))
    slot = cohort.layout.by_name[f"{MODULE}.A"]
    found = cohort.layout.view(cohort.updates[0], slot)
    assert torch.equal(found, states["a"].factors[MODULE]["A"])
    for receiver in states.values():
        adapter = adapter_from_row(cohort.updates[0], cohort.layout, receiver)
        torch.testing.assert_close(update(adapter), update(states["a"]))


@pytest.mark.parametrize("order", [(2, 5), (5, 2)])
def test_a_lower_rank_fills_the_leading_block_of_the_core(order):
    states = {c: tri_state(i, rank) for i, (c, rank) in enumerate(zip("ab", order, strict=True))}
    cohort = Cohort.from_states(states)
    core = cohort.layout.by_name[f"{MODULE}.R"]
    assert (core.rows, core.width) == (5, 5)
    assert cohort.ranks.tolist() == [[rank, rank] for rank in order]
    low = order.index(2)
    view = cohort.layout.view(cohort.updates[low], core)
    own = states["ab"[low]]
    assert torch.equal(view[:2, :2], own.factors[MODULE]["R"])
    assert view[2:].abs().max() == view[:, 2:].abs().max() == 0
    for n, state in enumerate(states.values()):
        torch.testing.assert_close(product(cohort.layout, cohort.updates[n]), update(state))
    back = own.with_row(cohort.updates[low], cohort.layout)
    for key, tensor in own.to_peft().items():
        assert torch.equal(back.to_peft()[key], tensor)


def test_what_a_client_of_lower_rank_receives_is_what_it_can_hold():
    layout = tri_state(0, rank=5).layout()
    state = Broadcast(layout, tri_state(3, rank=5).to_row(layout))
    row = Nested().for_client(state, state, [2] * len(layout.modules))
    client = tri_state(4, rank=2).with_row(row, layout)
    torch.testing.assert_close(update(client), product(layout, row))
    assert torch.equal(client.to_row(layout), row)


def test_rows_of_another_rank_or_width_are_refused():
    layout = tri_state(0, rank=3).layout()
    assert check_state(tri_state(1, rank=3), layout, mixed_ranks=False) is None
    assert check_state(tri_state(1, rank=2), layout, mixed_ranks=True) is None
    assert "has rank 2, expected 3" in check_state(tri_state(1, rank=2), layout, mixed_ranks=False)
    for mixed in (True, False):
        problem = check_state(tri_state(1, rank=4), layout, mixed_ranks=mixed)
        assert "has rank 4, expected 3" in problem
    narrow = tri_state(1, modules=[("encoder.layer.0.query", 11, 10), MODULES[1]])
    assert "A has width 11, expected 12" in check_state(narrow, layout, mixed_ranks=True)
    with pytest.raises(FedcoreError, match=r"client b: .* has rank 4, expected 3"):
        Cohort.from_states({"a": tri_state(0), "b": tri_state(1, rank=4)}, layout=layout)


def test_a_layer_as_wide_as_the_rank_keeps_its_three_factors_apart():
    state = tri_state(5, rank=4, modules=[("square", 4, 4)])
    layout = state.layout()
    row = state.to_row(layout)
    for factor in "ARB":
        stored = state.factors["square"][factor]
        expected = stored.T if factor == "B" else stored
        assert torch.equal(layout.view(row, layout.by_name[f"square.{factor}"]), expected)
    torch.testing.assert_close(product(layout, row, "square"), update(state, "square"))
