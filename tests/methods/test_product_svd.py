import json
from dataclasses import replace
from math import inf, isnan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedcore.data.adapter_state import AdapterState, adapter_from_row
from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.experiments.run import start
from fedcore.federation.diagnostics import diagnose
from fedcore.federation.state import latest_state, read_state
from fedcore.methods import Broadcast, create_method
from fedcore_kernels.layout import FactorLayout
from tests.experiments.jobs import tiny_recipe
from tests.property.lora_rounds import LoraRound, lora_rounds, make_lora_round
from tests.reference.updates import factors, mean_update, update

SHAPES = ((33, 7), (64, 33), (7, 33), (64, 33))
OPTIONS = ({"split": "left"}, {"split": "balanced"}, {"split": "balanced", "align": True})
EVERY = pytest.mark.parametrize("options", OPTIONS, ids=["left", "balanced", "aligned"])
KINDS = ("random", "near", "identical", "shared_a", "repeated_row", "mixed_ranks")


def method(**options):
    return create_method("product_svd", **options)


def tail(matrix, rank):
    return float(torch.linalg.svdvals(matrix)[rank:].norm())


def best(matrix, rank):
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ v[:rank]


@given(lora_rounds(), st.sampled_from(OPTIONS))
def test_it_is_the_truncated_svd_of_the_dense_mean(case: LoraRound, options):
    cohort, layout = case.cohort, case.cohort.layout
    result = method(**options).aggregate(cohort, case.previous)
    assert result.changed == layout
    for module in layout.modules:
        target = mean_update(cohort, module)
        got = update(layout, result.row, module)
        rank = layout.by_name[f"{module}.A"].rows
        values = torch.linalg.svdvals(target)
        size = float(values[0])
        assert abs(float((target - got).norm()) - tail(target, rank)) <= 1e-12 * size
        step = result.steps[module]
        kept = int((values > 1e-12 * size).sum()) if size > 0 else 0
        assert step.rank == min(kept, rank)
        if step.rank == 0:
            assert step.condition == inf
            continue
        # The row carries the leading singular values themselves.
        shown = torch.linalg.svdvals(got)[: step.rank]
        assert float((shown - values[: step.rank]).abs().max()) <= 1e-12 * size
        assert step.condition == pytest.approx(float(values[0] / values[step.rank - 1]), rel=1e-3)
        after = float(values[step.rank]) if step.rank < len(values) else 0.0
        last = float(values[step.rank - 1])
        assert step.gap == pytest.approx(1 - after / last, abs=1e-9 * size / last)
        if step.gap > 1e-3:
            assert float((got - best(target, rank)).norm()) <= 1e-11 * size / step.gap


@given(lora_rounds())
def test_dense_tensors_are_averaged_and_inputs_left_alone(case: LoraRound):
    before, held = case.cohort.updates.clone(), case.previous.row.clone()
    result = method().aggregate(case.cohort, case.previous)
    assert torch.equal(case.cohort.updates, before)
    assert torch.equal(case.previous.row, held)
    slot = case.cohort.layout.by_name["head"]
    heads = case.cohort.layout.view(case.cohort.updates, slot)
    expected = (case.cohort.shares[:, None, None] * heads).sum(0)
    torch.testing.assert_close(case.cohort.layout.view(result.row, slot), expected)


@given(lora_rounds())
def test_the_split_says_where_the_singular_values_are(case: LoraRound):
    layout = case.cohort.layout
    rows = {s: method(split=s).aggregate(case.cohort, case.previous) for s in ("left", "balanced")}
    for module in layout.modules:
        rank = rows["left"].steps[module].rank
        values = torch.linalg.svdvals(mean_update(case.cohort, module))[:rank]
        size = float(values[0]) if rank else 1.0
        missing = layout.by_name[f"{module}.A"].rows - rank
        padded = torch.nn.functional.pad(values, (0, missing))
        b, a = factors(layout, rows["left"].row, module)
        eye = torch.diag((padded > 0).double())
        assert float((a @ a.T - eye).abs().max()) < 1e-11
        assert float((b.T @ b - torch.diag(padded.square())).abs().max()) <= 1e-11 * size**2
        b, a = factors(layout, rows["balanced"].row, module)
        for gram in (a @ a.T, b.T @ b):
            assert float((gram - torch.diag(padded)).abs().max()) <= 1e-11 * size


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_another_basis_of_a_client_changes_nothing(kind, options):
    case = make_lora_round(kind, [1.0, 2.0, 0.5], SHAPES, 3)
    layout = case.cohort.layout
    turned = case.cohort.updates.clone()
    random = torch.Generator().manual_seed(5)
    for n in range(3):
        for module in layout.modules:
            turn = torch.randn(3, 3, generator=random, dtype=torch.float64)
            turn += 3 * torch.eye(3, dtype=torch.float64)
            b, a = (layout.view(turned[n], layout.by_name[f"{module}.{f}"]) for f in "BA")
            b.copy_(turn.T @ b)
            a.copy_(torch.linalg.solve(turn, a))
    one = method(**options).aggregate(case.cohort, case.previous)
    other = method(**options).aggregate(case.with_updates(turned), case.previous)
    for module in layout.modules:
        expected = update(layout, one.row, module)
        got = update(layout, other.row, module)
        assert float((got - expected).norm()) < 1e-12 * float(expected.norm())


