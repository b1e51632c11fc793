"""`fedcore methods` and `fedcore recipes`: what there is."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedcore.data.adapter_fields import FIELDS
from fedcore.errors import FedcoreError
from fedcore.methods import describe_methods
from fedcore.recipes import load_recipe, shipped_recipes
from fedcore.reports.adapters_table import adapters_markdown
from fedcore.reports.methods_table import cell, methods_markdown

_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON array of flat objects.")]
_AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print one Markdown table.")]


def methods(json_: _AsJson = False, markdown: _AsMarkdown = False) -> None:
    """List every aggregation method with its traits and traffic."""
    if json_ and markdown:
        raise FedcoreError("--json and --markdown are two formats; pass one of them")
    rows = describe_methods()
    if json_:
        print(json.dumps(rows))
        return
    if markdown:
        print(methods_markdown(rows), end="")
        return
    what = _table("Methods", "method", "what it is", "source")
    promises = ("exact", "linear", "mixed ranks", "personalised")
    traits = _table("Traits", "method", *promises)
    traffic = _table(
        "Costs per adapted matrix and round: numbers up and down for a client, flops on the server",
        *("method", "up", "down", "server"),
    )
    for row in rows:
        what.add_row(row["name"], row["summary"], row["paper"])
        traits.add_row(row["name"], *(cell(row[promise.replace(" ", "_")]) for promise in promises))
        traffic.add_row(*(row[key] for key in ("name", "uplink", "downlink", "server_cost")))
    console = Console()
    for table in (what, traits, traffic):
        console.print(table)


def adapters(markdown: _AsMarkdown = False) -> None:
    """List the kinds of adapters and the configuration fields that are accepted, and why."""
    if markdown:
        print(adapters_markdown(), end="")
        return
    console = Console()
    for kind, rules in FIELDS.items():
        table = _table(kind, "field", "accepted", "why")
        for field, rule in rules.items():
            accepted = ", ".join(map(str, rule.accepted)) or rule.use
            table.add_row(field, accepted, "; ".join(filter(None, (rule.why, rule.remedy))))
        console.print(table)


def _table(title: str, first: str, *others: str) -> Table:
    """A plain table whose first column is never broken."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, overflow="fold")
    return table


def recipes(json_: _AsJson = False) -> None:
    """List the recipes that can be run by name."""
    shipped = [load_recipe(name) for name in shipped_recipes()]
    rows = [
        {
            "name": r.name,
            "description": r.description,
            "rounds": r.rounds,
            "clients": r.clients,
            "method": r.method.name,
        }
        for r in shipped
    ]
    if json_:
        print(json.dumps(rows))
        return
    table = _table("Recipes", *rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
