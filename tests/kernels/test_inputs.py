"""Every bad argument is named, with what came and what to pass, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedcore_kernels import (
    FactorLayout,
    KernelInputError,
    apply_cores,
    cross_gram,
    eigh_small,
    florg_round,
    gram,
    nystrom_step,
    polar,
    procrustes,
    product_norm,
    svd_small,
    truncated_step,
    weighted_mean,
)

STACK = torch.ones(2, 3, 2, 8)
PREVIOUS = torch.ones(3, 2, 8)
META = torch.ones(3, 2, 8, device="meta")
LAYOUT = FactorLayout.build([("q", "A", 2, 16)])

WEIGHT_USERS: dict[str, Callable[[Any], Any]] = {
    "weighted_mean": lambda w: weighted_mean(torch.ones(2, 4), w),
    "gram": lambda w: gram(STACK, w),
    "nystrom_step": lambda w: nystrom_step(STACK, w, PREVIOUS),
    "truncated_step": lambda w: truncated_step(STACK, w, PREVIOUS, 2),
    "florg_round": lambda w: florg_round(torch.ones(2, 32), w, torch.ones(32), LAYOUT),
}

BAD_WEIGHTS = [
    ([1.0, float("nan")], r"weights\[1\] is nan; pass finite weights"),
    ([-1.0, 2.0], r"weights\[0\] is -1.0"),
    ([1.0, float("inf")], r"weights\[1\] is inf"),
    ([0, 0], "weights are all zero; pass at least one positive"),
    ([1.0], r"weights has shape \(1,\); pass \(2,\)"),
    ([[1.0, 1.0]], r"weights has shape \(1, 2\); pass \(2,\)"),
    (torch.ones(2, dtype=torch.complex64), "weights has dtype torch.complex64"),
    (torch.tensor([True, True]), "weights has dtype torch.bool"),
]


@pytest.mark.parametrize("op", WEIGHT_USERS)
@pytest.mark.parametrize(("weights", "message"), BAD_WEIGHTS)
def test_unusable_weights(op: str, weights: Any, message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        WEIGHT_USERS[op](weights)


CALLS: list[tuple[Callable[[], Any], str]] = [
    (lambda: weighted_mean(torch.ones(4), [1]), r"updates has shape \(4,\); pass \(N, P\)"),
    (lambda: weighted_mean(torch.ones(0, 4), []), r"updates has shape \(0, 4\): N is 0"),
    (lambda: weighted_mean(torch.ones(2, 4).int(), [1, 1]), "updates has dtype torch.int32"),
    (lambda: weighted_mean(torch.ones(2, 4) * 1j, [1, 1]), "updates has dtype torch.complex64"),
    (lambda: weighted_mean(STACK[0, 0], [1, 1], dtype=torch.int8), "dtype is torch.int8"),
    (lambda: gram(STACK[0]), r"stack has shape \(3, 2, 8\); pass \(N, L, r, k\)"),
    (lambda: gram(STACK[:, :, :0]), r"stack has shape \(2, 3, 0, 8\): r is 0"),
    (lambda: cross_gram(STACK, PREVIOUS[..., :7]), r"reference .*axis 2 must be 8, the width"),
    (lambda: cross_gram(STACK, PREVIOUS[:2]), r"reference .*axis 0 must be 3, the modules"),
    (lambda: cross_gram(STACK, META), "reference is on meta and stack on cpu"),
    (lambda: apply_cores(torch.ones(3, 2, 1, 2), STACK), r"cores .*axis 2 must be 2, the cli"),
    (lambda: apply_cores(torch.ones(3, 2, 2, 1), STACK), r"cores .*axis 3 must be 2, the rank"),
    (lambda: eigh_small(torch.ones(2, 3)), r"matrix has shape \(2, 3\); axis -1 must be 2"),
    (lambda: svd_small(torch.ones(3)), r"matrix has shape \(3,\); pass \(\.\.\., p, q\)"),
    (lambda: polar(torch.ones(2, 2), cutoff=1.0), r"cutoff is 1.0; pass a number in \[0, 1\)"),
    (lambda: polar(torch.ones(2, 2), cutoff=float("nan")), "cutoff is nan"),
    (lambda: polar(torch.ones(2, 3), regularisation=0.1), r"matrix .*to be regularised"),
    (lambda: polar(torch.ones(2, 2), regularisation=-1.0), "regularisation is -1.0"),
    (lambda: procrustes(torch.ones(2, 3), torch.ones(2, 4)), r"target .*axis -1 must be 3"),
    (lambda: product_norm(torch.ones(2, 3), torch.ones(3, 3)), r"right .*axis -2 must be 2"),
    (lambda: nystrom_step(STACK, [1, 1], 0 * PREVIOUS), r"previous\[0\] is all zero"),
    (lambda: truncated_step(STACK, [1, 1], 0 * PREVIOUS, 2), r"previous\[0\] is all zero"),
    (lambda: nystrom_step(STACK, [1, 1], PREVIOUS, 1.5), "eps_rel is 1.5; pass a number in"),
    (lambda: nystrom_step(STACK, [1, 1], META), "previous is on meta and stack on cpu"),
    (
        lambda: florg_round(torch.ones(2, 31), [1, 1], torch.ones(32), LAYOUT),
        r"updates has shape \(2, 31\); its last axis must be 32",
    ),
    (
        lambda: florg_round(torch.ones(2, 32), [1, 1], torch.ones(16), LAYOUT),
        r"previous has shape \(16,\); its last axis must be 32",
    ),
    (
        lambda: florg_round(torch.ones(2, 32), [1, 1], torch.ones(32), LAYOUT, "exact"),  # type: ignore[arg-type]
        "variant is 'exact'; pass 'truncated' or 'sketched'",
    ),
]


@pytest.mark.parametrize(("call", "message"), CALLS)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        call()


def test_previous_of_one_zero_module_is_named_by_its_index() -> None:
    previous = PREVIOUS.clone()
    previous[2] = 0
    with pytest.raises(KernelInputError, match=r"previous\[2\] is all zero and fixes no gauge"):
        nystrom_step(STACK, [1, 1], previous)
