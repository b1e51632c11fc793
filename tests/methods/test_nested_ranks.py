"""Clients of lower rank under methods with one common factor: nothing shrinks, nothing is lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.cohort import CohortBuilder
from fedcore.errors import FedcoreError
from fedcore.federation.diagnostics import diagnose
from fedcore.methods import Broadcast, create_method
from fedcore.methods.shared.uploads import with_broadcast_rows
from fedcore_kernels.layout import FactorLayout

LAYOUT = FactorLayout.build(
    [("u", "A", 4, 7), ("u", "B", 4, 5), ("v", "A", 3, 3), ("v", "B", 3, 9)], [("head", (2, 3))]
)


def round_of(method, round, ranks, weights, seed=0):
    """A round in which client n holds the leading ``ranks[n]`` rows and moves what it trains."""
    generator = torch.Generator().manual_seed(seed)
    previous = Broadcast(LAYOUT, torch.zeros(LAYOUT.size, dtype=torch.float64))
    for slot in LAYOUT:
        view = LAYOUT.view(previous.row, slot)
        view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float64))
    sent = method.upload_layout(LAYOUT, round)
    ids = [f"c{n}" for n in range(len(ranks))]
    builder = CohortBuilder(sent, ids, round=round, dtype=torch.float64)
    for client, rank, weight in zip(ids, ranks, weights, strict=True):
        own = {"u": rank, "v": min(rank, 3)}
        start = method.for_client(previous, previous, [own["u"], own["v"]])
        row = LAYOUT.gather(start, sent)
        for slot in sent:
            view = sent.view(row, slot)
            step = torch.randn(view.shape, generator=generator, dtype=torch.float64)
            if not slot.dense:
                step[own[slot.module] :] = 0
            view += step
        builder.row(client).copy_(row)
        builder.receive(client, weight, ranks=own)
    return builder.finish(), previous


CASES = [("ffa", 0), ("ffa", 3), ("rolora", 0), ("rolora", 1)]


@pytest.mark.parametrize(("name", "round"), CASES)
@given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_the_model_moves_by_the_mean_of_the_clients_moves(name, round, ranks, seed):
    method = create_method(name)
    weights = [1.0 + n for n in range(len(ranks))]
    cohort, previous = round_of(method, round, ranks, weights, seed)
    shares = cohort.shares
    result = method.aggregate(cohort, previous)
    for slot in cohort.layout:
        old = LAYOUT.view(previous.row, slot if slot.dense else LAYOUT.by_name[slot.name])
        expected = old.clone()
        for n, rank in enumerate(ranks):
            kept = slice(None) if slot.dense else slice(min(rank, slot.rows))
            sent = cohort.layout.view(cohort.updates[n], slot)
            expected[kept] += shares[n] * (sent[kept] - old[kept])
        new = LAYOUT.view(result.row, LAYOUT.by_name[slot.name])
        torch.testing.assert_close(new, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "round"), CASES)
def test_rows_that_only_one_client_holds_do_not_fade(name, round):
    method = create_method(name)
    cohort, previous = round_of(method, round, [4, 1, 1, 1], [1.0] * 4)
    # Nobody moves: the broadcast stays, in the last row too, which one of four clients holds.
    still = CohortBuilder(cohort.layout, cohort.client_ids, round=round, dtype=torch.float64)
    for client, rank in zip(cohort.client_ids, [4, 1, 1, 1], strict=True):
        start = method.for_client(previous, previous, [rank, min(rank, 3)])
        still.row(client).copy_(LAYOUT.gather(start, cohort.layout))
        still.receive(client, 1.0, ranks={"u": rank, "v": min(rank, 3)})
    torch.testing.assert_close(
        method.aggregate(still.finish(), previous).row, previous.row, rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize(("name", "round"), CASES)
def test_the_mean_of_products_is_met_exactly(name, round):
    method = create_method(name)
    cohort, previous = round_of(method, round, [1, 2, 4], [3.0, 1.0, 2.0])
    result = method.aggregate(cohort, previous)
    found = diagnose(method.completed(cohort, previous), result, previous, "lora")
    assert max(d.aggregation_error for d in found) < 1e-14


def test_equal_ranks_are_left_alone_and_nothing_is_written_to():
    method = create_method("ffa")
    cohort, previous = round_of(method, 0, [4, 4], [1.0, 1.0])
    assert with_broadcast_rows(cohort, previous) is cohort
    mixed, previous = round_of(method, 0, [1, 4], [1.0, 1.0])
    before = mixed.updates.clone(), previous.row.clone()
    method.aggregate(mixed, previous)
    assert torch.equal(mixed.updates, before[0])
    assert torch.equal(previous.row, before[1])


@pytest.mark.parametrize("ranks", [[5, 3], [0, 3], [4], [4, 3, 1]])
def test_ranks_that_no_client_can_have_are_refused(ranks):
    previous = Broadcast(LAYOUT, torch.ones(LAYOUT.size))
    with pytest.raises(FedcoreError, match="ranks"):
        create_method("rolora").for_client(previous, previous, ranks)
