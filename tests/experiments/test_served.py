"""What runs leave is what every server loads, and gives the run's own final model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedcore.experiments.observer import Observer
from fedcore.experiments.run import start
from fedcore.experiments.setup import build_experiment
from fedcore.federation.state import latest_state, read_state
from fedcore.methods.registry import default_methods
from tests.experiments.jobs import tiny_causal_recipe
from tests.reference.served import problems

GLOBAL = [
    method.name
    for method in default_methods()
    if method.family != "none" and not method.capabilities.personalised and method.rule is None
]
FEW = ("fedit", "florg.truncated", "fedex", "florist", "fed_sb")


def _cases() -> list[Any]:
    """Few methods often, all of them and rsLoRA's scale less often."""
    cases = [(method, rslora) for method in GLOBAL for rslora in (False, True)]
    often = [(method, method == "fedex") for method in FEW]
    return [
        pytest.param(*case, marks=() if case in often else pytest.mark.exhaustive) for case in cases
    ]


@pytest.mark.parametrize(("method", "rslora"), _cases())
def test_the_final_adapter_serves_the_final_model(
    method: str, rslora: bool, home: Path, tmp_path: Path
) -> None:
    recipe = tiny_causal_recipe(
        home, **{"method.name": method, "rounds": 2, "adapter.use_rslora": rslora}
    )
    start(recipe, tmp_path / "run")
    folder = tmp_path / "run" / "adapter-lora"
    folder = folder if folder.exists() else tmp_path / "run" / "adapter"
    assert problems(folder) == []
    experiment = build_experiment(recipe, Observer())
    state = read_state(latest_state(tmp_path / "run" / "state"))
    experiment.binding.load(state.row)
    experiment.residual.load(state.residual)
    prompt = experiment.examples.input_ids[:3, :8]
    base = AutoModelForCausalLM.from_pretrained(recipe.model.source, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(input_ids=prompt).logits
        served = PeftModel.from_pretrained(base, folder).eval()(input_ids=prompt).logits
        ours = experiment.model.eval()(input_ids=prompt).logits
    torch.testing.assert_close(served, ours, rtol=1e-5, atol=2e-6)
    assert (served - plain).abs().max() > 1e-4
