"""PEFT adapter folders: ``adapter_model.safetensors`` and ``adapter_config.json``, in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.folders import open_regular, read_object, write_bytes, write_files
from fedcore.data.tensor_file import TensorFile
from fedcore.errors import FedcoreError, missing_extra

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

DEFAULT_BUDGET = 8 * 2**30
"""Bytes of adapter weights that are read unless the caller allows more."""

# One key only: safetensors writes several metadata keys in random order, and equal adapters
# must give equal files.
_METADATA = {"format": "pt"}


def read_adapter(
    folder: str | Path, *, name: str | None = None, budget: int = DEFAULT_BUDGET
) -> AdapterState:
    """Read a PEFT adapter folder without loss.

    Args:
        folder: holds ``adapter_model.safetensors`` and ``adapter_config.json``.
        name: what to call the adapter in errors; the folder's path by default.
        budget: refuse weight files larger than this many bytes, before reading them.

    Raises:
        FedcoreError: a file is missing, malformed or over the budget, only pickled weights are
            there, or the tensors do not fit the configuration.
    """
    weights, config = open_adapter(folder, name=name, budget=budget)
    return AdapterState.from_peft(weights.read(weights.tensors), config, name=weights.label)


def open_adapter(
    folder: str | Path, *, name: str | None = None, budget: int = DEFAULT_BUDGET
) -> tuple[TensorFile, dict[str, Any]]:
    """The weights of a PEFT adapter folder, with a checked header and unread, and its config.

    Raises:
        FedcoreError: as :func:`read_adapter`, except for what only the tensors' values could show.
    """
    path = Path(folder)
    label = name or str(path)
    weights, config_file = path / WEIGHTS_FILE, path / CONFIG_FILE
    if not config_file.is_file():
        raise FedcoreError(f"{label}: {config_file} is missing")
    if not weights.is_file():
        pickled = path / "adapter_model.bin"
        reason = "only pickled weights are there, which are never loaded; " * pickled.is_file()
        raise FedcoreError(f"{label}: {weights} is missing; {reason}save with safetensors")
    config = read_object(config_file, label)
    return TensorFile.open(weights, label, budget), config


def write_adapter(state: AdapterState, folder: str | Path) -> Path:
    """Write ``state`` as a PEFT adapter folder; both files appear whole, or none does.

    Equal states give byte-identical files. Other files of the folder stay. Returns the folder.

    Raises:
        FedcoreError: the folder cannot be written; what was there before is still there.
    """
    path = Path(folder)
    config = json.dumps(_jsonable(state.config), indent=2, sort_keys=True) + "\n"
    weights = _tensor_bytes(state.to_peft())
    write_files(path, {WEIGHTS_FILE: weights, CONFIG_FILE: config.encode()})
    return path


def read_tensors(file: Path, label: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FedcoreError: the file is malformed, naming ``label`` and the file.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise missing_extra("safetensors", "data") from error
    try:
        open_regular(file).close()
        return load_file(str(file))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise FedcoreError(f"{label}: cannot read {file}: {error}") from error


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file, whole or not at all; equal tensors give equal bytes.

    Raises:
        FedcoreError: it cannot be written.
    """
    write_bytes(_tensor_bytes(tensors), file)


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise missing_extra("safetensors", "data") from error
    return save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata=_METADATA)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_jsonable(item) for item in value)
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value
