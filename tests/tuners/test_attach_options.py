"""A recipe's adapter besides its rank: all linear layers, dropout, DoRA, whole modules."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fedcore.errors import FedcoreError
from fedcore.training.binding import ModelBinding
from fedcore.tuners.attach import attach_adapter
from tests.tuners.tiny import bert, gpt2, llama

PLAIN = {"rank": 2, "alpha": 4.0, "layers": None, "use_rslora": False, "init_std": None}
COMMON = {**PLAIN, "frame": "structured", "seed": 0}


def factors(model: nn.Module) -> set[str]:
    return {slot.name for slot in ModelBinding.of(model).layout.factor_slots}


@pytest.mark.parametrize("make", [bert, llama, gpt2])
@pytest.mark.parametrize("family", ["lora", "gram"])
def test_all_linear_is_what_peft_takes_for_it(make, family):
    task = "SEQ_CLS" if make is bert else "CAUSAL_LM"
    options = {"target_modules": "all-linear", "task_type": task, **COMMON}
    ours = attach_adapter(make(), family, **options)
    theirs = get_peft_model(
        make(), LoraConfig(task_type=task, r=2, lora_alpha=4, target_modules="all-linear")
    )
    modules = {name.rpartition(".")[0] for name in factors(ours)}
    assert modules == {name.rpartition(".")[0] for name in factors(theirs)}
    assert len(modules) >= 4


def test_all_linear_leaves_out_an_output_that_ends_like_a_layer():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11))
    model.transformer.h[0].mlp.lm_head = nn.Linear(8, 8)
    adapted = attach_adapter(
        model, "lora", target_modules="all-linear", task_type="CAUSAL_LM", **COMMON
    )
    modules = {name.rpartition(".")[0] for name in factors(adapted)}
    assert "transformer.h.0.mlp.lm_head" in modules
    assert "lm_head" not in modules


def test_layers_limit_all_linear():
    one = attach_adapter(
        llama(),
        "lora",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        **{**COMMON, "layers": [-1]},
    )
    assert {name.split(".")[2] for name in factors(one)} == {"1"}


def test_dropout_dora_and_whole_modules_are_pefts():
    model = attach_adapter(
        llama(),
        "lora",
        target_modules=("q_proj",),
        task_type="CAUSAL_LM",
        dropout=0.25,
        use_dora=True,
        modules_to_save=("norm",),
        **COMMON,
    )
    config = model.peft_config["default"]
    assert (config.lora_dropout, config.use_dora) == (0.25, True)
    assert set(config.modules_to_save) == {"norm"}
    dense = {slot.name for slot in ModelBinding.of(model).layout.dense_slots}
    assert "model.norm.weight" in dense
    assert sum("lora_magnitude_vector" in name for name in dense) == 2
    assert any(isinstance(m, nn.Dropout) and m.p == 0.25 for m in model.modules())


@pytest.mark.parametrize("family", ["gram", "tri"])
@pytest.mark.parametrize(("name", "value"), [("dropout", 0.1), ("use_dora", True)])
def test_what_an_adapter_does_not_have_is_refused_by_name(family, name, value):
    refusal = rf"{name} is {re.escape(repr(value))}, which adapters of family '{family}'"
    with pytest.raises(FedcoreError, match=refusal):
        attach_adapter(bert(), family, target_modules=("query",), **{name: value}, **COMMON)


def test_a_module_to_save_that_is_not_there_is_refused():
    with pytest.raises(FedcoreError, match="'nrom' is not in the model"):
        attach_adapter(
            llama(), "lora", target_modules=("q_proj",), modules_to_save=("nrom",), **COMMON
        )


def test_a_model_without_linear_layers_is_said():
    model = nn.Sequential(nn.Embedding(3, 2))
    model.config = None
    with pytest.raises(FedcoreError, match="the model has no linear layer"):
        attach_adapter(model, "lora", target_modules="all-linear", **COMMON)


def test_dropout_acts_in_training_alone():
    model = attach_adapter(
        llama(),
        "lora",
        target_modules=("q_proj",),
        task_type="CAUSAL_LM",
        dropout=0.5,
        **COMMON,
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    ids = torch.arange(6)[None]
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
