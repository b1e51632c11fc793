from __future__ import annotations

import json
from dataclasses import asdict, replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from bench.case import Case, Other, Ours, measure, one_operation
from bench.limits import Limits, measure_limits, plain_read
from bench.memory import peak_bytes
from bench.report import limits_line, print_tables, to_json, to_markdown

LIMITS = Limits(copy=1000.0, read=2000.0, flops={"float32": 4e9, "float64": 2e9})
CPU = torch.device("cpu")


def waiting(seconds):
    """A call for :func:`clock` that takes ``seconds``."""
    return lambda: seconds


def clock(call):
    return call()


@pytest.fixture
def rows():
    case = Case(
        "N=2",
        torch.bfloat16,
        {
            "mean": Ours(waiting(0.5), 250, 100.0, ("loop", "round"), "torch"),
            "round": Ours(waiting(2.0), 500, 8.0, ("part",), "triton"),
        },
        {"loop": Other(waiting(1.5)), "part": Other(waiting(3.0), share=0.25)},
    )
    return measure(case, clock, 3, LIMITS)


def test_ratio_is_the_others_time_over_ours(rows):
    assert [(row.op, row.against, row.ratio) for row in rows] == [
        ("mean", "loop", 3.0),
        ("mean", "round", 4.0),
        # A quarter of the work in 3 seconds is 12 seconds for all of it.
        ("round", "part", 6.0),
    ]


def test_percent_of_copy_is_bytes_a_second_over_the_copys(rows):
    assert [row.percent_of_copy for row in rows] == [50.0, 50.0, 25.0]


def test_json_is_one_array_of_flat_rows(rows):
    wanted = {"op", "shape", "backend", "against", "seconds", "ratio", "bytes", "percent_of_copy"}
    found = json.loads(to_json(rows))
    assert len(found) == 3
    assert all(wanted | {"dtype", "threads"} <= set(row) for row in found)
    assert found[2] == asdict(rows[2])
    assert [row["dtype"] for row in found] == ["bfloat16"] * 3
    assert [row["backend"] for row in found] == ["torch", "torch", "triton"]
    assert found[0]["threads"] == torch.get_num_threads()
    assert json.loads(to_json([])) == []


def test_spread_is_that_of_our_times():
    times = iter((9.0, 0.25, 0.75, 0.0, 0.5, 0.25))
    ours = Ours(lambda: next(times), 1, 1.0, ("loop",), "torch")
    case = Case("", torch.float32, {"mean": ours}, {"loop": Other(waiting(0.1))})
    (row,) = measure(case, clock, 5, LIMITS)
    assert (row.seconds, row.spread) == (0.25, 0.25)


def test_bytes_of_one_operation_are_its_operand_and_what_it_writes():
    operand = torch.zeros(3, 5, dtype=torch.float16)
    case = one_operation("gram", "", operand, waiting(1.0), {}, written=7, flops=1.0)
    assert case.ours["gram"].bytes == 37
    case = one_operation("gram", "", operand, waiting(1.0), {}, written=7, flops=1.0, read=3)
    assert case.ours["gram"].bytes == 10


def test_limits_count_a_copy_twice_and_a_read_once(monkeypatch):
    monkeypatch.setattr("bench.limits.cache_bytes", lambda device: 1 << 10)
    monkeypatch.setattr("bench.limits._CPU_SIDE", 8)

    def one_second(call):
        call()
        return 1.0

    found = measure_limits(CPU, one_second, 1)
    assert (found.copy, found.read) == (8 << 10, 4 << 10)
    assert found.flops == {"float32": 1024.0, "float64": 1024.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_read_sees_every_element(dtype):
    for place in range(24):
        values = torch.zeros(24, dtype=dtype)
        values[place] = 1.0
        assert plain_read(values.reshape(4, 6)) > 0


def test_peak_memory_is_what_the_call_takes():
    found = peak_bytes(lambda: torch.ones(16 << 20, dtype=torch.uint8), CPU)
    assert found is None or 16 << 20 <= found < 24 << 20


def test_the_page_says_how_it_was_measured_and_holds_every_row(rows):
    page = to_markdown("Rounds", "fedcore bench x", ["a card."], rows, ["picture.png"])
    assert page.startswith("# Rounds\n\n`fedcore bench x`\n\na card.\n")
    assert "![Rounds](picture.png)" in page
    assert "## N=2, bfloat16" in page
    lines = ["| **mean** | 500 | 0 |  | 50.0 |", "| loop | 1,500 |  | 3.00 |  |"]
    lines += ["| round | 2,000 |  | 4.00 |  |", "| **round** | 2,000 | 0 |  | 25.0 |"]
    assert "\n".join([*lines, "| part | 12,000 |  | 6.00 |  |"]) in page
    assert "peak" not in page


def test_the_limits_are_said_in_their_units():
    found = limits_line(Limits(copy=30e9, read=36e9, flops={"float32": 1.5e12}))
    assert found == (
        "copy 30.0 GB/s (read and written), plain read 36.0 GB/s; GFLOP/s: float32 1,500"
    )


def test_peaks_have_a_column_where_they_were_measured(rows):
    page = to_markdown("Rounds", "x", ["a card."], [replace(rows[0], peak_bytes=3_000_000)])
    assert "| peak MB |" in page
    assert "| **mean** | 500 | 0 |  | 50.0 | 3.00 |" in page


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_shows_every_row(width, rows):
    text = StringIO()
    print_tables(Console(width=width, file=text), rows)
    lines = [line.split() for line in text.getvalue().splitlines()]
    for row in rows:
        assert [row.against, f"{1e3 * row.ratio * row.seconds:,.0f}", f"{row.ratio:.2f}"] in lines
    assert ["mean", "500", "0", "50.0"] in lines
