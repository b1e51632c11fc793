import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.methods import Broadcast, create_method
from fedcore_kernels import align_and_average
from tests.property.adapters import lora_state

# Groups of A and of B that cut the modules differently: (a, b, c), (d) against (a, c), (b, d).
MODULES = (("a", 12, 10), ("b", 12, 7), ("c", 12, 10), ("d", 9, 7))
NAMES = tuple(name for name, _, _ in MODULES)
STRENGTHS = st.sampled_from((0.1, 0.4, 0.5, 0.6, 1.0))
REFERENCES = st.sampled_from(("alternate", "both"))


def row_of(seed, rank=3):
    state = lora_state(seed, rank, float(rank), modules=MODULES, dtype=torch.float64)
    return state.to_row(state.layout())


LAYOUT = lora_state(0, modules=MODULES, dtype=torch.float64).layout()
PREVIOUS = Broadcast(LAYOUT, row_of(1000))


def factor(row, module, name):
    return LAYOUT.view(row, LAYOUT.by_name[f"{module}.{name}"])


def product(row, module):
    return factor(row, module, "B").T @ factor(row, module, "A")


def rotation_of(sent, row, module):
    """``O`` of ``sent A = O^T A``: A has full row rank."""
    return (factor(sent, module, "A") @ torch.linalg.pinv(factor(row, module, "A"))).T


def turned(row, seed, determinant=1.0):
    """``row`` with every module in a random gauge."""
    random = torch.Generator().manual_seed(seed)
    out = row.clone()
    for module in NAMES:
        size = len(factor(row, module, "A"))
        turn = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64)).Q
        turn[:, 0] *= torch.linalg.det(turn).sign() * determinant
        for name in "AB":
            view = factor(out, module, name)
            view.copy_(turn @ view)
    return out


def sent(row, round, previous=PREVIOUS, **options):
    return create_method("fedrot", **options).prepare_upload(row, LAYOUT, previous, round)


def cohort_of(rows, weights, round=1):
    n = len(rows)
    return Cohort(
        layout=LAYOUT,
        updates=torch.stack(rows),
        weights=torch.tensor(weights, dtype=torch.float64),
        client_ids=tuple(f"c{i:03d}" for i in range(n)),
        round=round,
        ranks=torch.full((n, len(NAMES)), 3),
        scalings=torch.ones(n, len(NAMES), dtype=torch.float64),
    )


def distance(row, module, names, goal=PREVIOUS.row):
    return sum((factor(row, module, f) - factor(goal, module, f)).square().sum() for f in names)


@given(st.integers(0, 500), st.integers(1, 4), STRENGTHS, REFERENCES)
def test_a_turn_changes_the_factors_and_not_the_product(seed, round, strength, reference):
    row = row_of(seed)
    upload = sent(row, round, strength=strength, reference=reference).row
    for module in NAMES:
        before, after = product(row, module), product(upload, module)
        assert float((after - before).norm() / before.norm()) < 1e-12
        assert not torch.equal(factor(row, module, "A"), factor(upload, module, "A"))


@given(st.integers(0, 500), st.integers(1, 4), STRENGTHS, REFERENCES, st.sampled_from((1.0, -1.0)))
def test_turns_are_rotations_also_of_mirrored_clients(seed, round, strength, reference, mirror):
    row = turned(PREVIOUS.row, seed, mirror) + 0.1 * row_of(seed)
    upload = sent(row, round, strength=strength, reference=reference).row
    for module in NAMES:
        turn = rotation_of(upload, row, module)
        eye = torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(turn @ turn.T, eye, rtol=0, atol=1e-10)
        assert float(torch.linalg.det(turn)) == pytest.approx(1.0, abs=1e-10)
        # One rotation for both factors.
        torch.testing.assert_close(
            turn.T @ factor(row, module, "B"), factor(upload, module, "B"), rtol=0, atol=1e-10
        )


@given(st.integers(0, 500), st.integers(1, 4), STRENGTHS, REFERENCES)
def test_no_module_gets_further_from_its_reference(seed, round, strength, reference):
    method = create_method("fedrot", strength=strength, reference=reference)
    row = row_of(seed)
    upload = method.prepare_upload(row, LAYOUT, PREVIOUS, round).row
    for module in NAMES:
        names = method.references(round)
        assert distance(upload, module, names) <= distance(row, module, names) * (1 + 1e-12)


