"""`fedcore flower-app`: a recipe as a folder that Flower runs on many machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedcore.recipes import load_recipe, parse_settings


def flower_app(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a TOML file.")],
    folder: Annotated[Path, typer.Argument(help="Folder for the app; must be empty.")],
    out: Annotated[Path, typer.Option(help="Run folder, on the server's machine.")],
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the replies of a round.")
    ] = 3600.0,
    install: Annotated[
        list[str] | None,
        typer.Option(help="A package that Flower is to install for the app; may be repeated."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any recipe key, as key=value; may be repeated."),
    ] = None,
) -> None:
    """Write a recipe as an app for flwr run: SuperNode i, by its partition-id, is client i."""
    chosen = load_recipe(recipe, parse_settings(set_ or []))
    from fedcore.transports.flower.apps import write_app

    write_app(chosen, folder, out=out, timeout=timeout, dependencies=install or [])
    expected = chosen.round.expected
    who = f"{chosen.clients} clients" if expected is None else f"{expected} sites"
    Console().print(
        f"app: {folder}  ({who}, {chosen.rounds} rounds; flwr run {folder})",
        highlight=False,
        soft_wrap=True,
    )
