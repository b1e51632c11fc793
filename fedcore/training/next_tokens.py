"""Texts to be continued: what a causal language model predicts of an example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedcore.errors import FedcoreError
from fedcore.training.datasets import TextDataset
from fedcore.training.encoding import IGNORED, EncodedDataset, encode


@dataclass(frozen=True, eq=False)
class NextTokens(EncodedDataset):
    """Token ids of n examples, each of whose tokens but the first is to be predicted.

    ``labels`` are the texts' domains, by which they are split and dealt to the clients.
    """

    def targets(self, batch: Tensor) -> Tensor:
        """The token after each token: int64 ``(B, T)``, :data:`IGNORED` where none follows."""
        targets = self.input_ids.new_full((len(batch), self.length), IGNORED)
        following = self.attention_mask[batch, 1:] == 1
        targets[:, :-1] = self.input_ids[batch, 1:].where(following, IGNORED)
        return targets


def encode_continuations(dataset: TextDataset, tokenizer: Any, max_length: int) -> NextTokens:
    """Tokenise ``dataset`` for next-token prediction.

    An example is the first ``max_length`` tokens of a text. The tokenizer must pad on the right,
    where a causal model's other tokens do not see it.

    Raises:
        FedcoreError: as :func:`~fedcore.training.encoding.encode`, or a text of a single token,
            of which nothing can be predicted, or a tokenizer that pads on the left.
    """
    if tokenizer.padding_side != "right":
        raise FedcoreError(f"the tokenizer pads on the {tokenizer.padding_side}; it must be right")
    plain = encode(dataset, tokenizer, max_length)
    short = (plain.attention_mask.sum(dim=1) < 2).nonzero()
    if len(short):
        raise FedcoreError(
            f"dataset {dataset.name!r}: text {int(short[0]) + 1} of {len(dataset)} has fewer than "
            "two tokens; there is nothing to predict"
        )
    return NextTokens(plain.input_ids, plain.attention_mask, plain.labels)
