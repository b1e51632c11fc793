"""Files and folders that appear whole or not at all, and the strict reader of files of others.

What is written is prepared in a temporary folder beside its place, brought to the disk, and renamed
in; what was there before is deleted last. An error, an interrupt or a full disk leaves the old
content. A process that dies leaves its temporary folder, which the next write to the same place
sweeps: every temporary folder is locked by the process that fills it, and a lock ends with its
process, whatever its number and its machine.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any

from fedcore.data.locks import LOCK_FILE, lock, locked, unlock
from fedcore.errors import FedcoreError

OWN_LIMIT = 1 << 30
"""Bytes of a JSON file that this package wrote itself, whose size grows with the clients."""

_LIMIT = 4 << 20
_DEPTH = 32
_DIGITS = 40

# NAME_MAX is 255 bytes; a temporary name needs 15 of them beside the name of its place.
_NAME_BYTES = 200
_TEMPORARY = r"\.[0-9a-f]+\.(?:new|old|tmp)"
_LEFTOVER = re.compile(rf"\.(.+){_TEMPORARY}")
_HASHED = re.compile(r"[0-9a-f]{64}")

_REMEDIES = {
    errno.ENOSPC: "free space on that disk, or write to another",
    errno.EDQUOT: "free space on that disk, or write to another",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or write to another disk",
    errno.EMFILE: "close files, or raise the limit of open ones (ulimit -n)",
    errno.ENFILE: "close files, or raise the limit of open ones (sysctl fs.file-max)",
    errno.EROFS: "that disk is read-only: pass a place that can be written",
    errno.EACCES: "pass a place that can be written, or change its permissions",
    errno.EPERM: "pass a place that can be written, or change its permissions",
    errno.ENAMETOOLONG: "pass a shorter name",
    errno.ENOTDIR: "a file is in the way: pass another place",
    errno.EEXIST: "a file is in the way: pass another place",
    errno.EISDIR: "a folder is in the way: pass another place",
}


class _NotWrittenError(FedcoreError):
    """The one error of a failed write."""

    def __init__(self, place: Path, cause: OSError, before: Path | None = None) -> None:
        self.cause, self.before = cause, before
        remedy = _REMEDIES.get(cause.errno or 0, "mend that, or pass another place")
        if before is not None:
            remedy = f"what was there is kept in {before}; {remedy}, and write again"
        super().__init__(f"cannot write {place}: {cause.strerror or cause}; {remedy}")


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Every ``OSError`` inside becomes the error of a failed write that names ``place``.

    Raises:
        FedcoreError: in place of an ``OSError``.
    """
    try:
        yield
    except _NotWrittenError as error:
        # Of a file inside a temporary folder, whose name means nothing to a user.
        raise _NotWrittenError(place, error.cause, error.before) from error.cause
    except OSError as error:
        raise _NotWrittenError(place, error) from error


