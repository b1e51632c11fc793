import math

import pytest
import torch

from fedcore.data.adapter_state import AdapterState
from fedcore.data.cohort import Cohort, CohortBuilder
from fedcore.data.peft_files import write_adapter
from fedcore.data.rows import tensors_from_row
from fedcore.data.validation import digest, identical_rows, rank_problem
from fedcore.errors import FedcoreError
from tests.property.adapters import gram_state, lora_state, lora_tensors
from tests.property.method_rounds import family_layout


def products(cohort, module):
    layout = cohort.layout
    b = layout.view(cohort.updates, layout.by_name[f"{module}.B"])
    a = layout.view(cohort.updates, layout.by_name[f"{module}.A"])
    return b.transpose(-1, -2) @ a


def test_scalings_are_absorbed_so_that_rows_hold_the_true_product():
    states = {"a": lora_state(0, rank=2, alpha=16.0), "b": lora_state(1, rank=4, alpha=16.0)}
    cohort = Cohort.from_states(states)
    module = "encoder.layer.0.query"
    for n, (client, scale) in enumerate({"a": 8.0, "b": 4.0}.items()):
        factors = states[client].factors[module]
        expected = scale * factors["B"] @ factors["A"]
        torch.testing.assert_close(products(cohort, module)[n], expected)
    assert cohort.ranks.tolist() == [[2, 2], [4, 4]]
    assert cohort.scalings.tolist() == [[8.0, 8.0], [4.0, 4.0]]
    assert cohort.mixed_ranks


def test_a_gram_factor_takes_the_root_of_the_scaling():
    state = gram_state(0, alpha=12.0)
    cohort = Cohort.from_states({"a": state})
    factor = cohort.layout.view(cohort.updates, cohort.layout.by_name["layer.0.query.A"])[0]
    own = state.factors["layer.0.query"]["A"]
    torch.testing.assert_close(factor.T @ factor, 4.0 * own.T @ own)


def test_rows_stand_in_the_order_of_the_ids_whatever_the_arrival():
    states = {name: lora_state(i) for i, name in enumerate("cab")}
    one = Cohort.from_states(states, {"a": 1.0, "b": 2.0, "c": 3.0})
    other = Cohort.from_states(dict(sorted(states.items())), {"a": 1.0, "b": 2.0, "c": 3.0})
    assert one.client_ids == ("a", "b", "c")
    assert torch.equal(one.updates, other.updates)
    assert one.weights.tolist() == [1.0, 2.0, 3.0]


def broken(**change):
    tensors = lora_tensors(9)
    key = "base_model.model.encoder.layer.0.query.lora_A.weight"
    if "nan" in change:
        tensors[key][1, 2] = change["nan"]
    if "shape" in change:
        tensors[key] = torch.zeros(3, change["shape"])
    if "extra" in change:
        tensors["base_model.model.pooler.weight"] = torch.zeros(2)
    if "missing" in change:
        del tensors["base_model.model.classifier.bias"]

    return AdapterState.from_peft(tensors, {"r": 3, "lora_alpha": 3})


BROKEN = [
    (
        broken(nan=math.nan),
        r"encoder.layer.0.query.A holds 1 values that are not finite, such as nan",
    ),
    (broken(nan=math.inf), "such as inf"),
    (broken(shape=11), "has width 11, expected 12"),
    (broken(extra=True), "unexpected tensor pooler.weight"),
    (broken(missing=True), "classifier.bias is missing"),
    (gram_state(0), "missing|family"),
]


@pytest.mark.parametrize(("state", "message"), BROKEN)
def test_a_bad_upload_is_named_and_refused_or_dropped(state, message):
    good = {"a": lora_state(0), "b": lora_state(1)}
    with pytest.raises(FedcoreError, match=message) as caught:
        Cohort.from_states({**good, "m": state})
    assert "client m" in str(caught.value)
    dropped = Cohort.from_states({**good, "m": state}, on_invalid="drop")
    without = Cohort.from_states(good)
    assert torch.equal(dropped.updates, without.updates)
    assert torch.equal(dropped.weights, without.weights)
    assert [d.client_id for d in dropped.dropped] == ["m"]


def test_a_rank_one_client_is_never_broadcast_into_the_others():
    layout = lora_state(0, rank=8).layout()
    builder = CohortBuilder(layout, ["a"], round=0)
    builder.fill("a", lora_state(1, rank=1, alpha=1.0))
    builder.receive("a", 1.0)
    cohort = builder.finish()
    factor = layout.view(cohort.updates, layout.by_name["encoder.layer.0.query.A"])[0]
    assert bool((factor[1:] == 0).all())
    assert bool((factor[0] != 0).all())


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_must_be_finite_and_not_negative(weight):
    states = {"a": lora_state(0), "b": lora_state(1)}
    with pytest.raises(FedcoreError, match="client b: its weight is"):
        Cohort.from_states(states, {"a": 1.0, "b": weight})
    cohort = Cohort.from_states(states, {"a": 1.0, "b": weight}, on_invalid="drop")
    assert cohort.client_ids == ("a",)


