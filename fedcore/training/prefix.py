"""The frozen prefix: layers below every trained parameter, computed once per example.

Where the trained parameters sit only in layers ``c, c+1, ...`` of a transformer and in its head,
what enters layer c is a fixed function of the example: it depends neither on the round nor on the
client, and with fixed padding not on the batch either. :meth:`FrozenPrefix.compute` stores it for
every example; inside :meth:`FrozenPrefix.reuse` the layers ``0 .. c-1`` pass their input through
and the last of them returns the stored states.

Logits and gradients are those of the plain model, provided that the prefix runs in eval mode in
both (:meth:`FrozenPrefix.eval_prefix`); dropout would make it random. Of the L layers a step then
runs ``L - c``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedcore.errors import FedcoreError
from fedcore.training.encoding import EncodedDataset
from fedcore.training.free_memory import free_memory
from fedcore.training.layers import (
    capture,
    eval_mode,
    find_layers,
    first_tensor,
    frozen_length,
    requiring_grad,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Probe:
    """What a forward pass of two tokens showed.

    ``before`` are the modules that run ahead of the layers; ``extras[i]`` says how many Nones
    follow the hidden states in what layer i returns, and is None where it returns a bare tensor.
    """

    before: tuple[nn.Module, ...]
    extras: tuple[int | None, ...]
    states: Tensor


class FrozenPrefix:
    """The layers of a model below every trained parameter; made by :meth:`find`.

    Attributes:
        layers: the name of the model's layer list.
        length: the number of layers in the prefix, at least 1; all of them if only a head trains.
        width: size of a hidden state.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> model = BertForSequenceClassification(BertConfig(
        ...     vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
        ...     intermediate_size=8))
        >>> FrozenPrefix.find(model, ["bert.encoder.layer.2.output.dense.bias"]).length
        2
    """

    def __init__(self, model: nn.Module, layers: str, length: int, probe: _Probe) -> None:
        self.layers = layers
        self.length = length
        self.width = int(probe.states.shape[-1])
        self._itemsize = probe.states.element_size()
        self._model = model
        self._prefix = tuple(model.get_submodule(f"{layers}.{i}") for i in range(length))
        self._before = probe.before
        # The modules that hold the layers, without the model itself: OPT drops whole layers and
        # BART drops out embeddings in the forward of such a module.
        parts = layers.split(".")
        self._holders = tuple(
            model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts))
        )
        self._extras = probe.extras
        self._reusing = False
        self._fed: Tensor | None = None

    @classmethod
    def find(
        cls, model: nn.Module, trainable: Collection[str] | None = None
    ) -> FrozenPrefix | None:
        """The frozen prefix of ``model``, or None; why None is logged at level INFO.

        Runs the model on two tokens to see that reused states give the same output.

        Args:
            model: a transformers model, PEFT-wrapped or not, that takes ``input_ids`` and
                ``attention_mask``.
            trainable: names of the parameters that change; those with ``requires_grad`` if None.
                A layer with an adapter of any kind never belongs to the prefix.

        Raises:
            FedcoreError: a name in ``trainable`` that is not a parameter of the model.
        """
        result = _search(model, trainable)
        if isinstance(result, str):
            logger.info("no frozen prefix to reuse: %s", result)
            return None
        return result

    @staticmethod
    def why_not(model: nn.Module, trainable: Collection[str] | None = None) -> str | None:
        """Why :meth:`find` gives None, in words; None if it finds a prefix."""
        result = _search(model, trainable)
        return result if isinstance(result, str) else None

    def nbytes(self, examples: int, tokens: int) -> int:
        """Memory of the states of ``examples`` examples of ``tokens`` tokens each."""
        return examples * tokens * self.width * self._itemsize

    def over_budget(self, examples: int, tokens: int, budget: int | None = None) -> str | None:
        """Why the states of so many examples are not to be stored, with the bytes; else None.

        Args:
            budget: bytes they may take; by default a quarter of what is free on the model's device.
        """
        source = "training.prefix_budget is"
        if budget is None:
            free = free_memory(next(self._model.parameters()).device)
            if free is None:
                return None
            source, budget = "a quarter of the free memory is", free // 4
        needed = self.nbytes(examples, tokens)
        if needed <= budget:
            return None
        return f"the frozen prefix is not reused: its states take {needed} bytes, {source} {budget}"

    def eval_prefix(self) -> None:
        """Put embeddings and prefix layers into eval mode; call it after ``model.train()``.

        With it the plain pass and the pass that reuses states are the same function.
        """
        for module in (*self._before, *self._prefix):
            module.eval()
        for module in self._holders:
            module.training = False

    def compute(self, encoded: EncodedDataset, batch_size: int) -> Tensor:
        """What leaves the prefix, for every example.

        Runs in eval mode and without gradients; the model's modes are left as they were.

        Args:
            encoded: n examples of T tokens.
            batch_size: examples a forward pass; it changes the result by rounding only.

        Returns:
            ``(n, T, width)`` in the type in which the model computes, on the model's device;
            :meth:`nbytes` bytes.

        Raises:
            FedcoreError: no examples, or ``batch_size`` below 1.
        """
        if len(encoded) == 0 or batch_size < 1:
            raise FedcoreError(
                f"encoded has {len(encoded)} examples and batch_size is {batch_size}; "
                "both must be at least 1"
            )
        device = next(self._model.parameters()).device
        states: Tensor | None = None
        with eval_mode(self._model), torch.no_grad():
            for start in range(0, len(encoded), batch_size):
                rows = slice(start, start + batch_size)
                ids = encoded.input_ids[rows].to(device)
                mask = encoded.attention_mask[rows].to(device)
                batch = first_tensor(capture(self._model, self._prefix[-1], ids, mask))
                assert batch is not None, "the probe reached this layer"
                if states is None:
                    states = batch.new_empty((len(encoded), *batch.shape[1:]))
                states[rows] = batch
        assert states is not None, "there is at least one example"
        return states

    @contextmanager
    def reuse(self) -> Iterator[None]:
        """Within this context each forward pass takes the states given to :meth:`feed`.

        The model is as it was on leaving, also after an error.

        Raises:
            FedcoreError: the context is entered twice, or the prefix is in train mode.
        """
        if self._reusing:
            raise FedcoreError("this prefix is being reused already")
        frozen = (*self._before, *self._prefix)
        modules = [module for part in frozen for module in part.modules()]
        if any(module.training for module in (*modules, *self._holders)):
            raise FedcoreError("the prefix is in train mode; call eval_prefix() after train()")
        replaced = [vars(layer).get("forward") for layer in self._prefix]
        self._reusing = True
        try:
            for i, layer in enumerate(self._prefix):
                # On the instance, so that module names, attributes and hooks stay untouched.
                vars(layer)["forward"] = self._stand_in(i)
            yield
        finally:
            for layer, forward in zip(self._prefix, replaced, strict=True):
                vars(layer).pop("forward", None)
                if forward is not None:
                    vars(layer)["forward"] = forward
            self._reusing, self._fed = False, None

    def feed(self, states: Tensor) -> None:
        """Give the states ``(B, T, width)`` for the next forward pass, which uses them up.

        Raises:
            FedcoreError: outside :meth:`reuse`, or states of another width.
        """
        if not self._reusing:
            raise FedcoreError("feed() is called outside of reuse()")
        if states.dim() != 3 or states.shape[-1] != self.width:
            raise FedcoreError(
                f"states have shape {tuple(states.shape)}; expected (B, T, {self.width})"
            )
        self._fed = states

    def _stand_in(self, index: int) -> Callable[..., Any]:
        extra, last = self._extras[index], index == self.length - 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            if last:
                states = self._take(states)
            return states if extra is None else (states, *[None] * extra)

        return forward

    def _take(self, embedded: Tensor) -> Tensor:
        states, self._fed = self._fed, None
        if states is None:
            raise FedcoreError("no states for this forward pass; call feed() before each one")
        if states.shape != embedded.shape:
            raise FedcoreError(
                f"states have shape {tuple(states.shape)}; this batch has {tuple(embedded.shape)}"
            )
        return states


def _two_tokens(model: nn.Module) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    return ids, torch.ones_like(ids)


def _run_probe(
    model: nn.Module, layers: str, length: int, trained: dict[str, nn.Parameter]
) -> _Probe | str:
    """Run two tokens up to the end of the prefix, or say why it is none."""
    prefix = [model.get_submodule(f"{layers}.{i}") for i in range(length)]
    inside = tuple(f"{layers}.{i}." for i in range(length))
    before: list[nn.Module] = []
    outputs: list[Any] = []
    handles = []
    for name, module in model.named_modules():
        holds_layers = not name or f"{layers}.".startswith(f"{name}.")
        if not holds_layers and not f"{name}.".startswith(inside):
            handles.append(module.register_forward_pre_hook(lambda m, _: before.append(m)))
    handles.extend(
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
        for layer in prefix
    )
    floating = {name: p for name, p in trained.items() if p.is_floating_point()}
    try:
        with eval_mode(model), requiring_grad(floating.values()):
            states = first_tensor(capture(model, prefix[-1], *_two_tokens(model)))
            if states is None or len(outputs) != length:
                return f"a forward pass does not run the layers of {layers} once each"
            if states.requires_grad:
                grads = torch.autograd.grad(
                    states.sum(), list(floating.values()), allow_unused=True
                )
                for name, grad in zip(floating, grads, strict=True):
                    if grad is not None:
                        return f"the trained parameter {name} is used before the layers"
    finally:
        for handle in handles:
            handle.remove()
    extras: list[int | None] = []
    for output in outputs:
        if not isinstance(output, Tensor) and any(item is not None for item in output[1:]):
            return f"the layers of {layers} hand on more than hidden states"
        extras.append(None if isinstance(output, Tensor) else len(output) - 1)
    return _Probe(tuple(before), tuple(extras), states.detach())


def _differs(prefix: FrozenPrefix, model: nn.Module, states: Tensor) -> str | None:
    """How the model's output with reused states differs from the plain one on two tokens."""
    ids, mask = _two_tokens(model)
    with eval_mode(model), torch.no_grad():
        plain = first_tensor(model(input_ids=ids, attention_mask=mask))
        try:
            with prefix.reuse():
                prefix.feed(states)
                reused = first_tensor(model(input_ids=ids, attention_mask=mask))
        # Whatever a later layer misses of an earlier one can surface as any kind of error.
        except Exception as error:
            return f"layers after {prefix.layers}.{prefix.length - 1} need more of it: {error!r}"
    if plain is None or reused is None:
        return "the model returns no tensor"
    if not torch.allclose(plain, reused, equal_nan=True):
        return f"reused states change the output by {float((plain - reused).abs().max()):.2g}"
    return None


def _search(model: nn.Module, trainable: Collection[str] | None) -> FrozenPrefix | str:
    """The prefix, or why there is none."""
    named = dict(model.named_parameters(remove_duplicate=False))
    if trainable is not None and (unknown := sorted(set(trainable) - named.keys())):
        raise FedcoreError(
            f"trainable holds {unknown[0]!r}, which is not a parameter of the model; pass names of "
            "model.named_parameters()"
        )
    trained = {
        name: parameter
        for name, parameter in named.items()
        if (parameter.requires_grad if trainable is None else name in trainable)
    }
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "the model is an encoder-decoder"
    located = find_layers(model)
    if located is None:
        return "the model has no list of layers of one class"
    layers, stack = located
    length = frozen_length(stack, trained.values())
    if length == 0:
        return f"the first layer, {layers}.0, is trained or adapted"
    probe = _run_probe(model, layers, length, trained)
    if isinstance(probe, str):
        return probe
    prefix = FrozenPrefix(model, layers, length, probe)
    return _differs(prefix, model, probe.states) or prefix
