"""From example indices to logits, through the plain model or its cached frozen prefix."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fedcore.training.encoding import EncodedDataset
from fedcore.training.prefix import FrozenPrefix


class Forward:
    """Logits of a model for examples of one data set.

    Where adapters sit only in the last layers, the states that leave the frozen prefix are computed
    once per example and fed in; the prefix is in eval mode either way, so the result is the same.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: EncodedDataset,
        prefix: FrozenPrefix | None = None,
        states: Tensor | None = None,
    ) -> None:
        self._model = model
        self._examples = examples
        self._prefix = prefix
        self._states = states
        self._device = next(model.parameters()).device

    def __call__(self, batch: Tensor) -> Tensor:
        """Logits for the example indices ``batch``.

        ``(len(batch), classes)`` of a classifier; ``(len(batch), T, vocabulary)`` of a language
        model.
        """
        inputs = {
            "input_ids": self._examples.input_ids[batch].to(self._device),
            "attention_mask": self._examples.attention_mask[batch].to(self._device),
        }
        if self._prefix is not None and self._states is not None:
            with self._prefix.reuse():
                self._prefix.feed(self._states[batch].to(self._device))
                logits: Tensor = self._model(**inputs).logits
                return logits
        plain: Tensor = self._model(**inputs).logits
        return plain

    @property
    def reuses_prefix(self) -> bool:
        """Whether the frozen prefix is read from the cache."""
        return self._prefix is not None and self._states is not None

    def train(self) -> None:
        """Training mode for the layers that train; the frozen prefix stays in eval mode."""
        self._model.train()
        if self._prefix is not None:
            self._prefix.eval_prefix()

    def eval(self) -> None:
        """Evaluation mode everywhere."""
        self._model.eval()

    def autocast(self) -> AbstractContextManager[None]:
        """bf16 autocast on the model's device."""
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def random_devices(self) -> list[torch.device]:
        """The accelerators whose generators training draws from."""
        return [self._device] if self._device.type == "cuda" else []
