"""Rows as a person reads them, as a committed page, and as data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.case import Row
from bench.limits import Limits
from fedcore.reports.formatting import DASH, megabytes, significant

NOTES = (
    "ms: median time of one call, all calls in turns, operands in memory and not in cache; "
    "±: interquartile range.",
    "ratio: the other's time over ours. copy: bytes that the operation must move per second, "
    "in percent of the copy bandwidth of this run.",
)
PEAK_NOTE = "peak: memory beyond the uploads and the previous row."

_HEADS = ("operation", "ms", "±", "ratio", "copy %")
_RATIO = _HEADS.index("ratio")
_WIDEST = 110
_FASTER, _SLOWER = 1.05, 0.95


def to_json(rows: Sequence[Row]) -> str:
    """One array with one object per row, one row per line."""
    return "[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n"


def limits_line(limits: Limits) -> str:
    """What the machine can do at most, in one line."""
    flops = ", ".join(f"{name} {significant(v / 1e9)}" for name, v in limits.flops.items())
    copy, read = significant(limits.copy / 1e9), significant(limits.read / 1e9)
    return f"copy {copy} GB/s (read and written), plain read {read} GB/s; GFLOP/s: {flops}"


def print_tables(console: Console, rows: Sequence[Row]) -> None:
    """One table per shape and dtype, all of one width; ratios above 1 are green, below 1 red."""
    heads = _heads(rows)
    for (shape, dtype), group in _groups(rows):
        table = Table(
            title=escape(f"{shape}, {dtype}"),
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            width=min(console.width, _WIDEST),
        )
        table.add_column(heads[0], ratio=1)
        for head in heads[1:]:
            table.add_column(head, justify="right", width=7, no_wrap=True)
        for cells, row in _lines(group, len(heads)):
            name, *numbers = (escape(cell) for cell in cells)
            if row is None:
                table.add_row(name, *numbers, style="bold")
                continue
            style = "green" if row.ratio > _FASTER else "red" if row.ratio < _SLOWER else "none"
            numbers[_RATIO - 1] = f"[{style}]{numbers[_RATIO - 1]}[/]"
            table.add_row(f"  {name}", *numbers)
        console.print(table)
    for note in _notes(rows):
        console.print(note, style="dim", highlight=False)


def to_markdown(
    title: str,
    command: str,
    conditions: Sequence[str],
    rows: Sequence[Row],
    pictures: Sequence[str] = (),
) -> str:
    """The page that is committed: how it was measured, then one table per shape and dtype."""
    heads = _heads(rows)
    rule = "| :--- |" + " ---: |" * (len(heads) - 1)
    lines = [f"# {title}", "", f"`{command}`", "", *conditions]
    lines += ["", *_notes(rows)]
    lines += [line for picture in pictures for line in ("", f"![{title}]({picture})")]
    for (shape, dtype), group in _groups(rows):
        lines += ["", f"## {shape}, {dtype}", "", f"| {' | '.join(heads)} |", rule]
        for (name, *numbers), row in _lines(group, len(heads)):
            shown = f"**{name}**" if row is None else name
            lines.append(f"| {' | '.join([shown, *numbers])} |")
    return "\n".join(lines) + "\n"


def _has_peaks(rows: Iterable[Row]) -> bool:
    return any(row.peak_bytes is not None for row in rows)


def _heads(rows: Iterable[Row]) -> tuple[str, ...]:
    return (*_HEADS, "peak MB") if _has_peaks(rows) else _HEADS


def _notes(rows: Iterable[Row]) -> tuple[str, ...]:
    return (*NOTES, PEAK_NOTE) if _has_peaks(rows) else NOTES


def _groups(rows: Iterable[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.shape, row.dtype), []).append(row)
    return list(groups.items())


def _lines(rows: Iterable[Row], columns: int) -> list[tuple[list[str], Row | None]]:
    """One line per operation and, below it, one with its row for each other."""
    lines: list[tuple[list[str], Row | None]] = []
    last = ""
    for row in rows:
        if row.op != last:
            ms, spread = significant(1e3 * row.seconds), significant(1e3 * row.spread)
            peak = DASH if row.peak_bytes is None else megabytes(row.peak_bytes)
            cells = [row.op, ms, spread, "", significant(row.percent_of_copy), peak]
            lines.append((cells[:columns], None))
        theirs = significant(1e3 * row.ratio * row.seconds)
        lines.append(([row.against, theirs, "", significant(row.ratio), "", ""][:columns], row))
        last = row.op
    return lines
