"""`fedavg.full`: the whole model trains and travels, and what is left is a model."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedcore.errors import FedcoreError
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import start
from fedcore.experiments.setup import build_experiment
from fedcore.training.encoding import IGNORED
from fedcore.tuners.attach import attach_adapter
from tests.experiments.jobs import tiny_causal_recipe, tiny_recipe

RATE = 0.05
ONE_STEP = {
    "method.name": "fedavg.full",
    "clients": 2,
    "rounds": 1,
    "training.steps": 1,
    "training.batch_size": 512,
    "training.clip_norm": 1e9,
    "optimiser.name": "sgd",
    "optimiser.rates": {"fedavg.full": RATE},
}


def test_one_step_of_each_client_gives_the_mean_of_the_stepped_models(
    home: Path, tmp_path: Path
) -> None:
    recipe = tiny_causal_recipe(home, **ONE_STEP)
    summary = start(recipe, tmp_path / "run")
    experiment = build_experiment(recipe, Observer())
    base = AutoModelForCausalLM.from_pretrained(recipe.model.source, dtype=torch.float32).double()
    counts = {client: len(indices) for client, indices in experiment.shards.items()}
    mean = {name: torch.zeros_like(p) for name, p in base.named_parameters()}
    for client, indices in experiment.shards.items():
        model, examples = deepcopy(base), experiment.examples
        logits = model(
            input_ids=examples.input_ids[indices], attention_mask=examples.attention_mask[indices]
        ).logits
        targets = examples.targets(indices)
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        ).backward()
        for name, parameter in model.named_parameters():
            stepped = parameter.detach() - RATE * parameter.grad
            mean[name] += counts[client] / sum(counts.values()) * stepped
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    moved = 0.0
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), mean[name], rtol=0, atol=1e-6)
        moved += float((mean[name] - base.get_parameter(name)).norm())
    assert moved > 1e-3
    numbers = sum(parameter.numel() for parameter in found.parameters())
    # Two clients, up in one round; no adapter, and everything is dense.
    assert summary["bytes_up"] == {"adapter": 0, "head": 2 * 4 * numbers}
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_classifier_trains_with_its_head(home: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(home, **{"method.name": "fedavg.full", "rounds": 1})
    start(recipe, tmp_path / "run")
    before = build_experiment(recipe, Observer()).model
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    old = dict(before.named_parameters())
    # BERT's pooler lies on the way to the head; every parameter has moved but rows of unused words.
    assert all(not torch.equal(p, old[name].cpu()) for name, p in after.named_parameters())


def test_integers_cannot_be_trained() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    options = {"rank": 1, "alpha": 1.0, "target_modules": (), "layers": None, "use_rslora": False}
    with pytest.raises(FedcoreError, match=r"packed holds torch.int8 numbers.*train an adapter"):
        attach_adapter(
            model, "none", init_std=None, frame="qr", seed=0, whole_model=True, **options
        )
