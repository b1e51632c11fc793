from __future__ import annotations

import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from fedcore.reports.comparison import comparison_rows
from fedcore.reports.document import Page, PageSection, render
from fedcore.reports.formatting import DASH, duration, scientific, significant, with_half_width
from fedcore.reports.grid import Column, Grid
from fedcore.reports.reading import read_run
from fedcore.reports.tables import (
    comparison_markdown,
    comparison_table,
    final_table,
    run_grid,
    run_table,
)
from tests.reports.fake_run import write_fake_run


def shown(table: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue()


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data.strip("\n")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.5, "1,234"), (1.0, "1.00"), (0.1, "0.100"), (0.0123, "0.012"), (None, DASH)],
)
def test_significant_digits(value: float | None, text: str):
    assert significant(value) == text


def test_unknown_numbers_are_dashes_and_never_zero():
    assert (scientific(None), scientific(0.0), scientific(1e-12)) == (DASH, "0", "1.0e-12")
    assert with_half_width("0.900", None) == f"0.900 ± {DASH}"
    assert with_half_width("0.900", 0.0) == "0.900 ± 0.000"
    assert with_half_width(DASH, None) == DASH
    assert (duration(None), duration(59.96), duration(3600)) == (DASH, "60.0 s", "1 h 0 min")


def test_run_table_has_a_row_per_evaluated_round_with_cumulated_traffic(tmp_path: Path):
    record = read_run(write_fake_run(tmp_path / "run", rounds=4, clients=3, modules=2))
    rows = run_grid(record).rows
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4"]
    each = 2 * 8 * 384 * 4 * 3 / 1e6
    assert [row[6] for row in rows] == [significant(each * t) for t in range(5)]
    first, last = record.rounds[0], record.rounds[-1]
    assert rows[0][1] == f"{first.accuracy:.3f}"
    assert rows[0][10:] == (DASH, DASH)
    errors = last.module_values("aggregation_error")
    assert rows[-1][10] == significant(sum(errors) / len(errors))
    spread = last.client_qualities(record.measure)
    assert rows[-1][3:6] == tuple(f"{v:.3f}" for v in (min(spread), sum(spread) / 3, max(spread)))


def test_every_number_fits_a_terminal_of_80_columns(tmp_path: Path):
    record = read_run(write_fake_run(tmp_path / "run"))
    text = shown(run_table(record))
    for row in run_grid(record).rows:
        assert any(line.split() == list(row) for line in text.splitlines())
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "0.85" in shown(final_table(record))


def test_a_single_seed_is_printed_with_a_dash(tmp_path: Path):
    rows = comparison_rows([read_run(write_fake_run(tmp_path / "run", rounds=2, clients=2))])
    accuracy = f"{rows[0]['accuracy_mean']:.3f} ± {DASH}"
    assert accuracy in shown(comparison_table(rows), width=120)
    assert f"| {accuracy} |" in comparison_markdown(rows)


def test_terminal_shows_markup_literally():
    grid = Grid("[bold]t", (Column("[red]h"),), (("[/] :smile:",),))
    text = shown(grid.rich())
    assert "[bold]t" in text
    assert "[red]h" in text
    assert "[/] :smile:" in text


def test_markdown_escapes_what_would_break_a_row():
    text = Grid("t", (Column("a|b", number=False),), (("<i>\nx|y\\",),)).markdown()
    assert text == "| a\\|b |\n| :--- |\n| &lt;i&gt; x\\|y\\\\ |\n"


def test_html_escapes_every_cell():
    hostile = "<script>alert('1')</script>"
    grid = Grid(hostile, (Column(hostile), Column("b")), ((hostile, "2"),), hostile)
    parser = Cells()
    parser.feed(render(Page("kind", "title", "outcome", [PageSection(tables=[grid])])))
    assert "script" not in parser.tags
    assert parser.cells[:3] == [hostile, "b", hostile]
