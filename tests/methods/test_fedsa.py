from dataclasses import replace

import pytest
import torch
from hypothesis import given

from fedcore.methods import create_method
from tests.property.lora_rounds import LoraRound, lora_rounds, make_lora_round

METHOD = create_method("fedsa")
SHAPES = ((33, 7), (64, 33), (7, 33), (3, 3))


def shared(case: LoraRound):
    """The round as its clients send it: of their rows, ``A`` alone."""
    part = METHOD.upload_layout(case.previous.layout, 1)
    updates = case.cohort.layout.gather(case.cohort.updates, part)
    return replace(case.cohort, layout=part, updates=updates)


@pytest.mark.parametrize("round", [0, 1, 7])
def test_uploads_hold_every_a_and_nothing_else(round):
    case = make_lora_round("random", [1.0], SHAPES, 3)
    layout = case.previous.layout
    sent = METHOD.upload_layout(layout, round)
    assert [slot.name for slot in sent] == [s.name for s in layout if s.factor == "A"]
    assert sent.numel == sum(3 * d_in for _, d_in in SHAPES)
    private = METHOD.private_layout(layout, round)
    assert {slot.name for slot in private} == {s.name for s in layout} - {s.name for s in sent}
    assert len(METHOD.frozen_layout(layout, round)) == 0
    assert METHOD.plan(round).keeps == {"B"}
    assert METHOD.read_layout(layout, round) == sent


@given(lora_rounds(kinds=("random", "near", "identical", "zero")))
def test_a_is_the_mean_and_the_rest_is_as_broadcast(case: LoraRound):
    cohort = shared(case)
    result = METHOD.aggregate(cohort, case.previous)
    layout = case.previous.layout
    for slot in layout:
        got = layout.view(result.row, slot)
        if slot.factor == "A":
            sent = cohort.layout.view(cohort.updates, cohort.layout.by_name[slot.name])
            expected = (cohort.shares[:, None, None] * sent).sum(0)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(got, layout.view(case.previous.row, slot))
    assert result.changed == cohort.layout
    assert result.flags == ()
    assert not result.personal


def test_clients_of_one_global_row_have_models_of_their_own():
    case = make_lora_round("random", [1.0, 2.0], SHAPES, 3)
    layout = case.previous.layout
    row = METHOD.aggregate(shared(case), case.previous).row
    private = METHOD.private_layout(layout, 1)
    models = [
        layout.scatter(row, private, layout.gather(own, private)) for own in case.cohort.updates
    ]
    for slot in layout:
        same = torch.equal(layout.view(models[0], slot), layout.view(models[1], slot))
        assert same == (slot.factor == "A")


def test_an_upload_that_holds_b_loses_it_and_is_flagged():
    case = make_lora_round("random", [1.0, 2.0], SHAPES, 3)
    clean = METHOD.aggregate(shared(case), case.previous)
    result = METHOD.aggregate(case.cohort, case.previous)
    assert torch.equal(result.row, clean.row)
    assert result.changed == clean.changed
    (flag,) = result.flags
    assert flag == "uploads held 5 tensors that are private, first m3.B: ignored"