@pytest.mark.parametrize("round", [1, 2])
def test_a_full_turn_is_the_nearest_rotation_of_the_reference_factor(round):
    name = "A" if round == 1 else "B"
    upload = sent(row_of(5), round, strength=1.0).row
    for module in NAMES:
        cross = factor(upload, module, name) @ factor(PREVIOUS.row, module, name).T
        # At the maximum of <O, X> over rotations O^T X is symmetric, and any two of its
        # eigenvalues sum to something not negative.
        torch.testing.assert_close(cross, cross.T, rtol=0, atol=1e-10 * float(cross.norm()))
        values = torch.linalg.eigvalsh(cross)
        assert float(values[0] + values[1]) >= -1e-10 * float(cross.norm())


def test_odd_rounds_go_by_a_even_ones_by_b_and_the_first_by_none():
    alternate, both = create_method("fedrot"), create_method("fedrot", reference="both")
    assert [alternate.references(t) for t in range(5)] == [(), ("A",), ("B",), ("A",), ("B",)]
    assert [both.references(t) for t in range(3)] == [(), ("A", "B"), ("A", "B")]
    other = Broadcast(LAYOUT, row_of(2000))
    for round, decides in ((1, "A"), (2, "B"), (7, "A"), (8, "B")):
        mixed = PREVIOUS.row.clone()
        for module in NAMES:
            silent = "B" if decides == "A" else "A"
            factor(mixed, module, silent).copy_(factor(other.row, module, silent))
        one, two = (sent(row_of(3), round, goal) for goal in (PREVIOUS, Broadcast(LAYOUT, mixed)))
        assert torch.equal(one.row, two.row)
        assert not torch.equal(one.row, sent(row_of(3), round, other).row)


@pytest.mark.parametrize("options", [{"strength": 0}, {"strength": 0.0, "reference": "both"}])
@pytest.mark.parametrize("round", [0, 1, 2])
def test_strength_zero_is_fedit_to_the_bit(options, round):
    rows = [row_of(n) for n in range(3)]
    uploads = [sent(row, round, **options).row for row in rows]
    assert all(torch.equal(upload, row) for upload, row in zip(uploads, rows, strict=True))
    means = [
        create_method(name, **chosen).aggregate(cohort_of(those, [1.0, 2.0, 5.0]), PREVIOUS).row
        for name, chosen, those in (("fedrot", options, uploads), ("fedit", {}, rows))
    ]
    assert torch.equal(*means)


@pytest.mark.parametrize("reference", ["alternate", "both"])
def test_nothing_turns_in_round_zero_or_where_the_reference_is_zero(reference):
    row = row_of(4)
    assert torch.equal(sent(row, 0, strength=1.0, reference=reference).row, row)
    blank = PREVIOUS.row.clone()
    for module in NAMES:
        factor(blank, module, "B").zero_()
    upload = sent(row, 2, Broadcast(LAYOUT, blank), strength=1.0, reference=reference)
    assert torch.equal(upload.row, row) == (reference == "alternate")
    assert upload.flags == ()


@pytest.mark.parametrize(("round", "reference"), [(1, "alternate"), (2, "alternate"), (1, "both")])
def test_turned_copies_of_the_broadcast_average_to_it(round, reference):
    rows = [turned(PREVIOUS.row, seed) for seed in range(4)]
    method = create_method("fedrot", strength=1.0, reference=reference)
    uploads = [method.prepare_upload(row, LAYOUT, PREVIOUS, round).row for row in rows]
    weights = [1.0, 2.0, 3.0, 4.0]
    found = method.aggregate(cohort_of(uploads, weights, round), PREVIOUS).row
    torch.testing.assert_close(found, PREVIOUS.row, rtol=0, atol=1e-12)
    plain = create_method("fedit").aggregate(cohort_of(rows, weights, round), PREVIOUS).row
    assert float((plain - PREVIOUS.row).norm() / PREVIOUS.row.norm()) > 0.3


@given(st.integers(0, 500), st.integers(1, 2), REFERENCES)
def test_at_full_strength_a_client_s_own_rotation_does_not_matter(seed, round, reference):
    row = PREVIOUS.row + 0.3 * row_of(seed)
    options = {"strength": 1.0, "reference": reference}
    one, other = (sent(r, round, **options).row for r in (row, turned(row, seed)))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@given(st.integers(0, 200), st.integers(1, 2), STRENGTHS, REFERENCES)
