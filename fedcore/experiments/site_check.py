"""What one site would read, train and upload, without training."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.data.codecs import find_codec
from fedcore.errors import FedcoreError
from fedcore.experiments.client_round import local_settings
from fedcore.experiments.observer import Observer
from fedcore.experiments.setup import build_experiment
from fedcore.experiments.site_data import read_site
from fedcore.recipes import Recipe
from fedcore.training.models import quiet_transformers
from fedcore.training.site_settings import SiteSettings


@dataclass(frozen=True)
class SiteCheck:
    """Numbers alone; nothing of a row.

    Attributes:
        rows: that were read, ``duplicates`` of them left out as copies of others.
        train, test: rows that the site trains on and holds out.
        lengths: tokens of each row before truncation, special ones included.
        truncated: rows of more than ``max_length`` tokens.
        steps: of a round.
        parameters: numbers that the site trains.
        upload_bytes: of its upload in round 0.
        weight: what it weighs in a round.
    """

    site: str
    rows: int
    duplicates: int
    train: int
    test: int
    lengths: tuple[int, ...]
    truncated: int
    max_length: int
    steps: int
    parameters: int
    upload_bytes: int
    weight: str


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
    experiment = build_experiment(recipe, Observer(), site=site)
    texts = read_site(recipe.data, site, recipe.seed, experiment.label_names)
    every = [*texts.train.texts, *texts.test.texts]
    with quiet_transformers():
        tokens = experiment.tokenizer(every, truncation=False)["input_ids"]
    lengths = tuple(len(ids) for ids in tokens)
    layout = experiment.binding.layout
    trained = experiment.binding.trained(experiment.method.plan(0).trains)
    upload = experiment.method.upload_layout(layout, 0)
    codec, train = find_codec(recipe.round.codec), len(texts.train)
    duplicates = texts.train.duplicates
    # Two parts of one file carry the same number.
    if site.test_data is not None:
        duplicates += texts.test.duplicates
    return SiteCheck(
        site=site.site,
        rows=len(every) + duplicates,
        duplicates=duplicates,
        train=train,
        test=len(texts.test),
        lengths=lengths,
        truncated=sum(length > recipe.model.max_length for length in lengths),
        max_length=recipe.model.max_length,
        steps=local_settings(experiment).count_steps(train),
        parameters=sum(parameter.numel() for parameter in trained.values()),
        upload_bytes=codec.bytes(upload),
        weight=f"{train} training rows" if recipe.round.weighting == "examples" else "as any other",
    )
