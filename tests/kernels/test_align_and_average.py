from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcore_kernels import KernelInputError, align_and_average, rotate, rotations, weighted_mean
from tests.property.pairs import Pair, make_pair, pairs
from tests.property.stacks import make_round
from tests.reference.tolerance import assert_close, relative_error

STRENGTHS = st.sampled_from((0.0, 0.1, 0.4, 0.5, 0.6, 1.0))
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def references(case: Pair, seed: int = 99) -> list[Tensor]:
    """Last round's factors: near the first client's, in another gauge."""
    random = torch.Generator().manual_seed(seed)
    modules, rank = case.left.shape[1:3]
    turn = torch.linalg.qr(torch.randn(modules, rank, rank, generator=random).double()).Q
    return [(turn @ stack[0].double()).to(stack.dtype) for stack in (case.left, case.right)]


def distances(stacks: list[Tensor], goals: list[Tensor]) -> Tensor:
    """``sum ||factor_n - reference||_F^2`` of every client and module, (N, L)."""
    pairs = zip(stacks, goals, strict=True)
    return sum(
        ((s.double() - g.double()).square().sum((-2, -1)) for s, g in pairs), torch.zeros(())
    )


def rotated_rounds(seed: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """References, the same turned for each client, and the turns."""
    goals = [make_round("random", 1, 2, 4, width, seed).previous for width in (30, 21)]
    random = torch.Generator().manual_seed(seed)
    turns = torch.linalg.qr(torch.randn(5, 2, 4, 4, generator=random).double()).Q
    turns[..., 0] *= torch.linalg.det(turns).sign()[..., None]
    return goals, [turns @ goal for goal in goals], turns


@given(pairs(dtypes=DTYPES), STRENGTHS, st.sampled_from(["both", "left", "right"]))
def test_factors_are_means_of_turned_factors(case: Pair, strength: float, used: str) -> None:
    stacks = [case.left, case.right]
    goals = [
        goal if used in ("both", name) else None
        for goal, name in zip(references(case), ("left", "right"), strict=True)
    ]
    found = align_and_average(stacks, goals, case.weights, strength)
    size = case.left.shape[2]
    gauge = found.rotations @ found.rotations.mT - torch.eye(size, dtype=torch.float64)
    assert gauge.abs().max() < 1e-13
    assert (torch.linalg.det(found.rotations) - 1).abs().max() < 1e-13
    for stack, mean in zip(stacks, found.factors, strict=True):
        turned = found.rotations.mT @ stack.double()
        expected = torch.einsum("n,nlrk->lrk", case.shares, turned)
        scale = 16 * torch.finfo(mean.dtype).eps * stack.double().abs().amax()
        assert ((mean.double() - expected).abs() <= scale * size).all()


@given(pairs(), STRENGTHS, st.sampled_from(["both", "left", "right"]))
def test_no_client_gets_further_from_the_references(case: Pair, strength: float, used: str) -> None:
    names = ("left", "right")
    goals = references(case)
    chosen = [i for i in range(2) if used in ("both", names[i])]
    stacks = [case.left, case.right]
    found = rotations(stacks, [goals[i] if i in chosen else None for i in range(2)], strength)
    before = distances([stacks[i] for i in chosen], [goals[i] for i in chosen])
    turned = [rotate(stacks[i], found.rotation) for i in chosen]
    after = distances(turned, [goals[i] for i in chosen])
    scale = sum(stacks[i].square().sum() + goals[i].square().sum() for i in chosen)
    assert (after <= before + 1e-13 * scale).all()


@given(pairs(), STRENGTHS)
def test_the_product_of_each_client_stays_what_it_was(case: Pair, strength: float) -> None:
    found = rotations([case.left, case.right], references(case), strength).rotation
    left, right = rotate(case.left, found), rotate(case.right, found)
    before = case.left.mT @ case.right
    scale = torch.linalg.matrix_norm(case.left).max() * torch.linalg.matrix_norm(case.right).max()
    assert (left.mT @ right - before).abs().max() <= 1e-12 * scale


@given(pairs())
def test_strength_zero_and_the_first_round_are_plain_means(case: Pair) -> None:
    stacks = [case.left, case.right]
    goals = references(case)
    variants = [
        align_and_average(stacks, goals, case.weights, 0.0),
        align_and_average(stacks, [None, None], case.weights, 0.5),
        align_and_average(stacks, [None, None], case.weights),
    ]
    size = case.left.shape[2]
    for found in variants:
        eye = torch.eye(size, dtype=torch.float64).expand_as(found.rotations)
        assert relative_error(found.rotations, eye) == 0
        assert not found.fallbacks.any()
        for stack, mean in zip(stacks, found.factors, strict=True):
            plain = weighted_mean(stack.flatten(1), case.weights).view_as(mean)
            assert_close(mean, plain, len(stack), condition=10)
    assert variants[1].rank.tolist() == [[0] * case.left.shape[1]] * len(case.left)


def test_turned_copies_of_the_references_average_to_them() -> None:
    goals, stacks, turns = rotated_rounds(0)
    for used in ([goals[0], None], [None, goals[1]], goals):
        found = align_and_average(stacks, used, [1, 2, 3, 4, 5])
        assert relative_error(found.rotations, turns) < 1e-12
        assert (found.rank == 4).all()
        for mean, goal in zip(found.factors, goals, strict=True):
            assert relative_error(mean, goal) < 1e-12
    plain = align_and_average(stacks, goals, [1, 2, 3, 4, 5], 0.0)
    assert relative_error(plain.factors[0], goals[0]) > 0.3


def test_noise_on_turned_copies_is_all_that_remains() -> None:
    goals, stacks, _ = rotated_rounds(1)
    random = torch.Generator().manual_seed(2)
    noisy = [s + 0.05 * torch.randn(s.shape, generator=random).double() for s in stacks]
    found = rotations(noisy, goals).rotation
    before = distances(noisy, goals)
    after = distances([rotate(stack, found) for stack in noisy], goals)
    assert (after < 0.05**2 * 4 * 51 * 1.5).all()
    assert (before > 50 * after).all()


def test_strength_moves_clients_monotonically_towards_the_references() -> None:
    case = make_pair("random", 6, 3, 4, (30, 21), seed=3)
    goals = references(case)
    steps = []
    for strength in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        turns = rotations([case.left, case.right], goals, strength).rotation
        steps.append(distances([rotate(case.left, turns), rotate(case.right, turns)], goals))
    gains = -torch.stack(steps).diff(dim=0)
    assert (gains > -1e-10).all()
    assert (gains.sum(0) > 0.1).all()


def test_using_both_factors_minimises_the_sum_of_their_distances() -> None:
    case = make_pair("random", 4, 2, 3, (30, 21), seed=4)
    stacks, goals = [case.left, case.right], references(case)
    one, other = (
        rotations(stacks, used, 1.0).rotation for used in ([goals[0], None], [None, goals[1]])
    )
    both = rotations(stacks, goals).rotation
    best = distances([rotate(stack, both) for stack in stacks], goals)
    for turns in (one, other):
        assert (best <= distances([rotate(stack, turns) for stack in stacks], goals) + 1e-10).all()
    assert relative_error(one, both) > 1e-3


def test_clients_turn_before_they_send_what_the_server_would_turn() -> None:
    case = make_pair("strided", 5, 3, 4, (30, 21), seed=5, dtype=torch.float32)
    stacks, goals = [case.left, case.right], references(case)
    server = align_and_average(stacks, goals, case.weights, 0.6)
    uploads = []
    for n in range(5):
        own = [stack[n : n + 1] for stack in stacks]
        turn = rotations(own, goals, 0.6).rotation
        uploads.append([rotate(factor, turn) for factor in own])
    for i, mean in enumerate(server.factors):
        sent = torch.cat([upload[i] for upload in uploads])
        assert sent.dtype == torch.float32
        assert_close(weighted_mean(sent.flatten(1), case.weights).view_as(mean), mean, 5)


def test_singular_interpolants_are_counted_by_module_and_not_turned() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    stack = torch.stack([torch.stack([-eye, eye]), torch.stack([eye, -eye])])
    stack = torch.cat([stack, torch.stack([-eye, eye])[None]])
    goal = torch.stack([eye, eye])
    found = align_and_average([stack], [goal], [1, 1, 2], 0.5)
    assert found.fallbacks.tolist() == [2, 1]
    assert torch.equal(found.rotations, eye.expand(3, 2, 2, 2))
    assert torch.allclose(found.factors[0], torch.stack([-0.5 * eye, 0.5 * eye]))
    hard = align_and_average([stack], [goal], [1, 1, 2])
    assert hard.fallbacks.tolist() == [0, 0]
    assert relative_error(hard.factors[0], goal) < 1e-14


def test_clients_of_lower_rank_are_turned_among_all_rows() -> None:
    case = make_pair("mixed_ranks", 4, 2, 4, (30, 21), seed=6)
    goals = references(make_pair("random", 4, 2, 4, (30, 21), seed=6))
    found = rotations([case.left, case.right], goals)
    assert found.rank[:, 0].tolist() == [1, 2, 3, 4]
    again = rotations([case.left, case.right], goals)
    assert torch.equal(found.rotation, again.rotation)
    with pytest.raises(KernelInputError, match=r"references\[0\] has shape \(2, 3, 30\); axis 1"):
        rotations([case.left], [goals[0][:, :3]])


def test_arguments_are_left_as_they_were() -> None:
    case = make_pair("rank_deficient", 3, 2, 3, (9, 8), seed=7)
    goals = references(case)
    given_stacks, given_goals = [case.left.clone(), case.right.clone()], [g.clone() for g in goals]
    align_and_average(given_stacks, given_goals, case.weights, 0.5)
    for one, other in zip(
        [*given_stacks, *given_goals], [case.left, case.right, *goals], strict=True
    ):
        assert torch.equal(one, other)


S, T, G = torch.ones(2, 3, 2, 8), torch.ones(2, 3, 2, 5), torch.ones(3, 2, 8)
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: rotations(S, [G]), "stacks is a Tensor; pass a list of arrays"),  # type: ignore[arg-type]
    (lambda: rotations([S], G), "references is a Tensor; pass a list of arrays"),  # type: ignore[arg-type]
    (lambda: rotations([], []), "stacks is empty; pass at least one stack"),
    (lambda: rotations([S, T], [G]), "references has 1 entries; pass 2, one per stack or None"),
    (
        lambda: rotations([S, T[:1]], [G, None]),
        r"stacks\[1\] .*axis 0 must be 2, the clients of st",
    ),
    (lambda: rotations([S, T[:, 1:]], [G, None]), r"stacks\[1\] .*axis 1 must be 3, the modules"),
    (lambda: rotations([S, T[:, :, 1:]], [G, None]), r"stacks\[1\] .*axis 2 must be 2, the rank"),
    (lambda: rotations([S, T.to("meta")], [G, None]), r"stacks\[1\] is on meta and stacks\[0\] on"),
    (lambda: rotations([S.int()], [G]), r"stacks\[0\] has dtype torch.int32"),
    (lambda: rotations([T], [G]), r"references\[0\] .*axis 2 must be 5, the width of its stack"),
    (lambda: rotations([S], [G[1:]]), r"references\[0\] .*axis 0 must be 3, the modules"),
    (lambda: rotations([S], [G.to("meta")]), r"references\[0\] is on meta and stacks\[0\] on cpu"),
    (lambda: rotations([S], [G], 1.5), r"strength is 1.5; pass a number in \[0, 1\]"),
    (lambda: align_and_average([S], [G], [1, 1], -0.5), "strength is -0.5"),
    (lambda: align_and_average([S], [G], [1, -1]), r"weights\[1\] is -1.0"),
    (lambda: align_and_average([S], [G], [1]), r"weights has shape \(1,\); pass \(2,\)"),
    (lambda: rotate(S, torch.ones(2, 3, 2, 3)), "rotations .*axis 3 must be 2, the rank of stack"),
    (lambda: rotate(S, torch.ones(1, 3, 2, 2)), "rotations .*axis 0 must be 2, the clients of"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        call()
