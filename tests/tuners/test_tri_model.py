from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn

from fedcore.errors import FedcoreError
from fedcore.tuners import TriConfig, TriModel
from fedcore.tuners.attach import attach_adapter
from tests.tuners.tiny import BUILD, bert, llama, logits
from tests.tuners.tri_tiny import (
    STARTS,
    held_factors,
    move_factors,
    tri_adapted,
    tri_config,
    tri_layers,
)

NAMES = list(BUILD)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("init", ["lora", "ce", "random"])
def test_round_zero_is_the_base_model_to_the_bit(name, init):
    expected = logits(BUILD[name]())
    model = tri_adapted(name, init=init)
    assert torch.equal(logits(model), expected)
    move_factors(model)
    assert (logits(model) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_reloaded_is_bit_equal(name, init, low_cpu_mem_usage, tmp_path):
    model = tri_adapted(name, init=init)
    move_factors(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "TRI"
    again = PeftModel.from_pretrained(
        BUILD[name](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    ).eval()
    assert isinstance(again.base_model, TriModel)
    assert torch.equal(logits(again), logits(model))
    first, second = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)

    def trained(peft_model):
        return [n for n, p in peft_model.named_parameters() if p.requires_grad]

    assert trained(again) == trained(model)


def test_keys_and_shapes_in_the_file(tmp_path):
    tri_adapted("llama", init="random").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.v_proj."
    shapes = {
        key.removeprefix(prefix): tuple(tensor.shape)
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }
    assert shapes == {"tri_A": (3, 24), "tri_R": (3, 3), "tri_B": (12, 3)}
    assert len(tensors) == 4 * 3
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["module_shapes"]["model.layers.0.self_attn.v_proj"] == [12, 24]
    assert (config["train_A"], config["train_R"], config["train_B"]) == (False, True, False)


def test_bases_of_a_reloaded_adapter_are_orthonormal_on_a_half_base(tmp_path):
    tri_adapted("llama", init="random").save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).to(torch.bfloat16)
    for layer in tri_layers(again):
        assert layer.base_layer.weight.dtype == torch.bfloat16
        A, _, B = held_factors(layer)
        for gram in (A @ A.T, B.T @ B):
            assert (gram - torch.eye(3)).abs().max() <= 1e-6
    half = PeftModel.from_pretrained(llama().bfloat16(), tmp_path)
    for mine, theirs in zip(tri_layers(again), tri_layers(half), strict=True):
        for factor in "ARB":
            assert torch.equal(mine.factor(factor)["default"], theirs.factor(factor)["default"])


@pytest.mark.parametrize("init", ["xs", "random"])
def test_only_cores_and_the_head_train_and_move(init):
    model = tri_adapted("bert", init=init)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    cores = {name for name in trained if name.endswith("tri_R.default")}
    assert trained - cores == {
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    }
    assert len(cores) == 4
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    labels = torch.tensor([0, 2])
    first = model(torch.arange(12).reshape(2, 6), labels=labels).loss
    first.backward()
    optimiser.step()
    assert model(torch.arange(12).reshape(2, 6), labels=labels).loss < first
    moved = {k for k, value in model.state_dict().items() if not torch.equal(before[k], value)}
    assert moved == trained


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_keeps_the_logits(name, safe_merge):
    model = tri_adapted(name)
    move_factors(model)
    expected = logits(model)
    model.merge_adapter(safe_merge=safe_merge)
    assert not torch.equal(logits(model), logits(BUILD[name]()))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not tri_layers(merged)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def test_disabled_adapter_is_the_base_model_even_when_merged():
    base = logits(llama())
    model = tri_adapted("llama", init="xs")
    move_factors(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, atol=1e-5, rtol=0)


def test_several_adapters_switch_add_up_and_go(tmp_path):
    model = tri_adapted("llama", init="xs")
    model.add_adapter("other", tri_config("llama", r=2, lora_alpha=7))
    for adapter in ("default", "other"):
        move_factors(model, adapter)
    alone = {}
    for adapter, trains in (("default", "R"), ("other", "ARB")):
        model.set_adapter(adapter)
        alone[adapter] = logits(model)
        trained = {n.split("tri_")[-1] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {f"{factor}.{adapter}" for factor in trains}
    assert not torch.equal(alone["default"], alone["other"])
    layer = tri_layers(model)[1]
    x = torch.randn(4, 24)
    for order in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(order)
        expected = layer.base_layer.weight + sum(layer.get_delta_weight(a) for a in alone)
        torch.testing.assert_close(layer(x), x @ expected.T, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    again = PeftModel.from_pretrained(llama(), tmp_path / "other").eval()
    assert torch.equal(logits(again), alone["other"])
    model.set_adapter("other")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), alone["default"])
    assert not [key for key in model.state_dict() if "other" in key]


def test_second_adapter_loads_beside_the_first(tmp_path):
    model = tri_adapted("llama", init="xs", init_seed=1)
    move_factors(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    host = tri_adapted("llama", r=5)
    host.load_adapter(tmp_path, "guest")
    host.set_adapter("guest")
    assert torch.equal(logits(host), expected)


def test_patterns_are_honoured():
    model = tri_adapted("llama", rank_pattern={"v_proj": 5}, alpha_pattern={"layers.0.*q_proj": 30})
    found = {
        name.removeprefix("base_model.model.model."): (m.r["default"], m.scaling["default"])
        for name, m in model.named_modules()
        if m in tri_layers(model)
    }
    assert found["layers.0.self_attn.q_proj"] == (3, 10.0)
    assert found["layers.1.self_attn.q_proj"] == (3, 2.0)
    assert found["layers.1.self_attn.v_proj"] == (5, 6 / 5)


def test_one_configuration_serves_many_clients():
    config = tri_config("llama", init="random")
    first, second = get_peft_model(llama(), config), get_peft_model(llama(), config)
    assert config.module_shapes == {}
    one, two = get_peft_model_state_dict(first), get_peft_model_state_dict(second)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_base_model_of_another_shape_is_refused_before_it_changes(tmp_path):
    tri_adapted("llama").save_pretrained(tmp_path)
    other = llama()
    other.model.layers[0].self_attn.q_proj = nn.Linear(24, 20)
    with pytest.raises(FedcoreError, match=r"q_proj is 20 x 24 .* made for 24 x 24"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not tri_layers(other)
    del other.model.layers[1]
    other.model.layers[0] = llama().model.layers[0]
    with pytest.raises(FedcoreError, match=r"module model.layers.1.* lacks"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("factor", "ARB")
def test_a_stored_base_is_never_drawn_again(factor, tmp_path):
    model = tri_adapted("llama", init="random")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if not k.endswith(f"q_proj.tri_{factor}")}
    save_file(kept, file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(FedcoreError, match=r"takes its factors from the adapter's file"):
        logits(again)
    set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    assert torch.equal(logits(again), logits(model))


def test_attention_that_never_calls_its_projection_is_refused():
    base = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.raises(FedcoreError, match=r"0.self_attn.out_proj belongs to nn.MultiheadAtt"):
        get_peft_model(base, TriConfig(target_modules=["out_proj"]))


ATTACH = {
    "rank": 2,
    "alpha": 4.0,
    "target_modules": ["query", "value"],
    "layers": [-1],
    "use_rslora": False,
    "init_std": None,
    "frame": "structured",
}


@pytest.mark.parametrize("init", STARTS)
def test_attached_by_family_and_start(init):
    base = logits(bert())
    model = attach_adapter(bert(), "tri", seed=2**40 + 1, init=init, **ATTACH).eval()
    config = model.peft_config["default"]
    assert (config.init, config.r, config.lora_alpha) == (init, 2, 4.0)
    modules = {f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "value")}
    assert config.module_shapes.keys() == modules
    torch.testing.assert_close(logits(model), base, atol=1e-3, rtol=0)
    again = attach_adapter(bert(), "tri", seed=2**40 + 1, init=init, **ATTACH)
    for mine, theirs in zip(tri_layers(model), tri_layers(again), strict=True):
        for factor in "ARB":
            assert torch.equal(mine.factor(factor)["default"], theirs.factor(factor)["default"])


def test_the_engine_gets_orthonormal_bases_unless_it_asks_for_others():
    model = attach_adapter(bert(), "tri", seed=0, **ATTACH)
    assert model.peft_config["default"].init == "random"
    with pytest.raises(FedcoreError, match=r"unknown adapter family 'trio'; did you mean tri"):
        attach_adapter(bert(), "trio", seed=0, **ATTACH)
    with pytest.raises(FedcoreError, match=r"unknown init 'sx'; did you mean xs"):
        attach_adapter(bert(), "tri", seed=0, init="sx", **ATTACH)
