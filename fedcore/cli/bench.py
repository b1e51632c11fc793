"""`fedcore bench kernels` and `fedcore bench server`: timings against what people run today.

The benchmarks live in the repository's folder ``bench`` and are not in the wheel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedcore.cli.checkout import checkout_module

bench = typer.Typer(
    no_args_is_help=True, help="Time the operations, or whole server rounds (from a checkout)."
)

_Path = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="With --json, the file to write.")
]
_Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch; its own default.")]
_Repeats = Annotated[int, typer.Option(min=1, help="Timed calls; slow ones get fewer, at least 3.")]
_Device = Annotated[str, typer.Option(help="cpu or cuda.")]
_AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON array of rows, printed or written to FILE.")
]
_Out = Annotated[Path | None, typer.Option(help="Folder for the table, the rows and the figure.")]
_Small = Annotated[bool, typer.Option("--small", help="A few modules of the smaller model alone.")]


@bench.command()
def kernels(
    file: _Path = None,
    threads: _Threads = None,
    repeats: _Repeats = 15,
    device: _Device = "cpu",
    json_: _AsJson = False,
    out: _Out = None,
    small: _Small = False,
) -> None:
    """Time every operation on its own, against the libraries' and plain torch."""
    request = _request(file, threads, repeats, device, json_, out, small)
    checkout_module("bench", "command").run_kernels(request)


@bench.command()
def server(
    file: _Path = None,
    against: Annotated[
        str,
        typer.Option(
            help="published, eager, batched, mean, peft, adam, several with commas, or all.",
        ),
    ] = "all",
    threads: _Threads = None,
    repeats: _Repeats = 15,
    device: _Device = "cpu",
    json_: _AsJson = False,
    out: _Out = None,
    small: _Small = False,
) -> None:
    """Time whole rounds of known models, against what people run today."""
    request = _request(file, threads, repeats, device, json_, out, small)
    checkout_module("bench", "command").run_server(request, against)


def _request(
    file: Path | None,
    threads: int | None,
    repeats: int,
    device: str,
    as_json: bool,
    out: Path | None,
    small: bool,
) -> Any:
    session = checkout_module("bench", "session")
    return session.Request(device, threads, repeats, small, as_json, file, out)