def test_turned_uploads_and_plain_means_are_the_server_s_form(seed, round, strength, reference):
    method = create_method("fedrot", strength=strength, reference=reference)
    rows, weights = [row_of(seed + n) for n in range(3)], [3.0, 1.0, 0.5]
    uploads = [method.prepare_upload(row, LAYOUT, PREVIOUS, round).row for row in rows]
    found = method.aggregate(cohort_of(uploads, weights, round), PREVIOUS).row
    for module in NAMES:
        stacks = [torch.stack([factor(row, module, f)[None] for row in rows]) for f in "AB"]
        used = method.references(round)
        goals = [factor(PREVIOUS.row, module, f)[None] if f in used else None for f in "AB"]
        expected = align_and_average(stacks, goals, weights, strength).factors
        for f, mean in zip("AB", expected, strict=True):
            torch.testing.assert_close(factor(found, module, f), mean[0], rtol=0, atol=1e-12)
    assert torch.equal(
        LAYOUT.view(found, LAYOUT.by_name["classifier.weight"]),
        LAYOUT.view(
            create_method("fedit").aggregate(cohort_of(rows, weights), PREVIOUS).row,
            LAYOUT.by_name["classifier.weight"],
        ),
    )


def test_half_way_to_a_half_turn_the_module_stays_and_is_counted():
    row = PREVIOUS.row.clone()
    for module in ("b", "d"):
        for name in "AB":
            view = factor(row, module, name)
            view[:2] *= -1
    upload = sent(row, 1, strength=0.5)
    assert upload.flags == ("2 of 4 modules not rotated: half-way to a rotation by pi, first b",)
    torch.testing.assert_close(upload.row, row, rtol=0, atol=1e-12)
    almost = sent(row, 1, strength=0.6)
    assert almost.flags == ()
    torch.testing.assert_close(almost.row, PREVIOUS.row, rtol=0, atol=1e-12)


def test_what_went_in_and_the_dense_tensors_stay_what_they_were():
    row, before = row_of(6), row_of(6)
    goal = PREVIOUS.row.clone()
    upload = sent(row, 1, strength=1.0).row
    assert torch.equal(row, before)
    assert torch.equal(PREVIOUS.row, goal)
    for slot in LAYOUT.dense_slots:
        assert torch.equal(LAYOUT.view(upload, slot), LAYOUT.view(row, slot))
    padding = torch.ones_like(row)
    for slot in LAYOUT:
        LAYOUT.view(padding, slot).zero_()
    assert not (upload * padding).any()
    halves = sent(row.float(), 1, Broadcast(LAYOUT, goal.float()), strength=1.0).row
    assert halves.dtype == torch.float32
    torch.testing.assert_close(halves, upload.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("slot", ["b.A", "classifier.weight"])
def test_a_row_that_is_not_finite_is_left_for_the_server_to_refuse(value, slot):
    row = row_of(7)
    LAYOUT.view(row, LAYOUT.by_name[slot])[0, 1] = value
    assert torch.equal(sent(row, 1).row.nan_to_num(7.0), row.nan_to_num(7.0))


def test_mixed_ranks_are_refused_by_client_and_server():
    low = lora_state(0, 2, 2.0, modules=MODULES, dtype=torch.float64)
    method = create_method("fedrot")
    with pytest.raises(FedcoreError, match=r"d\.A of the upload is 2 x 9, .* broadcast 3 x 9"):
        method.prepare_upload(low.to_row(low.layout()), low.layout(), PREVIOUS, round=1)
    full = lora_state(1, modules=MODULES, dtype=torch.float64)
    cohort = Cohort.from_states({"low": low, "full": full})
    with pytest.raises(FedcoreError, match=r"client low has rank 2 .* fedrot needs equal ranks"):
        method.aggregate(cohort, PREVIOUS)
    part = lora_state(0, modules=MODULES[:2], dtype=torch.float64).layout()
    poor = Broadcast(part, torch.zeros(part.size))
    with pytest.raises(FedcoreError, match=r"d\.A of the upload is not in the broadcast"):
        method.prepare_upload(row_of(0), LAYOUT, poor, round=1)


def test_an_unknown_reference_gets_the_nearest_name():
    with pytest.raises(FedcoreError, match="unknown reference of fedrot 'bot'; did you mean both"):
        create_method("fedrot", reference="bot")
    assert create_method("FedRot-LoRA") == create_method("fedrot", strength=0.5)
