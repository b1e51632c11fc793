"""`fedcore export`: an adapter as plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def export(
    adapter: Annotated[Path, typer.Argument(help="A PEFT folder of type lora, gram or tri.")],
    out: Annotated[Path, typer.Option(help="Folder for the LoRA adapter.")],
) -> None:
    """Write an adapter as plain LoRA of one rank and scale 1, which every server loads; exact."""
    from fedcore.tuners import export_lora

    export_lora(adapter, out)
    Console().print(f"LoRA adapter: {out}", highlight=False, soft_wrap=True)
