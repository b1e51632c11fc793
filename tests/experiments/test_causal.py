"""Language models go through the engine that classifiers go through."""

import json
import math

import pytest
import torch

from fedcore.errors import FedcoreError
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import resume, start
from fedcore.experiments.setup import build_experiment
from fedcore.federation.state import latest_state, read_state
from fedcore.training.evaluation import evaluate
from tests.experiments.jobs import tiny_causal_recipe

METHODS = ("fedit", "florg", "product_svd")


class Stop(Observer):
    """Ends the run in the middle of a round's training."""

    def __init__(self, after_steps: int) -> None:
        self.left = after_steps

    def step_done(self, loss: float) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.mark.parametrize("method", METHODS)
def test_held_out_loss_falls_and_perplexity_is_its_exponential(method, home, tmp_path):
    summary = start(tiny_causal_recipe(home, **{"method.name": method}), tmp_path / "run")
    records = lines(tmp_path / "run")
    losses = [record["loss"] for record in records]
    # An untrained model is about as good as guessing among its 56 words.
    assert losses[0] == pytest.approx(math.log(56), abs=0.1)
    assert losses[-1] < losses[0] - 0.03
    assert records[-1]["train_loss"] < records[1]["train_loss"]
    assert summary["perplexity"] == math.exp(losses[-1])
    assert summary["best_perplexity"] == math.exp(min(losses))
    held = [math.exp(client["global_loss"]) for client in records[-1]["clients"]]
    assert (summary["best_client"], summary["worst_client"]) == (min(held), max(held))
    # No head exists, so none travels.
    assert summary["bytes_up"]["head"] == summary["bytes_down"]["head"] == 0
    assert summary["bytes_up"]["adapter"] > 0


def test_an_interrupted_run_ends_with_the_same_bits(home, tmp_path):
    recipe = tiny_causal_recipe(home, **{"method.name": "florg", "optimiser.state": "keep"})
    start(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start(recipe, tmp_path / "cut", Stop(17))
    assert not (tmp_path / "cut/summary.json").exists()
    resume(tmp_path / "cut")
    states = [read_state(latest_state(tmp_path / run / "state")) for run in ("whole", "cut")]
    assert torch.equal(states[0].row, states[1].row)
    whole, cut = (tmp_path / run / "sample.json" for run in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    for file in (tmp_path / "whole").glob("adapter*/*.safetensors"):
        assert file.read_bytes() == (tmp_path / "cut" / file.parent.name / file.name).read_bytes()


@pytest.mark.parametrize(
    ("method", "folder"),
    [("fedit", "adapter"), ("product_svd", "adapter"), ("florg", "adapter-lora")],
)
def test_plain_peft_loads_the_adapter_on_the_causal_model(method, folder, home, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    recipe = tiny_causal_recipe(home, **{"method.name": method})
    summary = start(recipe, tmp_path / "run")
    assert folder in summary["adapters"]
    config = json.loads((tmp_path / "run" / folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.source)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "run" / folder).eval()
    experiment = build_experiment(recipe, Observer())
    ids = experiment.examples.input_ids[experiment.test]
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits[:, :-1]
    known = experiment.examples.attention_mask[experiment.test, 1:] == 1
    loss = torch.nn.functional.cross_entropy(logits[known], ids[:, 1:][known])
    assert float(loss) == pytest.approx(summary["loss"], abs=1e-5)


def test_the_cached_prefix_changes_nothing(home):
    experiment = build_experiment(tiny_causal_recipe(home), Observer())
    plain = build_experiment(
        tiny_causal_recipe(home, **{"training.reuse_prefix": False}), Observer()
    )
    assert experiment.forward.reuses_prefix
    assert not plain.forward.reuses_prefix
    ours = evaluate(experiment.forward, experiment.examples, experiment.test)
    theirs = evaluate(plain.forward, plain.examples, plain.test)
    torch.testing.assert_close(ours.losses, theirs.losses)


def test_the_sample_is_what_the_models_write(home, tmp_path):
    recipe = tiny_causal_recipe(home, **{"method.name": "fedit"})
    start(recipe, tmp_path / "run")
    sample = json.loads((tmp_path / "run/sample.json").read_text())
    experiment = build_experiment(recipe, Observer())
    state = read_state(latest_state(tmp_path / "run/state"))
    for row, written in (
        (experiment.binding.read(), sample["before"]),
        (state.row, sample["after"]),
    ):
        experiment.binding.load(row)
        ids = experiment.tokenizer(sample["prompt"], return_tensors="pt").input_ids
        text = experiment.model.generate(
            input_ids=ids, max_new_tokens=24, do_sample=False, pad_token_id=0, use_cache=False
        )
        assert (
            experiment.tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)
            == written
        )
    assert sample["before"] != sample["after"]
    assert sample["domain"] in experiment.label_names


def test_clients_with_models_of_their_own_are_scored_by_them(home, tmp_path):
    recipe = tiny_causal_recipe(home, **{"method.name": "local_only"})
    summary = start(recipe, tmp_path / "run")
    last = lines(tmp_path / "run")[-1]
    local = [math.exp(client["local_loss"]) for client in last["clients"]]
    assert summary["worst_client"] == max(local)
    assert json.loads((tmp_path / "run/sample.json").read_text())["client"] == "client-00"


def test_a_perplexity_can_be_the_target(home, tmp_path):
    recipe = tiny_causal_recipe(
        home, **{"method.name": "fedit", "evaluation.target_perplexity": 54}
    )
    summary = start(recipe, tmp_path / "run")
    perplexities = [math.exp(record["loss"]) for record in lines(tmp_path / "run")]
    reached = next(i for i, value in enumerate(perplexities) if value <= 54)
    assert summary["rounds_to_target"] == reached
    assert summary["target_perplexity"] == 54
    assert "target_accuracy" not in summary


def test_a_language_model_has_no_head_to_train_alone(home, tmp_path):
    recipe = tiny_causal_recipe(home, **{"method.name": "head_only"})
    with pytest.raises(FedcoreError, match="no classifier head"):
        start(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
