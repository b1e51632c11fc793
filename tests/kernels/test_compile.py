"""Public functions inside ``torch.compile``: one graph, the eager result, errors when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcore_kernels import (
    FactorLayout,
    KernelInputError,
    backend,
    eigh_small,
    florg_round,
    gram,
    nystrom_step,
    svd_small,
    weighted_mean,
)
from fedcore_kernels import dispatch as table
from tests.property.stacks import make_round
from tests.reference.library import GRADIENTS, REPORT_NAN, public_calls

CASE = make_round("strided", 3, 2, 2, 9, 0, dtype=torch.float32)
CALLS = public_calls(CASE)


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_graph(function: Any, **options: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    parts = found.values() if isinstance(found, dict) else found
    return [tensor for part in parts for tensor in tensors(part)]


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_is_one_graph_with_the_eager_result(name: str) -> None:
    function, arguments = CALLS[name]
    assert_same(one_graph(function)(*arguments), function(*arguments))


@pytest.mark.parametrize("name", REPORT_NAN)
def test_is_one_graph_whose_shapes_may_change(name: str) -> None:
    """What ``opcheck`` looks at for the others."""
    function, arguments = CALLS[name]
    assert_same(one_graph(function, dynamic=True)(*arguments), function(*arguments))


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_eager_code(name: str) -> None:
    function, arguments = CALLS[name]
    grads = []
    for call in (function, one_graph(function)):
        leaves = [
            a.detach().clone().requires_grad_() if i in GRADIENTS[name] else a
            for i, a in enumerate(arguments)
        ]
        found = tensors(call(*leaves))[0]
        (found * torch.linspace(1, 2, found.numel()).reshape(found.shape)).sum().backward()
        grads.append([leaves[i].grad for i in GRADIENTS[name]])
    for one, other in zip(*grads, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["truncated", "sketched"])
def test_a_whole_round_is_one_graph(variant: Any) -> None:
    layout = FactorLayout.build(
        [("q", "A", 2, 16), ("v", "A", 2, 16), ("v", "B", 1, 20)], [("bias", (5,))]
    )
    random = torch.Generator().manual_seed(0)
    updates = torch.randn(3, layout.size, generator=random)
    previous = torch.randn(layout.size, generator=random)
    found = one_graph(florg_round)(updates, [1, 2, 3], previous, layout, variant)
    expected = florg_round(updates, [1, 2, 3], previous, layout, variant)
    assert list(found.steps) == list(expected.steps)
    assert_same(found, expected)
    for group, step in found.steps.items():
        assert torch.equal(step.factor, group.view(found.row))


def test_shapes_may_change() -> None:
    compiled = one_graph(gram, dynamic=True)
    for clients, width in ((2, 9), (3, 17), (5, 8)):
        case = make_round("random", clients, 2, 2, width, 0)
        assert_same(compiled(case.stack, case.weights), gram(case.stack, case.weights))


def test_values_are_checked_when_the_compiled_code_runs() -> None:
    compiled = one_graph(weighted_mean)
    rows = torch.ones(2, 4)
    assert compiled(rows, torch.tensor([1.0, 1.0])).tolist() == [1.0] * 4
    with pytest.raises(KernelInputError, match=r"weights\[1\] is -1.0; pass finite weights"):
        compiled(rows, torch.tensor([1.0, -1.0]))
    with pytest.raises(KernelInputError, match="weights are all zero"):
        compiled(rows, torch.zeros(2))
    step = one_graph(nystrom_step)
    with pytest.raises(KernelInputError, match=r"previous\[0\] is all zero"):
        step(CASE.stack, CASE.weights, 0 * CASE.previous)


def test_a_missing_gradient_is_refused() -> None:
    with pytest.raises(KernelInputError, match=r"eigh_small has no gradient; pass matrix.detach"):
        torch.compile(eigh_small, backend="aot_eager")(torch.eye(2, requires_grad=True))


def test_the_backend_is_the_one_asked_for_when_the_compiled_code_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The definition returns fp64; compiled code gets the dtype that it was promised."""
    bodies = {**table._bodies["weighted_mean"]}
    monkeypatch.setitem(table._bodies, "weighted_mean", bodies)
    table.register("weighted_mean", "reference", lambda u, s: u[0].double() + 7)
    rows = torch.zeros(2, 3)
    compiled = one_graph(weighted_mean)
    assert compiled(rows, [1, 1]).tolist() == [0.0] * 3
    with backend("reference"):
        found = compiled(rows, [1, 1])
        assert found.dtype == torch.float32
        assert found.tolist() == [7.0] * 3
    assert compiled(rows, [1, 1]).tolist() == [0.0] * 3


def test_a_backend_block_inside_holds_at_the_price_of_a_graph_break(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bodies = {**table._bodies["weighted_mean"]}
    monkeypatch.setitem(table._bodies, "weighted_mean", bodies)
    table.register("weighted_mean", "reference", lambda u, s: u[0] + 7)

    def both(rows: Tensor) -> Tensor:
        with backend("reference"):
            first = weighted_mean(rows, [1, 1])
        return first - weighted_mean(rows, [1, 1])

    assert torch.compile(both, backend="aot_eager")(torch.zeros(2, 3)).tolist() == [7.0] * 3


def test_generated_code_gives_the_eager_result() -> None:
    """The default compiler asserts sizes and strides, of views and of what operations return."""

    def product(stack: Tensor, weights: Tensor) -> Tensor:
        found: Tensor = gram(stack.transpose(0, 1), weights)
        return svd_small(found.mT).left

    stack = CASE.stack.transpose(0, 1)
    expected = product(stack, CASE.weights)
    assert_same(torch.compile(product, fullgraph=True)(stack, CASE.weights), expected)
