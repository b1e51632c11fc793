"""Examples as token ids: what a model is given for them, and what it is to predict.

Most are of one fixed length. Fixed padding makes what a layer computes for an example independent
of the batch it is in, which is what lets :mod:`fedcore.training.prefix` compute it once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fedcore.errors import FedcoreError
from fedcore.training.datasets import TextDataset

IGNORED = -100
"""The target of a position where nothing is to be predicted."""


_TOGETHER = 1024

Indices = Tensor | np.ndarray | Sequence[int]


class Examples(ABC):
    """n examples of a data set, by their indices.

    Attributes:
        labels: int64 ``(n,)``, the class of each, or the domain by which it is dealt to a client.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def inputs(self, batch: Tensor) -> dict[str, Tensor]:
        """What a model is given for the examples ``batch``: ``input_ids`` and ``attention_mask``,
        int64 ``(B, T)``, padded on the right.
        """

    @abstractmethod
    def targets(self, batch: Tensor) -> Tensor:
        """What is to be predicted for them: int64 ``(B,)``, or ``(B, T)`` after each token, with
        :data:`IGNORED` where nothing is.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that the examples are, by name."""

    @abstractmethod
    def take(self, indices: Indices) -> Self:
        """A copy of the examples at ``indices``, in that order."""

    def predictions(self, indices: Tensor) -> int:
        """How many predictions the examples ``indices`` ask for."""
        parts = indices.split(_TOGETHER) if len(indices) else ()
        return sum(int((self.targets(part) != IGNORED).sum()) for part in parts)

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


@dataclass(frozen=True, eq=False)
class EncodedDataset(Examples):
    """Token ids of n examples, T tokens each.

    Attributes:
        input_ids: int64 ``(n, T)``.
        attention_mask: int64 ``(n, T)``, 1 at tokens and 0 at padding.
        labels: int64 ``(n,)``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        ids, mask, labels = self.input_ids.shape, self.attention_mask.shape, self.labels.shape
        if len(ids) != 2 or mask != ids or labels != ids[:1]:
            raise FedcoreError(
                f"input_ids {tuple(ids)}, attention_mask {tuple(mask)} and labels {tuple(labels)} "
                "must be (n, T), (n, T) and (n,)"
            )

    @property
    def length(self) -> int:
        """Tokens an example, T."""
        return self.input_ids.shape[1]

    def inputs(self, batch: Tensor) -> dict[str, Tensor]:
        """Token ids and mask of the examples ``batch``: int64 ``(B, T)``."""
        return {"input_ids": self.input_ids[batch], "attention_mask": self.attention_mask[batch]}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name, those of a subclass too; the first axis counts examples."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def targets(self, batch: Tensor) -> Tensor:
        """The classes to be predicted for the examples ``batch``: int64 ``(B,)``."""
        return self.labels[batch]

    def take(self, indices: Indices) -> Self:
        """A copy of the examples at ``indices``, in that order."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.input_ids.device)
        return replace(self, **{name: tensor[index] for name, tensor in self.tensors().items()})

    def to(self, device: torch.device | str) -> Self:
        """The same examples on ``device``."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})


def check_length(tokenizer: Any, max_length: int, least: int) -> None:
    """Whether examples of ``max_length`` tokens suit ``tokenizer``.

    Raises:
        FedcoreError: fewer than ``least``, or more than the model has positions for.
    """
    # Tokenizers without a limit of their own report an astronomic one.
    if not least <= max_length <= tokenizer.model_max_length:
        raise FedcoreError(
            f"max_length is {max_length}; it must lie between {least} and "
            f"{tokenizer.model_max_length}"
        )


def no_examples(length: int) -> EncodedDataset:
    """The data set of a server that has no data: no example of ``length`` tokens."""
    ids = torch.zeros(0, length, dtype=torch.int64)
    return EncodedDataset(ids, ids.clone(), torch.zeros(0, dtype=torch.int64))


def encode(dataset: TextDataset, tokenizer: Any, max_length: int) -> EncodedDataset:
    """Tokenise ``dataset``; every example is truncated or padded to ``max_length`` tokens.

    Args:
        dataset: n texts.
        tokenizer: a transformers tokenizer with a padding token.
        max_length: T, special tokens included.

    Raises:
        FedcoreError: no examples, no padding token, or a ``max_length`` that leaves no room for
            text or that the model has no positions for.
    """
    if len(dataset) == 0:
        raise FedcoreError(f"dataset {dataset.name!r} has no examples to encode")
    if tokenizer.pad_token is None:
        raise FedcoreError("the tokenizer has no padding token; set tokenizer.pad_token")
    check_length(tokenizer, max_length, least=tokenizer.num_special_tokens_to_add() + 1)
    batch = tokenizer(
        list(dataset.texts),
        max_length=max_length,
        padding="max_length",
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    labels = torch.tensor(dataset.labels, dtype=torch.int64)
    return EncodedDataset(batch["input_ids"], batch["attention_mask"], labels)
