"""The command line: ``fedcore run``, ``compare``, ``evaluate``, ``aggregate``, ``export``,
``bench``, ``site``, ``flower-app`` and lists.

Other distributions and rooms add commands through the entry-point group ``fedcore.commands``: each
entry point is a function that becomes a command of the entry point's name.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

from fedcore.errors import FedcoreError, MissingExtraError, missing_extra


def main() -> None:
    """Run the command line; a wrong input ends with one line and exit status 2."""
    try:
        app = _build()
        app()
    except (FedcoreError, MissingExtraError) as error:
        print(f"fedcore: {error}", file=sys.stderr)
        sys.exit(2)


def _build():  # type: ignore[no-untyped-def]  # typer is optional and imported here
    try:
        import typer

        from fedcore.cli import (
            aggregate,
            bench,
            compare,
            evaluate,
            export,
            flower_app,
            listing,
            run,
            site,
        )
    except ImportError as error:
        raise missing_extra(error.name or "a dependency", "run") from error
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Federated fine-tuning with low-rank adapters.",
    )
    app.command()(run.run)
    app.command()(compare.compare)
    app.command("evaluate")(evaluate.evaluate_answers)
    app.command()(aggregate.aggregate)
    app.command()(listing.methods)
    app.command()(listing.adapters)
    app.command()(listing.recipes)
    app.command()(export.export)
    app.command("flower-app")(flower_app.flower_app)
    app.add_typer(bench.bench, name="bench")
    app.add_typer(site.site, name="site")
    for entry in sorted(entry_points(group="fedcore.commands"), key=lambda point: point.name):
        app.command(name=entry.name)(entry.load())
    return app
