"""`fedcore theory`: run the checks, print them beside their bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedcore_theory.catalog import chosen_checks
from fedcore_theory.report import write_report
from fedcore_theory.running import Result, run_checks
from fedcore_theory.tables import failures, results_grid


def theory(
    check: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Only this check; may be repeated.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Cases of each check; its own number by default.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Checks at a time; the cores by default.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON array of rows.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write a page with a figure for each check.")
    ] = None,
) -> None:
    """Check the papers' claims in numbers, on toy models and the shipped methods.

    Exit status 1 if a check does not come out as its verdict says.
    """
    chosen = chosen_checks(check or [])
    shown = Console(stderr=json_)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=shown,
        transient=True,
        disable=not shown.is_terminal,
    ) as bars:
        task = bars.add_task("checking", total=len(chosen))

        def done(result: Result) -> None:
            bars.update(task, advance=1, description=f"checked {result.check.id}")

        results = run_checks(chosen, seeds, processes=processes, done=done)
    if json_:
        print(json.dumps([result.row() for result in results], indent=1))
    else:
        shown.print(results_grid(results).rich())
        for line in failures(results):
            shown.print(line, style="bold", markup=False, highlight=False)
    if report is not None:
        page = write_report(results, report)
        shown.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    if failures(results):
        raise typer.Exit(1)
