"""Every field that PEFT's configuration has, and every kind of adapter: merged rightly or refused.

The yardstick is PEFT's own merge in fp64 of what each adapter's folder holds.
"""

import dataclasses
import json
import math
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file

from fedcore import FedcoreError, aggregate
from fedcore.data import Cohort
from fedcore.data.adapter_fields import FIELDS
from fedcore.transports.folders import FileServer
from tests.property.kinds import (
    CASES,
    MERGED,
    adalora,
    base_model,
    lora,
    merged_weights,
    relative_error,
    save_adapter,
)
from tests.reference.merged import config_of, stored_tensors

REFUSED = {
    "init_lora_weights": {"init_lora_weights": "pissa_niter_4"},
    "megatron_config": {"megatron_config": {"tensor_model_parallel_size": 2}},
    "loftq_config": {"loftq_config": {"loftq_bits": 4}},
    "corda_config": {"corda_config": {"corda_method": "ipm"}},
    "lora_ga_config": {"lora_ga_config": {"direction": "ArB2r"}},
    "monteclora_config": {"monteclora_config": {"num_samples": 4}},
    "use_bdlora": {"use_bdlora": {"nblocks": 2}},
    "arrow_config": {"arrow_config": {"top_k": 2}},
    "kasa_config": {"kasa_config": {"beta": 1e-4}},
    "peft_type": {"peft_type": "LOHA"},
    "foreign": {"a_field_of_next_year": 3},
}
"""Field to what is written into the configuration of an ordinary adapter."""

UNTOUCHED = {
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "eva_config",
    "qalora_group_size",
    "use_qalora",
    "alora_invocation_tokens",
}
"""Fields that tests of their own cover, or that no tensor of a file depends on."""


def test_every_field_of_the_installed_peft_is_on_the_list_and_tested():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= FIELDS["LORA"].keys()
    assert fields <= MERGED.keys() | REFUSED.keys() | UNTOUCHED
    assert {f.name for f in dataclasses.fields(type(adalora()))} <= FIELDS["ADALORA"].keys()


@pytest.mark.parametrize("method", ["product_svd", "flora", "fedit", "fedex"])
@pytest.mark.parametrize(("field", "model", "config"), CASES, ids=lambda v: str(v)[:24])
def test_one_adapter_alone_comes_back_as_peft_merges_it(tmp_path, field, model, config, method):
    folder = save_adapter(tmp_path / "a", model, config, 1)
    out = tmp_path / "out"
    if method == "fedex" and field == "use_dora":
        with pytest.raises(FedcoreError, match="DoRA normalises"):
            aggregate([folder], method=method, out=out)
        return
    result = aggregate(
        [folder], method=method, out=out, rank=8 if method == "product_svd" else None
    )
    residual = out / "residual"
    base = merged_weights(model, folder) if field == "layer_replication" else None
    expected = merged_weights(model, folder)
    got = merged_weights(model, out, residual if residual.exists() else None)
    start = base_model(model).state_dict() if base is None else {k: 0 * v for k, v in base.items()}
    assert relative_error(got, expected, start) < 1e-6
    assert field == "use_dora" or result.exact


@pytest.mark.parametrize("way", ["aggregate", "cohort", "server"])
@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_on_the_list_is_refused_by_name_on_every_way_in(tmp_path, field, way):
    folder = save_adapter(tmp_path / "a", "llama", lora(), 1)
    written = {**config_of(folder), **REFUSED[field]}
    (folder / "adapter_config.json").write_text(json.dumps(written))
    (name,) = REFUSED[field]
    ways = {
        "aggregate": lambda: aggregate([folder], out=tmp_path / "out"),
        "cohort": lambda: Cohort.from_folders({"a": folder}),
        "server": lambda: FileServer.create(tmp_path / "run", folder, "product_svd"),
    }
    with pytest.raises(FedcoreError, match=name):
        ways[way]()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "tensor",
    ["lora_E", "lora_diag", "hada_w1_a", "oft_r.weight", "vera_lambda_b", "lora_A_extra.weight"],
)
def test_an_unknown_tensor_is_no_head(tmp_path, tensor):
    folder = save_adapter(tmp_path / "a", "llama", lora(), 1)
    tensors = stored_tensors(folder)
    key = f"base_model.model.model.layers.0.self_attn.q_proj.{tensor}"
    with pytest.raises(FedcoreError, match=tensor.split(".")[0]):
        aggregate([({**tensors, key: torch.ones(2, 1)}, config_of(folder))])
    # Nor is any other that modules_to_save does not list.
    with pytest.raises(FedcoreError, match="modules_to_save"):
        aggregate([({**tensors, "base_model.model.k.weight": torch.ones(2)}, config_of(folder))])


def saved_pair(tmp_path, model, one, two):
    return [
        save_adapter(tmp_path / name, model, config, seed)
        for name, config, seed in (("a", one, 1), ("b", two, 2))
    ]


