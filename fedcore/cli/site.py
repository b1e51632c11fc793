"""`fedcore site check`: what a site would read, train and upload, before it joins a federation."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedcore.errors import FedcoreError
from fedcore.recipes import load_recipe, parse_settings

if TYPE_CHECKING:
    from fedcore.experiments.site_check import SiteCheck

site = typer.Typer(no_args_is_help=True, help="A site that owns its data.")


@site.callback()
def _group() -> None:
    """A site that owns its data."""


@site.command()
def check(
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a TOML file.")],
    data: Annotated[Path | None, typer.Option(help="The file of the site's rows.")] = None,
    test_data: Annotated[
        Path | None, typer.Option(help="The file of its held-out rows; unset, data are split.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="File column : recipe column, as in q:prompt,a:completion.")
    ] = None,
    site: Annotated[
        str, typer.Option(help="The site's name, which its split depends on.")
    ] = "site",
    settings: Annotated[
        Path | None, typer.Option(help="A TOML file of all the site's settings instead.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any recipe key, as key=value; may be repeated."),
    ] = None,
) -> None:
    """Show what a site would read, train and upload; no row is printed and nothing is sent."""
    from fedcore.training.site_settings import SiteSettings, read_site_settings

    if (settings is None) == (data is None):
        raise FedcoreError("pass --data with the site's file, or --settings with its TOML file")
    if settings is not None:
        if test_data is not None or columns is not None:
            raise FedcoreError("--test-data and --columns belong to --data; put them into the file")
        chosen_site = read_site_settings(settings)
        if not chosen_site.owns_data:
            raise FedcoreError(f"{settings} has no data; set site and data in it")
    else:
        given = {"site": site, "data": data, "test-data": test_data, "columns": columns}
        values = {name: str(value) for name, value in given.items() if value is not None}
        chosen_site = SiteSettings.read(values, "the command line")
    chosen = load_recipe(recipe, parse_settings(set_ or []))
    # Imported once recipe and settings are known to be sound: it loads transformers.
    from fedcore.experiments.site_check import check_site

    console = Console(width=80)
    for name, value in _lines(check_site(chosen, chosen_site)):
        console.print(f"{name:<20} {value}", highlight=False)


def _lines(report: SiteCheck) -> list[tuple[str, str]]:
    lengths = report.lengths
    return [
        ("site", report.site),
        ("rows", f"{report.rows} read, {report.duplicates} repeated rows left out"),
        ("training rows", str(report.train)),
        ("held-out rows", str(report.test)),
        (
            "tokens of a row",
            f"{min(lengths)} / {median(lengths):g} / {max(lengths)} (min/median/max)",
        ),
        (
            "long rows" if report.overlong else "truncated rows",
            f"{report.truncated} beyond max_length = {report.max_length}",
        ),
        *([("rows", report.overlong)] if report.overlong else []),
        ("steps per round", str(report.steps)),
        ("trained numbers", str(report.parameters)),
        ("upload per round", f"{report.upload_bytes} bytes"),
        ("weight", report.weight),
        ("memory of a step", _memory(report)),
    ]


def _memory(report: SiteCheck) -> str:
    memory = report.memory
    if memory is None:
        return "not known for these weights"
    weights, step = (f"{size / 1e9:.2f} GB" for size in (memory.weights, memory.step))
    return f"{weights} of weights and {step}, an estimate"
