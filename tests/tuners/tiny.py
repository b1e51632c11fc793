"""Models small enough to build from a configuration in milliseconds."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedcore.tuners import GramConfig, GramLayer

VOCABULARY = 61


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        num_labels=3,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config).eval()


def llama() -> nn.Module:
    """Grouped heads: ``v_proj`` is 12 x 24."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    """``c_attn`` is a Conv1D whose weight is 24 x 72."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=24, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=16, initializer_range=0.2
    )
    return GPT2LMHeadModel(config).eval()


TARGETS = {
    "bert": ["query", "intermediate.dense"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "mlp.c_fc"],
}
BUILD = {"bert": bert, "llama": llama, "gpt2": gpt2}
TASK = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}


def config_for(name: str, **fields: object) -> GramConfig:
    known = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS[name], "task_type": TASK[name]}
    return GramConfig(**{**known, **fields})


def adapted(name: str, **fields: object) -> PeftModel:
    return get_peft_model(BUILD[name](), config_for(name, **fields)).eval()


def gram_layers(model: nn.Module) -> list[GramLayer]:
    return [module for module in model.modules() if isinstance(module, GramLayer)]


@torch.no_grad()
def train_a_little(model: nn.Module, adapter: str = "default", size: float = 0.3) -> None:
    """Move every factor away from its start, far enough to change the logits by about one."""
    generator = torch.Generator().manual_seed(9)
    for layer in gram_layers(model):
        factor = layer.gram_A[adapter]
        factor += size * torch.randn(factor.shape, generator=generator)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(tokens()).logits


def linear_layer(
    out_features: int = 7,
    in_features: int = 5,
    dtype: torch.dtype = torch.float64,
    **fields: object,
) -> GramLayer:
    """One adapted ``nn.Linear``, its factor away from the start."""
    torch.manual_seed(1)
    base = nn.Linear(in_features, out_features).to(dtype).requires_grad_(False)
    known = {"r": 3, "lora_alpha": 12}
    layer = GramLayer(base, "default", "block.linear", GramConfig(**{**known, **fields}))
    layer.to(dtype)
    train_a_little(layer)
    return layer


def dense_update(layer: GramLayer, adapter: str = "default") -> Tensor:
    """``s left (A^T A - A0^T A0) right`` by its definition, in fp64."""
    frame = layer.frame(adapter)
    factor = layer.gram_A[adapter].detach().double()
    identity = torch.eye(factor.shape[1], dtype=torch.float64)
    left, right = frame.times_left_t(identity).T, frame.times_right(identity)
    gram = factor.T @ factor
    if adapter in layer.gram_A0:
        initial = layer.gram_A0[adapter].double()
        gram = gram - initial.T @ initial
    return layer.scaling[adapter] * left @ gram @ right
