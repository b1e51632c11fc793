"""Tiny models of several families, and one training step of each, for the prefix tests."""

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedcore.training.encoding import EncodedDataset
from fedcore.training.prefix import FrozenPrefix

LAYERS, WIDTH, TOKENS = 4, 16, 7


def encoder(config: Callable, **more):
    return config(
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
        **more,
    )


def bert() -> nn.Module:
    return BertForSequenceClassification(encoder(BertConfig, max_position_embeddings=32))


def roberta() -> nn.Module:
    return RobertaForSequenceClassification(encoder(RobertaConfig, max_position_embeddings=32))


def llama() -> nn.Module:
    config = encoder(LlamaConfig, pad_token_id=0, attention_dropout=0.1)
    return LlamaForSequenceClassification(config)


def gpt2() -> nn.Module:
    return GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=50,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=2,
            n_positions=32,
            num_labels=3,
            pad_token_id=0,
        )
    )


def opt() -> nn.Module:
    return OPTForSequenceClassification(
        OPTConfig(
            vocab_size=50,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            ffn_dim=32,
            max_position_embeddings=32,
            num_labels=3,
            pad_token_id=0,
            layerdrop=0.5,
        )
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "bert": (bert, ["query", "value"]),
    "roberta": (roberta, ["query", "value"]),
    "llama": (llama, ["q_proj", "v_proj"]),
    "gpt2": (gpt2, ["c_attn"]),
    "opt": (opt, ["q_proj", "v_proj"]),
}


def lora(model: nn.Module, targets: list[str], layers: list[int] | None) -> nn.Module:
    torch.manual_seed(1)
    wrapped = get_peft_model(
        model,
        LoraConfig(
            task_type="SEQ_CLS",
            r=2,
            lora_dropout=0.1,
            target_modules=targets,
            layers_to_transform=layers,
            # LoRA's zero B would hide gradients of A.
            init_lora_weights=False,
        ),
    )
    return wrapped.eval()


def make(name: str, layers: list[int] | None) -> nn.Module:
    build, targets = MODELS[name]
    torch.manual_seed(0)
    return lora(build(), targets, layers)


def examples(n: int = 6, vocabulary: int = 50, tokens: int = TOKENS) -> EncodedDataset:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, vocabulary, (n, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(n):
        mask[i, tokens - i % 4 :] = 0
    return EncodedDataset(ids * mask, mask, torch.arange(n) % 3)


def step(model: nn.Module, data: EncodedDataset) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    logits = model(input_ids=data.input_ids, attention_mask=data.attention_mask).logits
    nn.functional.cross_entropy(logits, data.labels).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), found


def assert_equal_steps(
    model: nn.Module, prefix: FrozenPrefix, data: EncodedDataset, states: Tensor
) -> None:
    plain, plain_grads = step(model, data)
    with prefix.reuse():
        prefix.feed(states)
        reused, reused_grads = step(model, data)
    torch.testing.assert_close(reused, plain, rtol=1e-5, atol=1e-6)
    assert reused_grads.keys() == plain_grads.keys()
    assert reused_grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, grad in plain_grads.items():
        assert float(grad.abs().max()) > 0, name
        torch.testing.assert_close(reused_grads[name], grad, rtol=1e-5, atol=1e-6, msg=name)
