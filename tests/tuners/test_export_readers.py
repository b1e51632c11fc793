"""Exported folders are what readers other than PEFT take: vLLM's loader, llama.cpp's converter."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedcore.tuners import export_lora
from tests.tuners.tiny import adapted, llama, logits, train_a_little
from tests.tuners.tri_tiny import move_factors, tri_adapted

KEY = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.\d+\.[\w.]+)\.lora_(?P<side>[AB])\.weight"
)


def trained(kind: str) -> PeftModel:
    pattern = {"layers.1.self_attn.v_proj": 5} if kind.endswith("mixed") else {}
    gram = kind.startswith("gram")
    model = (adapted if gram else tri_adapted)("llama", rank_pattern=pattern)
    (train_a_little if gram else move_factors)(model)
    return model


@pytest.fixture(params=["gram", "tri", "gram mixed", "tri mixed"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return export_lora(trained(request.param), tmp_path / "lora")


def test_the_files_have_the_names_that_readers_look_for(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }


def test_the_configuration_needs_nothing_that_readers_refuse_or_pass_over(folder: Path) -> None:
    """vLLM wants r, lora_alpha and target_modules, refuses DoRA and modules saved whole, and reads
    no patterns; llama.cpp divides lora_alpha by the rank of each tensor."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert type(config["r"]) is int
    assert type(config["lora_alpha"]) is int
    assert config["lora_alpha"] == config["r"] > 0
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert isinstance(config["target_modules"], list)
    assert not config["modules_to_save"]
    assert (config["bias"], config["use_dora"], config["use_rslora"]) == ("none", False, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert "base_model_name_or_path" in config


def test_the_tensors_are_pairs_of_one_rank_and_nothing_else(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    sides: dict[str, set[str]] = {}
    for key, tensor in tensors.items():
        found = KEY.fullmatch(key)
        assert found is not None, key
        assert found["module"].rsplit(".", 1)[-1] in config["target_modules"]
        assert tensor.dtype == torch.float32
        assert tensor.shape[0 if found["side"] == "A" else 1] == config["r"]
        sides.setdefault(found["module"], set()).add(found["side"])
    assert list(sides.values()) == 4 * [{"A", "B"}]


@pytest.mark.parametrize("kind", ["gram", "tri"])
def test_a_reader_that_scales_by_alpha_over_rank_gets_the_same_model(
    tmp_path: Path, kind: str
) -> None:
    """What vLLM and llama.cpp compute: ``W + (lora_alpha / r) B A``, no pattern looked at."""
    model = trained(kind)
    folder = export_lora(model, tmp_path / "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    expected = logits(model.eval())
    base = llama()
    assert not torch.allclose(logits(base.eval()), expected)
    with torch.no_grad():
        for key, down in tensors.items():
            if (found := KEY.fullmatch(key)) is not None and found["side"] == "A":
                up = tensors[key.replace("lora_A", "lora_B")]
                update = config["lora_alpha"] / down.shape[0] * up @ down
                base.get_submodule(found["module"]).weight += update
    torch.testing.assert_close(logits(base.eval()), expected, rtol=1e-4, atol=1e-4)
