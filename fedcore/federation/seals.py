"""Hashes that bind the files of a state to each other, so that each knows what it belongs to.

``state.json`` holds the SHA-256 of every file beside it and, as its seal, that of what it says
itself. What is hashed of a JSON object is its content, however its numbers, spaces and lines are
written. A seal finds damage, edits and exchanged files; it is not a signature, and whoever wants to
deceive can compute it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from fedcore.data.folders import open_regular
from fedcore.errors import FedcoreError

FILES, ORIGIN, SEAL = "files", "origin", "seal"
"""Fields of ``state.json``: hashes by file name, what the run began from, and that over all."""


def digest_of_file(file: Path) -> str:
    """The SHA-256 of a regular file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    with open_regular(file) as handle:
        return file_digest(handle, "sha256").hexdigest()


def digest_of_content(content: Any) -> str:
    """The SHA-256 of JSON values, the same for equal numbers and in any order of keys."""
    text = json.dumps(_plain(content), sort_keys=True, separators=(",", ":"), default=str)
    return sha256(text.encode()).hexdigest()


def sealed(about: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``about`` with the hashes of all files in ``folder`` and the seal over everything."""
    files = {file.name: digest_of_file(file) for file in sorted(folder.iterdir())}
    whole = {**about, FILES: files}
    return {**whole, SEAL: digest_of_content(whole)}


def check_seal(about: Mapping[str, Any]) -> bool:
    """Whether what ``state.json`` says is sealed; states of version 0.1 are not.

    Raises:
        FedcoreError: it is not what was sealed.
    """
    if SEAL not in about and not {FILES, ORIGIN} & about.keys():
        return False
    rest = {name: value for name, value in about.items() if name != SEAL}
    if about.get(SEAL) != digest_of_content(rest):
        raise FedcoreError("state.json is not what was written: it was edited or damaged")
    return True


def check_files(about: Mapping[str, Any], folder: Path, *, without: str | None = None) -> None:
    """Compare the files of a sealed state with the hashes in its ``state.json``.

    Args:
        without: the name of a file that is not looked at.

    Raises:
        FedcoreError: naming the first that is missing or is not the file that was written.
    """
    for name, digest in sorted(about[FILES].items()):
        if name == without:
            continue
        try:
            same = digest_of_file(folder / name) == digest
        except FileNotFoundError:
            raise FedcoreError(f"{name} is missing") from None
        if not same:
            raise FedcoreError(
                f"{name} is not the file that was written with it: it was edited, damaged or "
                "exchanged"
            )


def _plain(value: Any) -> Any:
    """``value`` with every number that is whole as an integer, whatever its spelling."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
