"""LoRA-SB's bases: the singular vectors of what the first step of full fine-tuning would do.

    G   = -learning_rate sign(sum over about 50 samples of grad_W loss)       (out, in), a module
    G  ~= U_r S_r V_r^T:    B = U_r,  A = V_r^T,  s R = diag(S_r)

The adapted model starts as the best rank-r version of that step. Who computes ``G`` is a decision
of the federation, since it is one dense matrix per module and a function of data:

* the server, on public or own data: only the bases are sent, ``r (in + out)`` once per client;
* the clients, by one secure sum of their gradients: ``in x out`` numbers per module and client,
  once, which the traffic of a comparison has to count (a thousand rounds of cores of rank 16 on a
  layer of 512 x 512).

Source: LoRA-SB, arXiv 2411.19557.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedcore.data.peft_keys import PREFIX
from fedcore.errors import FedcoreError
from fedcore.tuners.tri.layer import TriLayer
from fedcore.tuners.tri.start import TriFactors, check_rank, truncated_svd

LossOfBatch = Callable[[nn.Module], Tensor]


def sb_factors(statistic: Tensor, rank: int) -> TriFactors:
    """``A = V_r^T``, ``R = diag(S_r)``, ``B = U_r`` of ``statistic (out, in)``; fp32, for s = 1.

    ``B R A`` is the best approximation of rank r; both bases are orthonormal, also where the
    statistic has a lower rank.

    Raises:
        FedcoreError: the statistic is not a finite matrix, or ``rank`` is above ``min(out, in)``.

    Example:
        >>> A, R, B = sb_factors(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
        >>> (B @ R @ A).diagonal().tolist()
        [3.0, 2.0, 0.0]
    """
    return _factors(statistic, rank, "statistic")


@torch.no_grad()
def apply_sb(
    model: nn.Module, statistics: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Give every tri-factor layer of ``model`` its bases and core; all of them or, on error, none.

    The core takes the layer's scaling: ``R = diag(S_r) / s``. With ``s = 1`` (``lora_alpha = r``)
    training the core is gradient descent on the gradient projected between the bases.

    Args:
        model: carries ``adapter_name``, usually of ``init="sb"``.
        statistics: module path in the base model to ``(out, in)``, one for each adapted module.

    Raises:
        FedcoreError: naming the module that lacks a statistic, or the statistic that does not fit.
    """
    layers = _tri_layers(model, adapter_name)
    for module in statistics:
        if module not in layers:
            raise FedcoreError(f"statistics has module {module}, which carries no {adapter_name!r}")
    starts = {}
    for module, layer in layers.items():
        if module not in statistics:
            raise FedcoreError(f"statistics lacks module {module}")
        statistic, shape = statistics[module], (layer.out_features, layer.in_features)
        if tuple(statistic.shape) != shape:
            raise FedcoreError(
                f"the statistic of module {module} has shape {tuple(statistic.shape)}; "
                f"pass {shape} (out, in)"
            )
        factors = _factors(statistic, layer.r[adapter_name], f"the statistic of module {module}")
        starts[module] = factors._replace(R=factors.R / layer.scaling[adapter_name])
    for module, factors in starts.items():
        layers[module].set_factors(adapter_name, factors)


def first_step_statistics(
    model: nn.Module,
    loss_batches: Iterable[LossOfBatch],
    learning_rate: float,
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """``-learning_rate sign(sum of gradients)`` of every adapted weight, ``(out, in)``, fp32.

    The first step of Adam or of signed gradient descent with full fine-tuning. The gradients are
    those of the base model, with the tri-factor adapters out of the way and the modules' modes as
    they are; nothing of the model changes.

    Args:
        model: carries ``adapter_name`` on the modules to look at.
        loss_batches: functions of the model that give the summed loss of a batch; about 50 samples
            in all suffice. Called one after the other, so one batch is in memory at a time.
        learning_rate: the size of the step.

    Raises:
        FedcoreError: no batch, a learning rate that is not positive, a quantised weight, a merged
            adapter, a module that no loss depends on, or a gradient that is not finite.

    Cost: one pass forward and backward per batch, and one fp32 matrix of the weight's size per
    module.
    """
    if not (isfinite(learning_rate) and learning_rate > 0):
        raise FedcoreError(f"learning_rate is {learning_rate}; pass a positive number")
    layers = _tri_layers(model, adapter_name)
    weights = {module: _trainable_weight(layer, module) for module, layer in layers.items()}
    sums: dict[str, Tensor] = {}
    with _base_model(layers.values(), list(weights.values())):
        for loss in loss_batches:
            grads = torch.autograd.grad(loss(model), list(weights.values()), allow_unused=True)
            for module, gradient in zip(weights, grads, strict=True):
                if gradient is None:
                    raise FedcoreError(f"module {module} has no gradient; the loss ignores it")
                wide = gradient.to(torch.float32)
                sums[module] = sums[module] + wide if module in sums else wide
    if not sums:
        raise FedcoreError("loss_batches is empty; pass about 50 samples")
    for module, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise FedcoreError(f"the gradient of module {module} is not finite")
    return {
        module: -learning_rate * _upright(layers[module], total).sign()
        for module, total in sums.items()
    }


def _factors(statistic: Tensor, rank: int, name: str) -> TriFactors:
    if statistic.dim() != 2 or not bool(torch.isfinite(statistic).all()):
        raise FedcoreError(f"{name} has shape {tuple(statistic.shape)}; pass a finite matrix")
    check_rank(rank, (statistic.shape[0], statistic.shape[1]), name)
    u, s, vt = truncated_svd(statistic.detach().cpu(), rank)
    return TriFactors(vt.float(), torch.diag(s).float(), u.float())


def _tri_layers(model: nn.Module, adapter_name: str) -> dict[str, TriLayer]:
    layers = {
        name.removeprefix(PREFIX): layer
        for name, layer in model.named_modules()
        if isinstance(layer, TriLayer) and layer.carries(adapter_name)
    }
    if not layers:
        raise FedcoreError(f"the model has no tri-factor adapter {adapter_name!r}")
    return layers


def _trainable_weight(layer: TriLayer, module: str) -> nn.Parameter:
    if layer.merged:
        raise FedcoreError(f"module {module} has a merged adapter; unmerge it first")
    weight = layer.get_base_layer().weight
    if not isinstance(weight, nn.Parameter) or not weight.dtype.is_floating_point:
        raise FedcoreError(f"module {module} has a quantised weight, which has no gradient")
    return weight


def _upright(layer: TriLayer, weight: Tensor) -> Tensor:
    return weight.T.contiguous() if isinstance(layer.get_base_layer(), Conv1D) else weight


@contextmanager
def _base_model(layers: Iterable[TriLayer], weights: list[nn.Parameter]) -> Iterator[None]:
    """The tri-factor adapters out of the way, gradients on for ``weights``; put back on leaving."""
    before = [(layer, layer.disable_adapters) for layer in layers]
    flags = [weight.requires_grad for weight in weights]
    try:
        for layer, _ in before:
            layer._disable_adapters = True
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for layer, disabled in before:
            layer._disable_adapters = disabled
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
