"""The rows of sites that own their data: each from its own file, split by its own name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError
from fedcore.recipes import Recipe, with_settings
from fedcore.recipes.schema import DataSection
from fedcore.training.datasets import TextDataset, classes_of, load_table, train_test_split
from fedcore.training.site_settings import SiteSettings, check_site_name
from fedcore.training.table_files import TABLE_SUFFIXES, read_table
from fedcore.training.text_columns import UNLABELLED


@dataclass(frozen=True)
class SiteTexts:
    """A site's own texts: what it trains on, all of it, and what it holds out."""

    train: TextDataset
    test: TextDataset


def site_files(folder: str | Path) -> tuple[SiteSettings, ...]:
    """The sites of a simulation: one file each, named by the file's stem, in order of their names.

    Raises:
        FedcoreError: no such folder, or one without files; a file of another kind, or whose stem
            cannot be a site's name; two files of one stem.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FedcoreError(
            f"data.sites = {str(folder)!r} is not a folder; pass one file per site in it"
        )
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    sites: dict[str, SiteSettings] = {}
    for file in files:
        if file.suffix.lower() not in TABLE_SUFFIXES or not file.is_file():
            raise FedcoreError(
                f"{file} is not a site's file; leave only {', '.join(TABLE_SUFFIXES)} in data.sites"
            )
        name = check_site_name(file.stem, str(file))
        if name in sites:
            raise FedcoreError(f"{file} and {sites[name].data} are both of site {name}; leave one")
        sites[name] = SiteSettings(site=name, data=str(file))
    if not sites:
        raise FedcoreError(f"data.sites = {str(folder)!r} is empty; pass one file per site in it")
    return tuple(sites[name] for name in sorted(sites))


def read_site(
    data: DataSection, site: SiteSettings, seed: int, labels: Sequence[str] | None = None
) -> SiteTexts:
    """The texts of one site, from its own file alone.

    Without held-out rows of its own a site holds out ``data.test_fraction`` of its rows, drawn by
    ``derive_seed(seed, "split", site)``. Texts that are equal up to white space are kept once.

    Args:
        data: the recipe's: how rows are read, never where from.
        site: with ``data`` set.
        seed: the run's.
        labels: the classes in their order; by default those of ``data``, or of the site's file.

    Raises:
        FedcoreError: naming the site, and its file, line and column, never a value; too few rows.
    """
    assert site.data is not None
    if not data.label_column:
        labels = (UNLABELLED,)
    elif labels is None:
        labels = data.labels

    def read(file: str) -> TextDataset:
        if Path(file).suffix.lower() not in TABLE_SUFFIXES or not Path(file).is_file():
            raise FedcoreError(f"{file} is not a file that ends with {', '.join(TABLE_SUFFIXES)}")
        return load_table(
            Path(file),
            f"site {site.site}",
            text_column=data.text_column,
            label_column=data.label_column,
            labels=labels,
            columns=dict(site.columns),
        )

    try:
        texts = read(site.data)
        if site.test_data is None:
            seed = derive_seed(seed, "split", site.site)
            return SiteTexts(*train_test_split(texts, data.test_fraction, seed))
        held_out = read(site.test_data)
        both = {" ".join(t.split()) for t in texts.texts} & {
            " ".join(t.split()) for t in held_out.texts
        }
        if both:
            raise FedcoreError(f"{len(both)} texts of test-data are in data too; take them out")
        return SiteTexts(texts, held_out)
    except OSError as error:
        raise FedcoreError(
            f"site {site.site}: its data cannot be read: {error.strerror}"
        ) from error
    except FedcoreError as error:
        raise FedcoreError(f"site {site.site}: {error}") from None


def labels_of(data: DataSection, sites: Sequence[SiteSettings]) -> tuple[str, ...]:
    """The classes of all ``sites``: those of the recipe, or of all of their files together.

    Raises:
        FedcoreError: as :func:`read_site`.
    """
    if not data.label_column:
        return (UNLABELLED,)
    if data.labels is not None:
        return data.labels
    names: set[str] = set()
    for site in sites:
        assert site.data is not None
        try:
            _, of_site = read_table(
                Path(site.data),
                text_column=data.text_column,
                label_column=data.label_column,
                columns=dict(site.columns),
            )
        except FedcoreError as error:
            raise FedcoreError(f"site {site.site}: {error}") from None
        names |= set(of_site)
    return classes_of(sorted(names))


def recipe_at(recipe: Recipe, site: SiteSettings) -> Recipe:
    """``recipe`` as ``site`` runs it: with its own model folder, device and number format.

    Raises:
        FedcoreError: a setting that the recipe cannot take.
    """
    settings: dict[str, object] = {}
    if site.model is not None:
        if not Path(site.model).expanduser().is_dir():
            raise FedcoreError(
                f"site {site.site}: model is not a folder; pass that of the base model"
            )
        settings["model.source"] = site.model
    if site.device is not None:
        settings["training.device"] = site.device
    for key in ("dtype", "quantisation"):
        if getattr(site, key) is not None:
            settings[f"model.{key}"] = getattr(site, key)
    batch = recipe.training.batch_size
    if site.batch_size not in (None, batch):
        raise FedcoreError(
            f"site {site.site}: batch-size is {site.batch_size}, and training.batch_size is "
            f"{batch}; smaller batches need accumulation, which this training loop does not have"
        )
    return with_settings(recipe, settings) if settings else recipe
