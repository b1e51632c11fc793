"""How much memory a step of training takes at its peak, without its memory and without computing.

The step runs on torch's fake tensors, which have shapes, types and devices and no numbers: forward,
backward and optimiser as they are, while every storage is counted from its first to its last
reference. So nothing is derived from a formula that a new architecture would break.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedcore.checks import count
from fedcore.errors import FedcoreError
from fedcore.training.evaluation import prediction_loss
from fedcore.training.models import quiet_transformers
from fedcore.training.optimisers import OptimiserSettings, build_optimiser
from fedcore.training.trainer_traces import model_as_before


@dataclass(frozen=True)
class StepMemory:
    """Bytes.

    Attributes:
        weights: of all parameters and buffers, in the types in which they are held.
        step: what a step allocates beside them at its peak: activations, logits, gradients,
            optimiser state.
    """

    weights: int
    step: int

    @property
    def total(self) -> int:
        """Both, without what the library that runs them takes for itself."""
        return self.weights + self.step


def step_memory(
    model: nn.Module,
    trained: Sequence[str],
    optimiser: OptimiserSettings,
    *,
    batch: int,
    length: int,
    checkpointing: bool = False,
    autocast: bool = False,
) -> StepMemory:
    """The memory of one step on ``batch`` texts of ``length`` tokens.

    The logits of all tokens are made at once; trl's fused head makes fewer of them, so it stays
    below.

    Args:
        model: a language model or classifier of transformers, with an adapter or without, on any
            device; nothing in it changes.
        trained: the names of the parameters that train.
        optimiser: how they train.
        checkpointing: activations are computed twice instead of kept.
        autocast: bf16 is computed in.

    Raises:
        FedcoreError: a parameter that the model does not have, or a model that cannot run without
            numbers, such as one of 4-bit weights.
    """
    count("", "batch", batch, least=1)
    count("", "length", length, least=2)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name in trained:
        if name not in parameters:
            raise FedcoreError(f"the model has no parameter {name!r}; pass names of its own")
    weights = sum(tensor.nbytes for tensor in (*parameters.values(), *buffers.values()))
    tensors = {**parameters, **buffers}
    device = next(iter(tensors.values())).device
    if device.type == "meta":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with model_as_before(model), quiet_transformers(), warnings.catch_warnings():
        # transformers deprecates the names by which peft and it switch checkpointing on.
        warnings.simplefilter("ignore", FutureWarning)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        if checkpointing:
            base: Any = getattr(model, "get_base_model", lambda: model)()
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.train()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                state = {
                    f"model.{name}": torch.empty(
                        tensor.shape, dtype=tensor.dtype, device=device
                    ).requires_grad_(name in trained)
                    for name, tensor in tensors.items()
                }
                ids = torch.zeros((batch, length), dtype=torch.int64, device=device)
                with _Storages() as storages:
                    leaves: Any = {name: state[f"model.{name}"] for name in trained}
                    steps = build_optimiser(leaves, frozenset(), optimiser)
                    functional_call(_Gradients(model, autocast=autocast), state, (ids,))
                    steps.step()
        # Layers of few bits and of custom kernels have nothing for tensors without numbers.
        except (NotImplementedError, RuntimeError, AssertionError) as error:
            raise FedcoreError(
                f"{type(model).__name__} cannot run without numbers, so its memory is not known: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
    return StepMemory(weights, storages.peak)


class _Gradients(nn.Module):
    """Forward and backward together: checkpointed layers run again within the latter."""

    def __init__(self, model: nn.Module, *, autocast: bool) -> None:
        super().__init__()
        self.model = model
        self._autocast = autocast

    def forward(self, ids: Tensor) -> None:
        # Whether a mask of two axes hides anything would be read off its numbers.
        square = (len(ids), 1, ids.shape[1], ids.shape[1])
        mask = torch.ones(square, dtype=torch.bool, device=ids.device)
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        loss = prediction_loss(logits, ids if logits.dim() == 3 else ids[:, 0])
        # The logits stay alive meanwhile, as they do in a training loop.
        loss.backward()


class _Storages(TorchDispatchMode):
    """Counts the bytes of storages that are made within it, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(s) for s in map(_storage, tree_leaves((args, kwargs or {}))) if s is not None}
        made = func(*args, **(kwargs or {}))
        for storage in map(_storage, tree_leaves(made)):
            if storage is not None and id(storage) not in given and storage not in self._seen:
                self._seen.add(storage)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return made

    def _freed(self, size: int) -> None:
        self._now -= size


def _storage(value: Any) -> Any:
    return value.untyped_storage() if isinstance(value, Tensor) else None
