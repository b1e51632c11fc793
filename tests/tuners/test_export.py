from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fedcore.data import read_adapter
from fedcore.errors import FedcoreError
from fedcore.tuners import export_lora, gram_to_lora
from tests.tuners.tiny import BUILD, adapted, gram_layers, llama, logits, tokens, train_a_little

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

VANILLA = """
import sys
import torch
from pathlib import Path
from peft import PeftModel
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM

classes = dict(bert=BertForSequenceClassification, gpt2=GPT2LMHeadModel, llama=LlamaForCausalLM)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    base = classes[folder.name].from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "lora").eval()
    assert isinstance(model.base_model, LoraModel)
    given = load_file(folder / "io.safetensors")
    with torch.no_grad():
        error = (model(given["tokens"]).logits - given["logits"]).abs().max().item()
        unadapted = (base.eval()(given["tokens"]).logits - given["logits"]).abs().max().item()
        merged = model.merge_and_unload()(given["tokens"]).logits
    print(folder.name, error, (merged - given["logits"]).abs().max().item())
assert not [name for name in sys.modules if name.startswith("fedcore")]
"""


def trained(name: str, **fields) -> PeftModel:
    model = adapted(name, **fields)
    train_a_little(model)
    if name == "bert":
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save["default"].weight += 1
    return model


def test_vanilla_peft_reads_it_on_the_original_base(tmp_path):
    for name, build in BUILD.items():
        folder = tmp_path / name
        build().save_pretrained(folder / "base")
        model = trained(name)
        model.save_pretrained(folder / "gram")
        export_lora(folder / "gram", folder / "lora")
        save_file({"tokens": tokens(), "logits": logits(model)}, folder / "io.safetensors")
        assert (logits(model) - logits(build())).abs().max() > 0.1
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", VANILLA, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == sorted(BUILD)
    assert all(float(error) <= 1e-5 for line in lines for error in line[1:])


@pytest.mark.parametrize("name", list(BUILD))
@pytest.mark.parametrize(
    "fields",
    [
        {"frame": "qr"},
        {"offset": False},
        {"use_rslora": True},
        {"rank_pattern": {r"\w+\.1\..*": 5}, "alpha_pattern": {"q_proj|query|c_attn": 3}},
    ],
)
def test_every_variant_is_exact(name, fields, tmp_path):
    model = trained(name, **fields)
    export_lora(model, tmp_path)
    again = PeftModel.from_pretrained(BUILD[name](), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)


def test_exported_ranks_and_scale(tmp_path):
    export_lora(trained("llama", rank_pattern={"layers.1.self_attn.v_proj": 5}), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 10, 10)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    state = read_adapter(tmp_path)
    assert state.family == "lora"
    assert set(state.scaling.values()) == {1.0}
    # A module of less rank is filled with zeros: readers pass over patterns.
    for module, named in state.factors.items():
        filled = 10 if module == "model.layers.1.self_attn.v_proj" else 6
        assert state.rank(module) == 10
        assert not named["A"][filled:].any()
        assert not named["B"][:, filled:].any()
        assert named["A"][:filled].any(dim=1).all()
    export_lora(trained("llama", offset=False), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 3


def test_export_before_training_is_the_base_model_to_the_bit(tmp_path):
    export_lora(adapted("llama"), tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(logits(again), logits(llama()))


def test_half_precision_factors_stay_accurate_near_the_start():
    # Serving engines load LoRA in bf16; [A; A0] would lose the update to the rounding of A0^T A0.
    model = adapted("llama", init_std=1.0)
    train_a_little(model, size=0.01)
    for layer in gram_layers(model):
        lora_A, lora_B = layer.gram_A.pair("default")
        rounded = lora_B.bfloat16().double() @ lora_A.bfloat16().double()
        exact = lora_B.double() @ lora_A.double()
        assert (rounded - exact).norm() <= 2**-7 * exact.norm()


def test_equal_adapters_give_equal_bytes(tmp_path):
    model = trained("bert")
    model.save_pretrained(tmp_path / "gram")
    export_lora(tmp_path / "gram", tmp_path / "a")
    export_lora(tmp_path / "gram", tmp_path / "a")
    export_lora(model, tmp_path / "b", adapter_name="default")
    assert sorted(os.listdir(tmp_path / "a")) == [CONFIG, WEIGHTS]
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    first, second = (json.loads((tmp_path / f / CONFIG).read_text()) for f in "ab")
    assert first == {**second, "task_type": first["task_type"]}


def test_heads_are_kept(tmp_path):
    model = trained("bert")
    export_lora(model, tmp_path)
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(load_file(tmp_path / WEIGHTS)["base_model.model.classifier.weight"], head)
    assert "classifier" in json.loads((tmp_path / CONFIG).read_text())["modules_to_save"]


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(FedcoreError, match=r"adapter_name is 'x'; the model has \['default'\]"):
        export_lora(trained("llama"), tmp_path, adapter_name="x")
    assert not os.listdir(tmp_path)
    trained("llama").save_pretrained(tmp_path)
    with pytest.raises(FedcoreError, match=r"a folder holds one adapter"):
        export_lora(tmp_path, tmp_path / "out", adapter_name="default")
    tensors = load_file(tmp_path / WEIGHTS)
    lost = "base_model.model.model.layers.1.self_attn.v_proj.gram_A0"
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / WEIGHTS)
    with pytest.raises(FedcoreError, match=r"module model.layers.1.self_attn.v_proj lacks gram_A0"):
        export_lora(tmp_path, tmp_path / "out")
    save_file(tensors, tmp_path / WEIGHTS)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["module_shapes"]["model.layers.0.self_attn.q_proj"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(FedcoreError, match=r"layers.0.self_attn.q_proj has no entry in module_sh"):
        export_lora(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_state_is_not_changed(tmp_path):
    trained("llama").save_pretrained(tmp_path)
    state = read_adapter(tmp_path)
    before = {key: tensor.clone() for key, tensor in state.to_peft().items()}
    lora = gram_to_lora(state)
    assert lora.family == "lora"
    assert state.family == "gram"
    assert all(torch.equal(before[key], tensor) for key, tensor in state.to_peft().items())
