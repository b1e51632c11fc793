"""What a model or data name means: a packaged one, something on this machine, or a hub id.

The rule is decided before anything is loaded or downloaded. A bare name is a packaged one or a
mistake; ``hf:name`` and ``owner/name`` belong to the Hugging Face hub; everything that looks like a
path must exist. So a misspelt ``bbc-nws`` is an error with a hint, never a download.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from fedcore.errors import FedcoreError, MissingExtraError, missing_extra, unknown_name

HUB_PREFIX = "hf:"
_HUB_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_HUB_ID = re.compile(rf"{_HUB_PART}(?:/{_HUB_PART})?")


@dataclass(frozen=True)
class Packaged:
    """Where a packaged model or corpus lives: ``folder`` inside the import package ``module``.

    ``extra`` is the one of fedcore's extras that installs ``distribution``; where none does,
    ``command`` is what to type.
    """

    distribution: str
    module: str
    folder: str = ""
    extra: str = "examples"
    command: str = ""


@dataclass(frozen=True)
class NamedSource:
    """A resolved name. ``location`` is a path for "packaged" and "local", an id for "hub"."""

    name: str
    kind: Literal["packaged", "local", "hub"]
    location: str

    @property
    def path(self) -> Path:
        """The location of a packaged or local source."""
        return Path(self.location)


def packaged_folder(item: Packaged) -> Path:
    """The folder of a packaged model or corpus, found without importing its package.

    Raises:
        MissingExtraError: the package is not installed.
        FedcoreError: the package is installed but lacks the folder.
    """
    spec = find_spec(item.module)
    if spec is None or not spec.submodule_search_locations:
        if item.command:
            raise MissingExtraError(
                f"{item.distribution} is not installed; install it with: {item.command}"
            )
        raise missing_extra(item.distribution, item.extra)
    folder = Path(next(iter(spec.submodule_search_locations))) / item.folder
    if not folder.is_dir():
        raise FedcoreError(f"the installed package {item.distribution} has no folder {folder}")
    return folder


def _missing_path(kind: str, source: str, path: Path, wanted: str) -> FedcoreError:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=3, cutoff=0.6)
    paths = " or ".join(str(path.parent / name) for name in near)
    hint = f"; did you mean {paths}?" if near else ""
    return FedcoreError(f"unknown {kind} {source!r}: no such {wanted}{hint}")


def resolve(
    kind: str,
    source: str,
    packaged: Mapping[str, Packaged],
    *,
    wanted: Literal["file", "folder"],
    suffixes: Collection[str] = (),
) -> NamedSource:
    """Decide what ``source`` names, without loading or downloading anything.

    Args:
        kind: what is looked for, for the error, for example ``"model"``.
        source: a packaged name, a path, ``owner/name`` or ``hf:name``.
        packaged: the packaged names and where each lives.
        wanted: whether a path must be a file or a folder.
        suffixes: endings that mark ``source`` as a path even when nothing is there.

    Raises:
        FedcoreError: the name is none of these; one line, with the nearest valid names.
        MissingExtraError: the name is a packaged one whose package is not installed.
    """
    if source in packaged:
        return NamedSource(source, "packaged", str(packaged_folder(packaged[source])))
    if source.startswith(HUB_PREFIX):
        name = source.removeprefix(HUB_PREFIX)
        if not _HUB_ID.fullmatch(name):
            raise FedcoreError(f"unknown {kind} {source!r}: {name!r} is not a hub id (owner/name)")
        return NamedSource(source, "hub", name)
    path = Path(source).expanduser()
    if source and (path.is_file() if wanted == "file" else path.is_dir()):
        return NamedSource(source, "local", str(path))
    if source and path.exists():
        actual = "folder" if wanted == "file" else "file"
        raise FedcoreError(f"unknown {kind} {source!r}: a {actual}, where a {wanted} is needed")
    if "/" not in source and path.suffix.lower() not in suffixes:
        raise unknown_name(kind, source, packaged)
    # An id has one slash and no folder of its first part here; else the user meant a path.
    plausible = source.count("/") == 1 and _HUB_ID.fullmatch(source) is not None
    if plausible and path.suffix.lower() not in suffixes and not path.parent.is_dir():
        return NamedSource(source, "hub", source)
    raise _missing_path(kind, source, path, wanted)
