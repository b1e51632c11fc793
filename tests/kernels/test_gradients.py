"""Gradients of the operations that have one, and what happens where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fedcore_kernels import (
    FactorLayout,
    KernelInputError,
    align_and_average,
    apply_cores,
    block_grams,
    cross_gram,
    eigh_small,
    florg_round,
    gram,
    nystrom_step,
    polar,
    procrustes,
    product_gram,
    product_norm,
    product_svd,
    rotate,
    rotations,
    soft_rotation,
    svd_small,
    truncated_step,
    weighted_mean,
    whitened_basis,
    whitened_step,
    whitened_upload,
)
from tests.property.stacks import make_round
from tests.reference.library import GRADIENTS, public_calls
from tests.reference.tolerance import assert_close

RANDOM = torch.Generator().manual_seed(0)
WEIGHTS = torch.tensor([3.0, 0.0, 1.0])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RANDOM, dtype=torch.float64)


def reflected(p: int) -> Tensor:
    """A matrix whose nearest isometry is a reflection."""
    matrix = normal(p, p)
    return matrix if torch.linalg.det(matrix) < 0 else -matrix if p % 2 else matrix.flip(0)


FORMULAS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "weighted_mean": (lambda x: weighted_mean(x, WEIGHTS), (normal(3, 5),)),
    "weighted_mean of columns": (lambda x: weighted_mean(x.T, [1, 2]), (normal(5, 2),)),
    "gram": (gram, (normal(2, 2, 2, 3),)),
    "block_grams": (block_grams, (normal(2, 1, 2, 3),)),
    "gram with weights": (lambda x: gram(x, WEIGHTS), (normal(3, 2, 1, 4),)),
    "cross_gram": (cross_gram, (normal(2, 2, 2, 3), normal(2, 3, 3))),
    "apply_cores": (apply_cores, (normal(2, 3, 2, 2), normal(2, 2, 2, 3))),
    "polar, square": (lambda x: polar(x).factor, (normal(3, 3),)),
    "polar, tall": (lambda x: polar(x).factor, (normal(2, 4, 2),)),
    "polar, wide": (lambda x: polar(x).factor, (normal(2, 4),)),
    "polar of a row": (lambda x: polar(x).factor, (normal(1, 3),)),
    "polar, regularised": (lambda x: polar(x, None, 0.3).factor, (normal(2, 3, 3),)),
    "procrustes": (procrustes, (normal(3, 4), normal(3, 4))),
    "procrustes, reflected": (procrustes, (torch.eye(3).double(), reflected(3))),
    "procrustes, more rows": (procrustes, (normal(2, 4), normal(3, 4))),
    "procrustes, fewer rows": (procrustes, (normal(3, 4), normal(2, 4))),
    "procrustes, broadcast": (procrustes, (normal(2, 4), normal(2, 2, 4))),
    "rotation": (lambda s, t: procrustes(s, t, True), (normal(3, 3), normal(3, 3))),
    "rotation, reflected": (
        lambda s, t: procrustes(s, t, True),
        (torch.eye(3).double(), reflected(3)),
    ),
    "product_norm": (product_norm, (normal(2, 3, 5), normal(2, 3, 2))),
    "rotate": (rotate, (normal(2, 1, 2, 3), normal(2, 1, 2, 2))),
    "whitened_upload": (whitened_upload, (normal(2, 2, 5), normal(2, 3, 5))),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_agree_with_differences(name: str) -> None:
    function, given = FORMULAS[name]
    leaves = tuple(value.clone().requires_grad_() for value in given)
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_lower_precision_have_its_dtype_and_are_right(
    name: str, dtype: torch.dtype
) -> None:
    case = make_round("random", 3, 2, 2, 9, seed=3, dtype=dtype)
    function, arguments = public_calls(case)[name]
    grads: list[list[Tensor]] = []
    for cast in (dtype, torch.float64):
        leaves = [
            a.detach().to(cast).requires_grad_() if i in GRADIENTS[name] else a
            for i, a in enumerate(arguments)
        ]
        found = function(*leaves)
        found = found if isinstance(found, Tensor) else found[0]
        (found * torch.linspace(-1, 2, found.numel()).reshape(found.shape)).sum().backward()
        grads.append([leaves[i].grad for i in GRADIENTS[name]])
    for one, wide in zip(*grads, strict=True):
        assert one.dtype == dtype
        assert_close(one, wide, 9, condition=10)


def test_a_client_of_weight_zero_gets_no_gradient_and_the_rest_their_share() -> None:
    rows = torch.ones(3, 4, requires_grad=True)
    weighted_mean(rows, WEIGHTS).sum().backward()
    assert rows.grad.tolist() == [[0.75] * 4, [0.0] * 4, [0.25] * 4]


def test_a_result_of_another_dtype_passes_its_gradient_on() -> None:
    rows = torch.ones(2, 4, requires_grad=True)
    weighted_mean(rows, [1, 3], dtype=torch.float16).sum().backward()
    assert rows.grad[:, 0].tolist() == [0.25, 0.75]


def test_uploads_are_not_kept_for_the_gradient_of_their_mean() -> None:
    mean = weighted_mean(torch.ones(2, 4, requires_grad=True), [1, 3])
    saved = mean.grad_fn.saved_tensors
    assert [tuple(t.shape) for t in saved] == [(2,)]


SINGULAR = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)


def test_a_polar_factor_that_is_not_unique_has_no_gradient() -> None:
    for function in (lambda x: polar(x).factor, lambda x: procrustes(torch.eye(2).double(), x)):
        matrix = torch.stack([SINGULAR, torch.eye(2).double()]).requires_grad_()
        function(matrix)[:, 0, 1].sum().backward()
        assert matrix.grad[0].isnan().all()
        assert matrix.grad[1].tolist() == [[0.0, 0.5], [-0.5, 0.0]]


def test_a_rotation_is_unique_unless_two_reflections_are_equally_cheap() -> None:
    source = torch.eye(2).double()
    singular = SINGULAR.clone().requires_grad_()
    assert gradcheck(lambda x: procrustes(source, x, True), (singular,))
    reflection = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)).requires_grad_()
    procrustes(source, reflection, True)[0, 1].backward()
    assert reflection.grad.isnan().all()
    line = torch.tensor([[-3.0]], dtype=torch.float64, requires_grad=True)
    procrustes(torch.ones(1, 1).double(), line, True).backward()
    assert line.grad.item() == 0


def test_the_norm_of_a_zero_product_gets_the_least_subgradient() -> None:
    left = torch.tensor([[3.0, 0.0]], requires_grad=True)
    right = torch.zeros(1, 2, requires_grad=True)
    product_norm(left, right).backward()
    assert left.grad.tolist() == right.grad.tolist() == [[0.0, 0.0]]


def test_the_gradient_of_a_small_difference_keeps_its_digits() -> None:
    b, a, db = normal(4, 64), normal(4, 64), normal(4, 64)
    left = torch.cat([b + 1e-9 * db, -b]).requires_grad_()
    product_norm(left, torch.cat([a, a])).backward()
    difference = left.detach()[:4] + left.detach()[4:]
    expected = a @ (a.mT @ difference) / (difference.mT @ a).norm()
    assert_close(left.grad[:4], expected, condition=1e9)


REFUSED: list[tuple[str, Callable[[Tensor], Any], tuple[int, ...]]] = [
    ("eigh_small has no gradient; pass matrix", eigh_small, (2, 2)),
    ("svd_small has no gradient; pass matrix", svd_small, (2, 3)),
    (
        "nystrom_step has no gradient; pass stack",
        lambda x: nystrom_step(x, [1, 1], torch.ones(1, 1, 3)),
        (2, 1, 1, 3),
    ),
    (
        "nystrom_step has no gradient; pass previous",
        lambda x: nystrom_step(torch.ones(2, 1, 1, 3), [1, 1], x),
        (1, 1, 3),
    ),
    (
        "truncated_step has no gradient; pass stack",
        lambda x: truncated_step(x, [1, 1], None, 1, align=False),
        (2, 1, 1, 3),
    ),
    (
        "whitened_step has no gradient; pass total",
        lambda x: whitened_step(x, torch.ones(1, 1, 1), torch.ones(1, 1, 3)),
        (1, 1, 3),
    ),
    ("whitened_basis has no gradient; pass previous", whitened_basis, (1, 1, 3)),
    (
        "weighted_mean has no gradient with respect to weights; pass weights",
        lambda x: weighted_mean(torch.ones(2, 3), x),
        (2,),
    ),
    (
        "gram has no gradient with respect to weights; pass weights",
        lambda x: gram(torch.ones(2, 1, 1, 3), x),
        (2,),
    ),
    ("product_gram has no gradient; pass left", lambda x: product_gram(x, x), (2, 1, 1, 3)),
    (
        "product_svd has no gradient; pass right",
        lambda x: product_svd(torch.ones(2, 1, 1, 3), x, [1, 1]),
        (2, 1, 1, 4),
    ),
    ("soft_rotation has no gradient; pass matrix", soft_rotation, (2, 2)),
    (
        r"align_and_average has no gradient; pass stacks\[1\]",
        lambda x: align_and_average([torch.ones(2, 1, 1, 3), x], [None, None], [1, 1]),
        (2, 1, 1, 4),
    ),
    (
        r"rotations has no gradient; pass references\[0\]",
        lambda x: rotations([torch.ones(2, 1, 1, 3)], [x]),
        (1, 1, 3),
    ),
    (
        "florg_round has no gradient; pass updates",
        lambda x: florg_round(x, [1, 1], torch.ones(16), FactorLayout.build([("q", "A", 1, 16)])),
        (2, 16),
    ),
]


@pytest.mark.parametrize(("message", "function", "shape"), REFUSED)
def test_an_operation_without_a_gradient_says_so(
    message: str, function: Callable[[Tensor], Any], shape: tuple[int, ...]
) -> None:
    given = torch.ones(shape, requires_grad=True)
    with pytest.raises(KernelInputError, match=rf"^{message}\.detach\(\)$"):
        function(given)
    with torch.no_grad():
        function(given)
    function(given.detach())


def test_the_registered_operation_refuses_too() -> None:
    with pytest.raises(KernelInputError, match="eigh_small has no gradient"):
        torch.ops.fedcore.eigh_small(torch.eye(2, requires_grad=True))
