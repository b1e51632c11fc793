"""What a run began from, as hashes that its states carry: recipe, data and model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256

from fedcore.data.base_identity import BASE_FILE, BaseIdentity, base_differences
from fedcore.data.tensor_digest import digest_of_tensors
from fedcore.errors import FedcoreError
from fedcore.experiments.run_folder import RunFolder
from fedcore.experiments.setup import Experiment

RECIPE, DATA, MODEL = "recipe", "data", "model"


def run_origin(experiment: Experiment, folder: RunFolder) -> dict[str, str]:
    """The hashes of what ``experiment`` is made of, before anything is trained.

    The data are the encoded texts with their labels and who holds which; recipe and model are what
    the folder's files say.
    """
    return {
        RECIPE: folder.recipe_digest(),
        DATA: _data(experiment),
        MODEL: _model(folder),
    }


def check_recipe_kept(began: Mapping[str, str], folder: RunFolder) -> None:
    """Refuse a recipe that is not the one with which the run ``began``.

    Raises:
        FedcoreError: with what to do.
    """
    now = folder.recipe_digest()
    if began.get(RECIPE, now) != now:
        file = folder.path / "recipe.toml"
        raise FedcoreError(
            f"{file} was edited after the run began; restore it, or start another run from it: "
            f"fedcore run {file}"
        )


def check_origin(began: Mapping[str, str], now: Mapping[str, str], experiment: Experiment) -> None:
    """Refuse data or a model that are not those with which the run ``began``.

    Raises:
        FedcoreError: naming the source, with what to do.
    """
    recipe = experiment.recipe
    source = recipe.data.source
    for kind, what in (
        (DATA, f"the data of data.source = {source!r}: texts, labels or their split have"),
        (MODEL, f"{BASE_FILE}, which says what the base model was, has"),
    ):
        if began.get(kind, now[kind]) != now[kind]:
            raise FedcoreError(
                f"{what} changed since the run began; restore it, or start another run"
            )


def differences_of_base(experiment: Experiment, folder: RunFolder, action: str) -> tuple[str, ...]:
    """In what the base of ``experiment`` differs as it may from the one the run began with.

    Args:
        action: what cannot be done with the run where it differs otherwise, as a participle.

    Raises:
        FedcoreError: it differs otherwise.
    """
    before = BaseIdentity.read(folder.path)
    if before is None:  # A run of version 0.1.
        return ()
    allow = experiment.recipe.model.allow
    problem, allowed = base_differences(experiment.base, before, allow, "the run's")
    if problem is not None:
        raise FedcoreError(f"{folder.path} cannot be {action}: {problem}")
    return allowed


def _data(experiment: Experiment) -> str:
    examples, total = experiment.examples, sha256()
    tensors = {
        **examples.tensors(),
        "test": experiment.test,
        **{f"train/{client}": rows for client, rows in sorted(experiment.shards.items())},
        **{f"test/{client}": rows for client, rows in sorted(experiment.test_shards.items())},
    }
    total.update(json.dumps(list(experiment.label_names)).encode())
    total.update(digest_of_tensors(tensors.items()).encode())
    return total.hexdigest()


def _model(folder: RunFolder) -> str:
    """Of what the run wrote down of its base model, with which the one here is compared."""
    base = BaseIdentity.read(folder.path)
    return "" if base is None else sha256(json.dumps(base.to_json()).encode()).hexdigest()
