"""What a site says of itself: where its data and its model are, and what it computes on.

A site's settings stay at the site: no message of a federation holds any of them but its name.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcore.checks import count
from fedcore.data.folders import open_regular
from fedcore.errors import FedcoreError, unknown_name

SITE_NAME = re.compile(r"[a-z0-9-]{1,64}")
"""A site's name, which becomes that of a client in records and run folders."""

_FIELDS = {
    "site": "site",
    "data": "data",
    "test-data": "test_data",
    "columns": "columns",
    "model": "model",
    "device": "device",
    "dtype": "dtype",
    "quantisation": "quantisation",
    "batch-size": "batch_size",
    "partition-id": "partition_id",
    "num-partitions": "num_partitions",
}
_NUMBERS = ("batch-size", "partition-id", "num-partitions")
_MOST_BYTES = 1 << 20


def check_site_name(name: str, where: str) -> str:
    """``name``, if it can be a site's.

    Raises:
        FedcoreError: it cannot, with what may stand in a name.
    """
    if not SITE_NAME.fullmatch(name):
        raise FedcoreError(
            f"{where}: {name!r:.80} cannot be the name of a site; use 1 to 64 of a to z, 0 to 9 "
            "and -"
        )
    return name


@dataclass(frozen=True)
class SiteSettings:
    """One site.

    Attributes:
        site: its name.
        data: the file of its rows.
        test_data: the file of its held-out rows; None splits ``data``.
        columns: pairs of a column of its files and the recipe's name for it.
        model: a local folder of the base model, in place of the recipe's source.
        device, dtype, quantisation: in place of the recipe's.
        batch_size: examples that are in memory at a time.
        partition_id, num_partitions: the part of the recipe's data, of a node without its own.
    """

    site: str = ""
    data: str | None = None
    test_data: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    quantisation: str | None = None
    batch_size: int | None = None
    partition_id: int | None = None
    num_partitions: int | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str = "node-config") -> SiteSettings:
        """The settings in ``values``, such as a Flower node's configuration.

        Args:
            where: they stand, for errors.

        Raises:
            FedcoreError: an unknown key, a value of another type, a name that cannot be a site's,
                or data together with a place in a partition.
        """
        fields: dict[str, Any] = {}
        for key, value in values.items():
            if key not in _FIELDS:
                raise FedcoreError(f"{where}: {unknown_name('key', key, _FIELDS)}")
            if key in _NUMBERS:
                fields[_FIELDS[key]] = count(where, key, value, least=int(key == "batch-size"))
            elif isinstance(value, str) and value.strip():
                fields[_FIELDS[key]] = value
            else:
                raise FedcoreError(
                    f"{where}: {key} is {type(value).__name__} or empty; pass text in quotes"
                )
        if "columns" in fields:
            fields["columns"] = _columns(fields["columns"], where)
        settings = cls(**fields)
        settings._check(where)
        return settings

    @property
    def owns_data(self) -> bool:
        """Whether the node is a site, rather than a part of the recipe's data."""
        return self.data is not None

    def _check(self, where: str) -> None:
        if self.site:
            check_site_name(self.site, f"{where}: site")
        if self.data is None:
            for key in ("site", "test-data", "columns"):
                if getattr(self, _FIELDS[key]):
                    raise FedcoreError(f"{where}: {key} is set without data; pass data too")
            return
        if not self.site:
            raise FedcoreError(f"{where}: data is set without site; pass the name of the site")
        if self.partition_id is not None or self.num_partitions is not None:
            raise FedcoreError(
                f"{where}: data and partition-id are both set; pass data where the site has its "
                "own file, partition-id where it takes a part of the recipe's data"
            )


def read_site_settings(file: str | Path) -> SiteSettings:
    """The settings in a TOML file with the keys of :class:`SiteSettings`, as they are typed in
    ``--node-config``; relative paths in it are relative to the file's folder.

    Raises:
        FedcoreError: the file cannot be read, is not TOML, or as :meth:`SiteSettings.read`.
    """
    path = Path(file)
    try:
        with open_regular(path) as handle:
            text = handle.read(_MOST_BYTES).decode("utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        raise FedcoreError(f"site settings {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FedcoreError(f"site settings {path}: {error}") from error
    for key in ("data", "test-data", "model"):
        if isinstance(values.get(key), str):
            values[key] = str(path.parent / Path(values[key]).expanduser())
    return SiteSettings.read(values, f"site settings {path}")


def parse_columns(text: str) -> tuple[tuple[str, str], ...]:
    """``"q:prompt,a:completion"`` as pairs of a file's column and the recipe's.

    Raises:
        FedcoreError: it is not of this form, or names a column twice.
    """
    return _columns(text, "columns")


def _columns(text: str, where: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for part in text.split(","):
        ours, colon, theirs = (piece.strip() for piece in part.partition(":"))
        if not colon or not ours or not theirs or ":" in theirs:
            raise FedcoreError(
                f"{where}: columns is {text!r:.200}; pass file column : recipe column, as in "
                "'q:prompt,a:completion'"
            )
        pairs.append((ours, theirs))
    for names in zip(*pairs, strict=True):
        if len(set(names)) != len(names):
            raise FedcoreError(f"{where}: columns is {text!r:.200}, which names a column twice")
    return tuple(pairs)
