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
from fedcore.tuners import export_lora, gram_to_lora, tri_to_lora
from tests.tuners.test_export import VANILLA
from tests.tuners.tiny import BUILD, adapted, logits, tokens
from tests.tuners.tri_tiny import STARTS, dense_product, move_factors, tri_adapted, tri_layers

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def trained(name: str, **fields) -> PeftModel:
    model = tri_adapted(name, **fields)
    move_factors(model)
    if name == "bert":
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save["default"].weight += 1
    return model


def test_vanilla_peft_reads_it_on_the_original_base(tmp_path):
    for name, build in BUILD.items():
        folder = tmp_path / name
        build().save_pretrained(folder / "base")
        model = trained(name, init="xs")
        model.save_pretrained(folder / "tri")
        export_lora(folder / "tri", folder / "lora")
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
        *({"init": init} for init in STARTS),
        {"use_rslora": True},
        {"rank_pattern": {r"\w+\.1\..*": 5}, "alpha_pattern": {"q_proj|query|c_attn": 3}},
    ],
)
def test_every_variant_is_exact(name, fields, tmp_path):
    model = trained(name, **fields)
    export_lora(model, tmp_path)
    again = PeftModel.from_pretrained(BUILD[name](), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)


def test_exported_products_ranks_and_scale(tmp_path):
    model = trained("llama", rank_pattern={"layers.1.self_attn.v_proj": 5})
    export_lora(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 5, 5)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not {"init", "train_A", "module_shapes"} & config.keys()
    state = read_adapter(tmp_path)
    assert state.family == "lora"
    assert set(state.scaling.values()) == {1.0}
    for layer, factors in zip(tri_layers(model), state.factors.values(), strict=True):
        product = factors["B"].double() @ factors["A"].double()
        torch.testing.assert_close(product, dense_product(layer), atol=1e-6, rtol=1e-6)


def test_an_fp64_adapter_is_exported_in_fp64(tmp_path):
    model = trained("llama", init="xs").double()
    export_lora(model, tmp_path)
    for layer, factors in zip(
        tri_layers(model), read_adapter(tmp_path).factors.values(), strict=True
    ):
        product = factors["B"] @ factors["A"]
        torch.testing.assert_close(product, dense_product(layer), atol=1e-14, rtol=1e-14)


def test_the_command_exports_a_tri_folder(tmp_path):
    model = trained("bert", init="random")
    model.save_pretrained(tmp_path / "tri")
    command = [sys.executable, "-c", "from fedcore.cli import main; main()", "export"]
    done = subprocess.run(
        [*command, str(tmp_path / "tri"), "--out", str(tmp_path / "lora")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    again = PeftModel.from_pretrained(BUILD["bert"](), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
    export_lora(model, tmp_path / "again")
    first, second = ((tmp_path / f / WEIGHTS).read_bytes() for f in ("lora", "again"))
    assert first == second


def test_each_family_has_its_own_conversion(tmp_path):
    trained("llama").save_pretrained(tmp_path / "tri")
    adapted("llama").save_pretrained(tmp_path / "gram")
    tri, gram = read_adapter(tmp_path / "tri"), read_adapter(tmp_path / "gram")
    with pytest.raises(FedcoreError, match=r"family 'tri'; export needs a 'gram' adapter"):
        gram_to_lora(tri)
    with pytest.raises(FedcoreError, match=r"family 'gram'; export needs a 'tri' adapter"):
        tri_to_lora(gram)
    before = {key: tensor.clone() for key, tensor in tri.to_peft().items()}
    assert tri_to_lora(tri).family == "lora"
    assert all(torch.equal(before[key], tensor) for key, tensor in tri.to_peft().items())


def test_a_folder_without_a_base_is_named(tmp_path):
    trained("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    lost = "base_model.model.model.layers.1.self_attn.v_proj.tri_A"
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / WEIGHTS)
    with pytest.raises(FedcoreError, match=r"module model.layers.1.self_attn.v_proj lacks factor"):
        export_lora(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
