"""`fedcore methods` and `fedcore recipes`: what there is."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedcore.methods import describe_methods
from fedcore.recipes import load_recipe, shipped_recipes

_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON array of flat objects.")]


def methods(json_: _AsJson = False) -> None:
    """List every aggregation method with its traits and traffic."""
    rows = describe_methods()
    if json_:
        print(json.dumps(rows))
        return
    console = Console()
    what = _table("Methods", "method", "what it is", "source")
    traits = _table(
        "Traits; up and down in numbers per adapted matrix, client and round",
        *("method", "exact", "linear", "mixed ranks", "up", "down"),
    )
    yes = {True: "yes", False: "no"}
    for row in rows:
        what.add_row(row["name"], row["summary"], row["paper"])
        flags = yes[row["linear"]], yes[row["mixed_ranks"]]
        traits.add_row(row["name"], row["exact"], *flags, row["uplink"], row["downlink"])
    console.print(what)
    console.print(traits)


def _table(title: str, first: str, *others: str) -> Table:
    """A plain table whose first column is never broken."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, overflow="fold")
    return table


def recipes(json_: _AsJson = False) -> None:
    """List the recipes that can be run by name."""
    found = [load_recipe(name) for name in shipped_recipes()]
    rows = [
        {
            "name": r.name,
            "description": r.description,
            "rounds": r.rounds,
            "clients": r.clients,
            "method": r.method.name,
        }
        for r in found
    ]
    if json_:
        print(json.dumps(rows))
        return
    table = _table("Recipes", *rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