@contextmanager
def replace_folder(target: str | Path, mark: str | None = None) -> Iterator[Path]:
    """A new folder to fill, which replaces ``target`` when the block ends without an exception.

    Until then, and after any exception, ``target`` is what it was before.

    Args:
        target: the folder; it and its parents may be missing, a link is followed.
        mark: a file that shows that a folder may be replaced; None replaces any folder.

    Raises:
        FedcoreError: ``target`` is a file, or a folder with other content and without the mark; or
            it cannot be written.
    """
    target = Path(target)
    with writing(target):
        place = target.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(place.parent, place.name, ".new") as temporary:
            # Locked, since another writer's swap leaves the place empty for an instant.
            with locked(place.parent):
                if place.exists() and not place.is_dir():
                    raise FedcoreError(f"{target} is a file; pass a folder")
                if mark is not None and not is_free(place) and not (place / mark).is_file():
                    raise FedcoreError(f"{target} exists and holds no {mark}; pass another folder")
            new = temporary / "new"
            new.mkdir()
            yield new
            _sync_tree(new)
            with locked(place.parent):
                _swap_folder(temporary, place)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files``, path within ``folder`` to content: all of them or none.

    Other files of the folder stay; folders are made where missing.

    Raises:
        FedcoreError: they cannot be written.
    """
    names = list(files)
    with writing(folder / names[0] if len(names) == 1 else folder):
        for parent in {(folder / name).parent for name in names}:
            parent.mkdir(parents=True, exist_ok=True)
        if any(_LEFTOVER.fullmatch(parent.name) for parent in folder.parents):
            # A folder that is still being filled, which is synced and renamed as a whole.
            for name, data in files.items():
                (folder / name).write_bytes(data)
            return
        with _temporary(folder, Path(names[0]).name, ".tmp") as temporary:
            for name, data in files.items():
                new = temporary / "new" / name
                new.parent.mkdir(parents=True, exist_ok=True)
                with open(new, "wb") as handle:
                    handle.write(data)
                    handle.flush()
                    os.fsync(handle.fileno())
            with locked(folder):
                _swap_files(temporary, folder, names)


def write_bytes(data: bytes, file: Path) -> None:
    """Write ``file`` so that a reader, or a machine that dies, sees the old or the new content.

    Raises:
        FedcoreError: it cannot be written.
    """
    write_files(file.parent, {file.name: data})


def write_text(text: str, file: Path) -> None:
    """Write a UTF-8 text file like :func:`write_bytes`."""
    write_bytes(text.encode(), file)


def append_line(line: str, file: Path) -> None:
    """Append ``line`` to a UTF-8 text file and bring it to the disk; on an error nothing is added.

    Raises:
        FedcoreError: it cannot be written.
    """
    with writing(file):
        with open(file, "ab", buffering=0) as handle:
            size = handle.seek(0, os.SEEK_END)
            data = memoryview(f"{line}\n".encode())
            try:
                while data:
                    data = data[handle.write(data) :]
                os.fsync(handle.fileno())
            except BaseException:
                handle.truncate(size)
                raise
        if not size:
            _sync_folder(file.parent)


def delete_file(file: Path) -> None:
    """Delete ``file`` if it is there.

    Raises:
        FedcoreError: it cannot be deleted.
    """
    with writing(file):
        file.unlink(missing_ok=True)


def delete_folder(folder: Path) -> None:
    """Delete ``folder`` with all that it holds: it is there whole, or gone.

    Raises:
        FedcoreError: it cannot be deleted.
    """
    with writing(folder):
        place = folder.resolve()
        with _temporary(place.parent, place.name, ".new") as temporary:
            os.rename(place, temporary / "done")
            _sync_folder(place.parent)


def sweep(folder: Path) -> None:
    """Undo and delete what dead processes left of all writes in ``folder``, whatever they wrote.

    Raises:
        FedcoreError: the folder cannot be read.
    """
    with writing(folder):
        if not folder.is_dir():
            return
        with locked(folder) as alone:
            names = {
                match[1] for path in folder.iterdir() if (match := _LEFTOVER.fullmatch(path.name))
            }
            for name in names if alone else ():
                # A name that was too long is a hash of it; its place is known to its next write.
                if not _HASHED.fullmatch(name):
                    _sweep(folder, name, folder / name)


def is_free(folder: Path) -> bool:
    """Whether ``folder`` is missing, or holds nothing but what a killed process left."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(is_leftover(path.name) for path in folder.iterdir())


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is one that writes and claims use and delete."""
    return name == LOCK_FILE or _LEFTOVER.fullmatch(name) is not None


def open_regular(file: Path, *, links: bool = True) -> io.FileIO:
    """Open a regular file for reading, without waiting for anything else that bears its name.

    Args:
        links: whether ``file`` may be a symbolic link, as those of a hub's cache are; not what
            somebody else has put into a folder that is shared.

    Raises:
        OSError: it cannot be opened, or is a folder, a device, a pipe or a socket.
    """
    try:
        handle = io.FileIO(file, "rb", opener=_opened_at_once if links else _opened_itself)
    except OSError as error:
        if error.errno == errno.ELOOP and not links:
            raise OSError(
                errno.ELOOP, "it is a link; put the file itself there", str(file)
            ) from None
        raise
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(file))
    return handle


def read_regular(file: Path, *, limit: int = _LIMIT, links: bool = True) -> bytes:
    """What a regular file of at most ``limit`` bytes holds.

    Raises:
        OSError: it is larger, or as :func:`open_regular`.
    """
    with open_regular(file, links=links) as raw, io.BufferedReader(raw) as handle:
        data = handle.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it holds more than {limit} bytes", str(file))
    return data


def read_json(
    file: Path, label: str, *, limit: int = _LIMIT, finite: bool = True, links: bool = True
) -> Any:
    """What a UTF-8 JSON file of bounded size and depth holds.

    Args:
        label: what errors call the file's owner, usually the client's id.
        limit: the largest size in bytes.
        finite: whether NaN, infinities and numbers beyond fp64 are refused.
        links: as :func:`open_regular` has it.

    Raises:
        FedcoreError: it is missing, not a regular file, too large, too deep or malformed, or has a
            name twice in one object, naming ``label`` and the file.
    """
    try:
        data = read_regular(file, limit=limit, links=links)
        hooks: dict[str, Any] = {"parse_constant": _number, "parse_float": _number}
        value = json.loads(
            data.decode("utf-8"),
            parse_int=_integer,
            object_pairs_hook=distinct,
            **(hooks if finite else {}),
        )
    except FedcoreError:
        raise
    except RecursionError as error:
        raise FedcoreError(
            f"{label}: cannot read {file}: it is nested deeper than {_DEPTH} levels"
        ) from error
    except (OSError, ValueError) as error:
        raise FedcoreError(f"{label}: cannot read {file}: {error}") from error
    if _deeper(value, _DEPTH):
        raise FedcoreError(f"{label}: cannot read {file}: it is nested deeper than {_DEPTH} levels")
    return value


def read_object(
    file: Path,
    label: str,
    fields: Mapping[str, type] | None = None,
    *,
    limit: int = _LIMIT,
    finite: bool = True,
    links: bool = True,
) -> dict[str, Any]:
    """The object in a JSON file, read by :func:`read_json`.

    Args:
        fields: name to type of what the object must hold, of ``bool``, ``int``, ``float`` (which
            an integer also is, and is made), ``str``, ``list`` and ``dict``.

    Raises:
        FedcoreError: as :func:`read_json`; it is not an object, or lacks a field of that type.
    """
    parsed = read_json(file, label, limit=limit, finite=finite, links=links)
    if not isinstance(parsed, dict):
        raise FedcoreError(f"{label}: {file} must hold a JSON object")
    typed = {name: _field(parsed, name, kind, label) for name, kind in (fields or {}).items()}
    return {**parsed, **typed}


def _field(fields: Mapping[str, Any], name: str, kind: type, label: str) -> Any:
    value = fields.get(name)
    fits = isinstance(value, bool) == (kind is bool)
    if kind is float and fits and isinstance(value, int | float):
        with suppress(OverflowError):
            return float(value)
    elif fits and isinstance(value, kind):
        return value
    raise FedcoreError(
        f"{label}: {name} is {value!r:.60}; it must be a JSON value of type {kind.__name__}"
    )


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names and values, as :mod:`json` calls it.

    Raises:
        ValueError: a name is there twice, so that readers would disagree about its value.
    """
    entries = dict(pairs)
    if len(entries) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it names {twice[:60]!r} twice")
    return entries


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number has {len(text)} digits, more than {_DIGITS}")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is not a finite number")
    return value


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