@EVERY
@pytest.mark.parametrize(
    ("kind", "clients"), [("random", 1), ("identical", 5), ("shared_a", 4), ("mixed_ranks", 1)]
)
def test_a_mean_of_low_rank_is_met_exactly(kind, clients, options):
    case = make_lora_round(kind, [float(n + 1) for n in range(clients)], SHAPES, 3)
    result = method(**options).aggregate(case.cohort, case.previous)
    for found in diagnose(case.cohort, result, case.previous, "lora"):
        assert found.aggregation_error < 1e-13
        assert found.kept_rank == (1 if kind == "mixed_ranks" else 3)


def test_ranks_that_add_up_to_the_layouts_are_exact():
    """Clients of rank 1, 2, 3 leave a mean of rank 6."""
    case = make_lora_round("random", [1.0, 2.0, 3.0], SHAPES, 6)
    poor = case.cohort.updates.clone()
    for n in range(3):
        for slot in case.cohort.layout.factor_slots:
            case.cohort.layout.view(poor[n], slot)[n + 1 :] = 0
    cohort = replace(case.with_updates(poor), ranks=torch.tensor([[1], [2], [3]]).expand(3, 4))
    assert cohort.mixed_ranks
    result = method().aggregate(cohort, case.previous)
    for found in diagnose(cohort, result, case.previous, "lora"):
        assert found.aggregation_error < 1e-13
        assert found.kept_rank == 6
    with pytest.raises(FedcoreError, match="fedit needs equal ranks"):
        create_method("fedit").aggregate(cohort, case.previous)


@given(lora_rounds(kinds=KINDS), st.sampled_from(OPTIONS))
def test_the_diagnosis_is_the_tail(case: LoraRound, options):
    result = method(**options).aggregate(case.cohort, case.previous)
    for found in diagnose(case.cohort, result, case.previous, "lora"):
        target = mean_update(case.cohort, found.module)
        rank = case.cohort.layout.by_name[f"{found.module}.A"].rows
        expected = tail(target, rank) / float(target.norm())
        assert found.aggregation_error == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(lora_rounds(kinds=("random", "near", "shared_a", "repeated_row")))
def test_alignment_turns_towards_the_last_round_and_keeps_the_model(case: LoraRound):
    layout = case.cohort.layout
    plain = method(split="balanced").aggregate(case.cohort, case.previous).row
    turned = method(split="balanced", align=True).aggregate(case.cohort, case.previous).row
    for module in layout.modules:
        before = update(layout, plain, module)
        after = update(layout, turned, module)
        assert float((after - before).norm()) <= 1e-12 * float(before.norm())
        b_prev, a_prev = factors(layout, case.previous.row, module)
        b, a = factors(layout, turned, module)
        # No further turn helps: the overlap with the last round is symmetric and not negative.
        overlap = b.T @ b_prev + a @ a_prev.T
        size = float(overlap.norm())
        assert float((overlap - overlap.T).norm()) <= 1e-9 * size
        assert float(torch.linalg.eigvalsh(overlap).min()) >= -1e-9 * size
        gram = b.T @ b - a @ a.T
        assert float(gram.norm()) <= 1e-10 * float(before.norm())


