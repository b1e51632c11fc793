"""Gradients of one example each, for everything that trains, through Opacus' hooks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedcore.errors import FedcoreError, missing_extra

_LARGEST_GAP = 1e-3
"""Relative distance up to which sums over examples count as the batch's gradient: fp32 rounding
stays below it, a layer whose examples Opacus cannot tell apart is above."""


class SampleGradients:
    """Per-sample gradients of ``parameters``; made by :func:`sample_gradients`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters

    def of(self, losses: Tensor) -> dict[str, Tensor]:
        """Name to the gradient of each of ``losses (n,)``: ``(n, *shape)``, fp32 or wider.

        Frees the graph of ``losses``, which must come from one forward pass of n examples within
        the context; the parameters' own gradients are empty before and after.

        Raises:
            FedcoreError: a parameter has no gradient for each example, or their sum is not the
                gradient of the batch, which Opacus does not notice by itself.
        """
        self.clear()
        with warnings.catch_warnings():
            # The first adapted layer's input is frozen, which is as it should be.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            losses.sum().backward()
        gradients = {name: self._checked(name, len(losses)) for name in self._parameters}
        self.clear()
        return gradients

    def clear(self) -> None:
        """Forget the gradients of the last pass, those of the batch as well."""
        for parameter in self._parameters.values():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]

    def _checked(self, name: str, examples: int) -> Tensor:
        parameter = self._parameters[name]
        gradients = getattr(parameter, "grad_sample", None)
        if not isinstance(gradients, Tensor) or gradients.shape != (examples, *parameter.shape):
            shape = tuple(gradients.shape) if isinstance(gradients, Tensor) else None
            raise FedcoreError(
                f"{name} has no gradient for each of {examples} examples (found {shape}), so its "
                "update cannot be made private; Opacus' hooks see modules that are called and own "
                "their parameters"
            )
        self._check_sum(name, gradients, parameter.grad)
        return gradients.to(torch.promote_types(gradients.dtype, torch.float32))

    @staticmethod
    def _check_sum(name: str, held: Tensor, batch: Tensor | None) -> None:
        total = held.sum(0)
        expected = torch.zeros_like(total) if batch is None else batch
        # Single gradients may cancel in the sum, so their size is what a gap is relative to.
        gap, size = float((total - expected).norm()), float(held.norm())
        if gap > _LARGEST_GAP * size:
            raise FedcoreError(
                f"the per-sample gradients of {name} do not add up to the batch's gradient (they "
                f"differ by {gap:.2g}, their norm is {size:.2g}), so clipping them would protect "
                "nothing; a weight that is used outside of the module that owns it does this"
            )


@contextmanager
def sample_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Iterator[SampleGradients]:
    """Within this context, backward passes through ``model`` leave per-sample gradients.

    The first dimension of what a layer sees is the example. The model is as it was on leaving,
    also after an error.

    Args:
        model: in training mode; adapters as parameters of modules that are called (PEFT's LoRA and
            fedcore's Gram and tri-factor layers are).
        parameters: exactly those of the model that require a gradient, by name.

    Raises:
        MissingExtraError: Opacus is not installed.
        FedcoreError: the model trains more or other parameters, or a layer with buffers of its own
            (batch normalisation), whose examples are not independent.
    """
    hooks_of = _hooks_class()
    _check_all_named(model, parameters)
    try:
        hooks = hooks_of(model, loss_reduction="sum", strict=True)
    except NotImplementedError as error:
        raise FedcoreError(f"the model has no per-sample gradients: {error}") from error
    gradients = SampleGradients(parameters)
    try:
        yield gradients
    finally:
        gradients.clear()
        hooks.cleanup()


def _check_all_named(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    named = {id(parameter) for parameter in parameters.values()}
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    for identity, name in trained.items():
        if identity not in named:
            raise FedcoreError(
                f"the model trains {name}, which is not among the parameters to be made private"
            )
    for name, parameter in parameters.items():
        if id(parameter) not in trained:
            raise FedcoreError(f"{name} does not train in this model")


def _hooks_class() -> Any:
    try:
        from opacus.grad_sample.grad_sample_module import GradSampleHooks
    except ImportError as error:
        raise missing_extra("opacus", "privacy") from error
    return GradSampleHooks
