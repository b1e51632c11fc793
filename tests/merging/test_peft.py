"""The results in vanilla PEFT, and beside PEFT's own combinations."""

import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fedcore import aggregate
from fedcore.cli import main
from tests.property.folders import write_folder
from tests.reference.merged import config_of, stored_tensors

WEIGHTS = [3.0, 1.0, 2.0]


def base_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def save(folder, seed, **fields):
    """An adapter that PEFT wrote, with random factors."""
    known = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(base_model(), LoraConfig(**{**known, **fields}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        elif "magnitude" in name:
            parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def mixed(tmp_path):
    """Ranks, alphas and rsLoRA differ; one adapter has a rank of its own in one layer."""
    return [
        save(tmp_path / "a", 1),
        save(tmp_path / "b", 2, r=4, lora_alpha=3, use_rslora=True),
        save(
            tmp_path / "c",
            3,
            r=2,
            rank_pattern={"layers.0.self_attn.q_proj": 5},
            alpha_pattern={"v_proj": 9},
        ),
    ]


@pytest.fixture
def equal(tmp_path):
    return [save(tmp_path / name, n) for n, name in enumerate("abc")]


def updates(model, adapter="default"):
    found = {}
    for name, layer in model.named_modules():
        if adapter in getattr(layer, "lora_A", {}):
            found[name] = layer.get_delta_weight(adapter).double()
    assert len(found) == 4
    return found


def mean_updates(folders):
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    every = [updates(PeftModel.from_pretrained(base_model(), str(f))) for f in folders]
    return {
        name: sum(w * own[name] for w, own in zip(shares, every, strict=True)) for name in every[0]
    }


@torch.no_grad()
def logits(model):
    tokens = torch.randint(0, 61, (3, 7), generator=torch.Generator().manual_seed(5))
    return model(tokens).logits


@torch.no_grad()
def expected_logits(folders):
    model = base_model()
    for name, update in mean_updates(folders).items():
        weight = model.get_submodule(name.removeprefix("base_model.model.")).weight
        weight += update.float()
    return logits(model)


@pytest.mark.parametrize("method", ["flora", "product_svd", "florist"])
def test_peft_computes_the_base_plus_the_mean_update(mixed, tmp_path, method):
    arguments = {"product_svd": {"rank": 24}, "florist": {"options": {"tau": 1.0}}}
    out = tmp_path / "out"
    found = aggregate(mixed, WEIGHTS, method=method, out=out, **arguments.get(method, {}))
    assert found.exact
    model = PeftModel.from_pretrained(base_model(), str(out)).eval()
    for name, update in mean_updates(mixed).items():
        torch.testing.assert_close(updates(model)[name], update, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model), expected_logits(mixed), rtol=0, atol=1e-4)


def test_peft_adds_up_both_adapters_of_fedex(equal, tmp_path):
    out = tmp_path / "out"
    aggregate(equal, WEIGHTS, method="fedex", out=out)
    model = PeftModel.from_pretrained(base_model(), str(out))
    model.load_adapter(str(out / "residual"), adapter_name="residual")
    model.base_model.set_adapter(["default", "residual"])
    torch.testing.assert_close(logits(model.eval()), expected_logits(equal), rtol=0, atol=1e-4)
    model.base_model.set_adapter("default")
    assert float((logits(model) - expected_logits(equal)).abs().max()) > 1e-2


def combined(folders, kind, **options):
    model = PeftModel.from_pretrained(base_model(), str(folders[0]), adapter_name="0")
    for n, folder in enumerate(folders[1:], start=1):
        model.load_adapter(str(folder), adapter_name=str(n))
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    model.add_weighted_adapter(["0", "1", "2"], shares, "merged", kind, **options)
    return updates(model, "merged")


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_product_svd_is_pefts_svd_combination(equal, tmp_path, rank):
    out = tmp_path / "out"
    aggregate(equal, WEIGHTS, rank=rank, out=out)
    ours = updates(PeftModel.from_pretrained(base_model(), str(out)))
    for name, update in combined(equal, "svd", svd_rank=rank).items():
        torch.testing.assert_close(ours[name], update, rtol=0, atol=2e-5)


def test_stacking_is_pefts_cat_combination(mixed, tmp_path):
    out = tmp_path / "out"
    aggregate(mixed, WEIGHTS, method="flora", out=out)
    ours = updates(PeftModel.from_pretrained(base_model(), str(out)))
    for name, update in combined(mixed, "cat").items():
        torch.testing.assert_close(ours[name], update, rtol=0, atol=1e-5)


def test_pefts_linear_combination_is_not_the_mean_of_factors(equal, tmp_path):
    """PEFT puts the root of weight times scaling on both factors; equal ones give s N fedit."""
    out = tmp_path / "out"
    aggregate(equal, WEIGHTS, method="fedit", out=out)
    ours = updates(PeftModel.from_pretrained(base_model(), str(out)))
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    every = [PeftModel.from_pretrained(base_model(), str(folder)) for folder in equal]
    for name, update in combined(equal, "linear").items():
        layers = [model.get_submodule(name) for model in every]
        a, b = (
            sum(
                (2 * w) ** 0.5 * getattr(layer, factor)["default"].weight.double()
                for w, layer in zip(shares, layers, strict=True)
            )
            for factor in ("lora_A", "lora_B")
        )
        torch.testing.assert_close(update, b @ a, rtol=0, atol=1e-5)
        assert float((update - ours[name]).norm()) > 0.1 * float(update.norm())
    third = [1.0, 1.0, 1.0]
    aggregate(equal, third, method="fedit", out=out, overwrite=True)
    ours = updates(PeftModel.from_pretrained(base_model(), str(out)))
    model = PeftModel.from_pretrained(base_model(), str(equal[0]), adapter_name="0")
    for n in (1, 2):
        model.load_adapter(str(equal[n]), adapter_name=str(n))
    model.add_weighted_adapter(["0", "1", "2"], [1 / 3] * 3, "merged", "linear")
    for name, update in updates(model, "merged").items():
        torch.testing.assert_close(update, 3 * ours[name], rtol=0, atol=1e-5)


def test_live_dora_models_mix_with_folders_and_are_written_as_files_are(tmp_path):
    folders = [save(tmp_path / name, n, use_dora=True) for n, name in enumerate("ab")]
    expected = aggregate({"a": folders[0], "b": folders[1]}, [1, 3]).adapter.to_peft()
    stored = stored_tensors(folders[0])
    for name in ("default", "mine"):
        model = PeftModel.from_pretrained(base_model(), str(folders[1]), adapter_name=name)
        live = {key: value for key, value in model.state_dict().items() if ".lora_" in key}
        magnitude = f"lora_magnitude_vector.{name}.weight"
        assert sum(key.endswith(magnitude) for key in live) == 4
        config = model.peft_config[name].to_dict()
        both = {"a": folders[0], "b": (live, config)}
        found = aggregate(both, [1, 3], out=tmp_path / name).adapter.to_peft()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        # The live one gives the keys too, if it comes first.
        first = {"b": (live, config), "a": folders[0]}
        turned = aggregate(first, {"a": 1, "b": 3}).adapter.to_peft()
        assert found.keys() == turned.keys() == stored.keys() == expected.keys()
        loaded = PeftModel.from_pretrained(base_model(), str(tmp_path / name)).state_dict()
        for key, value in expected.items():
            if key.endswith("lora_magnitude_vector"):
                assert torch.equal(loaded[f"{key}.default.weight"], value)
                other = model.state_dict()[f"{key}.{name}.weight"]
                torch.testing.assert_close(value, (stored[key] + 3 * other) / 4)


def test_peft_loads_what_a_rule_kept_on_the_command_line(tmp_path, monkeypatch, capsys):
    folders = [save(tmp_path / name, 0) for name in "abcde"]
    for n, folder in enumerate(folders):
        tensors = stored_tensors(folder)
        noise = stored_tensors(save(tmp_path / "noise", n + 1))
        sign = -10 if n == 3 else 1
        moved = {
            key: (sign if "lora_B" in key else 1) * (tensor + 0.1 * noise[key])
            for key, tensor in tensors.items()
        }
        write_folder(folder, moved, config_of(folder))
    out = tmp_path / "out"
    arguments = ["--method", "robust_krum", "--option", "faulty=1", "--option", "host=flora"]
    command = ["fedcore", "aggregate", *map(str, folders), *arguments, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert not stopped.value.code, printed.err
    assert f"note: {folders[3]}: left out, its score" in printed.out
    assert printed.out.count("left out") == 1
    honest = [folder for folder in folders if folder != folders[3]]
    every = [updates(PeftModel.from_pretrained(base_model(), str(f))) for f in honest]
    model = PeftModel.from_pretrained(base_model(), str(out))
    for name, found in updates(model).items():
        mean = sum(own[name] for own in every) / 4
        torch.testing.assert_close(found, mean, rtol=0, atol=1e-5)
    assert model.peft_config["default"].r == 4 * 3


def test_peft_loads_an_aggregated_dora_adapter(tmp_path):
    folders = [save(tmp_path / name, n, use_dora=True) for n, name in enumerate("ab")]
    found = aggregate(folders, out=tmp_path / "out")
    assert not found.exact
    model = PeftModel.from_pretrained(base_model(), str(tmp_path / "out")).eval()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    mean = found.adapter.dense["model.layers.0.self_attn.q_proj.lora_magnitude_vector"]
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, mean)
    weight = layer.base_layer.weight + layer.get_delta_weight("default")
    turned = mean[:, None] * weight / weight.norm(dim=1, keepdim=True)
    x = torch.randn(2, 24, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(x), x @ turned.T, rtol=1e-4, atol=1e-4)
