"""`fedcore theory`, and what it prints and writes."""

import json
import math
import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fedcore.errors import FedcoreError
from fedcore_theory import catalog, tables
from fedcore_theory.catalog import all_checks, chosen_checks
from fedcore_theory.check import Check, Measured, Outcome, least, worst
from fedcore_theory.command import theory
from fedcore_theory.figures import beside_bounds
from fedcore_theory.report import PARTS, write_report
from fedcore_theory.running import Result, run_checks

ROOT = Path(__file__).resolve().parents[2]


def outcome(*measured):
    return Outcome(measured or (Measured("error", 0.5, "<=", 1.0),), samples="1 case")


def check(name="R1", found=None):
    return Check(
        id=name,
        title="a title",
        claim="1 < 2 & <b>more</b>",
        source="ours",
        verdict="holds",
        assumptions="none",
        data="none",
        draw=float,
        measure=lambda cases: found or outcome(),
        picture=beside_bounds,
    )


@pytest.mark.parametrize(
    ("value", "relation", "bound", "holds"),
    [
        (1.0, "<=", 1.0, True),
        (1.0, "<", 1.0, False),
        (1.0, ">=", 1.0, True),
        (1.0, ">", 1.0, False),
        (1.0, "within", (1.0, 1.0), True),
        (1.1, "within", (0.9, 1.0), False),
        (math.nan, "<=", 1.0, False),
        (math.nan, ">", 1.0, False),
        (math.nan, "within", (0.0, 1.0), False),
    ],
)
def test_a_number_stands_to_its_bound(value, relation, bound, holds):
    assert Measured("x", value, relation, bound).holds is holds


def test_a_range_and_its_relation_go_together():
    with pytest.raises(ValueError, match="relation '<=' with bound"):
        Measured("x", 1.0, "<=", (0.0, 1.0))
    with pytest.raises(ValueError, match="relation 'within' with bound 1"):
        Measured("x", 1.0, "within", 1.0)


def test_an_outcome_holds_if_all_of_it_does_and_something_is_there():
    good, bad = Measured("x", 1.0, "<=", 1.0), Measured("y", 2.0, "<=", 1.0)
    assert outcome(good).holds
    assert not outcome(good, bad).holds
    assert not Outcome((), samples="").holds


def test_extremes_do_not_lose_a_nan():
    assert worst([1.0, 3.0, 2.0]) == 3.0
    assert least([1.0, 3.0, 2.0]) == 1.0
    for values in ([1.0, math.nan, 2.0], [math.nan], []):
        assert math.isnan(worst(values))
        assert math.isnan(least(values))


def test_repetitions_are_seeds_that_follow_each_other():
    one = Check(**{**check().__dict__, "first_seed": 7, "repetitions": 3})
    assert list(one.cases()) == [7.0, 8.0, 9.0]
    assert list(one.cases(1)) == [7.0]
    with pytest.raises(ValueError, match="repetitions is 0"):
        one.run(0)


def test_checks_are_found_in_order_and_by_name():
    names = [one.id for one in all_checks()]
    assert len(set(names)) == len(names)
    assert [one.id for one in chosen_checks(["i2", "R1"])] == ["R1", "I2"]
    assert chosen_checks([]) == all_checks()
    with pytest.raises(FedcoreError, match="unknown check 'R1y'; did you mean R1"):
        chosen_checks(["R1y"])
    assert set(PARTS) == set(catalog.ORDER)
    places = [catalog._place(name) for name in ("R2", "R3", "R3x", "R10", "A1", "G2", "FR", "N1")]
    assert places == sorted(places)
    with pytest.raises(FedcoreError, match="a check is called 'Q1'"):
        catalog._place("Q1")


def test_the_command_prints_rows_of_json(capsys):
    theory(check=["R1", "I2"], seeds=1, processes=1, json_=True)
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows] == ["R1", "I2"]
    for row, own in zip(rows, chosen_checks(["R1", "I2"]), strict=True):
        assert {"id", "claim", "source", "verdict", "measured", "bound", "holds"} <= set(row)
        assert (row["claim"], row["verdict"], row["holds"]) == (own.claim, own.verdict, True)
    assert rows[0]["samples"] == "1 rounds of each phase"
    assert rows[0]["also"][0]["relation"] == ">"


@pytest.mark.slow
def test_processes_find_what_one_process_finds(tmp_path):
    page = tmp_path / "deep" / "theory.html"
    app = typer.Typer()
    app.command()(theory)
    chosen = ["--check", "R1", "--seeds", "2", "--processes", "2"]
    done = CliRunner().invoke(app, [*chosen, "--report", str(page)])
    assert done.exit_code == 0, done.output
    printed = done.output
    assert re.search(r"R1 +exact alternation +holds", printed)
    here = run_checks(chosen_checks(["R1", "I2"]), 2, processes=1)
    apart = run_checks(chosen_checks(["R1", "I2"]), 2, processes=2)
    for one, other in zip(here, apart, strict=True):
        assert one.check is other.check
        assert one.outcome.measured == other.outcome.measured
    text = page.read_text()
    assert text.count("<svg") == 1
    assert "http" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)


def test_the_page_names_what_did_not_come_out(tmp_path):
    bad = outcome(Measured("error", 2.0, "<=", 1.0), Measured("count", math.nan, ">", 3))
    results = [Result(check("R1"), outcome(), 0.1), Result(check("G2", bad), bad, 0.1)]
    assert tables.failures(results) == ["G2: error is 2, not ≤ 1", "G2: count is nan, not > 3"]
    text = write_report(results, tmp_path / "a" / "t.html").read_text()
    assert "1 of 2 checks did not come out" in text
    assert "1 &lt; 2 &amp; &lt;b&gt;more&lt;/b&gt;" in text
    assert text.index('id="R1"') < text.index('id="G2"')
    fine = write_report(results[:1], tmp_path / "t.html").read_text()
    assert "every one came out" in fine


def test_a_check_that_does_not_come_out_ends_the_command_with_1(monkeypatch, capsys):
    from fedcore_theory import command

    bad = outcome(Measured("error", 2.0, "<=", 1.0))
    monkeypatch.setattr(
        command, "run_checks", lambda checks, *_, **__: [Result(check("R1", bad), bad, 0.1)]
    )
    with pytest.raises(typer.Exit) as stopped:
        theory(check=["R1"])
    assert stopped.value.exit_code == 1
    assert "R1: error is 2, not ≤ 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (574.0, "574"), (20000.0, "20,000"), (1.33e-15, "1.33e-15"), (0.25, "0.25"),
     (1e-7, "1e-7"), (math.nan, "nan"), (math.inf, "inf"), (1e300, "1e+300"), (-3.0, "-3")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert tables.number(value) == text


def test_the_command_line_finds_the_command():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    points = content["project"]["entry-points"]["fedcore.commands"]
    assert EntryPoint("theory", points["theory"], "fedcore.commands").load() is theory


def test_no_module_shadows_another_name():
    files = {one.measure.__module__ for one in all_checks()}
    assert len(files) == len(all_checks())
    for one in all_checks():
        place = one.measure.__module__.rpartition(".")[2].partition("_")[0]
        number = re.fullmatch(r"([A-Z]+)(\d*)([a-z]*)", one.id)
        assert place == f"{number[1].lower()}{number[2].zfill(2) if number[2] else ''}{number[3]}"
