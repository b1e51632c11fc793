"""How an operation is registered with ``torch.library`` and how it is called.

An operation has one *implementation* on tensors: the checks that read values, then the body that
``dispatch`` chooses. Called eagerly without a gradient it runs as it is, since the boundary of
``torch.library`` costs some 25 to 60 microseconds per call. Under ``torch.compile``, and where a
gradient is recorded, the same implementation runs behind ``torch.ops.fedcore.<name>``: opaque to
the compiler, so that it reads values and the requested backend when the compiled code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcore_kernels.errors import KernelInputError

NAMESPACE = "fedcore"

Promise = tuple[Sequence[int | None], torch.dtype]
"""Shape and dtype of one result; ``None`` is a size that values decide, one per call."""


def _keep_tensors(context: Any, inputs: tuple[Any, ...], _output: Any) -> None:
    context.save_for_backward(*(a for a in inputs if a is None or isinstance(a, Tensor)))


def _requires_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


@dataclass(frozen=True)
class Gradient:
    """How an operation is differentiated.

    ``backward`` is itself made of differentiable operations, and calls ours as
    ``torch.ops.fedcore.<name>``, since it cannot see whether it is being compiled.

    Attributes:
        of: names of the arguments that have a gradient.
        backward: from a context and the gradients of the results, one gradient per argument.
        keep: what the context keeps of inputs and output; all tensors among the inputs by default.
    """

    of: tuple[str, ...]
    backward: Callable[..., tuple[Tensor | None, ...]]
    keep: Callable[[Any, tuple[Any, ...], Any], None] = _keep_tensors


def _no_backward(_context: Any, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise AssertionError("refused when it was called")


NO_GRADIENT = Gradient((), _no_backward)
"""For operations without a formula: an argument that requires a gradient is refused."""


@dataclass(frozen=True)
class _Operation:
    name: str
    implementation: Callable[..., Any]
    overload: Callable[..., Any]
    arguments: tuple[str, ...]
    gradient: Gradient

    def refuse_gradient(self, inputs: Sequence[Any]) -> None:
        for name, value in zip(self.arguments, inputs, strict=True):
            if name not in self.gradient.of and _requires_gradient(value):
                of = f" with respect to {name}" if self.gradient.of else ""
                raise KernelInputError(f"{self.name} has no gradient{of}; pass {name}.detach()")


_operations: dict[str, _Operation] = {}


def _keep_promise(results: Sequence[Tensor], promises: Sequence[Promise], inputs: Any) -> Any:
    """Results of the promised dtype, contiguous, sharing memory with nothing.

    A body may return views or one tensor twice, and a definition fp64; compiled code may not.
    """
    taken = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
    outputs = []
    for value, (shape, dtype) in zip(results, promises, strict=True):
        assert len(value.shape) == len(shape)
        assert all(n is None or n == m for n, m in zip(shape, value.shape, strict=True))
        output = value.to(dtype).contiguous()
        if output.untyped_storage().data_ptr() in taken:
            output = output.clone()
        taken.add(output.untyped_storage().data_ptr())
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def define(
    schema: str,
    implementation: Callable[..., Any],
    promise: Callable[..., list[Promise]],
    gradient: Gradient = NO_GRADIENT,
) -> None:
    """Register ``fedcore::<name>`` under ``schema``, for instance ``"polar(Tensor a) -> Tensor"``.

    Args:
        schema: name, arguments and results in the syntax of ``torch.library``; the first argument
            is a tensor, and results are made on its device.
        implementation: the operation on checked tensors; one tensor or a tuple of them.
        promise: shape and dtype of every result, from the same arguments without their values.
        gradient: how it is differentiated.
    """
    name = schema.partition("(")[0]

    def kernel(*inputs: Any) -> Any:
        result = implementation(*inputs)
        several = result if isinstance(result, tuple) else (result,)
        return _keep_promise(several, promise(*inputs), inputs)

    def fake(*inputs: Any) -> Any:
        promises = promise(*inputs)
        decided = None
        if any(n is None for shape, _ in promises for n in shape):
            decided = torch.library.get_ctx().new_dynamic_size()
        made = [
            inputs[0].new_empty([decided if n is None else n for n in shape], dtype=dtype)
            for shape, dtype in promises
        ]
        return made[0] if len(made) == 1 else tuple(made)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _operations[name].refuse_gradient(inputs)
        gradient.keep(ctx, inputs, output)

    made = torch.library.custom_op(
        f"{NAMESPACE}::{name}", kernel, mutates_args=(), schema=schema[len(name) :]
    )
    made.register_fake(fake)
    made.register_autograd(gradient.backward, setup_context=setup)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    arguments = tuple(argument.name for argument in overload._schema.arguments)
    _operations[name] = _Operation(name, implementation, overload, arguments, gradient)


def call(name: str, *inputs: Any) -> Any:
    """Run the operation ``name``: directly, or as ``torch.ops.fedcore.<name>`` where that counts.

    Raises:
        KernelInputError: an argument without a gradient requires one, in grad mode.
    """
    operation = _operations[name]
    recorded = torch.is_grad_enabled() and any(_requires_gradient(value) for value in inputs)
    if recorded:
        operation.refuse_gradient(inputs)
    if recorded or torch.compiler.is_compiling():
        return operation.overload(*inputs)
    return operation.implementation(*inputs)


def without_gradient(name: str, **inputs: Any) -> None:
    """Refuse arguments, or lists of them, that require a gradient, for a function of several calls.

    Raises:
        KernelInputError: in grad mode, naming the argument.
    """
    if not torch.is_grad_enabled():
        return
    for argument, value in inputs.items():
        values = {argument: value}
        if isinstance(value, list | tuple):
            values = {f"{argument}[{i}]": one for i, one in enumerate(value)}
        for title, one in values.items():
            if _requires_gradient(one):
                raise KernelInputError(f"{name} has no gradient; pass {title}.detach()")
