"""Methods whose result is partly an update of the base weights, through the whole engine."""

import json

import pytest
import torch

from fedcore.data.low_rank import LowRank
from fedcore.data.peft_files import read_adapter
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import resume, start
from fedcore.experiments.setup import build_experiment
from fedcore.federation.state import ServerState, latest_state, read_state, write_state
from fedcore_kernels.layout import FactorLayout
from tests.experiments.jobs import tiny_recipe

METHODS = ("flora", "fedex", "florist")


def update_of(state, module, scaling):
    """The whole dense update of a module: adapter and residual."""
    view = {f: state.layout.view(state.row, state.layout.by_name[f"{module}.{f}"]) for f in "AB"}
    dense = view["B"].T @ view["A"]
    if module in state.residual:
        dense = dense + state.residual[module].outer.T @ state.residual[module].inner
    return scaling * dense


@pytest.mark.parametrize("method", METHODS)
def test_the_final_adapter_holds_the_residual(method, home, tmp_path):
    start(tiny_recipe(home, **{"method.name": method}), tmp_path / "run")
    state = read_state(latest_state(tmp_path / "run/state"))
    assert state.residual
    adapter = read_adapter(tmp_path / "run/adapter")
    for module in state.layout.modules:
        named = adapter.factors[module]
        found = adapter.scaling[module] * named["B"] @ named["A"]
        torch.testing.assert_close(found, update_of(state, module, 16.0 / 2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_recorded_accuracy_is_that_of_the_adapter_in_plain_peft(method, home, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    recipe = tiny_recipe(home, **{"method.name": method})
    summary = start(recipe, tmp_path / "run")
    experiment = build_experiment(recipe, Observer())
    base = AutoModelForSequenceClassification.from_pretrained(home / "model", num_labels=3)
    model = PeftModel.from_pretrained(base, tmp_path / "run/adapter").eval()
    batch = experiment.examples.take(experiment.test)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    right = (logits.argmax(-1) == experiment.examples.labels[experiment.test]).double().mean()
    assert summary["accuracy"] == pytest.approx(float(right))


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_ends_with_the_same_bits(method, home, tmp_path):
    class StopAfter(Observer):
        left = 9

        def step_done(self, loss):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

    recipe = tiny_recipe(home, **{"method.name": method, "rounds": 3})
    start(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start(recipe, tmp_path / "cut", StopAfter())
    resume(tmp_path / "cut")
    whole = read_state(latest_state(tmp_path / "whole/state"))
    cut = read_state(latest_state(tmp_path / "cut/state"))
    assert torch.equal(whole.row, cut.row)
    assert whole.residual.keys() == cut.residual.keys()
    for module, part in whole.residual.items():
        assert torch.equal(part.outer, cut.residual[module].outer)
        assert torch.equal(part.inner, cut.residual[module].inner)
    assert whole.traffic == cut.traffic


def test_exact_methods_report_no_aggregation_error(home, tmp_path):
    for method in ("flora", "fedex"):
        start(tiny_recipe(home, **{"method.name": method}), tmp_path / method)
        records = [json.loads(line) for line in (tmp_path / method / "metrics.jsonl").open()]
        errors = [m["aggregation_error"] for r in records[1:] for m in r["modules"]]
        assert max(errors) < 1e-6


def test_clients_download_the_increments_that_they_missed_or_the_sum_if_smaller(tmp_path):
    layout = FactorLayout.build([("m", "A", 2, 4), ("m", "B", 2, 6)])
    state = ServerState(0, layout, torch.zeros(layout.size))
    nothing = layout.select((), dense=False)
    increment = {"m": LowRank(torch.ones(3, 6), torch.ones(3, 4))}
    for cohort in (("a", "b"), ("a",), ("a",)):
        state = state.advanced(state.row, nothing, reported=cohort, residual=increment)
    # a saw the states before rounds 0, 1 and 2, so it misses round 2's; b misses all three.
    assert state.stale_residual("a") == 3 * 10
    # Three increments of 30 numbers; their sum has rank 4, the smaller side: 40 numbers.
    assert state.stale_residual("b") == state.stale_residual("new") == 4 * 10
    again = read_state(write_state(state, tmp_path))
    assert again.stale_residual("a") == 30
    assert torch.equal(again.residual["m"].outer, state.residual["m"].outer)


def test_fresh_adapters_follow_from_the_seed_of_the_run_or_from_their_own(home):
    def method(**settings):
        return build_experiment(
            tiny_recipe(home, **{"method.name": "flora", **settings}), Observer()
        )

    first, again, other = method(seed=0).method, method(seed=0).method, method(seed=1).method
    assert first.seed == again.seed != other.seed
    assert method(**{"method.seed": 5}).method.seed == 5