def test_zero_weights_leave_a_client_out_and_all_zero_is_an_error():
    states = {"a": lora_state(0), "b": lora_state(1)}
    cohort = Cohort.from_states(states, {"a": 2.0, "b": 0.0})
    assert cohort.client_ids == ("a",)
    assert cohort.shares.tolist() == [1.0]
    for policy in ("raise", "drop"):
        with pytest.raises(FedcoreError, match="weights of all clients are zero"):
            Cohort.from_states(states, {"a": 0.0, "b": 0.0}, on_invalid=policy)


def test_dropping_everyone_leaves_an_empty_cohort():
    cohort = Cohort.from_states({"m": BROKEN[0][0]}, on_invalid="drop")
    assert len(cohort) == 0
    assert cohort.updates.shape[0] == 0


def test_rounds_clients_and_frozen_parts_are_checked():
    layout = lora_state(0).layout()
    row = lora_state(0).to_row(layout)

    def build():
        builder = CohortBuilder(layout, ["a", "b"], round=4)
        builder.row("a").copy_(row)
        return builder

    with pytest.raises(FedcoreError, match="client a appears twice"):
        CohortBuilder(layout, ["a", "a"], round=0)
    builder = build()
    builder.receive("a", 1.0, round=3)
    with pytest.raises(FedcoreError, match="client a: its upload is for round 3"):
        builder.finish()
    builder = build()
    builder.receive("a", 1.0)
    with pytest.raises(FedcoreError, match="client a reported twice"):
        builder.receive("a", 1.0)
    with pytest.raises(FedcoreError, match="client z was not asked"):
        builder.row("z")
    assert [d.reason for d in builder.finish().dropped] == ["it did not report"]
    builder = build()
    builder.receive("a", 1.0, frozen="x", expected_frozen="y")
    with pytest.raises(FedcoreError, match="frozen factor or frame differs"):
        builder.finish()


def test_digests_see_one_bit():
    layout = lora_state(0).layout()
    row = lora_state(0).to_row(layout)
    frozen = layout.select("A", dense=False)
    same = row.clone()
    other = row.clone()
    slot = layout.by_name["encoder.layer.0.query.A"]
    view = layout.view(other, slot)
    view[0, 0] = torch.nextafter(view[0, 0], torch.tensor(9.0))
    assert digest(layout.gather(row, frozen), frozen) == digest(layout.gather(same, frozen), frozen)
    assert digest(layout.gather(row, frozen), frozen) != digest(
        layout.gather(other, frozen), frozen
    )


def test_identical_rows_are_noticed():
    row = torch.randn(8)
    assert identical_rows(torch.stack([row, row]))
    assert not identical_rows(torch.stack([row, row + 1]))
    assert not identical_rows(row[None])


def test_folders_become_a_cohort_and_bad_ones_are_named(tmp_path):
    folders = {c: write_adapter(lora_state(i), tmp_path / c) for i, c in enumerate("ab")}
    cohort = Cohort.from_folders(folders, {"a": 1.0, "b": 3.0})
    direct = Cohort.from_states(
        {c: lora_state(i) for i, c in enumerate("ab")}, {"a": 1.0, "b": 3.0}
    )
    assert torch.equal(cohort.updates, direct.updates)
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FedcoreError, match="client b"):
        Cohort.from_folders(folders)
    kept = Cohort.from_folders(folders, on_invalid="drop")
    assert kept.client_ids == ("a",)
    assert kept.dropped[0].client_id == "b"


def adapter_of_rank(rank, d_out=8, d_in=6):
    tensors = {
        "m.lora_A.weight": torch.randn(rank, d_in),
        "m.lora_B.weight": torch.randn(d_out, rank),
    }
    return AdapterState.from_peft(tensors, {"r": rank, "lora_alpha": rank})


def test_a_rank_that_no_product_can_have_is_refused_by_name(tmp_path):
    """One wide adapter would make every other row as wide."""
    folders = {
        name: write_adapter(adapter_of_rank(rank), tmp_path / name)
        for name, rank in (("a", 3), ("b", 20_000), ("c", 6))
    }
    message = (
        "round 0: client b: module m has rank 20000, its update has at most 6; train it with a "
        "rank that is no larger"
    )
    with pytest.raises(FedcoreError) as caught:
        Cohort.from_folders(folders)
    assert str(caught.value) == message
    cohort = Cohort.from_folders(folders, on_invalid="drop")
    assert cohort.client_ids == ("a", "c")
    assert max(slot.rows for slot in cohort.layout.factor_slots) == 6


@pytest.mark.parametrize("family", ["lora", "gram", "tri"])
def test_ranks_up_to_the_narrower_side_are_ordinary(family):
    narrow, wide = (family_layout(family, rank) for rank in (7, 13))
    states = [
        AdapterState.from_tensors(
            {
                f"{slot.module}.{family}_{slot.factor}.weight": tensor
                for slot in layout.factor_slots
                for tensor in [tensors_from_row(torch.ones(layout.size), layout)[slot.name]]
            }
        )
        for layout in (narrow, wide)
    ]
    assert rank_problem(states[0]) is None
    assert "module m0 has rank 13" in rank_problem(states[1])