def mean_of_merged(model, folders, weights):
    every = [merged_weights(model, folder) for folder in folders]
    return {
        name: sum(w * one[name] for w, one in zip(weights, every, strict=True)) / sum(weights)
        for name in every[0]
    }


@pytest.mark.parametrize(
    ("model", "one", "two"),
    [
        ("llama", adalora(), adalora(init_r=2, lora_alpha=3)),
        ("llama", adalora(), lora()),
        ("qwen2", lora(lora_bias=True), lora(lora_bias=True, r=3, lora_alpha=5)),
        ("conv", lora(target_modules=["first"]), lora(target_modules=["first"], r=3)),
        (
            "mixtral",
            lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
            lora(
                target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                r=3,
                lora_alpha=4,
            ),
        ),
        ("llama", lora(target_modules=["embed_tokens"]), lora(target_modules=["embed_tokens"])),
        (
            "tied",
            lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
            lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        ),
    ],
    ids=["adalora", "adalora-lora", "lora_bias", "conv", "experts", "embedding", "tied"],
)
def test_the_mean_of_two_is_the_mean_of_what_peft_merges(tmp_path, model, one, two):
    folders = saved_pair(tmp_path, model, one, two)
    out = tmp_path / "out"
    result = aggregate(folders, [3, 1], method="flora", out=out)
    assert result.exact
    expected = mean_of_merged(model, folders, [3, 1])
    start = base_model(model).state_dict()
    assert relative_error(merged_weights(model, out), expected, start) < 1e-6
    assert result.errors[0].error < 1e-6


def test_an_adalora_that_was_cut_by_its_pattern_is_the_lora_that_it_is(tmp_path):
    folder = save_adapter(tmp_path / "a", "llama", adalora(), 1)
    tensors, config = stored_tensors(folder), config_of(folder)
    pattern = {}
    for key in list(tensors):
        if key.endswith("lora_E"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_E")
            left = [True, False, module.endswith("q_proj")]
            pattern[f"{module}.lora_E"] = left
            stem = key.removesuffix("lora_E")
            tensors[key] = tensors[key][left]
            tensors[f"{stem}lora_A"] = tensors[f"{stem}lora_A"][left]
            tensors[f"{stem}lora_B"] = tensors[f"{stem}lora_B"][:, left].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": pattern}))
    aggregate([folder], method="flora", out=tmp_path / "out")
    expected = merged_weights("llama", folder)
    got = merged_weights("llama", tmp_path / "out")
    assert relative_error(got, expected, base_model("llama").state_dict()) < 1e-6


@pytest.mark.parametrize("named", [False, True])
def test_token_rows_are_united_and_each_is_the_mean_of_those_that_train_it(tmp_path, named):
    def tokens(*indices):
        listed = list(indices)
        return lora(trainable_token_indices={"embed_tokens": listed} if named else listed)

    folders = saved_pair(tmp_path, "llama", tokens(7, 3), tokens(3, 5))
    result = aggregate(folders, [3, 1], method="flora", out=tmp_path / "out")
    every = [merged_weights("llama", f)["model.embed_tokens.weight"] for f in folders]
    got = merged_weights("llama", tmp_path / "out")["model.embed_tokens.weight"]
    expected = base_model("llama").model.embed_tokens.weight.detach().double().clone()
    expected[7], expected[5] = every[0][7], every[1][5]
    expected[3] = (3 * every[0][3] + every[1][3]) / 4
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert not result.exact
    assert any("different tokens" in flag for flag in result.flags)


@pytest.mark.parametrize(
    ("model", "one", "two"),
    [
        ("llama", lora(use_dora=True), lora()),
        ("llama", lora(alora_invocation_tokens=[3, 4]), lora(alora_invocation_tokens=[5])),
        ("qwen2", lora(bias="all"), lora(bias="lora_only")),
        (
            "llama",
            lora(layer_replication=[[0, 2], [1, 2]]),
            lora(layer_replication=[[0, 2], [0, 1]]),
        ),
    ],
    ids=["dora", "alora", "bias", "layer_replication"],
)
def test_fields_that_give_tensors_their_meaning_have_to_agree(tmp_path, model, one, two):
    folders = saved_pair(tmp_path, model, one, two)
    with pytest.raises(FedcoreError, match=r"that of .* is"):
        aggregate(folders)


@pytest.mark.parametrize("method", ["flora", "fedex", "product_svd"])
def test_what_does_not_add_takes_no_residual_beside_it(tmp_path, method):
    for n, config in enumerate([lora(use_dora=True), lora(alora_invocation_tokens=[3, 4])]):
        folder = save_adapter(tmp_path / str(n), "llama", config, 1)
        if method == "fedex":
            with pytest.raises(FedcoreError, match="residual beside"):
                aggregate([folder], method=method)
        else:
            aggregate([folder], method=method)


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."]
)
def test_wrappers_names_are_left_out(tmp_path, wrapper):
    folder = save_adapter(tmp_path / "a", "llama", lora(), 1)
    tensors, config = stored_tensors(folder), config_of(folder)
    plain = aggregate([folder]).adapter.to_peft()

    def renamed(old, new):
        return {key.replace(old, new): tensor for key, tensor in tensors.items()}

    top = "base_model.model."
    for live in (
        renamed(top, f"{top}{wrapper}"),
        renamed(".self_attn.", f".{wrapper}self_attn."),
        renamed(top, f"module.{top}"),
    ):
        result = aggregate([(live, config)], out=tmp_path / "out", overwrite=True)
        again = result.adapter.to_peft()
        assert again.keys() == plain.keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in plain.items())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|adapter keys).*")
            PeftModel.from_pretrained(base_model("llama"), str(tmp_path / "out"))
    with pytest.raises(FedcoreError, match=r"model\.module"):
        aggregate([(renamed(top, f"{top}module."), config)])


