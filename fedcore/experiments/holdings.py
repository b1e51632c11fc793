"""Who has which texts: sites their own files, or clients their part of one data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError
from fedcore.experiments.site_data import SiteTexts, labels_of, read_site
from fedcore.recipes import Recipe
from fedcore.training.datasets import TextDataset, split_indices
from fedcore.training.partitions import Partition, assign_like, partition
from fedcore.training.site_settings import SiteSettings


@dataclass(frozen=True)
class Holdings:
    """Who trains on which texts, and who holds out which.

    Attributes:
        shards, test_shards: client id to int64 indices of texts, ascending.
        test: all held-out texts, ascending.
        blocks: numbers of consecutive texts that a client computes by itself, so that a site's
            numbers are the same whether or not other sites are in the process.
    """

    shards: Mapping[str, Tensor]
    test_shards: Mapping[str, Tensor]
    test: Tensor
    blocks: tuple[int, ...]


def site_texts(recipe: Recipe, sites: Sequence[SiteSettings]) -> tuple[TextDataset, Holdings]:
    """The texts of ``sites``, one after the other, each site's training texts first; no site, no
    texts.

    Raises:
        FedcoreError: more sites than the recipe's clients, or as
            :func:`~fedcore.experiments.site_data.read_site`.
    """
    most = recipe.most_clients
    if most is not None and len(sites) > most:
        raise FedcoreError(f"there are {len(sites)} sites and clients = {most}; raise clients")
    labels = labels_of(recipe.data, sites)
    read: dict[str, SiteTexts] = {
        site.site: read_site(recipe.data, site, recipe.seed, labels) for site in sites
    }
    texts: list[str] = []
    classes: list[int] = []
    shards: dict[str, Tensor] = {}
    test_shards: dict[str, Tensor] = {}
    for name, of_site in read.items():
        for part, into in ((of_site.train, shards), (of_site.test, test_shards)):
            into[name] = torch.arange(len(texts), len(texts) + len(part))
            texts += part.texts
            classes += part.labels
    holdings = Holdings(
        shards,
        test_shards,
        torch.cat([*test_shards.values(), torch.zeros(0, dtype=torch.int64)]),
        tuple(len(of_site.train) + len(of_site.test) for of_site in read.values()),
    )
    name = f"sites {', '.join(read)}" if len(read) < 4 else f"{len(read)} sites"
    return TextDataset(tuple(texts), tuple(classes), labels, name), holdings


def partitioned(recipe: Recipe, texts: TextDataset) -> Holdings:
    """``texts`` split and spread over the recipe's clients, all by its seed.

    Raises:
        FedcoreError: too few texts, or a partition that cannot be drawn.
    """
    seed, labels = recipe.seed, torch.tensor(texts.labels, dtype=torch.int64)
    train, test = (
        torch.as_tensor(indices)
        for indices in split_indices(texts, recipe.data.test_fraction, derive_seed(seed, "split"))
    )
    parts = _partition(recipe, labels[train])
    held_out = assign_like(parts, labels[test].numpy(), derive_seed(seed, "held-out"))
    ids = client_ids(recipe.clients)
    return Holdings(
        {c: train[torch.tensor(i)] for c, i in zip(ids, parts.indices, strict=True)},
        {c: test[torch.tensor(i)] for c, i in zip(ids, held_out.indices, strict=True)},
        test,
        (len(texts),),
    )


def client_ids(clients: int) -> tuple[str, ...]:
    """``client-00``, ``client-01``, ... wide enough to sort by number."""
    width = max(2, len(str(clients - 1)))
    return tuple(f"client-{i:0{width}d}" for i in range(clients))


def _partition(recipe: Recipe, labels: Tensor) -> Partition:
    settings = recipe.partition
    return partition(
        labels.numpy(),
        recipe.clients,
        settings.kind,
        alpha=settings.alpha,
        labels_per_client=settings.labels_per_client,
        min_examples=settings.min_examples,
        seed=derive_seed(recipe.seed, "partition"),
    )
