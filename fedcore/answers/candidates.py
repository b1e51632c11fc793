"""Models that are compared: each a change to one model in memory, made and undone in turn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedcore.answers.harness import HarnessTask
from fedcore.answers.scoring import BATCH_SIZE, Progress, TaskScore, mean_score, score_tasks
from fedcore.answers.task import AnswerTask
from fedcore.data.peft_files import open_adapter, read_adapter
from fedcore.errors import FedcoreError
from fedcore.merging.result import RESIDUAL_FOLDER
from fedcore.training.language_models import load_language_model
from fedcore.training.live_adapter import ADAPTER_NAME

BASE = "base"
"""The name of the model that the others are compared with."""


@dataclass(frozen=True)
class Candidate:
    """One row of a comparison.

    Attributes:
        name: how tables call it.
        members: contexts in which the model is this one; of several, scores are means over them.
    """

    name: str
    members: Sequence[Callable[[], AbstractContextManager[None]]]


@dataclass(frozen=True)
class Candidates:
    """What is compared, the base first: changes to one model, and its tokenizer."""

    model: nn.Module
    tokenizer: Any
    rows: Sequence[Candidate]

    def score(
        self,
        tasks: Sequence[AnswerTask | HarnessTask],
        *,
        limit: int | None = None,
        batch_size: int = BATCH_SIZE,
        run_code: bool = False,
        progress: Progress = lambda task, done, total: None,
    ) -> dict[str, tuple[TaskScore, ...]]:
        """Candidate to one score per task; the arguments are those of
        :func:`~fedcore.answers.scoring.score_tasks`.
        """
        scores = {}
        for row in self.rows:
            by_member = []
            for number, member in enumerate(row.members, start=1):
                of = f" {number} of {len(row.members)}" if len(row.members) > 1 else ""

                def named(task: str, done: int, total: int, name: str = row.name + of) -> None:
                    progress(f"{name}: {task}", done, total)

                with member():
                    by_member.append(
                        score_tasks(
                            self.model,
                            self.tokenizer,
                            tasks,
                            limit=limit,
                            batch_size=batch_size,
                            run_code=run_code,
                            progress=named,
                        )
                    )
            scores[row.name] = tuple(mean_score(one) for one in zip(*by_member, strict=True))
        return scores


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The base model, as it was before PEFT wrapped it."""
    with model.disable_adapter():
        yield


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def adapter_candidates(folder: Path, base: str | None) -> Candidates:
    """A PEFT adapter on its base, and the base.

    A second adapter in the folder's ``residual``, as ``fedcore aggregate --method fedex`` leaves
    it, is added to the first.

    Args:
        folder: of the adapter, of any kind that fedcore reads.
        base: the base model as :func:`~fedcore.training.language_models.load_language_model` takes
            it; what the adapter's configuration names by default.

    Raises:
        FedcoreError: the folder is not a valid adapter, names no base, or does not fit the base.
    """
    # Before the base is loaded: whether it is an adapter of a kind and of tensors that are known.
    folders = [folder, *filter(Path.is_dir, [folder / RESIDUAL_FOLDER])]
    for one in folders:
        read_adapter(one)
    _, config = open_adapter(folder)
    source = base or config.get("base_model_name_or_path")
    if not isinstance(source, str) or not source:
        raise FedcoreError(f"{folder} names no base model; pass --base with one")
    model, tokenizer = load_language_model(source)
    adapted = _adapted(model, folders, source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = (
        Candidate(BASE, (lambda: without_adapter(adapted),)),
        Candidate("adapter", (_as_it_is,)),
    )
    return Candidates(adapted.to(device), tokenizer, rows)


def _adapted(model: Any, folders: Sequence[Path], source: str) -> Any:
    """``model`` with the adapters in ``folders``, of which every tensor has to find its place."""
    # Makes Gram and tri-factor adapters known to PEFT.
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    import fedcore.tuners  # noqa: F401

    names = [ADAPTER_NAME, *(folder.name for folder in folders[1:])]
    adapted: Any = None
    for name, folder in zip(names, folders, strict=True):
        misfit = f"{folder} does not fit the base {source!r}"
        try:
            with warnings.catch_warnings():
                # transformers deprecates a property that peft still reads.
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
                # What PEFT warns of, keys without a place, is refused below.
                warnings.filterwarnings("ignore", message=".*missing adapter keys.*")
                if adapted is None:
                    adapted = PeftModel.from_pretrained(
                        model, str(folder), name, local_files_only=True
                    )
                else:
                    adapted.load_adapter(str(folder), name, local_files_only=True)
        # PEFT: ValueError of targets that are not there, RuntimeError of other shapes.
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise FedcoreError(f"{misfit}: {reason:.300}; pass its own by --base") from error
        stored = open_adapter(folder)[0].tensors
        placed = get_peft_model_state_dict(adapted, adapter_name=name)
        if apart := sorted(set(placed).symmetric_difference(stored)):
            raise FedcoreError(
                f"{misfit}: {apart[0]} is in one of them alone; pass its own by --base"
            )
    adapted.base_model.set_adapter(names if len(names) > 1 else names[0])
    return adapted.eval()