def _opened_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _opened_itself(path: str, flags: int) -> int:
    return _opened_at_once(path, flags | getattr(os, "O_NOFOLLOW", 0))


@contextmanager
def _temporary(parent: Path, name: str, suffix: str) -> Iterator[Path]:
    """A locked temporary folder in ``parent`` for ``name``; what dead processes left is swept."""
    if len(os.fsencode(name)) > _NAME_BYTES:
        name, place = sha256(os.fsencode(name)).hexdigest(), parent / name
    else:
        place = parent / name
    temporary = parent / f".{name}.{token_hex(4)}{suffix}"
    with locked(parent) as alone:
        if alone:
            _sweep(parent, name, place)
        temporary.mkdir()
        handle = lock(temporary, wait=False)
    try:
        yield temporary
    finally:
        # A failed restore leaves the only copy of the old content to the next sweep.
        if not os.path.lexists(temporary / "old"):
            shutil.rmtree(temporary, ignore_errors=True)
        unlock(handle)


def _swap_folder(temporary: Path, place: Path) -> None:
    """Put ``temporary/new`` in the place of ``place``; on any exception all is as before."""
    new, old = temporary / "new", temporary / "old"
    try:
        if place.exists():
            os.rename(place, old)
        os.rename(new, place)
        _sync_folder(place.parent)
        if old.exists():
            # Named "old" it would be restored; from here on it is only deleted.
            os.rename(old, temporary / "done")
    except BaseException:
        with _restoring(old):
            if place.exists() and not new.exists():
                os.rename(place, new)
            if old.exists():
                os.rename(old, place)
        raise


