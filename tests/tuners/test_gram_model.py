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
from fedcore.tuners import GramConfig, GramModel
from tests.tuners.tiny import (
    BUILD,
    adapted,
    bert,
    config_for,
    gram_layers,
    llama,
    logits,
    train_a_little,
)

NAMES = list(BUILD)
VARIANTS = [{}, {"frame": "qr"}, {"offset": False}]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fields", [{}, {"frame": "qr", "init_std": 1.0}])
def test_round_zero_is_the_base_model_to_the_bit(name, fields):
    expected = logits(BUILD[name]())
    model = adapted(name, **fields)
    assert torch.equal(logits(model), expected)
    train_a_little(model)
    assert (logits(model) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fields", VARIANTS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_reloaded_is_bit_equal(name, fields, low_cpu_mem_usage, tmp_path):
    model = adapted(name, **fields)
    train_a_little(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "GRAM"
    again = PeftModel.from_pretrained(
        BUILD[name](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert isinstance(again.base_model, GramModel)
    assert torch.equal(logits(again), logits(model))
    first, second = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for mine, theirs in zip(gram_layers(model), gram_layers(again), strict=True):
        assert mine.frame_ids == theirs.frame_ids


def test_keys_and_shapes_in_the_file(tmp_path):
    adapted("llama", frame="qr").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.v_proj."
    shapes = {
        key.removeprefix(prefix): tuple(tensor.shape)
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }
    assert shapes == {
        "gram_A": (3, 12),
        "gram_A0": (3, 12),
        "gram_left": (12, 12),
        "gram_right": (12, 24),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["module_shapes"]["model.layers.0.self_attn.v_proj"] == [12, 24]
    assert config["module_shapes"]["model.layers.1.self_attn.q_proj"] == [24, 24]


def test_only_factors_and_the_head_train():
    model = adapted("bert")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "gram_A.default" not in name} == {
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    }
    assert len(trained) == 2 + 4


def test_training_moves_factors_and_nothing_else():
    model = adapted("llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=1.0)
    ids = torch.arange(12).reshape(2, 6)
    first = model(ids, labels=ids).loss
    first.backward()
    optimiser.step()
    assert model(ids, labels=ids).loss < first
    moved = {
        key for key, value in model.state_dict().items() if not torch.equal(before[key], value)
    }
    assert moved == {key for key in before if key.endswith("gram_A.default")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_keeps_the_logits(name, safe_merge):
    model = adapted(name)
    train_a_little(model)
    expected = logits(model)
    model.merge_adapter(safe_merge=safe_merge)
    assert not torch.equal(logits(model), logits(BUILD[name]()))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not gram_layers(merged)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def test_disabled_adapter_is_the_base_model_even_when_merged():
    base = logits(llama())
    model = adapted("llama")
    train_a_little(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, atol=1e-5, rtol=0)


def test_several_adapters_switch_add_up_and_go(tmp_path):
    model = adapted("llama")
    model.add_adapter("other", config_for("llama", r=2, offset=False, init_seed=4))
    for adapter in ("default", "other"):
        train_a_little(model, adapter)
    alone = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        alone[adapter] = logits(model)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(n.endswith(f"gram_A.{adapter}") for n in trained)
    assert not torch.equal(alone["default"], alone["other"])
    layer = gram_layers(model)[1]
    x = torch.randn(4, 24)
    model.base_model.set_adapter(["default", "other"])
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


def test_further_adapter_is_idle_until_it_is_activated():
    model = adapted("llama")
    expected = logits(model)
    model.add_adapter("other", config_for("llama", target_modules=["k_proj"], offset=False))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.endswith("gram_A.default") for name in trained)
    assert torch.equal(logits(model), expected)
    model.set_adapter("other")
    assert not torch.equal(logits(model), expected)


def test_second_adapter_loads_beside_the_first(tmp_path):
    model = adapted("llama", frame="qr", frame_seed=1)
    train_a_little(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    host = adapted("llama", r=5)
    host.load_adapter(tmp_path, "guest")
    host.set_adapter("guest")
    assert torch.equal(logits(host), expected)


def test_state_dict_travels_between_models():
    source, sink = adapted("llama"), adapted("llama", init_seed=1)
    train_a_little(source)
    state = get_peft_model_state_dict(source)
    set_peft_model_state_dict(sink, dict(reversed(state.items())))
    assert torch.equal(logits(sink), logits(source))
    factors_only = {key: 2 * value for key, value in state.items() if key.endswith("gram_A")}
    set_peft_model_state_dict(sink, factors_only)
    for mine, theirs in zip(gram_layers(source), gram_layers(sink), strict=True):
        assert torch.equal(2 * mine.gram_A["default"], theirs.gram_A["default"])
        assert torch.equal(mine.gram_A0["default"], theirs.gram_A0["default"])


def test_layers_exclusions_and_patterns_are_honoured():
    model = adapted("llama", layers_to_transform=[1], layers_pattern="layers")
    assert sorted(model.peft_config["default"].module_shapes) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    model = adapted("llama", exclude_modules=[r"v_proj"])
    assert all("q_proj" in module for module in model.peft_config["default"].module_shapes)
    model = adapted("llama", rank_pattern={"v_proj": 5}, alpha_pattern={"layers.0.*q_proj": 30})
    found = {
        name.removeprefix("base_model.model.model."): (m.r["default"], m.scaling["default"])
        for name, m in model.named_modules()
        if m in gram_layers(model)
    }
    assert found["layers.0.self_attn.q_proj"] == (3, 10.0)
    assert found["layers.1.self_attn.q_proj"] == (3, 2.0)
    assert found["layers.1.self_attn.v_proj"] == (5, 6 / 5)


def test_targets_are_known_by_architecture():
    model = get_peft_model(llama(), GramConfig(r=2))
    assert set(model.peft_config["default"].target_modules) == {"q_proj", "v_proj"}


def test_one_configuration_serves_many_clients():
    config = config_for("llama", frame="qr")
    first = get_peft_model(llama(), config)
    second = get_peft_model(llama(), config)
    assert config.module_shapes == {}
    assert config.frame_ids == {}
    assert first.peft_config["default"].frame_ids == second.peft_config["default"].frame_ids


def saved(tmp_path, name: str = "llama", **fields):
    model = adapted(name, **fields)
    train_a_little(model)
    model.save_pretrained(tmp_path)
    return model


def edit_config(folder, **fields) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_file_of_another_frame_recipe_is_refused_before_the_model_changes(tmp_path):
    saved(tmp_path)
    edit_config(tmp_path, frame_seed=1)
    base = llama()
    with pytest.raises(FedcoreError, match=r"module model.layers.0.self_attn.q_proj has frame"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not gram_layers(base)


def test_base_model_of_another_shape_is_refused_before_it_changes(tmp_path):
    saved(tmp_path)
    other = llama()
    other.model.layers[0].self_attn.q_proj = nn.Linear(24, 20)
    with pytest.raises(FedcoreError, match=r"q_proj is 20 x 24 .* made for 24 x 24"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not gram_layers(other)
    del other.model.layers[1]
    other.model.layers[0] = llama().model.layers[0]
    with pytest.raises(FedcoreError, match=r"module model.layers.1.* lacks"):
        PeftModel.from_pretrained(other, tmp_path)


def test_stored_frame_with_other_bytes_is_refused(tmp_path):
    model = saved(tmp_path, frame="qr")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.self_attn.q_proj.gram_left"
    tensors[key] = tensors[key].roll(1, 0)
    save_file(tensors, file)
    with pytest.raises(FedcoreError, match=r"layers.1.self_attn.q_proj has frame"):
        PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(FedcoreError, match=r"layers.1.self_attn.q_proj has frame"):
        set_peft_model_state_dict(model, tensors)


def test_stored_frame_is_never_redrawn(tmp_path):
    model = saved(tmp_path, frame="qr")
    file = tmp_path / "adapter_model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if not k.endswith("gram_left")}
    save_file(kept, file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(FedcoreError, match=r"stored frame .* not loaded"):
        logits(again)
    set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    assert torch.equal(logits(again), logits(model))


def test_half_base_starts_as_itself_and_reloads(tmp_path):
    expected = logits(llama().bfloat16())
    model = get_peft_model(llama().bfloat16(), config_for("llama")).eval()
    assert torch.equal(logits(model), expected)
    train_a_little(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    again = PeftModel.from_pretrained(llama().bfloat16(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_attention_that_never_calls_its_projection_is_refused():
    base = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.raises(
        FedcoreError, match=r"0.self_attn.out_proj belongs to nn.MultiheadAttention"
    ):
        get_peft_model(base, GramConfig(target_modules=["out_proj"]))


def test_head_is_saved_whole(tmp_path):
    model = adapted("bert")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight += 1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(bert()))
