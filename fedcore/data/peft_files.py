"""PEFT adapter folders: ``adapter_model.safetensors`` and ``adapter_config.json``, in and out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.tensor_file import TensorFile
from fedcore.errors import FedcoreError, missing_extra

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

DEFAULT_BUDGET = 8 * 2**30
"""Bytes of adapter weights that are read unless the caller allows more."""

_CONFIG_LIMIT = 4 << 20
_CONFIG_DEPTH = 32

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
        FedcoreError: as :func:`read_adapter`, without what the tensors' values could tell.
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
    """Write ``state`` as a PEFT adapter folder; each file appears whole or not at all.

    Equal states give byte-identical files. Returns the folder.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(state.to_peft(), path / WEIGHTS_FILE)
    config = json.dumps(_jsonable(state.config), indent=2, sort_keys=True) + "\n"
    write_text(config, path / CONFIG_FILE)
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
        return load_file(str(file))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise FedcoreError(f"{label}: cannot read {file}: {error}") from error


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file atomically; equal tensors give equal bytes."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise missing_extra("safetensors", "data") from error
    data = save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata=_METADATA)
    write_bytes(data, file)


def write_text(text: str, file: Path) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(text.encode(), file)


def write_bytes(data: bytes, file: Path) -> None:
    """Write ``file`` so that a reader, or a machine that dies, sees the old or the new content."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)


def read_object(file: Path, label: str) -> dict[str, Any]:
    """The object in a JSON file of moderate size and depth.

    Raises:
        FedcoreError: it is missing, malformed, too large or too deep, naming ``label``.
    """
    try:
        with file.open("rb") as handle:
            text = handle.read(_CONFIG_LIMIT + 1)
        if len(text) > _CONFIG_LIMIT:
            raise FedcoreError(f"{label}: {file} holds more than {_CONFIG_LIMIT} bytes")
        config = json.loads(text.decode("utf-8"))
    except FedcoreError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FedcoreError(f"{label}: cannot read {file}: {error}") from error
    if not isinstance(config, dict):
        raise FedcoreError(f"{label}: {file} must hold a JSON object")
    if _deeper(config, _CONFIG_DEPTH):
        raise FedcoreError(f"{label}: {file} is nested deeper than {_CONFIG_DEPTH} levels")
    return config


def _deeper(value: Any, depth: int) -> bool:
    """Whether ``value`` nests containers more than ``depth`` levels deep."""
    level = [value]
    for _ in range(depth + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_jsonable(item) for item in value)
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value