@EVERY
@pytest.mark.parametrize("kind", ["random", "near", "mixed_ranks"])
def test_a_client_of_lower_rank_gets_the_best_of_its_rank(kind, options):
    case = make_lora_round(kind, [1.0, 2.0, 4.0], SHAPES, 4)
    layout, ranks = case.cohort.layout, [1, 2, 3, 4]
    chosen = method(**options)
    state = Broadcast(layout, chosen.aggregate(case.cohort, case.previous).row)
    got = chosen.for_client(state, case.previous, ranks)
    for module, rank in zip(layout.modules, ranks, strict=True):
        target = mean_update(case.cohort, module)
        error = float((target - update(layout, got, module)).norm())
        assert error == pytest.approx(tail(target, rank), rel=1e-12)
        b, a = factors(layout, got, module)
        assert not b[:, rank:].any()
        assert not a[rank:].any()
        if chosen.align:
            b_prev, a_prev = factors(layout, case.previous.row, module)
            overlap = (b.T @ b_prev + a @ a_prev.T)[:rank, :rank]
            assert float((overlap - overlap.T).norm()) <= 1e-9 * float(overlap.norm())
            assert float(torch.linalg.eigvalsh(overlap).min()) > 0
        else:
            # A plain cut of the broadcast does the same.
            b_all, a_all = factors(layout, state.row, module)
            cut = b_all[:, :rank] @ a_all[:rank]
            assert float((target - cut).norm()) == pytest.approx(tail(target, rank), rel=1e-12)


def test_cutting_an_aligned_factor_would_not_do():
    case = make_lora_round("random", [1.0, 2.0, 4.0], SHAPES, 4)
    row = method(split="balanced", align=True).aggregate(case.cohort, case.previous).row
    for module in case.cohort.layout.modules:
        target = mean_update(case.cohort, module)
        b, a = factors(case.cohort.layout, row, module)
        assert float((target - b[:, :2] @ a[:2]).norm()) > 1.01 * tail(target, 2)


def test_a_folder_of_lower_rank_takes_the_leading_rows():
    def adapter(seed, rank, alpha):
        random = torch.Generator().manual_seed(seed)
        tensors = {
            "base_model.model.q.lora_A.weight": torch.randn(rank, 33, generator=random).double(),
            "base_model.model.q.lora_B.weight": torch.randn(7, rank, generator=random).double(),
        }
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
        return AdapterState.from_peft(tensors, config)

    states = {"a": adapter(0, 2, 16), "b": adapter(1, 4, 3), "c": adapter(2, 3, 8)}
    cohort = Cohort.from_states(states, {"a": 1.0, "b": 2.0, "c": 1.5})
    previous = Broadcast(cohort.layout, torch.zeros(cohort.layout.size).double())
    result = method().aggregate(cohort, previous)
    target = sum(
        share * s.scaling["q"] * s.factors["q"]["B"] @ s.factors["q"]["A"]
        for share, s in zip((1 / 4.5, 2 / 4.5, 1.5 / 4.5), states.values(), strict=True)
    )
    for state in states.values():
        mine = adapter_from_row(result.row, cohort.layout, like=state)
        got = mine.scaling["q"] * mine.factors["q"]["B"] @ mine.factors["q"]["A"]
        error = float((target - got).norm())
        assert error == pytest.approx(tail(target, state.rank("q")), rel=1e-12)


@EVERY
def test_zero_products_give_zero_factors_and_say_so(options):
    case = make_lora_round("zero", [1.0, 2.0], SHAPES, 3)
    result = method(**options).aggregate(case.cohort, case.previous)
    layout = case.cohort.layout
    for module in layout.modules:
        b, a = factors(layout, result.row, module)
        assert not b.any()
        assert not a.any()
        assert result.steps[module].rank == 0
        assert result.steps[module].gap == 1.0
    assert result.flags == tuple(f"m{j}: rank 0 of 3 kept" for j in range(4))
    for found in diagnose(case.cohort, result, case.previous, "lora"):
        assert isnan(found.aggregation_error)
        assert found.factor_drift == pytest.approx(1.0)


@pytest.mark.parametrize("align", [False, True])
def test_lost_rank_is_flagged_and_comes_back_only_by_alignment(align):
    case = make_lora_round("repeated_row", [1.0], SHAPES, 3)
    result = method(split="balanced", align=align).aggregate(case.cohort, case.previous)
    assert set(result.flags) == {f"m{j}: rank 2 of 3 kept" for j in range(4)}
    for module in case.cohort.layout.modules:
        b, a = factors(case.cohort.layout, result.row, module)
        assert int(torch.linalg.matrix_rank(b @ a)) == 2
        dead = ~(b.any(0) | a.any(1))
        assert int(dead.sum()) == (0 if align else 1)


