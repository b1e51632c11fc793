"""`fedcore compare`: methods x seeds x recipe keys, one table and one page."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedcore.cli.progress import ProgressDisplay
from fedcore.data.folders import write_files
from fedcore.errors import FedcoreError
from fedcore.experiments.trials import plan_trials
from fedcore.federation.measures import measure_of
from fedcore.recipes import parse_settings, parse_value


def compare(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or a TOML file.")],
    methods: Annotated[
        str, typer.Option(help="Methods to compare, separated by commas, or all.")
    ] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0 up.")] = 3,
    vary: Annotated[
        list[str] | None,
        typer.Option(help="Recipe key and values, as clients=5,20,50; may be repeated."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any recipe key, as key=value.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for all runs; continued if it exists.")
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the table as one JSON array of rows.")
    ] = False,
) -> None:
    """Compare methods on a recipe: mean and 95% interval over seeds, traffic, one page."""
    from fedcore.reports.page import write_comparison_page
    from fedcore.reports.reading import read_run
    from fedcore.reports.tables import comparison_markdown, comparison_rows, comparison_table

    names = [name.strip() for name in methods.split(",") if name.strip()]
    trials = plan_trials(
        recipe, names, range(seeds), _parse_vary(vary or []), parse_settings(set_ or [])
    )
    # Imported once every trial is known to be sound: it loads transformers.
    from fedcore.experiments.run import run_trials

    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = out or Path("runs") / f"compare-{trials[0].recipe.name}-{stamp}"
    console = Console(stderr=True)
    records, varied = [], []
    with ProgressDisplay(console, measure=measure_of(trials[0].recipe.task)) as display:
        try:
            for done, (trial, _) in enumerate(run_trials(trials, folder, display), start=1):
                records.append(read_run(folder / trial.folder))
                varied.append(dict(trial.varied))
                display.message(f"{trial.folder}: done, {done} of {len(trials)}")
        except KeyboardInterrupt:
            display.message(f"interrupted; repeat the command with --out {folder} to continue")
            raise typer.Exit(130) from None
    rows = comparison_rows(records, varied)
    texts = {
        "comparison.json": json.dumps(rows, indent=2) + "\n",
        "comparison.md": comparison_markdown(rows),
    }
    write_files(folder, {name: text.encode() for name, text in texts.items()})
    page = write_comparison_page(records, folder / "comparison.html", varied)
    if json_:
        print(json.dumps(rows))
        return
    out_console = Console()
    out_console.print(comparison_table(rows))
    out_console.print(f"report: {page}", highlight=False, soft_wrap=True)


def _parse_vary(assignments: list[str]) -> dict[str, list[Any]]:
    """``["clients=5,20"]`` as ``{"clients": [5, 20]}``."""
    varied: dict[str, list[Any]] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        values = [parse_value(part.strip()) for part in text.split(",") if part.strip()]
        if not equals or not values:
            raise FedcoreError(f"{assignment!r} is not of the form key=value,value")
        varied[key.strip()] = values
    return varied
