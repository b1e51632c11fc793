"""From example indices to logits, through the plain model or its cached frozen prefix."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedcore.errors import FedcoreError
from fedcore.training.encoding import Examples
from fedcore.training.layers import capture_input
from fedcore.training.prefix import FrozenPrefix
from fedcore.training.token_head import TokenHead


class Forward:
    """Logits of a model for examples of one data set.

    Where adapters sit only in the last layers, the states that leave the frozen prefix are computed
    once per example and fed in; the prefix is in eval mode either way, so the result is the same.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Examples,
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
        logits: Tensor = self._run(batch).logits
        return logits

    @cached_property
    def head(self) -> TokenHead | str:
        """A language model's head, or why it cannot be taken apart."""
        return TokenHead.find(self._model)

    def states(self, batch: Tensor) -> Tensor:
        """What enters :attr:`head`, ``(len(batch), T, width)``; no logits are made.

        Raises:
            FedcoreError: there is no such head.
        """
        if isinstance(self.head, str):
            raise FedcoreError(f"the model's head cannot be taken apart: {self.head}")
        states = capture_input(lambda: self._run(batch), self.head.module)
        assert states is not None, "the head was reached when it was looked for"
        return states

    def _run(self, batch: Tensor) -> Any:
        inputs = {k: v.to(self._device) for k, v in self._examples.inputs(batch).items()}
        if self._prefix is not None and self._states is not None:
            with self._prefix.reuse():
                self._prefix.feed(self._states[batch].to(self._device))
                return self._model(**inputs)
        return self._model(**inputs)

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
