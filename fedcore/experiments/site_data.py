"""The rows of sites that own their data: each from its own file, split by its own name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError
from fedcore.recipes import Recipe, with_settings
from fedcore.training.datasets import TextDataset, classes_of, train_test_split
from fedcore.training.site_settings import SiteSettings, check_site_name
from fedcore.training.table_files import TABLE_SUFFIXES
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


def read_site(recipe: Recipe, site: SiteSettings, labels: Sequence[str] | None = None) -> SiteTexts:
    """The texts of one site, from its own file alone.

    Without held-out rows of its own a site holds out ``data.test_fraction`` of its rows, drawn by
    ``derive_seed(seed, "split", site)``. Texts that are equal up to white space are kept once.

    Args:
        recipe: says how rows are read, never where from.
        site: with ``data`` set.
        labels: the classes in their order; by default those of ``data``, or of the site's file.

    Raises:
        FedcoreError: naming the site, and its file, line and column, never a value; too few rows.
    """
    assert site.data is not None
    data, reader = recipe.data, recipe.reader()
    if not data.label_column:
        labels = (UNLABELLED,)
    elif labels is None:
        labels = data.labels

    def read(file: str) -> TextDataset:
        if Path(file).suffix.lower() not in TABLE_SUFFIXES or not Path(file).is_file():
            raise FedcoreError(f"{file} is not a file that ends with {', '.join(TABLE_SUFFIXES)}")
        return reader.read(Path(file), f"site {site.site}", labels, dict(site.columns))

    try:
        texts = read(site.data)
        if site.test_data is None:
            seed = derive_seed(recipe.seed, "split", site.site)
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


def labels_of(recipe: Recipe, sites: Sequence[SiteSettings]) -> tuple[str, ...]:
    """The classes of all ``sites``: those of the recipe, or of all of their files together.

    Raises:
        FedcoreError: as :func:`read_site`.
    """
    if not recipe.data.label_column:
        return (UNLABELLED,)
    if recipe.data.labels is not None:
        return recipe.data.labels
    names: set[str] = set()
    for site in sites:
        assert site.data is not None
        try:
            names |= recipe.reader().labels(Path(site.data), dict(site.columns))
        except FedcoreError as error:
            raise FedcoreError(f"site {site.site}: {error}") from None
    return classes_of(names)


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
    batch, part = recipe.training.batch_size, site.batch_size
    if part is not None and part != batch:
        if not recipe.by_trl or batch % part:
            remedy = f"pass one that divides {batch}" if recipe.by_trl else "leave it out"
            reason = ", of which fedcore's own loop takes no parts" if not recipe.by_trl else ""
            raise FedcoreError(
                f"site {site.site}: batch-size is {part}, and training.batch_size is "
                f"{batch}{reason}; {remedy}"
            )
        settings["training.accumulation"] = batch // part
    return with_settings(recipe, settings) if settings else recipe
