"""Everything a run works with, built once from its recipe: data, partition, model, method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fedcore.data.base_identity import BaseIdentity
from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError, missing_extra
from fedcore.experiments.holdings import Holdings, partitioned, site_texts
from fedcore.experiments.observer import Observer
from fedcore.experiments.privacy import check_central, check_private
from fedcore.experiments.site_data import recipe_at, site_files
from fedcore.experiments.trials import check_sources
from fedcore.federation import records
from fedcore.federation.row_counts import RowCounts
from fedcore.methods import Method
from fedcore.methods.requirements import KEEPS_BASE, MIXED_RANKS, SECURE_SUM, of_family, refuse
from fedcore.recipes import Recipe
from fedcore.training.base_identity import identity_of
from fedcore.training.binding import ModelBinding
from fedcore.training.datasets import TextDataset, subsample
from fedcore.training.encoding import EncodedDataset, Examples, no_examples
from fedcore.training.features import encoder_digest, mean_states
from fedcore.training.forward import Forward
from fedcore.training.live_adapter import ADAPTER_NAME
from fedcore.training.prefix import FrozenPrefix
from fedcore.training.residual import FrozenResidual
from fedcore.training.site_settings import SiteSettings
from fedcore.training.tasks import Task, Tokenised, find_task
from fedcore.tuners.attach import attach_adapter

_OF_PRODUCTS = ("errors are of the products B A, before DoRA normalises them",)

POOLED = "everyone"
"""The one client of the centralised baseline."""


@dataclass
class SharedCache:
    """What several runs of one process may share: encoded texts and frozen-prefix states by key."""

    texts: dict[Any, tuple[TextDataset, Tokenised]] = field(default_factory=dict)
    states: dict[Any, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """The parts of a run.

    Attributes:
        task: what the clients' models learn.
        model: the one model in memory, with its adapter.
        tokenizer: its tokenizer.
        shards: client id to the training examples it holds, as indices.
        test_shards: client id to its part of the held-out examples; together they are ``test``.
        test: the held-out examples.
        counts: per client and label, training and held-out examples, for the report.
        residual: where the low-rank updates of base weights are applied.
        ranks: client id to module to rank, where clients differ in rank; otherwise empty.
        statistics: client id to the statistics of its data that it sends before its first
            round.
        flags: what every round's record says of the run as a whole.
        rows: client id to what became of its rows of instruction data.
        packed: client id to its rows as trl takes them, once it has trained.
        texts: what ``examples`` were made of, in the same order.
    """

    recipe: Recipe
    method: Method
    task: Task
    model: nn.Module
    tokenizer: Any
    binding: ModelBinding
    forward: Forward
    examples: Examples
    shards: Mapping[str, Tensor]
    test_shards: Mapping[str, Tensor]
    test: Tensor
    label_names: tuple[str, ...]
    counts: records.PartitionRecord
    residual: FrozenResidual
    ranks: Mapping[str, Mapping[str, int]]
    statistics: Mapping[str, Mapping[str, Tensor]]
    flags: tuple[str, ...] = ()
    rows: Mapping[str, RowCounts] = field(default_factory=dict)
    packed: dict[str, Any] = field(default_factory=dict)
    texts: tuple[str, ...] = ()

    @cached_property
    def base(self) -> BaseIdentity:
        """The identity of the base model, without the tensors that clients train."""
        base = identity_of(self.model, self.tokenizer, self.recipe.model.identity)
        return base.without(slot.name for slot in self.binding.layout.dense_slots)

    @property
    def adapter_config(self) -> dict[str, Any] | None:
        """The adapter's configuration; None where the head alone trains."""
        configs: Any = getattr(self.model, "peft_config", None)
        return None if configs is None else configs[ADAPTER_NAME].to_dict()

    @property
    def trainers(self) -> tuple[str, ...]:
        """Who trains: the clients, or the one holder of all data."""
        pooled = self.method.capabilities.population == "pooled"
        return (POOLED,) if pooled else tuple(sorted(self.shards))

    def training_indices(self, client_id: str) -> Tensor:
        """The examples that ``client_id`` trains on."""
        if client_id == POOLED:
            return torch.cat([self.shards[c] for c in sorted(self.shards)]).sort().values
        return self.shards[client_id]

    @property
    def held(self) -> dict[str, int]:
        """Trainer to the number of its training examples."""
        return {trainer: len(self.training_indices(trainer)) for trainer in self.trainers}

    def weight(self, trainer: str) -> float:
        """What ``trainer`` weighs in a round, by ``round.weighting``."""
        by, indices = self.recipe.round.weighting, self.training_indices(trainer)
        if by == "uniform":
            return 1.0
        return float(self.examples.predictions(indices) if by == "tokens" else len(indices))

    @property
    def offset(self) -> dict[str, Tensor]:
        """Module to the initial Gram factor that the model subtracts, where the server is."""
        suffix = ".gram_A0"
        return {
            name.removesuffix(suffix): buffer.cpu()
            for name, buffer in self.binding.constants.items()
            if name.endswith(suffix)
        }


