"""A tiny Llama as a GGUF file, its feed-forward weights in 4-bit blocks."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

HEADS = 4
QUANTISED = "ffn_up"
WORDS = ("<unk>", "<start>", "<end>", "a", "b", "Ġ", "ab")
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": QUANTISED,
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Write a random model; the weights that a reader must find, by transformers' names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(str(path), "llama")
    _describe(writer)
    found = {}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem in _OUTER:
            own = _OUTER[stem]
        else:
            _, _, layer, rest = stem.split(".", 3)
            own = f"blk.{layer}.{_INNER[rest]}"
        found[name] = torch.tensor(_add(writer, own, tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def _describe(writer: gguf.GGUFWriter) -> None:
    writer.add_block_count(2)
    writer.add_context_length(16)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(list(WORDS))
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray) -> np.ndarray:
    """Add one tensor; what it stands for."""
    if name.endswith(QUANTISED):
        kind = gguf.GGMLQuantizationType.Q4_1
        blocks = gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
        return gguf.quants.dequantize(blocks, kind)
    stored = values
    if name.endswith(("attn_q", "attn_k")):
        # llama.cpp keeps the two halves of a rotary pair side by side.
        half = len(values) // HEADS // 2
        stored = values.reshape(HEADS, 2, half, -1).swapaxes(1, 2).reshape(values.shape)
    writer.add_tensor(f"{name}.weight", np.ascontiguousarray(stored))
    return values
