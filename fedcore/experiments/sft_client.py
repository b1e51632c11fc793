"""A client's round of instruction tuning, by trl on its own rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fedcore.experiments.observer import Observer
from fedcore.experiments.setup import Experiment
from fedcore.training.answer_tokens import AnswerTokens
from fedcore.training.local_training import LocalResult, LocalSettings
from fedcore.training.optimisers import OptimiserSettings
from fedcore.training.sft_turn import pack_rows, take_sft_turn


def train_by_trl(
    experiment: Experiment,
    client: str,
    parameters: Mapping[str, nn.Parameter],
    dense: frozenset[str],
    local: LocalSettings,
    optimiser: OptimiserSettings,
    *,
    round: int,
    state: Mapping[str, Tensor],
    observer: Observer,
) -> LocalResult:
    """Train ``client`` for one round, as :func:`~fedcore.training.sft_turn.take_sft_turn` says."""
    recipe = experiment.recipe
    return take_sft_turn(
        experiment.model,
        experiment.tokenizer,
        client_rows(experiment, client),
        parameters,
        dense,
        local,
        optimiser,
        recipe.sft_settings(),
        seed=recipe.seed,
        client=client,
        round=round,
        rounds=recipe.rounds,
        state=state,
        on_step=observer.step_done,
    )


def client_rows(experiment: Experiment, client: str) -> Any:
    """The training rows of ``client`` as trl takes them, packed where the recipe says so; they are
    made once.
    """
    if client not in experiment.packed:
        examples, recipe = experiment.examples, experiment.recipe
        assert isinstance(examples, AnswerTokens)
        rows = examples.take(experiment.training_indices(client)).dataset()
        experiment.packed[client] = pack_rows(rows, recipe.sft_settings(), recipe.model.max_length)
    return experiment.packed[client]
