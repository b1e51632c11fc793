"""Adapters of every kind that PEFT writes, on tiny models, and what PEFT makes of them in fp64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as peft_config
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 23,
    "initializer_range": 0.2,
}


class Convolutional(nn.Module):
    """Two convolutions of other kernels, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3)
        self.second = nn.Conv2d(5, 4, 1)
        self.last = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)).mean((2, 3)))


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=23))


def _bert() -> nn.Module:
    sizes = {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}
    return BertForSequenceClassification(BertConfig(**sizes, num_labels=3))


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**_SIZES, num_local_experts=3, num_experts_per_tok=2)
    ),
    "gpt2": _gpt2,
    "bert": _bert,
    "conv": Convolutional,
}


def base_model(name: str) -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            # Biases and norms of zero or one would hide what an adapter does to them.
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


@torch.no_grad()
def save_adapter(folder: Path, model: str, config: PeftConfig, seed: int) -> Path:
    """An adapter that PEFT wrote, everything that it trains away from its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(base_model(model), config)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                parameter += torch.randn(parameter.shape, generator=generator) / 5
        wrapped.save_pretrained(str(folder))
    return folder


@torch.no_grad()
def merged_weights(model: str, folder: Path, residual: Path | None = None) -> dict[str, Tensor]:
    """Every weight of the model after PEFT has merged the adapter, in fp64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(base_model(model), str(folder))
        names = ["default"]
        if residual is not None:
            wrapped.load_adapter(str(residual), adapter_name="residual")
            names.append("residual")
            wrapped.base_model.set_adapter(names)
        merged = wrapped.double().merge_and_unload(adapter_names=names)
    return {name: tensor.double() for name, tensor in merged.state_dict().items()}


def relative_error(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> float:
    """``||got - expected|| / ||expected - base||`` over all weights."""
    assert got.keys() == expected.keys()
    lost = sum(float((got[name] - tensor).square().sum()) for name, tensor in expected.items())
    moved = sum(
        float((tensor - base[name].double()).square().sum()) for name, tensor in expected.items()
    )
    return float((lost / moved) ** 0.5)


def lora(**fields: Any) -> LoraConfig:
    """A LoRA configuration of attention layers."""
    known = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    return LoraConfig(**{**known, **fields})


def adalora(**fields: Any) -> AdaLoraConfig:
    known = {"init_r": 3, "target_r": 2, "lora_alpha": 6, "total_step": 10}
    return AdaLoraConfig(**{**known, "target_modules": ["q_proj", "v_proj"], **fields})


MERGED = {
    "task_type": [("llama", lora(task_type="CAUSAL_LM"))],
    "r": [("llama", lora(r=5))],
    "lora_alpha": [("llama", lora(lora_alpha=1))],
    "target_modules": [
        ("llama", lora(target_modules="all-linear")),
        ("llama", lora(target_modules=r".*layers\.1\..*(q|v)_proj")),
        ("llama", lora(target_modules=["embed_tokens", "q_proj"])),
        ("llama", lora(target_modules=["lm_head", "q_proj"])),
        ("conv", lora(target_modules=["first", "second", "last"])),
        ("gpt2", lora(target_modules=["c_attn"])),
    ],
    "exclude_modules": [
        ("llama", lora(target_modules="all-linear", exclude_modules=["down_proj"]))
    ],
    "lora_dropout": [("llama", lora(lora_dropout=0.3))],
    "fan_in_fan_out": [("gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True))],
    "bias": [("qwen2", lora(bias="all")), ("qwen2", lora(bias="lora_only"))],
    "use_rslora": [("llama", lora(use_rslora=True))],
    "modules_to_save": [
        ("llama", lora(modules_to_save=["lm_head", "input_layernorm"])),
        ("bert", lora(target_modules=["query"], task_type="SEQ_CLS")),
    ],
    "init_lora_weights": [
        ("llama", lora(init_lora_weights=start)) for start in ("gaussian", "orthogonal", False)
    ],
    "layers_to_transform": [("llama", lora(layers_to_transform=[1]))],
    "layers_pattern": [("llama", lora(layers_to_transform=[0], layers_pattern="layers"))],
    "rank_pattern": [
        ("llama", lora(rank_pattern={"q_proj": 4})),
        ("llama", lora(rank_pattern={r"^model.layers.0.self_attn.q_proj": 4})),
    ],
    "alpha_pattern": [("llama", lora(alpha_pattern={"v_proj": 9}))],
    "trainable_token_indices": [
        ("llama", lora(trainable_token_indices=[7, 3])),
        ("llama", lora(trainable_token_indices={"embed_tokens": [4, 1, 9]})),
        ("tied", lora(trainable_token_indices=[7, 3])),
    ],
    "use_dora": [("llama", lora(use_dora=True))],
    "velora_config": [("llama", lora(velora_config=peft_config.VeloraConfig()))],
    "lora_bias": [("qwen2", lora(lora_bias=True))],
    "target_parameters": [
        (
            "mixtral",
            lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ),
        ("mixtral", lora(target_modules=[], target_parameters=["mlp.experts.down_proj"])),
    ],
    "ensure_weight_tying": [
        ("tied", lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
        ("tied", lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)),
    ],
    "layer_replication": [("llama", lora(layer_replication=[[0, 2], [1, 2]]))],
    "runtime_config": [("llama", lora())],
    "megatron_core": [("llama", lora(megatron_core="another.core"))],
}
"""Field to configurations that use it; one adapter of each comes back as it was."""

CASES = [(field, *case) for field, cases in MERGED.items() for case in cases]
