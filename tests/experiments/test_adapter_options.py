"""PEFT's options of an adapter, through whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from fedcore.errors import FedcoreError
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import resume, start
from fedcore.federation.state import latest_state, read_state
from tests.experiments.jobs import tiny_causal_recipe

OPTIONS = {
    "adapter.target_modules": "all-linear",
    "adapter.dropout": 0.2,
    "adapter.use_dora": True,
    "adapter.modules_to_save": ["norm"],
    "rounds": 2,
}


@pytest.mark.parametrize("method", ["fedit", "rolora", "product_svd"])
def test_a_run_federates_magnitudes_and_whole_modules_and_peft_loads_them(
    method: str, home: Path, tmp_path: Path
) -> None:
    recipe = tiny_causal_recipe(home, **{"method.name": method, **OPTIONS})
    start(recipe, tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["use_dora"], config["lora_dropout"]) == (True, 0.2)
    tensors = load_file(adapter / "adapter_model.safetensors")
    # Two of the three layers are adapted, seven linear layers in each.
    layers = {key.split(".lora_A")[0] for key in tensors if "lora_A" in key}
    magnitudes = {key for key in tensors if key.endswith("lora_magnitude_vector")}
    assert len(layers) == len(magnitudes) == 2 * 7
    assert "base_model.model.model.norm.weight" in tensors
    AutoPeftModelForCausalLM.from_pretrained(adapter)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert all("before DoRA" in " ".join(record["flags"]) for record in records[1:])


class StopAfterOne(Observer):
    """Ends a run once its first round is complete."""

    def round_finished(self, record: Any) -> None:
        if record["round"] == 0:
            raise KeyboardInterrupt


def test_dropout_repeats_and_resumes_to_the_same_bits(home: Path, tmp_path: Path) -> None:
    recipe = tiny_causal_recipe(home, **{"method.name": "fedit", **OPTIONS})
    start(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start(recipe, tmp_path / "cut", StopAfterOne())
    torch.manual_seed(99)
    resume(tmp_path / "cut")
    whole, cut = (read_state(latest_state(tmp_path / n / "state")) for n in ("whole", "cut"))
    assert whole.round == cut.round == 2
    assert torch.equal(whole.row, cut.row)


def test_methods_that_update_base_weights_are_refused_beside_dora(
    home: Path, tmp_path: Path
) -> None:
    recipe = tiny_causal_recipe(home, **{"method.name": "fedex", **OPTIONS})
    with pytest.raises(FedcoreError, match=r"adapter.use_dora: fedex updates base weights"):
        start(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "state").exists()
