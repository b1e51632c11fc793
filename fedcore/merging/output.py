"""Adapters to a folder, whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedcore.data.adapter_state import AdapterState
from fedcore.data.folders import is_free, replace_folder, writing
from fedcore.data.peft_files import CONFIG_FILE, write_adapter
from fedcore.errors import FedcoreError

RESIDUAL_FOLDER = "residual"


def check_output(out: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Refuse a folder that must not be written to, before anything is computed.

    Raises:
        FedcoreError: it is no folder; it is not empty and ``overwrite`` is false, or it holds no
            adapter that could be overwritten; or it holds one of the ``inputs``.
    """
    with writing(out):
        place = out.resolve()
        exists = out.exists() or out.is_symlink()
    for source in inputs:
        if source.resolve().is_relative_to(place):
            raise FedcoreError(f"out is {out}, which holds the adapter {source}; pass another")
    if not exists:
        return
    if not out.is_dir():
        raise FedcoreError(f"out is {out}, which is no folder; pass another")
    if is_free(out):
        return
    if not overwrite:
        raise FedcoreError(f"out is {out}, which is not empty; pass another or overwrite it")
    if not (out / CONFIG_FILE).is_file():
        raise FedcoreError(f"out is {out}, which holds no adapter and is not overwritten")


def write_folder(out: Path, adapter: AdapterState, residual: AdapterState | None) -> None:
    """Write the adapter to ``out``, a residual to ``out/residual``; the folder appears at once.

    Raises:
        FedcoreError: the folder cannot be written; what was there before is still there.
    """
    with replace_folder(out) as new:
        write_adapter(adapter, new)
        if residual is not None:
            write_adapter(residual, new / RESIDUAL_FOLDER)
