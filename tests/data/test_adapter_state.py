import json
import re

import pytest
import torch
from safetensors.torch import save_file

from fedcore.data.adapter_state import AdapterState
from fedcore.data.declared import declared_rank_and_scaling
from fedcore.data.peft_files import read_adapter, write_adapter
from fedcore.errors import FedcoreError
from tests.property.adapters import lora_state, lora_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_folder_round_trips_to_the_bit(tmp_path, dtype):
    state = lora_state(0, dtype=dtype)
    back = read_adapter(write_adapter(state, tmp_path / "a"))
    assert back.config == state.config
    for key, tensor in state.to_peft().items():
        assert back.to_peft()[key].dtype == dtype
        assert torch.equal(back.to_peft()[key], tensor)
    first = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    again = write_adapter(back, tmp_path / "b") / "adapter_model.safetensors"
    assert again.read_bytes() == first


def test_rows_round_trip_whatever_the_key_order():
    tensors = lora_tensors(1)
    config = {"r": 3, "lora_alpha": 6}
    state = AdapterState.from_peft(tensors, config)
    shuffled = AdapterState.from_peft(dict(reversed(tensors.items())), config)
    layout = state.layout()
    assert layout == shuffled.layout()
    row = state.to_row(layout)
    assert torch.equal(row, shuffled.to_row(layout))
    back = lora_state(2, alpha=6.0).with_row(row, layout)
    for key, tensor in state.to_peft().items():
        assert torch.equal(back.to_peft()[key], tensor)


def test_a_layer_as_wide_as_the_rank_keeps_a_and_b_apart():
    modules = [("square", 4, 4)]
    tensors = lora_tensors(3, rank=4, modules=modules, head=0)
    state = AdapterState.from_peft(tensors, {"r": 4, "lora_alpha": 4})
    a, b = tensors.values()
    assert torch.equal(state.factors["square"]["A"], a)
    assert torch.equal(state.factors["square"]["B"], b)
    row = state.to_row(state.layout())
    layout = state.layout()
    assert torch.equal(layout.view(row, layout.by_name["square.B"]), b.T)


def test_live_keys_and_keys_without_prefix_are_understood():
    state = AdapterState.from_peft(
        {
            "q.lora_A.default.weight": torch.ones(1, 3),
            "q.lora_B.default.weight": torch.ones(2, 1),
            "base_model.model.classifier.modules_to_save.default.weight": torch.ones(2, 2),
        },
        {"r": 1, "lora_alpha": 1},
    )
    assert set(state.factors) == {"q"}
    assert set(state.dense) == {"classifier.weight"}


def test_scaling_follows_patterns_and_rslora():
    config = {
        "r": 4,
        "lora_alpha": 16,
        "rank_pattern": {"0.query": 9},
        "alpha_pattern": {"query": 36},
    }
    assert declared_rank_and_scaling(config, "layer.0.query") == (9, 4.0)
    assert declared_rank_and_scaling(config, "layer.1.query") == (4, 9.0)
    assert declared_rank_and_scaling(config, "layer.1.value") == (4, 4.0)
    assert declared_rank_and_scaling({**config, "use_rslora": True}, "layer.0.query") == (9, 12.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.encoder.layer.0.query.lora_B.weight"), "lacks factor B"),
        (lambda t: t.update({"x.lora_A.weight": torch.zeros(2, 3, 4)}), "of a convolution"),
        (lambda t: t.update({"x.lora_A.weight": torch.zeros(2)}), "two axes"),
        (lambda t: t.update({"n": torch.zeros(2, dtype=torch.int8)}), "int8"),
        (lambda t: t.clear(), "holds no tensor"),
        (lambda t: t.update({"x.gram_A": torch.zeros(2, 3)}), "mixes adapter families"),
    ],
)
def test_malformed_adapters_are_named_and_refused(change, message):
    tensors = lora_tensors(0)
    change(tensors)
    with pytest.raises(FedcoreError, match=message) as caught:
        AdapterState.from_peft(tensors, {"r": 3, "lora_alpha": 3}, name="client 7")
    assert str(caught.value).startswith("client 7")


def test_a_rank_that_is_not_declared_is_refused():
    with pytest.raises(FedcoreError, match="has rank 3, its configuration says 8"):
        AdapterState.from_peft(lora_tensors(0), {"r": 8, "lora_alpha": 3})
    with pytest.raises(FedcoreError, match="lora_alpha is None"):
        AdapterState.from_peft(lora_tensors(0), {"r": 3})


def test_damaged_folders_are_named_and_refused(tmp_path):
    folder = write_adapter(lora_state(0), tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:50], whole[:-7], b"\xff" * 8 + whole[8:], b""):
        weights.write_bytes(broken)
        with pytest.raises(FedcoreError, match="cannot read"):
            read_adapter(folder)
    weights.write_bytes(whole)
    with pytest.raises(FedcoreError, match="more than the budget 10"):
        read_adapter(folder, budget=10)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(FedcoreError, match="only pickled weights are there"):
        read_adapter(folder)
    weights.write_bytes(whole)
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(FedcoreError, match="must hold a JSON object"):
        read_adapter(folder)


def test_what_peft_wrote_is_read_without_loss(tmp_path):
    save_file(lora_tensors(5), str(tmp_path / "adapter_model.safetensors"))
    config = {"r": 3, "lora_alpha": 6, "fan_in_fan_out": True, "target_modules": ["query", "value"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    state = read_adapter(tmp_path)
    assert state.config == config
    assert state.scaling["encoder.layer.0.query"] == 2.0
    out = write_adapter(state, tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text()) == config


def test_states_do_not_change():
    state = lora_state(0)
    with pytest.raises(TypeError):
        state.factors["encoder.layer.0.query"]["A"] = torch.zeros(1)  # type: ignore[index]


@pytest.mark.parametrize(
    "end", ["lora_A.weight.more", "lora_A.weight.weight", "lora_A.x.y.weight", "lora_B.x.bias.y",
            "lora_magnitude_vector.weight.x", "lora_A.x.y", "tri_R.a.b.c.d", "gram_left.x.y"],
)  # fmt: skip
def test_what_follows_a_factor_in_a_key_is_what_peft_writes_or_is_refused(end):
    tensors = {
        "base_model.model.q.lora_A.weight": torch.ones(2, 4),
        "base_model.model.q.lora_B.weight": torch.ones(3, 2),
        f"base_model.model.p.{end}": torch.ones(2, 4),
    }
    with pytest.raises(FedcoreError, match=f"p.{re.escape(end)} is a parameter of an adapter"):
        AdapterState.from_peft(tensors, {"r": 2})
