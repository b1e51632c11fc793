"""What one site would read, train and upload, without training."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.data.codecs import find_codec
from fedcore.errors import FedcoreError
from fedcore.experiments.client_round import local_steps
from fedcore.experiments.observer import Observer
from fedcore.experiments.setup import Experiment, SharedCache, build_experiment
from fedcore.experiments.site_data import read_site
from fedcore.recipes import Recipe
from fedcore.training.models import quiet_transformers
from fedcore.training.site_settings import SiteSettings
from fedcore.training.step_memory import StepMemory, step_memory


@dataclass(frozen=True)
class SiteCheck:
    """Numbers alone; nothing of a row.

    Attributes:
        rows: that were read, ``duplicates`` of them left out as copies of others.
        train, test: rows that the site trains on and holds out.
        lengths: tokens of each row before truncation, special ones included.
        truncated: rows of more than ``max_length`` tokens.
        overlong: what becomes of them, and of others, where they are rows of instruction data.
        steps: of a round.
        parameters: numbers that the site trains.
        upload_bytes: of its upload in round 0.
        weight: what it weighs in a round.
        memory: bytes of weights and of a step at its peak, see
            :mod:`fedcore.training.step_memory`; None where they are not known.
    """

    site: str
    rows: int
    duplicates: int
    train: int
    test: int
    lengths: tuple[int, ...]
    truncated: int
    overlong: str | None
    max_length: int
    steps: int
    parameters: int
    upload_bytes: int
    weight: str
    memory: StepMemory | None


def check_site(recipe: Recipe, site: SiteSettings) -> SiteCheck:
    """Read the site's data and build its model and adapter, as its node would.

    Raises:
        FedcoreError: whatever the node would be refused for; a recipe that partitions its data.
    """
    if not recipe.data.at_sites:
        raise FedcoreError(
            f"the recipe has data.source = {recipe.data.source!r}, which is partitioned; set "
            "data.source = 'sites', or data.sites"
        )
    cache = SharedCache()
    experiment = build_experiment(recipe, Observer(), cache, site)
    texts = read_site(recipe, site, experiment.label_names)
    longest = recipe.model.max_length
    ((_, encoded),) = cache.texts.values()
    if encoded.rows is not None:
        lengths = tuple(encoded.rows.lengths.tolist())
    else:
        with quiet_transformers():
            every = [*texts.train.texts, *texts.test.texts]
            ids = experiment.tokenizer(every, truncation=False)["input_ids"]
        lengths = tuple(map(len, ids))
    layout = experiment.binding.layout
    trained = experiment.binding.trained(experiment.method.plan(0).trains)
    upload = experiment.method.upload_layout(layout, 0)
    codec, train = find_codec(recipe.round.codec), len(experiment.shards[site.site])
    duplicates = texts.train.duplicates
    # Two parts of one file carry the same number.
    if site.test_data is not None:
        duplicates += texts.test.duplicates
    return SiteCheck(
        site=site.site,
        rows=len(lengths) + duplicates,
        duplicates=duplicates,
        train=train,
        test=len(experiment.test_shards[site.site]),
        lengths=lengths,
        truncated=sum(length > longest for length in lengths),
        overlong=str(experiment.rows[site.site]) if site.site in experiment.rows else None,
        max_length=longest,
        steps=local_steps(experiment, site.site),
        parameters=sum(parameter.numel() for parameter in trained.values()),
        upload_bytes=codec.bytes(upload),
        weight=_weight(experiment, site.site),
        memory=_memory(experiment, min(longest, max(lengths))),
    )


def _memory(experiment: Experiment, length: int) -> StepMemory | None:
    recipe = experiment.recipe
    trained = experiment.binding.trained(experiment.method.plan(0).trains)
    chosen = set(map(id, trained.values()))
    names = [name for name, p in experiment.model.named_parameters() if id(p) in chosen]
    batch = recipe.training.batch_size
    if recipe.by_trl:
        batch = recipe.sft_settings().part(recipe.training.settings())
    try:
        return step_memory(
            experiment.model,
            names,
            recipe.optimiser.settings(experiment.method),
            batch=batch,
            length=length,
            checkpointing=bool(recipe.training.checkpointing),
            autocast=recipe.training.autocast,
        )
    except FedcoreError:
        return None


def _weight(experiment: Experiment, site: str) -> str:
    by, weight = experiment.recipe.round.weighting, experiment.weight(site)
    if by == "uniform":
        return "as any other"
    return f"{weight:.0f} {'target tokens' if by == 'tokens' else 'training rows'}"
