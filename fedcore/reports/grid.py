"""A table of text, for the terminal and as Markdown; a page's template has a macro for it."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from fedcore.errors import missing_extra

try:
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise missing_extra("rich", "run") from error


@dataclass(frozen=True)
class Column:
    """A heading, broken where a narrow terminal needs it, and whether its cells are numbers, which
    stand flush right.
    """

    heading: str
    number: bool = True


@dataclass(frozen=True)
class Grid:
    """Cells by row; every row has a cell for each column. ``note`` explains the headings."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def rich(self) -> Table:
        """For the terminal; cells are shown literally, square brackets included.

        Columns shrink to their longest word and no further, so that no number is broken in two.
        """
        table = Table(
            title=Text(self.title, style="bold"),
            caption=Text(self.note, style="dim") if self.note else None,
            caption_justify="left",
            title_justify="left",
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=0,
            show_header=any(column.heading for column in self.columns),
        )
        for i, column in enumerate(self.columns):
            texts = (column.heading, *(row[i] for row in self.rows))
            words = [word for text in texts for word in text.split()]
            table.add_column(
                Text(column.heading),
                justify="right" if column.number else "left",
                no_wrap=all(len(line.split()) < 2 for text in texts for line in text.split("\n")),
                min_width=max((cell_len(word) for word in words), default=1),
            )
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table

    def markdown(self) -> str:
        """A pipe table; pipes, angle brackets and line breaks in cells are escaped."""
        head = [_markdown(column.heading) for column in self.columns]
        rule = ["---:" if column.number else ":---" for column in self.columns]
        body = [[_markdown(cell) for cell in row] for row in self.rows]
        lines = ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)]
        return "\n".join(lines) + "\n"


def stacked(*grids: Grid) -> Group:
    """Several tables under one another, for the terminal."""
    parts = [part for grid in grids for part in (grid.rich(), "")]
    return Group(*parts[:-1])


def _markdown(cell: str) -> str:
    text = escape(cell, quote=False).replace("\\", "\\\\").replace("|", "\\|")
    return " ".join(text.split()) or " "
