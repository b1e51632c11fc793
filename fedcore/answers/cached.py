"""Forward passes that keep the states of what was read: prompts once, and what follows after.

Prompts of a batch are padded on the left, so that what follows stands at one place in all of them.
Positions are counted without the padding, which no token sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedcore.errors import FedcoreError


@dataclass
class Read:
    """What has been read of a batch of B texts.

    Attributes:
        logits: ``(B, V)`` fp32, of the token after each text.
        mask: int64 ``(B, T)``, 0 at the padding.
        cache: the states of transformers, which :meth:`CachedModel.follow` adds to.
    """

    logits: Tensor
    mask: Tensor
    cache: Any

    def chosen(self, rows: Sequence[int]) -> Read:
        """The batch of these rows, any of them more than once; ends the use of this one."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.mask.device)
        self.cache.batch_select_indices(index)
        return Read(self.logits[index], self.mask[index], self.cache)


class CachedModel:
    """A causal language model, PEFT-wrapped or not, read with a cache where it has one.

    Args:
        pad: the token that fills up a batch; any that the model knows.
    """

    def __init__(self, model: nn.Module, pad: int) -> None:
        self._model, self._pad = model, pad
        unwrap: Any = getattr(model, "get_base_model", None)
        base: Any = model if unwrap is None else unwrap()
        accepted = inspect.signature(base.forward).parameters
        self._positions = "position_ids" in accepted
        self._last_only = "logits_to_keep" in accepted
        # A recurrent state holds the padding too, and cannot be shared among options.
        self.caches = "past_key_values" in accepted and not getattr(base, "_is_stateful", False)
        self.device = next(model.parameters()).device
        config: Any = getattr(base, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.longest: int | None = getattr(text, "max_position_embeddings", None)
        ends = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
        self.ends = tuple(ends) if isinstance(ends, list | tuple) else (ends,)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after each token of one text, computed at once: ``(T, V)`` fp32."""
        whole: Tensor = self._model(input_ids=self._row(ids), use_cache=False).logits
        return whole[0].float()

    def read(self, texts: Sequence[Sequence[int]]) -> Read:
        """Read B texts of one token or more."""
        longest = max(map(len, texts))
        ids = self._row([self._pad] * longest).repeat(len(texts), 1)
        mask = torch.zeros_like(ids)
        for i, text in enumerate(texts):
            ids[i, longest - len(text) :] = torch.tensor(text, device=self.device)
            mask[i, longest - len(text) :] = 1
        outputs = self._forward(ids, mask, mask, last=True)
        return Read(outputs.logits[:, -1].float(), mask, outputs.past_key_values)

    def follow(self, before: Read, ids: Tensor, mask: Tensor) -> tuple[Tensor, Read]:
        """Read more tokens after ``before``, padded on the right.

        Args:
            before: what was read; its cache is used up.
            ids, mask: int64 ``(B, S)``.

        Returns:
            Logits after each of them, ``(B, S, V)`` fp32, and what has been read now.
        """
        whole = torch.cat([before.mask, mask], dim=1)
        outputs = self._forward(ids, whole, mask, cache=before.cache)
        logits: Tensor = outputs.logits.float()
        return logits, Read(logits[:, -1], whole, outputs.past_key_values)

    def _forward(
        self, ids: Tensor, whole: Tensor, mask: Tensor, cache: Any = None, *, last: bool = False
    ) -> Any:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": whole, "use_cache": True}
        if cache is not None:
            inputs["past_key_values"] = cache
        if self._positions:
            positions = (whole.cumsum(dim=1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -mask.shape[1] :]
        if last and self._last_only:
            inputs["logits_to_keep"] = 1
        return self._model(**inputs)

    def _row(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], dtype=torch.int64, device=self.device)


def tokens_of(tokenizer: Any, text: str, what: str) -> list[int]:
    """The tokens of a text that is to be continued, with those that the tokenizer puts in front.

    Raises:
        FedcoreError: there are none, naming ``what``.
    """
    ids: list[int] = list(tokenizer(text, verbose=False)["input_ids"])
    # After an end token a model begins another text.
    end = tokenizer.eos_token_id
    if len(ids) > 1 and ids[-1] == end and not text.endswith(str(tokenizer.eos_token)):
        ids.pop()
    if not ids:
        raise FedcoreError(f"{what}: the prompt has no tokens")
    return ids


def check_positions(model: CachedModel, count: int, what: str) -> None:
    """Refuse more tokens than the model has positions for.

    Raises:
        FedcoreError: naming ``what`` and both numbers.
    """
    if model.longest is not None and count > model.longest:
        raise FedcoreError(
            f"{what}: it has {count} tokens, and the model reads {model.longest}; shorten the "
            "prompt"
        )
