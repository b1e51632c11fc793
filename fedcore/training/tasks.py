"""What the clients' models learn: everything in which the tasks differ, as one table.

Rounds, methods, evaluation and reports are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedcore.errors import unknown_name
from fedcore.training.answer_tokens import answer_tokens
from fedcore.training.encoding import Examples, encode
from fedcore.training.instruction_data import InstructionDataset
from fedcore.training.instruction_rows import InstructionRows, Overlong, tokenise
from fedcore.training.language_models import load_language_model
from fedcore.training.models import load_classifier
from fedcore.training.next_tokens import encode_continuations
from fedcore.training.weight_format import WeightFormat


@dataclass(frozen=True)
class Tokenised:
    """A data set as examples.

    Attributes:
        examples: those that are used.
        rows: of instruction data, which of those read they are, and what became of the others.
    """

    examples: Examples
    rows: InstructionRows | None = None


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        peft_type: PEFT's name of the task, which decides whether a head trains with the adapter.
        load: model source, number of classes and seed to the base model and its tokenizer, in a
            format of its weights and, where they are quantised, on a device.
        encode: texts, tokenizer, length, and what becomes of longer ones, to examples with their
            targets.
        generates: whether the models continue texts, so that a report can show one.
    """

    peft_type: str
    load: Callable[[str, int, int, WeightFormat, torch.device], tuple[nn.Module, Any]]
    encode: Callable[[Any, Any, int, Overlong], Tokenised]
    generates: bool = False


def _load_causal(
    source: str, classes: int, seed: int, weights: WeightFormat, device: torch.device
) -> tuple[nn.Module, Any]:
    return load_language_model(source, weights=weights, device=device)


def _encode_rows(
    data: InstructionDataset, tokenizer: Any, length: int, overlong: Overlong
) -> Tokenised:
    rows = tokenise(data.conversations, tokenizer, max_length=length, overlong=overlong)
    domains = [data.labels[i] for i in rows.positions]
    return Tokenised(answer_tokens(rows, tokenizer, domains), rows)


TASKS: Mapping[str, Task] = {
    "classification": Task(
        peft_type="SEQ_CLS",
        load=lambda source, classes, seed, weights, _: load_classifier(
            source, classes, seed=seed, dtype=weights.torch_dtype
        ),
        encode=lambda texts, tokenizer, length, _: Tokenised(encode(texts, tokenizer, length)),
    ),
    "causal": Task(
        peft_type="CAUSAL_LM",
        load=_load_causal,
        encode=lambda texts, tokenizer, length, _: Tokenised(
            encode_continuations(texts, tokenizer, length)
        ),
        generates=True,
    ),
    "sft": Task(
        peft_type="CAUSAL_LM",
        load=_load_causal,
        encode=_encode_rows,
        generates=True,
    ),
}
"""By the name that a recipe gives them."""


def find_task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        FedcoreError: there is none, with the nearest names.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]
