"""Labelled texts from a dataset of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from fedcore.checks import is_integer
from fedcore.errors import FedcoreError, unknown_name
from fedcore.training.text_columns import UNLABELLED, described, fill, wanted_columns


def _usable(label: Any, classes: Sequence[str] | None) -> bool:
    # Public test splits mark withheld labels with -1.
    if classes:
        return isinstance(label, int) and 0 <= label < len(classes)
    return (isinstance(label, str) or is_integer(label)) and str(label).strip() != ""


def _split(
    hub_id: str, split: str, subset: str | None, columns: Collection[str]
) -> tuple[str, Any]:
    """How errors call the split, and its table."""
    import datasets

    where = f"dataset {hub_id!r}, split {split!r}"
    try:
        chosen = {} if subset is None else {"name": subset}
        table = datasets.load_dataset(hub_id, split=split, **chosen)
    # The library raises many kinds: network, configuration, absent split, script refused.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FedcoreError(f"{where}: {reason}") from error
    for column in columns:
        if column not in table.column_names:
            raise FedcoreError(f"{where}: {unknown_name('column', column, table.column_names)}")
    return where, table


def read_hub_rows(
    hub_id: str,
    columns: Collection[str],
    optional: Collection[str],
    split: str,
    subset: str | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of one split, each with its number, counted from 1.

    ``columns`` and ``optional`` are as in :func:`~fedcore.training.table_files.read_rows`.

    Raises:
        FedcoreError: a dataset or split that cannot be read, or an absent column.
    """
    _, table = _split(hub_id, split, subset, columns)
    chosen = [name for name in (*columns, *optional) if name in table.column_names]
    yield from enumerate(table.select_columns(chosen), start=1)


def read_hub_table(
    hub_id: str, *, text_column: str, label_column: str, split: str, subset: str | None = None
) -> tuple[list[str], list[str], list[str] | None]:
    """Download (or take from the cache) one split; its texts, label names, and declared classes.

    The classes are those of a ``ClassLabel`` column, in its order; None where the labels are plain
    strings or integers. ``text_column`` and ``label_column`` are as in
    :func:`~fedcore.training.table_files.read_table`.

    Raises:
        FedcoreError: a dataset or split that cannot be read, an absent column, or a row without a
            text or a label.
    """
    wanted = wanted_columns(text_column, label_column)
    where, table = _split(hub_id, split, subset, wanted)
    values = {column: list(table[column]) for column in wanted}
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    texts = [fill(text_column, row) for row in rows]
    labels: list[Any] = values[label_column] if label_column else [UNLABELLED] * len(texts)
    classes: list[str] | None = None
    if label_column:
        classes = getattr(table.features[label_column], "names", None)
    for row, (text, label) in enumerate(zip(texts, labels, strict=True), start=1):
        if not isinstance(text, str) or not text.strip():
            raise FedcoreError(
                f"{where}, row {row}: {text_column!r} is {described(text)}; each row needs a text"
            )
        if not _usable(label, classes):
            wanted_label = "one of the declared classes" if classes else "a string or an integer"
            raise FedcoreError(
                f"{where}, row {row}: {label_column!r} is not a label; each row needs "
                f"{wanted_label}"
            )
    names = [classes[label] if classes else str(label).strip() for label in labels]
    return [str(text) for text in texts], names, list(classes) if classes else None
