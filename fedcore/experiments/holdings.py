"""Who has which texts: sites their own files, or clients their part of one data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError
from fedcore.experiments.site_data import SiteTexts, labels_of, read_site
from fedcore.federation.row_counts import RowCounts
from fedcore.recipes import Recipe
from fedcore.training.datasets import TextDataset, split_indices
from fedcore.training.instruction_rows import InstructionRows
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

    def of_used(self, rows: InstructionRows) -> tuple[Holdings, dict[str, RowCounts]]:
        """The same with indices of the rows that are used, and what became of each client's rows.

        Raises:
            FedcoreError: a client has no training row that is used, or there is no held-out one.
        """
        index = torch.full((rows.read,), -1, dtype=torch.int64)
        index[torch.from_numpy(rows.positions)] = torch.arange(len(rows))

        def used(of: Tensor) -> Tensor:
            return index[of][index[of] >= 0]

        shards = {client: used(shard) for client, shard in self.shards.items()}
        counts = {
            client: rows.take(torch.cat([shard, self.test_shards[client]])).counts
            for client, shard in self.shards.items()
        }
        for client, shard in shards.items():
            if not len(shard):
                raise FedcoreError(
                    f"{client}: none of its {len(self.shards[client])} training rows is short "
                    "enough; raise model.max_length, or pass data.overlong = 'cut_prompt'"
                )
        test = used(self.test)
        if len(self.test) and not len(test):
            raise FedcoreError(
                f"none of the {len(self.test)} held-out rows is short enough; raise "
                "model.max_length, or pass data.overlong = 'cut_prompt'"
            )
        ends = torch.tensor(self.blocks, dtype=torch.int64).cumsum(0).tolist()
        blocks = tuple(
            int((index[end - size : end] >= 0).sum())
            for end, size in zip(ends, self.blocks, strict=True)
        )
        held_out = {client: used(shard) for client, shard in self.test_shards.items()}
        return Holdings(shards, held_out, test, blocks), counts


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
    labels = labels_of(recipe, sites)
    read: dict[str, SiteTexts] = {site.site: read_site(recipe, site, labels) for site in sites}
    parts: list[TextDataset] = []
    shards: dict[str, Tensor] = {}
    test_shards: dict[str, Tensor] = {}
    count = 0
    for name, of_site in read.items():
        for part, into in ((of_site.train, shards), (of_site.test, test_shards)):
            into[name] = torch.arange(count, count + len(part))
            parts.append(part)
            count += len(part)
    holdings = Holdings(
        shards,
        test_shards,
        torch.cat([*test_shards.values(), torch.zeros(0, dtype=torch.int64)]),
        tuple(len(of_site.train) + len(of_site.test) for of_site in read.values()),
    )
    name = f"sites {', '.join(read)}" if len(read) < 4 else f"{len(read)} sites"
    return recipe.reader().joined(parts, labels, name), holdings


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
