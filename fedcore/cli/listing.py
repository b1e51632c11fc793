"""`fedcore methods` and `fedcore recipes`: what there is."""

from __future__ import annotations

import json
from typing import Annotated

import typer
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
    table = Table(
        title="methods; numbers sent per adapted matrix, client and round", title_justify="left"
    )
    for column in (
        "method",
        "what it is",
        "exact",
        "linear",
        "mixed ranks",
        "up",
        "down",
        "source",
    ):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            row["name"],
            row["summary"],
            row["exact"],
            "yes" if row["linear"] else "no",
            "yes" if row["mixed_ranks"] else "no",
            row["uplink"],
            row["downlink"],
            row["paper"],
        )
    Console().print(table)


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
    table = Table(title="recipes", title_justify="left")
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
