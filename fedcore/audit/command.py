"""`fedcore audit`: what a server can draw from one upload, by the kind of upload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedcore.audit.attack import AuditSettings, run_audit
from fedcore.audit.network import UPLOADS


def audit(
    uploads: Annotated[
        str, typer.Option(help=f"Separated by commas, or all: {', '.join(UPLOADS)}.")
    ] = "all",
    batch: Annotated[int, typer.Option(min=1, help="Pictures in the client's step.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, from 0 up.")] = 5,
    rank: Annotated[int, typer.Option(min=1, help="Of every adapter, at most 10.")] = 4,
    layers: Annotated[int, typer.Option(min=1, help="Linear layers, all adapted.")] = 3,
    warm_up: Annotated[
        int, typer.Option(min=0, help="Steps the adapter has trained before; 0: at its start.")
    ] = 20,
    starts: Annotated[int, typer.Option(min=1, help="Random starts of the attack.")] = 4,
    steps: Annotated[int, typer.Option(min=0, help="Steps of Adam, on the cosine.")] = 400,
    refinements: Annotated[
        int, typer.Option(min=0, help="Iterations of L-BFGS after them, on the distance.")
    ] = 400,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page, the pictures and the rows.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON array of rows.")] = False,
) -> None:
    """Attack single uploads by gradient matching and show what comes out.

    Pictures of 8 x 8 through a small network; the attacker knows all but the pictures. A failed
    attack is no guarantee.
    """
    from fedcore.audit.page import audit_grid, audit_rows, findings, write_audit

    names = tuple(name.strip() for name in uploads.split(",") if name.strip())
    settings = AuditSettings(
        uploads=tuple(UPLOADS) if names == ("all",) else names,
        batch=batch,
        seeds=seeds,
        rank=rank,
        layers=layers,
        warm_up=warm_up,
        starts=starts,
        steps=steps,
        refinements=refinements,
    )
    shown = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=shown,
        transient=True,
        disable=not shown.is_terminal,
    ) as bars:
        task = bars.add_task("attacking", total=len(settings.uploads) * settings.seeds)
        result = run_audit(
            settings, lambda what: bars.update(task, advance=1, description=f"attacked {what}")
        )
    page = None if out is None else write_audit(result, out)
    if json_:
        print(json.dumps(audit_rows(result)))
        return
    console = Console()
    console.print(audit_grid(result).rich())
    for sentence in findings(result):
        console.print(sentence, markup=False, highlight=False)
    if page is not None:
        console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