def test_more_rank_than_the_modules_have_is_padded_with_zeros():
    case = make_lora_round("random", [1.0, 2.0], ((7, 7), (7, 64)), 9)
    result = method().aggregate(case.cohort, case.previous)
    for module in case.cohort.layout.modules:
        target = mean_update(case.cohort, module)
        b, a = factors(case.cohort.layout, result.row, module)
        assert float((target - b @ a).norm()) < 1e-13 * float(target.norm())
        assert result.steps[module].rank == 7
        assert not a[7:].any()
        assert not b[:, 7:].any()


@EVERY
def test_modules_of_equal_shape_are_batched_and_do_not_mix(options):
    """Interleaved shapes: three modules share the group of A and two of them that of B."""
    case = make_lora_round("random", [1.0, 2.0, 3.0], SHAPES, 3)
    layout = case.cohort.layout
    whole = method(**options).aggregate(case.cohort, case.previous)
    for j, module in enumerate(layout.modules):
        own = [s for s in layout.factor_slots if s.module == module]
        part = FactorLayout.build([(s.module, s.factor, s.rows, s.width) for s in own])
        cohort = replace(
            case.cohort,
            layout=part,
            updates=layout.gather(case.cohort.updates, part),
            ranks=case.cohort.ranks[:, j : j + 1],
            scalings=case.cohort.scalings[:, j : j + 1],
        )
        previous = Broadcast(part, layout.gather(case.previous.row, part))
        alone = method(**options).aggregate(cohort, previous)
        torch.testing.assert_close(
            layout.gather(whole.row, part), alone.row, rtol=1e-11, atol=1e-11
        )
        got = whole.steps[module]
        assert got.rank == alone.steps[module].rank
        assert got.condition == pytest.approx(alone.steps[module].condition)
        assert got.gap == pytest.approx(alone.steps[module].gap)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return found


@EVERY
def test_no_matrix_of_the_size_of_a_weight_is_formed(options):
    case = make_lora_round("random", [1.0, 2.0, 3.0], ((900, 800),), 4, dtype=torch.float32)
    with Largest() as seen:
        result = method(**options).aggregate(case.cohort, case.previous)
        diagnose(case.cohort, result, case.previous, "lora")
    # The upload matrix is the largest thing there is.
    assert seen.numel <= case.cohort.updates.numel() * 4 // 3 < 900 * 800 / 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "lef"}, "unknown split of product_svd 'lef'; did you mean left"),
        ({"split": None}, "unknown split of product_svd 'None'; valid: balanced, left"),
        ({"align": True}, "align is true with split 'left'.*pass split='balanced'"),
        ({"align": "yes"}, "align is 'yes'; pass true or false"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(FedcoreError, match=message) as caught:
        method(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([1, 2], "ranks has 2 entries; pass one for each of"),
        ([1, 1, 0, 1], "ranks asks for 0 in m2; pass 1 to 3"),
        ([1, 1, 1, 4], "ranks asks for 4 in m3; pass 1 to 3"),
    ],
)
def test_ranks_that_no_client_can_have_are_refused(ranks, message):
    case = make_lora_round("random", [1.0], SHAPES, 3)
    with pytest.raises(FedcoreError, match=message):
        method().for_client(case.previous, case.previous, ranks)


def test_one_round_of_a_run_loses_less_than_any_other_rule(tmp_path):
    """Round 0 has the same uploads under every method that sends both factors."""
    errors = {}
    for name in ("product_svd", "fedit"):
        settings = {"method.name": name, "rounds": 1, "training.steps": 4, "clients": 3}
        start(tiny_recipe(tmp_path / "home", **settings), tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        errors[name] = json.loads(lines[-1])["modules"]
    for ours, theirs in zip(errors["product_svd"], errors["fedit"], strict=True):
        assert 0 < ours["aggregation_error"] < theirs["aggregation_error"]
        assert ours["kept_rank"] == 2
        assert ours["condition"] > 1
    state = read_state(latest_state(tmp_path / "product_svd" / "state"))
    for module in state.layout.modules:
        _, a = factors(state.layout, state.row, module)
        torch.testing.assert_close(a @ a.T, torch.eye(2).double(), rtol=0, atol=1e-6)
