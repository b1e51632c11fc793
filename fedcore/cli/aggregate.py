"""`fedcore aggregate`: PEFT adapters on disk into one."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedcore.errors import FedcoreError
from fedcore.recipes import parse_settings

if TYPE_CHECKING:
    from fedcore.merging import Aggregated, MethodError


def aggregate(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT adapter folders.")],
    out: Annotated[Path, typer.Option(help="Folder for the result; empty or not there yet.")],
    method: Annotated[str, typer.Option(help="Aggregation method.")] = "product_svd",
    rank: Annotated[
        int | None, typer.Option(help="Rank of the result; the largest of the adapters' if unset.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="As 3,1,1 or a JSON file: a list, or folders and their weights."),
    ] = None,
    previous: Annotated[
        Path | None, typer.Option(help="Adapter that all started from, to align the result to.")
    ] = None,
    drop_invalid: Annotated[
        bool, typer.Option("--drop-invalid", help="Leave bad adapters out instead of stopping.")
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(help="An option of the method, as key=value; may be repeated."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp64, fp32, fp16 or bf16; that of the first adapter.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Errors of this and other methods.")
    ] = True,
    keep_patterns: Annotated[
        bool,
        typer.Option(
            "--keep-patterns",
            help="Let modules keep ranks of their own, for readers that honour rank_pattern.",
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model's name, where adapters name one model differently; a folder with "
            "its weights shows the error of merged DoRA weights."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapter in a folder of nothing else.")
    ] = False,
) -> None:
    """Aggregate PEFT adapters into one that PEFT loads; nothing is written unless all succeeds."""
    from fedcore.merging import aggregate as run

    errors = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    ) as bars:
        task = bars.add_task("module groups", total=None)
        result = run(
            adapters,
            _weights(weights),
            method=method,
            rank=rank,
            out=out,
            options=parse_settings(option or []),
            previous=previous,
            on_invalid="drop" if drop_invalid else "raise",
            dtype=dtype,
            compare=compare,
            keep_patterns=keep_patterns,
            base=base,
            overwrite=overwrite,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    _show(Console(), result, out)


def _weights(text: str | None) -> Any:
    """``3,1,1`` as a list, or what a JSON file holds."""
    if text is None:
        return None
    if Path(text).suffix == ".json":
        from fedcore.data.folders import read_json

        return read_json(Path(text), "--weights")
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise FedcoreError(
            f"--weights is {text!r}; pass numbers separated by commas or a .json file"
        ) from None


def _show(console: Console, result: Aggregated, out: Path) -> None:
    from fedcore.merging.result import RESIDUAL_FOLDER

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    if result.errors:
        console.print(_table(result.errors))
        refused = [row for row in result.errors if row.refused]
        for row in refused:
            say(f"{row.method}: {row.refused}")
    for dropped in result.dropped:
        say(f"left out {dropped.client_id}: {dropped.reason}")
    for flag in result.flags:
        say(f"note: {flag}")
    if result.merged_error is not None:
        say(f"error of the merged weights, relative to their change: {result.merged_error:.2e}")
    say(f"exact: {'yes' if result.exact else 'no'}")
    if result.residual is not None:
        say(f"adapter: {out}, to be added to {out / RESIDUAL_FOLDER}")
    else:
        say(f"adapter: {out}")


def _table(rows: tuple[MethodError, ...]) -> Table:
    table = Table(
        title="Error against the exact mean of the updates, ‖M - result‖ / ‖M‖ (Frobenius)",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("method", no_wrap=True)
    for column in ("error", "worst module", "rank", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("in", overflow="fold")
    for row in rows:
        name = f"{row.method} *" if row.chosen else row.method
        if row.refused:
            table.add_row(name, *["-"] * 4, "cannot be used here")
            continue
        errors = (_error(row.error), _error(row.worst))
        table.add_row(name, *errors, str(row.rank), _size(row.bytes), escape(row.worst_module))
    return table


def _error(value: float) -> str:
    return "-" if isnan(value) else "0" if value == 0 else f"{value:.2e}"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
