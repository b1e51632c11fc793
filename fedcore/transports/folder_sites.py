"""A recipe's sites by hand: each trains on its own file, and folders are what travels.

The server of :mod:`fedcore.transports.folders` needs no recipe; what is here makes its first
broadcast from one, and trains a round of it where the rows are.
"""

from __future__ import annotations

from pathlib import Path

from fedcore.errors import FedcoreError
from fedcore.experiments.adapters import adapter_state
from fedcore.experiments.client_round import train_locally
from fedcore.experiments.environment import recipe_threads
from fedcore.experiments.observer import Observer
from fedcore.experiments.setup import Experiment, build_experiment
from fedcore.federation.row_counts import RowCounts
from fedcore.methods.registry import options_of
from fedcore.recipes import SITES, Recipe
from fedcore.training.site_settings import SiteSettings
from fedcore.training.trainer_client import FederatedClient
from fedcore.transports.folders import FileServer


def start_federation(recipe: Recipe, folder: str | Path) -> FileServer:
    """A federation in ``folder`` that begins where a simulation of ``recipe`` does.

    The server reads no rows. Its rounds are :meth:`~fedcore.transports.folders.FileServer.round`;
    nothing is evaluated.

    Raises:
        FedcoreError: a recipe of other data than the sites', or one that asks for what folders do
            not carry; or as :meth:`~fedcore.transports.folders.FileServer.create`.
    """
    _check(recipe)
    with recipe_threads(recipe):
        experiment = build_experiment(recipe, Observer())
        start = adapter_state(experiment.model, experiment.binding.read(), experiment)
    return FileServer.create(
        folder,
        start,
        experiment.method.name,
        base=experiment.base,
        allow=recipe.model.allow,
        rounds=recipe.rounds,
        **options_of(experiment.method),
    )


def train_site(
    recipe: Recipe,
    site: SiteSettings,
    broadcast: str | Path,
    upload: str | Path,
    observer: Observer | None = None,
) -> Path:
    """Train one round of ``recipe`` at ``site``: from a broadcast folder to an upload folder.

    Args:
        site: with data of its own.
        broadcast: as the server wrote it, copied here in whatever way.
        upload: to be copied back; an earlier upload in it is replaced.

    Returns:
        The upload folder.

    Raises:
        FedcoreError: as :func:`start_federation`; a broadcast of another method, base or adapter
            than the recipe's, or of a round that it does not have; or the site's own data.
    """
    _check(recipe)
    if not site.owns_data:
        raise FedcoreError("the site's settings have no data; set site and data in them")
    watcher = observer or Observer()
    with recipe_threads(recipe):
        experiment = build_experiment(recipe, watcher, site=site)
        client = FederatedClient(
            experiment.model,
            examples=experiment.weight(site.site),
            tokenizer=experiment.tokenizer,
            name=site.site,
            seed=recipe.seed,
        )
        client.receive(broadcast)
        _check_round(experiment, client)
        if experiment.rows:
            watcher.message(str(RowCounts.sum(experiment.rows.values())))
        layout = experiment.binding.layout
        train_locally(experiment, client.round, site.site, {}, layout, watcher)
        return client.upload(upload)


def _check(recipe: Recipe) -> None:
    if recipe.data.source != SITES:
        raise FedcoreError(
            f"data.source is {recipe.data.source!r}, and through folders every site has data of "
            "its own; set data.source = 'sites'"
        )
    carried = {
        "optimiser.state": ("reset", recipe.optimiser.state),
        "round.codec": ("fp32", recipe.round.codec),
        "round.secure_sum": (False, recipe.round.secure_sum),
        "privacy.noise_multiplier": (None, recipe.privacy.noise_multiplier),
        "privacy.central.noise_multiplier": (None, recipe.privacy.central.noise_multiplier),
    }
    for key, (usual, given) in carried.items():
        if given != usual:
            raise FedcoreError(
                f"{key} is {given!r}, which a site's single rounds through folders do not keep or "
                "carry; leave it out, or deploy the recipe with Flower"
            )


def _check_round(experiment: Experiment, client: FederatedClient) -> None:
    ours, theirs = experiment.method, client.method
    if (ours.name, options_of(ours)) != (theirs.name, options_of(theirs)):
        raise FedcoreError(
            f"the broadcast is of {theirs.name} with {dict(options_of(theirs))}, and the recipe "
            f"says {ours.name} with {dict(options_of(ours))}; start the federation from the same "
            "recipe"
        )
    if client.round >= experiment.recipe.rounds:
        raise FedcoreError(
            f"the broadcast is of round {client.round}, and the recipe has "
            f"{experiment.recipe.rounds}, counted from 0"
        )