def _swap_files(temporary: Path, folder: Path, names: Sequence[str]) -> None:
    """Put the files of ``temporary/new`` into ``folder``; on any exception all is as before."""
    new, old = temporary / "new", temporary / "old"
    try:
        for name in names:
            if os.path.lexists(folder / name):
                _keep(folder / name, old / name)
            os.replace(new / name, folder / name)
        for parent in {(folder / name).parent for name in names}:
            _sync_folder(parent)
        if old.exists():
            os.rename(old, temporary / "done")
    except BaseException:
        with _restoring(old):
            for name in names:
                if not (new / name).exists() and not os.path.lexists(old / name):
                    (folder / name).unlink(missing_ok=True)
            _put_back(old, folder)
        raise


def _keep(file: Path, old: Path) -> None:
    """Let ``old`` be ``file`` too, so that ``file`` is never missing."""
    old.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, old, follow_symlinks=False)
    except OSError:  # A disk without hard links.
        shutil.copy2(file, old, follow_symlinks=False)


def _put_back(old: Path, folder: Path) -> None:
    for path in sorted(old.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            os.replace(path, folder / path.relative_to(old))
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _restoring(old: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _NotWrittenError(old, error, old if old.exists() else None) from error


def _sweep(parent: Path, name: str, place: Path) -> None:
    """Undo and delete what dead processes left of writing ``place``; ``parent`` is locked."""
    pattern = re.compile(rf"\.{re.escape(name)}{_TEMPORARY}")
    with os.scandir(parent) as entries:
        left = [parent / entry.name for entry in entries if pattern.fullmatch(entry.name)]
    for temporary in left:
        with suppress(OSError):
            handle = lock(temporary, wait=False)
            if handle is None:
                continue
            try:
                _restore(temporary, place)
                if temporary.is_dir() and not temporary.is_symlink():
                    shutil.rmtree(temporary, ignore_errors=True)
                else:
                    temporary.unlink(missing_ok=True)
            finally:
                unlock(handle)


def _restore(temporary: Path, place: Path) -> None:
    """Bring back the old content of ``place`` where a process died before the new one was in."""
    # Version 0.1 renamed the old folder to a name of its own.
    old = temporary if temporary.suffix == ".old" else temporary / "old"
    if not old.is_dir():
        return
    if temporary.suffix == ".tmp":
        _put_back(old, place.parent)
    elif not place.exists():
        os.rename(old, place)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent) / name)
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    try:
        _sync(folder)
    except OSError as error:
        # Some network disks cannot sync folders, and a folder may be writable and not readable.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def _sync(path: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