def test_a_minimal_configuration_gives_a_folder_that_peft_loads(tmp_path):
    folder = save_adapter(tmp_path / "a", "llama", lora(modules_to_save=["lm_head"]), 1)
    adapter = (stored_tensors(folder), {"r": 2, "lora_alpha": 6})
    aggregate([adapter, adapter], method="fedit", out=tmp_path / "out")
    start = base_model("llama").state_dict()
    expected = merged_weights("llama", folder)
    assert relative_error(merged_weights("llama", tmp_path / "out"), expected, start) < 1e-6


@pytest.mark.parametrize("method", ["flora", "product_svd", "florist", "fedit"])
def test_all_modules_have_one_rank_unless_patterns_are_wanted(tmp_path, method):
    patterned = lora(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 3})
    folders = saved_pair(tmp_path, "llama", patterned, patterned)
    start = base_model("llama").state_dict()
    weights = {}
    for patterns in (False, True):
        out = tmp_path / str(patterns)
        result = aggregate(folders, method=method, out=out, keep_patterns=patterns)
        config = config_of(out)
        if not patterns:
            assert config["rank_pattern"] == config["alpha_pattern"] == {}
            assert config["r"] == config["lora_alpha"]
            assert {t.shape[0] for k, t in stored_tensors(out).items() if "lora_A" in k} == {
                config["r"]
            }
        weights[patterns] = merged_weights("llama", out)
        size = sum(t.numel() * 4 for t in stored_tensors(out).values())
        assert result.errors[0].bytes == size
    assert relative_error(weights[False], weights[True], start) < 1e-6


def test_sites_that_call_one_base_differently(tmp_path):
    folders = saved_pair(tmp_path, "llama", lora(task_type="CAUSAL_LM"), lora())
    for folder, name in zip(folders, ("/mnt/llama/", "/data/llama"), strict=True):
        written = {**config_of(folder), "base_model_name_or_path": name}
        (folder / "adapter_config.json").write_text(json.dumps(written))
    with pytest.raises(FedcoreError, match="--base NAME"):
        aggregate(folders)
    assert aggregate(folders, same_base=True, method="flora").exact
    aggregate(folders, base="meta/llama", out=tmp_path / "out")
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == "meta/llama"
    written = {**config_of(folders[1]), "base_model_name_or_path": "/mnt/llama"}
    (folders[1] / "adapter_config.json").write_text(json.dumps(written))
    aggregate(folders)


def test_a_rank_that_no_product_can_have_widens_no_other_adapter(tmp_path):
    folders = saved_pair(tmp_path, "llama", lora(r=40), lora())
    with pytest.raises(FedcoreError, match=r"rank 40.*has 16 at most"):
        aggregate(folders)
    # Alone, or where all have it, it costs nothing: routers have few rows and ordinary ranks.
    assert aggregate(folders[:1]).exact


def test_the_error_of_merged_dora_weights_is_measured_on_the_base(tmp_path):
    configs = lora(use_dora=True, rank_pattern={"q_proj": 3}), lora(use_dora=True, lora_alpha=3)
    folders = saved_pair(tmp_path, "llama", *configs)
    model = base_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "base", max_shard_size="20kB")
    blind = aggregate(folders, [3, 1], rank=3)
    assert blind.merged_error is None
    assert all(math.isnan(row.error) for row in blind.errors)
    assert any("DoRA normalises" in flag for flag in blind.flags)
    out = tmp_path / "out"
    result = aggregate(folders, [3, 1], rank=3, base=tmp_path / "base", out=out)
    expected = mean_of_merged("llama", folders, [3, 1])
    error = relative_error(merged_weights("llama", out), expected, model.state_dict())
    assert error > 0.01
    assert result.merged_error == pytest.approx(error, rel=1e-5)
    alone = aggregate(folders[:1], base=tmp_path / "base", method="flora")
    assert alone.merged_error < 1e-6
