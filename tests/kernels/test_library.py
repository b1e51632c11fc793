"""The operations behind ``torch.library``: what is promised there, and who goes through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedcore_kernels import dispatch, weighted_mean
from fedcore_kernels.library import operation
from tests.property.stacks import Round, make_round
from tests.reference.library import GRADIENTS, REPORT_NAN, op_arguments, public_calls

CASES = {
    "fp64": ("zero_weight", 3, 2, 2, 16, torch.float64),
    "bf16, rank one": ("random", 3, 2, 1, 33, torch.bfloat16),
    "fp32, strided": ("strided", 2, 3, 2, 7, torch.float32),
    "fp32, one client": ("random", 1, 1, 3, 5, torch.float32),
}

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
TRACED = "test_aot_dispatch_dynamic"
OPS = sorted(op_arguments(make_round("random", 2, 1, 1, 5, 0)))


def round_of(case: str) -> Round:
    kind, clients, modules, rank, width, dtype = CASES[case]
    return make_round(kind, clients, modules, rank, width, 0, dtype=dtype)


def registered(op: str) -> Any:
    return getattr(torch.ops.fedcore, op).default


def tensors(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def test_every_operation_of_the_dispatcher_is_registered_and_tested() -> None:
    """``florg_round`` takes a layout: the compiler sees the operations that it is made of."""
    assert set(dispatch._bodies) - set(operation._operations) == {"florg_round"}
    assert sorted(operation._operations) == OPS


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, case: str) -> None:
    arguments = op_arguments(round_of(case))[op]
    # That check takes NaN for a difference; test_compile.py compares traced results of these.
    checks = CHECKS if op in REPORT_NAN else (*CHECKS, TRACED)
    torch.library.opcheck(registered(op), arguments, test_utils=checks)


@pytest.mark.parametrize("case", ["fp64", "fp32, strided"])
@pytest.mark.parametrize("op", GRADIENTS)
def test_opcheck_where_a_gradient_is_recorded(op: str, case: str) -> None:
    arguments = list(op_arguments(round_of(case))[op])
    for position in GRADIENTS[op]:
        arguments[position] = arguments[position].detach().requires_grad_()
    torch.library.opcheck(registered(op), tuple(arguments))


@pytest.mark.parametrize("case", CASES)
def test_the_registered_operation_gives_what_the_function_gives(case: str) -> None:
    calls = public_calls(round_of(case))
    for op, given in op_arguments(round_of(case)).items():
        if op == "client_shares":
            continue
        function, arguments = calls[op]
        pairs = zip(tensors(registered(op)(*given)), tensors(function(*arguments)), strict=True)
        for one, other in pairs:
            assert one.dtype == other.dtype
            assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1)), op


class _Entered(TorchDispatchMode):
    """The operations of our namespace that were called while it was active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fedcore":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_eager_calls_without_a_gradient_do_not_enter_the_library() -> None:
    for name, (function, arguments) in public_calls(round_of("fp64")).items():
        with _Entered() as entered:
            function(*arguments)
        assert entered.names == [], name


def test_calls_that_record_a_gradient_do() -> None:
    calls = public_calls(round_of("fp64"))
    for name, positions in GRADIENTS.items():
        function, given = calls[name]
        arguments = list(given)
        arguments[positions[0]] = arguments[positions[0]].detach().requires_grad_()
        with torch.no_grad(), _Entered() as entered:
            function(*arguments)
        assert entered.names == []
        with _Entered() as entered:
            function(*arguments)
        assert entered.names == [f"{name}.default"]


def test_results_that_share_memory_are_set_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body may return a view of its argument, or one tensor twice; compiled code may not."""
    monkeypatch.setattr(dispatch, "_bodies", {op: {} for op in dispatch._bodies})
    dispatch.register("weighted_mean", "torch", lambda updates, shares: updates[0])
    dispatch.register("eigh_small", "torch", lambda matrix: (matrix[:, 0], matrix.T.double()))
    rows = torch.arange(6.0).reshape(2, 3)
    found = torch.ops.fedcore.weighted_mean(rows, torch.ones(2))
    assert weighted_mean(rows, [1, 1]).data_ptr() == rows.data_ptr() != found.data_ptr()
    assert torch.equal(found, rows[0])
    square = torch.arange(9.0).reshape(3, 3)
    values, vectors = torch.ops.fedcore.eigh_small(square)
    assert values.tolist() == [0.0, 3.0, 6.0]
    assert vectors.dtype == torch.float32
    assert torch.equal(vectors, square.T)
    assert vectors.is_contiguous()


def test_shapes_are_known_without_values() -> None:
    """On the meta device nothing is computed, so a wrong shape there is a wrong promise."""
    case = round_of("fp32, strided")
    for op, arguments in op_arguments(case).items():
        bare = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
        promised, found = registered(op)(*bare), registered(op)(*arguments)
        for one, other in zip(tensors(promised), tensors(found), strict=True):
            assert (one.shape, one.dtype, one.stride()) == (
                other.shape,
                other.dtype,
                other.stride(),
            )


def test_a_size_that_values_decide_is_the_same_in_all_results() -> None:
    case = make_round("duplicates", 3, 2, 2, 9, 0)
    arguments = (case.stack, case.stack, case.weights, 6, 0.999, False, 1e-12)
    found = registered("product_svd")(*arguments)
    assert found[0].shape == found[2].shape == (2, 2, 9)
    compiled = torch.compile(registered("product_svd"), fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*arguments), found, strict=True):
        assert torch.equal(one, other)
    torch.library.opcheck(registered("product_svd"), arguments)
