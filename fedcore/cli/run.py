"""`fedcore run`: one federated fine-tuning job, with progress, table and report."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedcore.cli.progress import ProgressDisplay
from fedcore.errors import FedcoreError
from fedcore.federation.measures import measure_of
from fedcore.recipes import Recipe, load_recipe, parse_settings


def run(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe's name, such as bbc-news, or a TOML file.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Aggregation method; see fedcore methods.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds to run.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random in the run.")] = None,
    engine: Annotated[str | None, typer.Option(help="Where clients run: local, flower.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the run; must be empty.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any recipe key, as key=value; may be repeated."),
    ] = None,
    resume_: Annotated[
        Path | None, typer.Option("--resume", help="Continue the run in this folder.")
    ] = None,
    from_round: Annotated[
        int | None,
        typer.Option(min=0, help="Resume after so many rounds and discard those after them."),
    ] = None,
) -> None:
    """Run a federated fine-tuning job, or continue one that was interrupted."""
    console = Console(stderr=True)
    if (recipe is None) == (resume_ is None):
        raise FedcoreError("pass a recipe, or --resume with a run's folder")
    if from_round is not None and resume_ is None:
        raise FedcoreError("--from-round needs --resume with a run's folder")
    if resume_ is not None:
        given: dict[str, Any] = {"--method": method, "--rounds": rounds, "--seed": seed}
        given |= {"--engine": engine, "--out": out, "--set": set_}
        for option, value in given.items():
            if value is not None:
                raise FedcoreError(f"{option} cannot change a run that is resumed")
        folder = resume_
    else:
        chosen = _resolve(str(recipe), method, rounds, seed, engine, set_ or [])
        folder = out or _fresh_folder(chosen)
    # Imported once the recipe is known to be sound: it loads transformers.
    from fedcore.experiments.run_folder import RunFolder
    from fedcore.transports.choice import find_engine

    if resume_ is not None:
        chosen = RunFolder.open(folder).recipe()
    chosen_engine = find_engine(chosen.engine)
    with ProgressDisplay(console, measure=measure_of(chosen.task)) as display:
        try:
            if resume_ is not None:
                chosen_engine.resume(folder, display, from_round=from_round)
            else:
                chosen_engine.start(chosen, folder, display)
        except KeyboardInterrupt:
            if RunFolder.is_there(folder):
                display.message(f"interrupted; continue with: fedcore run --resume {folder}")
            raise typer.Exit(130) from None
    _show(folder)


def _resolve(
    recipe: str,
    method: str | None,
    rounds: int | None,
    seed: int | None,
    engine: str | None,
    assignments: list[str],
) -> Recipe:
    settings: dict[str, Any] = parse_settings(assignments)
    given = {"method.name": method, "rounds": rounds, "seed": seed, "engine": engine}
    settings |= {key: value for key, value in given.items() if value is not None}
    return load_recipe(recipe, settings)


def _fresh_folder(recipe: Recipe) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{recipe.name}-{recipe.method.create().name}-seed{recipe.seed}-{stamp}"


def _show(folder: Path) -> None:
    """Print the run's tables and write its page."""
    from fedcore.reports.answers import answer_grids
    from fedcore.reports.grid import stacked
    from fedcore.reports.page import write_run_page
    from fedcore.reports.reading import read_run
    from fedcore.reports.tables import final_table, run_table

    record = read_run(folder)
    console = Console()
    console.print(run_table(record))
    console.print(final_table(record))
    if record.answers is not None:
        console.print(stacked(*answer_grids(record.answers)))
    page = write_run_page(folder)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
