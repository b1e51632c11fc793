"""A round's result is finite and no larger than its uploads explain, or the state stays."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import inf, isnan, nan, sqrt
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.low_rank import LowRank
from fedcore.errors import FedcoreError
from fedcore.federation.acceptance import Limits, capped_weights, norm
from fedcore.federation.server_round import OpenRound
from fedcore.federation.state import ServerState, read_state, write_state
from fedcore.methods import create_method
from fedcore.methods.base import Capabilities
from fedcore.methods.lora.fedit import FedIT
from tests.property.method_rounds import family_layout, random_row

LAYOUT = family_layout("lora")
START = random_row(LAYOUT, 0).float()
SITES = ("a", "b", "c")


@given(st.lists(st.floats(-1e300, 1e300), max_size=40), st.sampled_from([1.0, 1e-200, 1e150]))
def test_norms_are_those_of_exact_arithmetic(values, scale):
    row = torch.tensor(values, dtype=torch.float64) * scale
    row = row[row.isfinite()]
    largest = float(row.abs().max()) if row.numel() else 0.0
    expected = largest * sqrt(sum((v / largest) ** 2 for v in row.tolist())) if largest else 0.0
    assert norm(row) == pytest.approx(expected, rel=1e-12) or norm(row) == expected == inf


def test_norms_of_long_and_of_broken_rows():
    row = torch.full((600_001,), 3e38)
    assert norm(row) == pytest.approx(3e38 * sqrt(600_001), rel=1e-6)
    assert norm(torch.zeros(0)) == norm(torch.zeros(5)) == 0
    assert norm(torch.tensor([1.0, inf])) == inf
    assert isnan(norm(torch.tensor([1.0, nan])))


@given(
    st.lists(st.floats(1e-6, 1e15), min_size=1, max_size=8),
    st.floats(0.05, 1.0),
)
def test_capped_weights_have_no_larger_share_and_the_rest_stays(weights, share):
    given_ = torch.tensor(weights, dtype=torch.float64)
    lowered = capped_weights(given_, share)
    assert bool((lowered <= given_).all())
    assert bool((lowered > 0).all())
    reachable = max(share, 1 / len(weights))
    assert float((lowered / lowered.sum()).max()) <= reachable * (1 + 1e-9)
    # Who was lowered has the largest weight that is left.
    changed = lowered != given_
    assert bool((lowered[changed] == lowered.max()).all())
    if float((given_ / given_.sum()).max()) <= share * (1 - 1e-9):
        assert torch.equal(lowered, given_)
    elif len(weights) * share > 1 + 1e-9:
        assert float((lowered / lowered.sum()).max()) == pytest.approx(share, rel=1e-9)


@dataclass(frozen=True)
class Makes(FedIT):
    """A mean with its result replaced: what a rule would do that is wrong, or numerically lost."""

    what: str = ""
    name: ClassVar[str] = "makes"

    @property
    def capabilities(self):
        return Capabilities(linear=self.what.startswith("mean"), updates_base=True)

    def aggregate(self, cohort, previous):
        result = super().aggregate(cohort, previous)
        longest = torch.linalg.vector_norm(cohort.updates.double(), dim=1).max()
        before = torch.linalg.vector_norm(previous.row.double())
        unit = result.row / result.row.norm()
        most = float(longest), 10 * float(longest + before)
        part = LowRank(torch.zeros(1, 9), torch.ones(1, 7))
        match self.what:
            case "mean of the longest":
                return replace(result, row=unit * most[0])
            case "mean longer than all":
                return replace(result, row=unit * most[0] * 1.001)
            case "row of the longest":
                return replace(result, row=unit * most[1] * 0.999)
            case "row longer than all":
                return replace(result, row=unit * most[1] * 1.001)
            case "row inf" | "mean inf":
                return replace(result, row=result.row.clone().index_fill_(0, torch.tensor(3), inf))
            case "row nan":
                return replace(result, row=result.row * nan)
            case "residual":
                return replace(result, residual={"m0": part._replace(outer=part.outer + 1)})
            case "residual of rank 0":
                empty = LowRank(torch.zeros(0, 9), torch.zeros(0, 7))
                return replace(result, residual={"m0": empty})
            case "residual inf":
                return replace(result, residual={"m0": part._replace(outer=part.outer + inf)})
            case "residual longer than all":
                return replace(result, residual={"m0": part._replace(outer=part.outer + 1e6)})
            case "personal":
                return replace(result, personal={"b": cohort.updates[1]})
            case "personal nan":
                return replace(result, personal={"b": cohort.updates[1] * nan})
            case "personal longer than all":
                return replace(result, personal={"b": cohort.updates[1] * 100})
            case "no singular values":
                raise torch.linalg.LinAlgError("the data of site b: 42")
            case "division":
                raise ZeroDivisionError
        raise AssertionError(self.what)


ACCEPTED = [
    "mean of the longest",
    "row of the longest",
    "residual",
    "residual of rank 0",
    "personal",
]
REFUSED = {
    "mean longer than all": "the new state has norm .* explain at most",
    "row longer than all": "the new state has norm .* explain at most",
    "row inf": "the new state holds values that are not finite",
    "mean inf": "the new state holds values that are not finite",
    "row nan": "the new state holds values that are not finite",
    "residual inf": "the update of m0 holds values that are not finite",
    "residual longer than all": "the update of the base weights has norm",
    "personal nan": "the row of client b holds values that are not finite",
    "personal longer than all": "the row of client b has norm",
    "no singular values": r"it cannot be computed \(.*LinAlgError\)",
    "division": r"it cannot be computed \(ZeroDivisionError\)",
}


def opened(method, **options):
    state = ServerState(round=4, layout=LAYOUT, row=START, client_versions={"a": 2})
    round = OpenRound(method, state, SITES, **options)
    for n, site in enumerate(SITES, start=1):
        row = START + 0.1 * n * random_row(LAYOUT, n).float()
        round.receive(site, row, float(n), round=4, flags=["slow"] if n == 1 else ())
    return round


@pytest.mark.parametrize("what", ACCEPTED)
def test_what_the_uploads_explain_is_accepted(what):
    closed = opened(Makes(what=what)).close()
    assert closed.flags == ("a: slow",)
    assert torch.equal(closed.state.row, closed.result.row)
    assert not torch.equal(closed.state.row, START)


@pytest.mark.parametrize("what", REFUSED)
def test_what_they_do_not_explain_leaves_the_state_and_names_the_largest(what, tmp_path):
    closed = opened(Makes(what=what)).close()
    state = closed.state
    assert torch.equal(state.row, START)
    assert state.round == 5
    assert not state.residual
    assert not closed.result.personal
    assert not state.versions
    # They did report: what they hold is known.
    assert state.client_versions == dict.fromkeys(SITES, 3)
    first, flag = closed.flags
    assert first == "a: slow"
    assert flag.startswith("the result is not accepted, the state is kept: ")
    assert re.search(REFUSED[what], flag)
    assert re.search(r"; the largest uploads: c \(norm [\d.]+\), b \(norm [\d.]+\), a \(", flag)
    assert "42" not in flag
    assert state.record["flags"] == list(closed.flags)
    assert torch.equal(read_state(write_state(state, tmp_path)).row, START)


def test_the_bound_is_the_users():
    wide = opened(Makes(what="row longer than all"), limits=Limits(max_growth=20.0)).close()
    assert wide.flags == ("a: slow",)
    narrow = opened(Makes(what="row of the longest"), limits=Limits(max_growth=1.0)).close()
    assert len(narrow.flags) == 2
    # A mean needs no room to grow, and is given none.
    mean = opened(Makes(what="mean longer than all"), limits=Limits(max_growth=1e9)).close()
    assert len(mean.flags) == 2


def test_behind_noise_or_a_sum_only_finite_values_are_required():
    closed = opened(Makes(what="row longer than all")).close(compare_norms=False)
    assert closed.flags == ("a: slow",)
    closed = opened(Makes(what="row inf")).close(compare_norms=False)
    _, flag = closed.flags
    assert flag == (
        "the result is not accepted, the state is kept: the new state holds values that are not "
        "finite"
    )


def test_a_mean_that_came_as_a_sum_explains_itself():
    state = ServerState(round=0, layout=LAYOUT, row=START)
    round = OpenRound(create_method("fedit"), state, ())
    mean = random_row(LAYOUT, 3).float()
    assert torch.equal(round.close_on_mean(mean).state.row, mean)
    with pytest.raises(FedcoreError, match="the mean holds values that are not finite"):
        OpenRound(create_method("fedit"), state, ()).close_on_mean(mean * inf)


@pytest.mark.parametrize("method", ["rolora", "ffa"])
def test_clients_of_lower_rank_do_not_make_a_mean_too_long(method):
    """Rows that a client lacks stay as they were, which its own upload does not show."""
    chosen = create_method(method)
    state = ServerState(round=0, layout=LAYOUT, row=100 * START)
    round = OpenRound(chosen, state, ("a", "b"))
    ranks = dict.fromkeys(LAYOUT.modules, 1)
    for n, client in enumerate(("a", "b")):
        row = torch.zeros(round.layout.size)
        for slot in round.layout:
            rows = round.layout.view(row, slot)
            (rows if slot.dense else rows[:1]).fill_(1e-3 * (n + 1))
        round.receive(client, row, 1.0, ranks=ranks)
    closed = round.close()
    assert closed.flags == ()
    assert not torch.equal(closed.state.row, state.row)


def test_an_empty_round_is_no_growth():
    state = ServerState(round=0, layout=LAYOUT, row=START)
    closed = OpenRound(create_method("fedit"), state, SITES).close()
    assert closed.flags == ("no valid upload: the global state is kept",)


def test_shares_are_capped_before_anything_is_aggregated():
    capped = opened(create_method("fedit"), limits=Limits(largest_share=0.4)).close()
    weights = dict(zip(capped.cohort.client_ids, capped.cohort.weights.tolist(), strict=True))
    assert weights == {"a": 1.0, "b": 2.0, "c": pytest.approx(2.0)}
    assert capped.state.record["clients"] == weights
    assert capped.flags == (
        "a: slow",
        "c: its share of the weight is 0.5, above largest_share 0.4; it counts 0.4",
    )


@pytest.mark.parametrize("weight", [2.0**53 * 1.1, 1e308, 10**400])
def test_a_weight_that_cannot_be_a_count_is_refused(weight):
    state = ServerState(round=0, layout=LAYOUT, row=START)
    round = OpenRound(create_method("fedit"), state, ("a", "b"), on_invalid="drop")
    for client, own in (("a", 1.0), ("b", weight)):
        round.receive(client, START, own)
    (dropped,) = round.close().cohort.dropped
    assert dropped.client_id == "b"
    assert "more than 2**53" in dropped.reason


def test_statistics_that_nobody_asked_for_are_refused():
    state = ServerState(round=0, layout=LAYOUT, row=START)
    round = OpenRound(create_method("fedit"), state, ("a", "b"), on_invalid="drop")
    round.receive("a", START, 1.0)
    round.receive("b", START, 1.0, statistics={"weights": torch.ones(10**6)})
    closed = round.close()
    (dropped,) = closed.cohort.dropped
    assert (dropped.client_id, "fedit takes none" in dropped.reason) == ("b", True)
    assert not closed.state.held_for_clients


MIXTURE = {
    "weights": torch.ones(1),
    "means": torch.zeros(1, 4),
    "variances": torch.ones(1, 4),
    "classes": torch.zeros(1, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(2)}, "weights"),
        ({"means": torch.full((1, 4), nan)}, "a mean that is not finite"),
        ({"variances": torch.zeros(1, 4)}, "a variance of 0"),
        ({"classes": torch.zeros(1)}, "classes of dtype float32"),
        ({"classes": torch.tensor([7])}, "number them 0, 1"),
    ],
)
def test_malformed_statistics_are_their_clients_fault(change, message):
    layout = family_layout("tri")
    state = ServerState(round=0, layout=layout, row=random_row(layout, 0).float())
    method = create_method("ce_lora")
    round = OpenRound(method, state, ("a", "b", "c"), on_invalid="drop")
    for n, client in enumerate(("a", "b", "c")):
        row = round.layout.select("R", dense=False)
        sent = random_row(row, n).float()
        statistics = {**MIXTURE, **change} if client == "b" else MIXTURE
        round.receive(client, sent, 1.0, statistics=statistics)
    (dropped,) = round.close().cohort.dropped
    assert dropped.client_id == "b"
    assert message in dropped.reason
