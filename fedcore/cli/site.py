"""`fedcore site`: what a site would read, train and upload, and a round of it through folders."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedcore.cli.progress import ProgressDisplay
from fedcore.errors import FedcoreError
from fedcore.recipes import load_recipe, parse_settings

if TYPE_CHECKING:
    from fedcore.experiments.site_check import SiteCheck
    from fedcore.training.site_settings import SiteSettings

site = typer.Typer(no_args_is_help=True, help="A site that owns its data.")


@site.callback()
def _group() -> None:
    """A site that owns its data."""


Data = Annotated[Path | None, typer.Option(help="The file of the site's rows.")]
TestData = Annotated[
    Path | None, typer.Option(help="The file of its held-out rows; unset, data are split.")
]
Columns = Annotated[
    str | None, typer.Option(help="File column : recipe column, as in q:prompt,a:completion.")
]
Name = Annotated[str, typer.Option(help="The site's name, which its split depends on.")]
Settings = Annotated[
    Path | None, typer.Option(help="A TOML file of all the site's settings instead.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any recipe key, as key=value; may be repeated."),
]
RecipeName = Annotated[str, typer.Option(help="A recipe's name, or a TOML file.")]


@site.command()
def check(
    recipe: RecipeName,
    data: Data = None,
    test_data: TestData = None,
    columns: Columns = None,
    site: Name = "site",
    settings: Settings = None,
    set_: Assignments = None,
) -> None:
    """Show what a site would read, train and upload; no row is printed and nothing is sent."""
    chosen_site = _settings(data, test_data, columns, site, settings)
    chosen = load_recipe(recipe, parse_settings(set_ or []))
    # Imported once recipe and settings are known to be sound: it loads transformers.
    from fedcore.experiments.site_check import check_site

    console = Console(width=80)
    for name, value in _lines(check_site(chosen, chosen_site)):
        console.print(f"{name:<20} {value}", highlight=False)


@site.command("train")
def train_round(
    recipe: RecipeName,
    broadcast: Annotated[Path, typer.Option(help="The folder that the server sent.")],
    upload: Annotated[Path, typer.Option(help="The folder that goes back to it.")],
    data: Data = None,
    test_data: TestData = None,
    columns: Columns = None,
    site: Name = "site",
    settings: Settings = None,
    set_: Assignments = None,
) -> None:
    """Train one round of a recipe on a site's rows, from a broadcast folder to an upload folder."""
    chosen_site = _settings(data, test_data, columns, site, settings)
    chosen = load_recipe(recipe, parse_settings(set_ or []))
    from fedcore.transports.folder_sites import train_site

    with ProgressDisplay(Console(stderr=True)) as display:
        folder = train_site(chosen, chosen_site, broadcast, upload, display)
    Console().print(f"upload: {folder}", highlight=False, soft_wrap=True)


def _settings(
    data: Path | None,
    test_data: Path | None,
    columns: str | None,
    site: str,
    settings: Path | None,
) -> SiteSettings:
    """What the options say of the site.

    Raises:
        FedcoreError: neither or both of data and settings, or settings without data.
    """
    from fedcore.training.site_settings import SiteSettings, read_site_settings

    if (settings is None) == (data is None):
        raise FedcoreError("pass --data with the site's file, or --settings with its TOML file")
    if settings is not None:
        if test_data is not None or columns is not None:
            raise FedcoreError("--test-data and --columns belong to --data; put them into the file")
        chosen = read_site_settings(settings)
        if not chosen.owns_data:
            raise FedcoreError(f"{settings} has no data; set site and data in it")
        return chosen
    given = {"site": site, "data": data, "test-data": test_data, "columns": columns}
    values = {name: str(value) for name, value in given.items() if value is not None}
    return SiteSettings.read(values, "the command line")


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