def build_experiment(
    recipe: Recipe,
    observer: Observer,
    cache: SharedCache | None = None,
    site: SiteSettings | None = None,
) -> Experiment:
    """Load, encode, split, partition and wrap, everything seeded by the recipe's seed.

    Where sites own the data, nothing is partitioned: a simulation takes the files of
    ``data.sites``, a node its own, and the server of a deployment none.

    Args:
        site: whose node this is, where it has data of its own.

    Raises:
        FedcoreError: a source, column, target module or layer that does not exist, a partition
            that cannot be drawn, or a site's data or settings that do not fit the recipe.
    """
    sites: tuple[SiteSettings, ...] = () if site is None else (site,)
    if site is not None:
        recipe = recipe_at(recipe, site)
    elif recipe.data.sites is not None:
        sites = site_files(recipe.data.sites)
    check_sources(recipe)
    cache = cache or SharedCache()
    method, task = _seeded(recipe.method.create(), recipe), find_task(recipe.task)
    optimiser = recipe.optimiser.settings(method)
    optimiser.schedule.check(optimiser.rate, recipe.rounds)
    if recipe.by_trl and (sites or not recipe.data.at_sites) and find_spec("trl") is None:
        raise missing_extra("trl", "llm")
    if recipe.round.secure_sum:
        refuse(method, SECURE_SUM, "round.secure_sum")
    if recipe.adapter.use_dora:
        refuse(method, (KEEPS_BASE, of_family("lora")), "adapter.use_dora")
    seed = recipe.seed
    observer.preparing(f"model {recipe.model.source}")
    dataset_key: tuple[object, ...] = (
        recipe.task,
        recipe.data.model_dump_json(),
        recipe.model.source,
        recipe.model.max_length,
    )
    if recipe.data.at_sites:
        # How a site's texts are split, and so their order, follows from the seed.
        dataset_key = (*dataset_key, recipe.seed, sites)
        observer.preparing(f"data of {len(sites)} sites")
        texts, holdings = site_texts(recipe, sites)
    else:
        cached = cache.texts.get(dataset_key)
        texts = cached[0] if cached else _load_texts(recipe, observer)
        holdings = partitioned(recipe, texts)
    if recipe.data.sites is not None:
        recipe = recipe.model_copy(update={"clients": len(sites)})
        recipe.check_cohort(recipe.clients)
    classes = len(texts.label_names)
    device, weights = _device(recipe.training.device), recipe.model.weights
    model, tokenizer = task.load(
        recipe.model.source, classes, derive_seed(seed, "head"), weights, device
    )
    # Onto its device before it is wrapped: adapters are created beside their base weights.
    model = attach_adapter(
        model if weights.quantisation else model.to(device),
        method.family,
        rank=recipe.adapter.rank,
        alpha=recipe.adapter.alpha,
        target_modules=recipe.adapter.target_modules,
        layers=recipe.adapter.layers,
        use_rslora=recipe.adapter.use_rslora,
        init_std=recipe.adapter.init_std,
        frame=recipe.adapter.frame,
        seed=derive_seed(seed, "adapter"),
        task_type=task.peft_type,
        dropout=recipe.adapter.dropout,
        use_dora=recipe.adapter.use_dora,
        modules_to_save=recipe.adapter.modules_to_save,
        whole_model=method.capabilities.whole_model,
        **method.adapter_options,
    )
    if dataset_key not in cache.texts:
        observer.preparing(f"encoding {len(texts.texts)} texts")
        length, overlong = recipe.model.max_length, recipe.data.overlong or "drop"
        encoded = Tokenised(no_examples(length))
        if len(texts):
            encoded = task.encode(texts, tokenizer, length, overlong)
        cache.texts[dataset_key] = (texts, encoded)
    encoded = cache.texts[dataset_key][1]
    examples = encoded.examples
    counts: Mapping[str, RowCounts] = {}
    if encoded.rows is not None:
        holdings, counts = holdings.of_used(encoded.rows)
        texts = texts.take(encoded.rows.positions)
    prefix, states, flags = _prefix(recipe, model, examples, holdings, dataset_key, cache, observer)
    forward = Forward(model, examples, prefix, states)
    if task.generates and isinstance(forward.head, str):
        flags += (f"evaluation makes whole logits, in smaller batches: {forward.head}",)
    binding = ModelBinding.of(model)
    modules = binding.layout.modules
    shards, test_shards = holdings.shards, holdings.test_shards
    ids = tuple(sorted(shards))
    ranks = client_ranks(recipe, method, ids, modules)
    example_counts = {client: len(indices) for client, indices in shards.items()}
    if method.capabilities.population == "pooled":
        example_counts = {POOLED: sum(example_counts.values())}
    if recipe.evaluation.on != "server" and method.capabilities.personalised:
        raise FedcoreError(
            f"evaluation.on is {recipe.evaluation.on!r}, and the clients of {method.name} have "
            "models of their own; pass evaluation.on = 'server'"
        )
    check_private(recipe, method, example_counts, mixed_ranks=bool(ranks))
    check_central(recipe, method, mixed_ranks=bool(ranks))
    statistics = {}
    if method.capabilities.wants_features:
        observer.preparing("the statistics of the clients' data")
        statistics = _statistics(recipe, method, model, examples, shards)
    return Experiment(
        recipe=recipe,
        method=method,
        task=task,
        model=model,
        tokenizer=tokenizer,
        binding=binding,
        forward=forward,
        examples=examples,
        shards=shards,
        test_shards=test_shards,
        test=holdings.test,
        label_names=texts.label_names,
        counts=records.PartitionRecord(
            client_ids=ids,
            label_names=tuple(texts.label_names),
            class_counts=_count(shards, examples, classes),
            test_counts=_count(test_shards, examples, classes),
        ),
        residual=FrozenResidual(model, modules),
        ranks=ranks,
        statistics=statistics,
        flags=(*flags, *(_OF_PRODUCTS if recipe.adapter.use_dora else ())),
        rows=counts,
        texts=texts.texts,
    )


