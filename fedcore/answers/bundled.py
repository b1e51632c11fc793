"""Tasks that come with fedcore and need no network."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from fedcore.answers.harness import PREFIX, HarnessTask
from fedcore.answers.task import AnswerTask, Row
from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError, unknown_name
from fedcore.training.datasets import TextDataset, load_dataset, subsample, train_test_split

BUNDLED = ("arithmetic", "bbc-topic")
"""The names of these tasks."""

ROWS = 200
"""Rows of each."""

TOPIC_SOURCE = "bbc-news"
"""The packaged texts that ``bbc-topic`` asks about."""

_WORDS = 60
_TEST_FRACTION = 0.2

_SUMS = "17 + 25 = 42\n38 + 14 = 52\n"
"""Two examples, which show what is wanted."""


def named_task(
    name: str, folder: Path | None = None, trained: Collection[str] = ()
) -> AnswerTask | HarnessTask:
    """The task called ``name``: a bundled one, or ``lm-eval:NAME``.

    Args:
        folder: where lm-eval's task is described.
        trained: texts that the models were trained on, which are left out.

    Raises:
        FedcoreError: there is no such task, with the nearest names.
        MissingExtraError: the package with the texts is not installed.
    """
    if name.startswith(PREFIX) and len(name) > len(PREFIX):
        return HarnessTask(name, folder)
    if name == "arithmetic":
        return arithmetic()
    if name == "bbc-topic":
        return bbc_topic(trained)
    raise unknown_name("task", name, [*BUNDLED, f"{PREFIX}NAME"])


def arithmetic() -> AnswerTask:
    """Sums of two numbers of two digits, always the same ones."""
    rng = np.random.default_rng(derive_seed(0, "answers", "arithmetic"))
    pairs = rng.choice(90 * 90, size=ROWS, replace=False)
    rows = []
    for a, b in (divmod(int(pair), 90) for pair in pairs):
        rows.append(Row(f"{_SUMS}{a + 10} + {b + 10} =", str(a + b + 20)))
    return AnswerTask("arithmetic", "number", tuple(rows), stop=("\n",), max_tokens=8)


def bbc_topic(trained: Collection[str] = ()) -> AnswerTask:
    """Which of five topics a news text has: the beginnings of 200 texts of BBC News.

    They are drawn from the texts that were not trained on. Where nothing is known of those, from
    the held-out part of a recipe with seed 0 and a ``data.test_fraction`` of 0.2. Some articles
    are there twice with another end: a text that begins as one that was trained on is left out.

    Args:
        trained: texts that are left out.

    Raises:
        FedcoreError: every text was trained on.
        MissingExtraError: the package with the texts is not installed.
    """
    chosen = subsample(_held_out(load_dataset(TOPIC_SOURCE), trained), ROWS, seed=0)
    # Texts come sorted by topic; the first rows shall be of all of them.
    order = np.random.default_rng(derive_seed(0, "answers", "bbc-topic")).permutation(len(chosen))
    options = tuple(f" {topic}" for topic in chosen.label_names)
    rows = tuple(
        Row(f"{_beginning(chosen.texts[i])}\nThe topic is", chosen.labels[i], options)
        for i in order
    )
    return AnswerTask("bbc-topic", "choice", rows)


def _held_out(texts: TextDataset, trained: Collection[str]) -> TextDataset:
    if not trained:
        trained = train_test_split(texts, _TEST_FRACTION, derive_seed(0, "split"))[0].texts
    known = {_beginning(text) for text in trained}
    unknown = [i for i, text in enumerate(texts.texts) if _beginning(text) not in known]
    if not unknown:
        raise FedcoreError(
            f"bbc-topic: every text of {texts.name} was trained on; pass --data with texts that "
            "were not"
        )
    return texts.take(unknown)


def _beginning(text: str) -> str:
    return " ".join(text.split()[:_WORDS])
