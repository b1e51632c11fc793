"""`fedcore methods` in its three formats."""

import json
import re
import sys

import pytest

from fedcore.cli import main
from fedcore.methods import describe_methods
from fedcore.methods.registry import default_methods
from fedcore.reports.methods_table import methods_markdown


@pytest.fixture
def listed(monkeypatch, capsys):
    def run(*arguments, columns="100"):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setattr(sys, "argv", ["fedcore", "methods", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, capsys.readouterr()

    return run


def test_markdown_is_the_table_of_the_documentation(listed):
    code, printed = listed("--markdown")
    assert code == 0
    assert printed.out == methods_markdown(describe_methods())


def test_two_formats_at_once_are_refused(listed):
    code, printed = listed("--markdown", "--json")
    assert code == 2
    assert printed.err == ("fedcore: --json and --markdown are two formats; pass one of them\n")
    assert printed.out == ""


def test_tables_show_every_trait_whole_within_a_hundred_columns(listed):
    _, printed = listed()
    lines = printed.out.splitlines()
    assert max(map(len, lines)) <= 100
    headings = [line.split("  ") for line in lines if line.startswith("  method")]
    words = [word.strip() for heading in headings for word in heading if word.strip()]
    assert words == [
        *("method", "what it is", "source"),
        *("method", "exact", "linear", "mixed ranks", "personalised"),
        *("method", "up", "down", "server"),
    ]
    flags = {True: "yes", False: "no"}
    traits = lines[next(i for i, line in enumerate(lines) if line.startswith("Traits")) :]
    for method in default_methods():
        first = next(line for line in traits if line.split()[:1] == [method.name])
        able = method.capabilities
        expected = [flags[v] for v in (able.linear, able.mixed_ranks, able.personalised)]
        assert first.split()[-3:] == expected


def test_json_is_what_the_catalog_describes(listed):
    _, printed = listed("--json")
    assert json.loads(printed.out) == describe_methods()


def test_costs_stand_under_their_headings(listed):
    _, printed = listed(columns="400")
    text = printed.out
    rows = [re.split(" {2,}", line.strip()) for line in text[text.index("Costs") :].splitlines()]
    for method in default_methods():
        about = method.description
        assert [method.name, about.uplink, about.downlink, about.server_cost] in rows