def _seeded(method: Method, recipe: Recipe) -> Method:
    """What a method draws by itself follows from the run's seed, unless its own was chosen."""
    draws = any(option.name == "seed" for option in fields(method))  # type: ignore[arg-type]
    if not draws or "seed" in (recipe.method.model_extra or {}):
        return method
    return replace(method, seed=derive_seed(recipe.seed, "method"))  # type: ignore[type-var]


def client_ranks(
    recipe: Recipe, method: Method, ids: Sequence[str], modules: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Client id to module to rank, from ``adapter.client_ranks``; empty where all are equal.

    Raises:
        FedcoreError: clients of different rank, and a method that needs equal ones.
    """
    given = recipe.adapter.client_ranks
    if not given or all(rank == recipe.adapter.rank for rank in given):
        return {}
    needs = (MIXED_RANKS, of_family(method.family))
    where, otherwise = f"adapter.client_ranks is {list(given)}", "give all clients one rank"
    refuse(method, needs, where, otherwise)
    return {
        client: dict.fromkeys(modules, given[i % len(given)])
        for i, client in enumerate(sorted(ids))
    }


def _statistics(
    recipe: Recipe,
    method: Method,
    model: nn.Module,
    examples: Examples,
    shards: Mapping[str, Tensor],
) -> dict[str, Mapping[str, Tensor]]:
    """Each client's statistics of its data, from the features that the base model gives them."""
    features = mean_states(model, examples, recipe.evaluation.batch_size)
    encoder = encoder_digest(model)
    statistics: dict[str, Mapping[str, Tensor]] = {}
    for client, indices in sorted(shards.items()):
        seed = derive_seed(recipe.seed, "told", client)
        sent = method.statistics(features[indices], examples.labels[indices], seed)
        if sent:
            statistics[client] = {**sent, "encoder": encoder}
    return statistics


def _load_texts(recipe: Recipe, observer: Observer) -> TextDataset:
    data = recipe.data
    observer.preparing(f"data {data.source}")
    texts = recipe.reader().load(data.source, data.subset)
    if data.max_examples is not None and data.max_examples < len(texts):
        # Drawn once for all seeds: which texts exist is part of the data, not of the draw.
        texts = subsample(texts, data.max_examples, seed=0)
    return texts


def _prefix(
    recipe: Recipe,
    model: nn.Module,
    examples: Examples,
    holdings: Holdings,
    dataset_key: Any,
    cache: SharedCache,
    observer: Observer,
) -> tuple[FrozenPrefix | None, Tensor | None, tuple[str, ...]]:
    """The frozen prefix, its states when they are to be reused, and why not where they are too
    large.
    """
    prefix = FrozenPrefix.find(model)
    unused = not recipe.training.reuse_prefix or recipe.training.autocast or not len(examples)
    # States of rows of different lengths would be those of the longest.
    if prefix is None or unused or not isinstance(examples, EncodedDataset):
        return prefix, None, ()
    key = (dataset_key, prefix.length)
    if key not in cache.states:
        too_large = prefix.over_budget(
            len(examples), examples.length, recipe.training.prefix_budget
        )
        if too_large is not None:
            return prefix, None, (f"{too_large}; it is computed anew in every step",)
        observer.preparing(
            f"states of {prefix.length} frozen layers for {len(examples.labels)} texts"
        )
        batch_size, blocks = recipe.evaluation.batch_size, list(holdings.blocks)
        parts = [examples]
        if len(blocks) > 1:
            parts = [examples.take(rows) for rows in torch.arange(len(examples)).split(blocks)]
        states = [prefix.compute(part, batch_size) for part in parts]
        cache.states[key] = states[0] if len(states) == 1 else torch.cat(states)
    return prefix, cache.states[key], ()


def _count(
    shards: Mapping[str, Tensor], examples: Examples, classes: int
) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(torch.bincount(examples.labels[shards[client]], minlength=classes).tolist())
        for client in sorted(shards)
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise FedcoreError(f"training.device {name!r} cannot be used: {reason}") from error
    return device
